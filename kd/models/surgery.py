"""A student made from its teacher: layers copied, width sliced by importance, for networks of transformers.

DistilBERT (Sanh 2019, arXiv 1910.01108) starts from every other layer of BERT; Shleifer and Rush 2020 (arXiv
2010.13002) call it "shrink and fine-tune"; Minitron (Muralidharan 2024, arXiv 2407.14679) slices widths by importance.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KEEP = ("uniform", "every_other", "first", "last", "ends")
EMBEDDINGS = ("copied", "tied", "random")
# the dimension of attention heads: of what these layers make, and of what those read
HEADS_OUT = re.compile(r"(^|\.)(query|key|value|[qkv]_proj|[qkv]_lin|query_proj|key_proj|value_proj)$")
HEADS_IN = re.compile(r"(^|\.)(o_proj|out_lin|out_proj|attention\.output\.dense|attn\.o)$")
INNER = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim")  # of a configuration: the feed-forward width


@dataclass(frozen=True)
class Surgery:
    """What a student keeps of its teacher.

    ``layers``: how many, or which (numbers from 0, in order); null: all. ``keep``: which, where only their number is
    given: ``uniform`` from the first to the last, rounded (12 → 6: 0, 2, 4, 7, 9, 11, as DistilBERT), ``every_other``
    from the first, the ``first``, the ``last``, or both ``ends``. ``hidden``: width of the hidden states, a multiple of
    that of a head; ``heads``: how many of attention, at the same width of the hidden states, in networks that say in
    their configuration how wide a head is (Llama, not BERT); ``intermediate``: width of the feed-forward layers. What
    is kept of a width is what has the largest weights. ``embeddings``: ``copied``, tied or not as the teacher's;
    ``tied``: copied, and the output projection is the same matrix; or ``random``. ``initialise``: false: the shape
    alone, all weights random. The vocabulary is the teacher's, which ``data.vocabulary`` restricts for both.
    """

    layers: Any = None
    keep: str = "uniform"
    hidden: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    embeddings: str = "copied"
    initialise: bool = True

    def __post_init__(self) -> None:
        for key, choices in (("keep", KEEP), ("embeddings", EMBEDDINGS)):
            if getattr(self, key) not in choices:
                allowed = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise ValueError(f"{key} = {getattr(self, key)} is not allowed: it must be {allowed}")


def chosen_layers(layers: Any, total: int, keep: str = "uniform") -> list[int]:
    """Choose which of ``total`` layers are kept, in order. ``ValueError`` for what is not there.

    ``layers``: a number of them, or their numbers; None: all.
    """
    if layers is None and keep in ("first", "last", "ends"):
        raise ValueError(f"keep = {keep} needs the number of layers (layers = …)")
    if layers is None:
        return list(range(total)) if keep != "every_other" else list(range(0, total, 2))
    if isinstance(layers, Sequence) and not isinstance(layers, str):
        listed = [int(layer) for layer in layers]
        if not listed or listed != sorted(set(listed)) or not 0 <= listed[0] <= listed[-1] < total:
            raise ValueError(f"layers = {listed} is not allowed: numbers from 0 to {total - 1}, in order, each once")
        return listed
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= total:
        raise ValueError(f"layers = {layers} is not allowed: a number from 1 to {total}, or a list of layers")
    if keep == "uniform":
        return [total - 1] if layers == 1 else [round(i * (total - 1) / (layers - 1)) for i in range(layers)]
    if keep == "every_other":
        if layers != len(range(0, total, 2)):
            raise ValueError(f"layers = {layers} is not allowed: every other of {total} are {len(range(0, total, 2))}")
        return list(range(0, total, 2))
    front = {"first": layers, "last": 0, "ends": (layers + 1) // 2}[keep]
    return [*range(front), *range(total - (layers - front), total)]


def student_of(teacher: nn.Module, surgery: Surgery) -> nn.Module:
    """Make a student from a network of transformers: the same class, with the layers and the width that it keeps.

    Its output projection, classifier and other heads are copied along; where teacher and student have one shape, so is
    every weight. Raises ``ValueError`` for a network of another library, and for a width that cannot be cut.
    """
    config: Any = getattr(teacher, "config", None)
    if config is None or not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"{type(teacher).__name__} cannot be cut: it is no network of transformers")
    kept = chosen_layers(surgery.layers, config.num_hidden_layers, surgery.keep)
    smaller = _smaller(config, kept, surgery)
    make: Any = type(teacher)
    student = make(smaller)
    if surgery.embeddings == "tied":
        head = student.get_output_embeddings()
        if head is None or head.weight is not student.get_input_embeddings().weight:
            raise ValueError(f"embeddings = tied is not allowed: a {make.__name__} has no output projection to tie")
    if surgery.initialise:
        _copy(teacher, student, kept, surgery)
    return student.train()


def _smaller(config: Any, kept: Sequence[int], surgery: Surgery) -> Any:
    made, total = copy.deepcopy(config), config.num_hidden_layers
    for name, value in list(vars(config).items()):  # one entry a layer: which layers have a window, for one
        if isinstance(value, (list, tuple)) and len(value) == total and total > 1:
            setattr(made, name, [value[layer] for layer in kept])
    made.num_hidden_layers = len(kept)
    if surgery.embeddings == "tied":
        made.tie_word_embeddings = True
    if surgery.intermediate is not None:
        inner = _inner(config)
        if not inner:
            raise ValueError(
                f"intermediate = {surgery.intermediate} is not allowed: the configuration of a {config.model_type} "
                "does not say how wide its feed-forward layers are, so cut layers alone (layers = …)"
            )
        if not 0 < surgery.intermediate <= inner:
            raise ValueError(f"intermediate = {surgery.intermediate} is not allowed: it must be from 1 to {inner}")
        setattr(made, next(name for name in INNER if hasattr(config, name)), surgery.intermediate)
    _attention(made, config, surgery)
    return made


def _attention(made: Any, config: Any, surgery: Surgery) -> None:
    """Set the width of the hidden states and the number of heads in the configuration ``made``."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    if surgery.hidden is not None:
        if surgery.hidden % (head * groups) or not 0 < surgery.hidden <= config.hidden_size:
            raise ValueError(
                f"hidden = {surgery.hidden} is not allowed: a multiple of {head * groups} (whole heads) up to "
                f"{config.hidden_size}"
            )
        made.hidden_size, made.num_attention_heads = surgery.hidden, surgery.hidden // head
    if surgery.heads is not None:
        if not hasattr(config, "head_dim"):
            raise ValueError(
                f"heads = {surgery.heads} is not allowed: those of a {config.model_type} are cut by hidden"
            )
        if surgery.heads % groups or not 0 < surgery.heads <= heads:
            raise ValueError(f"heads = {surgery.heads} is not allowed: a multiple of {groups} up to {heads}")
        made.num_attention_heads, made.head_dim = surgery.heads, head
    if getattr(config, "num_key_value_heads", None):
        made.num_key_value_heads = made.num_attention_heads // groups


