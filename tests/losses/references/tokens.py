"""Files of language-model methods: TRL, DistiLLM, torchtune, Liger, Model Optimizer, EasyDistill, DistillKit, MiniLLM.

Their logits are (samples, positions, vocabulary), of which those count that have a label; our functions take rows. Most
leave T² out, many take a cross-entropy for the forward KL: both are known, and undone here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kd.losses import functional as f
from tests.losses.references._case import Case

IGNORED = -100


def rows(case: Case, *names: str) -> list[Tensor]:
    """The entries at the positions that count: by the labels, or by a mask; all where the file has neither."""
    masks = [name for name in ("attention_mask", "completion_mask") if name in case.tensors]
    mask = case[masks[0]] != 0 if masks else None
    kept = case["labels"] != IGNORED if "labels" in case.tensors else mask
    return [case[name].flatten(0, 1) if kept is None and case[name].ndim > 2 else case[name][kept] for name in names]


def logits(case: Case) -> list[Tensor]:
    return rows(case, "student_logits", "teacher_logits")


def entropy(teacher_logits: Tensor) -> Tensor:
    """What a cross-entropy with the teacher is larger by than the KL."""
    log_p = teacher_logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def temperature(case: Case) -> float:
    return float(case.hyper.get("temperature", 1.0))


def jsd(case: Case) -> Tensor:
    """TRL, Liger: no T²."""
    t = temperature(case)
    return f.generalised_js_divergence(*logits(case), t, case.hyper["beta"]) / t**2


def jsd_without_labels(case: Case) -> Tensor:
    """TRL without labels: the sum over all positions ÷ samples."""
    return jsd(case) * case["student_logits"].shape[1]


def jsd_of_a_larger_batch(case: Case) -> Tensor:
    """TRL with gradient accumulation: the sum ÷ the tokens of all parts."""
    return jsd(case) * len(logits(case)[0]) / case.hyper["num_items_in_batch"]


def served_topk(case: Case) -> Tensor:
    t, form = temperature(case), "tail" if case.hyper["add_tail"] else "renormalised"
    known = rows(case, "student_logits", "teacher_topk_logprobs", "teacher_topk_ids")
    if case.hyper["beta"] == 0:
        return f.topk_kl_divergence(*known, t, form) / t**2
    return f.generalised_js_divergence(*f.topk_buckets(*known, t, form), 1.0, float(case.hyper["beta"]))


def served_top1(case: Case) -> Tensor:
    """Over the teacher's first choice (not for β = 1), the sampled token, once where they are one, and the rest."""
    t, beta = temperature(case), float(case.hyper["beta"])
    names = ("teacher_top1_logprobs", "teacher_top1_ids", "teacher_actual_logprobs", "completion_ids")
    student, first_log, first, sampled_log, sampled = rows(case, "student_logits", *names)
    both = (first != sampled) & (beta < 1)
    total = torch.zeros((), dtype=torch.float64)
    for kept, log_probs, ids in (
        (both, torch.stack([first_log, sampled_log], -1), torch.stack([first, sampled], -1)),
        (~both, sampled_log[:, None], sampled[:, None]),
    ):
        form = "tail" if case.hyper["add_tail"] else "renormalised"
        buckets = f.topk_buckets(student[kept], log_probs[kept], ids[kept], t, form)
        total = total + f.generalised_js_divergence(*buckets, 1.0, beta) * kept.sum()
    return total / len(student)


def reverse_kl_without_t2(case: Case) -> Tensor:
    t = temperature(case)
    return f.reverse_kl_divergence(*logits(case), t) / t**2


def trl_advantages(case: Case) -> Tensor:
    """γ^t times the returns, ÷ Σ γ^i over the positions from t on, of which the masked count 1e-4."""
    mask, gamma = case["mask"].double(), float(case.hyper["gamma"])
    rewards = (case["teacher_logprobs"] - case["student_logprobs"]) * mask
    found = f.discounted_returns(rewards, gamma)
    if case.hyper["length_normalization"]:
        found = found / f.discounted_returns(mask.clamp(min=1e-4), gamma)
    else:
        found = found * gamma ** torch.arange(rewards.shape[-1])
    np.testing.assert_allclose(found.numpy(), case["advantages"].numpy(), rtol=1e-5, atol=1e-7)
    return found.sum()


