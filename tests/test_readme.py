"""What the README shows does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kd.cli import methods

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in text.splitlines()) for indent, text in found]


def generated() -> str:
    """What stands between the marks of ``kd methods --write``."""
    page = (ROOT / "docs" / "methods.md").read_text()
    return page.split(methods.MARKS[0])[1].split(methods.MARKS[1])[0]


def test_the_loss_of_the_three_steps_trains(kd, tmp_path, monkeypatch, teacher_run) -> None:
    module = next(b for b in blocks("python") if "class LogitMSE" in b)
    yaml = next(b for b in blocks("yaml") if "LogitMSE" in b).replace("kd.losses.logits.mse", "readme_mse")
    (tmp_path / "readme_mse.py").write_text(module)
    (tmp_path / "myconf" / "loss").mkdir(parents=True)
    (tmp_path / "myconf" / "loss" / "mse.yaml").write_text(yaml)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["recipe.epochs=1", "hardware=cpu", f"teacher.checkpoint={teacher_run}", "loss=[ce,mse]"]
    said = kd("train", "--config-dir", "myconf", *arguments)
    assert said.code == 0, said.err
    assert "train/mse" in said.out


def test_the_loss_in_a_loop_of_your_own() -> None:
    code = next(b for b in blocks("python") if "from kd.losses.functional import" in b)
    logits = torch.randn(4, 10, requires_grad=True)
    names = {"F": F, "logits": logits, "teacher_logits": torch.randn(4, 10), "target": torch.arange(4)}
    exec(code, names)
    names["loss"].backward()
    assert torch.isfinite(logits.grad).all()


def test_the_table_of_losses_is_that_of_kd_methods() -> None:
    current = methods.markdown(methods.collect())
    assert generated() == f"\n{current}\n\n", "run kd methods --write docs/methods.md"


def test_the_lines_of_the_python_api() -> None:
    code = next(b for b in blocks("python") if "kd.distill(" in b).replace("epochs=30", "epochs=1, accelerator='cpu'")
    batches = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(2)]
    names = dict.fromkeys(("train", "val", "test"), batches)
    names |= {"student": torch.nn.Linear(4, 3), "teacher": torch.nn.Linear(4, 3)}
    exec(code, names)
    assert not names["student"].training


@pytest.mark.filterwarnings("ignore")  # what a plain trainer says about itself
def test_the_texts_from_python() -> None:
    (code,) = blocks("python", (ROOT / "docs" / "text.md").read_text())
    names: dict[str, Any] = {}
    exec(code, names)
    assert {"acc1", "f1", "agreement"} <= set(names["result"].metrics)
    assert torch.isfinite(names["trainer"].callback_metrics["val/nll"])


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"[A-Z]+_OUTPUT", README)
    assert 150 <= len(README.splitlines()) <= 275  # the Python API has a section, fine-tuning to deployment a screen
