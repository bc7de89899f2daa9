"""What every loss term sees: the batch, the outputs of both networks, the set-up, and the contract of a term."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.losses.layouts import NCHW, UNKNOWN, VECTOR, Layout, Tapped

UNLABELLED = -1  # the target of a row whose label is withheld; it still belongs to the transfer set
OVER = ("rows", "labelled", "samples", "positions", "batch")


@dataclass
class Batch:
    """One batch as the data module makes it and the terms see it.

    ``inputs``: a tensor (samples, …) or a mapping of such tensors (token ids, attention mask).
    ``targets``: as the data gives them; once ``task.rows`` has seen the batch (rows,) int64, ``UNLABELLED`` where the
    label is withheld, or (rows, classes) shares (mixup, soft labels).
    ``index``: (samples,) int64, the place in the data set, stable over epochs; None where the data has none.
    ``mask``: (samples, positions) bool, the positions that count, for terms that read hidden states.
    ``views``: further inputs of the same samples by name: ``"teacher"`` (what it sees in the place of ``inputs``; a
    whole batch where its tokens are those of another tokenizer: :attr:`of_teacher`), ``"strong"``, ``"rotated"`` …
    ``extra``: what one producer leaves for one reader: partners and shares of a mixture, boxes, lengths of prompts.
    """

    inputs: Any
    targets: Any = None
    index: Tensor | None = None
    mask: Tensor | None = None
    views: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count the samples."""
        return len(_first_tensor(self.inputs))

    @property
    def device(self) -> torch.device:
        """Where its inputs are."""
        return _first_tensor(self.inputs).device

    @property
    def of_teacher(self) -> Batch:
        """The same samples in the tokens of the teacher's own tokenizer; where it has none, this batch."""
        view = self.views.get("teacher")
        return view if isinstance(view, Batch) else self

    def few(self, count: int) -> Batch:
        """Take the first ``count`` samples. Call before ``task.rows``: afterwards targets may be rows, not samples."""
        whole = len(self)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:count] if tensor.ndim and len(tensor) == whole else tensor

        return self.map(cut)

    def without_targets(self) -> Batch:
        """Return the same batch with targets that cannot be read: what a term gets that declares that it reads none."""
        return replace(self, targets=torch.empty(0).as_subclass(_Undeclared) if self.targets is not None else None)

    def to(self, device: Any) -> Batch:
        """Return the batch with all its tensors on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def cast(self, dtype: torch.dtype) -> Batch:
        """Return the batch with its floating-point tensors as this type."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with every tensor changed, those inside of mappings and lists as well."""
        return replace(self, **{f.name: _mapped(getattr(self, f.name), change) for f in fields(self)})


class _Undeclared(Tensor):
    """``ValueError`` on whatever is done with it."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise ValueError("this term reads batch.targets without declaring it (needs_labels)")


@dataclass
class TopK:
    """A teacher of which the k likeliest classes are known, all that a cache of the top-k keeps.

    ``ids`` (rows, k) int64, ``log_probs`` (rows, k): log softmax of these classes at T = 1; ``classes``: how many there
    are. The mass of the tail, 1 − Σ exp(log_probs), is spread over the other classes evenly.

    ``log_rests``: temperature T → log Σ p^(1/T) over the classes outside the k, (rows,) float32, p at T = 1: with it
    the k log-probabilities at T, and the tail's mass, are those of all classes softened, also where ``log_probs`` are
    rounded. ``log_sums`` (rows,): log Σ exp(z) over all classes, so that ``log_probs + log_sums`` are the logits z.
    """

    ids: Tensor
    log_probs: Tensor
    classes: int
    log_rests: Mapping[float, Tensor] = field(default_factory=dict)
    log_sums: Tensor | None = None

    def at(self, temperature: float) -> Tensor:
        """Return log-probabilities (rows, k) at a temperature, of the distribution over all classes.

        ``ValueError`` for a temperature that nothing is known of; it names those of ``log_rests``.
        """
        known = at_least_float32(self.log_probs) / check_temperature(temperature)
        if self.ids.shape[-1] == self.classes:
            return F.log_softmax(known, dim=-1)
        if (rest := self.log_rests.get(float(temperature))) is not None:
            return known - torch.cat([known, rest.unsqueeze(-1)], dim=-1).logsumexp(-1, keepdim=True)
        if temperature == 1:
            return known
        there = ", ".join(f"{t:g}" for t in sorted({1.0, *self.log_rests}))
        raise ValueError(
            f"temperature = {temperature} is not stored with the teacher's top-k: it must be {there}, or be "
            "asked for when the answers are kept (teacher.answers.temperatures)"
        )

    def dense(self) -> Tensor:
        """Make logits (rows, classes) whose softmax has these probabilities, and the tail's mass in equal parts."""
        others = max(1, self.classes - self.ids.shape[-1])
        log_probs = at_least_float32(self.log_probs)
        if (rest := self.log_rests.get(1.0)) is not None:
            tail = rest.unsqueeze(-1).clamp(min=math.log(1e-12)) - math.log(others)
        else:
            tail = ((1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=1e-12) / others).log()
        full = tail.expand(*log_probs.shape[:-1], self.classes)
        return full.scatter(-1, self.ids, log_probs)


