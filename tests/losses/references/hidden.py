"""Files of DistilBERT, DistilBART, TinyBERT, PKD, MiniLM, TextBrewer and the hidden losses of DistillKit.

Which rows count is the task's choice, not the loss's: where a file has a mask, its rows are selected here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.functional import (
    attention_cross_entropy,
    attention_kl,
    attention_score_mse,
    cross_entropy,
    cwsm_temperatures,
    flsw_temperatures,
    hidden_cosine,
    hidden_fsp,
    hidden_mmd,
    hidden_mse,
    kl_divergence,
    minilm_loss,
    patience_loss,
    probability_shift,
    self_attention_relations,
    value_relation_kl,
)
from kd.losses.hidden._layers import layer_pairs
from tests.losses.references._case import Case

# ---------------------------------------------------------------------- logits


def mask(case: Case) -> Tensor | None:
    return case.tensors.get("attention_mask")


def logits(case: Case, kept: Tensor) -> tuple[Tensor, Tensor]:
    return case["student_logits"][kept], case["teacher_logits"][kept]


def real(case: Case) -> Tensor:
    return case["attention_mask"].bool()


def distilbert_ce(case: Case) -> Tensor:
    return kl_divergence(*logits(case, real(case)), case.hyper["temperature"])


def distilbert_masked(case: Case) -> Tensor:
    return kl_divergence(*logits(case, case["mlm_labels"] != -100), case.hyper["temperature"])


def mlm(case: Case) -> Tensor:
    kept = case["mlm_labels"] != -100
    return cross_entropy(case["student_logits"][kept], case["mlm_labels"][kept])


def clm(case: Case) -> Tensor:
    following = case["labels"][:, 1:]
    kept = following != -100
    return cross_entropy(case["student_logits"][:, :-1][kept], following[kept])


def logit_squares(case: Case) -> Tensor:
    """The sum over the vocabulary, where :func:`hidden_mse` has the mean."""
    found = hidden_mse(case["student_logits"], case["teacher_logits"], mask(case))
    return found * case["student_logits"].shape[-1]


def triple(case: Case) -> Tensor:
    cosine = hidden_cosine(case["student_hidden"], case["teacher_hidden"], mask(case))
    weights = (case.hyper[f"alpha_{name}"] for name in ("ce", "mlm", "cos"))
    return sum(w * v for w, v in zip(weights, (distilbert_ce(case), mlm(case), cosine), strict=True))


def causal(case: Case) -> Tensor:
    return case.hyper["alpha_ce"] * distilbert_ce(case) + case.hyper["alpha_clm"] * clm(case)


def squad(case: Case) -> Tensor:
    soft, hard = [], []
    for end in ("start", "end"):
        student, teacher = case[f"student_{end}_logits"], case[f"teacher_{end}_logits"]
        soft.append(kl_divergence(student, teacher, case.hyper["temperature"]))
        hard.append(cross_entropy(student, case[f"{end}_positions"]))
    weights = case.hyper["alpha_ce"], case.hyper["alpha_squad"]
    return weights[0] * torch.stack(soft).mean() + weights[1] * torch.stack(hard).mean()


def soft_ce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy with the teacher's softened probabilities, without T²: the KL and the teacher's entropy."""
    scaled = teacher / temperature
    entropy = -(scaled.softmax(-1) * scaled.log_softmax(-1)).sum(-1).mean()
    return kl_divergence(student, teacher, temperature) / temperature**2 + entropy


def of_rows(function: Callable[..., Tensor], *inputs: str) -> Callable[[Case], Tensor]:
    """The same with a temperature for each row, which the function gives."""

    def value(case: Case) -> Tensor:
        settings = {name: found for name, found in case.hyper.items() if name != "base_temperature"}
        found = function(*(case[name] for name in inputs), case.hyper["base_temperature"], **settings)
        torch.testing.assert_close(found, case["per_example_temperature"])
        return soft_ce(case["student_logits"] / found[:, None], case["teacher_logits"] / found[:, None], 1.0)

    return value


