"""A question to a forked process: its answer, its complaint, or that it died without one."""

from __future__ import annotations

import subprocess
import sys


def test_ask_returns_raises_and_says_when_nobody_answers() -> None:
    code = """
import os
from kd.errors import KdError
from kd.sweeps.pool import run_in_subprocess

def refuses(): raise ValueError("loss.kd needs a teacher")
def silent(): raise LookupError
def dies(): os._exit(3)

print(ask(lambda: {"pid": os.getpid()})["pid"] != os.getpid(), ask(lambda: None))
for call in (refuses, silent, dies):
    try: ask(call)
    except KdError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "True None",
        "loss.kd needs a teacher",
        "LookupError",
        "the process that was to find out ended with exit code 3",
    ], done.stderr
