"""What ``kd generate`` has written, in numbers. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Summary:
    """What is there: completions of all processes that wrote the file.

    ``prompts``: different ones; ``repeated``: rows that repeat one; ``wanted``, ``done``: completions; ``failed``: why
    others are missing, by row of the prompts' file (from 1); ``again``: failed attempts of this process that were
    followed by another one, by kind; ``truncated``: that ``max_new_tokens`` cut off; ``estimated``: whose tokens the
    server did not count; ``without_logprobs``: that lack those of the likeliest tokens; ``cost``: of all attempts, None
    without prices; ``tokens_per_second``: of completions, in this process; ``metrics``: beside
    references, on a scale of 0 to 1.
    """

    out: str
    prompts: int
    repeated: int
    wanted: int
    done: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    again: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    estimated: int = 0
    without_logprobs: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    tokens_per_second: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def count(self, line: dict[str, Any], logprobs: int) -> None:
        """Count a completion. ``logprobs``: how many alternatives of each token were asked for."""
        self.done += 1
        self.truncated += line.get("finish_reason") == "length"
        self.estimated += bool(line.get("tokens_estimated"))
        self.without_logprobs += logprobs > 0 and not any(one.get("top") for one in line.get("logprobs") or [])
        self.tokens_in += line["tokens_in"]
        self.tokens_out += line["tokens_out"]
        if line.get("cost") is not None:
            self.cost = (self.cost or 0.0) + line["cost"]
