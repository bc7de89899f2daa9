"""DKPP, permuted dark knowledge: Furlanello et al., Born-Again Networks, ICML 2018, arXiv 1805.04770."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Term, check_temperature
from kd.losses.logits.kd import kl_divergence

__all__ = ["permute_non_argmax", "permuted_kl_divergence"]


def permute_non_argmax(teacher_logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Shuffle all but the largest entry of each row (…, classes), another permutation for every row: φ of Eq. 11.

    ``generator``: on the device of the logits; None: torch's global one.
    """
    largest = teacher_logits.argmax(-1, keepdim=True)
    noise = torch.rand(teacher_logits.shape, generator=generator, device=teacher_logits.device)
    # both orders begin with the largest; the first then goes through the others as they stand, the second at random
    standing = torch.ones_like(noise).scatter(-1, largest, 0).argsort(dim=-1, stable=True)
    shuffled = noise.scatter(-1, largest, -1).argsort(-1)
    return torch.empty_like(teacher_logits).scatter(-1, standing, teacher_logits.gather(-1, shuffled))


def permuted_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Compute :func:`~kd.losses.logits.kd.kl_divergence` with the teacher's logits after :func:`permute_non_argmax`.

    Its gradient at T = 1 is Eq. 11 over the rows: the teacher's confidence stays with the class it chose, the rest of
    its distribution keeps its shape and loses its meaning. The paper writes the cross-entropy, larger by the teacher's
    entropy, which no permutation changes. Random: another value each time, from ``generator``.
    """
    return kl_divergence(student_logits, permute_non_argmax(teacher_logits, generator), temperature)


class PermutedPredictions(Term):
    """:func:`permuted_kl_divergence` of the logits, over all rows; the paper uses it alone, T = 1."""

    every_class = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, times T²."""
        return permuted_kl_divergence(student.logits, teacher.logits, self.temperature)
