"""Files of image methods on features and relations: other names of settings, weights of networks, other formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses import functional as f
from kd.losses.dense.mgd import Generation
from kd.losses.features.reviewkd import Fusion
from kd.losses.features.simkd import Projector
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
    """The series for features as they are; the norm of the difference, divided by B²."""
    gamma, order = case.hyper["gamma"], case.hyper["p_order"]
    own, other = (
        math.exp(-2 * gamma) * sum((2 * gamma * x @ x.T) ** p / math.factorial(p) for p in range(order + 1))
        for x in pair(case)
    )
    return torch.linalg.matrix_norm(own - other) / len(own) ** 2


def cc_bilinear(case: Case) -> Tensor:
    own, other = (x @ x.T for x in pair(case))
    return torch.linalg.matrix_norm(own - other) / len(own) ** 2


def rkd_normalised(case: Case) -> Tensor:
    return f.relational_loss(*(F.normalize(x, dim=1) for x in pair(case)), **case.hyper)


# ---------------------------------------------------------------------- with weights of a network


def weights(case: Case, pattern: str, count: int) -> list[Tensor]:
    return [case[pattern.format(number)] for number in range(count)]


def embedded(case: Case, side: str) -> Tensor:
    """The feature through the linear layer that the file holds, of unit length."""
    feature, name = case[f"{side}_feature_0"], f"embed_{side[0]}"
    return F.normalize(F.linear(feature, case[f"{name}_weight"], case[f"{name}_bias"]), dim=1)


def vid(case: Case) -> Tensor:
    first, second, third = weights(case, "regressor_w{}", 3)
    mean = F.conv2d(F.conv2d(F.conv2d(case["student_feature_0"], first).relu(), second).relu(), third)
    return f.variational_information(mean, case["teacher_feature_0"], case["log_scale"], **case.hyper)


def crd(case: Case) -> Tensor:
    student, teacher = embedded(case, "student"), embedded(case, "teacher")
    sides = student, case["memory_v1"], teacher, case["memory_v2"]
    return f.contrastive_distillation(*sides, case["contrast_idx"], case.hyper["temperature"])


def simkd(case: Case) -> Tensor:
    layers = Projector(5, 8).double()
    for number, (conv, norm) in enumerate(((layers[0], layers[1]), (layers[3], layers[4]), (layers[6], layers[7]))):
        conv.weight.data = case[f"transfer_w{number}"].data
        norm.weight.data, norm.bias.data = (case[f"transfer_bn{number}_{part}"].data for part in ("weight", "bias"))
    return f.reused_classifier(layers(case["student_feature_0"]), case["teacher_feature_0"])


def fused(case: Case) -> Tensor:
    """One fusion of ReviewKD, and a squared error."""
    fusion = Fusion(5, 6, 7, fuses=True).double()
    given = [
        *(case[name] for name in ("conv1_weight", "bn1_weight", "bn1_bias", "att_weight", "att_bias")),
        *(case[name] for name in ("conv2_weight", "bn2_weight", "bn2_bias")),
    ]
    for parameter, tensor in zip(fusion.parameters(), given, strict=True):
        parameter.data = tensor.data
    found, _ = fusion(case["student_feature_0"], case["student_feature_1"])
    return F.mse_loss(found, case["teacher_feature_0"])


def vkd(case: Case) -> Tensor:
    return f.orthogonal_projection(case["student_feature_0"] @ case["projector_weight"].T, case["teacher_feature_0"])


# ---------------------------------------------------------------------- other names, weights inside


def srd(case: Case) -> Tensor:
    """The code's weights, and KD beside it."""
    logits = case["student_logits"], case["teacher_logits"], case.hyper["temperature"]
    return 2 * f.log_sum_distance(*pair(case), case.hyper["exponent"]) + f.kl_divergence(*logits) / logits[2] ** 2


def cat_kd(case: Case) -> Tensor:
    return f.class_attention_transfer(*pair(case), case.hyper["resolution"], bool(case.hyper["normalize"]))


def hierarchical(case: Case) -> Tensor:
    return f.hierarchical_context(case.layers("student"), case.layers("teacher"))


def lightly_v1(case: Case) -> Tensor:
    return f.queue_similarity(*pair(case), case["queue"], case.hyper["temperature"])