def shifted(case: Case) -> Tensor:
    teacher = probability_shift(case["teacher_logits"], case["labels"])
    assert torch.equal(teacher, case["shifted_teacher_logits"])
    return soft_ce(case["student_logits"], teacher, case.hyper["temperature"])


def textbrewer_kd_mse(case: Case) -> Tensor:
    return hidden_mse(case["student_logits"], case["teacher_logits"], mask(case)) / case.hyper["temperature"] ** 2


def pkd_kd_ce(case: Case) -> Tensor:
    student, alpha = case["student_logits"], case.hyper["alpha"]
    soft = kl_divergence(student, case["teacher_logits"], case.hyper["temperature"]) / student.shape[1]
    return alpha * soft + (1 - alpha) * cross_entropy(student, case["labels"])


def tinybert_prediction(case: Case) -> Tensor:
    student = case["student_logits"]
    return soft_ce(student, case["teacher_logits"], case.hyper["temperature"]) / student.shape[1]


# ---------------------------------------------------------------------- hidden states


def layers(case: Case, side: str, kind: str = "hidden") -> list[Tensor]:
    count = sum(name.startswith(f"{side}_{kind}_") for name in case.tensors)
    return [case[f"{side}_{kind}_{i}"] for i in range(count)]


def of_hidden(function: Callable[..., Tensor]) -> Callable[[Case], Tensor]:
    return lambda case: function(case["student_hidden"], case["teacher_hidden"], mask(case))


def of_two_layers(function: Callable[..., Tensor]) -> Callable[[Case], Tensor]:
    return lambda case: function(*layers(case, "student"), *layers(case, "teacher"), mask(case))


def distilbart(variant: str) -> Callable[[Case], Tensor]:
    def value(case: Case) -> Tensor:
        teachers = [layers(case, "teacher")[i] for i in case["matches"].tolist()]
        pairs = zip(layers(case, "student"), teachers, strict=True)
        return torch.stack([hidden_mse(s, t, mask(case), variant) for s, t in pairs]).sum()

    return value


def distillkit(function: Callable[..., Tensor]) -> Callable[[Case], Tensor]:
    """Positions with a label, a projection for each pair of layers, the mean over the pairs."""

    def value(case: Case) -> Tensor:
        pairs = zip(case["map_student"].tolist(), case["map_teacher"].tolist(), strict=True)
        found = [
            function(F.linear(case[f"student_hidden_{s}"], case[f"proj_weight_{i}"]), case[f"teacher_hidden_{t}"], kept)
            for kept in [case["labels"] >= 0]
            for i, (s, t) in enumerate(pairs)
        ]
        return torch.stack(found).mean()

    return value


def tinybert_intermediate(case: Case) -> Tensor:
    students, teachers = ({kind: layers(case, s, kind) for kind in ("attention", "hidden")} for s in SIDES)
    found = []
    for s, t in layer_pairs(len(students["attention"]), len(teachers["attention"]), "uniform", embeddings=False):
        found.append(attention_score_mse(students["attention"][s], teachers["attention"][t]))
    for s, t in layer_pairs(len(students["hidden"]), len(teachers["hidden"]), "uniform", embeddings=True):
        projected = F.linear(students["hidden"][s], case["proj_weight"], case["proj_bias"])
        found.append(hidden_mse(projected, teachers["hidden"][t], mask(case), "tinybert"))
    return torch.stack(found).sum()


SIDES = ("student", "teacher")


def first_token(case: Case) -> Tensor:
    """TextBrewer sums over the width."""
    return patience_loss(case["student_hidden"][:, :1], case["teacher_hidden"][:, :1], variant="paper")


def patience(case: Case) -> Tensor:
    return patience_loss(case["student_cls"], case["teacher_cls"], normalise=bool(case.hyper["normalized"]))


def projections(case: Case, names: str) -> list[Tensor]:
    return [case[f"{side}_{name}"] for side in SIDES for name in names.split()]


