"""On-policy distillation: whose text a batch is, what is sampled, what is learned from it, and what a resume needs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd.cli.main import main
from kd.data.text.collate import documents_apart
from kd.data.text.lm import Documents
from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.rkl import ReverseKL
from kd.losses.tokens.minillm import MiniLLM, clipped_policy_gradient, minillm_advantages
from kd.models.transformers_model import transformers_model
from kd.run import compatibility
from kd.setups.on_policy import OnPolicy
from kd.setups.teacher_mixed import TeacherMixed
from kd.tasks.tokens import CausalLM
from tests.test_text_runs import arguments, run
from tests.tiny_language import LLAMA, Texts

SMALL = {**LLAMA, "num_hidden_layers": 1}


class Attached:
    """As much of a trainer as composing a batch reads: at a step of 20 epochs of 10 batches."""

    max_epochs, num_training_batches = 20, 10

    def __init__(self, step: int) -> None:
        self.global_step = step
        self.current_epoch, place = divmod(step, self.num_training_batches)
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_idx=place))


def unprepared(positions: tuple[int, int] = (32, 32), **options: Any) -> OnPolicy:
    """With networks of so many ``positions``, those of the student and of the teacher."""
    student, teacher = (
        transformers_model(config={**SMALL, "max_position_embeddings": most}, architecture="causal_lm")
        for most in positions
    )
    objective = Objective({"ce": CrossEntropy(), "rkl": ReverseKL()})
    return OnPolicy(student, teacher, objective, CausalLM(), **{"max_new_tokens": 5, **options})


def on_policy(**options: Any) -> OnPolicy:
    made = unprepared(**options)
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


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_no_other_setting_of_the_students_generation_config_is_in_force(lora: dict[str, Any] | None) -> None:
    """A published folder comes with penalties, beams and suppressed tokens: they would sample another distribution."""
    module = on_policy(share=1.0)
    network: Any = transformers_model(config=SMALL, architecture="causal_lm", lora=lora)
    module.student = network
    inner = network.get_base_model() if lora else network
    prompts, plain = [torch.tensor([5, 6, 7]), torch.tensor([9])], inner.generation_config
    written = []
    for changed in ({}, {"repetition_penalty": 5.0, "num_beams": 2, "min_p": 0.9, "suppress_tokens": [*range(3, 30)]}):
        own = inner.generation_config = type(plain).from_dict({**plain.to_dict(), **changed})
        torch.manual_seed(0)
        written.append(module.write(prompts))
        assert inner.generation_config is own  # which the run's folder keeps
    for (ids, _), (others, _) in zip(*written, strict=True):
        assert torch.equal(ids, others)
    inner.generation_config.eos_token_id = [*range(40)]  # the tokens that end a text are its own
    assert [len(ids) - length for ids, length in module.write(prompts)] == [1, 1]


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


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.9), ("top_p", 0.9), ("replay", 10)])
def test_minillm_is_of_samples_of_the_student_as_it_is(key: str, value: float) -> None:
    """Its ratio to the student that sampled is 1, which it is not of an older one or of another distribution."""
    made = Objective({"long": MiniLLM()})
    networks = [torch.nn.Linear(1, 1) for _ in range(2)]
    with pytest.raises(KdError, match=rf"loss\.long is not allowed with distiller\.{key} = {value}: it must be [01]"):
        OnPolicy(*networks, made, CausalLM(), **{key: value})
    assert OnPolicy(*networks, Objective({"rkl": ReverseKL()}), CausalLM(), **{key: value})


def test_a_sharded_teacher_is_in_no_mixture() -> None:
    module = on_policy(teacher_mix=0.2)
    module.configure_model()  # of no other strategy
    module._device_mesh = {"data_parallel": None}  # as Lightning sets it under FSDP
    sentence = r"teacher_mix = 0\.2 is not allowed with hardware\.strategy = fsdp: .*hardware\.strategy=ddp"
    with pytest.raises(KdError, match=sentence):
        module.configure_model()


def test_packed_documents_need_a_prompt_length_before_the_first_step() -> None:
    batch = Texts("causal_lm").batches("train")[0]
    whole = Batch(batch.inputs, batch.inputs["input_ids"], batch.index, batch.mask)
    sentence = (
        r"distiller\.prompt_length = null is not allowed: a sample has no prompt.* distiller\.prompt_length=NUMBER"
    )
    with pytest.raises(KdError, match=sentence):
        unprepared().prepare(whole)
    unprepared(share=0.0).prepare(whole)  # nothing is written
    module = unprepared(prompt_length=2)
    module.prepare(whole)
    assert [len(p) for p in module.prompts(whole)] == [2] * 8


def test_documents_apart_end_a_prompt_where_the_next_one_begins() -> None:
    ids = torch.arange(3, 19).view(2, 8)
    first = torch.zeros(2, 8, dtype=torch.bool)
    first[0, 0], first[0, 3], first[1, 6] = True, True, True  # the second block begins within a document
    real = torch.ones(2, 8, dtype=torch.bool)
    real[1, 7] = False
    places, mask = documents_apart(first.numpy(), real.numpy())
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.as_tensor(places)}
    batch = Batch(inputs, torch.where(real & ~first, ids, UNLABELLED), torch.arange(2), real)
    module = unprepared(share=1.0, prompt_length=5)
    module.prepare(batch)
    assert [p.tolist() for p in module.prompts(batch)] == [[3, 4, 5], [11, 12, 13, 14, 15]]


@pytest.mark.parametrize(("positions", "side"), [((32, 64), "student"), ((64, 32), "teacher")])
def test_more_positions_than_a_network_takes(positions: tuple[int, int], side: str) -> None:
    batch = Texts("causal_lm").batches("train")[0]
    unprepared(positions, max_new_tokens=29).prepare(batch)  # prompts of 3
    module = unprepared(positions, max_new_tokens=30)
    sentence = rf"distiller\.max_new_tokens = 30 .* of 3 tokens, .* 32 positions of the {side}: .*data\.length"
    with pytest.raises(KdError, match=sentence):
        module.prepare(batch)
    with pytest.raises(KdError, match=sentence):  # of a batch with longer prompts than the first one
        module.write([torch.tensor([4]), torch.tensor([4, 5, 6])])


def test_the_longest_prompt_of_the_data_is_known_before_the_first_step() -> None:
    rows = [{"prompt": f"say {word}", "completion": "it"} for word in ("a", "b", "c", "d", "e")]
    rows += [{"prompt": "say " + "something " * 5, "completion": "it"}]
    tokenizer = {"vocabulary": 300, "kind": "bpe"}
    data = Documents(train=rows, val=rows[:1], test=rows[1:2], tokenizer=tokenizer, overlap="keep", batch_size=2)
    data.setup()
    module = unprepared()
    lengths = [max(map(len, module.prompts(batch))) for batch in data.train_dataloader()]
    longest = max(lengths)
    assert min(lengths) < longest  # the first batch says nothing of it
    data.most = longest + 4
    compatibility.check(unprepared((longest + 5,) * 2), data, 2)
    sentence = rf"distiller\.max_new_tokens = 5 is not allowed: .* of {longest} tokens"
    with pytest.raises(KdError, match=sentence):
        compatibility.check(unprepared((longest + 4,) * 2), data, 2)
    compatibility.check(unprepared((longest + 4,) * 2, prompt_length=2), data, 2)


def test_a_student_that_cannot_write() -> None:
    module = unprepared()

    class Other(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    module.student = Other(module.student)
    with pytest.raises(KdError, match="needs a student that generates, Other does not"):
        module.prepare(Texts("causal_lm").batches("train")[0])


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


@pytest.mark.parametrize("replay", [0, 5])
def test_ever_more_is_drawn_from_the_last_samples(monkeypatch: pytest.MonkeyPatch, replay: int) -> None:
    """What is written anew falls from all to nothing; the buffer holds the last ones, and any of them is drawn."""
    torch.manual_seed(0)
    module, batch, written = on_policy(share=1.0, replay=replay, seed=0), Texts("causal_lm").batches("train")[0], []

    def write(prompts: list[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
        made = [(torch.tensor([5, 6, len(written) + line]), 2) for line in range(len(prompts))]
        written.extend(made)
        return made

    monkeypatch.setattr(module, "write", write)
    fresh, drawn = [], set()
    for step in range(200):
        module._trainer = Attached(step)
        before, kept = len(written), [int(ids[2]) for ids, _ in module.kept]
        made = module.compose(batch.few(2))
        fresh.append(len(written) > before)
        found = made.inputs["input_ids"][:, 2].tolist()
        assert made.targets[:, 2].tolist() == found  # behind a prompt of two, of the buffer as well
        if fresh[-1]:
            assert found == [before, before + 1]
        else:
            drawn |= {kept.index(number) for number in found}
        last = [int(ids[2]) for ids, _ in written][-replay:]
        assert [int(ids[2]) for ids, _ in module.kept] == (last if replay else [])
    if not replay:
        assert all(fresh)
        return
    quarters = [sum(fresh[start : start + 50]) / 50 for start in range(0, 200, 50)]
    assert quarters == pytest.approx([7 / 8, 5 / 8, 3 / 8, 1 / 8], abs=0.1)
    assert drawn == set(range(replay))
    module._trainer, module.kept = Attached(199), []
    module.compose(batch)  # of an empty buffer nothing is drawn
    assert len(module.kept) == replay


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
