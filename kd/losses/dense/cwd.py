"""CWD: Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv 2011.13256."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd.losses.adapters import POINTWISE, pointwise
from kd.losses.base import at_least_float32, check_choice, check_same_shape, check_temperature
from kd.losses.feature_term import FeatureTerm
from kd.losses.layouts import Tapped

__all__ = ["channel_wise_divergence"]


def channel_wise_divergence(student_feature: Tensor, teacher_feature: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T² · KL(teacher ‖ student) of softmax over a channel's positions, mean over samples and channels (Eq. 5).

    Both (B, C, H, W): maps of features, or of logits.
    """
    check_temperature(temperature)
    check_same_shape("features", student_feature, teacher_feature)
    both = (student_feature, teacher_feature)
    log_s, log_t = ((at_least_float32(f).flatten(2) / temperature).log_softmax(2) for f in both)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(2).mean()


class ChannelWiseDivergence(FeatureTerm):
    """:func:`channel_wise_divergence` summed over the taps.

    Taps of the classifiers compare maps of logits, at the resolution that the networks answer: pixels that the labels
    ignore take part. Of features the paper's adapter is a 1×1 convolution, the authors' code has batch norm and ReLU
    behind it, ``adapter="conv_bn_relu"``.

    ``adapter``: see :func:`~kd.losses.adapters.pointwise`.
    """

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = (-1,),
        teacher_taps: Sequence[str | int] | None = (-1,),
        temperature: float = 1.0,
        adapter: str = "auto",
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.temperature = check_temperature(temperature)
        self.adapter = check_choice("adapter", adapter, POINTWISE)

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps on the teacher's grid, the student's of the teacher's width."""
        return pointwise(self.method, self.adapter, student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one pair."""
        return channel_wise_divergence(student, teacher, self.temperature)