def policy_gradient(case: Case) -> Tensor:
    """The authors' advantages of all cells, padding included; the loss over those of the answers."""
    mask = case["attention_mask"].bool()
    advantages = f.minillm_advantages(case["rewards"], mask, case.hyper["gamma"])
    if not case.hyper["whiten"]:
        left = mask.double().flip(-1).cumsum(-1).flip(-1)
        advantages = f.discounted_returns(case["rewards"] * mask, case.hyper["gamma"]) / left.clamp(min=1)
    np.testing.assert_allclose(advantages[mask].numpy(), case["advantages"][mask].numpy(), rtol=1e-4, atol=1e-6)
    known = rows(case, "student_logits", "response_ids", "old_logprobs", "importance_weights")
    student, ids, old, importance = known
    return f.clipped_policy_gradient(student, ids, advantages[mask], old, importance, case.hyper["cliprange"])


def cross_entropy_form(case: Case) -> Tensor:
    student, teacher = logits(case)
    return f.kl_divergence(student, teacher, 1.0) + entropy(teacher)


def symmetric(case: Case, reverse_share: float) -> Tensor:
    student, teacher = logits(case)
    value = f.symmetric_kl_divergence(student, teacher, 1.0, reverse_share)
    return value + (1 - reverse_share) * entropy(teacher)


def skewed(case: Case) -> Tensor:
    student, teacher = logits(case)
    return f.skewed_kl_divergence(student, teacher, 1.0, case.hyper["lam"]) + entropy(teacher)


# ---------------------------------------------------------------------- two tokenizers


def spans(case: Case, side: str, early: int, skip_eos: bool = True) -> dict[str, Tensor]:
    """Rows of one side; ``early``: 1 for the logits that predict the tokens, 0 for those at their own places."""
    labels, found = case[f"{side}_labels"], []
    for sample in labels:
        places = (sample != IGNORED).nonzero().squeeze(-1)
        found.append(places[:-1] if skip_eos and case.hyper[f"skip_{side}_eos"] else places)
    lengths = torch.tensor([len(places) for places in found])
    samples, places = torch.arange(len(found)).repeat_interleave(lengths), torch.cat(found)
    scaled = case[f"{side}_logits"][samples, places - early] / float(case.hyper[f"{side}_temperature"])
    known = {f"{side}_logits": scaled, f"{side}_lengths": lengths}
    if f"{side}_byte_offsets" in case.tensors:
        known[f"{side}_ids"] = case[f"{side}_input_ids"][samples, places]
        known[f"{side}_ends"] = case[f"{side}_byte_offsets"][samples, places, 1]
    return known


def two_sides(case: Case, early: int) -> dict[str, Tensor]:
    return {**spans(case, "student", early), **spans(case, "teacher", early)}


def uld(case: Case) -> Tensor:
    """TRL; the cross-entropy is shifted, over all labelled positions."""
    value = case.hyper["distillation_weight"] * f.uld_loss(**two_sides(case, int(case.hyper["bayesian"])))
    weight = case.hyper["crossentropy_weight"]
    if weight:
        following = case["student_labels"][:, 1:]
        kept = following != IGNORED
        value = value + weight * f.cross_entropy(case["student_logits"][:, :-1][kept], following[kept])
    return value


def uld_of_the_authors(case: Case) -> Tensor:
    assert case.hyper["crossentropy_weight"] == 0
    return case.hyper["distillation_weight"] * f.uld_loss(**two_sides(case, 1))


def gold(case: Case) -> Tensor:
    bayesian = bool(case.hyper["bayesian"])
    assert case.hyper["crossentropy_weight"] == 0
    value = f.gold_loss(**two_sides(case, int(bayesian)), merge="last" if bayesian else "first")
    return case.hyper["distillation_weight"] * value


