"""Segmentation from the command line: teacher and student, the record, two processes, the export, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import kd
from kd.cli.main import main
from kd.errors import KdError
from kd.tasks.segmentation import Segmentation

pytestmark = pytest.mark.slow

EDGE = 16


class Maps(nn.Module):
    """Two convolutions without batch norm, at half the resolution, and a classifier."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 4, stride=2, padding=1), nn.ReLU())
        self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, classes, H/2, W/2)."""
        return self.classifier(self.body(images))


def stamps(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright and a red square on noise, each with its class, some pixels ignored."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 90, (count, EDGE, EDGE, 3))
    masks = np.zeros((count, EDGE, EDGE), np.uint8)
    for image, mask in zip(images, masks, strict=True):
        for label, colour in ((1, (160, 160, 160)), (2, (160, 0, 0))):
            y, x = random.integers(0, EDGE - 6, 2)
            image[y : y + 6, x : x + 6] = colour + random.integers(0, 60, (6, 6, 3))
            mask[y : y + 6, x : x + 6] = label
        mask[random.integers(0, EDGE)] = 255
    return images.astype(np.uint8), masks


SQUARES = ["task=segmentation", "model@student=none", "recipe.batch_size=8", "recipe.epochs=4", "hardware=cpu"]
SQUARES += ["recipe.optimizer.lr=0.02", "data=segmentation", "data.val_fraction=0.25"]


def network(role: str, width: int) -> str:
    return f"{role}.model={{_target_:tests.test_segmentation_runs.Maps,width:{width}}}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``squares`` (the data), ``teacher``, and ``student``, which learns from it by pixels and by channels."""
    folder = tmp_path_factory.mktemp("segmentation")
    (folder / "squares").mkdir()
    for seed, (part, count) in enumerate({"train": 41, "test": 9}.items()):
        images, masks = stamps(count, seed)
        names = np.array(["ground", "grey", "red"])
        np.savez(folder / "squares" / f"{part}.npz", image=images, mask=masks, classes=names)
    common = [*SQUARES, f"data.folder={folder / 'squares'}"]
    assert main(["train", *common, network("student", 12), f"hydra.run.dir={folder / 'teacher'}"]) == 0
    assert main(["train", *common, *taught(folder), f"hydra.run.dir={folder / 'student'}"]) == 0
    return folder


def taught(folder: Path) -> list[str]:
    taps = [f"loss.cwd.{side}_taps=[classifier]" for side in ("student", "teacher")]
    found = [network("student", 4), "loss=[ce,kd,cwd]", f"teacher.checkpoint={folder / 'teacher'}", *taps]
    return [*found, "teacher.trust=true", "data.augment.pad=2"]


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def test_the_record_has_the_metrics_of_both_networks_and_the_iou_of_each_class(runs: Path) -> None:
    found = record(runs / "student")
    assert [m["name"] for m in found["metrics"]][:3] == ["miou", "foreground_iou", "pixel_accuracy"]
    assert found["protocol"]["monitor"] == "val/miou"
    test = found["student"]["selected"]["test"]
    assert set(test) == {"miou", "foreground_iou", "pixel_accuracy", "nll", "agreement", "kl"}
    for side in (found["student"]["selected"], found["teacher"]):
        assert np.mean(side["test_per_class"]) == pytest.approx(side["test"]["miou"])
    assert found["teacher"]["test"]["miou"] > 0.5
    assert {"ce", "kd", "cwd", "pixel_accuracy"} <= set(found["student"]["last"]["train"])
    assert found["data"]["class_names"] == ["ground", "grey", "red"]


