"""Files of image methods under another name or formula than ours, and what other implementations return."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kd.losses.functional import kl_divergence
from tests.losses.references._case import Case


def kl(case: Case) -> Tensor:
    return kl_divergence(case["student_logits"], case["teacher_logits"], **case.hyper)


def entropy_form(case: Case) -> Tensor:
    scaled = case["teacher_logits"] / case.hyper["temperature"]
    entropy = -(scaled.softmax(-1) * scaled.log_softmax(-1)).sum(-1).mean()
    return kl(case) + case.hyper["temperature"] ** 2 * entropy


def kd_over_classes(case: Case) -> Tensor:
    return kl(case) / case["student_logits"].shape[-1]


def kd_without_t2(case: Case) -> Tensor:
    return kl(case) / case.hyper["temperature"] ** 2


def at_with_epsilon(case: Case) -> Tensor:
    """The map is divided by its norm + 1e-6, and is a sum over the channels."""

    def maps(side: str) -> Iterator[Tensor]:
        for feature in case.layers(side):
            whole = feature.abs().pow(case.hyper.get("p", 2)).sum(1).flatten(1)
            yield whole / (torch.linalg.vector_norm(whole, dim=1, keepdim=True) + 1e-6)

    pairs = zip(maps("student"), maps("teacher"), strict=True)
    return torch.stack([(s - t).square().mean() for s, t in pairs]).sum()


CASES: dict[str, Callable[[Case], Tensor]] = {
    "kd_deit_soft": kd_over_classes,  # DeiT divides by rows × classes
}
LEFT_OUT: dict[str, str] = {}

# what other implementations return: equal to the reference value, or this
EQUAL = {
    "kd": {"mdistiller", "mmrazor", "timm", "attention_transfer_repo", "kd_zoo", "image_classification_sota"},
    "ce": {"mmrazor_cross_entropy"},
    "at": {"mdistiller", "torchdistill_mode_code"},
}
DIFFERENT: dict[tuple[str, str], Callable[[Case], Tensor]] = {
    ("kd", "torchdistill_alpha_none_NO_T2"): kd_without_t2,
    ("kd", "torchdistill_alpha0p5_total_minus_half_ce"): lambda case: kl(case) / 2,
    ("kd", "deit_soft_class_mean"): kd_over_classes,
    ("kd", "pytorch_reduction_mean"): kd_over_classes,
    ("kd", "cls_kd_cross_entropy_form_alpha1"): entropy_form,
    ("kd", "mmrazor_soft_ce"): entropy_form,
    ("at", "torchdistill_mode_paper"): lambda case: case.value(variant="paper"),
    ("at", "kd_zoo_abs_sum_eps1e6"): at_with_epsilon,
}
