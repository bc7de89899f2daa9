"""Token ids on the disk, tokenizers that are trained, and the order of batches over epochs, resumes and ranks."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.data.content import Rows
from kd.data.text import store, tokenizer
from kd.data.text.collate import Special, padded, uniform, width_of
from kd.data.text.content import TextContent
from kd.data.text.encode import joined
from kd.data.text.loader import Form, Part, TextLoader
from kd.data.text.sentences import Sentences
from kd.data.text.store import Tokens

WORDS = ("card", "money", "bank", "pin", "transfer", "late", "lost", "help")
TEXTS = [f"{WORDS[i % 8]} number {i * 7 % 31}" for i in range(80)]
KEY = "0123abcd"


def tokens(rows: int = 10, seed: int = 0) -> Tokens:
    random = np.random.default_rng(seed)
    ids, offsets = joined([random.integers(5, 50, 1 + i % 7).tolist() for i in range(rows)])
    return Tokens(ids, offsets, supervised=ids % 2 == 0)


# ---------------------------------------------------------------------- the cache


def test_tokens_are_made_once_and_mapped_afterwards(tmp_path) -> None:
    made = tokens()
    first = store.cached(tmp_path, KEY, lambda: made, Tokens)
    again = store.cached(tmp_path, KEY, lambda: pytest.fail("tokenised again"), Tokens)
    for found in (first, again):
        assert isinstance(found.ids, np.memmap)
        assert np.array_equal(found.ids, made.ids)
        assert np.array_equal(found.offsets, made.offsets)
        assert np.array_equal(found.supervised, made.supervised)
        assert found.types is None
    assert [path.name for path in tmp_path.iterdir()] == [f"tokens-{KEY}"]


def shorter(place: Path) -> None:
    file = place / "ids.npy"
    file.write_bytes(file.read_bytes()[:-8])


def flipped(place: Path) -> None:
    data = bytearray((place / "ids.npy").read_bytes())
    data[-3] ^= 1
    (place / "ids.npy").write_bytes(data)


def pickled(place: Path) -> None:
    np.save(place / "ids.npy", np.array([print], dtype=object), allow_pickle=True)


def of_another_key(place: Path) -> None:
    about = json.loads((place / "about.json").read_text())
    (place / "about.json").write_text(json.dumps({**about, "key": "ffff"}))


def of_another_form(place: Path) -> None:
    about = json.loads((place / "about.json").read_text())
    (place / "about.json").write_text(json.dumps({**about, "form": 0}))


def with_unknown_arrays(place: Path) -> None:
    about = json.loads((place / "about.json").read_text())
    (place / "about.json").write_text(json.dumps({**about, "arrays": {**about["arrays"], "../ids": "0"}}))


def without_description(place: Path) -> None:
    (place / "about.json").unlink()


def half_a_description(place: Path) -> None:
    (place / "about.json").write_text((place / "about.json").read_text()[:20])


def a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("")


DAMAGES = [shorter, flipped, pickled, of_another_key, of_another_form, with_unknown_arrays, without_description]
DAMAGES += [half_a_description, a_file]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_never_used_but_made_anew(tmp_path, caplog, damage) -> None:
    made = tokens()
    store.cached(tmp_path, KEY, lambda: tokens(seed=1), Tokens)
    damage(tmp_path / f"tokens-{KEY}")
    with caplog.at_level(logging.WARNING):
        found = store.cached(tmp_path, KEY, lambda: made, Tokens)
    assert np.array_equal(found.ids, made.ids)
    assert f"tokens-{KEY} is not whole: the texts are tokenised anew" in caplog.text
    again = store.cached(tmp_path, KEY, lambda: pytest.fail("tokenised again"), Tokens)
    assert np.array_equal(again.ids, made.ids)
    assert len(list(tmp_path.iterdir())) == 1


def test_arrays_that_do_not_belong_together_are_not_used(tmp_path) -> None:
    made = tokens()
    store.write(Tokens(made.ids, made.offsets[:-1]), tmp_path / "tokens-a", "a")
    assert store.read(tmp_path / "tokens-a", "a", Tokens) is None


def test_where_nothing_can_be_written_tokens_stay_in_memory(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        found = store.cached(tmp_path / "file", KEY, tokens, Tokens)
    assert np.array_equal(found.ids, tokens().ids)
    assert "cannot be written" in caplog.text


def test_a_writer_that_dies_leaves_nothing_that_is_read(tmp_path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store, "_flush", full)
        store.cached(tmp_path, KEY, tokens, Tokens)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_several_processes_counts(tmp_path) -> None:
    """Each writes while the other has it already; readers of the first keep their arrays."""
    place = tmp_path / "tokens-a"
    store.write(tokens(), place, "a")
    first = store.read(place, "a", Tokens)
    store.write(tokens(seed=1), place, "a")
    assert first is not None
    assert np.array_equal(store.read(place, "a", Tokens).ids, first.ids)


def test_processes_that_tokenise_at_once_read_the_same(tmp_path) -> None:
    code = (
        "import sys, numpy as np; from kd.data.text import store; from pathlib import Path\n"
        "make = lambda: store.Tokens(np.arange(9, dtype=np.int32), np.array([0, 4, 9]))\n"
        "for i in range(20): assert store.cached(Path(sys.argv[1]), f'k{i}', make, store.Tokens).ids.sum() == 36"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {f"tokens-k{i}" for i in range(20)}


def sentences(tmp_path: Path, **options: Any) -> Sentences:
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    given = {"train": rows[:60], "test": rows[60:], "cache": str(tmp_path), "tokenizer": {"vocabulary": 100}}
    data = Sentences(**{**given, "overlap": "keep", **options})
    data.setup()
    return data


def test_what_decides_the_ids_is_in_the_name_of_the_cache(tmp_path) -> None:
    def caches() -> int:
        return len(list(tmp_path.glob("tokens-*")))

    sentences(tmp_path)
    assert caches() == 3
    sentences(tmp_path, batch_size=3, seed=5, split_seed=0, train_size=10)
    assert caches() == 3  # order and size change nothing
    sentences(tmp_path, max_length=5)
    assert caches() == 6
    sentences(tmp_path, tokenizer={"vocabulary": 90})
    assert caches() == 9


def test_how_a_tokenizer_cuts_and_types_is_in_the_name_of_the_cache(tmp_path) -> None:
    """Neither is in the digest that weights record: they are the same tokens."""
    made = tokenizer.trained(TEXTS, 100, "wordpiece", True)
    rows = [{"text": text, "pair": text[::-1], "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    found, digests = [], set()
    for side, types in (("right", True), ("left", True), ("right", False)):
        one = tokenizer.wrapped(made, types)
        one.truncation_side = side
        given = {"train": rows[:60], "test": rows[60:], "text_pair": "pair", "max_length": 8, "overlap": "keep"}
        data = Sentences(**given, cache=str(tmp_path), tokenizer=one)
        data.setup()
        found.append(data.parts["train"].tokens)
        digests.add(data.tokenizer_digest)
    right, left, plain = found
    assert len(digests) == 1
    assert not np.array_equal(right.ids, left.ids)
    assert right.types is not None
    assert plain.types is None


# ---------------------------------------------------------------------- tokenizers


def test_a_tokenizer_is_the_same_in_every_process() -> None:
    """The trainer of ``tokenizers`` alone is not, for WordPiece: it goes through a hash map."""
    code = (
        "import hashlib, json, sys; from kd.data.text.tokenizer import trained\n"
        "for kind in ('wordpiece', 'bpe'):\n"
        "    print(hashlib.md5(trained(json.loads(sys.argv[1]), 300, kind, True).to_str().encode()).hexdigest())"
    )
    command = [sys.executable, "-c", code, json.dumps(TEXTS)]
    said = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(said) == 1


@pytest.mark.parametrize(("kind", "lowercase"), [("wordpiece", True), ("wordpiece", False), ("bpe", False)])
def test_a_trained_tokenizer_reads_and_writes_texts(kind, lowercase) -> None:
    texts = [*TEXTS, "Caf\xe9 \u4f60\u597d!"] if kind == "bpe" else TEXTS
    found, _ = tokenizer.tokenizer(
        {"vocabulary": 320, "kind": kind, "lowercase": lowercase}, "bpe", lambda: texts, None, None
    )
    assert len(found) <= 320
    assert sorted(found.get_vocab().values()) == list(range(len(found)))
    for text in texts[-8:]:
        ids = found(text)["input_ids"]
        assert (ids[0], ids[-1]) == (found.cls_token_id, found.sep_token_id)
        assert found.unk_token_id not in ids
        assert found.decode(ids, skip_special_tokens=True) == text
    assert (found.pad_token_id, found.mask_token_id, found.eos_token_id) == (0, 4, 3)


def test_a_saved_tokenizer_is_the_same_one(tmp_path) -> None:
    data = sentences(tmp_path / "cache")
    data.tokenizer.save_pretrained(tmp_path / "saved")
    again = sentences(tmp_path / "cache", tokenizer=str(tmp_path / "saved"))
    assert again.tokenizer_digest == data.tokenizer_digest
    assert again.tokenizer(TEXTS)["input_ids"] == data.tokenizer(TEXTS)["input_ids"]


def test_a_trained_tokenizer_is_kept_and_a_damaged_one_trained_anew(tmp_path, monkeypatch) -> None:
    made = tokenizer.trained(TEXTS, 100, "wordpiece", True, tmp_path)
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, "_wordpiece", lambda *_: pytest.fail("trained again"))
        assert tokenizer.trained(TEXTS, 100, "wordpiece", True, tmp_path).to_str() == made.to_str()
    kept = json.loads(file.read_text())
    for damaged in (json.dumps(kept)[:-9], json.dumps({**kept, "key": "0"}), json.dumps({**kept, "digest": "0"}), "3"):
        file.write_text(damaged)
        assert tokenizer.trained(TEXTS, 100, "wordpiece", True, tmp_path).to_str() == made.to_str()
        assert json.loads(file.read_text()) == kept


# ---------------------------------------------------------------------- batches


SPECIAL = Special(pad=0, mask=4, every=np.arange(5), ordinary=np.arange(5, 50))


def loader(rows: int = 70, batch_size: int = 4, form: Form | None = None, **options: Any) -> TextLoader:
    data = tokens(rows)
    begin, end = data.offsets[:-1], data.offsets[1:]
    content = Rows(TextContent(["x"] * rows, "x"), torch.arange(rows))
    part = Part(data, begin, end, torch.arange(rows) % 3, torch.arange(rows) + 100, content)
    given = {"bucketing": True, "split": "train", "train": True, "shuffle": True, "seed": 0, **options}
    return TextLoader(part, batch_size, form or Form(SPECIAL), **given)


def indices(found: TextLoader) -> list[list[int]]:
    return [batch.index.tolist() for batch in found]


def test_an_epoch_has_every_row_once_and_another_order_than_the_last(monkeypatch) -> None:
    monkeypatch.setattr("kd.data.text.loader.GROUP", 5)
    data = loader()
    first = indices(data)
    assert sorted(chain(*first)) == list(range(100, 170))
    assert indices(data) == first
    data.set_epoch(1)
    assert indices(data) != first
    assert {frozenset(b) for b in indices(data)} != {frozenset(b) for b in first}
    assert len(data) == len(first) == 18


def test_rows_of_a_batch_are_about_as_long_as_one_another() -> None:
    def pads(**options: Any) -> int:
        return sum(int((~batch.mask).sum()) for batch in loader(700, 10, **options))

    assert pads() < 0.1 * pads(bucketing=False)


def test_a_resume_in_the_middle_goes_on_as_if_nothing_had_happened() -> None:
    whole = loader(form=Form(SPECIAL, "masked", 0.3))
    whole.set_epoch(2)
    wanted = list(whole)
    begun = loader(form=Form(SPECIAL, "masked", 0.3))
    begun.set_epoch(2)
    iterator = iter(begun)
    for _ in range(7):
        next(iterator)
    resumed = loader(form=Form(SPECIAL, "masked", 0.3))
    resumed.load_state_dict(begun.state_dict())
    resumed.set_epoch(2)
    rest = list(resumed)
    assert len(rest) == len(wanted) - 7
    for one, other in zip(rest, wanted[7:], strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("bucketing", [False, True])
def test_batches_of_two_ranks_together_are_those_of_one(bucketing, drop_last) -> None:
    options = {"bucketing": bucketing, "drop_last": drop_last}
    whole = indices(loader(batch_size=8, **options))
    ranks = [indices(loader(batch_size=4, rank=r, world_size=2, **options)) for r in range(2)]
    assert [len(rank) for rank in ranks] == [len(whole)] * 2 == [8 if drop_last else 9] * 2
    for wanted, *parts in zip(whole, *ranks, strict=True):
        assert sorted(chain(*parts)) == sorted(wanted)
        assert abs(len(parts[0]) - len(parts[1])) <= 1


def test_each_rank_takes_equally_many_steps_though_rows_are_left_over_for_one() -> None:
    ranks = [indices(loader(33, 4, rank=r, world_size=2)) for r in range(2)]
    assert [len(rank) for rank in ranks] == [5, 5]
    assert sorted(chain(*ranks[0], *ranks[1])) == list(range(100, 133))


def test_val_and_test_are_in_order() -> None:
    data = loader(train=False, shuffle=False, split="val", batch_size=30)
    assert list(chain(*indices(data))) == list(range(100, 170))


def test_positions_are_a_multiple_but_never_more_than_there_are() -> None:
    assert width_of(np.array([3, 5]), 8, None) == 8
    assert width_of(np.array([3, 5]), 8, 6) == 6
    assert width_of(np.array([3, 9]), 8, 16) == 16
    data = loader(form=Form(SPECIAL, multiple=4, most=6))
    assert {batch.inputs["input_ids"].shape[1] for batch in data} <= {4, 6, 7}


def test_padding_gathers_each_row() -> None:
    flat = np.arange(10)
    found = padded(flat, np.array([0, 3, 9]), np.array([3, 0, 1]), 3, -5)
    assert found.tolist() == [[0, 1, 2], [-5, -5, -5], [9, -5, -5]]


def test_numbers_of_rows_are_uniform_and_their_own() -> None:
    found = uniform(7, np.arange(400), 50, 0)
    assert found.mean() == pytest.approx(0.5, abs=0.01)
    assert found.var() == pytest.approx(1 / 12, abs=0.002)
    assert np.array_equal(found[13:14], uniform(7, np.array([13]), 50, 0))
    others = [
        uniform(8, np.arange(400), 50, 0),
        uniform(7, np.arange(400), 50, 1),
        np.roll(found, 1, 0),
        np.roll(found, 1),
    ]
    for other in others:
        assert abs(np.corrcoef(found.ravel(), other.ravel())[0, 1]) < 0.03
