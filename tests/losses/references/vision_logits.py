"""Files of logit methods for images under another name or formula than ours, and what other implementations return."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cosine_similarity

from kd.losses import functional as f
from tests.losses.references._case import Case


def logits(case: Case) -> tuple[Tensor, Tensor]:
    """Student's and teacher's as rows × classes; those of maps (B, C, H, W) are a row a pixel."""
    student, teacher = case["student_logits"], case["teacher_logits"]
    if student.ndim == 4:
        student, teacher = (z.movedim(1, -1).flatten(0, -2) for z in (student, teacher))
    return student, teacher


def dkd_summed(case: Case) -> Tensor:
    return case.value() * len(case["targets"])


def nkd_with_target(case: Case) -> Tensor:
    """The label stays among the other classes: its part of the cross-entropy is that of the whole softmax."""
    t, gamma = case.hyper["temperature"], case.hyper["gamma"]
    student, teacher = logits(case)
    whole = -((teacher / t).softmax(-1) * (student / t).log_softmax(-1)).sum(-1).mean()
    return f.normalised_cross_entropy(student, teacher, case["targets"], t, 0.0) + gamma * t**2 * whole


def dist(case: Case, variant: str = "code") -> Tensor:
    settings = {"temperature" if key == "tau" else key: value for key, value in case.hyper.items()}
    return f.correlation_loss(*logits(case), **settings, variant=variant)


def dist_by_cosines(case: Case) -> Tensor:
    """The norms are at least 1e-8, which is not added."""
    tau = case.hyper.get("tau", case.hyper.get("temperature"))
    student, teacher = ((z / tau).softmax(-1) for z in logits(case))

    def distance(dim: int) -> Tensor:
        centred = (x - x.mean(dim, keepdim=True) for x in (student, teacher))
        return 1 - cosine_similarity(*centred, dim=dim).mean()

    return tau**2 * (case.hyper["beta"] * distance(1) + case.hyper["gamma"] * distance(0))


def standardised(case: Case) -> tuple[Tensor, Tensor]:
    student, teacher = (f.standardised_logits(z) for z in logits(case))
    return student, teacher


def standardised_kd(case: Case) -> Tensor:
    return f.kl_divergence(*standardised(case), case.hyper["temperature"])


CASES: dict[str, Callable[[Case], Tensor]] = {
    "logit_std_kd": standardised_kd,
    "dkd_logit_std": lambda case: f.decoupled_kl_divergence(*standardised(case), case["targets"], **case.hyper),
    "dist": dist,
}
LEFT_OUT: dict[str, str] = {}

EQUAL = {
    "dkd": {"cls_kd", "ctkd", "ofakd", "mmrazor_default_batchmean"},
    "dist": {"mmrazor"},
    "logit_std_kd": {"torchdistill_alpha0p1_minus_ce"},
}
DIFFERENT: dict[tuple[str, str], Callable[[Case], Tensor]] = {
    ("dist", "torchdistill"): dist_by_cosines,
    ("dist", "paper_appendix_no_tau2"): lambda case: dist(case, "paper"),
    ("dkd", "mmrazor_shipped_config_reduction_mean"): dkd_summed,
    ("logit_std_kd", "torchdistill_alpha_none_NO_T2"): lambda case: (
        standardised_kd(case) / case.hyper["temperature"] ** 2
    ),
    ("nkd", "sdd_fork_TARGET_NOT_REMOVED"): nkd_with_target,
}
