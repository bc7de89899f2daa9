"""The contenders of ``text_step.py`` of other projects: transformers' Trainer, and TRL's two (written for TRL 1.16)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from text_work import LR, PAD, Case, Meter, loss_of, pair, rows
from torch import Tensor, nn


def arguments(case: Case, steps: int, folder: Path) -> dict[str, Any]:
    """Arguments of transformers' trainers, and of TRL's, for the same step."""
    return {
        **{"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": case.samples},
        **{"learning_rate": LR, "weight_decay": 0.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
        **{"optim": "adamw_torch", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []},
        **{"save_strategy": "no", "logging_steps": 50, "disable_tqdm": True, "remove_unused_columns": False},
        "train_sampling_strategy": "sequential",
    }


def metered(trainer: type, meter: Meter) -> Any:
    """The trainer, with the end of each step and the loss of the first one noted."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            meter.step()

    class Metered(trainer):  # type: ignore[misc]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, callbacks=[Ends()], **named)

        def training_step(self, *given: Any, **named: Any) -> Tensor:
            loss = super().training_step(*given, **named)
            meter.note(loss)
            return loss

    return Metered


def transformers_trainer(case: Case, steps: int, meter: Meter, folder: Path) -> None:
    """The Trainer of transformers, with a ``compute_loss`` as tutorials write it."""
    from transformers import Trainer, TrainingArguments

    class Distilling(Trainer):
        teacher: nn.Module

        def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **more: Any) -> Any:
            labels = inputs.pop("labels")
            with torch.no_grad():
                soft = self.teacher(**inputs).logits
            return loss_of(model(**inputs).logits, soft, labels, 0.5)

    options = TrainingArguments(**arguments(case, steps, folder))
    meter.begin()
    student, teacher = pair(case)
    whole = rows(case, case.samples * steps)
    data = [{name: tensor[row] for name, tensor in whole.items()} for row in range(case.samples * steps)]
    trainer = metered(Distilling, meter)(student, options, train_dataset=data)
    trainer.teacher = teacher
    trainer.train()


def tokenizer(case: Case) -> Any:
    """One that knows the tokens ``t3 t4 …`` of the vocabulary: TRL wants one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": PAD, "<s>": 1, "</s>": 2} | {f"t{number}": number for number in range(3, case.vocabulary)}
    made = Tokenizer(models.WordLevel(known, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def trl_gkd(case: Case, steps: int, meter: Meter, folder: Path) -> None:
    """TRL's GKDTrainer: λ = 0 on rows that are tokenised already, or λ = 1 on-policy."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    more = {"lmbda": 1.0 if case.new else 0.0, "beta": 0.0, "temperature": 1.0, "max_new_tokens": case.new or 1}
    options, words = GKDConfig(**arguments(case, steps, folder), **more), tokenizer(case)

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}
        prompts = {"prompts": batch["input_ids"][:, : case.prompt]}
        return {**batch, **prompts, "prompt_attention_mask": torch.ones_like(prompts["prompts"])}

    data = Dataset.from_dict({name: tensor.tolist() for name, tensor in rows(case, case.samples * steps).items()})
    meter.begin()
    student, teacher = pair(case)
    trainer = metered(GKDTrainer, meter)
    trainer(student, teacher, options, data_collator=collate, train_dataset=data, processing_class=words).train()


def trl_distillation(case: Case, steps: int, meter: Meter, folder: Path) -> None:
    """TRL's DistillationTrainer with its chunked loss."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    options = DistillationConfig(
        **arguments(case, steps, folder), beta=0.0, max_completion_length=case.new or 1, shuffle_dataset=False
    )
    words, whole = tokenizer(case), rows(case, case.samples * steps)["input_ids"].tolist()
    completions = {tuple(row[: case.prompt]): row[case.prompt :] for row in whole}

    class Given(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *more: Any, **named: Any) -> Any:
            if case.new:
                return super()._generate_single_turn(prompt_ids, *more, **named)
            return [completions[tuple(ids)] for ids in prompt_ids]

    data = Dataset.from_dict({"prompt": [" ".join(f"t{token}" for token in row[: case.prompt]) for row in whole]})
    meter.begin()
    student, teacher = pair(case)
    trainer = metered(Given, meter)
    trainer(student, teacher, options, train_dataset=data, processing_class=words).train()