def gold_hybrid(case: Case) -> Tensor:
    matched = {f"{side}_matched": case[f"matched_{side}_ids"] for side in ("student", "teacher")}

    def of(share: float | None) -> Tensor:
        settings = {"beta": float(case.hyper["beta"]), "merge": "first", "matched_share": share}
        return f.gold_hybrid_loss(**two_sides(case, 0), **matched, **settings)

    if case.hyper["adaptive_weights"]:
        return of(None)
    return case.hyper["matched_weight"] * of(1.0) + case.hyper["unmatched_weight"] * of(0.0)


# ---------------------------------------------------------------------- from hidden states


def projected(case: Case, side: str) -> Tensor:
    found = case[f"{side}_hidden"] @ case[f"{side}_weight"].T
    if f"{side}_bias" in case.tensors:
        found = found + case[f"{side}_bias"]
    found = found * float(case.hyper.get(f"{side}_logit_scale", 1.0))
    cap = float(case.hyper.get(f"{side}_softcap", 0.0))
    return cap * torch.tanh(found / cap) if cap else found


def kept_projected(case: Case) -> list[Tensor]:
    kept = case["labels"] != IGNORED if "labels" in case.tensors else case["completion_mask"] != 0
    return [projected(case, side)[kept] for side in ("student", "teacher")]


def fused(case: Case) -> Tensor:
    t = temperature(case)
    return f.generalised_js_divergence(*kept_projected(case), t, float(case.hyper["beta"])) / t**2


def liger(case: Case) -> Tensor:
    """The hard part is at T = 1."""
    kept = case["labels"] != IGNORED
    hard = f.cross_entropy(projected(case, "student")[kept], case["labels"][kept])
    return case.hyper["weight_hard"] * hard + case.hyper["weight_soft"] * fused(case)


# ---------------------------------------------------------------------- Model Optimizer, EasyDistill, DistillKit


def kl_over_elements(case: Case) -> Tensor:
    return f.kl_divergence(*logits(case), temperature(case)) / case["student_logits"].shape[-1]


def kl_over_samples(case: Case) -> Tensor:
    return f.kl_divergence(*logits(case), temperature(case)) * case["student_logits"].shape[1]


def shifted_kl(case: Case) -> Tensor:
    kept = case["labels"][:, 1:] != IGNORED
    student, teacher = (case[f"{side}_logits"][:, :-1][kept] for side in ("student", "teacher"))
    return f.kl_divergence(student, teacher, temperature(case))


def corrected(case: Case) -> Tensor:
    both = case["student_logits"], case["teacher_logits"]
    return f.corrected_kl_divergence(*both, case["labels"], temperature(case), case.hyper["threshold"])


def modelopt_buckets(case: Case) -> tuple[Tensor, Tensor]:
    student, teacher = logits(case)
    t = temperature(case)
    log_probs, ids = (teacher / t).log_softmax(-1).topk(int(case.hyper["top_k"]), dim=-1)
    return f.topk_buckets(student, log_probs, ids, t, "renormalised")


def kl_over_tokens_twice(case: Case, function: Callable[..., Tensor], floor: float) -> Tensor:
    """Probabilities in the place of the teacher's logits, some of them 0."""
    student, teacher = rows(case, "student_logits", "teacher_probs")
    return function(student, teacher.clamp(min=floor).log(), 1.0) / len(student)


def adaptive(case: Case) -> Tensor:
    return f.adaptive_kl_divergence(*logits(case), 1.0, float(case.hyper["mu"]))


def stored_topk(case: Case, function: Callable[..., Tensor], form: str) -> Tensor:
    """DistillKit: log-probabilities of T = 1 are softened when most of them are gone."""
    t = temperature(case)
    student, log_probs, ids = rows(case, "student_logits", "teacher_topk_logprobs", "teacher_topk_ids")
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).log()
    softened = (torch.cat([log_probs, rest], -1) / t).log_softmax(-1)[:, :-1]
    return t**2 * function(*f.topk_buckets(student, softened, ids, t, form), 1.0)


def ranking(case: Case, function: Callable[..., Tensor]) -> Tensor:
    margin = case.hyper.get("margin")
    settings = {} if margin is None else {"margin": None if margin < 0 else margin}
    return function(*rows(case, "student_logits", "teacher_topk_logprobs", "teacher_topk_ids"), **settings)