class Output:
    """What a network answered.

    ``logits`` (rows, classes); made from ``hidden`` (rows, width) and ``head``, or from ``topk``, when first read, so
    that a fused loss over a large vocabulary, which reads those two, never makes them. ``features``: tap → tensor.
    ``raw``: what the network returned (maps, boxes, a model output). ``members``: the outputs of several teachers.
    ``distilled``: logits (rows, classes) of a student's second head, which learns from the teacher while the first one
    learns the labels (DeiT's distillation token, arXiv 2012.12877); in training alone, :attr:`taught` has them.
    ``views``: view → output on that view of the batch.
    """

    def __init__(
        self,
        logits: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        *,
        hidden: Tensor | None = None,
        head: nn.Module | None = None,
        topk: TopK | None = None,
        distilled: Tensor | None = None,
        raw: Any = None,
        members: Sequence[Output] = (),
        views: Mapping[str, Output] | None = None,
    ) -> None:
        self._logits = logits
        self.features: dict[str, Tensor] = dict(features or {})
        self.hidden, self.head, self.topk, self.distilled, self.raw = hidden, head, topk, distilled, raw
        self.members, self.views = tuple(members), dict(views or {})

    @property
    def has_logits(self) -> bool:
        """Whether there are logits, or what they are made from."""
        return self._logits is not None or self.topk is not None or (self.hidden is not None and self.head is not None)

    @property
    def made_logits(self) -> Tensor | None:
        """The logits where they are there already, None where reading them would make them, or there are none."""
        return self._logits

    @property
    def logits(self) -> Tensor:
        """The logits (rows, classes). ``ValueError`` where nothing gave any."""
        self._logits = self._made()
        return self._logits

    def _made(self) -> Tensor:
        if self._logits is not None:
            return self._logits
        if self.hidden is not None and self.head is not None:
            return self.head(self.hidden)
        if self.topk is not None:
            return self.topk.dense()
        raise ValueError(
            "there are no logits: the network gives none, or this term reads them without declaring it "
            "(needs_student_logits, needs_teacher_logits)"
        )

    @property
    def taught(self) -> Output:
        """What a term sees that reads the teacher's logits: those of the second head, where there is one."""
        if self.distilled is None:
            return self
        views = {name: view.taught for name, view in self.views.items()}
        return Output(self.distilled, self.features, raw=self.raw, members=self.members, views=views)

    def to_float32(self) -> Output:
        """Return the same output with logits of at least single precision; what they are made from stays as it is."""
        if self.has_logits:
            self._logits = at_least_float32(self.logits)
        return self

    def detach(self) -> Output:
        """Return the same numbers without a graph: what one network answers, as the target of another."""
        logits = None
        if self.has_logits:  # made here where nobody has read them yet: the head that makes them has a graph
            with torch.no_grad():
                logits = self._made().detach()
        hidden = None if self.hidden is None else self.hidden.detach()
        features = {name: tensor.detach() for name, tensor in self.features.items()}
        views = {name: view.detach() for name, view in self.views.items()}
        members = [member.detach() for member in self.members]
        return Output(logits, features, hidden=hidden, topk=self.topk, raw=self.raw, members=members, views=views)

    def without_logits(self) -> Output:
        """Return the same output with nothing to make logits from: what a term gets that declares it reads none."""
        return Output(features=self.features, raw=self.raw, members=self.members, views=self.views)


