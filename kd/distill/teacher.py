"""The teacher is furniture: frozen, always in eval, under no_grad, fed with the input statistics it was trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.distill.taps import AllTapped, Taps
from kd.errors import KdError
from kd.losses.base import Batch, Output

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
        """The same images as the teacher expects them."""
        if not self.same:
            x = x * self.scale + self.shift
        if self.resize is not None and x.shape[-2:] != (self.resize, self.resize):
            size = (self.resize, self.resize)
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        return x


class Teacher(nn.Module):
    """One frozen network, or several whose answers are averaged.

    ``combine="probabilities"`` answers with ``log Σ wᵢ softmax(zᵢ)`` (an ensemble in the usual sense; its softmax is
    the mean of the members' probabilities), ``"logits"`` with ``Σ wᵢ zᵢ``. ``weights`` are normalised to sum 1.
    ``cache``: whether :meth:`remember` is to be called before training; then :meth:`recall` replaces forward passes.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        input_maps: Sequence[nn.Module],
        combine: str = "probabilities",
        weights: Sequence[float] | None = None,
        cache: bool = False,
    ) -> None:
        super().__init__()
        self.cache = cache
        self.sources: list[dict[str, Any]] = []  # of each run directory: see weight_files.source_of
        self.remembered: Tensor | None = None  # (positions, classes) float32, NaN where nothing was asked
        if weights is not None and (len(weights) != len(networks) or min(weights) < 0 or sum(weights) <= 0):
            raise KdError(
                f"teacher.weights = {list(weights)} is not allowed: it must be {len(networks)} numbers, none negative, "
                "not all 0"
            )
        self.networks = nn.ModuleList(networks)
        self.input_maps = nn.ModuleList(input_maps)
        self.combine = combine
        shares = torch.tensor(weights if weights is not None else [1.0] * len(networks))
        self.shares = [float(s) for s in shares / shares.sum()]
        self.requires_grad_(False)
        self.eval()
        self.tap([])

    @property
    def root(self) -> nn.Module:
        """The module that tap names start from: the network, or for several the list (``"0.layer2"``)."""
        return self.networks[0] if len(self.networks) == 1 else self.networks

    def tap(self, names: Sequence[str]) -> None:
        """Record these tensors in every forward pass from now on."""
        self.taps = Taps(self.root, names, side="teacher")

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval, whatever a trainer calls."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, inputs: Tensor, features: bool = False, logits: bool = True) -> Output:
        """``inputs`` as the data module makes them. ``features``: also return the tapped tensors.

        Without ``logits`` the pass ends at the last tap: what lies behind it costs nothing.
        """
        self.taps.active = features and bool(self.taps.names)
        self.taps.stop = self.taps.active and not logits
        answers = []
        try:
            for network, prepare in zip(self.networks, self.input_maps, strict=True):
                answers.append(network(prepare(inputs)))
        except AllTapped:
            return Output(None, self.taps.take())
        finally:
            active, self.taps.active = self.taps.active, False
        return Output(self._combined(answers), self.taps.take() if active else {})

    @torch.no_grad()
    def remember(self, batches: Iterable[Batch], device: torch.device) -> None:
        """Answer these images now, once for the whole training, into a table by ``batch.index``."""
        index, answers = [], []
        for batch in batches:
            inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
            index.append(batch.index)
            answers.append(self(inputs.to(device)).rows.float())
        places, logits = torch.cat(index).to(device), torch.cat(answers)
        self.remembered = logits.new_full((int(places.max()) + 1, logits.shape[1]), torch.nan)
        self.remembered[places] = logits

    def recall(self, index: Tensor) -> Output:
        """The answers to the images with these ``index`` (B,), without a forward pass."""
        assert self.remembered is not None, "remember() comes first"
        return Output(self.remembered.index_select(0, index))

    def _combined(self, answers: list[Tensor]) -> Tensor:
        if len(answers) == 1:
            return answers[0]
        if len({a.shape for a in answers}) > 1:
            raise KdError(f"the teachers disagree on the classes: {', '.join(str(a.shape[-1]) for a in answers)}")
        shares = torch.tensor(self.shares, device=answers[0].device)
        if self.combine == "logits":
            return torch.einsum("t,t...->...", shares, torch.stack([a.float() for a in answers]))
        logs = torch.stack([F.log_softmax(a.float(), dim=-1) for a in answers])
        return torch.logsumexp(logs + shares.log().view(-1, *[1] * (logs.ndim - 1)), dim=0)
