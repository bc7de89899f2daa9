"""Every study of ``experiments/`` composes and builds, and its README says what its results hold."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.config.compose import checked
from kd.config.composition import CONF
from kd.config.instantiate import make
from kd.report import power, vocabulary
from kd.report.frame import finished, read_results
from kd.report.override_drift import notes
from kd.report.report import build
from kd.studies import load
from kd.sweeps.refusals import refuse_duplicates
from kd.sweeps.study import RESULTS, plan

EXPERIMENTS = CONF.parent / "experiments"
STUDIES = sorted(file.parent.name for file in EXPERIMENTS.glob(f"*/{load.STUDY}"))
MEASURED = [name for name in STUDIES if (EXPERIMENTS / name / RESULTS).is_file()]


def configs_of(study: load.Study, directory: Path) -> dict[str, dict[str, Any]]:
    """The checked config of the first run of every row; what they read lies in ``directory``, which does not exist."""
    jobs = {job.name: job for job in plan(study, directory, (), None, ())}
    firsts = {name: f"{name}/seed{row.seeds[0]}" for name, row in study.rows.items()}
    return {name: checked(jobs[first].overrides) for name, first in firsts.items()}


def rows_read(checkpoint: Any, directory: Path) -> list[str]:
    """The rows whose run directories are named as a checkpoint."""
    given = checkpoint if isinstance(checkpoint, (list, tuple)) else [checkpoint]
    return [Path(path).relative_to(directory).parts[0] for path in given if path is not None]


def made_up(node: Mapping[str, Any]) -> dict[str, Any]:
    """A few images of the shape and classes of a data set, which need not be there, under the same options."""
    from kd.data.images.base import DataModule
    from kd.data.text.features import SentenceFeatures

    data = make(node, "data")
    common = {key: node[key] for key in inspect.signature(DataModule.__init__).parameters if key in node}
    for key in ("mean", "std"):  # null: as the weights were trained
        common.update({key: [0.5]} if key in common and common[key] is None else {})
    few = {"train_size": None, "label_fraction": 1.0, "batch_size": 8, "val_fraction": 0.1}
    common["augment"] = {k: v for k, v in (node.get("augment") or {}).items() if k != "scale"}  # of image files only
    texts = isinstance(data, SentenceFeatures)  # an MLP takes images as well
    shape = [1, 8, 8] if texts else [3, 48, 48] if data.reads_files else list(data.input_shape)
    classes = getattr(data, "num_classes", None) or 10  # of folders and texts: counted when they are there
    return {**common, **few, "_target_": "kd.data.images.fake.Fake", "shape": shape,
            "num_classes": classes, "train_images": 4 * classes, "test_images": 8}  # fmt: skip


def made_up_masks(node: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A few images with a class at each pixel, in the place of files that need not be there."""
    random = np.random.default_rng(0)
    for split, count in {"train": 24, "test": 4}.items():
        image, mask = (random.integers(0, most, (count, 64, 64, 3)[: 4 - flat]) for most, flat in ((256, 0), (9, 1)))
        np.savez(folder / f"{split}.npz", image=image.astype(np.uint8), mask=mask.astype(np.uint8))
    return {**node, "folder": str(folder), "num_classes": 9, "train_size": None, "batch_size": 8}


BERT = {
    "_target_": "kd.models.transformers_model.transformers_model",
    "config": {
        "model_type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    },
}
LLAMA = {  # wide enough to be cut to 192
    "_target_": BERT["_target_"],
    "config": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 5,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 600,
    },
}


def with_made_up_texts(config: dict[str, Any], folder: Path) -> None:
    """Put a few texts in the place of files, and a small BERT in that of folders which runs to come will write."""
    teacher = config["teacher"]
    data, reads = config["data"], teacher["checkpoint"] is not None or teacher["answers"] is not None
    made = LLAMA if config["task"]["_target_"].endswith("CausalLM") else BERT
    label = data.get("label", "label")
    for split in ("train", "test"):
        lines = [f"{split} text number {i},{i % 3}" for i in range(40)]
        (folder / f"{split}.csv").write_text("\n".join([f"text,{label}", *lines]) + "\n")
    files = {split: str(folder / f"{split}.csv") for split in ("train", "test")}
    few = {
        "val": None,
        "val_fraction": 0.2,
        "test_fraction": None,
        "train_size": None,
        "vocabulary": None,
        "cache": None,
    }
    config["data"] = {**data, **files, **few, "batch_size": 8, "tokenizer": {"vocabulary": 200, "kind": "wordpiece"}}
    config["teacher"] = {
        **teacher,
        "model": made if reads else None,
        "checkpoint": None,
        "answers": None,  # kept ones are not there yet: the network answers
        "allow_random": True,
    }
    config["student"] = {**config["student"], "model": config["student"]["model"] and made, "checkpoint": None}