@dataclass(frozen=True)
class Setup:
    """What :meth:`Term.prepare` may look at, before the first step.

    ``student``, ``teacher``, ``batch``: of a dry pass over the first two samples of the first training batch, both
    networks in eval mode, without gradient unless a term needs that of the inputs. Their first dimension says nothing
    of the batch size. ``networks``: the bare modules by role, ``student`` and ``teacher`` (of several teachers
    ``teacher0``, ``teacher1`` …): classifier weights, batch statistics, prefix tokens. ``train_index`` (n,) and
    ``train_targets`` (n, …): the training set, None where the data does not tell. ``classes``: outputs of a row.
    ``epochs``, ``steps``: the length of the run, where it is known. ``layouts``: side (``student``, ``teacher``) → tap
    → layout of the recorded tensor; maps are (B, C, H, W) whatever the network makes.
    """

    student: Output
    teacher: Output
    batch: Batch
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    train_index: Tensor | None = None
    train_targets: Tensor | None = None
    classes: int | None = None
    epochs: int | None = None
    steps: int | None = None
    layouts: Mapping[str, Mapping[str, Layout]] = field(default_factory=dict)

    def layout(self, side: str, tap: str | int, feature: Tensor) -> Layout:
        """Tell a recorded tensor's layout. Of one that no network made: that of the contract, NCHW or plain tokens."""
        by_hand = {2: VECTOR, 3: Layout("tokens"), 4: NCHW}.get(feature.ndim, UNKNOWN)
        return self.layouts.get(side, {}).get(str(tap), by_hand)

    @property
    def size(self) -> int:
        """Places in a table by ``batch.index``: one more than the largest index. ``ValueError`` if it is not known."""
        if self.train_index is None:
            raise ValueError("the training data does not tell its index, which this term keeps a table by")
        return int(self.train_index.max()) + 1


@dataclass(frozen=True)
class Fused:
    """A loss of the logits that :func:`kd.losses.tokens.fused.fused_losses` computes without making them all.

    ``kind``: ``cross_entropy``, ``forward_kl``, ``reverse_kl``, ``js``, ``skewed_kl``, ``skewed_reverse_kl`` or
    ``topk_kl``. ``temperature``: of both sides; a cross-entropy has none. ``share``: β of ``js``, α of the skewed ones,
    of a cross-entropy the label smoothing. ``k``, ``form``: of ``topk_kl``. All as in the functions of these losses.
    """

    kind: str
    temperature: float = 1.0
    share: float = 0.0
    k: int = 128
    form: str = "tail"


