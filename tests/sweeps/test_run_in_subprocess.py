"""A function in a process of its own: what it returns, what it raises, or that the process died."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUNCTIONS = """
import os
def pid(): return {"pid": os.getpid()}
def nothing(): pass
def refuses(): raise ValueError("loss.kd needs a teacher")
def silent(): raise LookupError
def dies(): os._exit(3)
"""
CODE = """
import os
from calls import dies, nothing, pid, refuses, silent
from kd.errors import KdError
from kd.sweeps.pool import run_in_subprocess

print(run_in_subprocess(pid)["pid"] != os.getpid(), run_in_subprocess(nothing))
for call in (refuses, silent, dies):
    try: run_in_subprocess(call)
    except KdError as error: print(error)
"""


def test_it_returns_raises_and_reports_a_death(tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(FUNCTIONS)
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "True None",
        "loss.kd needs a teacher",
        "LookupError",
        "the process that was to find out ended with exit code 3",
    ], done.stderr
