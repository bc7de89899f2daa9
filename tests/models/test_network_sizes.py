"""What kd models lists: counted without values, read without torch, complete for the networks of this package."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import timm

from kd.config.composition import CONF
from kd.config.sizes_table import MOST, read
from kd.models.network_sizes import of_timm, write


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "test_vit3"])
def test_the_table_is_what_is_counted(name: str) -> None:
    row = next(row for row in read() if row["name"] == name)
    counted = of_timm(name)
    assert {key: str(value) for key, value in counted.items()} == row
    assert counted["parameters"] == sum(p.numel() for p in timm.create_model(name).parameters())
    assert row["weights"]


def test_published_sizes() -> None:
    sizes = {row["name"]: row for row in read()}
    assert int(sizes["resnet20"]["parameters"]) == 278_324  # with 100 classes
    assert int(sizes["resnet18"]["parameters"]) == 11_689_512
    assert int(sizes["mobilenetv3_small_100"]["macs"]) == pytest.approx(57e6, rel=0.03)  # Howard 2019: 56 M
    assert int(sizes["resnet18"]["macs"]) == pytest.approx(1.8e9, rel=0.02)  # He 2016, Table 1


def test_macs_are_there_up_to_a_size() -> None:
    assert [row["name"] for row in read() if bool(row["macs"]) != (int(row["parameters"]) <= MOST)] == []


def test_the_networks_of_this_package_are_in_it() -> None:
    ours = {row["name"] for row in read() if row["library"] == "kd"}
    files = {file.stem for file in (CONF / "model").glob("*.yaml")}
    assert files - ours == {"none", "timm", "timm_resnet18", "timm_unet", "transformers", "bert_tiny", "vit_tiny"}


def test_most_of_timm_is_in_it() -> None:
    there = {row["name"] for row in read() if row["library"] == "timm"}
    names = set(timm.list_models())
    assert len(names & there) > 0.97 * len(names), sorted(names - there)


def test_writing_goes_on_where_it_was(tmp_path: Path) -> None:
    def row(name: str, parameters: int) -> dict[str, Any]:
        return {"library": "timm", "name": name, "parameters": parameters, "macs": "", "input": "", "classes": ""}

    def broken() -> dict[str, Any]:
        raise RuntimeError("no such layer")

    file = tmp_path / "table.csv"
    made = {("timm", "large"): lambda: row("large", 9), ("timm", "broken"): broken}
    assert [r["name"] for r in write(made, file)] == ["large"]
    made = {("timm", "large"): broken, ("timm", "small"): lambda: row("small", 3)}
    assert [r["name"] for r in write(made, file)] == ["small"]
    with file.open() as there:
        assert [r["name"] for r in csv.DictReader(there)] == ["small", "large"]


def test_the_list(kd: Any) -> None:
    said = kd("models", "mobilenetv3_small", "--max-params", "2M", "--pretrained")
    assert said.code == 0
    lines = [line for line in said.out.splitlines() if "mobilenetv3_small" in line]
    assert "mobilenetv3_small_050" in lines[0]
    assert "1,593,224" in next(line for line in lines if "mobilenetv3_small_050" in line)
    assert "have more than 2M parameters" in said.out
    counts = [int(line.split("│")[3].strip().replace(",", "")) for line in lines]
    assert counts == sorted(counts)
    assert max(counts) <= 2_000_000
    assert "without MACs" not in said.out


def test_what_is_blank_is_said(kd: Any) -> None:
    said = kd("models", "vit_huge_patch14_224", "--max-params", "1G")
    assert said.code == 0
    assert re.search(
        r"^[1-9]\d* networks? without MACs: they are counted up to 100M parameters", said.out, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mobilnetv3"], "no network has mobilnetv3 in its name"),
        (
            ["--max-params", "many"],
            "--max-params many is not allowed: it must be a number, such as 500000, 500K or 1.5M",
        ),
        (
            ["--min-params", "6M", "--max-params", "5M"],
            "--min-params 6M is not allowed: it is more than --max-params 5M",
        ),
        (["--max-parms", "1M"], "--max-parms is not an option of kd models (near: --max-params"),
    ],
)
def test_what_is_wrong_is_a_sentence(kd: Any, words: list[str], sentence: str) -> None:
    said = kd("models", *words)
    assert said.code == 1
    assert sentence in said.err
