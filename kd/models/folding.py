"""Make a frozen network faster without changing what it answers: batch norms folded, images channels last."""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from traceback import format_exception_only
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

log = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class _Pair:
    """A convolution, the batch norm behind it, and the convolution that replaces both; weights as last read."""

    convolution: Any
    norm: Any
    folded: Any
    versions: list[tuple[int, int, int]] = field(default_factory=list)

    def parts(self) -> list[Tensor]:
        """Return what the folded weights are made of."""
        bias, norm = self.convolution.bias, self.norm
        given = (self.convolution.weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return [tensor for tensor in given if tensor is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the folded weights anew where the original ones have changed."""
        versions = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in self.parts()]
        if versions == self.versions:
            return
        source, norm = self.convolution, self.norm
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        weight, bias = fuse_conv_bn_weights(source.weight, source.bias, *statistics)
        self.folded.weight.copy_(weight)
        self.folded.bias.copy_(bias)
        self.versions = versions


def foldable(network: nn.Module, run: Callable[[], Any]) -> list[tuple[str, str]]:
    """Find each convolution whose output a batch norm alone reads, with that batch norm: pairs of module names.

    ``run`` passes an example through the network once, which shows who reads what; what it returns (outputs, recorded
    features) counts as read.
    """
    convolutions = {n: m for n, m in network.named_modules() if type(m) in CONVOLUTIONS and _frozen(m)}
    norms = {n: m for n, m in network.named_modules() if _behind(m) is not None and _frozen(m)}
    if not convolutions or not norms:
        return []
    with _Readers(convolutions, norms) as readers:
        readers.read(run())
    found = []
    for convolution in convolutions:
        by = readers.of.get(convolution, set())
        norm = next(iter(by)) if len(by) == 1 else None
        if norm is not None and readers.passes[convolution] == readers.passes[norm] == 1:
            found.append((convolution, norm))
    return found


class Folded:
    """A copy of a frozen network in eval mode whose batch norms are part of the convolutions before them.

    ``names``: of :func:`foldable`. With :math:`w' = w γ / \\sqrt{σ² + ε}` and
    :math:`b' = (b - μ) γ / \\sqrt{σ² + ε} + β` it answers the same up to rounding. ``network``: the copy, which has the
    other weights in common with the original; that one stays as it is. Raises what a network raises that cannot be
    copied.
    """

    def __init__(self, network: nn.Module, names: Sequence[tuple[str, str]]) -> None:
        modules = dict(network.named_modules())
        replaced = {id(t) for pair in names for name in pair for t in modules[name].parameters(recurse=False)}
        tensors = [*network.parameters(), *network.buffers()]
        shared = {id(tensor): tensor for tensor in tensors if id(tensor) not in replaced}
        self.network = copy.deepcopy(network, shared)
        self._pairs = []
        for convolution, norm in names:
            folded = self.network.get_submodule(convolution)
            if folded.bias is None:
                folded.bias = nn.Parameter(folded.weight.new_zeros(len(folded.weight)), requires_grad=False)
            parent, _, last = norm.rpartition(".")
            setattr(self.network.get_submodule(parent), last, _behind(modules[norm]))
            self._pairs.append(_Pair(modules[convolution], modules[norm], folded))
        self.refresh()

    def refresh(self) -> None:
        """Follow the original network where its weights have changed since: a checkpoint loaded, a moving average.

        What is written through ``.data`` is not seen, nor a module that is replaced.
        """
        for pair in self._pairs:
            pair.refresh()

    def share_buffers(self, network: nn.Module) -> None:
        """Read the buffers of the original again: moving or casting a module gives it others."""
        copies = dict(self.network.named_modules())
        for name, module in network.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                if key in dict(copies[name].named_buffers(recurse=False)):
                    setattr(copies[name], key, buffer)


def to_channels_last(network: nn.Module, run: Callable[[bool], Any]) -> bool:
    """Store the convolutions' weights channels last, in place; whether the network has any and answers the same.

    Otherwise, as where it reshapes maps with ``view``, it is left as it was. Names and values do not change. ``run``
    passes an example through it, with images as they come (False) or channels last (True), and returns what is read:
    outputs, features, of a network that is trained the gradients as well.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions or any(_gradient_is_wrong(convolution) for convolution in convolutions):
        return False
    before = run(False)
    try:
        network.to(memory_format=torch.channels_last)
        if same(before, run(True)):
            return True
        reason = "its answers are others"
    except Exception as error:  # whatever a network does with strides that it did not expect
        reason = format_exception_only(error)[0].splitlines()[0]
    log.info("a network is not run channels last: %s", reason)
    network.to(memory_format=torch.contiguous_format)
    return False


def _gradient_is_wrong(convolution: nn.Conv2d) -> bool:
    """Tell whether torch's gradient of it, channels last on a CPU, is wrong and writes beyond its memory.

    Seen with torch 2.14 (oneDNN 3.12, AVX2): strided 1×1 kernels that read fewer than 8 channels, the width of a vector
    register; 16 for the wider registers of other machines.
    """
    strided = convolution.kernel_size == (1, 1) and max(convolution.stride) > 1
    trained, few = convolution.weight.requires_grad, convolution.in_channels // convolution.groups < 16
    return strided and trained and few


def channels_last(inputs: Any) -> Any:
    """Return images (B, C, H, W) stored channels last; anything else as it is."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


def same(one: Any, other: Any) -> bool:
    """Tell whether two results of ``run`` are equal up to the rounding of float32."""
    first, second = _tensors(one), _tensors(other)
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _close(one: Tensor, other: Tensor) -> bool:
    largest = float(one.detach().abs().max()) if one.numel() else 0.0
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-4 * max(largest, 1e-6), equal_nan=True)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _frozen(module: nn.Module) -> bool:
    """Tell whether its weights are plain, real and not trained.

    No parametrisation, no meta device, no inference tensors.
    """
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    plain = isinstance(getattr(module, "weight", None), nn.Parameter) or not getattr(module, "affine", True)
    return plain and not any(t.requires_grad or t.is_meta or t.is_inference() for t in tensors)


def _behind(norm: nn.Module) -> nn.Module | None:
    """Return what is left of a batch norm without its statistics: nothing, or timm's activation.

    None: it is no batch norm.
    """
    if getattr(norm, "running_mean", None) is None:
        return None
    if type(norm) in NORMS:
        return nn.Identity()
    if type(norm).__name__ == "BatchNormAct2d" and type(norm).__module__.startswith("timm."):
        return nn.Sequential(OrderedDict(drop=norm.get_submodule("drop"), act=norm.get_submodule("act")))
    return None


class _Readers(TorchDispatchMode):
    """Notes which batch norm, or what else (None), reads the output of each convolution in a pass."""

    def __init__(self, convolutions: dict[str, nn.Module], norms: dict[str, nn.Module]) -> None:
        super().__init__()
        self.of: dict[str, set[str | None]] = {}
        self.passes: Counter[str] = Counter()
        self._made: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that nobody else gets its id
        self._within: str | None = None
        self._handles = [m.register_forward_hook(self._after(name)) for name, m in convolutions.items()]
        for name, module in norms.items():
            self._handles.append(module.register_forward_pre_hook(self._enter(name)))
            self._handles.append(module.register_forward_hook(self._leave))

    def _after(self, name: str):
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.passes[name] += 1
            self._made[id(output)] = (name, output)

        return hook

    def _enter(self, name: str):
        def hook(module: nn.Module, args: Any) -> None:
            self.passes[name] += 1
            self._within = name

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._within = None

    def read(self, values: Any) -> None:
        """Note that these tensors are read."""
        for value in tree_leaves(values):
            if id(value) in self._made:
                self.of.setdefault(self._made[id(value)][0], set()).add(self._within)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read((args, kwargs))
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
