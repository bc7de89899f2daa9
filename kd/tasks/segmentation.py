"""Semantic segmentation: a valid pixel is a row, its class the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics import Metric as TorchMetric

from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Output
from kd.tasks.base import Meter, Task, Want
from kd.tasks.metrics import Metric

WORSE = 0.05  # a mean IoU that is lower by so much than in the teacher's own run is said


class Segmentation(Task):
    """A network answers maps of logits (samples, classes, H', W'); the rows are the valid pixels of the masks.

    Batches have ``targets`` (samples, H, W) int64, a class at each pixel. One of ``ignore_index`` is no row: no loss
    and no metric sees it; one of ``UNLABELLED`` is a row without a label. Rows are in the order of the pixels, image by
    image, line by line. Logits of another resolution than the mask are resized to it, bilinearly with
    ``align_corners=False``, and so are a teacher's: losses and metrics are at the resolution of the masks.

    Metrics: the mean over the classes of intersection ÷ union, each counted over all pixels of the split (not the mean
    over images), without the classes that neither a mask nor an answer has (mIoU); the IoU of all that is not the class
    ``background`` (foreground IoU; None: there is no background, and no such metric); pixel accuracy; NLL in nats; and
    beside a teacher agreement and KL to it, over all rows. Counts are integers: several processes find what one finds.
    """

    row = "pixel"
    counts = ("pixel_accuracy",)
    summary = ("miou", "foreground_iou", "pixel_accuracy", "nll", "agreement")
    metrics: Sequence[Metric] = (
        Metric("miou", "mIoU", share=True, by_class="IoU"),
        Metric("foreground_iou", "foreground IoU", share=True),
        Metric("pixel_accuracy", "pixel accuracy", share=True),
        Metric("nll", "NLL", better="min"),
        Metric("agreement", "agreement", share=True, beside_teacher=True),
        Metric("kl", "KL to the teacher", better="min", beside_teacher=True),
    )

    def __init__(self, ignore_index: int = 255, background: int | None = 0) -> None:
        if background is not None and background < 0:
            raise ValueError(f"background = {background} is not allowed: it must be a class id, 0 or more, or null")
        self.ignore_index, self.background = ignore_index, background
        if background is None:
            self.metrics = tuple(metric for metric in self.metrics if metric.name != "foreground_iou")

    def rows(self, batch: Batch) -> Batch:
        """Select the valid pixels, once. ``extra``: their ``pixels`` (rows,), places in samples · H · W, and ``size``.

        ``pixels`` is None where all are valid. ``KdError`` for targets that are no masks.
        """
        if batch.targets is None or "pixels" in batch.extra:
            return batch
        targets = batch.targets
        if targets.ndim != 3 or targets.is_floating_point():
            kind = f"{str(targets.dtype).removeprefix('torch.')} {tuple(targets.shape)}"
            raise KdError(
                "task = segmentation needs a class id at each pixel, integers (samples, height, width): the data gives "
                f"targets {kind}"
            )
        size, targets = tuple(targets.shape[1:]), targets.flatten()
        pixels = (targets != self.ignore_index).nonzero().squeeze(1)
        every = len(pixels) == len(targets)
        extra = {**batch.extra, "size": size, "pixels": None if every else pixels}
        return replace(batch, targets=(targets if every else targets[pixels]).long(), extra=extra)

    def answer(self, network: nn.Module, inputs: Any, batch: Batch, want: Want) -> Output:
        """Call a network and make rows of its maps; ``raw`` is what it returned.

        Without targets (to count operations) every pixel of the inputs is a row. ``KdError`` for an answer that is no
        map.
        """
        raw = network(**inputs) if isinstance(inputs, Mapping) else network(inputs)
        maps = self.logits(raw)
        if maps is None:
            return Output(raw=raw)
        image = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
        flat = self.maps(maps, batch.extra.get("size", image.shape[-2:])).movedim(1, -1).flatten(0, 2)
        pixels = batch.extra.get("pixels")
        return Output(flat if pixels is None else flat.index_select(0, pixels), raw=raw)

    def maps(self, logits: Tensor, size: Any) -> Tensor:
        """Bring logits (samples, classes, H', W') to ``size`` (H, W). ``KdError`` for what is no map."""
        if logits.ndim != 4:
            shape = f"({', '.join(['samples', *map(str, logits.shape[1:])])})"
            raise KdError(
                f"task = segmentation needs a network that answers (samples, classes, height, width), this one answers "
                f"{shape}: choose one for segmentation, such as model@student=timm_unet"
            )
        if tuple(logits.shape[2:]) == tuple(size):
            return logits
        return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)

    def logits(self, raw: Any) -> Tensor | None:
        """Find the logits in what a network returned; torchvision's segmenters call them ``out``."""
        if isinstance(raw, Mapping) and "logits" not in raw:
            return raw.get("out")
        return super().logits(raw)

    def count(self, student: Output, batch: Batch) -> list[Tensor]:
        """Count right answers among the labelled rows."""
        if batch.targets is None:
            return [torch.zeros((), device=student.logits.device)]
        return [(student.logits.detach().argmax(1) == batch.targets).sum()]  # no answer is UNLABELLED

    def meter(self, classes: int | None) -> SegmentationMeter:
        """Make a fresh meter for one pass over a split of so many classes."""
        if classes is None:
            raise ValueError("task = segmentation needs to know the number of classes")
        if self.background is not None and self.background >= classes:
            raise KdError(f"task.background = {self.background} is not allowed: the classes are 0 to {classes - 1}")
        return SegmentationMeter(classes, self.background, self.names)

    def doubt(self, measured: Mapping[str, float], recorded: Mapping[str, float], classes: int | None) -> str:
        """Say what is wrong with a teacher that does no better than one class everywhere, or worse than in its run."""
        found, before = measured["miou"], recorded.get("miou")
        if classes and found <= 1 / classes:
            return f"has a mIoU of {found:.1%}, which one class everywhere may reach (1 in {classes}): is it trained?"
        if before is not None and found < before - WORSE:
            return (
                f"has a mIoU of {found:.1%}, {before:.1%} in its own run: are the images, the masks and the statistics "
                "of its input (teacher.mean, teacher.std) those that it was trained with?"
            )
        return ""


