"""A report as a W&B run: the table and the pictures, read back; never an exception."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import image
from wandb_disk import read_back

from kd.tracking import wandb_run
from kd.tracking.wandb_report import log_report

pytestmark = pytest.mark.slow

TABLE = pd.DataFrame({"row": ["alone", "distilled"], "errors": [146.0, 74.0]})
SETTINGS = {"project": "kd", "entity": None, "offline": None, "timeout": 2}


@pytest.fixture
def figures(tmp_path) -> dict[str, Path]:
    image.imsave(tmp_path / "bars.png", [[0.0, 1.0], [1.0, 0.0]])
    return {"errors": tmp_path / "bars.png"}


def test_table_and_figures_are_kept_in_one_run_of_type_report(tmp_path, figures) -> None:
    log_report(tmp_path, "hinton", TABLE, figures, SETTINGS)
    (file,) = wandb_run.run_files(tmp_path)
    kept = read_back(file)
    assert (kept.run.job_type, kept.run.run_group, kept.run.display_name) == ("report", "hinton", "report hinton")
    (row,) = kept.history
    table = json.loads((file.parent / "files" / row["results/path"]).read_text())
    assert (table["columns"], table["data"]) == (["row", "errors"], [["alone", 146.0], ["distilled", 74.0]])
    picture = file.parent / "files" / row["figures/errors/path"]
    assert picture.read_bytes() == figures["errors"].read_bytes()
    assert wandb_run.run_id(tmp_path) == kept.run.run_id  # the report made again goes on in it


def test_a_picture_that_is_missing_costs_the_report_alone(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("kd"), "propagate", True)  # a run of before may have ended that
    log_report(tmp_path, "hinton", TABLE, {"errors": tmp_path / "none.png"}, SETTINGS)
    assert "W&B failed" in caplog.text
    monkeypatch.setattr("wandb.init", lambda **_: 1 / 0)
    log_report(tmp_path, "hinton", TABLE, {}, SETTINGS)
    assert "division by zero" in caplog.text
