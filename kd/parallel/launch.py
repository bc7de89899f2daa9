"""Runs a function in this process, in several that it starts, or in those of torchrun and Slurm. No torch at import.

kd's own processes are ``python -m kd.parallel.launch``: they get the function's name and its arguments, never a command
line, so that a job of a sweep may have as many as it likes. What process 0 returns is the result; the parent keeps it.
For processes of torchrun and Slurm see :mod:`kd.parallel.cluster`.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from kd.errors import KdError, MachineFailure, kind, named, of_kind
from kd.parallel.cluster import WORKER, Work, join, propagate_failure, quiet, unanswered
from kd.parallel.devices import cores

COMMAND = [sys.executable, "-m", "kd.parallel.launch"]
GRACE = 20.0  # seconds for the others to end by themselves when one has failed, or on an interruption


def count(hardware: Mapping[str, Any]) -> int:
    """Count the processes that kd itself must start for a run; 1: it runs in this one."""
    devices = hardware["devices"]
    if hardware["cluster"] is not None or devices == 1:
        return 1
    wanted = len(devices) if isinstance(devices, list) else devices
    if wanted != "auto" and hardware["accelerator"] not in ("gpu", "cuda"):
        return wanted
    if hardware["accelerator"] in ("cpu", "mps"):
        return 1
    import torch  # start-up

    return max(1, torch.cuda.device_count()) if wanted == "auto" else wanted


def run(work: Work, check: Callable[[int], None]) -> Any:
    """Run in this process, or in as many as the hardware section asks for; return what process 0 returns.

    ``check``: called with the number of processes before the first of several begins. In each process that kd starts
    the function gets one more argument, an ``ExitStack`` that is closed once its answer, or its failure, was sent.
    """
    processes = count(work.hardware)
    if processes > 1 and WORKER not in os.environ:
        check(processes)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise KdError("torchrun has started this process already: use hardware=torchrun")
        return _in_processes(work, processes)
    from kd.parallel import group  # start-up: torch

    if work.hardware["cluster"] is None or not group.joined():
        return work.run()
    check(group.world_size())
    group.broadcast(work)
    with propagate_failure(work):
        result = work.run()
    group.leave()
    return result


# ---------------------------------------------------------------------- processes of kd itself


class _Remote(Exception):
    """The traceback of another process, shown as the cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _in_processes(work: Work, number: int) -> Any:
    """Start the processes, wait for their answers, end them all whatever happens."""
    task, timeout = json.dumps(asdict(work)), work.hardware["timeout_s"]
    processes: list[subprocess.Popen[str]] = []
    pipes: list[Connection] = []
    with interruptible():
        try:
            for environment in _environments(number):
                ours, theirs = Pipe(duplex=False)
                with theirs:
                    processes.append(_start(environment, theirs.fileno()))
                pipes.append(ours)
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(task + "\n")
                process.stdin.flush()  # and stays open: its end tells the process that we are gone
            answers = _answers(pipes, timeout)
        except BaseException:
            _end(processes, signal.SIGINT)
            raise
        for rank, process in enumerate(processes):
            if rank not in answers:  # they have had their time
                process.kill()
        _end(processes, None)
    return _outcome(answers, processes, timeout)


def _start(environment: Mapping[str, str], pipe: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, WORKER: str(pipe)},
        pass_fds=[pipe],
        start_new_session=True,  # Ctrl-C reaches us, and them through us
    )


def _environments(number: int) -> Iterator[dict[str, str]]:
    """Make the variables that torchrun would set."""
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


def _answers(pipes: Sequence[Connection], timeout: float) -> dict[int, dict[str, Any]]:
    """Collect what the processes answer, in the order in which they do; an empty answer: it died.

    After the first bad answer the others have ``GRACE`` seconds, after the first good one ``timeout``: they have met
    for the last time before it.
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
            limit = time.monotonic() + (timeout if "outcome" in answer else GRACE)
            deadline = limit if deadline is None else min(deadline, limit)
    return answers


def _end(processes: Sequence[subprocess.Popen[str]], sent: signal.Signals | None) -> None:
    """Wait for the processes, after a signal if there is one; kill what is left after ``GRACE`` seconds."""
    deadline = time.monotonic() + GRACE
    for process in processes:
        if sent is not None and process.poll() is None:
            process.send_signal(sent)
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _outcome(answers: Mapping[int, dict[str, Any]], processes: Sequence[subprocess.Popen[str]], timeout: float) -> Any:
    """Return the answer of process 0, or raise the failure that came first; a death by a signal explains the others.

    A process that waited in vain explains nothing: those that did not answer do. (NCCL aborts such a process.)
    """
    silent = [rank for rank in range(len(processes)) if rank not in answers]
    vain = any(answer.get("timed_out") for answer in answers.values())
    vain = vain or any(processes[rank].returncode == -signal.SIGABRT for rank in answers)
    if silent and (vain or (0 in silent and all("outcome" in answer for answer in answers.values()))):
        raise MachineFailure(unanswered(silent, timeout))
    for rank, answer in answers.items():
        code = processes[rank].returncode
        if not answer and code < 0:
            raise MachineFailure(f"process {rank} of the run was killed by {signal.Signals(-code).name}")
    for rank, answer in answers.items():
        if not answer:
            code = processes[rank].returncode
            raise MachineFailure(f"process {rank} of the run ended without a result (exit code {code})")
        if "error" in answer:
            text, what = answer["error"], answer["kind"]
            failure = RuntimeError(text) if what == "unexpected" else of_kind(text, what)
            raise failure from _Remote(f"process {rank}: {answer['traceback']}")
    return answers[0]["outcome"]


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM, which schedulers and ``kill`` send, end this process as Ctrl-C does, and its children with it."""
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
    """Run one process of several: the work comes in by stdin, the answer goes into the pipe."""
    pipe = Connection(int(os.environ[WORKER]), readable=False)
    work = Work(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ending = ExitStack()
    try:
        if join(work.hardware) > 0:
            quiet()
        from kd.parallel import group  # start-up: torch

        result = work.run(ending)
        group.leave()
        pipe.send({"outcome": result})
        ending.close()
        return 0
    except (KeyboardInterrupt, SystemExit):
        return 130
    except Exception as error:
        from kd.parallel import group  # start-up: torch

        shown, vain = named(error, Path(work.where)), group.timed_out(error)
        if vain:  # which one did not answer, the parent knows
            shown = MachineFailure(unanswered([], work.hardware["timeout_s"]))
        text = str(shown) or type(shown).__name__
        pipe.send({"error": text, "kind": kind(shown), "traceback": traceback.format_exc(), "timed_out": vain})
        ending.close()
        sys.stdout.flush()
        os._exit(1)  # a thread or a collective that hangs must not keep the others waiting


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    if "" not in sys.path:
        sys.path.append("")
    sys.exit(main())