def not_downloaded(model: Mapping[str, Any]) -> dict[str, Any]:
    """The same network with random weights where its own would come from the internet."""
    return {**model, "pretrained": False} if model.get("pretrained") else dict(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_can_be_run(name: str) -> None:
    """Its conditions have a smallest effect of interest, which the design shows or the study is exploratory."""
    study = load.load_study(EXPERIMENTS / name)
    results = study.folder / RESULTS
    found = power.designs(study, read_results(results, study) if results.is_file() else None)
    power.refuse_blind(study, found)
    assert all(found[condition.comparison].comparison.sesoi for condition in study.supported)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_row_builds(name: str, tmp_path: Path) -> None:
    """With the student, the terms and, in place of another row's run, that row's network as the teacher.

    Not on the meta device: its batch norms are Python there, and a deep network takes up to four times as long.
    """
    from kd.run import build

    study = load.load_study(EXPERIMENTS / name)
    vocabulary.check(study)
    configs = configs_of(study, tmp_path)
    refuse_duplicates(configs)
    built: set[str] = set()
    for row, config in configs.items():
        read = rows_read(config["teacher"]["checkpoint"], tmp_path)
        if config["data"].get("tokenizer") is not None:
            kept = config["teacher"]["answers"] is not None
            with_made_up_texts(config, tmp_path)
            module = build.distiller(config, build.datamodule(config))
            assert list(module.objective.terms) == [term for term, node in config["loss"].items() if node], row
            assert (module.teacher is None) == (not (read or kept)), row
            continue
        models = [not_downloaded(configs[other]["student"]["model"]) for other in read]
        given = {"model": models[0] if len(models) == 1 else models, "checkpoint": None, "allow_random": True}
        masks = config["data"]["_target_"].endswith(".Segmentation")
        config["data"] = made_up_masks(config["data"], tmp_path) if masks else made_up(config["data"])
        if config["loss"].get("crd"):
            config["loss"]["crd"] = {**config["loss"]["crd"], "negatives": 8}  # of a few images
        config["teacher"] = {**config["teacher"], **(given if read else {})}
        config["student"] = {"model": not_downloaded(config["student"]["model"]), "checkpoint": None}
        same = repr({key: config[key] for key in ("data", "student", "teacher", "loss", "distiller", "task")})
        if same in built:  # another recipe or seed of a row before
            continue
        built.add(same)
        module = build.distiller(config, build.datamodule(config))
        assert list(module.objective.terms) == [term for term, node in config["loss"].items() if node is not None], row
        assert (module.teacher is None) <= (not read), f"{row}: a teacher is named and not used"


# ---------------------------------------------------------------------- what was measured


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_the_readme_says_what_was_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict, and every line of its tables, are those of the report that ``results.csv`` gives."""
    monkeypatch.setattr("kd.report.report.draw", lambda *_: {})  # the figures have tests of their own
    study = load.load_study(EXPERIMENTS / name)
    frame = read_results(study.folder / RESULTS, study)
    assert notes(study, frame) == []
    lacking = {(row.name, seed) for row in study.rows.values() for seed in row.seeds}
    assert lacking <= set(finished(frame)[["row", "seed"]].itertuples(index=False, name=None))
    report = build(study, frame, None, tmp_path)
    readme = (study.folder / "README.md").read_text(encoding="utf-8")
    assert f"kd study {name}" in readme
    assert f"Verdict: {report.verdict.headline}." in " ".join(readme.split())
    shown = [line.removeprefix("- ") for line in readme.splitlines() if line.startswith("- ") and " · " in line]
    assert shown == [judged.text.replace("\u00a0", " ") for judged in report.verdict.conditions]
    tables = list(tables_of(report.paths["md"].read_text(encoding="utf-8")))
    shown = list(tables_of(readme))
    assert shown, "the README has no table"
    for lines in shown:
        for line in lines:
            assert any(line.items() <= other.items() for table in tables for other in table), (
                f"not in the report: {line}"
            )


def tables_of(text: str) -> Iterator[list[dict[str, str]]]:
    """The Markdown tables of a text, each row as head → cell, without the bold."""
    head: list[str] | None = None
    rows: list[dict[str, str]] = []
    for line in [*text.replace("\u00a0", " ").splitlines(), ""]:
        if not line.startswith("|"):
            if head is not None:
                yield rows
            head, rows = None, []
            continue
        cells = [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]
        if head is None:
            head = cells
        elif not all(set(cell) <= set(":- ") for cell in cells):
            rows.append(dict(zip(head, cells, strict=True)))


def test_the_index_lists_every_study_with_its_verdict(tmp_path: Path) -> None:
    index = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    lines = {line.split("](")[0].removeprefix("| ["): line for line in index.splitlines() if line.startswith("| [")}
    assert sorted(lines) == STUDIES
    for name in MEASURED:
        report = (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")
        verdict = lines[name].strip("| ").rpartition("| ")[2]
        assert len(verdict) > 3
        assert f"Verdict: {verdict}." in " ".join(report.split())
    assert all(lines[name].count("|") == 4 for name in STUDIES if name not in MEASURED), "a verdict without results"


def test_the_study_that_the_index_shows_can_be_run(tmp_path: Path) -> None:
    text = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "study.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    study = load.load_study(tmp_path / "own")
    assert list(study.rows) == ["teacher", "alone", "soft_2", "soft_4"]
    refuse_duplicates(configs_of(study, tmp_path / "runs"))


def test_the_study_that_the_readme_shows_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (EXPERIMENTS / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for name, text in zip((load.STUDY, load.PUBLISHED), blocks, strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    study = load.load_study(tmp_path)
    vocabulary.check(study)
    assert study.published is not None
    assert study.published.numbers["soft_4"] == {"test/acc1": {"value": 0.9926}}
    assert configs_of(study, tmp_path / "runs")["soft_4"]["loss"]["kd"]["temperature"] == 4
