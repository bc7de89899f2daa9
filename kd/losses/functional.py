"""The pure loss functions: tensors in, scalar out, torch only, for any training loop."""

from kd.losses.features.at import attention_map, attention_transfer
from kd.losses.features.hint import hint_loss
from kd.losses.logits.ce import cross_entropy
from kd.losses.logits.cwtm import confidence_weighted_cross_entropy
from kd.losses.logits.dkpp import permute_non_argmax, permuted_kl_divergence
from kd.losses.logits.kd import kl_divergence

__all__ = [
    "attention_map",
    "attention_transfer",
    "confidence_weighted_cross_entropy",
    "cross_entropy",
    "hint_loss",
    "kl_divergence",
    "permute_non_argmax",
    "permuted_kl_divergence",
]
