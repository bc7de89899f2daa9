"""What trainers for texts get wrong without a word: each is a number here."""

from __future__ import annotations

import csv
import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from kd.config.compose import checked
from kd.data.text.lm import Documents
from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Fused, Output
from kd.losses.functional import fused_losses, kl_divergence
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.kd import KnowledgeDistillation
from kd.losses.logits.rkl import ReverseKL
from kd.losses.tokens import fused
from kd.losses.tokens.fused import Projection, TeacherRows
from kd.models.transformers_model import transformers_model
from kd.run.data_facts import facts, same_data
from kd.setups.on_policy import OnPolicy
from kd.tasks.tokens import CausalLM
from tests.test_text_runs import arguments, run
from tests.tiny_language import VOCABULARY, Texts

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # pad = eos, as GPT-2 is used
WORDS = ["<pad>", "<s>", "</s>", *"abcdefghij"]


def network(seed: int, **more: Any) -> Any:
    torch.manual_seed(seed)
    return transformers_model(config={**GPT2, **more}, architecture="causal_lm")


def on_policy(of_loss: float = 1.0, **options: Any) -> OnPolicy:
    """A student of GPT-2 with dropout, in train mode, that writes all of its text; ``of_loss``: T of the loss."""
    made = OnPolicy(network(0), network(1), Objective({"rkl": ReverseKL(of_loss)}), CausalLM(), share=1.0, **options)
    made.prepare(Texts("causal_lm").batches("train")[0])
    return made.train()


