"""FKD: Shen and Xing, A Fast KD Framework for Visual Recognition, ECCV 2022, arXiv 2112.01528."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_choice, check_same_shape
from kd.losses.logits._divergences import mean_over_rows

__all__ = ["soft_label_cross_entropy", "top_k_labels"]

FORMS = ("smoothed", "renormalised")


def top_k_labels(teacher_probabilities: Tensor, k: int = 5, form: str = "smoothed") -> Tensor:
    """Make soft labels of which the k likeliest classes are kept: what is cheap to store.

    ``teacher_probabilities`` (…, classes) → the same shape; ``k`` 1 or more. ``form``: ``"smoothed"``, the mass of the
    other classes is spread over them evenly (marginal smoothing; label smoothing at k = 1); ``"renormalised"``, it goes
    to the k in proportion (marginal re-normalisation; a hard label at k = 1).
    """
    check_choice("form", form, FORMS)
    classes = teacher_probabilities.shape[-1]
    kept, ids = teacher_probabilities.topk(min(_check_k(k), classes), dim=-1)
    mass = kept.sum(-1, keepdim=True)
    if form == "renormalised":
        return teacher_probabilities.new_zeros(teacher_probabilities.shape).scatter(-1, ids, kept / mass)
    rest = (1 - mass).clamp(min=0) / max(1, classes - ids.shape[-1])
    return rest.expand(teacher_probabilities.shape).scatter(-1, ids, kept)


def soft_label_cross_entropy(student_logits: Tensor, teacher_probabilities: Tensor) -> Tensor:
    """Compute the mean over rows of −Σ_c q_c log softmax(z_s)_c, with q the teacher's soft label: T = 1.

    ``student_logits`` and ``teacher_probabilities`` (rows, classes), any further leading dimensions count as rows. The
    gradient is that of :func:`~kd.losses.logits.kd.kl_divergence`; the value is larger by the entropy of q. 0 without
    rows.
    """
    check_same_shape("logits and probabilities", student_logits, teacher_probabilities)
    log_p_student = F.log_softmax(at_least_float32(student_logits), dim=-1)
    return mean_over_rows(-(teacher_probabilities.to(log_p_student.dtype) * log_p_student).sum(-1))


class SoftLabels(Term):
    """:func:`soft_label_cross_entropy` with :func:`top_k_labels` of the teacher's softmax, over all rows.

    Used alone, without labels. ``k = None`` keeps all classes. The paper stores the labels of many crops of each image
    before the training; so does ``teacher.answers`` (:mod:`kd.distill.cache`), whose top-k is smoothed alike.
    """

    reads_softmax_at = 1.0

    def __init__(self, k: int | None = 5, form: str = "smoothed") -> None:
        super().__init__()
        self.k = None if k is None else _check_k(k)
        self.form = check_choice("form", form, FORMS)
        self.every_class = k is not None and form == "smoothed"

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows."""
        labels = at_least_float32(teacher.logits).softmax(-1)
        if self.k is not None:
            labels = top_k_labels(labels, self.k, self.form)
        return soft_label_cross_entropy(student.logits, labels)


def _check_k(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k = {k} is not allowed: it must be a whole number, 1 or more")
    return k