def _inner(config: Any) -> int:
    """Return the width of the feed-forward layers; 0 where the configuration does not say."""
    return next((getattr(config, name) for name in INNER if getattr(config, name, None)), 0)


@torch.no_grad()
def _copy(teacher: nn.Module, student: nn.Module, kept: Sequence[int], surgery: Surgery) -> None:
    """Copy each weight from the layer that it comes from, cut to the student's shape."""
    stack = _stack(teacher)
    given, wanted = dict(teacher.state_dict(keep_vars=True)), student.state_dict(keep_vars=True)
    of_library: Any = student
    tables = [of_library.get_input_embeddings(), of_library.get_output_embeddings()]
    embeddings = {id(p) for table in tables if table is not None for p in table.parameters()}
    cut = _Cut(teacher, student, kept, stack) if surgery.hidden or surgery.heads or surgery.intermediate else None
    names = {id(module): name for name, module in student.named_modules()}
    tied = f"{names.get(id(tables[1]))}.weight" if surgery.embeddings == "tied" else None
    for name, tensor in wanted.items():
        if name == tied or (surgery.embeddings == "random" and id(tensor) in embeddings):
            continue
        source = _source(name, stack, kept)
        value = given[source]
        tensor.copy_(value if value.shape == tensor.shape or cut is None else cut(source, value, tensor))


