"""Memory that tensors leave stays with the process: on by default on Linux, logged once, off by a key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd.config.compose import checked
from kd.errors import KdError
from kd.run import allocator, hardware

ROOT = Path(__file__).parents[1]
GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
LINE = "the allocator keeps the memory that tensors leave"
PAGE_FAULTS = """
import ctypes, resource, sys
from kd.run.allocator import keep_memory
libc, size = ctypes.CDLL(None), 64 << 20
libc.malloc.restype = ctypes.c_void_p
assert sys.argv[1] == "default" or keep_memory()
def once():
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(block, 1, size)
    libc.free(block)
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    once()
assert "torch" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not GLIBC, reason="the C library is another one")
def test_a_block_that_was_freed_costs_no_page_faults_the_next_time() -> None:
    def faults(allocator: str) -> int:
        command = [sys.executable, "-c", PAGE_FAULTS, allocator]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    blocks = 3 * 32  # of 2 MiB: the largest pages that there are
    assert faults("default") >= blocks
    assert faults("kept") < blocks / 4


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("it was called"))
    with monkeypatch.context() as other:
        other.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
        assert not allocator.keep_memory()
    with monkeypatch.context() as other:
        other.setattr(sys, "platform", "darwin")
        assert not allocator.keep_memory()
    with monkeypatch.context() as other:
        other.setattr(os, "confstr_names", {}, raising=False)  # musl
        assert not allocator.keep_memory()


@pytest.mark.parametrize(("override", "times"), [([], 1), (["hardware.keep_memory=false"], 0)])
def test_it_is_on_by_default_logged_once_and_off_by_a_key(kd, tmp_path, monkeypatch, override, times) -> None:
    calls: list[int] = []
    monkeypatch.setattr(hardware.allocator, "keep_memory", lambda: calls.append(1) or True)
    said = kd("train", "hardware=cpu", "recipe.epochs=1", "data.train_size=64", *override, "hydra.run.dir=run")
    assert said.code == 0, said.err
    assert len(calls) == times
    assert (tmp_path / "run" / "train.log").read_text().count(LINE) == times
    assert LINE not in said.out


def test_a_key_of_another_type_is_refused() -> None:
    with pytest.raises(KdError, match=r"hardware\.keep_memory"):
        checked(["hardware.keep_memory=sometimes"])
