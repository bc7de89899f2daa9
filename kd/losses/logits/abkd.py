"""ABKD: Wang et al., Proper Allocation of the Probability Mass via α-β-Divergence, ICML 2025, arXiv 2505.04560."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Output, Term, check_temperature
from kd.losses.logits._divergences import check_factor, kl, log_probabilities, mean_over_rows

__all__ = ["alpha_beta_divergence"]


def alpha_beta_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.8, beta: float = 0.2
) -> Tensor:
    """Compute the mean over rows of −1/(αβ) Σ_c (p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)): the α-β-divergence.

    p is the teacher's, q the student's softmax(z / T). A smaller β, or α, weighs the classes more by their probability
    ratio; β = 0 is the limit, forward KL at α = 1, and α = 0 the other one, reverse KL at β = 1.

    Both logits (rows, classes), any further leading dimensions count as rows; ``temperature`` > 0; ``alpha``, ``beta``
    0 or more, not both 0. 0 for equal logits and without rows. No T².

    The authors' code for images lacks the limits, which that for language models has.
    """
    _check(alpha, beta)
    log_q, log_p = log_probabilities(student_logits, teacher_logits, temperature)
    if alpha == 0 or beta == 0:  # Σ a (log a − log b) − a + b over the powers, divided by the square of the exponent
        (one, other), power = ((log_p, log_q), alpha) if beta == 0 else ((log_q, log_p), beta)
        one, other = power * one, power * other
        return mean_over_rows((kl(one, other) - (one.exp() - other.exp()).sum(-1)) / power**2)
    whole = alpha + beta
    mixed = (alpha * log_p + beta * log_q).exp()
    own = alpha / whole * (whole * log_p).exp() + beta / whole * (whole * log_q).exp()
    return mean_over_rows((own - mixed).sum(-1) / (alpha * beta))


class AlphaBeta(Term):
    """:func:`alpha_beta_divergence` of the logits, over all rows."""

    def __init__(self, temperature: float = 1.0, alpha: float = 0.8, beta: float = 0.2) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)
        self.alpha, self.beta = _check(alpha, beta)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows."""
        return alpha_beta_divergence(student.logits, teacher.logits, self.temperature, self.alpha, self.beta)


def _check(alpha: float, beta: float) -> tuple[float, float]:
    if check_factor("alpha", alpha) == check_factor("beta", beta) == 0:
        raise ValueError("alpha = 0 is not allowed beside beta = 0: one of them must be above 0")
    return float(alpha), float(beta)
