"""GPUs are counted whole, also where ``nvidia-smi`` lists their parts (MIG) between them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kd.parallel import devices

LISTED = """#!/bin/sh
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-6d0f)"
echo "  MIG 1g.10gb Device 0: (UUID: MIG-c6d4)"
echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-77aa)"
"""


def test_a_gpu_in_parts_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(LISTED)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.gpus() == ["0", "1"]
