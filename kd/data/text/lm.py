"""Documents for language modelling: blocks of tokens, or a document a row; prompts with completions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kd.config.rules import refusals, refuse, shown
from kd.data.content import Rows
from kd.data.text import teacher_tokens
from kd.data.text.base import TextModule
from kd.data.text.content import TextContent, digest_of, normalised
from kd.data.text.dialogues import Dialogue, answers_of, dialogues
from kd.data.text.documents import cut_the_end, long_lines, read_documents, text_files
from kd.data.text.encode import around, between, encode_documents, encode_spans, predicted
from kd.data.text.loader import Form, Part, part_of
from kd.data.text.options import RULES, plain
from kd.data.text.records import Records
from kd.data.text.split import apart, carve
from kd.data.text.store import Tokens
from kd.data.text.teacher_tokens import AsTeacherSees, TeacherTokenizer
from kd.errors import KdError, counted
from kd.losses.base import UNLABELLED

log = logging.getLogger(__name__)

Rendered = list[str] | list[Dialogue]


class Documents(TextModule):
    """Texts whose tokens are predicted: the next ones, or with ``masking`` those that are masked.

    Plain text files (.txt), or tables with a column ``text``, ``prompt`` and ``completion``, or ``messages``; of the
    latter two only the completions, or what the assistant says, are targets.

    ``document``: what a document is in a text file: the ``file``, a ``line``, or a ``paragraph`` between empty lines
    ``length``: positions of a row; null: what the tokenizer's networks take
    ``packing``: documents one after the other, with the end token between them, in blocks of ``length``; false: a row
    each, truncated. Null: true for documents, false for prompts and dialogues. Blocks overlap by one token, so that
    each token but the first one is predicted once; with ``masking`` they do not, and each has the special tokens
    ``separate_documents``: positions restart with each document in a block, and none sees another: ``position_ids``
    (B, L) and an ``attention_mask`` (B, 1, L, L), as transformers' decoders take them
    ``overlap``: what becomes of documents of train that are in val or test too (of val: in test): ``remove`` them,
    ``keep`` them, or ``refuse``. Of files their lines are compared, and what is found is said
    ``teacher_tokenizer``: name or folder of the teacher's own, or an object, for losses that compare two tokenizers; a
    row is then the same text in both, cut where a token of both ends, of ``length`` tokens or fewer on either side.
    Null, or the student's vocabulary: one tokenizer (``kd train`` finds that of the teacher, where it differs)

    What is cut (val, where there is none, from train; test from val, or from train where there is no val) is of
    files the end, at a line, of lines, paragraphs and rows a random choice. Targets are (B, L) int64, the ids
    themselves at the positions they stand at (the task shifts them), UNLABELLED at pads and in prompts.
    ``num_classes`` is the size of the vocabulary, ``index`` the number of the row in its split.
    """

    tokenizer_kind = "bpe"

    def __init__(
        self,
        *,
        document: str = "file",
        length: int | None = 128,
        packing: bool | None = None,
        separate_documents: bool = False,
        overlap: str = "remove",
        teacher_tokenizer: Any = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        rules = {**RULES, "packing": RULES["packing"].or_null}
        refuse(refusals("data.", locals(), rules))
        self.document, self.length, self.packing = document, length, packing
        self.separate, self.overlap = separate_documents, overlap
        if self.separate and self.masking is not None:
            raise KdError("data.separate_documents = true is not allowed with data.masking: set data.packing=false")
        self.teacher_spec: Any = teacher_tokenizer
        self.own_of_teacher: TeacherTokenizer | None = None
        if teacher_tokenizer is not None and self.masking is not None:
            raise KdError("data.teacher_tokenizer is not allowed with data.masking: set one of them to null")

    # ------------------------------------------------------------------ reading

    def build(self) -> dict[str, Part]:
        """Read, split and tokenise."""
        if self.given["train"] is None:
            raise KdError("data.train = null is not allowed: it must be a text file, or a list of them, or .jsonl")
        read_in = {split: self._read(source, split) for split, source in self.given.items() if source is not None}
        given = [source for source in self.given.values() if source is not None]
        self.of_files = self.document == "file" and all(text_files(source) for source in given)
        tables = [split for split, found in read_in.items() if isinstance(found, Records)]
        documents = {split: self._rows(found) for split, found in read_in.items()}
        if tables and len(tables) < len(read_in):
            raise KdError(f"data.{tables[0]} holds prompts, another split holds documents: give one of both")
        if tables and self.masking is not None:
            raise KdError(f"data.masking = {self.masking} is for documents, data.{tables[0]} holds prompts")
        keys = {f: TextContent(self._lines(rows), f"line of {f}") for f, rows in documents.items()}
        self.describe(keys, digest_of([_text(row) for rows in documents.values() for row in rows]).encode())
        documents = self._apart(self._split(documents))
        return self._parts(documents, dialogue=bool(tables))

    def _read(self, source: Any, split: str) -> list[str] | Records:
        """Read documents, without empty ones; records where there are prompts or messages."""
        found, where = read_documents(source, self.document, self.root, self.encoding, split, self.delimiter)
        if isinstance(found, Records):
            return found
        kept = [document for document in found if document.strip()]
        if not kept:
            raise KdError(f"{where} is empty")
        if len(kept) < len(found):
            log.warning("%s: %s of %s documents are empty and left out", where, len(found) - len(kept), len(found))
        return kept

    def _rows(self, found: list[str] | Records) -> Rendered:
        """Return documents as they are; dialogues as texts, for which the tokenizer must be there."""
        if not isinstance(found, Records):
            return found
        if isinstance(self.spec, Mapping) or self.spec is None:
            return dialogues(found, None)
        self._load_tokenizers([])
        rows = dialogues(found, self.tokenizer)
        if self.own_of_teacher is None:
            return rows
        others = dialogues(found, self.own_of_teacher.tokenizer)
        return [row._replace(teacher=other) for row, other in zip(rows, others, strict=True)]

    def _load_tokenizers(self, texts: list[str]) -> None:
        """Make the tokenizer, once, and the teacher's where it is another one."""
        if hasattr(self, "tokenizer"):
            return
        self.load_tokenizer(texts, self.length, "length")
        if self.teacher_spec is not None:
            self.own_of_teacher = teacher_tokens.teacher_tokenizer(
                self.teacher_spec, self.tokenizer, self.root, self.length
            )

    def encoded(self, split: str, source: Any = None) -> tuple[Records, list[Dialogue], Tokens]:
        """Return prompts with completions, or messages, as they lie in a file, as texts, and in tokens.

        ``source``: as ``train``; None: what was given for ``split``. Nothing is left out or truncated. ``KdError``
        where it holds documents.
        """
        self.setup()
        source = self.given[split] if source is None else plain(source)
        records = self._read(source, split)
        if not isinstance(records, Records):
            raise KdError(f"data.{split} = {shown(source)} holds documents, and no prompts with completions")
        rows: Any = self._rows(records)
        return records, rows, self._tokens(rows, False, self.tokenizer, self.tokenizer_digest)

    @property
    def for_teacher(self) -> Any:
        """This data with the teacher's tokenizer, or itself where the teacher has none of its own."""
        return self if self.own_of_teacher is None else AsTeacherSees(self, self.own_of_teacher)

    # ------------------------------------------------------------------ splits

    def _split(self, documents: dict[str, Rendered]) -> dict[str, Rendered]:
        """Cut what is not given."""
        if "test" not in documents and not self.test_fraction:
            raise KdError(
                "there is no test set: set data.test, or cut it from val or train with data.test_fraction=0.5"
            )
        if "test" in documents and self.test_fraction:
            raise KdError(f"data.test_fraction = {self.test_fraction} is not allowed: there is a test set")
        documents = dict(documents)
        if "test" not in documents:
            source = "val" if "val" in documents else "train"
            documents["test"], documents[source] = self._cut(documents[source], "test")
        if "val" not in documents:
            documents["val"], documents["train"] = self._cut(documents["train"], "val")
        return documents

    def _cut(self, rows: Rendered, name: str) -> tuple[Any, Any]:
        """Return the new split and what stays."""
        fraction = getattr(self, f"{name}_fraction")
        if self.of_files:
            return cut_the_end([_text(row) for row in rows], fraction, name)
        keys = [normalised(_text(row)) for row in rows]
        chosen, rest = carve(keys, torch.zeros(len(rows), dtype=torch.int64), fraction, self.split_seed, name)
        if not len(chosen) or not len(rest):
            left = "none to train on" if len(chosen) else f"none for {name}"
            way = " (blank lines divide them: data.document=line)" if self.document == "paragraph" else ""
            raise KdError(
                f"data.{name}_fraction = {fraction} leaves {left}, of {counted(len(rows), 'document')} in all{way}"
            )
        return [rows[i] for i in chosen.tolist()], [rows[i] for i in rest.tolist()]

    def _apart(self, documents: dict[str, Rendered]) -> dict[str, Rendered]:
        """Take out documents that are in two splits; of files say how many lines are."""
        if self.of_files:
            overlap = "keep" if self.overlap == "remove" else self.overlap
            apart({split: self._lines(rows) for split, rows in documents.items()}, overlap, "lines")
            return documents
        kept = apart({s: [normalised(_text(row)) for row in rows] for s, rows in documents.items()}, self.overlap)
        if lost := next((split for split, rows in kept.items() if not rows), None):
            raise KdError(f"data.overlap = remove leaves nothing of {lost}: all of it is in another split as well")
        left: dict[str, Any] = {split: [rows[i] for i in kept[split]] for split, rows in documents.items()}
        return left

    def _lines(self, rows: Rendered) -> list[str]:
        """Return what documents are compared by: of files their lines, else the whole."""
        texts = [_text(row) for row in rows]
        return long_lines(texts) if self.of_files else [normalised(text) for text in texts]

    # ------------------------------------------------------------------ tokens

    def _parts(self, documents: dict[str, Rendered], dialogue: bool) -> dict[str, Part]:
        self._load_tokenizers([_text(row) for row in documents["train"]])
        self.restrict_vocabulary([_text(row) for row in documents["train"]])
        if (own := self.own_of_teacher) and teacher_tokens.same_vocabulary(self.tokenizer, own.tokenizer):
            self.own_of_teacher = None  # it is restricted to the same entries
        if self.most is None:
            raise KdError("data.length = null is not allowed: the tokenizer does not say how much its networks take")
        packing = (not dialogue) if self.packing is None else self.packing
        self.form = self._form(packing)
        self.num_classes = len(self.tokenizer)
        parts = {}
        for split in ("train", "val", "test"):
            rows = documents[split]
            lines = TextContent(self._lines(rows), f"line of {split}")
            tokens = self._tokens(rows, packing, self.tokenizer, self.tokenizer_digest)
            make = self._blocks if self.own_of_teacher is None else self._together
            parts[split] = make(rows, tokens, lines, packing, split)
        return {**parts, "train": self.shrunk(parts["train"])}

    def _form(self, packing: bool) -> Form:
        most, own = self.most, self.own_of_teacher
        if self.masking is None:
            form = Form(self.special, "next", apart=self.separate and packing, most=most, multiple=self.multiple)
            if own is None:
                return form
            return replace(form, teacher=replace(form, special=own.special), matched=own.matched_to(self.tokenizer))
        before, after = map(tuple, around(self.tokenizer))
        if most is not None and most <= len(before) + len(after):
            raise KdError(f"data.length = {most} is not allowed: the tokenizer adds {len(before) + len(after)} tokens")
        return Form(self.special, "masked", self.masking, before, after, most=most, multiple=self.multiple)

    def _tokens(self, rows: Rendered, packing: bool, tokenizer: Any, digest: str) -> Tokens:
        found = [row for row in rows if isinstance(row, Dialogue)]
        texts = [_text(row) for row in rows]
        if found:
            ends = [row.ends and tokenizer.eos_token_id is not None for row in found]
            begins = [row.begins for row in found]
            spans = [row.spans for row in found]
            key = digest_of(texts, "dialogues 3", digest_of([str(spans), str(begins), str(ends)]))
            return self.tokens(key, lambda: encode_spans(tokenizer, texts, spans, begins, ends), digest)
        before, after = between(tokenizer, self.masking is not None, packing)
        key = digest_of(texts, "documents 2", before, after)
        return self.tokens(key, lambda: encode_documents(tokenizer, texts, before, after), digest)

    def _blocks(self, texts: Rendered, tokens: Tokens, lines: TextContent, packing: bool, split: str) -> Part:
        """Cut the stream of tokens into rows: blocks of it, or a document each."""
        assert self.most is not None
        length = self.most - len(self.form.before) - len(self.form.after)
        step = length if self.masking is not None else length - 1  # the first token of a block is not predicted
        if packing:
            total = len(tokens.ids)
            begin = np.arange(0, max(1, total - (length - step)), step)
            end = np.minimum(begin + length, total)
        else:
            begin, whole = np.asarray(tokens.offsets[:-1]), np.asarray(tokens.offsets[1:])
            end = np.minimum(whole, begin + length)
            self._say_cut(int((whole > end).sum()), len(begin), split)
        return self._part([(tokens, begin, end)], lines, split)[0]

    def _together(self, texts: Rendered, tokens: Tokens, lines: TextContent, packing: bool, split: str) -> Part:
        """Do as :meth:`_blocks` in the tokens of both tokenizers: each row has the same text in both."""
        assert self.most is not None
        assert self.own_of_teacher is not None
        own = self.own_of_teacher
        others: Any = [row.teacher or row if isinstance(row, Dialogue) else row for row in texts]
        streams = [tokens, self._tokens(others, packing, own.tokenizer, own.digest)]
        sides = zip((texts, others), streams, (self.tokenizer, own.tokenizer), strict=True)
        ends = [
            teacher_tokens.ends_of(stream, *answers_of(rows, tokenizer, packing)) for rows, stream, tokenizer in sides
        ]
        if packing:
            *rows_of, lost = teacher_tokens.blocks_together(ends[0], ends[1], self.most)
            if lost:
                log.warning("%s pieces of %s fit no row of both tokenizers and are left out", f"{lost:,}", split)
        else:
            offsets = zip((stream.offsets for stream in streams), ends, strict=True)
            *rows_of, cut = teacher_tokens.cut_together(list(offsets), self.most)
            self._say_cut(cut, len(texts), split)
        made = self._part([(s, *where) for s, where in zip(streams, rows_of, strict=True)], lines, split)
        student, teacher = (replace(part, ends=places) for part, places in zip(made, ends, strict=True))
        return replace(student, teacher=teacher)

    def _say_cut(self, cut: int, count: int, split: str) -> None:
        if cut:
            log.warning(
                "%s of %s rows of %s are longer than data.length = %s tokens and truncated",
                *(f"{cut:,}", f"{count:,}", split, self.most),
            )

    def _part(self, sides: list[tuple[Tokens, np.ndarray, np.ndarray]], lines: TextContent, split: str) -> list[Part]:
        """Make parts of rows [begin, end) of one or two streams of tokens, those with a token to predict in each."""
        counts = [predicted(*side, self.masking is not None) for side in sides]
        kept = np.flatnonzero(np.min(counts, axis=0) > 0)
        if not len(kept):
            raise KdError(f"{split} has no row with a token to predict: set a larger data.length than {self.most}")
        if len(kept) < len(counts[0]):
            lost = f"{len(counts[0]) - len(kept):,} of {len(counts[0]):,}"
            log.warning("%s rows of %s have no token to predict and are left out", lost, split)
        none, rows = torch.full((len(kept),), UNLABELLED), Rows(lines, torch.arange(len(lines)))
        return [
            replace(part_of(tokens, none, torch.from_numpy(kept), rows), begin=begin[kept], end=end[kept], blocks=True)
            for tokens, begin, end in sides
        ]


def _text(row: str | Dialogue) -> str:
    return row if isinstance(row, str) else row.text