def test_it_is_measured_again_and_reported(runs: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(runs)
    assert main(["eval", "student"]) == 0
    said = capsys.readouterr().out
    test = record(runs / "student")["student"]["selected"]["test"]
    assert f"{test['miou']:.4f}" in said
    assert "IoU of class red" in said
    assert main(["report", "student"]) == 0
    assert "test mIoU, %" in capsys.readouterr().out


def test_two_processes_find_what_one_finds(runs: Path, monkeypatch) -> None:
    """The last batch has fewer images, and every process other numbers of valid pixels."""
    monkeypatch.chdir(Path(__file__).parents[1])
    common = [*SQUARES, f"data.folder={runs / 'squares'}", *taught(runs), "recipe.epochs=2", "hardware=ddp_cpu"]
    for processes in (1, 2):
        where = f"hydra.run.dir={runs / str(processes)}"
        assert main(["train", *common, f"hardware.devices={processes}", where, "hardware.threads=1"]) == 0
    one, two = (record(runs / n) for n in "12")
    assert (one["processes"], two["processes"]) == (1, 2)
    for side in ("student", "teacher"):
        found = [r[side]["test"] if side == "teacher" else r[side]["last"]["test"] for r in (one, two)]
        assert found[0] == pytest.approx(found[1], abs=1e-5)
    exact = ("miou", "foreground_iou", "pixel_accuracy")
    assert {k: one["teacher"]["test"][k] for k in exact} == {k: two["teacher"]["test"][k] for k in exact}
    for name, value in one["student"]["last"]["train"].items():  # that of cwd, a mean over samples, is logged by rows
        assert value == pytest.approx(two["student"]["last"]["train"][name], rel=3e-3 if name == "cwd" else 1e-4)
    weights = [load_file(runs / n / "student_last.safetensors") for n in "12"]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_pixels_of_a_teacher_that_are_kept_teach_as_the_live_one(runs: Path, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    still = [o for o in taught(runs) if "cwd" not in o and "augment" not in o]
    common = [*SQUARES, f"data.folder={runs / 'squares'}", *still, "loss=[ce,kd]", "data.augment.flip=false"]
    kept = f"teacher.answers={{_target_:kd.distill.cache.CachedAnswers,folder:{runs / 'answers'}}}"
    assert main(["train", *common, f"hydra.run.dir={runs / 'live'}"]) == 0
    assert main(["train", *common, kept, f"hydra.run.dir={runs / 'kept'}"]) == 0
    weights = [load_file(runs / n / "student_last.safetensors") for n in ("live", "kept")]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_an_exported_student_writes_masks_without_torch(runs: Path, capsys) -> None:
    folder = runs / "onnx"
    assert main(["export", str(runs / "student"), f"out={folder}", "quantize=static"]) == 0
    assert "test/miou" in capsys.readouterr().out
    images, _ = stamps(1, 7)
    photo = runs / "photo.png"
    Image.fromarray(images[0]).save(photo)
    done = subprocess.run(
        [sys.executable, str(folder / "run_onnx.py"), str(photo)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{photo}\tground ")
    with Image.open(f"{photo}.mask.png") as image:
        mask = np.array(image)
    net = Maps(4, 3).eval()
    net.load_state_dict(load_file(runs / "student" / "student.safetensors"))
    mean, std = (np.array(v) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    inputs = torch.from_numpy((images / 255 - mean) / std).float().movedim(-1, 1)
    with torch.no_grad():
        logits = nn.functional.interpolate(net(inputs), (EDGE, EDGE), mode="bilinear", align_corners=False)
    assert mask.shape == (EDGE, EDGE)
    assert (mask == logits[0].argmax(0).numpy()).mean() > 0.97  # int8
    assert (folder / "README.md").read_text().count("image-segmentation") == 2


def test_what_keeps_or_compares_samples_is_refused(runs: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(KdError, match=r"answers masks, and kd predict writes a class .* kd export .* format=onnx"):
        kd.load(runs / "student")
    refused = {
        "protocol.keep_predictions=true": "protocol.keep_predictions = true is not allowed with Segmentation",
        "teacher.cache=true": "teacher.cache = true",
        "model@student=mlp": "task = segmentation needs a network that answers (samples, classes, height, width)",
        "data.num_classes=2": "there are 3 names of classes",
    }
    for override, words in refused.items():
        common = [*SQUARES, f"data.folder={runs / 'squares'}", *taught(runs), f"hydra.run.dir={runs / 'refused'}"]
        if override.startswith("model@"):
            common = [o for o in common if not o.startswith(("student.model", "model@student"))]
            common = [o if "cwd" not in o else "loss=[ce,kd]" for o in common]
        assert main(["train", *common, override]) == 1
        said = capsys.readouterr().err
        assert words in said, said
        assert "epoch 1" not in said


def test_labels_that_are_no_class_of_the_users_own_data_are_refused() -> None:
    images, masks = stamps(8, 0)
    batch = [(torch.from_numpy(images).movedim(-1, 1).float(), torch.from_numpy(masks).long() + 2)]
    batch[0][1][masks == 255] = 255
    with pytest.raises(KdError, match=r"the labels go to 4, the student has 3 outputs"):
        kd.distill(Maps(4, 3), None, batch, batch, task=Segmentation(), epochs=1, accelerator="cpu", verbose=False)