def _stack(network: nn.Module) -> str:
    """Find the name of the list of layers."""
    total: int = network.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    found = [n for n, m in network.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if not found:
        raise ValueError(f"{type(network).__name__} has no list of {total} layers to choose from")
    return found[0]


def _source(name: str, stack: str, kept: Sequence[int]) -> str:
    if not name.startswith(f"{stack}."):
        return name
    number, _, rest = name.removeprefix(f"{stack}.").partition(".")
    return f"{stack}.{kept[int(number)]}.{rest}"


class _Cut:
    """Slices of a teacher's weights: hidden states and heads by the same choice in all layers, neurons layer by layer.

    Importance is the sum of squares of all weights that read or write a unit.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, kept: Sequence[int], stack: str) -> None:
        self.teacher, self.stack = teacher, stack
        config: Any = teacher.config
        small: Any = student.config
        self.config, self.small, self.inner = config, small, _inner(config)
        self.width: int = config.hidden_size
        self.narrow: int = small.hidden_size
        scores = torch.zeros(self.width, dtype=torch.float64)
        table: Any = teacher.get_input_embeddings()  # type: ignore[operator]
        embedding: Tensor = table.weight
        if embedding.shape[1] == self.width:
            scores += embedding.double().square().mean(0)
        for name, module in teacher.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear) and isinstance(weight, Tensor):
                if weight.shape[1] == self.width and not HEADS_IN.search(name):
                    scores += weight.double().square().mean(0)
                if weight.shape[0] == self.width and not HEADS_OUT.search(name):
                    scores += weight.double().square().mean(1)
        self.units = _best(scores, self.narrow)

    def __call__(self, name: str, value: Tensor, wanted: Tensor) -> Tensor:
        module, _, _ = name.rpartition(".")
        for axis, (have, want) in enumerate(zip(value.shape, wanted.shape, strict=True)):
            if have != want:
                value = value.index_select(axis, self._choice(module, axis, have, want))
        return value

    def _choice(self, module: str, axis: int, have: int, want: int) -> Tensor:
        inside = module.startswith(f"{self.stack}.")  # a head of classes may have a matrix of such a name: RoBERTa's
        if inside and ((axis == 0 and HEADS_OUT.search(module)) or (axis == 1 and HEADS_IN.search(module))):
            return self._heads(module, have, want)
        if have == self.width and want == self.narrow:
            return self.units
        if inside and have == self.inner:
            return self._neurons(module, have, want)
        raise ValueError(
            f"{module} cannot be cut from {have} to {want}: it is not known what this width is of, so cut layers alone "
            "(layers = …)"
        )

    def _heads(self, module: str, have: int, want: int) -> Tensor:
        """Choose the heads with the largest output weights, those of one key and value together."""
        layer = ".".join(module.split(".")[: self.stack.count(".") + 2])
        out = next(
            (m for n, m in self.teacher.named_modules() if n.startswith(f"{layer}.") and HEADS_IN.search(n)), None
        )
        if out is None:
            raise ValueError(f"{layer} has no output projection of its attention: its heads cannot be chosen")
        heads = self.config.num_attention_heads
        shared = heads // (getattr(self.config, "num_key_value_heads", None) or heads)
        weight: Any = out.weight
        scores = weight.double().square().sum(0).view(heads // shared, -1).sum(1)  # a group of heads for each key
        groups = _best(scores, self.small.num_attention_heads // shared)
        size = have // (heads // shared)
        return (groups.unsqueeze(1) * size + torch.arange(size)).flatten()

    def _neurons(self, module: str, have: int, want: int) -> Tensor:
        layer = ".".join(module.split(".")[: self.stack.count(".") + 2])
        scores = torch.zeros(have, dtype=torch.float64)
        for name, part in self.teacher.named_modules():
            if name.startswith(f"{layer}.") and isinstance(part, nn.Linear):
                for axis in (0, 1):
                    other = HEADS_OUT.search(name) if axis == 0 else HEADS_IN.search(name)
                    if part.weight.shape[axis] == have and not other:
                        scores += part.weight.double().square().sum(1 - axis)
        if not scores.any():  # no nn.Linear has this width: GPT-2's matrices are of another class
            raise ValueError(
                f"{module} cannot be cut from {have} to {want}: the weights of {layer} cannot be compared, so cut "
                "layers alone (layers = …)"
            )
        return _best(scores, want)


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the places of the largest scores, in order."""
    return scores.topk(count).indices.sort().values
