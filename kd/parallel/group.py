"""One run in several processes: who they are, what they tell each other, how their means become means of the whole.

Everything here does nothing, or answers for one process, where no process group was joined.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd.errors import KdError

T = TypeVar("T")
FAILED = "kd_failed"  # key of the store: what the first process that failed had to say
# what gloo, the store and NCCL say, and nobody else: a loader or a server times out as well
WAITED = re.compile(
    r"Timed out waiting|wait timeout after|[Ss]ocket [Tt]imeout|client socket has timed out|"
    r"collective operation timeout"
)
WAITS = "kd_waits"  # keys of the store: the processes that have waited for another one in vain
PATIENCE = 3.0  # seconds between the first and the last process to find out that another does not answer

_control: Any = None  # the group for Python objects, always gloo: NCCL would move them through GPU memory


def joined() -> bool:
    """Tell whether this process belongs to a group of processes that train together."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Count the processes of this run."""
    return dist.get_world_size() if joined() else 1


def rank() -> int:
    """Return the number of this process; 0 writes the record."""
    return dist.get_rank() if joined() else 0


def join(backend: str, rank: int, world_size: int, timeout: float) -> None:
    """Meet the other processes at ``MASTER_ADDR:MASTER_PORT``; ``backend``: gloo or nccl. Once a process.

    ``timeout``: seconds that a process waits for the others, here and in everything that they do together.
    """
    global _control
    if joined():
        return
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=limit)
    _control = dist.new_group(backend="gloo", timeout=limit) if backend != "gloo" else dist.group.WORLD


