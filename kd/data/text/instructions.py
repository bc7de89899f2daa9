"""Instructions with answers in columns of their own, as Dolly has them (Conover et al., Databricks 2023)."""

from __future__ import annotations

from typing import Any

from kd.data.text.lm import Documents
from kd.data.text.records import Records


class Instructions(Documents):
    """Answers to instructions: the answer alone is to be predicted.

    ``instruction``, ``context``, ``response``: columns; ``context`` null, or an empty one: the instruction has none.
    ``preamble``: a text before every instruction; null: none. Each row becomes a prompt, with the headings that the
    instruction sets have in common (Taori et al., Alpaca, 2023), and its completion.

    A table with other columns (``prompt`` and ``completion``, ``messages``) is read as :class:`Documents` does.
    """

    def __init__(
        self,
        *,
        instruction: str = "instruction",
        context: str | None = "context",
        response: str = "response",
        preamble: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.names: dict[str, str | None] = {"instruction": instruction, "context": context, "response": response}
        self.preamble = preamble

    def _read(self, source: Any, split: str) -> list[str] | Records:
        """Read prompts and completions of a table with these columns. ``KdError`` where one of them is missing."""
        found = super()._read(source, split)
        if not isinstance(found, Records) or "messages" in found.columns or "completion" in found.columns:
            return found
        columns = {key: found.column(name, key) for key, name in self.names.items() if name is not None}
        contexts = columns.get("context") or [None] * len(found)
        prompts = [self._prompt(one, two) for one, two in zip(columns["instruction"], contexts, strict=True)]
        completions = [(text or "").strip() for text in columns["response"]]
        return Records({"prompt": prompts, "completion": completions}, found.where, files=found.files)

    def _prompt(self, instruction: str, context: str | None) -> str:
        """Write one instruction as a text that its answer follows."""
        given = (context or "").strip()
        parts = [self.preamble, f"### Instruction:\n{instruction.strip()}", f"### Input:\n{given}" if given else None]
        return "\n\n".join(part for part in [*parts, "### Response:\n"] if part)
