"""Write the completions of a teacher for a set of prompts: sequence-level distillation's data. No torch at import.

Kim and Rush, Sequence-Level Knowledge Distillation, EMNLP 2016, arXiv 1606.07947: a student trained on what its teacher
writes. ``data=lm data.train=FILE`` reads what this writes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd.errors import KdError, counted
from kd.generate.attempts import Attempts
from kd.generate.http_teacher import HttpTeacher
from kd.generate.ledger import BudgetReached, Ledger, Pace, Usage
from kd.generate.options import Options, checked, settings
from kd.generate.prompts import Prompt, read_prompts
from kd.generate.server_address import endpoint, key_for
from kd.generate.summary import Summary
from kd.generate.threads import Failed, GivenUp, asked
from kd.records.generations import Completion, Generations, Key, opened, partial_of

IN_A_ROW = 10  # prompts one after the other that a server fails: it is down, or its answers are of another form
LEFT_OUT = ("id", "sample", "row", "references", "wasted")  # of a line of before: they are written anew
Report = Callable[[Summary], None]


class Terminated(KeyboardInterrupt):
    """The run was interrupted by SIGTERM."""


def generate(
    prompts: str | Path,
    out: str | Path,
    model: str | Path,
    server: str | None = None,
    progress: Report | None = None,
    **options: Any,
) -> Summary:
    """Write the completions of the prompts in a file, once each, in their order, to the file ``out`` (jsonl).

    ``model``: a folder, a run, or a name of the hub; with ``server`` a name there. ``progress`` is called after each
    completion. ``options``: fields of :class:`~kd.generate.options.Options`. What an earlier process has written
    is kept and not asked again.

    Raises ``KdError`` for wrong arguments, for other settings than those of what is there, when the server refuses
    (key, model, address), fails for ten prompts in a row or sends something else than completions, and before the
    budget would be exceeded; ``KeyboardInterrupt`` after SIGINT, and after SIGTERM ``Terminated``, which is one:
    answers that a server does not send at once are given up. What is done by then is kept, and the same call goes on.
    Prompts without a completion are in ``Summary.failed``, and not in the file.
    """
    chosen = checked({"prompts": str(prompts), "out": str(out), "model": str(model), "server": server, **options})
    target = Path(chosen.out)
    rows, repeated = read_prompts(Path(chosen.prompts), chosen.references, chosen.system)
    with opened(target, settings(chosen)) as there:
        _refuse_others(rows, there, chosen)
        job = _Job(chosen, rows, repeated, there, progress)
        with _signals(job):
            (job.ask_server if chosen.server else job.ask_model)()
        summary = job.summary
        summary.failed = dict(sorted(summary.failed.items()))
        if job.signalled:
            raise job.interruption()
        lines = [line for prompt in rows for line in job.lines(prompt)]
        if not lines:
            raise KdError(f"no prompt has a completion: {next(iter(summary.failed.values()))}")
        summary.metrics = _metrics(lines) if chosen.references else {}
        there.complete(lines, {"summary": asdict(summary)})
    return summary


def _refuse_others(rows: list[Prompt], there: Generations, chosen: Options) -> None:
    known = {prompt.id for prompt in rows}
    if others := {name for name, _ in there.done} - known:
        raise KdError(
            f"out = {chosen.out} has completions of {counted(len(others), 'prompt')} not in {chosen.prompts}: give "
            "another out"
        )


class _Job:
    """One process's part: asks for what is not there and keeps it as it comes."""

    def __init__(
        self, chosen: Options, rows: list[Prompt], repeated: int, there: Generations, progress: Report | None
    ) -> None:
        self.chosen, self.rows, self.there, self.progress = chosen, rows, there, progress
        self.stop, self.signalled = threading.Event(), 0  # the number of the signal
        self.summary = Summary(chosen.out, len(rows), repeated, len(rows) * chosen.n)
        self._refused: set[Key] = set()
        self._number = {prompt.id: prompt.index + 1 for prompt in rows}
        self._began, self._tokens = time.monotonic(), 0
        messages = any(not isinstance(prompt.content, str) for prompt in rows)
        if messages and chosen.form == "text":
            raise KdError(f"form = text is not allowed: the prompts in {chosen.prompts} are messages")
        self.form = chosen.form or ("messages" if messages else "text")
        for line in there.done.values():
            self.summary.count(line, chosen.logprobs)
        if chosen.price_in is not None or there.wasted:
            self.summary.cost = (self.summary.cost or 0.0) + there.wasted

    def missing(self) -> list[tuple[Prompt, int]]:
        """List the prompts, each with the number of a sample, that have no completion yet."""
        return [(p, n) for p in self.rows for n in range(self.chosen.n) if (p.id, n) not in self.there.done]

    # ------------------------------------------------------------------ asking

    def ask_server(self) -> None:
        """Ask a server, several requests at a time."""
        chosen, jobs = self.chosen, self.missing()
        teacher = self._http_teacher()
        in_a_row = 0
        try:
            for (prompt, sample), found in asked(
                lambda job: teacher.ask(*job, self.stop),
                jobs,
                min(chosen.concurrency, len(jobs)),
                self.stop,
                lambda: bool(self.signalled),
            ):
                if isinstance(found, GivenUp):
                    found.wasted = teacher.given_up(prompt)
                if not isinstance(found, Failed):
                    in_a_row = 0
                    self.keep((prompt.id, sample), found.completion, found.wasted)
                    continue
                self.fail((prompt.id, sample), str(found), found.wasted)
                in_a_row += found.of_the_server
                if in_a_row >= IN_A_ROW and not self.stop.is_set():
                    self.stop.set()
                    failure = str(found)
        except BudgetReached as error:
            spent = f"{self.summary.cost or 0.0:.4g} {chosen.currency} are spent"
            raise KdError(f"{error} {chosen.currency} ({spent}); {self.kept('with a larger budget')}") from None
        except KdError as error:
            raise KdError(f"{error}; {self.kept()}" if self.summary.done else str(error)) from None
        if in_a_row >= IN_A_ROW and not self.signalled:
            raise KdError(f"the server failed {in_a_row} prompts in a row, the last one with: {failure}; {self.kept()}")

    def _http_teacher(self) -> HttpTeacher:
        chosen = self.chosen
        assert chosen.server is not None
        url = endpoint(chosen.server)
        key, variable = key_for(url, chosen.key_env, os.environ)
        sampling = {"max_tokens": chosen.max_new_tokens, "temperature": chosen.temperature}
        sampling |= {"top_p": chosen.top_p, "seed": chosen.seed}
        spent = self.summary.cost or 0.0
        ledger = Ledger(chosen.price_in, chosen.price_out, chosen.budget, spent, chosen.max_new_tokens)
        size = {prompt.id: prompt.size for prompt in self.rows}
        for (name, _), line in self.there.done.items():
            ledger.learn(Usage(line["tokens_in"], line["tokens_out"]), size[name])
        attempts = Attempts(answered=bool(self.there.done))
        self.summary.again = attempts.again
        return HttpTeacher(
            url,
            chosen.model,
            key,
            variable,
            sampling,
            chosen.logprobs,
            ledger,
            Pace(chosen.requests_per_minute, chosen.tokens_per_minute),
            chosen.system,
            chosen.timeout,
            chosen.retries,
            attempts,
        )

    def ask_model(self) -> None:
        """Ask a local model, a batch at a time."""
        if not self.missing():
            return
        from kd.generate.local_teacher import LocalTeacher, Sampling, batches  # start-up: torch

        chosen = self.chosen
        sampling = Sampling(chosen.max_new_tokens, chosen.temperature, chosen.top_p, chosen.seed or 0)
        teacher = LocalTeacher(chosen.model, sampling, chosen.system, chosen.template)
        ids = {prompt.id: teacher.encode(prompt) for prompt in self.rows}
        reasons = {name: reason for name, row in ids.items() if (reason := teacher.too_long(row))}
        for name, reason in reasons.items():
            for sample in range(chosen.n):
                self.fail((name, sample), reason)
        able = [prompt.id for prompt in self.rows if prompt.id not in reasons]
        self._began = time.monotonic()  # the model is loaded
        for batch in batches([len(ids[name]) for name in able], chosen.n, chosen.batch_size):
            keys = [(able[number], sample) for number, sample in batch]
            if all(key in self.there.done for key in keys):
                continue
            if self.stop.is_set():
                return
            names = [f"{name}-{sample}" for name, sample in keys]
            found = teacher.complete([ids[name] for name, _ in keys], names, chosen.logprobs)
            for key, completion in zip(keys, found, strict=True):
                if key not in self.there.done:
                    self.keep(key, completion)

    # ------------------------------------------------------------------ keeping

    def keep(self, key: Key, completion: Completion, wasted: float = 0.0) -> None:
        """Write a completion down and count it."""
        self.there.add(key, completion, wasted)
        self._refused.discard(key)
        if not any(row == key[0] for row, _ in self._refused):  # another sample of this prompt may have failed
            self.summary.failed.pop(self._number[key[0]], None)
        self.summary.count(self.there.done[key], self.chosen.logprobs)
        self._tokens += completion.tokens_out
        self._spend(wasted)

    def fail(self, key: Key, reason: str, wasted: float = 0.0) -> None:
        """Write down that there is no completion, and why."""
        self.there.add_failure(key, reason, wasted)
        self._refused.add(key)
        self.summary.failed[self._number[key[0]]] = reason
        self._spend(wasted)

    def _spend(self, wasted: float) -> None:
        if wasted:
            self.summary.cost = (self.summary.cost or 0.0) + wasted
        self.summary.tokens_per_second = self._tokens / max(time.monotonic() - self._began, 1e-3)
        if self.progress is not None:
            self.progress(self.summary)

    def interruption(self) -> KeyboardInterrupt:
        """Return what is raised after a signal."""
        return (Terminated if self.signalled == signal.SIGTERM else KeyboardInterrupt)(self.kept())

    def kept(self, how: str = "") -> str:
        """Say what there is, and how to go on."""
        command = f"the same command {how} goes on" if how else "the same command goes on"
        number = f"{self.summary.done} of {self.summary.wanted} completions"
        return f"{number} are kept in {partial_of(Path(self.chosen.out))}: {command}"

    def lines(self, prompt: Prompt) -> Iterator[dict[str, Any]]:
        """Yield the lines of the output file that belong to a prompt."""
        for sample in range(self.chosen.n):
            if (found := self.there.done.get((prompt.id, sample))) is None:
                continue
            text = text_of(found["completion"])
            if self.form == "messages":
                pair: dict[str, Any] = {"prompt": prompt.messages(self.chosen.system)}
                pair["completion"] = [{"role": "assistant", "content": text}]
            else:
                pair = {"prompt": prompt.content, "completion": text}
            rest = {name: value for name, value in found.items() if name not in (*pair, *LEFT_OUT)}
            more = {"references": list(prompt.references)} if self.chosen.references else {}
            yield {**pair, **rest, **more, "row": prompt.index + 1, "id": prompt.id, "sample": sample}


@contextmanager
def _signals(job: _Job) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run in order; the second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if job.signalled:
            raise job.interruption()
        job.signalled = number
        job.stop.set()

    before = {name: signal.signal(name, handle) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _metrics(lines: list[dict[str, Any]]) -> dict[str, float]:
    from kd.tasks.generation_metrics import generation_metrics  # start-up: torchmetrics

    return generation_metrics([text_of(line["completion"]) for line in lines], [line["references"] for line in lines])


def text_of(completion: Any) -> str:
    """Return the text of a line's completion, which may be a message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
