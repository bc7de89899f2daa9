"""Mistakes in one job of a sweep are explained as well as those in a single run (the others: test_cli, test_conf)."""

from __future__ import annotations


def test_a_typo_in_a_sweep_names_what_is_near(kd, tmp_path) -> None:
    single, swept = kd("train", "recipe.epoch=3"), kd("train", "-m", "recipe.epoch=3,4")
    assert (single.code, swept.code) == (1, 1)
    assert "there is no option recipe.epoch (near: recipe.epochs" in single.err
    assert swept.err == single.err + single.err.replace("recipe.epoch=3", "recipe.epoch=4")
    assert not list(tmp_path.iterdir())