def words(order: list[str]) -> Any:
    """A tokenizer of single letters, with ids in this order."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(order)}, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def documents(root: Path, rows: list[Any], **options: Any) -> Documents:
    """A data module of rows with prompts, or of lines of plain text."""
    kind = "jsonl" if isinstance(rows[0], dict) else "txt"
    (root / f"all.{kind}").write_text("\n".join(json.dumps(r) if kind == "jsonl" else r for r in rows))
    given = {"train": f"all.{kind}", "val_fraction": 0.25, "test_fraction": 0.25, "tokenizer": words(WORDS)}
    data = Documents(root=str(root), **{**given, "document": "line", "packing": False, **options})
    data.setup()
    return data


def widths(data: Documents) -> set[int]:
    return {batch.inputs["input_ids"].shape[1] for batch in data.train_dataloader()}


# ---------------------------------------------------------------------- data


def test_the_length_holds_for_token_ids_that_are_there_already(tmp_path: Path) -> None:
    rows = [{"prompt": f"a {letter}", "completion": " b c d e f g h " * 2} for letter in "abcdefgh"]
    assert widths(documents(tmp_path, rows, length=32, cache=str(tmp_path / "cache"))) == {17}
    assert list((tmp_path / "cache").iterdir())
    assert widths(documents(tmp_path, rows, length=6, cache=str(tmp_path / "cache"))) == {6}


def test_rows_of_token_ids_are_refused_and_beside_a_text_have_no_say(tmp_path: Path) -> None:
    """Texts are tokenised here, to ``data.length``: ids of another tokenizer, or longer ones, come into no row."""
    rows = [{"input_ids": [3, 4, 5, 6, 7, 8, 9, number], "labels": [3] * 8} for number in range(3, 11)]
    sentence = r"must have columns text, prompt and completion, or messages: it has input_ids, labels"
    with pytest.raises(KdError, match=sentence):
        documents(tmp_path, rows, length=6)
    texts = [{"text": f"a b c d e f g {letter}"} for letter in "abcdefgh"]
    pairs = [{"prompt": "a", "completion": f" b c d e f g {letter}"} for letter in "abcdefgh"]
    for given in (texts, pairs):
        both = [{**row, **text} for row, text in zip(rows, given, strict=True)]
        (batch,) = documents(tmp_path, both, length=6).train_dataloader()
        assert batch.inputs["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8]] * 4


def test_plain_text_without_a_prompt_is_trained_on_whole(tmp_path: Path) -> None:
    lines = [f"{letter} b c d e f" for letter in "abcdefgh"]
    for batch in documents(tmp_path, lines, length=16).train_dataloader():
        assert len(CausalLM().rows(batch).targets) == 6 * len(batch)  # six letters and the end, but for the first


def test_vocabularies_of_one_size_and_another_order_are_refused(tmp_path: Path) -> None:
    lines = [f"{letter} b c d e f" for letter in "abcdefgh"]
    one = documents(tmp_path, lines)
    other = documents(tmp_path, lines, tokenizer=words([*WORDS[:3], *reversed(WORDS[3:])]))
    assert one.num_classes == other.num_classes
    same_data(facts(one), one, "teacher.checkpoint = run")
    with pytest.raises(KdError, match=r"teacher\.checkpoint = run was trained with another tokenizer"):
        same_data(facts(one), other, "teacher.checkpoint = run")


def test_the_precision_is_that_of_the_config_whatever_a_file_or_a_cpu_says(tmp_path: Path) -> None:
    assert checked(["hardware=auto"])["hardware"]["precision"] == "32-true"
    network(0).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = transformers_model(name=str(tmp_path), architecture="causal_lm")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("chunk", [None, 0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_temperature_reaches_the_loss_and_its_square_is_the_factor(temperature: float, chunk: int | None) -> None:
    student, teacher = network(0).eval(), network(1).eval()
    batch = Texts("causal_lm").batches("train")[0]
    terms = {"ce": CrossEntropy(), "kd": KnowledgeDistillation(temperature)}
    module = Distiller(student, teacher, Objective(terms, chunk=chunk), CausalLM())
    module.prepare(batch)
    module.eval()
    with torch.no_grad():
        step = module.losses(module.task.rows(batch))
        logits, soft = (net(**batch.inputs).logits[:, :-1] for net in (student, teacher))
    kept = batch.targets[:, 1:] != UNLABELLED
    log_s, log_t = ((z[kept] / temperature).log_softmax(-1) for z in (logits, soft))
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    assert float(step.values["kd"]) == pytest.approx(temperature**2 * float(kl), rel=1e-4)
    ce = F.cross_entropy(logits[kept], batch.targets[:, 1:][kept])
    assert float(step.values["ce"]) == pytest.approx(float(ce), rel=1e-4)


def test_labels_alone_make_no_logits_either() -> None:
    module = Distiller(network(0).eval(), None, Objective({"ce": CrossEntropy()}), CausalLM())
    batch = Texts("causal_lm").batches("train")[0]
    module.prepare(batch)
    rows = module.task.rows(batch)
    with torch.no_grad():
        output = module.eval().answer_of_student(rows)
        assert output.hidden is not None
        value, _ = module.objective(output, Output(), rows)
        assert output.made_logits is None
        assert float(value[0]) == pytest.approx(float(F.cross_entropy(output.logits, rows.targets)), rel=1e-5)


def test_a_last_chunk_that_is_not_full_is_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    made, logits = [], fused._Projected.logits

    def counted(self: Any, rows: slice, pool: Any) -> Any:
        made.append(rows.stop - rows.start)
        return logits(self, rows, pool)

    monkeypatch.setattr(fused._Projected, "logits", counted)
    torch.manual_seed(0)
    student, own, teacher, other = (torch.randn(n, 8) for n in (252, 30, 252, 30))
    rows = TeacherRows(teacher, Projection(other))
    found = fused_losses(student, Projection(own), rows, None, [Fused("forward_kl")], [1.0], chunk=128)[1]
    assert made == [128, 128, 124, 124]  # of student and teacher
    assert float(found) == pytest.approx(float(kl_divergence(student @ own.T, teacher @ other.T, 1.0)), rel=1e-5)


# ---------------------------------------------------------------------- on-policy


@pytest.mark.parametrize("of_loss", [1.0, 4.0])
def test_the_temperatures_of_the_sampling_and_of_the_loss_are_two(of_loss: float) -> None:
    data, prompts = Texts("causal_lm").batches("train")[0], [torch.tensor([5, 6, 7]), torch.tensor([9, 4, 8])]
    cold, warm = (on_policy(of_loss, temperature=t, max_new_tokens=6).eval() for t in (1e-5, 1.0))
    greedy = on_policy(top_p=1e-6, max_new_tokens=6).write(prompts)
    torch.manual_seed(0)
    written = [[ids.tolist() for ids, _ in module.write(prompts)] for module in (cold, warm)]
    assert written[0] == [ids.tolist() for ids, _ in greedy]
    assert written[1] != written[0]
    for module in (cold, warm):
        batch = module.task.rows(module._batch(greedy, data))
        with torch.no_grad():
            both = [side(batch).logits for side in (module.answer_of_student, module.answer_of_teacher)]
            value = float(module.losses(batch).values["rkl"])
        log_s, log_t = ((logits / of_loss).log_softmax(-1) for logits in both)
        kl = (log_s.exp() * (log_s - log_t)).sum(-1).mean()
        assert value == pytest.approx(of_loss**2 * float(kl), rel=1e-4)


def test_the_student_writes_without_dropout() -> None:
    module, seen = on_policy(top_p=1e-6, max_new_tokens=6), []
    module.student.transformer.register_forward_hook(lambda inner, *_: seen.append(inner.training))
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([9, 4, 8])]
    once, again = module.write(prompts), module.write(prompts)
    assert seen
    assert not any(seen)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(once, again, strict=True))
    assert module.student.training


def test_positions_begin_behind_the_padding_on_the_left() -> None:
    """GPT-2 has a vector for each absolute position: what it writes in a padded batch is what it writes alone."""
    module = on_policy(top_p=1e-6, max_new_tokens=6)
    prompts = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([9]), torch.tensor([4, 8])]
    together = module.write(prompts)
    for prompt, (ids, _) in zip(prompts, together, strict=True):
        ((alone, _),) = module.write([prompt])
        assert torch.equal(ids, alone)
    batch = module._batch(together, Texts("causal_lm").batches("train")[0])
    teacher = module.teacher.networks[0]
    logits = teacher(**batch.inputs).logits
    for row, (ids, _) in enumerate(together):
        torch.testing.assert_close(logits[row, : len(ids)], teacher(input_ids=ids.unsqueeze(0)).logits[0])


def test_an_end_that_is_also_the_pad_is_learned() -> None:
    module = on_policy(max_new_tokens=6)
    samples = [(torch.tensor([5, 6, 7, 2]), 2), (torch.tensor([5, 8, 9, 4, 3, 2]), 3)]
    made = module._batch(samples, Texts("causal_lm").batches("train")[0])
    assert made.targets.tolist() == [[-1, -1, 7, 2, -1, -1], [-1, -1, -1, 4, 3, 2]]
    assert made.inputs["attention_mask"].sum(1).tolist() == [4, 6]


def test_the_mean_is_over_the_tokens_that_were_written() -> None:
    """Not over those of the data's rows, of which there are more."""
    module = on_policy(max_new_tokens=5)
    module.eval()
    data = Texts("causal_lm").batches("train")[0]
    samples = [(torch.tensor([5, 6, 7]), 2), (torch.tensor([5, 8, 9, 4, 3]), 2)]
    batch: Batch = module.task.rows(module._batch(samples, data))
    step = module.losses(batch)
    total = torch.zeros(())
    for ids, length in samples:
        with torch.no_grad():
            log_s, log_t = (
                net(input_ids=ids.unsqueeze(0)).logits[0, length - 1 : -1].log_softmax(-1)
                for net in (module.student, module.teacher.networks[0])
            )
        total += (log_s.exp() * (log_s - log_t)).sum()
    assert step.rows == 4
    assert float(step.values["rkl"]) == pytest.approx(float(total) / 4, rel=1e-4)


