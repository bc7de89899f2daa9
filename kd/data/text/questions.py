"""Questions on texts whose answers are parts of these texts (SQuAD, arXiv 1606.05250 and 1806.03822)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from kd.config.rules import refusals, refuse, whole
from kd.data.content import Rows
from kd.data.images.loader import Loader
from kd.data.split import stratified
from kd.data.text import store
from kd.data.text.base import TextModule
from kd.data.text.content import TextContent, digest_of, normalised
from kd.data.text.loader import Form
from kd.data.text.options import RULES
from kd.data.text.records import Records, of_articles, read
from kd.data.text.split import apart, carve
from kd.data.text.store import Tokens
from kd.data.text.tokenizer import encoding_digest
from kd.data.text.windows import Answer, Question, WindowLoader, WindowPart, Windows, special_tokens, windows_of
from kd.errors import KdError, counted

log = logging.getLogger(__name__)


class Questions(TextModule):
    """Windows of questions and contexts, with the positions of the answers; for ``task=question_answering``.

    ``question``, ``context``, ``answers``: columns; the last one has ``{text: […], answer_start: […]}`` (characters,
    from 0), a list of such mappings with one answer each, or either of them as JSON. The first answer is the target,
    any of them is right. A file with the articles and paragraphs of SQuAD's own ``.json`` needs no columns
    ``unanswerable``: whether a question may have no answer (SQuAD 2.0)
    ``max_length``: tokens of a window; ``stride``: tokens of the context from the beginning of a window to that of the
    next one (BERT's doc_stride); ``question_length``: tokens of a question, longer ones are truncated
    ``overlap``: what becomes of questions of train that are in val or test on the same context (of val: in test):
    ``remove`` them, ``keep`` them, or ``refuse``. What is cut has contexts of its own

    A row is a window, and ``index`` its number in its split: see :class:`kd.data.text.windows.WindowLoader`. At most
    ``train_size`` *questions* are trained on. ``num_classes`` is ``max_length``. Raises ``KdError`` for an answer that
    is not in its context at its place, and for a tokenizer that is not fast: no other knows the characters of a token.
    """

    def __init__(
        self,
        *,
        question: str = "question",
        context: str = "context",
        answers: str = "answers",
        unanswerable: bool = False,
        max_length: int = 384,
        stride: int = 128,
        question_length: int = 64,
        overlap: str = "remove",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        refuse(refusals("data.", locals(), {**RULES, "max_length": whole(2)}))
        if self.masking is not None:
            raise KdError(f"data.masking = {self.masking} is not allowed with questions: set it to null")
        self.columns = {"question": question, "context": context, "answers": answers}
        self.unanswerable, self.overlap = unanswerable, overlap
        self.max_length, self.stride, self.question_length = max_length, stride, question_length
        self._sources: dict[str, Records] = {}  # split → what its rows are called by, without the rows

    def build(self) -> dict[str, Any]:
        """Read, split and tokenise."""
        if self.given["train"] is None:
            raise KdError("data.train = null is not allowed: it must be a file, .jsonl, .parquet or .csv")
        splits = self._apart(self._divided({s: self._read(s) for s, given in self.given.items() if given is not None}))
        splits["train"] = self._fewer(splits["train"])
        words = [one for question in splits["train"] for one in (question.text, question.context)]
        words = list(dict.fromkeys(words))  # a context has many questions
        self.load_tokenizer(words, self.max_length, "max_length")
        self.restrict_vocabulary(words)
        self._check_tokenizer()
        with_types = "token_type_ids" in self.tokenizer.model_input_names
        self.form = Form(self.special, most=self.most, multiple=self.multiple, types=with_types)
        self.num_classes = self.max_length
        return {split: self._part(split, splits[split]) for split in ("train", "val", "test")}

    # ------------------------------------------------------------------ reading

    def _read(self, split: str) -> list[Question]:
        """Read the questions of a source. ``KdError`` for what is no question, context or answer."""
        found = read(self.given[split], self.root, self.encoding, split, self.delimiter)
        if "paragraphs" in found.columns and self.columns["context"] not in found.columns:
            found = of_articles(found, self.columns)
        self._sources[split] = replace(found, columns={})
        texts = [self._texts(found, key) for key in ("question", "context")]
        answers = found.column(self.columns["answers"], "answers")
        rows = zip(*texts, answers, strict=True)
        return [
            Question(text, context, self._answers(value, context, found.row(row)), row)
            for row, (text, context, value) in enumerate(rows)
        ]

    def _texts(self, found: Records, key: str) -> list[str]:
        name = self.columns[key]
        values = found.column(name, key)
        wrong = next((i for i, value in enumerate(values) if not isinstance(value, str) or not value.strip()), None)
        if wrong is not None:
            raise KdError(
                f"{found.row(wrong)}: data.{key} = {name} must be a text that is not empty, it is {values[wrong]!r}"
            )
        return values

    def _answers(self, value: Any, context: str, where: str) -> list[Answer]:
        answers = _pairs(value, self.columns["answers"], where)
        if not answers and not self.unanswerable:
            raise KdError(
                f"{where} has no answer: set data.unanswerable=true where questions may have none (SQuAD 2.0)"
            )
        for text, begin in answers:
            if not text.strip() or begin < 0 or context[begin : begin + len(text)] != text:
                there = context[max(0, begin) : max(0, begin) + len(text)]
                raise KdError(
                    f"{where}: the answer {text!r} is not in its context at answer_start = {begin}: {there!r} is there"
                )
        return answers

    # ------------------------------------------------------------------ splits

    def _divided(self, splits: dict[str, list[Question]]) -> dict[str, list[Question]]:
        """Describe what was read, and cut what is not given."""
        keys = {split: TextContent(_keys(rows), f"question of {split},") for split, rows in splits.items()}
        self.describe(keys, digest_of([str(question) for rows in splits.values() for question in rows]).encode())
        if "test" not in splits and not self.test_fraction:
            raise KdError("there is no test set: set data.test, or cut it from train with data.test_fraction=0.2")
        if "test" in splits and self.test_fraction:
            raise KdError(f"data.test_fraction = {self.test_fraction} is not allowed: there is a test set")
        for name in ("test", "val"):
            if name not in splits:
                splits = {**splits, **self._cut(splits["train"], name)}
        return splits

    def _cut(self, train: list[Question], name: str) -> dict[str, list[Question]]:
        """Cut contexts with all of their questions."""
        contexts = list(dict.fromkeys(question.context for question in train))
        fraction, keys = getattr(self, f"{name}_fraction"), [normalised(context) for context in contexts]
        none = torch.zeros(len(contexts), dtype=torch.int64)
        chosen, rest = carve(keys, none, fraction, self.split_seed, name)
        if not len(chosen) or not len(rest):
            left = "none to train on" if len(chosen) else f"no question for {name}"
            raise KdError(
                f"data.{name}_fraction = {fraction} leaves {left}: there are {counted(len(contexts), 'context')}"
            )
        moved = {contexts[i] for i in chosen.tolist()}
        parts: dict[str, list[Question]] = {name: [], "train": []}
        for question in train:
            parts[name if question.context in moved else "train"].append(question)
        return parts

    def _apart(self, splits: dict[str, list[Question]]) -> dict[str, list[Question]]:
        """Take out questions that are in two splits on the same context."""
        kept = apart({split: _keys(rows) for split, rows in splits.items()}, self.overlap, "questions")
        if lost := next((split for split, rows in kept.items() if not rows), None):
            raise KdError(f"data.overlap = remove leaves no question of {lost}: all are in another split as well")
        return {split: [rows[i] for i in kept[split]] for split, rows in splits.items()}

    def _fewer(self, train: list[Question]) -> list[Question]:
        """Return no more than ``train_size`` questions."""
        if self.train_size is None:
            return train
        if self.train_size > len(train):
            raise KdError(
                f"data.train_size = {self.train_size} is not allowed: there are {len(train):,} training questions"
            )
        none = torch.zeros(len(train), dtype=torch.int64)
        return [train[i] for i in stratified(none, self.train_size, self.seed, "train_size")[0].tolist()]

    # ------------------------------------------------------------------ tokens

    def _check_tokenizer(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise KdError(
                f"data.tokenizer is a {type(self.tokenizer).__name__}, which does not say which characters a token "
                "stands for: questions need a fast one (with a tokenizer.json)"
            )
        special = special_tokens(self.tokenizer)
        room = self.max_length - self.question_length - special
        if self.stride > room:
            raise KdError(
                f"data.stride = {self.stride} is not allowed: data.max_length = {self.max_length} leaves "
                f"{max(0, room)} tokens of the context beside data.question_length = {self.question_length} and "
                f"{special} special ones, and windows must not leave any out"
            )

    def _part(self, split: str, questions: list[Question]) -> WindowPart:
        settings = (self.max_length, self.stride, self.question_length)
        characters = split != "train"
        key = digest_of([str(question) for question in questions], "windows 1", *settings, characters)

        def make() -> Windows:
            source = self._sources[split if split in self._sources else "train"]  # val or test is cut from train
            return windows_of(self.tokenizer, questions, *settings, source.row, characters)

        whole = encoding_digest(self.tokenizer, self.tokenizer_digest)
        windows = store.cached(self.cache, f"{key}-{whole}", make, Windows)
        asked = [(question.context, [text for text, _ in question.answers]) for question in questions]
        return WindowPart(
            tokens=Tokens(windows.ids, windows.offsets, windows.types),
            begin=windows.offsets[:-1],
            end=windows.offsets[1:],
            targets=torch.from_numpy(windows.targets.copy()),
            index=torch.arange(len(windows)),
            rows=Rows(TextContent(_keys(questions), f"question of {split},"), torch.arange(len(questions))),
            blocks=True,
            windows=windows,
            asked=asked,
            unanswerable=self.unanswerable,
        )

    # ------------------------------------------------------------------ what a run needs

    @property
    def sizes(self) -> dict[str, int]:
        """Windows in train, val and test, and ``labelled``: all of train have a target."""
        self.setup()
        return {**{split: len(part) for split, part in self.parts.items()}, "labelled": len(self.parts["train"])}

    @property
    def train_targets(self) -> None:
        """No class a row: the targets are positions."""
        return None

    def make_loader(self, split: str, **options: Any) -> Loader:
        """Make the loader of one split."""
        return WindowLoader(self.parts[split], form=self.form, bucketing=self.bucketing, split=split, **options)


def _keys(questions: Sequence[Question]) -> list[str]:
    """Return what questions are compared by."""
    return [f"{normalised(question.text)}\x1f{normalised(question.context)}" for question in questions]


def _pairs(value: Any, column: str, where: str) -> list[Answer]:
    """Read the answers of a cell: texts, and the characters that they begin at."""
    try:
        found = json.loads(value) if isinstance(value, str) and value.strip() else value
        if found is None or isinstance(found, str):
            return []
        if isinstance(found, Mapping):
            found = [{"text": found["text"], "answer_start": found["answer_start"]}]
        pairs: list[Answer] = []
        for one in found:
            texts, begins = one["text"], one["answer_start"]
            listed = not isinstance(texts, str)
            pairs += zip(texts if listed else [texts], begins if listed else [begins], strict=True)
        if not all(isinstance(text, str) and type(begin) is int for text, begin in pairs):
            raise TypeError
        return pairs
    except (ValueError, KeyError, TypeError):
        raise KdError(
            f"{where}: data.answers = {column} must be {{text: [TEXT, …], answer_start: [CHARACTER, …]}}, it is "
            f"{str(value)[:80]}"
        ) from None