def lightly_v3(case: Case) -> Tensor:
    whole, local = ([case[f"{side}_{part}"] for side in ("student", "teacher")] for part in ("global", "local"))
    found = f.queue_similarity(*whole, case["queue"], case.hyper["temperature_global"])
    return found + case.hyper["local_weight"] * f.token_similarity(*local, case.hyper["temperature_local"])


def dino(case: Case) -> Tensor:
    """The sum over the pairs of crops."""
    logits = case["student_out"], case["teacher_out"]
    temperatures = case.hyper["student_temp"], case.hyper["teacher_temp"]
    return f.prototype_cross_entropy(*logits, case["center"], *temperatures) * len(logits[0]) * len(logits[1])


def pixels(case: Case) -> tuple[Tensor, Tensor]:
    """Logit maps (B, classes, H, W) as rows: a pixel each."""
    student, teacher = (case[f"{side}_logits"].permute(0, 2, 3, 1).flatten(0, 2) for side in ("student", "teacher"))
    return student, teacher


def pixel_kd(case: Case) -> Tensor:
    return f.kl_divergence(*pixels(case), case.hyper["temperature"])


def ab(case: Case) -> Tensor:
    return 0.003 * f.activation_boundary(case.layers("student"), case.layers("teacher"), case.hyper["margin"])


def ab_layers(case: Case) -> Tensor:
    """Without factors, the sum over the layers."""
    both = zip(case.layers("student"), case.layers("teacher"), strict=True)
    return torch.stack([f.activation_boundary([s], [t], case.hyper["margin"]) for s, t in both]).sum()


def ab_of_means(case: Case) -> Tensor:
    both = zip(case.layers("student"), case.layers("teacher"), strict=True)
    return torch.stack([f.activation_boundary([s], [t], case.hyper["margin"]) / s[0].numel() for s, t in both]).sum()