# ---------------------------------------------------------------------- attention scores


def attention(case: Case) -> list[Tensor]:
    return [case["student_attention"], case["teacher_attention"]]


def zeroed(scores: Tensor) -> Tensor:
    """TextBrewer without a mask takes scores at or below −10⁻³ for those of padding."""
    return scores.masked_fill(scores <= -1e-3, 0)


def masked_scores(merge: bool) -> Callable[[Case], Tensor]:
    return lambda case: attention_score_mse(*attention(case), mask(case), "masked", merge)


def zeroed_scores(merge: bool) -> Callable[[Case], Tensor]:
    def value(case: Case) -> Tensor:
        both = [s.sum(1, keepdim=True) if merge else s for s in attention(case)]
        return attention_score_mse(*map(zeroed, both), variant="masked")

    return value


CASES: dict[str, Callable[[Case], Tensor]] = {
    "distilbert_ce": distilbert_ce,
    "distilbert_ce_restrict_to_mask": distilbert_masked,
    "distilbert_mlm": mlm,
    "distilbert_clm": clm,
    "distilbert_mse_logits": logit_squares,
    "distilbert_triple": triple,
    "distilbert_causal_default": causal,
    "distilbert_squad_kd": squad,
    "distilbert_cos": of_hidden(hidden_cosine),
    "distilbart_hidden_mse": distilbart("masked"),
    "distilbart_hidden_mse_layernorm": distilbart("distilbart"),
    "distillkit_hidden_mse": distillkit(hidden_mse),
    "distillkit_hidden_cosine": distillkit(hidden_cosine),
    "textbrewer_kd_ce": lambda case: soft_ce(*logits(case, real(case)), case.hyper["temperature"]),
    "textbrewer_kd_ce_cwsm": of_rows(cwsm_temperatures, "student_logits"),
    "textbrewer_kd_ce_flsw": of_rows(flsw_temperatures, "student_logits", "teacher_logits"),
    "textbrewer_kd_ce_probability_shift": shifted,
    "textbrewer_kd_mse": textbrewer_kd_mse,
    "textbrewer_hidden_mse*": of_hidden(hidden_mse),
    "textbrewer_cos*": of_hidden(hidden_cosine),
    "textbrewer_pkd": first_token,
    "textbrewer_gram_fsp*": of_two_layers(hidden_fsp),
    "textbrewer_mmd_nst*": of_two_layers(hidden_mmd),
    "textbrewer_att_mse": masked_scores(merge=False),
    "textbrewer_att_mse_sum": masked_scores(merge=True),
    "textbrewer_att_mse_nomask": zeroed_scores(merge=False),
    "textbrewer_att_mse_sum_nomask": zeroed_scores(merge=True),
    "textbrewer_att_ce": lambda case: attention_cross_entropy(*attention(case), mask(case)),
    "textbrewer_att_ce_mean": lambda case: attention_cross_entropy(*attention(case), mask(case), merge_heads=True),
    "minilm_attention_transfer": lambda case: attention_kl(
        *projections(case, "query key"), case.hyper["heads"], mask(case)
    ),
    "minilm_value_relation": lambda case: value_relation_kl(
        *projections(case, "value"), case.hyper["heads"], mask(case)
    ),
    "minilm_v1_total": lambda case: minilm_loss(*projections(case, "query key value"), case.hyper["heads"], mask(case)),
    "minilmv2_qkv_relations": lambda case: self_attention_relations(
        *projections(case, "query key value"), case.hyper["relation_heads"], mask(case)
    ),
    "pkd_patience": patience,
    "pkd_patience_normalized": patience,
    "pkd_kd_ce": pkd_kd_ce,
    "tinybert_attention": lambda case: attention_score_mse(*attention(case)),
    "tinybert_intermediate": tinybert_intermediate,
    "tinybert_prediction": tinybert_prediction,
}
LEFT_OUT: dict[str, str] = {
    "textbrewer_att_ce*_nomask": "drops every key of which the teacher's score is negative, not only padding",
}
