"""The work of ``text_step.py``, the same for each contender: networks, rows, loss, what is measured, the bare loop."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LR, UNLABELLED, PAD = 1e-4, -100, 0


@dataclass(frozen=True)
class Case:
    """How much there is to do: ``prompt`` tokens of a row are not supervised, ``new`` ones the student writes."""

    title: str
    vocabulary: int
    samples: int
    tokens: int
    prompt: int = 1
    new: int = 0
    classes: int = 0


CASES = {
    "all": Case("all positions, V = 32,768", 32_768, 4, 256),
    "prompts": Case("half of each row a prompt, V = 32,768", 32_768, 4, 256, prompt=128),
    "large": Case("all positions, V = 131,072", 131_072, 4, 64),
    "on_policy": Case("on-policy, 64 new tokens", 32_768, 8, 128, prompt=64, new=64),
    "classification": Case("sentences of 77 classes", 32_768, 32, 64, classes=77),
    "kept": Case("answers kept on the disk, V = 32,768", 32_768, 4, 256),
}


def network(layers: int, width: int, vocabulary: int, tokens: int, classes: int) -> nn.Module:
    """A random Llama, or BERT where there are classes, the same in each process."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width, "vocab_size": vocabulary}
    shape |= {"num_attention_heads": 4, "intermediate_size": 2 * width, "max_position_embeddings": tokens}
    torch.manual_seed(layers)
    if classes:
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForSequenceClassification(BertConfig(**shape, **still, num_labels=classes))
    made = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=PAD, bos_token_id=1, eos_token_id=None))
    made.generation_config.eos_token_id = None
    return made


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """Student and teacher of a case."""
    size = (case.vocabulary, case.tokens, case.classes)
    student, teacher = network(2, 128, *size), network(4, 256, *size)
    return student.train(), teacher.eval().requires_grad_(False)


def rows(case: Case, samples: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, which are tokens, UNLABELLED in the prompt, or classes."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(3, case.vocabulary, (samples, case.tokens), generator=drawn)
    labels = ids.clone()
    labels[:, : case.prompt] = UNLABELLED
    if case.classes:
        labels = torch.randint(case.classes, (samples,), generator=drawn)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(student: Tensor, teacher: Tensor, labels: Tensor, ce: float) -> Tensor:
    """Forward KL + ce · CE of all logits, as loops of one's own have it."""
    if labels.ndim == 2:
        student, teacher, labels = student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    kl = F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="none", log_target=True).sum(-1)
    kept = labels != UNLABELLED
    total = kl[kept].mean()
    return total + ce * F.cross_entropy(student, labels, ignore_index=UNLABELLED) if ce else total


class Meter:
    """CPU seconds a step after the first, and MiB over what the process had when the networks were made."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.loss: float | None = None

    def begin(self) -> None:
        """Note what is in memory now: the libraries are loaded, nothing else was."""
        self.before = resident()

    def note(self, loss: Tensor) -> None:
        """Keep the loss of the first step."""
        self.loss = float(loss.detach()) if self.loss is None else self.loss

    def step(self) -> None:
        """A step has ended."""
        self.ends.append(time.process_time())

    def found(self, weights: int) -> tuple[float, float, float]:
        """Seconds a step, MiB over start without the ``weights`` (in bytes) of both networks, loss of the first one."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: KiB
        seconds = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        return seconds, peak - self.before - weights / 2**20, self.loss or float("nan")


def resident() -> float:
    """MiB of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def batches(case: Case, steps: int) -> Iterator[dict[str, Tensor]]:
    """The batches of a run, one a step."""
    whole = rows(case, case.samples * steps)
    for start in range(0, case.samples * steps, case.samples):
        yield {name: tensor[start : start + case.samples] for name, tensor in whole.items()}


def bare(case: Case, steps: int, meter: Meter, folder: Path) -> None:
    """The plain loop; on-policy ``generate`` first."""
    import transformers  # noqa: F401

    meter.begin()
    student, teacher = pair(case)
    descent = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0)
    for batch in batches(case, steps):
        labels = batch.pop("labels")
        if case.new:
            prompt = {name: tensor[:, : case.prompt] for name, tensor in batch.items()}
            with torch.no_grad():
                ids = student.eval().generate(**prompt, max_new_tokens=case.new, do_sample=True, top_k=0)
            student.train()
            batch, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone()
            labels[:, : case.prompt] = UNLABELLED
        with torch.no_grad():
            soft = teacher(**batch).logits
        loss = loss_of(student(**batch).logits, soft, labels, 0.0 if case.new else 0.5)
        descent.zero_grad()
        loss.backward()
        descent.step()
        meter.note(loss)
        meter.step()


def bare_kept(case: Case, steps: int, meter: Meter, folder: Path) -> None:
    """The plain loop, with the allocator's setting."""
    from kd.run.allocator import keep_memory

    if not keep_memory():
        raise SystemExit("hardware.keep_memory does nothing here: the C library is not glibc")
    bare(case, steps, meter, folder)
