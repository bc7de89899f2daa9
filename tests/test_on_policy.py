"""On-policy distillation: whose text a batch is, what is sampled, what is learned from it, and what a resume needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.cli.main import main
from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.rkl import ReverseKL
from kd.losses.tokens.minillm import MiniLLM, clipped_policy_gradient, minillm_advantages
from kd.models.transformers_model import transformers_model
from kd.setups.on_policy import OnPolicy
from kd.setups.teacher_mixed import TeacherMixed
from kd.tasks.tokens import CausalLM
from tests.test_text_runs import arguments, run
from tests.tiny_language import LLAMA, Texts

SMALL = {**LLAMA, "num_hidden_layers": 1}


class Attached:
    """As much of a trainer as composing a batch asks for."""

    global_step = 3


def on_policy(**options: Any) -> OnPolicy:
    student, teacher = (transformers_model(config=SMALL, architecture="causal_lm") for _ in range(2))
    objective = Objective({"ce": CrossEntropy(), "rkl": ReverseKL()})
    made = OnPolicy(student, teacher, objective, CausalLM(), max_new_tokens=5, **options)
    made.prepare(Texts("causal_lm").batches("train")[0])
    return made


def test_what_the_student_writes_stands_behind_the_prompts() -> None:
    torch.manual_seed(0)
    module, batch = on_policy(share=1.0), Texts("causal_lm").batches("train")[0]
    prompts = module.prompts(batch)
    assert [len(p) for p in prompts] == [3] * 8  # the first three tokens are not supervised
    samples = module.write(prompts)
    made = module._batch(samples, batch)
    for row, prompt, (ids, length) in zip(range(8), prompts, samples, strict=True):
        assert torch.equal(ids[:length], prompt)
        assert 1 <= len(ids) - length <= 5
        assert torch.equal(made.inputs["input_ids"][row][: len(ids)], ids)
        assert made.mask[row].sum() == len(ids)
        supervised = made.targets[row] != UNLABELLED
        assert supervised.nonzero().flatten().tolist() == list(range(length, len(ids)))


def test_padding_on_the_left_changes_no_answer() -> None:
    """Prompts of several lengths at once go on as each alone, where the likeliest token is taken."""
    module = on_policy(share=1.0, top_p=1e-6)
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([9]), torch.tensor([4, 8])]
    together = module.write(prompts)
    for prompt, (ids, _) in zip(prompts, together, strict=True):
        ((alone, _),) = module.write([prompt])
        assert torch.equal(ids, alone)


def test_no_label_is_learned_from_the_students_own_text_and_modes_stay() -> None:
    module, batch = on_policy(share=1.0), Texts("causal_lm").batches("train")[0]
    module.train()
    own = module.task.rows(module._batch(module.write(module.prompts(batch)), batch))
    assert module.student.training
    step = module.losses(own)
    assert float(step.values["ce"]) == 0
    assert float(step.values["rkl"]) > 0
    assert float(step.values["own_text"]) == 1
    assert 0 <= float(step.values["generation"]) <= 1
    step.total.backward()
    assert any(p.grad is not None and p.grad.any() for p in module.student.parameters())


def test_minillm_follows_its_policy_on_what_was_sampled() -> None:
    module, batch = on_policy(share=1.0), Texts("causal_lm").batches("train")[0]
    own = module.task.rows(module._batch(module.write(module.prompts(batch)), batch))
    module.losses(own)
    student, teacher = module.answer_of_student(own), module.answer_of_teacher(own)
    alone = Batch(own.inputs, own.targets, mask=own.mask)
    with torch.no_grad():
        single = ReverseKL()(student, teacher, own)
        assert torch.equal(MiniLLM()(student, teacher, alone), single)
        long = MiniLLM(variant="paper")(student, teacher, own) - single
    rows = len(own.extra["sampled"])
    assert rows == len(own.extra["positions"]) > 8
    assert float(long) != 0


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_is_sampled_from_is_a_mixture_with_the_teacher(model_type: str) -> None:
    """Beside passes over each text as it is, without padding and without keys and values of the steps before."""
    size = SMALL if model_type == "llama" else {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}
    torch.manual_seed(0)
    network = transformers_model(config={**size, "vocab_size": 40}, architecture="causal_lm").eval()
    texts = [torch.randint(3, 40, (length,)) for length in (6, 3, 5)]
    scores = torch.randn(4, 3, 40)
    mask = torch.tensor([[False] * (6 - len(text)) + [True] * len(text) for text in texts])
    ids = torch.stack([torch.cat([torch.zeros(6 - len(text), dtype=torch.int64), text]) for text in texts])
    mixed = TeacherMixed(network, mask, 0.2)
    for step in range(4):
        found = mixed(ids, scores[step])
        for line, text in enumerate(texts):
            alone = network(input_ids=text[None]).logits[0, -1].softmax(-1)
            wanted = 0.8 * scores[step, line].softmax(-1) + 0.2 * alone
            torch.testing.assert_close(found[line].exp(), wanted.detach(), rtol=1e-4, atol=1e-6)
        new = found.argmax(1)
        ids = torch.cat([ids, new[:, None]], 1)
        texts = [torch.cat([text, token[None]]) for text, token in zip(texts, new, strict=True)]


def test_a_mixture_of_the_teacher_alone_writes_what_the_teacher_would() -> None:
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([9]), torch.tensor([4, 8])]
    module = on_policy(share=1.0, teacher_mix=1.0)
    as_teacher = on_policy(share=1.0)
    as_teacher.student = module.teacher.networks[0]
    written = []
    for one in (module, as_teacher):
        torch.manual_seed(3)
        written.append(one.write(prompts))
    for (ids, length), (others, same) in zip(*written, strict=True):
        assert torch.equal(ids, others)
        assert length == same
    assert module.teacher.networks[0].config.use_cache  # as it was


def test_minillm_weights_what_was_sampled_from_the_mixture() -> None:
    module, batch = on_policy(share=1.0, teacher_mix=0.2), Texts("causal_lm").batches("train")[0]
    own = module.task.rows(module._batch(module.write(module.prompts(batch)), batch))
    module.losses(own)
    student, teacher = module.answer_of_student(own), module.answer_of_teacher(own)
    log_s, log_t = (
        output.logits.detach().log_softmax(-1).gather(1, own.extra["sampled"][:, None])[:, 0]
        for output in (student, teacher)
    )
    weights = log_s.exp() / (0.8 * log_s.exp() + 0.2 * log_t.exp())
    rows_of, mask = own.extra["positions"] // own.mask.shape[1], own.mask
    for variant in ("code", "paper"):
        rewards = torch.zeros(mask.shape)
        answered = torch.zeros(mask.shape, dtype=torch.bool)
        for line in range(len(mask)):
            chosen = rows_of == line
            rewards[line, : int(chosen.sum())] = (log_t - log_s)[chosen]
            answered[line, : int(chosen.sum())] = True
        longest = int(answered.sum(1).max())
        advantages = minillm_advantages(rewards[:, :longest], answered[:, :longest], variant=variant)
        advantages = advantages[answered[:, :longest]]
        long = clipped_policy_gradient(student.logits, own.extra["sampled"], advantages, log_s, weights)
        kl = (student.logits.softmax(-1) * (student.logits.log_softmax(-1) - teacher.logits.log_softmax(-1))).sum(-1)
        single = (kl * weights if variant == "paper" else kl).mean()
        value = MiniLLM(variant=variant)(student, teacher, own)
        assert value.item() == pytest.approx((single + long).item(), rel=1e-4)
    assert not torch.allclose(weights, torch.ones_like(weights), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"share": 1.5}, "distiller.share = 1.5 is not allowed"),
        ({"max_new_tokens": 0, "share": 1}, "distiller.max_new_tokens = 0 is not allowed"),
        ({"prompt_length": 0}, "distiller.prompt_length = 0 is not allowed"),
        ({"replay": -1}, "distiller.replay = -1 is not allowed"),
        ({"teacher_mix": 1.1}, "distiller.teacher_mix = 1.1 is not allowed: it must be"),
        (
            {"teacher_mix": 0.2, "temperature": 0.9},
            r"teacher_mix = 0.2 is not allowed with distiller.temperature = 0.9",
        ),
        ({"teacher_mix": 0.2, "top_p": 0.9}, r"teacher_mix = 0.2 is not allowed with distiller.top_p = 0.9"),
        ({"teacher_mix": 0.2, "replay": 10}, r"teacher_mix = 0.2 is not allowed with distiller.replay = 10"),
        ({"teacher_mix": 0.2}, r"teacher_mix = 0.2 needs one live teacher, there are 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KdError, match=sentence):
        OnPolicy(torch.nn.Linear(1, 1), None, Objective({"ce": CrossEntropy()}), CausalLM(), **options)


def test_a_sample_without_a_prompt_and_a_student_that_cannot_write() -> None:
    module = on_policy()
    batch = Texts("causal_lm").batches("train")[0]
    whole = Batch(batch.inputs, batch.inputs["input_ids"], batch.index, batch.mask)
    with pytest.raises(KdError, match=r"no prompt to go on with.*distiller\.prompt_length"):
        module.prompts(whole)
    module.prompt_length = 2
    assert [len(p) for p in module.prompts(whole)] == [2] * 8
    module.student = torch.nn.Linear(2, 2)
    with pytest.raises(KdError, match="needs a student that generates, Linear does not"):
        module.write([torch.tensor([1])])


def test_the_share_grows_where_the_loss_has_stopped_falling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distiller, "on_validation_epoch_end", lambda self: None)
    module = on_policy(share=0.0, grow=0.1, epsilon=0.05)
    module._trainer = type("Trainer", (), {"sanity_checking": False, "current_epoch": 0})()
    shares = []
    for loss in (2.0, 1.9, 2.04, 2.06, 2.08, 2.2):
        module.history[0] = {"val/nll": loss}
        module.on_validation_epoch_end()
        shares.append(round(module.share, 3))
    assert shares == [0, 0, 0, 0.1, 0.1, 0.2]
    assert module.reference == 2.2


@pytest.mark.slow
def test_a_run_and_its_resume_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["distiller=on_policy", "distiller.max_new_tokens=4", "distiller.replay=20", "loss=[rkl]", "recipe.epochs=3"]
    more += ["distiller.share=0.5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    given = [[a for a in arguments("causal_lm", place, *more) if a != "loss=[ce,kd]"] for place in (whole, cut)]
    run(capsys, *given[0])
    begin = Distiller.on_train_epoch_start

    def stop(self: Distiller) -> None:
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, "on_train_epoch_start", stop)
        assert main(given[1]) != 0
    run(capsys, "train", f"resume={cut}")
    ended = [json.loads((place / "result.json").read_text())["student"]["last"] for place in (whole, cut)]
    assert ended[0]["digest"] == ended[1]["digest"]
    assert 0 < ended[0]["train"]["own_text"] < 1


@pytest.mark.slow
def test_answers_on_the_disk_are_those_of_the_data_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The live teacher answers what the student wrote: the run is that without answers on the disk."""
    (tmp_path / "book.txt").write_text("".join(f"line {n} is {n % 7} words and {n % 5} more\n" for n in range(120)))
    more = ["distiller=on_policy", "distiller.max_new_tokens=4", "distiller.share=0.5", "distiller.prompt_length=3"]
    more += [
        f"data.train={tmp_path / 'book.txt'}",
        "data.length=16",
        "data.tokenizer.vocabulary=300",
        "data.cache=null",
    ]
    more += ["data.test_fraction=0.2", "loss=[rkl]"]
    kept = f"teacher.answers={{_target_: kd.distill.cache.CachedAnswers, what: hidden, folder: {tmp_path}/answers}}"
    records = []
    for place, further in ((tmp_path / "live", []), (tmp_path / "kept", [kept])):
        given = [a for a in arguments("causal_lm", place) if not a.startswith(("~data", "+data", "loss="))]
        given = [a.replace("vocab_size: 40", "vocab_size: 300") for a in given]
        said = run(capsys, *given, "data=lm", *more, *further)
        assert ("answers of the teacher" in said) == bool(further)
        records.append(json.loads((place / "result.json").read_text())["student"]["last"])
    live, cached = (record["train"] for record in records)
    assert 0 < live["own_text"] == cached["own_text"] < 1
    assert cached["rkl"] == pytest.approx(live["rkl"], rel=1e-4)
    assert records[1]["val"]["nll"] == pytest.approx(records[0]["val"]["nll"], rel=1e-4)
