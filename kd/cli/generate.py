"""``kd generate``: write a teacher's texts for a set of prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kd.errors import KdError, counted, did_you_mean
from kd.generate.generate import Terminated, generate
from kd.generate.options import Options, checked
from kd.generate.summary import Summary

EVERY = 30.0  # seconds between two lines of progress where there is no terminal
SHOWN = 10  # failures that are printed

USAGE = """kd generate prompts=FILE out=FILE.jsonl model=FOLDER|NAME|RUN [KEY=VALUE ...]
kd generate prompts=FILE out=FILE.jsonl server=URL model=NAME [KEY=VALUE ...]

Writes what a teacher answers to each prompt, once each: training data for data=lm data.train=FILE.jsonl. FILE is
.jsonl, .csv or another table with a column prompt (a text, or a list of messages) or messages, or .txt with a prompt a
line.

  system=TEXT               the system message
  max_new_tokens=256 temperature=1.0 top_p=1 seed=0
                            temperature=0 takes the likeliest token; of a server, null leaves a field out
  n=1                       different completions of each prompt
  logprobs=K                also the log-probabilities of each token and of the K likeliest ones
  references=COLUMN         print Rouge-L and exact match beside this column of FILE
  form=text|messages        of prompt and completion in the output; null: as in FILE
local model:
  batch_size=8 template=null
                            template=false: give texts as they stand although the tokenizer has a chat template
server (OpenAI's protocol: chat completions):
  key_env=OPENAI_API_KEY    the variable of the environment that holds the key
  concurrency=8 timeout=60 retries=5 requests_per_minute=N tokens_per_minute=N
  price_in=X price_out=X    of a million tokens; budget=X stops before the request that would exceed it; currency=EUR

A run that was killed, interrupted or stopped by its budget loses nothing: the same command goes on, with the same
settings. FILE.partial.jsonl is there until all prompts were asked. Prompts that failed are listed, the exit code is 1,
and the same command asks them again. After Ctrl-C (exit code 130) or SIGTERM (143) answers that a server has not sent
yet are given up.

  kd generate prompts=questions.csv out=answers.jsonl server=https://api.openai.com model=gpt-4.1 \\
      price_in=2 price_out=8 budget=20 currency=USD system="Answer politely."
  kd generate prompts=questions.csv out=answers.jsonl server=http://localhost:8000 model=teacher"""


def main(argv: Sequence[str]) -> int:
    """Parse, generate with a line of progress, print what there is; 1 when prompts have failed, 143 after SIGTERM."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    options = parsed(argv)
    checked(options)
    try:
        with _Shown(options.get("currency", "EUR")) as shown:
            summary = generate(**options, progress=shown)
    except Terminated as error:
        print(f"kd: terminated: {error}", file=sys.stderr)
        return 143
    _print(summary, options)
    return 1 if summary.failed else 0


def parsed(argv: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE by the types of the options. ``KdError`` for keys that there are not."""
    kinds = {name: str(hint) for name, hint in get_type_hints(Options).items()}
    found: dict[str, Any] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key not in kinds:
            near = did_you_mean(key, kinds)
            raise KdError(
                f"{argument} is not understood: kd generate has no {key}{near}; kd generate --help lists them"
            )
        found[key] = _read(value, kinds[key])
    return found


def _read(text: str, kind: str) -> Any:
    """Read a value as its option wants it; one of another type stays a text, which the option then refuses."""
    if "None" in kind and text == "null":
        return None
    if "bool" in kind and text in ("true", "false"):
        return text == "true"
    for read in (int, float):
        if read.__name__ in kind:
            try:
                return read(text)
            except ValueError:
                continue
    return text


class _Shown:
    """Shows how far it is: a bar on a terminal, else a line now and then."""

    def __init__(self, currency: str) -> None:
        self.currency = currency
        self.console = Console(file=sys.stderr)
        self.bar: Progress | None = None
        self.task: Any = None
        self.last = time.monotonic()

    def __enter__(self) -> _Shown:
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=None)
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, summary: Summary) -> None:
        words = f"{summary.tokens_per_second:,.0f} tokens/s"
        words += f", {summary.cost:.4f} {self.currency}" if summary.cost is not None else ""
        words += f", {counted(sum(list(summary.again.values())), 'attempt')} repeated" if summary.again else ""
        words += f", {len(summary.failed)} failed" if summary.failed else ""
        if self.bar is not None:
            self.bar.update(self.task, completed=summary.done, total=summary.wanted, description=words)
        elif time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            print(f"{summary.done}/{summary.wanted} completions, {words}", file=sys.stderr, flush=True)


def _print(summary: Summary, options: dict[str, Any]) -> None:
    print(f"{summary.out}: {counted(summary.done, 'completion')} of {counted(summary.prompts, 'prompt')}")
    print(f"tokens: {summary.tokens_in:,} in prompts, {summary.tokens_out:,} in completions")
    if summary.cost is not None:
        print(f"cost: {summary.cost:.4f} {options.get('currency', 'EUR')}")
    for count, what, words in (
        (summary.repeated, "row", "with the prompt of an earlier one, asked once"),
        (summary.truncated, "completion", f"cut off after max_new_tokens = {options.get('max_new_tokens', 256)}"),
        (summary.estimated, "completion", "with estimated tokens: the server did not count them"),
        (summary.without_logprobs, "completion", "without log-probabilities: the server gave none"),
        *((count, "attempt", f"repeated: {kind}") for kind, count in summary.again.items()),
    ):
        if count:
            print(f"{counted(count, what)} {words}")
    for name, value in summary.metrics.items():
        print(f"{name}: {value:.4f}")
    for row, reason in list(summary.failed.items())[:SHOWN]:
        print(f"kd: row {row} failed: {reason}", file=sys.stderr)
    if summary.failed:
        again = "it" if len(summary.failed) == 1 else "them"
        failed = counted(len(summary.failed), "prompt")
        print(f"kd: {failed} failed: the same command asks {again} again", file=sys.stderr)
