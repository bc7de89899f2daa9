"""On-policy distillation: the student writes, the teacher scores what it wrote.

GKD: Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024, arXiv 2306.13649. The replay buffer and the
adaptive share: Ko et al., DistiLLM, ICML 2024, arXiv 2402.03898.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kd.config.rules import number, refusals, refuse, whole
from kd.data.base import as_batch
from kd.data.text.base import TextModule
from kd.distill.distiller import Distiller, Step
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch
from kd.losses.networks import in_eval, unwrapped
from kd.losses.tokens.minillm import MiniLLM
from kd.models.generation import generation_config
from kd.models.positions import positions_of
from kd.setups.teacher_mixed import TeacherMixed

RULES = {
    "share": number(least=0, most=1),
    "max_new_tokens": whole(1),
    "temperature": number(above=0),
    "top_p": number(above=0, most=1),
    "prompt_length": whole(1).or_null,
    "replay": whole(0),
    "grow": number(least=0, most=1),
    "epsilon": number(),
    "teacher_mix": number(least=0, most=1),
}


class OnPolicy(Distiller):
    """Replaces the completions of a share of the batches by what the student samples for their prompts.

    ``share``: λ of GKD, the probability that a batch is the student's own text, the same on all processes.
    ``max_new_tokens``, ``temperature``, ``top_p``: of the sampling; no gradient goes through it, and nothing else that
    the student's generation_config sets is in force but the tokens that end a text. ``prompt_length``: positions of a
    sample that are its prompt; null: those before its first supervised position. Of a block of documents that do not
    see one another it is no more than the first document.

    ``replay``: how many of the student's samples are kept; of the share a part that falls from 1 to 0 over the training
    is not written anew but drawn from them (DistiLLM; 0: all is written anew). ``grow``: by how much the share grows
    after a validation whose loss is no longer below the one at the last growth plus ``epsilon`` (DistiLLM: share 0,
    grow 0.1, epsilon 0.1, replay 1000); 0: it stays.

    ``teacher_mix``: α of MiniLLM (0.2 there), tokens are sampled from (1 − α) p_student + α p_teacher, and
    ``loss=[minillm]`` weights them by p_student / mixture; of one live teacher that is not sharded. It and that loss
    are of samples of the student as it is: ``temperature`` and ``top_p`` 1, no ``replay``.

    Sampled tokens are rows without a label, so that terms which read labels are 0 on them, and have no index.
    With ``teacher.answers`` the data's own batches are read from the disk, and the live teacher answers the student's
    text alone. The student is a network of transformers, in eval mode while it writes. ``KdError`` for another one, for
    a sample without a prompt, and for more positions than a network takes. Beside the losses it logs ``own_text``
    (whether the step was on the student's text) and ``generation`` (the share of the step's time so far that went into
    sampling).
    """

    composes_own_text = True

    def __init__(
        self,
        *args: Any,
        share: float = 0.5,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        prompt_length: int | None = None,
        replay: int = 0,
        grow: float = 0.0,
        epsilon: float = 0.1,
        teacher_mix: float = 0.0,
        **kwargs: Any,
    ) -> None:
        refuse(refusals("distiller.", locals(), RULES))
        super().__init__(*args, **kwargs)
        self.share, self.grow, self.epsilon = share, grow, epsilon
        self.reference: float | None = None  # the validation loss that the share grew at
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.prompt_length, self.replay = prompt_length, replay
        self.teacher_mix = teacher_mix
        self._check_policy()
        self._mixes: tuple[Any, ...] = self._teacher_to_mix() if teacher_mix else ()  # no module of this one
        self.kept: list[tuple[Tensor, int]] = []  # ids of a sample, and how many of them are its prompt
        self.seconds = {"generation": 0.0, "all": 0.0}
        self._step_began = 0.0

    def _check_policy(self) -> None:
        """Refuse samples of another distribution than the one that their importance is computed by."""
        weighted = [f"distiller.teacher_mix = {self.teacher_mix}"] if self.teacher_mix else []
        weighted += [f"loss.{name}" for name, term in self.objective.items() if isinstance(term, MiniLLM)]
        given = {"temperature": (self.temperature, 1), "top_p": (self.top_p, 1), "replay": (self.replay, 0)}
        for key, (value, wanted) in given.items():
            if weighted and value != wanted:
                raise KdError(f"{weighted[0]} is not allowed with distiller.{key} = {value}: it must be {wanted}")

    def _teacher_to_mix(self) -> tuple[Any, ...]:
        """Return the teacher's one network. ``KdError`` where there is none, or there are several."""
        networks = self._live_teachers()
        if len(networks) != 1:
            raise KdError(
                f"distiller.teacher_mix = {self.teacher_mix} needs one live teacher, there are {len(networks)}: give "
                "teacher.checkpoint=RUN or model@teacher=NAME"
            )
        return networks

    def _live_teachers(self) -> tuple[Any, ...]:
        live = self.teacher is not None and self.teacher.live
        return tuple(getattr(self.teacher, "networks", ())) if live else ()

    # ------------------------------------------------------------------ before the first batch

    @property
    def writes(self) -> bool:
        """Whether any batch may become the student's own text."""
        return self.share > 0 or self.grow > 0

    def prepare(self, batch: Batch, *args: Any, **kwargs: Any) -> None:
        """Prepare as every distiller, then refuse a student and prompts of which no text of its own can come."""
        super().prepare(batch, *args, **kwargs)
        if not self.writes:
            return
        if not hasattr(self.student, "generate"):
            name = type(self.student).__name__
            raise KdError(f"distiller = on_policy needs a student that generates, {name} does not")
        self.check_positions(max(map(len, self.prompts(as_batch(batch)))))

    def check_data(self, data: Any) -> None:
        """Refuse prompts of a text's training set that leave no room for what is written."""
        if self.writes and isinstance(data, TextModule):
            self.check_positions(data.parts["train"].longest_prompt(self.prompt_length))

    def check_positions(self, longest: int) -> None:
        """Refuse prompts of ``longest`` positions that with what is written are more than a network takes."""
        for side, network in [("student", self.student), *(("teacher", network) for network in self._live_teachers())]:
            most = positions_of(network)
            if most is not None and longest + self.max_new_tokens > most:
                raise KdError(
                    f"distiller.max_new_tokens = {self.max_new_tokens} is not allowed: with the longest prompt, "
                    f"of {longest} tokens, it is more than the {most} positions of the {side}: set a smaller one, or "
                    "shorter prompts (data.length, distiller.prompt_length)"
                )

    def configure_model(self) -> None:
        """Shard as every distiller; ``KdError`` with a mixture: the processes would call the teacher unequally often.

        Of a process whose texts have ended transformers goes on to call the student alone.
        """
        if self._device_mesh is not None and self.teacher_mix:
            raise KdError(
                f"distiller.teacher_mix = {self.teacher_mix} is not allowed with hardware.strategy = fsdp: the teacher "
                "must be whole in each process, set hardware.strategy=ddp"
            )
        super().configure_model()

    # ------------------------------------------------------------------ what a batch becomes

    def compose(self, batch: Batch) -> Batch:
        """Take the prompts of a batch and let the student go on with them, in so many of the steps."""
        self._step_began = time.perf_counter()
        if batch.of_teacher is not batch:
            raise KdError(
                "distiller = on_policy is not allowed with a teacher of another tokenizer: what the student writes is "
                "in its own tokens alone"
            )
        if self._trainer is None or not self.prepared:  # the dry pass is on the data
            return batch
        drawn = torch.rand(2, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps_done)).tolist()
        if drawn[0] >= self.share:
            return batch
        epoch, epochs = self.place()
        fresh = not self.kept or drawn[1] < 1 - epoch / epochs
        if self.replay and not fresh:
            chosen = torch.randint(len(self.kept), (len(batch),)).tolist()
            return self._batch([self.kept[number] for number in chosen], batch)
        samples = self.write(self.prompts(batch))
        if self.replay:
            self.kept = [*self.kept, *((ids.cpu(), length) for ids, length in samples)][-self.replay :]
        return self._batch(samples, batch)

    def prompts(self, batch: Batch) -> list[Tensor]:
        """Return the ids of each sample's prompt. ``KdError`` for a sample that has none."""
        ids = batch.inputs["input_ids"]
        mask = (batch.inputs["attention_mask"] if batch.mask is None else batch.mask).bool()
        places = batch.inputs.get("position_ids", torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        found = []
        for row, real, place, targets in zip(ids, mask, places, batch.targets, strict=True):
            length = int(real.sum()) if self.prompt_length is None else min(self.prompt_length, int(real.sum()))
            supervised = (targets >= 0).nonzero().flatten()
            if self.prompt_length is None and len(supervised):
                length = int(supervised[0])
            begins = (place[real] == 0).nonzero().flatten()  # of documents that do not see one another
            length = min(length, int(begins[1])) if len(begins) > 1 else length
            if length < 1:
                raise KdError(
                    f"distiller.prompt_length = {self.prompt_length or 'null'} is not allowed: a sample has no prompt "
                    "to go on with, nothing before its first supervised position (packed documents have nothing "
                    "there): set distiller.prompt_length=NUMBER, or give prompts and completions"
                )
            found.append(row[real][:length])
        return found

    @torch.no_grad()
    def write(self, prompts: list[Tensor]) -> list[tuple[Tensor, int]]:
        """Sample the student's completions, all prompts at once with a cache; ids with prompt, and its length."""
        network: Any = self.student
        start = time.perf_counter()
        pad = network.config.pad_token_id or 0
        ids = pad_sequence([prompt.flip(0) for prompt in prompts], batch_first=True, padding_value=pad).flip(1)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) >= (ids.shape[1] - lengths).unsqueeze(1)
        self.check_positions(ids.shape[1])  # of this batch; before the first one not all data tell their lengths
        mixed = [TeacherMixed(teacher, mask, self.teacher_mix) for teacher in self._mixes] or None
        inner = unwrapped(network)
        own = inner.generation_config
        ends = own.eos_token_id
        settings = generation_config(self.max_new_tokens, self.temperature, self.top_p, ends, pad)
        inner.generation_config = type(own)()  # its own would fill in what these leave out
        try:
            with in_eval(self.student):
                written = network.generate(
                    input_ids=ids, attention_mask=mask.long(), generation_config=settings, logits_processor=mixed
                )
        finally:
            inner.generation_config = own
        ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends], device=ids.device)
        samples = []
        for row, length in zip(written, lengths.tolist(), strict=True):
            new = row[ids.shape[1] :]
            stops = torch.isin(new, ends).nonzero().flatten()
            new = new[: int(stops[0]) + 1] if len(stops) else new
            samples.append((torch.cat([row[ids.shape[1] - length : ids.shape[1]], new]), length))
        self.seconds["generation"] += time.perf_counter() - start
        return samples

    def _batch(self, samples: list[tuple[Tensor, int]], batch: Batch) -> Batch:
        """Make a batch of samples, padded on the right; what follows the prompt is supervised."""
        rows = [ids.to(batch.device) for ids, _ in samples]
        lengths = torch.tensor([len(row) for row in rows], device=batch.device).unsqueeze(1)
        begins = torch.tensor([length for _, length in samples], device=batch.device).unsqueeze(1)
        network: Any = self.student
        ids = pad_sequence(rows, batch_first=True, padding_value=network.config.pad_token_id or 0)
        places = torch.arange(ids.shape[1], device=ids.device)
        mask = places < lengths
        targets = torch.where(mask & (places >= begins), ids, UNLABELLED)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        extra = {"own_text": torch.ones((), device=ids.device)}
        extra |= {"teacher_mix": torch.tensor(self.teacher_mix)} if self.teacher_mix else {}
        return Batch(inputs, targets, None, mask, {}, extra)

    # ------------------------------------------------------------------ a step

    def losses(self, batch: Batch) -> Step:
        """Score both networks; on the student's own text no row has a label."""
        own = "own_text" in batch.extra
        if own:
            batch.extra["sampled"] = batch.targets  # MiniLLM's policy gradient reads them
            batch.targets = torch.full_like(batch.targets, UNLABELLED)
        step = super().losses(batch)
        self.seconds["all"] += time.perf_counter() - self._step_began
        share = self.seconds["generation"] / max(self.seconds["all"], 1e-9)
        for name, value in {"own_text": float(own), "generation": share}.items():
            step.values[name] = torch.tensor(value, device=step.total.device)
        return step

    # ------------------------------------------------------------------ the share, and what a resume needs

    def on_validation_epoch_end(self) -> None:
        """Let the share grow where the validation loss has stopped falling."""
        super().on_validation_epoch_end()
        loss = self.history.get(self.current_epoch, {}).get(f"val/{self.task.metrics[0].name}")
        if not self.grow or loss is None or self.trainer.sanity_checking:
            return
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + self.epsilon:
            self.share, self.reference = min(1.0, self.share + self.grow), loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the share, what it grows by, and the samples."""
        super().on_save_checkpoint(checkpoint)
        kept = {"ids": [ids for ids, _ in self.kept], "lengths": [length for _, length in self.kept]}
        checkpoint["kd"]["on_policy"] = {"share": self.share, "reference": self.reference, **kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        super().on_load_checkpoint(checkpoint)
        before: Mapping[str, Any] = checkpoint["kd"]["on_policy"]
        self.share, self.reference = before["share"], before["reference"]
        self.kept = list(zip(before["ids"], before["lengths"], strict=True))
