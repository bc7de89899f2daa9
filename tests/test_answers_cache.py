"""Answers of a teacher on the disk: equal to the live ones, made once, whole or not at all, and of nothing else."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kd.data.base import AdaptedData
from kd.data.images.digits import Digits
from kd.data.images.imagefolder import ImageFolder
from kd.data.text.lm import Documents
from kd.data.text.sentences import Sentences
from kd.distill import cache_build, cache_shards
from kd.distill.cache import CachedAnswers
from kd.distill.cache_forms import Form, narrowed
from kd.distill.cache_key import facts_of_run
from kd.distill.distiller import Distiller
from kd.distill.objective import Objective
from kd.distill.teacher import Teacher
from kd.errors import KdError, MachineFailure
from kd.losses.base import Batch, Output, Term, TopK
from kd.losses.logits.ctkd import CurriculumTemperature
from kd.losses.logits.kd import KnowledgeDistillation, kl_divergence
from kd.losses.logits.mse import SquaredError
from kd.losses.logits.normkd import NormalisedLogits
from kd.losses.logits.rld import RefinedLogits
from kd.losses.logits.ttm import TransformedTeacher
from kd.losses.tokens.hinge_ranking import HingeRanking
from kd.losses.tokens.topk_kl import TopKKL, topk_kl_divergence
from kd.models.transformers_model import transformers_model
from kd.records import lock
from kd.tasks.base import Want
from kd.tasks.classification import Classification
from kd.tasks.tokens import CausalLM
from tests.tiny_language import LLAMA, VOCABULARY, Texts

HERE = torch.device("cpu")
STARTS = multiprocessing.get_context("spawn")


class Known(Texts):
    """Sequences that are known to be the same in every epoch."""

    random_view = None
    tokenizer_digest = "0123"
    tokenizer = "any"


def language(seed: int = 0) -> Teacher:
    torch.manual_seed(seed)
    config = {**LLAMA, "num_hidden_layers": 1}
    network = transformers_model(None, pretrained=False, config=config, architecture="causal_lm")
    return Teacher([network], task=CausalLM())


def of_tokens(folder: Path, teacher: Teacher | None = None, data: Any = None, **options: Any) -> CachedAnswers:
    data = AdaptedData(Known()) if data is None else data
    given = {"folder": str(folder), "shard_samples": 8, "precision": "float32", **options}
    return CachedAnswers(teacher or language(), data, CausalLM(), **given)


def points(seed: int = 0, inputs: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 10))


def of_images(folder: Path, seed: int = 0, data: Any = None, **options: Any) -> CachedAnswers:
    data = Digits(val_fraction=0.25, batch_size=64) if data is None else data
    given = {"folder": str(folder), "shard_samples": 200, "what": "logits", "precision": "float32", **options}
    return CachedAnswers(Teacher([points(seed)]), data, **given)


def ready(cached: CachedAnswers) -> CachedAnswers:
    cached.begin(iter(()), HERE)
    return cached


def the_cache(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def count_answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples of each forward pass of a live teacher from now on."""
    seen: list[int] = []
    forward = Teacher.forward
    monkeypatch.setattr(
        Teacher, "forward", lambda self, x, *a, **k: (seen.append(len(Batch(x))), forward(self, x, *a, **k))[1]
    )
    return seen