def ofd_parts(case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    layers = [case.layers(side) for side in ("student", "teacher")]
    return list(zip(*layers, [case[f"margin_{n}"] for n in range(len(layers[0]))], strict=True))


def ofd(case: Case) -> Tensor:
    return f.overhaul_distance(*map(list, zip(*ofd_parts(case), strict=True))) / case.hyper["divisor"]


def ofd_layers(case: Case) -> Tensor:
    parts = torch.stack([f.overhaul_distance([s], [t], [m]) for s, t, m in ofd_parts(case)])
    return parts.sum() / case.hyper["divisor"]


def mgd(case: Case) -> Tensor:
    aligned = F.conv2d(case["student_feature_0"], case["align_weight"], case["align_bias"])
    generation = Generation(aligned.shape[1], case.hyper["lambda_mgd"], "positions").double()
    for number, conv in enumerate((generation.layers[0], generation.layers[2])):
        conv.weight.data, conv.bias.data = (case[f"gen{number}_{part}"].data for part in ("weight", "bias"))
    made = generation(aligned, case["mask_noise"])
    return case.hyper["alpha_mgd"] * f.generation_distance(made, case["teacher_feature_0"])


def pearson(case: Case) -> Tensor:
    both = zip(case.layers("student"), case.layers("teacher"), strict=True)
    return case.hyper["loss_weight"] * torch.stack([f.feature_pearson(s, t) for s, t in both]).sum()


def srrl(case: Case) -> Tensor:
    features = [feature.mean((2, 3)) for feature in pair(case)]
    logits = [case[f"{side}_logits"] for side in ("student", "teacher")]
    alpha, beta = case.hyper["alpha"], case.hyper["beta"]
    return alpha * f.softmax_regression(features[0], logits[0], features[1], logits[1], beta / alpha)


def itrd_correlation(case: Case) -> Tensor:
    projected = F.linear(case["student_feature_0"], case["embed_weight"], case["embed_bias"])
    return f.correlation_information(projected, case["teacher_feature_0"], case.hyper["alpha_it"])


def factors(case: Case) -> Tensor:
    return f.factor_transfer(*pair(case))


def factors_by_attention(case: Case) -> Tensor:
    return f.factor_transfer(*pair(case), variant="code")


def dcd(case: Case) -> Tensor:
    return f.discriminative_consistency(embedded(case, "student"), embedded(case, "teacher"), **case.hyper)


def rrd(case: Case) -> Tensor:
    """The batch is in the first rows of the queue."""
    own, other = embedded(case, "student"), embedded(case, "teacher")
    queue = torch.cat([other, case["queue"][len(other) :]])
    torch.testing.assert_close(queue, case["updated_queue"])
    return f.relational_representation(own, other, queue, **case.hyper)


def fsp_columns(case: Case) -> Tensor:
    """Max pooling; norms of the columns of the difference, summed, divided by B."""
    students, teachers = case.layers("student"), case.layers("teacher")
    found = []
    for n in range(len(students) - 1):
        own, other = (f.flow_matrix(x[n], x[n + 1], "paper") for x in (students, teachers))
        found.append(torch.linalg.vector_norm(own - other, dim=1).sum() / len(own))
    return torch.stack(found).sum()


CASES: dict[str, Callable[[Case], Tensor]] = {
    "cc_rbf": cc_rbf,
    "vid": vid,
    "crd": crd,
    "simkd": simkd,
    "reviewkd_hcl": hierarchical,
    "reviewkd_abf": fused,
    "vkd": vkd,
    "srd": srd,
    "cat_kd": cat_kd,
    "lightly_distillation_v1": lightly_v1,
    "lightly_distillation_v3": lightly_v3,
    "dinov2_dino": dino,
    "seg_kd_pixel": pixel_kd,
    "ab": ab,
    "ofd": ofd,
    "ofd_margin": lambda case: f.negative_mean(case["bn_weight"], case["bn_bias"]).sum(),
    "mgd": mgd,
    "pkd": pearson,
    "srrl": srrl,
    "itrd_correlation": itrd_correlation,
    "ft": factors,
    "ft_repdistiller": factors_by_attention,
    "dcd": dcd,
    "rrd": rrd,
    "itrd_mutual": lambda case: f.mutual_information(*pair(case)),
}
SINGLE = {"ofd_margin", "semckd"}
EQUAL = {
    "sp": {"mdistiller", "kd_zoo"},
    "rkd": {"mdistiller", "kd_zoo", "torchdistill", "mmrazor_without_l2_norm"},
    "pkt": {"mdistiller", "torchdistill", "passalis"},
    "vid": {"mdistiller"},
    "reviewkd_hcl": {"mdistiller", "torchdistill"},
    "reviewkd": {"mdistiller", "torchdistill"},
    "nst": {"mdistiller"},
    "fsp": {"kd_zoo"},
    "ofd": {"mdistiller_times_0p001"},
    "cwd": {"cirkd", "torchdistiller_author"},
    "ft": {"mmrazor", "torchdistill", "kd_zoo"},
}
DIFFERENT: dict[tuple[str, str], Callable[[Case], Tensor]] = {
    ("sp", "torchdistill_L1_ROWS"): sp_l1_rows,
    ("cc_rbf", "torchdistill_gaussian_NOT_NORMALISED_not_squared"): cc_not_normalised,
    ("cc_rbf", "torchdistill_bilinear"): cc_bilinear,
    ("rkd", "mmrazor_default_with_l2_norm"): rkd_normalised,
    ("ft", "repdistiller_DIFFERENT"): factors_by_attention,
    ("pkt", "kd_zoo_eps1e6"): lambda case: case.value(eps=1e-6),
    ("ab", "mmrazor_single_sum"): lambda case: 0.003 * ab_layers(case),
    ("ab", "torchdistill_no_0p003_no_layer_weights"): ab_layers,
    ("ab", "kd_zoo_mean_sum"): ab_of_means,
    ("ofd", "mmrazor_no_layer_weights"): ofd_layers,
    ("fsp", "torchdistill_maxpool_norm_not_squared"): fsp_columns,
    ("seg_kd_pixel", "mmrazor_KLDivergence_on_4D_divides_by_B_only"): lambda case: (
        pixel_kd(case) * case["student_logits"][0, 0].numel()
    ),
    ("seg_kd_pixel", "torchdistiller_reduction_mean_no_T2"): lambda case: (
        pixel_kd(case) / case["student_logits"].shape[1] / case.hyper["temperature"] ** 2
    ),
}