def leave() -> None:
    """Leave a group whose work is done (all processes call it)."""
    if joined():
        barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all processes are here."""
    if joined():
        dist.barrier(_control)


def broadcast(value: T) -> T:
    """Return the value of process 0, whatever this process gave."""
    if not joined():
        return value
    carrier = [value]
    dist.broadcast_object_list(carrier, src=0, group=_control)
    return carrier[0]


def gather(value: T) -> list[T] | None:
    """Return the values of all processes in their order, on process 0; None on the others."""
    if not joined():
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=_control)
    return values


def say_failed(sentence: str, kind: str) -> None:
    """Write the failure of this process into the store: the others only see a broken connection."""
    if joined() and not failed():
        _stored(lambda store: store.set(FAILED, f"{kind}\n{sentence}"))


def failed() -> tuple[str, str] | None:
    """Return the kind of failure of a process that failed, and what it had to say, or None."""

    def find(store: Any) -> tuple[str, str] | None:
        if not store.check([FAILED]):
            return None
        kind, _, sentence = store.get(FAILED).decode().partition("\n")
        return kind, sentence

    return _stored(find) if joined() else None


def timed_out(error: BaseException | None) -> bool:
    """Tell whether an error, or what it comes from, is that another process did not answer in time."""
    while error is not None:
        if isinstance(error, RuntimeError) and WAITED.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def silent() -> list[int]:
    """Return the processes that do not say, within ``PATIENCE``, that they have waited in vain as this one has.

    All processes that wait call it. Empty: it is not known.
    """

    def find(store: Any) -> list[int]:
        store.set(f"{WAITS}/{rank()}", "")
        time.sleep(PATIENCE)
        return [r for r in range(world_size()) if not store.check([f"{WAITS}/{r}"])]

    return (_stored(find) or []) if joined() else []


def _stored(call: Callable[[Any], T]) -> T | None:
    """Call with the store of all processes; None when the process that keeps it is gone or hangs."""
    found: list[T] = []

    def query() -> None:
        try:
            found.append(call(dist.distributed_c10d._get_default_store()))
        except RuntimeError:
            return

    thread = threading.Thread(target=query, daemon=True)  # a store that hangs has no timeout
    thread.start()
    thread.join(PATIENCE + 5)
    return found[0] if found else None


# ---------------------------------------------------------------------- means over the whole batch


class Shares(NamedTuple):
    """Factors that turn a mean over what this process has into its part of the mean over all processes.

    The mean of ``factor × local mean`` over the processes, which is what gradients go through, is then the mean over
    the whole batch, also where a process has fewer rows or fewer labels than another. All are 0-d tensors, 1 where all
    processes have equally many.
    """

    rows: Tensor
    labelled: Tensor
    samples: Tensor
    positions: Tensor


def shares(rows: int, labelled: Tensor, samples: int, mask: Tensor | None = None) -> Shares | None:
    """Return the factors of a step, for the numbers of rows, labelled rows and samples here; None for one process.

    ``mask`` (samples, positions): which of them are real; None: as many in each sample.
    """
    if not joined():
        return None
    positions = torch.full_like(labelled, samples) if mask is None else mask.sum().to(labelled)
    own = torch.stack([torch.full_like(labelled, rows), labelled, torch.full_like(labelled, samples), positions])
    own = own.float()
    total = own.clone()
    dist.all_reduce(total)
    return Shares(*(world_size() * own / total.clamp(min=1)))


def longest(length: int, device: torch.device) -> int:
    """Find the largest of the processes' numbers, as of positions of a batch: each pads to its own longest sample."""
    if not joined():
        return length
    found = torch.tensor(length, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def summed(number: int, device: torch.device) -> int:
    """Add up the processes' numbers, as of the rows of a batch."""
    if not joined():
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found)
    return int(found)


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all processes, in their order, along the first dimension.

    Sizes may differ there. The gradient goes back to the process that each part came from, summed over all processes
    that used it: a loss of the whole, computed by every process, has the gradient of one process once DDP averages.
    """
    return _GatherRows.apply(tensor) if joined() else tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        counts = torch.zeros(world_size(), dtype=torch.int64, device=tensor.device)
        counts[rank()] = len(tensor)
        dist.all_reduce(counts)
        context.counts = counts.tolist()
        longest = max(context.counts)
        sent = tensor.new_zeros(longest, *tensor.shape[1:])
        sent[: len(tensor)] = tensor
        parts = [torch.empty_like(sent) for _ in context.counts]
        dist.all_gather(parts, sent)
        return torch.cat([part[:count] for part, count in zip(parts, context.counts, strict=True)])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = sum(context.counts[: rank()])
        return gradient[start : start + context.counts[rank()]]


@torch.no_grad()
def same_buffers(network: nn.Module) -> None:
    """Give all processes the batch statistics of process 0, the ones that are saved: they must measure one network."""
    if joined():
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


# ---------------------------------------------------------------------- wrapping


def ignore_in_ddp(module: nn.Module, teacher: str | None, objective: str) -> None:
    """Tell DDP which submodules to leave alone, by the prefixes of their names.

    Of a frozen ``teacher`` everything: its buffers would be sent round in every step. Of the ``objective`` the buffers:
    those of process 0 would overwrite every other process's bank or running statistics.
    """
    names = [n for n, _ in module.named_buffers() if n.startswith(objective)]
    if teacher is not None:
        names += [n for n, _ in [*module.named_parameters(), *module.named_buffers()] if n.startswith(teacher)]
    module._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]


def shard(networks: list[nn.Module], mesh: Any) -> None:
    """Shard by FSDP2: each process keeps its part of every parameter, and the whole of one block only while it runs.

    ``networks``: modules that are called themselves; their blocks, the children with children of their own, are
    gathered one after the other, the rest with the network. In place: names, hooks and state dict keys stay.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise KdError("hardware.strategy = fsdp needs torch 2.6 or newer") from None
    for network in networks:
        for block in _blocks(network):
            fully_shard(block, mesh=mesh)
        # what is kept for the backward pass would be kept for ever where there is none
        trained = any(p.requires_grad for p in network.parameters())
        fully_shard(network, mesh=mesh, reshard_after_forward=None if trained else True)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the outermost modules with children, of lists and sequences their members; each called by its network."""
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            found += [m for m in child if any(True for _ in m.children())]
        elif any(True for _ in child.children()):
            found.append(child)
    return [block for block in found if any(True for _ in block.parameters())]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is sharded over the processes, put together (all processes call it); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
