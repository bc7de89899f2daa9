"""A function in a forked process: what it returns, what it raises, or that the process died."""

from __future__ import annotations

import subprocess
import sys


def test_it_returns_raises_and_reports_a_death() -> None:
    code = """
import os
from kd.errors import KdError
from kd.sweeps.pool import run_in_subprocess

def refuses(): raise ValueError("loss.kd needs a teacher")
def silent(): raise LookupError
def dies(): os._exit(3)

other = run_in_subprocess(lambda: {"pid": os.getpid()})["pid"]
print(other != os.getpid(), run_in_subprocess(lambda: None))
for call in (refuses, silent, dies):
    try: run_in_subprocess(call)
    except KdError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "True None",
        "loss.kd needs a teacher",
        "LookupError",
        "the process that was to find out ended with exit code 3",
    ], done.stderr
