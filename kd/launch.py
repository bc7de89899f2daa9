"""Trains in this process, in several that it starts, or in those of torchrun and Slurm. No torch at import.

kd's own processes are ``python -m kd.launch``: they get a checked config and a run directory, never a command line, so
that a job of a sweep may have as many as it likes. The parent keeps the record; process 0 trains, logs and writes
weights; the others train. For processes of torchrun and Slurm see :mod:`kd.cluster`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from kd import record
from kd.cluster import WORKER, join, quiet, shared_fate
from kd.errors import KdError
from kd.hardware import cores, settings

COMMAND = [sys.executable, "-m", "kd.launch"]
GRACE = 20.0  # seconds for the others to end by themselves when one has failed, or on an interruption


def count(hardware: Mapping[str, Any]) -> int:
    """How many processes kd itself must start for a run; 1: it trains in this one."""
    devices = hardware["devices"]
    if hardware["cluster"] is not None or devices == 1:
        return 1
    wanted = len(devices) if isinstance(devices, list) else devices
    if wanted != "auto" and hardware["accelerator"] not in ("gpu", "cuda"):
        return wanted
    if hardware["accelerator"] in ("cpu", "mps"):
        return 1
    import torch

    return max(1, torch.cuda.device_count()) if wanted == "auto" else wanted


def fit(config: dict[str, Any], run_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Train in this process, or in as many as the hardware section asks for; what :func:`kd.fit.fit` returns."""
    hardware = settings(config)
    processes = count(hardware)
    if processes > 1 and WORKER not in os.environ:
        _check_batch(config, processes)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise KdError("torchrun has started this process already: use hardware=torchrun")
        return _in_processes(config, run_dir, checkpoint, processes)
    from kd import distributed
    from kd.fit import fit

    if hardware["cluster"] is None or not distributed.joined():
        return fit(config, run_dir, checkpoint)
    _check_batch(config, distributed.world_size())
    distributed.broadcast((config, str(run_dir.resolve()), checkpoint and str(checkpoint.resolve())))
    with shared_fate():
        outcome = fit(config, run_dir, checkpoint)
    distributed.leave()
    return outcome


def _check_batch(config: Mapping[str, Any], processes: int) -> None:
    size = config["recipe"]["batch_size"]
    if size % processes:
        raise KdError(
            f"recipe.batch_size = {size} is not allowed on {processes} processes: it is the batch of all of them "
            "together, so it must be a multiple of their number"
        )


# ---------------------------------------------------------------------- processes of kd itself


class _Remote(Exception):
    """The traceback of another process, shown as the cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _in_processes(config: dict[str, Any], run_dir: Path, checkpoint: Path | None, number: int) -> dict[str, Any]:
    """Start the processes, wait for their answers, end them all whatever happens."""
    task = json.dumps([config, str(run_dir.resolve()), checkpoint and str(checkpoint.resolve())])
    processes: list[subprocess.Popen[str]] = []
    pipes: list[Connection] = []
    with interruptible():
        try:
            for environment in _environments(settings(config), number):
                ours, theirs = Pipe(duplex=False)
                with theirs:
                    processes.append(_start(environment, theirs.fileno()))
                pipes.append(ours)
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(task + "\n")
                process.stdin.flush()  # and stays open: its end tells the process that we are gone
            answers = _answers(pipes)
        except BaseException:
            _end(processes, signal.SIGINT)
            raise
        _end(processes, None)
    return _outcome(answers, processes)


def _start(environment: Mapping[str, str], pipe: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, WORKER: str(pipe)},
        pass_fds=[pipe],
        start_new_session=True,  # Ctrl-C reaches us, and them through us
    )


def _environments(hardware: Mapping[str, Any], number: int) -> Iterator[dict[str, str]]:
    """The variables that torchrun would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, cores() // number)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    for rank in range(number):
        yield {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def _answers(pipes: Sequence[Connection]) -> dict[int, dict[str, Any]]:
    """What the processes answer, in the order in which they do; an empty answer: it died.

    After the first bad answer the others have ``GRACE`` seconds.
    """
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    answers: dict[int, dict[str, Any]] = {}
    deadline: float | None = None
    while waiting:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(waiting), left)
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                answer = {}
            answers[waiting.pop(pipe)] = answer
            if "outcome" not in answer and deadline is None:
                deadline = time.monotonic() + GRACE
    return answers


def _end(processes: Sequence[subprocess.Popen[str]], ask: signal.Signals | None) -> None:
    """Wait for the processes, after asking them by a signal; kill what is left after ``GRACE`` seconds."""
    deadline = time.monotonic() + GRACE
    for process in processes:
        if ask is not None and process.poll() is None:
            process.send_signal(ask)
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _outcome(answers: Mapping[int, dict[str, Any]], processes: Sequence[subprocess.Popen[str]]) -> dict[str, Any]:
    """The answer of process 0, or the failure that came first; a death by a signal explains all the others."""
    for rank, answer in answers.items():
        code = processes[rank].returncode
        if not answer and code < 0:
            raise KdError(f"process {rank} of the run was killed by {signal.Signals(-code).name}")
    for rank, answer in answers.items():
        if not answer:
            raise KdError(f"process {rank} of the run ended without a result (exit code {processes[rank].returncode})")
        if "error" in answer:
            failure = KdError(answer["error"]) if answer["expected"] else RuntimeError(answer["error"])
            raise failure from _Remote(f"process {rank}: {answer['traceback']}")
    return answers[0]["outcome"]


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, which schedulers and ``kill`` send, ends this process as Ctrl-C does, and its children with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    """One process of several, ``python -m kd.launch``: the task comes in by stdin, the answer goes into the pipe."""
    pipe = Connection(int(os.environ[WORKER]), readable=False)
    config, run_dir, checkpoint = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        from kd.train import peak_memory, start_logging

        if join(config) == 0:
            start_logging(Path(run_dir), lock=False)  # the parent has it
        else:
            quiet()
        from kd import distributed
        from kd.fit import fit

        outcome = fit(config, Path(run_dir), checkpoint and Path(checkpoint))
        _close_loggers(run_dir, {"status": "finished", **outcome})
        distributed.leave()
        pipe.send({"outcome": {**outcome, "peak_memory_mb": peak_memory()}})
        return 0
    except (KeyboardInterrupt, SystemExit):
        return 130
    except Exception as error:
        expected = isinstance(error, KdError)
        text = str(error) or type(error).__name__
        pipe.send({"error": text, "expected": expected, "traceback": traceback.format_exc()})
        _close_loggers(run_dir, {"status": "failed", "error": text})
        sys.stdout.flush()
        os._exit(1)  # a thread or a collective that hangs must not keep the others waiting


def _close_loggers(run_dir: str, ending: dict[str, Any]) -> None:
    """W&B runs belong to the process that opened them; the parent writes the record."""
    loggers = sys.modules.get("kd.loggers")
    if loggers is not None:
        loggers.finish_wandb({**record.read(run_dir), **ending})


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    if "" not in sys.path:
        sys.path.append("")
    sys.exit(main())
