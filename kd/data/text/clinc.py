"""CLINC150: Larson et al., An Evaluation Dataset for Intent Classification, EMNLP 2019, 1909.02027."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd.data.text.records import Records, decoded, located
from kd.data.text.sentences import Sentences
from kd.errors import KdError


class Clinc(Sentences):
    """The 150 intents of ``file``, split as published: 15,000, 3,000 and 4,500 queries.

    The out-of-scope queries (``oos_train``, ``oos_val``, ``oos_test``) are left out: they belong to no class.
    """

    def __init__(self, *, file: str = "clinc150/data_full.json", **common: Any) -> None:
        super().__init__(**common)
        self.file = file

    def load(self) -> dict[str, Records]:
        """Read the file. ``KdError`` when it is not there, or another one."""
        path = located(self.file, self.root, "file")
        try:
            found = json.loads(decoded(path, self.encoding))
            return {split: self._records(found[split], path, split) for split in ("train", "val", "test")}
        except (ValueError, KeyError, TypeError):
            raise KdError(f"{path} is not CLINC150's data_full.json: it must hold train, val and test") from None

    @staticmethod
    def _records(rows: list[list[str]], path: Path, split: str) -> Records:
        return Records({"text": [text for text, _ in rows], "label": [label for _, label in rows]}, f"{path} ({split})")