class Term(nn.Module):
    """One named summand of the objective: ``forward(student, teacher, batch) -> scalar``, not yet weighted.

    A subclass declares what it needs; the distiller supplies it, or refuses before the first batch.

    ``student_taps`` / ``teacher_taps``
        Names of the tensors to record on each side: module names (``"layer2"``, ``"layer2.0.act:input"``,
        ``"layer2:output.1"``, with a layout that the network does not say ``"layer2@NHWC"``) or
        integers (stage numbers of the network, negative ones from the end). ``None`` stands for all stages.
        After :meth:`prepare` both are lists of plain names, the keys of ``Output.features``.
    ``needs_teacher``, ``needs_student_logits``, ``needs_teacher_logits``, ``needs_labels``
        Whether the term reads the teacher at all, the logits of either network, and ``batch.targets``.
    ``needs_views``
        Names of ``batch.views`` on which both networks are run as well: ``Output.views``.
    ``needs_input_gradient``
        Whether it differentiates by ``batch.inputs``: they require a gradient then, and the teacher keeps its graph.
    ``needs_attention_maps``
        Whether its taps are attention maps, which fused attention does not make: it is switched off around them.
    ``regression``
        Whether the logits may be numbers of any meaning (a regression), and not those of a softmax alone.
    ``two_tokenizers``
        Whether the rows of the teacher may be tokens of another tokenizer than the student's.
    ``every_class``
        Whether it gives each class a share, or measures the size or spread of all logits: of rows in which most
        positions are masked (question answering) it would read the masked ones.
    ``reads_topk``
        Whether it reads ``Output.topk`` where a teacher has no more than that.
    ``reads_softmax_at``
        The temperature T if all that it reads of the teacher's logits is softmax(z / T) of each row; None: it reads
        more (their size, several temperatures, a class over the rows). Where a teacher has a top-k alone, a term that
        does not read it sees :meth:`TopK.dense`, which is log softmax(z) but for a tail in equal parts: it must be 1.
    ``over``
        What its mean is over: ``"rows"``, ``"labelled"`` rows, ``"samples"``, the real ``"positions"`` of
        ``batch.mask``; or ``"batch"``: it is no plain mean
        (Gram matrices, batch statistics, normalisers, contrasts, banks), and on several processes it sees those of
        all: logits and taps with their gradient, targets, index and mask. Not so inputs (NaN there), views of the
        batch, ``extra``, ``raw`` and ``hidden``.
    ``progress``
        Set before each step: the part of the training that is done, 0 to 1, for temperatures that change.

    Buffers (banks, running statistics) are kept in checkpoints. Change them only while ``self.training``.
    """

    needs_teacher: bool = True
    needs_student_logits: bool = True
    needs_teacher_logits: bool = True
    needs_labels: bool = False
    needs_views: Sequence[str] = ()
    needs_input_gradient: bool = False
    needs_attention_maps: bool = False
    regression: bool = False
    two_tokenizers: bool = False
    every_class: bool = False
    reads_topk: bool = False
    reads_softmax_at: float | None = None
    over: str = "rows"

    student_taps: Sequence[str | int] | None = ()
    teacher_taps: Sequence[str | int] | None = ()

    progress: float = 0.0

    def __init__(self) -> None:  # a term without settings takes none: a mistyped key is refused
        super().__init__()

    def prepare(self, setup: Setup) -> None:
        """Build adapters and banks from a dry pass over two samples (:class:`Setup`).

        Called once, on every process alike, before the optimiser is built and weights of an earlier run are loaded;
        the term is in eval mode (``self.training`` is False), and its taps are plain names. Right after it ``forward``
        is called on the same outputs, still in eval mode: it must return a scalar, and change no bank. Modules that
        are assigned here are trained with the student; ``register_buffer`` what checkpoints must keep. Leave the
        networks of the set-up as they are; copy what is to be reused (:meth:`deployed`).

        Raises ``ValueError`` with one sentence when the shapes cannot be matched.
        """

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean loss over the rows, a scalar."""
        raise TypeError(f"{type(self).__name__} does not define forward(student, teacher, batch)")

    def fused(self) -> Fused | None:
        """Return what computes the same as :meth:`forward` from hidden states of tokens; None: nothing does.

        It counts where the class that defines ``forward`` defines it: a subclass with another formula says it anew.
        """
        return None

    def deployed(self, student: nn.Module) -> nn.Module:
        """Return the network that is evaluated, measured and exported: ``student``, or one with a head of this term.

        It shares the student's weights (:func:`kd.models.base.with_module`): called once, after :meth:`prepare`.
        """
        return student

    def pairs(self, student: Output, teacher: Output) -> list[tuple[Tensor, Tensor]]:
        """Return the tapped tensors, student's and teacher's, side by side. ``ValueError`` if not equally many.

        Taps that are still ``None`` (no distiller has resolved them) stand for everything that was recorded.
        """
        students, teachers = self._names(student, teacher)
        if len(students) != len(teachers) or not students:
            raise ValueError(
                f"student_taps = {students} and teacher_taps = {teachers} are not allowed: "
                f"they are compared pair by pair, so both must name equally many taps, one or more"
            )
        return [
            (_recorded(student, s, "student"), _recorded(teacher, t, "teacher"))
            for s, t in zip(students, teachers, strict=True)
        ]

    def tapped(self, setup: Setup) -> list[tuple[Tapped, Tapped]]:
        """Return names, shapes and layouts of the tapped tensors, side by side as :meth:`pairs` gives them."""
        found = []
        tensors = self.pairs(setup.student, setup.teacher)
        for names, pair in zip(zip(*self._names(setup.student, setup.teacher), strict=True), tensors, strict=True):
            sides = zip(("student", "teacher"), names, pair, strict=True)
            one, other = (Tapped(s, str(n), tuple(f.shape), setup.layout(s, n, f)) for s, n, f in sides)
            found.append((one, other))
        return found

    def _names(self, student: Output, teacher: Output) -> tuple[list[str | int], list[str | int]]:
        students = list(student.features if self.student_taps is None else self.student_taps)
        teachers = list(teacher.features if self.teacher_taps is None else self.teacher_taps)
        return students, teachers


def _recorded(output: Output, tap: str | int, side: str) -> Tensor:
    if str(tap) not in output.features:
        raise ValueError(f"{side} tap {tap} was not recorded: there are {', '.join(output.features) or 'none'}")
    return output.features[str(tap)]


def _first_tensor(value: Any) -> Tensor:
    if isinstance(value, Mapping):
        value = next(iter(value.values()))
    return value


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Batch):
        return value.map(change)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------- shared by the pure functions


def at_least_float32(tensor: Tensor) -> Tensor:
    """Turn half precision into float32; float32 and float64 stay: sums of squares and exponents overflow in halves."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def unit_length(tensor: Tensor, dim: int = 1) -> Tensor:
    """Divide by the L2 norm along ``dim``; zeros stay so, without a gradient that grows beyond all bounds."""
    norms = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
    return tensor / norms.masked_fill(norms == 0, math.inf)


def check_same_shape(what: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse shapes that differ, with ``ValueError``: broadcasting would give a number, and a wrong one."""
    if student.shape != teacher.shape:
        shapes = f"the student's is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        raise ValueError(f"{what} must have one shape: {shapes}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return the value. ``ValueError`` when it is not one of the choices."""
    if value not in choices:
        allowed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise ValueError(f"{name} = {value} is not allowed: it must be {allowed}")
    return value


def check_temperature(temperature: float) -> float:
    """Return the temperature. ``ValueError`` when it is not a finite number above zero."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature} is not allowed: it must be a finite number above 0")
    return float(temperature)