class Overlaps(TorchMetric):
    """Counts by class, int64: pixels where answer and mask agree, pixels that are answered, pixels of the masks.

    In place of torchmetrics' confusion matrix, which with deterministic algorithms compares each pixel with classes²
    numbers, and whose IoU is computed from counts in single precision.
    """

    full_state_update = False
    both: Tensor
    answered: Tensor
    labelled: Tensor
    foreground: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        for name in ("both", "answered", "labelled"):
            self.add_state(name, torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("foreground", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, answer: Tensor, targets: Tensor, background: int | None = None) -> None:
        """Add rows: the classes that are answered and that are true, (rows,) int64."""
        classes = len(self.both)
        self.both += torch.bincount(targets[answer == targets], minlength=classes)
        self.answered += torch.bincount(answer, minlength=classes)
        self.labelled += torch.bincount(targets, minlength=classes)
        if background is not None:
            self.foreground += ((answer != background) & (targets != background)).sum()

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the counts over all processes, the last one of pixels that are foreground in both, whatever class."""
        return self.both, self.answered, self.labelled, self.foreground


class SegmentationMeter(Meter):
    """The metrics of one pass over the rows."""

    def __init__(self, classes: int, background: int | None, names: Callable[[bool], list[str]]) -> None:
        super().__init__()
        self.names, self.background = names, background
        self.overlaps = Overlaps(classes)
        self.nll, self.agreement, self.kl = (MeanMetric(nan_strategy="disable") for _ in range(3))

    def update(self, student: Output, batch: Batch, teacher: Output | None = None) -> None:
        """Add one batch; rows without a label count beside the teacher only."""
        logits, targets = student.logits.float(), batch.targets
        known = targets != UNLABELLED
        own, wanted = (logits, targets) if bool(known.all()) else (logits[known], targets[known])
        answer = logits.argmax(1)
        self.overlaps.update(answer if own is logits else answer[known], wanted, self.background)
        self.nll.update(F.cross_entropy(own, wanted, reduction="none"))
        if teacher is not None:
            other = teacher.logits.float()
            self.agreement.update((answer == other.argmax(1)).float())
            log_s, log_t = F.log_softmax(logits, 1), F.log_softmax(other, 1)
            self.kl.update(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1))

    def compute(self, with_teacher: bool) -> dict[str, float]:
        """Return the metrics by name; ``miou, foreground_iou, pixel_accuracy, agreement`` 0 to 1.

        A foreground that neither the masks nor the answers have counts as 0.
        """
        both, answered, labelled, foreground = self.overlaps.compute()
        found = {
            "miou": float(iou(both, answered, labelled).nanmean()),
            "pixel_accuracy": float(both.sum() / labelled.sum().clamp(min=1)),
            "nll": float(self.nll.compute()),
        }
        if self.background is not None:
            others = [count.sum() - count[self.background] for count in (answered, labelled)]
            found["foreground_iou"] = float(iou(foreground, *others).nan_to_num())
        if with_teacher:
            found |= {"agreement": float(self.agreement.compute()), "kl": float(self.kl.compute())}
        return {name: found[name] for name in self.names(with_teacher)}

    def per_class(self) -> list[float]:
        """Return the IoU of each class, 0…1; NaN of one that neither a mask nor an answer has."""
        both, answered, labelled, _ = self.overlaps.compute()
        return iou(both, answered, labelled).tolist()


def iou(both: Tensor, answered: Tensor, labelled: Tensor) -> Tensor:
    """Divide intersection by union of counts, in double precision; NaN where the union is empty."""
    return both.double() / (answered + labelled - both).double()
