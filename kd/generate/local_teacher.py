"""A causal language model of transformers that completes prompts: batches of like lengths, left padding, KV cache."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from kd.data.text.encode import around
from kd.data.text.teacher_tokens import bytes_of_tokens
from kd.data.text.tokenizer import tokenizer as load_tokenizer
from kd.errors import KdError, MachineFailure
from kd.generate.prompts import Prompt
from kd.models.generation import generation_config
from kd.models.positions import positions_of
from kd.models.transformers_model import transformers_model
from kd.records.generations import Candidate, Completion, stored_token

Batch = list[tuple[int, int]]
"""Number of a prompt, number of its sample."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: ``temperature`` 0 takes the likeliest one; ``seed`` decides with the prompts of a batch."""

    max_new_tokens: int = 256
    temperature: float | None = 1.0
    top_p: float | None = None
    seed: int = 0


class LocalTeacher:
    """A causal model with its tokenizer.

    ``name``: a folder, a run, or a name of the hub. ``system``: the system message, for which there must be a chat
    template. ``template``: whether texts are given as messages of a user; None: where the tokenizer has a template.
    ``KdError`` when it cannot be had.
    """

    def __init__(self, name: str, sampling: Sampling, system: str | None = None, template: bool | None = None) -> None:
        where = str(model_folder(name))
        try:
            self.tokenizer, _ = load_tokenizer(where, "bpe", list, None, None)
            network: Any = transformers_model(where, architecture="causal_lm")
            if fresh := network.random_weights:
                raise KdError(
                    f"model = {name} has no weights for {', '.join(fresh[:4])}: it is no causal language model"
                )
        except KdError as error:
            raise KdError(str(error).replace("data.tokenizer", "model's tokenizer")) from None
        except ValueError as error:
            raise KdError(str(error).replace("name = ", "model = ", 1)) from None
        self.name, self.sampling, self.system = name, sampling, system
        self._raw: dict[int, bytes] = {}  # of tokens, once they are asked for
        has_template = getattr(self.tokenizer, "chat_template", None) is not None
        self.template = has_template if template is None else template
        if not has_template and (self.template or system is not None):
            asked = "template = true" if self.template else "system"
            raise KdError(f"{asked} needs a chat template, and the tokenizer of model = {name} has none")
        if system is not None and not self.template:
            raise KdError("system needs a chat template: leave template=false out")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kind = getattr(network.config, "dtype", None) if self.device.type == "cuda" else torch.float32
        self.network = network.to(self.device, kind if isinstance(kind, torch.dtype) else torch.float32).eval()
        self.most = positions_of(network)
        before = around(self.tokenizer)[0]
        self._before = before if before == [self.tokenizer.bos_token_id] else []
        self.ends = self._end_tokens()
        self.network.generation_config = GenerationConfig()  # its own would fill in what ours leaves out
        drawn = sampling.max_new_tokens, sampling.temperature, sampling.top_p
        self.config = generation_config(*drawn, ends=self.ends or None, pad=self.tokenizer.pad_token_id)

    def _end_tokens(self) -> list[int]:
        own = getattr(self.network.generation_config, "eos_token_id", None)
        found = [self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        return sorted({int(token) for token in found if token is not None})

    # ------------------------------------------------------------------ prompts

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt: by the chat template, or as it stands after the token that begins a text."""
        if isinstance(prompt.content, str) and not self.template:
            ids = self.tokenizer(prompt.content, add_special_tokens=False, verbose=False)["input_ids"]
            return [*self._before, *ids]
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise KdError(
                f"the prompts are messages, and the tokenizer of model = {self.name} has no chat template: give texts"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                prompt.messages(self.system), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever the template raises
            reason = str(error).splitlines()[0]
            raise KdError(
                f"row {prompt.index + 1} of the prompts: the chat template refuses the messages: {reason}"
            ) from None
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def too_long(self, ids: Sequence[int]) -> str:
        """Tell why a prompt cannot be completed; "" when it can."""
        if not ids:
            return "the prompt has no tokens"
        if self.most is not None and len(ids) + self.sampling.max_new_tokens > self.most:
            return f"{len(ids)} tokens and max_new_tokens are more than the {self.most} positions of the model"
        return ""

    # ------------------------------------------------------------------ completions

    @torch.no_grad()
    def complete(self, rows: Sequence[Sequence[int]], names: Sequence[str], logprobs: int = 0) -> list[Completion]:
        """Complete prompts together. ``names``: of the rows; the same ones are drawn the same in every process."""
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        try:
            with self._seeded(names):
                made = self.network.generate(input_ids=ids, attention_mask=mask, generation_config=self.config)
            return [
                self._completion(list(row), new, logprobs) for row, new in zip(rows, made[:, width:].cpu(), strict=True)
            ]
        except torch.OutOfMemoryError:
            raise MachineFailure(
                f"a batch of {len(rows)} prompts does not fit into the memory: give a smaller batch_size"
            ) from None

    @contextlib.contextmanager
    def _seeded(self, names: Sequence[str]) -> Iterator[None]:
        text = " ".join([str(self.sampling.seed), *names])
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def _completion(self, prompt: list[int], new: Tensor, logprobs: int) -> Completion:
        tokens: list[int] = new.tolist()
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        kept = tokens if end is None else tokens[:end]
        count = len(kept) + (end is not None)
        return Completion(
            self._text(prompt, kept),
            self.name,
            "length" if end is None else "stop",
            len(prompt),
            count,
            logprobs=self._logprobs(prompt, tokens[:count], logprobs) if logprobs else None,
        )

    def _text(self, prompt: list[int], new: list[int]) -> str:
        """Decode the characters that follow the prompt: some tokenizers drop the space before a first token."""

        def decoded(ids: list[int]) -> str:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        before, whole = decoded(prompt), decoded([*prompt, *new])
        return whole[len(before) :] if whole.startswith(before) else decoded(new)

    def _logprobs(self, prompt: list[int], new: list[int], number: int) -> list[dict[str, Any]]:
        """Compute the model's log-probabilities at temperature 1, of the tokens and of the likeliest ones.

        They take one more pass.
        """
        ids = torch.tensor([[*prompt, *new]], device=self.device)
        logits = self.network(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        found = logits.log_softmax(-1)
        top = found.topk(min(number, found.shape[-1]))
        own = found.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
        likeliest = [
            list(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        return [
            stored_token(self._candidate(token, value), [self._candidate(*one) for one in others])
            for token, value, others in zip(new, own, likeliest, strict=True)
        ]

    def _candidate(self, token: int, value: float) -> Candidate:
        """Write a token as a server does: as text, whatever the vocabulary spells it like; special ones by name."""
        self._raw = self._raw or bytes_of_tokens(self.tokenizer)
        if (raw := self._raw.get(token)) is None:
            return self.tokenizer.convert_ids_to_tokens(token) or "", value, None  # "": an id that only the network has
        return raw.decode(errors="replace"), value, raw


def batches(lengths: Sequence[int], samples: int, size: int) -> list[Batch]:
    """Divide samples of prompts into batches of like lengths, in an order that depends on nothing else.

    A run that goes on takes the whole batches again of which something is missing, so that the same is drawn.
    """
    order = sorted(range(len(lengths)), key=lambda number: (lengths[number], number))
    jobs = [(number, sample) for number in order for sample in range(samples)]
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def model_folder(name: str) -> Path | str:
    """Return the folder of a model: of a run's directory that with the weights that were selected."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / "selected" if (folder / "selected" / "config.json").is_file() else folder
    return name
