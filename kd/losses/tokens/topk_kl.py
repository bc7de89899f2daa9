"""Top-k KL: Anshumann et al., Sparse Logit Sampling: Accelerating KD in LLMs, ACL 2025, arXiv 2503.16870."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Fused, Output, Term, at_least_float32, check_choice, check_temperature
from kd.losses.logits._divergences import kl, mean_over_rows
from kd.losses.tokens._topk import NOTHING, check_k, log_others, log_rest, teacher_topk

__all__ = ["topk_buckets", "topk_kl_divergence"]

FORMS = ("tail", "renormalised", "zero")


def topk_buckets(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_ids: Tensor,
    temperature: float = 1.0,
    form: str = "tail",
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of both sides over the teacher's k classes, and of the rest of the classes as one more.

    ``student_logits`` (rows, classes), of any scale; ``teacher_log_probs`` (rows, k): the teacher's log softmax at
    ``temperature`` of the classes ``teacher_ids`` (rows, k) int64, no class twice. ``form``:

    - ``"tail"``: k + 1 classes, the last is the mass of all others, on both sides;
    - ``"renormalised"``: k classes, both sides sum to 1 over them: nothing is learned of the mass outside;
    - ``"zero"``: k + 1 classes; the teacher sums to 1 over the k and has 0 for the last.

    Each is a pair of distributions (student, teacher), so that any loss of the logits at T = 1 takes them as logits:
    reverse KL, JSD, total variation. Where k is all the classes there is no other class, and the forms are one.
    """
    check_choice("form", form, FORMS)
    scaled = at_least_float32(student_logits) / check_temperature(temperature)
    known, teacher = scaled.gather(-1, teacher_ids), at_least_float32(teacher_log_probs)
    alone = teacher_ids.shape[-1] == student_logits.shape[-1]
    if alone or form == "renormalised":
        return F.log_softmax(known, dim=-1), F.log_softmax(teacher, dim=-1)
    buckets = torch.cat([known, log_others(scaled, teacher_ids)], dim=-1)
    rest = log_rest(teacher)
    if form == "zero":
        teacher, rest = F.log_softmax(teacher, dim=-1), torch.full_like(rest, NOTHING)
    return F.log_softmax(buckets, dim=-1), torch.cat([teacher, rest], dim=-1)


def topk_kl_divergence(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_ids: Tensor,
    temperature: float = 1.0,
    form: str = "tail",
) -> Tensor:
    """Compute T² · mean over rows of KL(teacher ‖ student) over the teacher's k likeliest classes.

    Arguments and forms are those of :func:`topk_buckets`. ``"tail"`` is a lower bound of the KL over all classes, and
    equal to it where k is all of them; ``"zero"`` is 0 at the teacher's renormalised top-k, which a student with the
    teacher's logits does not give. 0 without rows.

    The paper calls the tail a ghost token, and shows that ``"zero"`` makes a student too sure of itself. Public code:
    DistillKit has ``"zero"`` and ``"tail"``, TRL ``"tail"`` and ``"renormalised"``, without T²; Model Optimizer
    ``"renormalised"`` without T².
    """
    student, teacher = topk_buckets(student_logits, teacher_log_probs, teacher_ids, temperature, form)
    return mean_over_rows(kl(teacher, student), temperature)


class TopKKL(Term):
    """:func:`topk_kl_divergence` with the teacher's stored top-k (``Output.topk``), else with that of its logits.

    Dense logits are softened exactly, and so is the top-k of a cache, at the temperatures that it was made for; another
    one is refused. A stored top-k with log-probabilities at T = 1 alone is softened as if all other classes were one,
    which gives the tail less than it has. ``k`` above what is there means all of it.
    """

    reads_topk = True

    def __init__(self, k: int = 128, temperature: float = 1.0, form: str = "tail") -> None:
        super().__init__()
        self.k = check_k(k)
        self.temperature = check_temperature(temperature)
        self.form = check_choice("form", form, FORMS)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, times T²."""
        log_probs, ids = teacher_topk(teacher, self.k, self.temperature)
        return topk_kl_divergence(student.logits, log_probs, ids, self.temperature, self.form)

    def fused(self) -> Fused:
        """Return what computes the same from hidden states."""
        return Fused("topk_kl", self.temperature, k=self.k, form=self.form)
