"""Files of image methods on features and relations: other names of settings, weights of networks, other formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses import functional as f
from tests.losses.references._case import Case


def pair(case: Case) -> tuple[Tensor, Tensor]:
    return case["student_feature_0"], case["teacher_feature_0"]


# ---------------------------------------------------------------------- relations between samples


def cc_rbf(case: Case) -> Tensor:
    return f.correlation_congruence(*pair(case), case.hyper["gamma"], case.hyper["p_order"], "paper")


def sp_l1_rows(case: Case) -> Tensor:
    """The rows are divided by their sums."""
    own, other = (F.normalize(x.flatten(1) @ x.flatten(1).T, p=1, dim=1) for x in pair(case))
    return (own - other).square().mean()


def cc_not_normalised(case: Case) -> Tensor:
    """Gaussians of the features as they are; the norm of the difference, divided by B²."""
    own, other = ((-case.hyper["gamma"] * torch.cdist(x, x).square()).exp() for x in pair(case))
    return torch.linalg.matrix_norm(own - other) / len(own) ** 2


def cc_bilinear(case: Case) -> Tensor:
    own, other = (x @ x.T for x in pair(case))
    return torch.linalg.matrix_norm(own - other) / len(own) ** 2


def rkd_normalised(case: Case) -> Tensor:
    return f.relational_loss(*(F.normalize(x, dim=1) for x in pair(case)), **case.hyper)


CASES: dict[str, Callable[[Case], Tensor]] = {
    "cc_rbf": cc_rbf,
}
EQUAL = {
    "sp": {"mdistiller", "kd_zoo"},
    "rkd": {"mdistiller", "kd_zoo", "torchdistill", "mmrazor_without_l2_norm"},
    "pkt": {"mdistiller", "torchdistill", "passalis"},
}
DIFFERENT: dict[tuple[str, str], Callable[[Case], Tensor]] = {
    ("sp", "torchdistill_L1_ROWS"): sp_l1_rows,
    ("cc_rbf", "torchdistill_gaussian_NOT_NORMALISED_not_squared"): cc_not_normalised,
    ("cc_rbf", "torchdistill_bilinear"): cc_bilinear,
    ("rkd", "mmrazor_default_with_l2_norm"): rkd_normalised,
    ("pkt", "kd_zoo_eps1e6"): lambda case: case.value(eps=1e-6),
}
