"""What the methods on hidden states share: real positions, pairs of layers, projections, queries and keys.

Integer taps of a transformer count as ``hidden_states`` does: 0 is the output of the embeddings, i that of layer i
(before a final norm), -1 that of the last layer. ``"-1:query"`` is the query projection of a layer, ``"all:query"``
those of all layers (:func:`kd.distill.taps.resolve`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.losses.adapters import match
from kd.losses.base import Batch, Output, Setup, Term, at_least_float32, check_choice

MAPPINGS = ("uniform", "last", "listed")
ADAPTERS = ("auto", "linear", "identity")
# modules that change the scores
OTHER_SCORES = ("rotary", "rope", "relative_attention_bias", "rel_embeddings", "distance_embedding")


# ---------------------------------------------------------------------- real positions


def check_hidden(name: str, hidden: Tensor) -> Tensor:
    """Return the tensor in float32 or better. ``ValueError`` where it is not (B, L, D)."""
    if hidden.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(hidden.shape)}: it must be (B, L, D), samples × positions × width")
    return at_least_float32(hidden)


def real_positions(mask: Tensor | None, like: Tensor) -> Tensor:
    """Return the mask (B, L) as bool, all True if it is None. ``ValueError`` if it does not fit ``like`` (B, L, …)."""
    if mask is None:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    if mask.shape != like.shape[:2]:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}: it must be {tuple(like.shape[:2])}, samples × positions"
        )
    return mask.bool()


def masked_mean(values: Tensor, kept: Tensor) -> Tensor:
    """Compute the mean of ``values`` where ``kept`` (bool, of the same shape) is True; 0 where it is True nowhere."""
    return torch.where(kept, values, 0).sum() / kept.sum().clamp(min=1)


def check_one_length(student: Tensor, teacher: Tensor) -> None:
    """Refuse two tensors (B, L, D) whose positions are not the same ones, with ``ValueError``."""
    if student.shape[:2] != teacher.shape[:2]:
        shapes = f"the student's is {tuple(student.shape[:2])}, the teacher's {tuple(teacher.shape[:2])}"
        raise ValueError(f"hidden states must have one batch size and length: {shapes}")


# ---------------------------------------------------------------------- scores


def split_heads(feature: Tensor, heads: int) -> Tensor:
    """Split (B, L, D) → (B, heads, L, D / heads), in float32 or better. ``ValueError`` where D is no multiple of it."""
    feature = check_hidden("a query, key or value", feature)
    if heads < 1 or feature.shape[2] % heads:
        raise ValueError(f"heads = {heads} is not allowed: it must divide the width {feature.shape[2]}")
    return feature.unflatten(2, (heads, -1)).transpose(1, 2)


def scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Compute scaled dot products before the softmax, q·k / √(D / heads); queries first.

    Two (B, L, D) → (B, heads, L, L).
    """
    query, key = split_heads(query, heads), split_heads(key, heads)
    return product(query, key.transpose(2, 3)) / math.sqrt(query.shape[3])


def product(one: Tensor, other: Tensor) -> Tensor:
    """Multiply matrices in their own type, also under autocast, which would round the product to half precision."""
    with torch.autocast(one.device.type, enabled=False):
        return one @ other


def hide_keys(found: Tensor, keys: Tensor) -> Tensor:
    """Return scores (B, H, L, L) with the most negative number in the columns of padding keys; ``keys`` (B, L) bool."""
    return found.masked_fill(~keys[:, None, None], torch.finfo(found.dtype).min)


def relation_kl(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], heads: int, kept: Tensor) -> Tensor:
    """Compute the mean over samples of Σ_a Σ_t KL(R_t ‖ R_s) / (heads · length), R = softmax(x yᵀ / √d) over real keys.

    ``student`` and ``teacher``: (x, y), each (B, L, D), the widths may differ; ``heads`` of the relation; ``kept``
    (B, L) bool. Padding is cut off as if every sample ran alone; one without a real position counts as 0.
    """
    check_one_length(student[0], teacher[0])
    log_s, log_t = (hide_keys(scores(*pair, heads), kept).log_softmax(-1) for pair in (student, teacher))
    differences = (log_t - log_s).masked_fill(~kept[:, None, None], 0)
    per_query = (log_t.exp() * differences).sum(-1).mean(1)
    per_sample = torch.where(kept, per_query, 0).sum(1) / kept.sum(1).clamp(min=1)
    return per_sample.sum() / max(1, len(per_sample))


# ---------------------------------------------------------------------- layers


