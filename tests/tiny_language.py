"""Language models of transformers that are as small as they can be, and token batches for them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from kd.losses.base import UNLABELLED, Batch

VOCABULARY = 40
BERT = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
BERT |= {"num_hidden_layers": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
LLAMA = {**BERT, "model_type": "llama", "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}


def model(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A node of a config: a network with random weights."""
    target = "kd.models.transformers_model.transformers_model"
    return {"_target_": target, "name": None, "pretrained": False, "config": {**config, **more}, "lora": None}


def sequences(samples: int, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Token ids in which each token is the one before it plus one, mostly, and the last few are padding."""
    drawn = torch.Generator().manual_seed(seed)
    start = torch.randint(3, VOCABULARY, (samples, 1), generator=drawn)
    ids = 3 + (start - 3 + torch.arange(length)) % (VOCABULARY - 3)
    noise = torch.rand(ids.shape, generator=drawn) < 0.1
    ids = torch.where(noise, torch.randint(3, VOCABULARY, ids.shape, generator=drawn), ids)
    mask = (torch.arange(length) < (length - torch.arange(samples) % 4).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


class Texts(L.LightningDataModule):
    """Three splits of made sequences. ``kind``: of which task their targets are."""

    mean: tuple[float, ...] = ()

    def __init__(self, kind: str = "causal_lm", samples: int = 32, batch_size: int = 8) -> None:
        super().__init__()
        self.kind, self.samples, self.batch_size = kind, samples, batch_size
        self.num_classes = {"causal_lm": VOCABULARY, "masked_lm": VOCABULARY, "embedding": None}.get(kind, 3)
        self.class_names = [str(n) for n in range(3)] if self.num_classes == 3 else []
        self.train_index = torch.arange(samples)

    def drawn(self, split: str) -> Batch:
        seed = {"train": 1, "val": 2, "test": 3}[split]
        inputs = sequences(self.samples, seed=seed)
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        sizes = {"bytes": 1 + ids % 5}
        if self.kind == "embedding":
            return Batch(inputs, None, torch.arange(self.samples), real)
        if self.kind == "text_classification":
            return Batch(inputs, ids[:, 0] % 3, torch.arange(self.samples), real)
        if self.kind == "causal_lm":
            targets = torch.where(real & (torch.arange(ids.shape[1]) > 2), ids, UNLABELLED)
            return Batch(inputs, targets, torch.arange(self.samples), real, extra=sizes)
        hidden = real & ((torch.arange(ids.shape[1]) + torch.arange(self.samples).unsqueeze(1)) % 5 == 0)
        hidden[:, 0] = True
        masked = {**inputs, "input_ids": torch.where(hidden, 1, ids)}
        return Batch(masked, torch.where(hidden, ids, UNLABELLED), torch.arange(self.samples), real, extra=sizes)

    def batches(self, split: str) -> list[Batch]:
        whole = self.drawn(split)
        starts = range(0, self.samples, self.batch_size)
        return [whole.map(lambda t, s=start: t[s : s + self.batch_size]) for start in starts]

    def train_dataloader(self) -> list[Batch]:
        return self.batches("train")

    def val_dataloader(self) -> list[Batch]:
        return self.batches("val")

    def test_dataloader(self) -> list[Batch]:
        return self.batches("test")
