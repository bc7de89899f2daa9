"""``kd demo`` end to end with tiny runs, and the statistics it prints."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kd.cli import demo
from kd.report.stats import paired_interval

pytestmark = pytest.mark.slow

SHORT = ("recipe.epochs=2", "protocol.val_every=2")


@pytest.fixture
def short(monkeypatch) -> None:
    arms = tuple(replace(arm, overrides=(*arm.overrides, *SHORT)) for arm in demo.ARMS)
    monkeypatch.setattr(demo, "ARMS", arms)
    monkeypatch.setattr(demo, "TEACHER", replace(demo.TEACHER, overrides=(*demo.TEACHER.overrides, *SHORT)))


def test_prints_a_table_and_a_figure_for_each_claim(kd, tmp_path, short) -> None:
    said = kd("demo", "seeds=2", "jobs=2", "out=demo")
    assert said.code == 0, said.err
    assert said.out.count("95 % interval") == said.out.count("published: ") == said.out.count("figure: ") == 3
    for figure in re.findall(r"figure:\s+(\S+)", said.out):
        assert Path(figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list((tmp_path / "demo").rglob("result.json"))) == 2 * (1 + len(demo.ARMS))
    for word in ("Soft targets with 3 % of the labels", "A class never seen", "Invariance transferred"):
        assert word in said.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["seeds=1"], "seeds = 1 is not allowed: it must be a whole number, 2 or more"),
        (["jobs=x"], "jobs = x is not allowed"),
        (["sed=3"], "sed=3 is not understood: kd demo takes out=…, seeds=…, jobs=…"),
        (["out=full"], "out = full is not empty: give a new directory"),
        (["out=full/file/x"], "out = full/file/x cannot be written"),
    ],
)
def test_bad_input(kd, tmp_path, arguments, sentence) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    said = kd("demo", *arguments)
    assert said.code == 1
    assert sentence in said.err


def test_the_interval_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7))
    mean, low, high = paired_interval(a, b)
    reference = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert mean == pytest.approx((a - b).mean())
    assert (low, high) == pytest.approx((reference.low, reference.high))


def test_the_bias_is_chosen_on_validation(tmp_path) -> None:
    """A class whose logit is 4 too low on both splits is found again; one that only test would gain from is not."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 10, 500)
    logits = 5.0 * np.eye(10)[target]
    low = logits.copy()
    low[:, demo.UNSEEN] -= 5.5
    for split, values in (("val", low), ("test", low)):
        np.savez(tmp_path / f"predictions_{split}.npz", target=target, logits=values)
    assert demo.bias_fixed(tmp_path) == (1.0, 1.0)
    np.savez(tmp_path / "predictions_val.npz", target=target, logits=logits)
    assert demo.bias_fixed(tmp_path)[0] == 0.0


def test_a_run_that_fails_is_said_with_its_reason(kd, tmp_path, monkeypatch) -> None:
    arm = replace(demo.TEACHER, overrides=(*demo.TEACHER.overrides, *SHORT, "loss=[ce,kd]"))
    monkeypatch.setattr(demo, "TEACHER", arm)
    said = kd("demo", "seeds=2", "jobs=2", "out=demo")
    assert said.code == 1
    assert re.match(r"kd: teacher seed [01]: loss.kd needs a teacher", said.err)
    assert "Traceback" not in said.err