# ---------------------------------------------------------------------- the form of a row


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("form", ["tail", "renormalised", "zero"])
def test_a_kept_topk_is_softened_as_the_logits_are(temperature: float, form: str) -> None:
    torch.manual_seed(0)
    student, logits = torch.randn(9, 50), 4 * torch.randn(9, 50)
    kept = Form("topk", 6, [2, 4.0], "float32")
    arrays, classes = kept.encode(Output(logits))
    teacher = kept.decode(narrowed(arrays), classes, None)
    batch = Batch(torch.empty(9))
    term = TopKKL(6, temperature, form)
    torch.testing.assert_close(term(Output(student), teacher, batch), term(Output(student), Output(logits), batch))
    fewer = TopKKL(3, temperature, form)
    torch.testing.assert_close(fewer(Output(student), teacher, batch), fewer(Output(student), Output(logits), batch))
    hinge = HingeRanking(5)
    torch.testing.assert_close(hinge(Output(student), teacher, batch), hinge(Output(student), Output(logits), batch))
    assert teacher.topk is not None
    softened = (logits / temperature).log_softmax(-1)
    torch.testing.assert_close(teacher.topk.at(temperature), softened.gather(-1, teacher.topk.ids))
    torch.testing.assert_close(
        (teacher.topk.log_probs + teacher.topk.log_sums[:, None]), logits.gather(-1, teacher.topk.ids)
    )
    assert (teacher.topk.ids.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("what", ["topk", "logits"])
def test_autocast_of_the_cpu_keeps_float16(what: str) -> None:
    logits = torch.randn(300, 5)
    with torch.autocast("cpu", torch.bfloat16):
        arrays, classes = Form(what, 3).encode(Output(logits))
    assert classes == 5
    plain, _ = Form(what, 3).encode(Output(logits))
    assert all(torch.equal(arrays[name], plain[name]) for name in plain)


def test_a_temperature_that_was_not_kept_is_refused_with_those_that_were() -> None:
    kept = Form("topk", 3, [2.0])
    teacher = kept.decode(*kept.encode(Output(torch.randn(4, 9))), None)
    with pytest.raises(
        ValueError,
        match=r"^temperature = 3\.0 is not stored with the teacher's top-k: it must be 1, 2, or .*temperatures\)$",
    ):
        TopKKL(3, 3.0)(Output(torch.randn(4, 9)), teacher, Batch(torch.empty(4)))
    with pytest.raises(ValueError, match=r"it must be 1, or be asked for"):
        TopK(torch.tensor([[0]]), torch.tensor([[-1.0]]), 3).at(2.0)


def test_rounding_does_not_move_the_tail() -> None:
    """In float16 the sum of the k probabilities is off by more than the tail has; its mass is kept apart."""
    logits = torch.cat([torch.tensor([[9.0, 8.5, 8.2, 7.7]]), torch.full((1, 400), -5.0)], dim=1)
    kept = Form("topk", 4, [1.0])
    topk = kept.decode(*kept.encode(Output(logits)), None).topk
    assert topk is not None
    assert topk.log_probs.dtype == torch.float16
    tail = logits.softmax(-1)[0, 4:].sum()
    dense = topk.dense().softmax(-1)[0, 4:]
    torch.testing.assert_close(dense.sum(), tail, rtol=1e-3, atol=0)
    torch.testing.assert_close(topk.at(1.0).exp(), logits.softmax(-1)[:, :4], rtol=2e-3, atol=0)


def test_logits_far_apart_stay_finite_in_halves() -> None:
    logits = torch.tensor([[0.0, 1e4, -1e5, 3.0, 9e3]])
    for k in (3, 5):
        kept = Form("topk", k, [2.0])
        teacher = kept.decode(*kept.encode(Output(logits.bfloat16())), None)
        value = topk_kl_divergence(torch.zeros(1, 5), teacher.topk.at(2.0), teacher.topk.ids, 2.0)
        assert value.isfinite()
        assert teacher.logits.isfinite().all()


@pytest.mark.parametrize(("classes", "dtype"), [(200, torch.uint8), (60_000, torch.uint16), (70_000, torch.int32)])
def test_ids_are_kept_as_steps_in_the_smallest_type(classes: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, classes)
    logits[0, [3, classes - 1]], logits[1, [0, 1]] = 5.0, 5.0
    kept = Form("topk", 2)
    arrays, found = kept.encode(Output(logits))
    small = narrowed(arrays)
    assert small["ids"].dtype == dtype
    ids = kept.decode({**small, "ids": small["ids"].to(torch.int32)}, found, None).topk.ids
    assert ids.tolist() == [[3, classes - 1], [0, 1]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"what": "all"}, "what = all is not allowed: it must be topk, hidden or logits"),
        ({"k": 0}, "k = 0 is not allowed: it must be a whole number above 0"),
        ({"k": 1.5}, "k = 1.5 is not allowed: it must be a whole number above 0"),
        ({"temperatures": [0]}, "temperature = 0 is not allowed: it must be a finite number above 0"),
        ({"temperatures": 2}, "temperatures = 2 is not allowed: it must be a list of numbers above 0"),
        ({"precision": "int8"}, "precision = int8 is not allowed: it must be float16, bfloat16 or float32"),
        ({"shard_samples": 0}, "shard_samples = 0 is not allowed: it must be a whole number above 0, or null"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        of_images(tmp_path, **options)
    assert str(caught.value) == sentence


# ---------------------------------------------------------------------- equal to the live teacher


def batches_of(data: Any, seed: int = 0) -> Iterator[Batch]:
    """The training batches, each with its samples in another order, through the task."""
    for batch in data.train_dataloader():
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
        yield CausalLM().rows(batch.map(lambda t, order=order: t[order]))


@pytest.mark.parametrize("options", [{"k": VOCABULARY}, {"what": "hidden", "precision": None}, {"what": "logits"}])
def test_tokens_are_answered_as_live(tmp_path: Path, options: dict[str, Any]) -> None:
    """All classes, or hidden states: the same at any temperature; rows of samples in any order, over several shards."""
    teacher, data = language(), AdaptedData(Known())
    cached = ready(of_tokens(tmp_path, teacher, data, **options))
    assert cached.rows is not None
    assert len(cached.rows.shards) == 4
    for batch in batches_of(data):
        live, kept = teacher(batch.inputs, batch), cached.answer(batch, Want())
        close = {"rtol": 0, "atol": 0} if options.get("what") else {"rtol": 1e-5, "atol": 1e-5}
        if options.get("what"):
            torch.testing.assert_close(kept.logits, live.logits, **close)
            assert (kept.head is None) == (options["what"] == "logits")
        torch.testing.assert_close(kept.logits.log_softmax(-1), live.logits.log_softmax(-1), rtol=1e-5, atol=1e-5)
        student = torch.randn_like(live.logits)
        for temperature in (1.0, 3.0):
            expected = kl_divergence(student, live.logits, temperature)
            torch.testing.assert_close(kl_divergence(student, kept.logits, temperature), expected)


def test_the_k_likeliest_tokens_give_the_loss_of_the_live_ones(tmp_path: Path) -> None:
    teacher, data = language(), AdaptedData(Known())
    cached = ready(of_tokens(tmp_path, teacher, data, k=5, temperatures=[1, 2], precision=None))
    for batch in batches_of(data):
        live, kept = teacher(batch.inputs, batch), cached.answer(batch, Want())
        student = Output(torch.randn_like(live.logits))
        for temperature in (1.0, 2.0):
            term = TopKKL(5, temperature)
            torch.testing.assert_close(term(student, kept, batch), term(student, live, batch), rtol=2e-3, atol=1e-5)
        assert kept.topk is not None
        assert kept.topk.ids.shape == (len(batch.targets), 5)


def test_the_dry_pass_has_the_form_of_what_is_kept_and_nothing_runs_without_need(tmp_path: Path) -> None:
    teacher, data = language(), AdaptedData(Known())
    batch = next(batches_of(data))
    cached = of_tokens(tmp_path, teacher, data, k=5)
    dry = cached.answer(batch, Want())
    kept = ready(cached).answer(batch, Want())
    for name in ("ids", "log_probs", "log_sums"):
        torch.testing.assert_close(getattr(dry.topk, name), getattr(kept.topk, name))
    assert not cached.answer(batch, Want(logits=False)).has_logits
    torch.testing.assert_close(cached.measured(batch).logits, teacher.measured(batch).logits)
    assert cached.live
    assert not cached.train().training
    assert list(cached.state_dict()) == list(teacher.state_dict())  # its digest in a record is that of the teacher


def test_a_half_precision_projection_is_kept_as_it_is(tmp_path: Path) -> None:
    teacher, data = language().to(torch.bfloat16), AdaptedData(Known())
    cached = ready(of_tokens(tmp_path, teacher, data, what="hidden", precision=None))
    batch = next(batches_of(data))
    live, kept = teacher(batch.inputs, batch), cached.answer(batch, Want())
    assert kept.hidden.dtype == kept.logits.dtype == torch.bfloat16
    assert torch.equal(kept.hidden, live.hidden)
    torch.testing.assert_close(kept.logits, live.logits)


def test_documents_are_read_by_their_row_whatever_batch_they_are_in(tmp_path: Path) -> None:
    words = np.random.default_rng(0).choice(["the", "river", "was", "wide", "and", "slow"], 1500)
    for split, part in {"train": words[:1000], "val": words[1000:1200], "test": words[1200:]}.items():
        (tmp_path / f"{split}.txt").write_text(" ".join(part))
    files = {split: f"{split}.txt" for split in ("train", "val", "test")}
    own = Documents(root=str(tmp_path), **files, length=16, tokenizer={"vocabulary": 300}, batch_size=8)
    own.setup()
    torch.manual_seed(0)
    config = {**LLAMA, "num_hidden_layers": 1, "vocab_size": len(own.tokenizer)}
    network = transformers_model(None, pretrained=False, config=config, architecture="causal_lm")
    teacher = Teacher([network], task=CausalLM())
    cached = CachedAnswers(
        teacher, AdaptedData(own), CausalLM(), k=300, precision="float32", folder=str(tmp_path / "c"), shard_samples=50
    )
    ready(cached)
    for batch in map(CausalLM().rows, own.train_dataloader()):
        expected = teacher(batch.inputs, batch).logits.log_softmax(-1)
        torch.testing.assert_close(cached.answer(batch, Want()).logits, expected, rtol=1e-4, atol=1e-4)

    def facts(**other: str) -> dict[str, Any]:
        data = Documents(root=str(tmp_path), **{**files, **other}, length=16, tokenizer=own.tokenizer)
        return facts_of_run(data, CausalLM(), cached.form)

    assert facts(val="test.txt", test="val.txt") == facts()  # other texts to validate on change no answer
    assert facts(train="val.txt", val="train.txt")["data"] != facts()["data"]
    end = own.tokenizer.eos_token
    (tmp_path / "several.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in ("the river", "was wide")))
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": f"the river{end}was wide"}) + "\n")
    several, one = ({**files, "train": f"{name}.jsonl"} for name in ("several", "one"))
    assert facts(**several)["data"] != facts(**one)["data"]  # which documents see one another


def test_the_longest_text_of_validation_changes_no_answer(tmp_path: Path) -> None:
    for name, longest in {"train": 3, "short": 2, "long": 9, "test": 2}.items():
        rows = "".join(f"{name} {'was ' * n},{n % 2}\n" for n in range(1, longest + 1))
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    made = [
        Sentences(
            root=str(tmp_path),
            train="train.csv",
            val=val,
            test="test.csv",
            tokenizer={"vocabulary": 60},
            max_length=None,
        )
        for val in ("short.csv", "long.csv")
    ]
    one, other = (facts_of_run(data, Classification(), Form(what="logits")) for data in made)
    assert made[0].input_shape != made[1].input_shape
    assert one == other


def test_a_folder_of_something_else_is_no_place_for_a_cache(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("text\n")
    for place, sentence in (
        (tmp_path, "the folder has something else in it"),
        (tmp_path / "mine.csv", "and no folder"),
    ):
        with pytest.raises(KdError, match=rf"^teacher\.answers\.path = \S+ is not allowed: .*{sentence}"):
            ready(of_tokens(tmp_path, path=str(place)))
    assert [file.name for file in tmp_path.iterdir()] == ["mine.csv"]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_cache_that_another_job_begins_meanwhile_is_shared_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    place = tmp_path / "one"
    made, other = of_images(tmp_path, path=str(place)), of_images(tmp_path, seed, path=str(place))
    read, last = cache_shards.read_json, cache_shards.name_of(4)

    def late(file: Path) -> dict[str, Any] | None:
        found = read(file)
        if file.name == cache_shards.PLAN:  # the other job begins where this one has found no plan
            monkeypatch.setattr(cache_shards, "read_json", read)
            ready(other)
            for name in (last, cache_shards.MANIFEST):
                (place / name).unlink()
        return found

    monkeypatch.setattr(cache_shards, "read_json", late)
    with pytest.raises(KdError, match=r"is of another teacher") if seed else contextlib.nullcontext():
        ready(made)
    assert (place / last).exists() is not bool(seed)  # no answers of one teacher among those of another


@pytest.mark.parametrize("options", [{"what": "topk", "k": 4, "temperatures": [2]}, {"precision": "bfloat16"}])
def test_a_small_cache_on_the_device_reads_as_the_files_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    data = Digits(augment={"pad": 1, "period": 2}, batch_size=100)
    small = ready(of_images(tmp_path, data=data, **options))
    monkeypatch.setattr(cache_shards, "SMALL", 1000)
    mapped = ready(of_images(tmp_path, data=data, **options))
    assert small.held is not None
    assert mapped.held is None
    loader = data.train_dataloader()
    loader.set_epoch(1)
    for batch in loader:
        one, other = small.answer(batch, Want()), mapped.answer(batch, Want())
        assert torch.equal(one.logits, other.logits)
        assert options.get("what") is None or torch.equal(one.topk.at(2.0), other.topk.at(2.0))
    for cached in (small, mapped):
        with pytest.raises(KdError, match=r"has no answer to sample 5000 of the training set$"):
            cached.answer(Batch(batch.inputs[:1], None, torch.tensor([5000]), extra={"view": 0}), Want())


# ---------------------------------------------------------------------- whole or not at all


def test_a_build_killed_before_any_write_goes_on_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ready(of_tokens(tmp_path / "whole", what="hidden"))
    seen = count_answers(monkeypatch)
    expected = {file.name: file.read_bytes() for file in the_cache(tmp_path / "whole").iterdir()}
    assert sorted(expected) == sorted(
        ["head.safetensors", "manifest.json", "plan.json", *map(cache_shards.name_of, range(4))]
    )
    replacing, made = cache_shards.replacing, []

    class Killed(BaseException):
        pass

    def dying(number: int) -> Callable[..., Any]:
        left = [number]

        def replaced(path: Path, mark: str) -> Any:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return replacing(path, mark)

        return replaced

    for number in range(7):
        folder = tmp_path / f"killed{number}"
        cached = of_tokens(folder, what="hidden")
        with monkeypatch.context() as patch:
            patch.setattr(cache_shards, "replacing", dying(number))
            with pytest.raises(Killed):
                ready(cached)
        assert cached.rows is None
        assert not (the_cache(folder) / "manifest.json").exists()
        seen.clear()
        ready(of_tokens(folder, what="hidden"))
        made.append(sum(seen))
        found = {file.name: file.read_bytes() for file in the_cache(folder).iterdir()}
        assert found == expected
    assert made == [32, 32, 32, 24, 16, 8, 0]  # nothing, the plan, the projection, then a shard each are there
    assert whole.rows is not None


def test_a_shard_that_is_damaged_before_the_cache_is_complete_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ready(of_images(tmp_path))
    folder = the_cache(tmp_path)
    expected = (folder / cache_shards.name_of(1)).read_bytes()
    (folder / "manifest.json").unlink()
    for damage in (expected[:-5], expected[:-1] + bytes([expected[-1] ^ 1]), b"", b"x" * 100):
        (folder / cache_shards.name_of(1)).write_bytes(damage)
        (folder / "manifest.json").unlink(missing_ok=True)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ready(of_images(tmp_path))
        assert (folder / cache_shards.name_of(1)).read_bytes() == expected
        assert len(caplog.records) >= 1


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "shard-00002" in self.name:
            write(self, data[:100])
            raise OSError(28, "No space left on device")
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(
            MachineFailure, match=r"shard-00002.safetensors cannot be written: No space left on device$"
        ):
            ready(of_images(tmp_path))
    left = sorted(file.name for file in the_cache(tmp_path).iterdir() if file.suffix not in (".lock",))
    assert left == ["plan.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    seen = count_answers(monkeypatch)
    ready(of_images(tmp_path))
    assert sum(seen) == 808 - 400


# ---------------------------------------------------------------------- several at once


def test_two_builders_share_the_shards_and_make_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, writes, write = count_answers(monkeypatch), [], cache_shards.write
    together = threading.Barrier(2)

    def slow(file: Path, *rest: Any) -> dict[str, Any]:
        writes.append((threading.get_ident(), file.name))
        if len(writes) <= 2:
            together.wait(20)  # each is in the middle of a shard
        return write(file, *rest)

    monkeypatch.setattr(cache_shards, "write", slow)
    both = [of_images(tmp_path, shard_samples=100) for _ in range(2)]
    threads = [threading.Thread(target=ready, args=(cached,)) for cached in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(name for _, name in writes) == [cache_shards.name_of(n) for n in range(9)]
    assert len({who for who, _ in writes}) == 2
    assert sum(seen) == 808
    data = both[0].data
    for batch in data.train_dataloader():
        assert torch.equal(both[0].answer(batch, Want()).logits, both[1].answer(batch, Want()).logits)
    assert not list(the_cache(tmp_path).glob(".*.lock"))


def build(folder: str, out: str) -> None:
    """What one of two processes does."""
    torch.set_num_threads(1)
    ready(of_images(Path(folder), shard_samples=50))
    Path(out).write_text("complete")


@pytest.mark.slow
def test_processes_share_the_shards_as_well(tmp_path: Path) -> None:
    """One of them is killed on the way: its lock falls, the other goes on."""
    outs = [tmp_path / f"{name}.txt" for name in "ab"]
    workers = [STARTS.Process(target=build, args=(str(tmp_path / "c"), str(out))) for out in outs]
    for worker in workers:
        worker.start()
    while not list((tmp_path / "c").rglob("shard-*.safetensors")):
        workers[0].join(0.01)
        if workers[0].exitcode is not None:
            break
    workers[0].kill()
    workers[1].join(120)
    assert outs[1].exists()
    cached = ready(of_images(tmp_path / "c", shard_samples=50))
    assert cached.rows is not None
    assert len(cached.rows.shards) == 17


def test_a_shard_that_another_process_makes_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ready(of_images(tmp_path))
    folder = the_cache(tmp_path)
    (folder / "manifest.json").unlink()
    (folder / cache_shards.name_of(3)).rename(tmp_path / "aside")
    waits = of_images(folder.parent)
    thread = threading.Thread(target=ready, args=(waits,))
    with lock.held(folder / ".shard-00003.lock"), caplog.at_level(logging.INFO):
        thread.start()
        thread.join(1.0)
        assert thread.is_alive()
        (tmp_path / "aside").rename(folder / cache_shards.name_of(3))
    thread.join(30)
    assert waits.rows is not None
    assert "1 of 5 shards of the answers are made by other processes" in caplog.text


# ---------------------------------------------------------------------- of nothing else


def refused(cached: Callable[[], CachedAnswers]) -> str:
    with pytest.raises(KdError) as caught:
        ready(cached())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cache_of_something_else_is_refused_in_one_sentence(tmp_path: Path) -> None:
    place = {"path": str(tmp_path / "one")}
    ready(of_tokens(tmp_path, k=5, **place))

    class Other(Known):
        tokenizer_digest = "4567"

    shorter = Known(samples=24)
    cases = {
        "is of another teacher (teacher ": lambda: of_tokens(tmp_path, language(1), k=5, **place),
        "is of another tokenizer (tokenizer 0123 there, 4567 in this run)": lambda: of_tokens(
            tmp_path, data=AdaptedData(Other()), k=5, **place
        ),
        "is of other training data (data ": lambda: of_tokens(tmp_path, data=AdaptedData(shorter), k=5, **place),
        "keeps something else (kept top 5 in float32 at T = 1 there, top 6 in float32 at T = 1, 2 in this run)": (
            lambda: of_tokens(tmp_path, k=6, temperatures=[2], **place)
        ),
    }
    for words, cached in cases.items():
        assert refused(cached).startswith(f"teacher.answers: {tmp_path / 'one'} {words}")
    half = lambda: of_tokens(tmp_path, language().to(torch.bfloat16), k=5, **place)  # noqa: E731
    assert "is of another teacher" in refused(half)
    without = CachedAnswers(None, AdaptedData(Known()), CausalLM(), k=5, precision="float32", path=place["path"])
    batch = next(batches_of(without.data))
    assert not without.live
    assert without.answer(batch, Want()).topk is not None
    with pytest.raises(KdError, match="answers to the training samples alone"):
        without.measured(batch)


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    ready(of_images(tmp_path))
    folder = the_cache(tmp_path)
    file = folder / cache_shards.name_of(2)
    expected = file.read_bytes()
    again = f"; delete {folder} to have the answers made anew"
    for damage, words in {
        expected[:-5]: f"{file} is truncated: {len(expected) - 5:,} of {len(expected):,} bytes",
        expected + b"x": f"{file} is too long",
        expected[:40]: f"{file} is truncated or no file of answers",
        (folder / cache_shards.name_of(1)).read_bytes(): f"{file} is not the file that the manifest of its cache names",
    }.items():
        file.write_bytes(damage)
        assert refused(lambda: of_images(tmp_path)) == f"teacher.answers: {words}{again}"
    file.unlink()
    assert refused(lambda: of_images(tmp_path)) == f"teacher.answers: {file} is missing{again}"
    half = len(expected) // 2  # among the logits
    file.write_bytes(expected[:half] + bytes([expected[half] ^ 1]) + expected[half + 1 :])
    ready(of_images(tmp_path))  # sizes and headers alone
    assert "its bytes are others than when it was written" in refused(lambda: of_images(tmp_path, verify=True))
    file.write_bytes(expected)
    ready(of_images(tmp_path, verify=True))
    for text in ("{", "[]", json.dumps({"version": 0})):
        (folder / "manifest.json").write_text(text)
        assert refused(lambda: of_images(tmp_path)).endswith(again)


def test_a_cache_of_the_first_version_is_read_unless_it_is_of_texts(tmp_path: Path) -> None:
    data = Digits(val_fraction=0.25)
    assert facts_of_run(data, Classification(), Form("logits"))["data"] == "c18645e7f1852b04"  # of that version
    given = {"precision": "float32", "path": str(tmp_path)}

    def outdated(number: int) -> None:
        for name in ("manifest.json", "plan.json"):
            said = json.loads((tmp_path / name).read_text())
            (tmp_path / name).write_text(json.dumps({**said, "version": number}))

    ready(of_images(tmp_path, **given))
    outdated(1)
    assert CachedAnswers(None, data, what="logits", **given).rows is not None
    outdated(0)
    words = f"teacher.answers: {tmp_path / 'manifest.json'} is of another version of kd, or no file of answers; "
    assert refused(lambda: CachedAnswers(None, data, what="logits", **given)) == (
        f"{words}give teacher.checkpoint=RUN or model@teacher=NAME and another teacher.answers.path to have the "
        "answers made anew"
    )
    for file in tmp_path.iterdir():
        file.unlink()
    rows = "".join(f"a text {n},{n % 2}\n" for n in range(8))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "rows.csv").write_text(f"text,label\n{rows}")
    split = dict.fromkeys(("train", "val", "test"), "rows.csv")
    texts = Sentences(root=str(tmp_path / "texts"), **split, overlap="keep", tokenizer={"vocabulary": 60})
    plan = {"facts": facts_of_run(texts, Classification(), Form("logits", precision="float32"))}
    (tmp_path / "plan.json").write_text(json.dumps({"version": 1, **plan}))
    assert "keeps answers to texts as an earlier version of kd did; give teacher.checkpoint=RUN" in refused(
        lambda: CachedAnswers(None, texts, what="logits", **given)
    )


def test_what_decides_the_answers_is_in_the_key(tmp_path: Path) -> None:
    def keys(**options: Any) -> set[str]:
        made = of_images(tmp_path, **options)
        return {made._place(made._facts(HERE)).name}

    plain = keys()
    assert plain == keys(data=Digits(val_fraction=0.25, batch_size=32, seed=3, split_seed=0))
    assert plain == keys(data=Digits(val_fraction=0.25, augment={"pad": 1}, teacher_view="clean"))
    others = [
        *(keys(seed=1), keys(precision=None), keys(what="topk"), keys(what="topk", k=3)),
        *(keys(what="topk", temperatures=[2]), keys(data=Digits(val_fraction=0.3)), keys(data=Digits(mean=[0.5]))),
        *(keys(data=Digits(train_size=100)), keys(data=Digits(split_seed=1)), keys(data=Digits(drop_classes=[3]))),
        *(
            keys(data=Digits(val_fraction=0.25, augment={"pad": 1, "period": n}, seed=s))
            for n in (1, 2)
            for s in (0, 1)
        ),
    ]
    assert len(set.union(plain, *others)) == 1 + len(others)


def test_samples_in_another_order_each_time_are_refused(tmp_path: Path) -> None:
    class Shuffled(Known):
        def train_dataloader(self) -> list[Batch]:
            order = torch.randperm(self.samples)
            whole = self.drawn("train").map(lambda t: t[order])
            return [whole.map(lambda t, s=s: t[s : s + 8]) for s in range(0, self.samples, 8)]

    class Ordered(Shuffled):
        def answering_dataloader(self) -> list[Batch]:
            return Known.train_dataloader(self)

    assert "in another one each time" in refused(lambda: of_tokens(tmp_path, data=AdaptedData(Shuffled())))
    cached, teacher = of_tokens(tmp_path, data=AdaptedData(Ordered()), what="logits"), language()
    ready(cached)
    for batch in map(CausalLM().rows, Shuffled().train_dataloader()):
        torch.testing.assert_close(cached.answer(batch, Want()).logits, teacher(batch.inputs, batch).logits)


class Pixels(Classification):
    """A row is a number that is not negative."""

    def rows(self, batch: Batch) -> Batch:
        kept = batch.inputs >= 0
        return Batch(batch.inputs, kept.nonzero()[:, 1], batch.index, extra={"kept": kept})


class Together(Pixels):
    """Rows that a sample has in company alone."""

    def rows(self, batch: Batch) -> Batch:
        return super().rows(batch) if len(batch) > 1 else batch


def test_the_rows_of_each_sample_are_counted_for_any_task() -> None:
    batch = Batch(torch.tensor([[1.0, -1, 2], [-1, -1, -1], [3, 4, 5]]), torch.zeros(3))
    for task, counts in ((Pixels(), [2, 0, 3]), (Classification(), [1, 1, 1])):
        rows = task.rows(batch)
        assert cache_build.rows_of_samples(task, batch, rows, sum(counts)).tolist() == counts
    with pytest.raises(KdError, match="makes 5 rows of 3 samples that it makes 3 of one by one"):
        cache_build.rows_of_samples(Together(), batch, Together().rows(batch), 5)
    tokens = next(iter(Known().train_dataloader()))
    rows = CausalLM().rows(tokens)
    alone = [len(CausalLM().rows(cache_build.cut(tokens, n, n + 1)).targets) for n in range(len(tokens))]
    assert cache_build.rows_of_samples(CausalLM(), tokens, rows, len(rows.targets)).tolist() == alone


def test_samples_and_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    cached = ready(of_tokens(tmp_path, k=5))
    batch = next(batches_of(cached.data))
    with pytest.raises(KdError, match=r"has no answer to sample 99 of the training set$"):
        cached.answer(Batch(batch.inputs, batch.targets, torch.tensor([0, 99])), Want())
    with pytest.raises(KdError, match=r"rows for these samples, the batch has 2: the data is another$"):
        cached.answer(Batch(batch.inputs, batch.targets[:2], batch.index), Want())
    with pytest.raises(KdError, match="by the index of each sample, the data gives none"):
        cached.answer(Batch(batch.inputs, batch.targets), Want())
    with pytest.raises(KdError, match="keeps no graph"):
        cached.answer(batch, Want(input_gradient=True))
    with pytest.raises(
        KdError, match=r"^teacher tap layer1 does not exist: CachedAnswers keeps no intermediate tensors$"
    ):
        cached.tap(["layer1"])
    with pytest.raises(KdError, match="set one of them"):
        CachedAnswers(Teacher([points()], cache=True), Digits())
    with pytest.raises(KdError, match=r"^teacher\.answers needs a teacher: "):
        CachedAnswers(None, Digits())
    with pytest.raises(KdError, match="is no complete cache"):
        CachedAnswers(None, Digits(), path=str(tmp_path / "none"))
    with pytest.raises(KdError, match="output projection is known"):
        ready(of_images(tmp_path / "images", what="hidden"))


KNOWN = (
    r"top 5 of \d+ classes are known of the teacher: keep what=hidden or what=logits in teacher\.answers, or take "
    r"topk_kl in the place of it"
)
MORE = (
    r"^loss\.it reads more of the teacher's logits than their softmax at T = 1 \(reads_softmax_at = None\), and the "
    rf"{KNOWN}$"
)
SOFTENED: dict[str, tuple[Callable[[], Term], str]] = {
    "kd at 4": (
        lambda: KnowledgeDistillation(temperature=4.0),
        rf"^loss\.it softens all classes \(T = 4\), and the {KNOWN}, or T = 1$",
    ),
    "a learned temperature": (CurriculumTemperature, MORE),
    "a power of the teacher": (lambda: TransformedTeacher(gamma=0.5), r"loss\.it softens all classes \(T = 2\)"),
    "a temperature of another name": (
        lambda: RefinedLogits(temperature=1.0, alpha_temperature=4.0),
        r"loss\.it softens all classes \(T = 4\)",
    ),
    "the spread of a row": (NormalisedLogits, MORE),
    "the logits themselves": (lambda: SquaredError(against="teacher"), MORE),
    "kd at 1": (lambda: KnowledgeDistillation(temperature=1.0), ""),
    "the top-k at a stored temperature": (lambda: TopKKL(5, temperature=2.0), ""),
}


@pytest.mark.parametrize("name", SOFTENED)
def test_a_tail_in_equal_parts_is_read_at_its_temperature_alone(tmp_path: Path, name: str) -> None:
    made, sentence = SOFTENED[name]
    cached = of_tokens(tmp_path, k=5, temperatures=[1, 2])
    student = transformers_model(
        None, pretrained=False, config={**LLAMA, "num_hidden_layers": 1}, architecture="causal_lm"
    )
    distiller = Distiller(student, cached, Objective({"it": made()}), task=CausalLM(), num_classes=VOCABULARY)
    with pytest.raises(KdError, match=sentence) if sentence else contextlib.nullcontext():
        distiller.prepare(next(iter(cached.data.train_dataloader())))
    assert distiller.prepared is not bool(sentence)


def test_a_classifier_of_which_a_topk_is_kept_is_pointed_to_what_it_can_keep(tmp_path: Path) -> None:
    cached = of_images(tmp_path, what="topk", k=5)
    batch = next(iter(cached.data.train_dataloader()))
    refused = Distiller(points(1), cached, Objective({"kd": KnowledgeDistillation(4.0)}), num_classes=10)
    with pytest.raises(KdError, match=r": keep what=logits in .*, or take topk_kl in the place of kd, or T = 1$"):
        refused.prepare(batch)
    z_scores = Objective({"kd": KnowledgeDistillation(1.0)}, standardise=["kd"])
    with pytest.raises(KdError, match=r"^loss\.kd reads more .*: keep what=logits .* in the place of kd$"):
        Distiller(points(1), cached, z_scores, num_classes=10).prepare(batch)
    for way in (KnowledgeDistillation(1.0), TopKKL()):
        Distiller(points(1), cached, Objective({"it": way}), num_classes=10).prepare(batch)
    kept = of_images(tmp_path)
    Distiller(points(1), kept, Objective({"kd": KnowledgeDistillation(4.0)}), num_classes=10).prepare(batch)


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_live_teacher_is_measured_where_it_is_to_be(tmp_path: Path, evaluate: bool) -> None:
    cached = of_images(tmp_path, evaluate=evaluate)
    distiller = Distiller(points(1), cached, Objective({"kd": KnowledgeDistillation()}), num_classes=10)
    distiller.prepare(next(iter(cached.data.train_dataloader())))
    assert distiller.measures_teacher is distiller.comparable is evaluate
    assert cached.live  # own text is answered all the same


# ---------------------------------------------------------------------- images: views that are replayed


def by_index(batches: Any, field: str = "inputs") -> dict[int, Tensor]:
    seen = lambda b: b.inputs if field == "inputs" else b.views[field]  # noqa: E731
    return {int(i): x for b in batches for i, x in zip(b.index, seen(b), strict=True)}


OPTIONS: dict[str, dict[str, Any]] = {
    "crops": {},
    "independent": {"teacher_view": "independent"},
    "mixup": {"mixup": 1.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_k_views_come_again_bit_by_bit_and_are_answered_as_live(tmp_path: Path, name: str) -> None:
    options = {"val_fraction": 0.25, "augment": {"pad": 1, "flip": True, "period": 3}, "batch_size": 100}
    data = Digits(**options, **OPTIONS[name])
    assert (data.views, data.random_view) == (3, None)
    cached = ready(of_images(tmp_path, data=data))
    assert cached.rows is not None
    assert len(cached.rows.shards) == 3 * 5
    loader, teacher = data.train_dataloader(), cached.teacher
    field = "teacher" if name == "independent" else "inputs"
    epochs, orders = [], []
    for epoch in range(6):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert {b.extra["view"] for b in batches} == {epoch % 3}
        for batch in batches:
            seen = batch.views.get("teacher", batch.inputs)
            torch.testing.assert_close(cached.answer(batch, Want()).logits, teacher(seen).logits, rtol=1e-5, atol=1e-5)
        epochs.append(by_index(batches, field))
        orders.append(torch.cat([b.index for b in batches]))
    for epoch in range(3):
        assert all(torch.equal(epochs[epoch][i], epochs[epoch + 3][i]) for i in epochs[0])
        assert not torch.equal(orders[epoch], orders[epoch + 3])
    assert sum(torch.equal(epochs[0][i], epochs[1][i]) for i in epochs[0]) < 200
    with pytest.raises(KdError, match=r"^data\.augment\.period = 3 gives the teacher 3 views"):
        data.answering_dataloader()


def test_one_view_needs_no_period(tmp_path: Path) -> None:
    data = Digits(augment={"pad": 1, "period": 4}, teacher_view="clean", batch_size=100)
    assert data.views == 1
    cached, loader = ready(of_images(tmp_path, data=data)), data.train_dataloader()
    loader.set_epoch(2)
    for batch in loader:
        live = cached.teacher(batch.views["teacher"]).logits
        torch.testing.assert_close(cached.answer(batch, Want()).logits, live, rtol=1e-5, atol=1e-5)
    assert Digits(augment={"pad": 1}).random_view == "data.augment"
    with pytest.raises(KdError, match=r"^data\.augment\.period = 0 is not allowed"):
        Digits(augment={"period": 0})


def test_image_files_come_again_as_well(tmp_path: Path) -> None:
    for part, count in {"train": 6, "test": 1}.items():
        for name in ("cat", "dog"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([number, len(name + part)]).integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / name / f"{number}.png")
    augment = {"scale": [0.3, 1.0], "flip": True, "period": 2}
    files = {"folder": str(tmp_path / "set"), "image_size": 16, "crop_pct": 1.0, "val_fraction": 0.2, "num_workers": 0}
    data = ImageFolder(**files, in_memory=False, augment=augment, batch_size=4)
    assert (data.views, data.random_view) == (2, None)
    teacher = Teacher([nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))])
    cached = ready(CachedAnswers(teacher, data, what="logits", precision="float32", folder=str(tmp_path / "c")))
    loader, epochs = data.train_dataloader(), []
    for epoch in range(4):
        loader.set_epoch(epoch)
        batches = list(loader)
        for batch in batches:
            live = teacher(batch.inputs).logits
            torch.testing.assert_close(cached.answer(batch, Want()).logits, live, rtol=1e-4, atol=1e-4)
        epochs.append(by_index(batches))
    assert all(torch.equal(epochs[e][i], epochs[e + 2][i]) for e in (0, 1) for i in epochs[0])
    assert not any(torch.equal(epochs[0][i], epochs[1][i]) for i in epochs[0])


def test_a_batch_that_does_not_say_its_view_is_refused(tmp_path: Path) -> None:
    data = Digits(augment={"pad": 1, "period": 2}, batch_size=100)
    cached = ready(of_images(tmp_path, data=data))
    batch = next(iter(data.train_dataloader()))
    batch.extra.clear()
    with pytest.raises(KdError, match="does not say which of them it is"):
        cached.answer(batch, Want())


# ---------------------------------------------------------------------- runs


CACHED = "teacher.answers={_target_: kd.distill.cache.CachedAnswers, folder: kept, k: 10, precision: float32"


@pytest.mark.slow
def test_a_sweep_makes_the_answers_once(kd, tmp_path: Path, teacher_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs with the live teacher, two with the cache: the same students; the second one asks it no more."""
    seen = count_answers(monkeypatch)
    fast = ["recipe.epochs=2", "hardware=cpu", "hardware.threads=1", f"teacher.checkpoint={teacher_run}"]
    fast += ["loss=[ce,kd,topk_kl]", "loss.topk_kl.temperature=2", "data.augment.pad=1", "data.augment.period=2"]
    fast += ["data.eval_batch_size=100"]
    found: dict[str, Any] = {}
    for seed in (0, 1):
        for name, answers in (("live", []), ("kept", [f"{CACHED}, temperatures: [2]}}"])):
            seen.clear()
            run = f"{name}{seed}"
            said = kd("train", *fast, *answers, f"seed={seed}", "data.seed=0", f"hydra.run.dir={run}")
            assert said.code == 0, said.err
            found[run] = json.loads((tmp_path / run / "result.json").read_text())["student"]["last"]
            found[f"{run} seen"] = sum(n for n in seen if n > 2)
    for seed in (0, 1):
        for split in ("train", "test"):
            live, kept = found[f"live{seed}"][split], found[f"kept{seed}"][split]
            assert live.keys() == kept.keys()
            assert kept == pytest.approx(live, rel=1e-3, abs=1e-4)
    measured = found["kept1 seen"]  # val before the first epoch, val beside the student, test: as with the live one
    assert found["kept0 seen"] == measured + 2 * 808
    assert measured < 808 * 2
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.slow
def test_a_language_model_is_distilled_from_its_cache(kd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = ",".join(f"{key}: {value}" for key, value in LLAMA.items())
    arguments = [
        *("task=causal_lm", "~data", "+data._target_=tests.test_answers_cache.Trained", "hardware=cpu"),
        *("model@student=none", "student.surgery.layers=1", "model@teacher=transformers", "hardware.threads=1"),
        *("teacher.model.pretrained=false", f"teacher.model.config={{{inside}}}", "teacher.allow_random=true"),
        *("recipe.epochs=1", "recipe.batch_size=8", "loss=[ce,kd]"),
    ]
    values = {}
    for name, answers in (("live", []), ("kept", [f"{CACHED}, what: hidden}}"])):
        said = kd("train", *arguments, *answers, f"hydra.run.dir={name}")
        assert said.code == 0, said.err
        values[name] = json.loads((tmp_path / name / "result.json").read_text())
    assert values["kept"]["student"]["last"]["train"] == pytest.approx(
        values["live"]["student"]["last"]["train"], rel=1e-5
    )
    assert values["kept"]["teacher"]["digest"] == values["live"]["teacher"]["digest"]
    assert values["kept"]["teacher"]["test"] == values["live"]["teacher"]["test"]


class Trained(Known):
    """The same without a tokenizer, which its network would be saved with."""

    tokenizer = tokenizer_digest = None


def test_what_cannot_be_kept_is_refused_before_the_first_batch(kd, teacher_run: Path) -> None:
    base = [f"teacher.checkpoint={teacher_run}", "hardware=cpu", f"{CACHED}}}"]
    for more, words in (
        (["loss=[kd]", "data.augment.pad=1"], "data.augment changes it"),
        (["loss=[kd,hint]"], "loss.hint reads its intermediate tensors"),
        (["loss=[topk_kl]", "loss.topk_kl.temperature=2", "teacher.answers.k=4"], "temperature = 2.0 is not stored"),
    ):
        said = kd("train", *base, *more)
        assert said.code == 1
        assert words in said.err
    assert not Path("kept").exists()