def layer_pairs(student: int, teacher: int, mapping: str, embeddings: bool) -> list[tuple[int, int]]:
    """Say which of the student's layers is compared with which of the teacher's: pairs of places in two lists of taps.

    ``student``, ``teacher``: lengths of the lists, which begin with the embeddings where ``embeddings`` is True. With
    n and N layers behind these, ``mapping`` is ``"uniform"``, layer i with k·i, k = N / n (rounded down where it is not
    whole); ``"last"``, layer i with N − n + i; embeddings with embeddings in both; or ``"listed"``, place by place.

    ``ValueError`` where the student has more layers than the teacher, or lists are compared that are not equally long.
    """
    check_choice("mapping", mapping, MAPPINGS)
    if mapping == "listed" or student == teacher:
        if student != teacher or not student:
            raise ValueError(
                f"mapping = {mapping} is not allowed with {student} student_taps and {teacher} teacher_taps: "
                "both must name equally many taps, one or more"
            )
        return [(i, i) for i in range(student)]
    first = int(embeddings)
    n, N = student - first, teacher - first
    if not 1 <= n <= N:
        raise ValueError(
            f"mapping = {mapping} is not allowed with {n} layers of the student and {N} of the teacher: the student "
            "must have one or more, and not more than the teacher"
        )
    found = [i * N // n if mapping == "uniform" else N - n + i for i in range(1, n + 1)]
    return [(0, 0)][:first] + [(first + i, first + j - 1) for i, j in enumerate(found)]


class LayerTerm(Term):
    """A term that compares layers; in :meth:`prepare` its taps become the lists of those that are paired."""

    needs_student_logits = False
    needs_teacher_logits = False
    over = "samples"

    parts = 1  # tensors of one layer: the taps are all first ones, then all second ones …
    embeddings = True  # whether the lists begin with the embedding output

    def __init__(
        self, student_taps: Sequence[str | int] | None, teacher_taps: Sequence[str | int] | None, mapping: str
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = student_taps, teacher_taps
        self.mapping = check_choice("mapping", mapping, MAPPINGS)

    def pair_layers(self, setup: Setup) -> None:
        """Keep the taps that are compared, side by side. ``ValueError`` where they cannot be paired."""
        sides = self._names(setup.student, setup.teacher)
        for side, names in zip(("student", "teacher"), sides, strict=True):
            if len(names) % self.parts:
                raise ValueError(
                    f"{side}_taps = {names} is not allowed: it must name {self.parts} tensors of each layer, first the "
                    "queries of all layers, then the keys, then the values where they are read"
                )
        counts = [len(names) // self.parts for names in sides]
        pairs = self.choose(layer_pairs(counts[0], counts[1], self.mapping, self.embeddings))
        self.student_taps, self.teacher_taps = (
            [names[part * count + pair[side]] for part in range(self.parts) for pair in pairs]
            for side, (names, count) in enumerate(zip(sides, counts, strict=True))
        )

    def choose(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return those pairs of layers that the method compares: all of them."""
        return pairs

    def layers(self, student: Output, teacher: Output) -> list[list[Any]]:
        """Return for each pair of layers the student's tensors, then the teacher's."""
        pairs = self.pairs(student, teacher)
        count = len(pairs) // self.parts
        of_layer = [pairs[layer::count] for layer in range(count)]
        return [[s for s, _ in found] + [t for _, t in found] for found in of_layer]


class ProjectedTerm(LayerTerm):
    """A term on hidden states that brings the student's to the teacher's width.

    ``adapter``: ``"auto"``, a linear layer where the widths differ; ``"linear"``, always one; ``"identity"``, never.
    ``shared``: one for all layers instead of one for each.
    """

    shared = False

    def __init__(
        self,
        student_taps: Sequence[str | int] | None,
        teacher_taps: Sequence[str | int] | None,
        mapping: str,
        adapter: str,
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping)
        self.adapter = check_choice("adapter", adapter, ADAPTERS)
        self.adapters: nn.ModuleList | None = None

    def prepare(self, setup: Setup) -> None:
        """Pair the layers and build the projections, where and of the type that the student's hidden states are."""
        self.pair_layers(setup)
        name = type(self).__module__.rpartition(".")[2]
        found: list[nn.Module] = []
        for (own, other), (feature, goal) in zip(
            self.tapped(setup), self.pairs(setup.student, setup.teacher), strict=True
        ):
            check_hidden(f"student tap {own.name}", feature)
            check_hidden(f"teacher tap {other.name}", goal)
            if self.shared and found:
                found.append(found[0])
                continue
            same = self.adapter == "auto" and feature.shape[2] == goal.shape[2]
            adapter, _ = match(name, "identity" if same else self.adapter, own, other)
            found.append(adapter.to(feature))
        self.adapters = nn.ModuleList(found)

    def projected(self, student: Output, teacher: Output) -> list[tuple[Tensor, Tensor]]:
        """Return for each pair of layers the student's projected hidden states and the teacher's, (B, L, D) each."""
        pairs = self.pairs(student, teacher)
        if self.adapters is None:
            raise ValueError("the adapters are missing: call prepare(setup) before the first batch")
        return [(adapter(s), t) for adapter, (s, t) in zip(self.adapters, pairs, strict=True)]


class HeadsTerm(LayerTerm):
    """A term on queries, keys, values: ``heads`` null is the number of attention heads that each network names."""

    parts = 2
    embeddings = False
    equal_heads = True  # whether both networks must have as many
    of_scores = True  # whether queries and keys are multiplied as the network does

    def __init__(
        self,
        student_taps: Sequence[str | int] | None,
        teacher_taps: Sequence[str | int] | None,
        mapping: str,
        heads: int | None,
    ) -> None:
        super().__init__(student_taps, teacher_taps, mapping)
        if heads is not None and heads < 1:
            raise ValueError(f"heads = {heads} is not allowed: it must be 1 or more, or null")
        self.heads = heads
        self.numbers = (heads or 0, heads or 0)  # of student and teacher

    def prepare(self, setup: Setup) -> None:
        """Pair the layers; find out the heads. ``ValueError`` where that fails, or scores are no plain products."""
        self.pair_layers(setup)
        networks = [list(_of_side(setup, side)) for side in ("student", "teacher")]
        sides = zip(("student", "teacher"), networks, (self.student_taps, self.teacher_taps), strict=True)
        for side, found, taps in sides:
            other = [reason for network in found if (reason := _other_scores(network, [str(t) for t in taps or ()]))]
            if other and self.of_scores:
                raise ValueError(
                    f"the attention scores of the {side} are no products of queries and keys alone ({other[0]}): "
                    "minilmv2 compares queries, keys and values each with itself"
                )
        if self.heads is None:
            self.numbers = (_heads(networks[0], "student"), _heads(networks[1], "teacher"))
        if self.equal_heads and self.numbers[0] != self.numbers[1]:
            raise ValueError(
                f"the student has {self.numbers[0]} attention heads, the teacher {self.numbers[1]}: this method "
                "compares head by head, so both must have equally many (minilmv2 does not need it)"
            )

    def scored(self, student: Output, teacher: Output) -> list[tuple[Tensor, Tensor]]:
        """Compute the scores of each pair of layers before softmax, (B, heads, L, L) each, padding not yet hidden."""
        own, other = self.numbers
        return [(scores(q, k, own), scores(t_q, t_k, other)) for q, k, t_q, t_k in self.layers(student, teacher)]


def over_positions(batch: Batch) -> str:
    """Say what a mean over real positions runs over: the samples where all are real."""
    return "samples" if batch.mask is None else "positions"


def over_pairs(batch: Batch) -> str:
    """Say what a mean over pairs of real positions runs over: the samples if all are real, otherwise the whole batch.

    Samples have different lengths, and the mean of the processes' means is another number.
    """
    return "samples" if batch.mask is None else "batch"


def _of_side(setup: Setup, side: str) -> Iterable[nn.Module]:
    return (network for role, network in setup.networks.items() if role.startswith(side))


def _other_scores(network: nn.Module, taps: Sequence[str]) -> str | None:
    """Say what a network's attention does beside scaling the products of all queries and keys; None: nothing known."""
    names = dict(network.named_modules())
    found = [name for name in names if name.rpartition(".")[2].startswith(OTHER_SCORES)]
    around = sorted({tap.partition(":")[0].rpartition(".")[0] for tap in taps})
    found += [f"{name} is causal" for name in around if getattr(names.get(name), "is_causal", None) is True]
    return found[0] if found else None


def _heads(networks: Sequence[nn.Module], side: str) -> int:
    for module in (m for network in networks for m in network.modules()):
        number = getattr(getattr(module, "config", None), "num_attention_heads", None)
        if isinstance(number, int):
            return number
    raise ValueError(f"heads = null is not allowed: the {side} names no config.num_attention_heads, so give a number")