# ---------------------------------------------------------------------- what is logged


def test_terms_are_logged_apart_and_tokens_a_second(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, *arguments("causal_lm", tmp_path / "run"))
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    for name in ("train/ce", "train/kd", "train/loss", "train/tokens_per_second"):
        found = [float(row[name]) for row in rows if row[name]]
        assert len(found) >= 2, name
        assert all(value > 0 for value in found)
    assert said.count(" tokens/s)") == 2


@pytest.mark.filterwarnings("ignore")  # what a plain trainer says about itself
def test_a_step_of_several_batches_of_labels_counts_the_labelled_rows() -> None:
    """Of the first batch two of eight."""
    drawn = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(16, 4, generator=drawn), torch.randint(3, (16,), generator=drawn)
    targets[2:8] = UNLABELLED
    weights = []
    for size in (8, 16):
        torch.manual_seed(0)
        made = Distiller(
            torch.nn.Linear(4, 3), None, Objective({"ce": CrossEntropy()}), optimizer=partial(torch.optim.SGD, lr=0.5)
        )
        batches = [Batch(*(t[at : at + size].clone() for t in (inputs, targets))) for at in range(0, 16, size)]
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, accumulate_grad_batches=16 // size, limit_val_batches=0, **quiet
        )
        trainer.fit(made, loader, loader)
        weights.append(made.student.weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.filterwarnings("ignore")  # what a plain trainer says about itself
@pytest.mark.parametrize("own", [(), ("student",)], ids=["lightning", "the module's own step"])
@pytest.mark.parametrize("chunk", [None, 8], ids=["plain", "fused"])
def test_a_step_of_several_batches_is_that_of_one_large_batch(own: tuple[str, ...], chunk: int | None) -> None:
    """Each batch has another number of supervised tokens, and the last step is of one batch."""
    whole = Texts("causal_lm", samples=12).drawn("train")
    whole.targets[1:4] = UNLABELLED
    whole.targets[8:12, :9] = UNLABELLED
    weights = {}
    for name, starts, several in (("one", (0, 8, 12), 1), ("several", (0, 4, 8, 12), 2)):
        parts = pairwise(starts)
        batches = [whole.map(lambda t, a=a, b=b: t[a:b].clone()) for a, b in parts]
        terms = Objective({"ce": CrossEntropy(), "kd": KnowledgeDistillation(temperature=2.0)}, chunk=chunk)
        made = Distiller(
            network(0, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
            network(1),
            terms,
            CausalLM(),
            optimizer=partial(torch.optim.SGD, lr=0.5),
            accumulate=several if own else 1,
            gradient_clip=0.05 if own else None,
        )
        made.own_optimizers = own
        made.automatic_optimization = not own
        clip = {} if own else {"accumulate_grad_batches": several, "gradient_clip_val": 0.05}
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = L.Trainer(accelerator="cpu", max_epochs=2, limit_val_batches=0, **quiet, **clip)
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.fit(made, loader, loader)
        weights[name] = made.student.state_dict()
    torch.testing.assert_close(weights["several"], weights["one"], rtol=1e-4, atol=1e-6)