CASES: dict[str, Callable[[Case], Tensor]] = {
    "trl_gkd_jsd_*": jsd,
    "trl_gkd_jsd_nolabels": jsd_without_labels,
    "trl_gkd_jsd_num_items": jsd_of_a_larger_batch,
    "trl_server_topk_forward_kl_*": served_topk,
    "trl_server_top1_tail_*": served_top1,
    "trl_minillm_single_step": reverse_kl_without_t2,
    "trl_minillm_advantage_*": trl_advantages,
    "minillm_policy_gradient": policy_gradient,
    "minillm_single_step_reg": reverse_kl_without_t2,
    "minillm_kd_soft_ce": cross_entropy_form,
    "trl_uld_positional*": uld,
    "uld_original": uld_of_the_authors,
    "trl_gold_extended*": gold,
    "trl_gold_hybrid_*": gold_hybrid,
    "distillm_forward_kl": cross_entropy_form,
    "distillm_reverse_kl": reverse_kl_without_t2,
    "distillm_symmetric_kl": lambda case: symmetric(case, case.hyper["lam"]),
    "distillm_js_distance": lambda case: f.generalised_js_divergence(*logits(case), 1.0, 1 - case.hyper["lam"]),
    "distillm_tv_distance": lambda case: f.total_variation(*logits(case)),
    "distillm_skewed_forward_kl": skewed,
    "distillm_skewed_reverse_kl": lambda case: f.skewed_reverse_kl_divergence(*logits(case), 1.0, case.hyper["lam"]),
    "torchtune_forward_kl*": cross_entropy_form,
    "torchtune_reverse_kl*": reverse_kl_without_t2,
    "torchtune_symmetric_kl*": lambda case: symmetric(case, 1 - case.hyper["sym_kd_ratio"]),
    "liger_fused_linear_jsd_*": liger,
    "liger_jsd_torch_reference": jsd,
    "trl116_chunked_divergence_*": fused,
    "modelopt_logits_kl_mean": kl_over_elements,
    "modelopt_logits_kl_batchmean": kl_over_samples,
    "modelopt_hf_trainer_kl": shifted_kl,
    "modelopt_mft": corrected,
    "modelopt_topk_kl_forward": lambda case: f.kl_divergence(*modelopt_buckets(case), 1.0),
    "modelopt_topk_kl_reverse": lambda case: f.reverse_kl_divergence(*modelopt_buckets(case), 1.0),
    "easydistill1_forward_kld": lambda case: kl_over_tokens_twice(case, f.kl_divergence, 1e-30),
    "easydistill1_reverse_kld": lambda case: kl_over_tokens_twice(case, f.reverse_kl_divergence, 1e-10),
    "akl_adaptive_kl": adaptive,
    "distillkit_dense_kl": lambda case: f.kl_divergence(*logits(case), temperature(case)),
    "distillkit_dense_jsd": lambda case: f.generalised_js_divergence(*logits(case), temperature(case)),
    "distillkit_dense_tvd": lambda case: f.total_variation(*logits(case), temperature(case)),
    "distillkit_sparse_kl_zero": lambda case: stored_topk(case, f.kl_divergence, "zero"),
    "distillkit_sparse_kl_symmetric_uniform": lambda case: stored_topk(case, f.kl_divergence, "tail"),
    "distillkit_sparse_jsd_zero": lambda case: stored_topk(case, f.generalised_js_divergence, "zero"),
    "distillkit_sparse_jsd_symmetric_uniform": lambda case: stored_topk(case, f.generalised_js_divergence, "tail"),
    "distillkit_sparse_tvd_zero": lambda case: stored_topk(case, f.total_variation, "zero"),
    "distillkit_sparse_tvd_symmetric_uniform": lambda case: stored_topk(case, f.total_variation, "tail"),
    "distillkit_hinge": lambda case: ranking(case, f.hinge_ranking),
    "distillkit_logistic_ranking": lambda case: ranking(case, f.logistic_ranking),
}

LEFT_OUT: dict[str, str] = {
    "distillkit_compression": "how log-probabilities are stored, no loss",
    "liger_fused_linear_cosine": "a cosine of the logits over ignored rows as well: no method of ours",
}
