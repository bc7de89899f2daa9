"""Live teachers: frozen, always in eval, without a graph, fed with the input statistics that they were trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from traceback import format_exception_only
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.distill.answers import Answers
from kd.distill.taps import AllTapped, Taps
from kd.errors import KdError
from kd.losses.base import Batch, Output, at_least_float32, check_choice
from kd.losses.layouts import Layout
from kd.models.folding import Folded, channels_last, foldable, same, to_channels_last
from kd.tasks.base import Task, Want
from kd.tasks.classification import Classification

log = logging.getLogger(__name__)


class InputMap(nn.Module):
    """From the data set's normalisation (and size) to a teacher's: ``x (B, C, H, W) → (B, C, H', W')``."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        data_mean: Sequence[float],
        data_std: Sequence[float],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        resize: int | None = None,
    ) -> None:
        super().__init__()
        own_mean, own_std = (torch.tensor(v, dtype=torch.float64) for v in (data_mean, data_std))
        new_mean = torch.tensor(mean, dtype=torch.float64) if mean is not None else own_mean
        new_std = torch.tensor(std, dtype=torch.float64) if std is not None else own_std
        if new_mean.shape != own_mean.shape or new_std.shape != own_std.shape:
            raise KdError(
                f"teacher.mean = {mean} and teacher.std = {std} do not fit the data: they need {len(data_mean)} "
                "numbers each, one a channel"
            )
        if not (new_std > 0).all():
            raise KdError(f"teacher.std = {std} is not allowed: every number must be above 0")
        self.resize = resize
        self.same = bool(torch.allclose(own_mean, new_mean) and torch.allclose(own_std, new_std))
        # ((x · std_data + mean_data) − mean) / std, as one multiplication and one addition
        self.register_buffer("scale", (own_std / new_std).float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((own_mean - new_mean) / new_std).float().view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same images as the teacher expects them."""
        if not self.same:
            x = x * self.scale + self.shift
        if self.resize is not None and x.shape[-2:] != (self.resize, self.resize):
            size = (self.resize, self.resize)
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        return x


class Teacher(Answers):
    """One frozen network, or several whose answers are averaged; always in eval, whatever a trainer calls.

    ``combine="probabilities"`` answers with ``log Σ wᵢ softmax(zᵢ)`` (an ensemble in the usual sense; its softmax is
    the mean of the members' probabilities), ``"logits"`` with ``Σ wᵢ zᵢ``. ``weights`` are normalised to sum 1.
    ``task``: how the networks are called; None: classification. ``cache``: whether :meth:`begin` answers the whole
    training set, so that no step after it needs a forward pass. ``optimized``: whether :meth:`optimize` does
    anything.

    ``networks`` are the teachers as they were given. What answers is a copy of them once batch norms are folded.
    """

    live = True
    cached_by = "teacher.cache = true"

    def __init__(
        self,
        networks: Sequence[nn.Module],
        input_maps: Sequence[nn.Module] = (),
        combine: str = "probabilities",
        weights: Sequence[float] | None = None,
        cache: bool = False,
        task: Task | None = None,
        optimized: bool = True,
    ) -> None:
        super().__init__()
        self.cache, self.optimized = cache, optimized
        self._folded: Folded | None = None
        self.channels_last = False
        self.taps: Any = None
        self.task = task if task is not None else Classification()
        self.remembered: Tensor | None = None  # (positions, classes) float32, NaN where nothing was asked
        if weights is not None and (len(weights) != len(networks) or min(weights) < 0 or sum(weights) <= 0):
            raise KdError(
                f"teacher.weights = {list(weights)} is not allowed: it must be {len(networks)} numbers, none negative, "
                "not all 0"
            )
        self.networks = nn.ModuleList(networks)
        self.input_maps = nn.ModuleList(input_maps or [nn.Identity() for _ in networks])
        self.combine = check_choice("combine", combine, ("probabilities", "logits"))
        shares = torch.tensor(weights if weights is not None else [1.0] * len(networks))
        self.shares = [float(s) for s in shares / shares.sum()]
        self.requires_grad_(False)
        self.eval()
        self.tap([])

    @property
    def root(self) -> nn.Module:
        """The module that tap names start from: the network, or for several the list (``"0.layer2"``)."""
        return self.networks[0] if len(self.networks) == 1 else self.networks

    @property
    def answering(self) -> list[nn.Module]:
        """The networks that answer: those that were given, or their copies with batch norms folded."""
        if self._folded is None:
            return list(self.networks)
        return [self._folded.network] if len(self.networks) == 1 else list(self._folded.network.children())

    def optimize(self, batch: Batch, channels_last: bool) -> None:
        """Fold batch norms and store weights channels last, where answers and taps on ``batch`` stay what they are."""
        weights = list(self.parameters())
        if not self.optimized or any(w.requires_grad or w.is_meta for w in weights):
            return

        def read(last: bool = False) -> Any:
            self.channels_last = last
            output = self(*_seen(batch), Want(features=True))
            raw = [member.raw for member in (output, *output.members)]
            return [output.logits if output.has_logits else None, raw, output.features]

        before, pairs = read(), foldable(self.root, read)
        if pairs:
            self._fold(pairs, lambda: same(before, read()))
        if channels_last:
            self.channels_last = to_channels_last(nn.ModuleList(self.answering), read)

    def _fold(self, pairs: Sequence[tuple[str, str]], same_answers: Callable[[], bool]) -> None:
        self.taps.detach()  # else the copy would have hooks of its own
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.root.modules()):
            # of a term that reads batch statistics, for one: they would not fire in a copy
            return self._left("somebody else has hooks in it")
        try:
            self._folded = Folded(self.root, pairs)
            self.taps.attach(self._folded.network)
            if not same_answers():
                self._left("its answers would be others")
        except Exception as error:  # whatever a network does that reads its own batch norms, or cannot be copied
            self._left(format_exception_only(error)[0].splitlines()[0])

    def _left(self, reason: str) -> None:
        log.info("the teacher's batch norms are not folded: %s", reason)
        self.use_given()

    def use_given(self) -> None:
        """Answer by the networks as they were given, from now on."""
        self._folded, self.channels_last = None, False
        self.networks.to(memory_format=torch.contiguous_format)
        self.taps.attach(self.root)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        """Move what answers along: it belongs to no state dict, and so is no module of this one."""
        super()._apply(fn, recurse)
        if self._folded is not None:
            self._folded.network._apply(fn)
            self._folded.share_buffers(self.root)
        return self

    def tap(self, names: Sequence[str]) -> None:
        """Record these tensors in every forward pass from now on; :meth:`optimize` anew for them."""
        if self.taps is not None:
            self.taps.detach()
        self._folded, self.channels_last = None, False
        self.taps = Taps(self.root, names, side="teacher")

    def inspect_taps(self) -> bool:
        """After a dry pass: refuse taps that fire twice; whether the pass must be repeated."""
        return self.taps.inspect()

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """After a dry pass: the layouts of the recorded tensors, by tap."""
        return self.taps.layouts

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval, whatever a trainer calls."""
        return super().train(False)

    def answer(self, batch: Batch, want: Want) -> Output:
        """Answer on its own view of the batch, if there is one; by kept answers where the training set was answered.

        Nothing is computed that ``want`` does not ask for: without logits the pass ends at the last tap.
        """
        if self.remembered is not None:
            assert batch.index is not None
            return Output(self.remembered.index_select(0, batch.index))
        if not want.logits and not self.taps.names:
            return Output()
        return self(*_seen(batch), want)

    def measured(self, batch: Batch) -> Output:
        """Return its output on a batch of validation or test."""
        own = batch.of_teacher
        return self(own.inputs, own)

    def forward(self, inputs: Any, batch: Batch | None = None, want: Want | None = None) -> Output:
        """Answer ``inputs`` as the data module makes them; ``batch``: what they belong to, None: the inputs alone."""
        batch, want = batch or Batch(inputs), want or Want()
        if self._folded is not None:
            self._folded.refresh()
        self.taps.active = want.features and bool(self.taps.names)
        self.taps.stop = self.taps.active and not want.logits
        members = []
        try:
            with torch.set_grad_enabled(want.input_gradient and torch.is_grad_enabled()):
                for network, prepare in zip(self.answering, self.input_maps, strict=True):
                    given = prepare(inputs)
                    given = channels_last(given) if self.channels_last else given
                    members.append(self.task.answer(network, given, batch, want))
        except AllTapped:
            return Output(features=self.taps.take())
        finally:
            active, self.taps.active = self.taps.active, False
        features = self.taps.take() if active else {}
        if len(members) == 1:
            members[0].features |= features
            return members[0]
        return Output(self._combined([m.logits for m in members]), features, members=members)

    @torch.no_grad()
    def begin(self, batches: Iterable[Batch], device: torch.device) -> None:
        """Answer these images now, with ``cache``: once for the whole training, into a table by ``batch.index``."""
        if not self.cache:
            return
        index, answers = [], []
        for batch in batches:
            if batch.index is None:
                raise KdError("teacher.cache = true keeps answers by the index of each sample, the data gives none")
            index.append(batch.index)
            batch = self.task.rows(batch.to(device))
            answers.append(self(*_seen(batch)).logits.float())
            if len(answers[-1]) != len(batch):
                raise KdError("teacher.cache = true keeps a row for each sample, and this task has other rows")
        places, logits = torch.cat(index).to(device), torch.cat(answers)
        self.remembered = logits.new_full((int(places.max()) + 1, logits.shape[1]), torch.nan)
        self.remembered[places] = logits

    def _combined(self, answers: list[Tensor]) -> Tensor:
        if len({a.shape for a in answers}) > 1:
            raise KdError(f"the teachers disagree on the classes: {', '.join(str(a.shape[-1]) for a in answers)}")
        shares = torch.tensor(self.shares, device=answers[0].device)
        if self.combine == "logits":
            return torch.einsum("t,t...->...", shares, torch.stack([at_least_float32(a) for a in answers]))
        logs = torch.stack([F.log_softmax(at_least_float32(a), dim=-1) for a in answers])
        return torch.logsumexp(logs + shares.log().view(-1, *[1] * (logs.ndim - 1)), dim=0)


def _seen(batch: Batch) -> tuple[Any, Batch]:
    """Return the teacher's view of a batch of training, and the batch that this view belongs to."""
    own = batch.of_teacher
    return own.views.get("teacher", own.inputs), own
