"""Files of logit methods for images under another name or formula than ours, and what other implementations return."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cosine_similarity

from kd.losses import functional as f
from kd.losses.base import UNLABELLED
from kd.losses.logits._target import mean_over_labelled
from kd.losses.logits.sdd import ScaledDecoupled
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
    return with_target(case.hyper)(*logits(case), case["targets"])


def with_target(hyper: dict[str, float]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """NKD whose label stays among the other classes: its part of the cross-entropy is that of the whole softmax."""
    t, gamma = hyper["temperature"], hyper["gamma"]

    def of(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        rows = -((teacher / t).softmax(-1) * (student / t).log_softmax(-1)).sum(-1)
        whole = mean_over_labelled(rows, targets != UNLABELLED)
        return f.normalised_cross_entropy(student, teacher, targets, t, 0.0) + gamma * t**2 * whole

    return of


def of_regions(case: Case, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    both = case["student_logits_multi"], case["teacher_logits_multi"]
    return f.scaled_decoupled_loss(*both, case["targets"], loss)


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


def alpha_beta(case: Case) -> Tensor:
    shares = {"alpha": case.hyper["ab_alpha"], "beta": case.hyper["ab_beta"]}
    return f.alpha_beta_divergence(*logits(case), case.hyper["temperature"], **shares)


def refined(case: Case) -> Tensor:
    both = standardised(case) if case.hyper["logit_stand"] else logits(case)
    settings = {key: value for key, value in case.hyper.items() if key != "logit_stand"}
    return f.refined_kl_divergence(*both, case["targets"], **settings)


def kl(case: Case) -> Tensor:
    return f.kl_divergence(*logits(case), **case.hyper)


def hard_labels(case: Case) -> Tensor:
    return f.hard_label_cross_entropy(*logits(case))


def euclidean(case: Case, of: Callable[[Tensor], Tensor] = lambda z: z) -> Tensor:
    """Mean over rows of the norm of the difference."""
    student, teacher = map(of, logits(case))
    return (student - teacher).square().sum(-1).sqrt().mean()


def multi_level(case: Case, variant: str = "code") -> Tensor:
    both = [case[f"{side}_logits_{view}"] for side in ("student", "teacher") for view in ("weak", "strong")]
    return case.hyper["kd_weight"] * f.multi_level_loss(*both, case.hyper["temperature"], variant)


def of_a_weak_head(case: Case) -> Tensor:
    weak = case["student_feature_0"] @ case["fc_weight"].T + case["fc_bias"]
    return f.customised_soft_labels(case["student_logits"], weak, case["targets"], **case.hyper)


CASES: dict[str, Callable[[Case], Tensor]] = {
    "logit_std_kd": standardised_kd,
    "dkd_logit_std": lambda case: f.decoupled_kl_divergence(*standardised(case), case["targets"], **case.hyper),
    "dist": dist,
    "dist_seg": lambda case: f.correlation_loss(*logits(case), 1.0, **case.hyper),
    "mlkd_total": multi_level,
    "mlkd_class_corr": lambda case: f.class_correlation(*logits(case), **case.hyper),
    "mlkd_batch_corr": lambda case: f.batch_correlation(*logits(case), **case.hyper),
    "uskd": of_a_weak_head,
    "sdd_kd": lambda case: of_regions(case, ScaledDecoupled(base="kd", **case.hyper).of_region),
    "sdd_dkd": lambda case: of_regions(case, ScaledDecoupled(**case.hyper).of_region),
    "sdd_nkd": lambda case: of_regions(case, with_target(case.hyper)),
    "abkd": alpha_beta,
    "rld": refined,
    "normkd": lambda case: f.normalised_kl_divergence(*logits(case), case.hyper["temperature_norm"]),
    "fkd_soft_ce": lambda case: f.soft_label_cross_entropy(case["student_logits"], case["teacher_prob"]),
    "function_matching_kl": kl,
    "kd_logits_mse": lambda case: f.squared_error(*logits(case)),
    "dml_kl": lambda case: f.kl_divergence(*logits(case), 1.0),  # the peer is the teacher
}
LEFT_OUT: dict[str, str] = {}
SINGLE = {"wsld", "uskd", "skd_direction"}  # the one-hot label, Zipf's law and λ are in single precision

EQUAL = {
    "dkd": {"cls_kd", "ctkd", "ofakd", "mmrazor_default_batchmean"},
    "abkd": {"official_llm_ab_div_float32"},
    "dist": {"mmrazor"},
    "hard_label": {"mmrazor_cross_entropy"},
    "logit_std_kd": {"torchdistill_alpha0p1_minus_ce"},
}
DIFFERENT: dict[tuple[str, str], Callable[[Case], Tensor]] = {
    ("function_matching_kl", "bigvision_kind_hard"): hard_labels,
    ("function_matching_kl", "bigvision_kind_euclidean"): euclidean,
    ("function_matching_kl", "bigvision_kind_logsoftmax_euclidean"): lambda c: euclidean(
        c, lambda z: z.log_softmax(-1)
    ),
    ("mlkd", "paper_intended_per_sample_masks"): lambda case: multi_level(case, "paper"),
    ("mlkd_total", "paper_intended_per_sample_masks"): lambda case: multi_level(case, "paper"),
    ("wsld", "cls_kd_alpha2p25"): lambda case: 2.25 * case.value(),
    ("dist", "torchdistill"): dist_by_cosines,
    ("dist", "paper_appendix_no_tau2"): lambda case: dist(case, "paper"),
    ("dkd", "mmrazor_shipped_config_reduction_mean"): dkd_summed,
    ("logit_std_kd", "torchdistill_alpha_none_NO_T2"): lambda case: (
        standardised_kd(case) / case.hyper["temperature"] ** 2
    ),
    ("nkd", "sdd_fork_TARGET_NOT_REMOVED"): nkd_with_target,
}
