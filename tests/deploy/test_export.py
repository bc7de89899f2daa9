"""``kd export``: what is written answers as the run does, without kd; what cannot be written leaves nothing behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

import kd
from kd.cli.main import main
from kd.config.composition import CONF
from kd.deploy import formats, onnx_runtime
from kd.deploy.export import Options, _calibration, compare, export
from kd.deploy.student import Student, from_raw, student
from kd.errors import KdError
from kd.losses.base import Batch
from kd.run import networks
from kd.tasks.classification import Classification
from kd.tasks.segmentation import Segmentation
from kd.tasks.tokens import CausalLM

pytestmark = pytest.mark.slow  # pages, figures, exports and processes take their time

BLOCKED = "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'kd', 'transformers', 'torchvision'))); "
BLOCKED += "file, *sys.argv[1:] = sys.argv[1:]; sys.argv[0] = file; runpy.run_path(file, run_name='__main__')"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of other sizes than the network's, a run on them (``run``), and its export (``onnx``)."""
    folder = tmp_path_factory.mktemp("images")
    drawn = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for place, name in enumerate(("ant", "bee")):
            (folder / "pets" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = drawn.integers(0, 140, (20 + number, 24, 3)) + 60 * place
                Image.fromarray(pixels.astype("uint8")).save(folder / "pets" / split / name / f"{number}.png")
    argv = ["train", "data=imagefolder", f"data.folder={folder / 'pets'}", "data.image_size=16", "data.num_workers=0"]
    argv += ["data.crop_pct=0.9", "model@student=mlp", "student.model.hidden=[8]", "recipe.epochs=2", "hardware=cpu"]
    assert main([*argv, "recipe.batch_size=8", f"hydra.run.dir={folder / 'run'}"]) == 0
    assert main(["export", str(folder / "run"), f"out={folder / 'onnx'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a BERT of one layer on a csv of texts, and its export (``onnx``)."""
    folder = tmp_path_factory.mktemp("texts")
    phrases = {"card": ("lost card", "my card is gone"), "rate": ("exchange rate", "what rate today")}
    rows = [(f"{phrase} {word}", name) for name, some in phrases.items() for phrase in some for word in "abcdefgh"]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(folder / "train.csv", index=False)
    argv = ["train", "data=text", f"data.train={folder / 'train.csv'}", "data.test_fraction=0.25", "data.cache=null"]
    argv += ["task=text_classification", "model@student=bert_tiny", "student.model.config.num_hidden_layers=1"]
    assert main([*argv, "hardware=cpu", "recipe=finetune", "recipe.epochs=1", f"hydra.run.dir={folder / 'run'}"]) == 0
    assert main(["export", str(folder / "run"), f"out={folder / 'onnx'}"]) == 0
    return folder


def alone(script: Path, *inputs: str) -> list[tuple[str, float]]:
    """Label and probability of each input, by the script, in a process that has neither torch nor kd."""
    command = [sys.executable, "-c", BLOCKED, str(script), *inputs]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cells = [line.split("\t") for line in done.stdout.splitlines()]
    assert [cell[0] for cell in cells] == list(inputs)
    return [(cell[1], float(cell[2])) for cell in cells]


def test_the_script_answers_images_as_the_run_does(images: Path) -> None:
    files = [str(file) for file in sorted((images / "pets" / "test").rglob("*.png"))]
    found = alone(images / "onnx" / "run_onnx.py", *files)
    expected = kd.load(images / "run").predict(files)
    assert [label for label, _ in found] == [one.label for one in expected]
    assert [share for _, share in found] == pytest.approx([one.probability for one in expected], abs=1e-4)


def test_the_script_answers_texts_as_the_run_does(texts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    asked = ["my card is gone a", "what rate", "lost card h and more words than before"]
    found = alone(texts / "onnx" / "run_onnx.py", *asked)
    expected = kd.load(texts / "run").predict(asked)
    assert [label for label, _ in found] == [one.label for one in expected]
    assert [share for _, share in found] == pytest.approx([one.probability for one in expected], abs=1e-4)
    export(student(texts / "run"), Options("hf"), tmp_path / "hf")
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    assert read.config.id2label == {0: "card", 1: "rate"}
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "hf").iterdir()}
    assert modes["model.safetensors"] == modes["README.md"]  # a colleague may read it


def test_the_card_has_the_numbers_of_the_run(images: Path) -> None:
    ran = json.loads((images / "run" / "result.json").read_text())
    _, front, text = (images / "onnx" / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    (result,) = fields["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(ran["student"]["selected"]["test"]["acc1"], abs=1e-6)
    assert fields["pipeline_tag"] == "image-classification"
    assert f"{ran['student']['parameters']:,}" in text
    assert json.loads((images / "onnx" / "labels.json").read_text()) == ["ant", "bee"]


def test_other_formats_answer_the_same(images: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    given = student(images / "run")
    export(given, Options("torch-export"), tmp_path / "exported")
    loaded = torch.export.load(tmp_path / "exported" / "model.pt2").module()
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    expected = from_raw(given, pixels)(pixels)
    torch.testing.assert_close(loaded(images=pixels), expected)
    torch.testing.assert_close(loaded(images=pixels[:1]), expected[:1])
    export(given, Options("safetensors"), tmp_path / "plain")
    kept = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in given.network.state_dict().items())


def test_int8_says_what_it_loses(images: Path, tmp_path: Path) -> None:
    given = student(images / "run")
    for how in ("dynamic", "static"):
        made = export(given, Options("onnx", how), tmp_path / how)
        assert made.files["model_int8.onnx"] < made.files["model.onnx"]
        data = kd.run.build.datamodule(given.config)
        data.setup("test")
        for name, value in made.accuracy.items():
            answer = onnx_runtime.answers(tmp_path / how / name)
            module = from_raw(given, torch.zeros(1, 3, 16, 16))
            hits = [
                answer(module.raw(batch.inputs)).argmax(1) == batch.targets.numpy() for batch in data.test_dataloader()
            ]
            assert value == pytest.approx(float(np.concatenate(hits).mean()), abs=1e-6)
            assert f"| {name} | {value:.4f} |" in (tmp_path / how / "README.md").read_text()


def test_int8_of_texts(texts: Path, tmp_path: Path) -> None:
    made = export(student(texts / "run"), Options("onnx", "dynamic"), tmp_path / "int8")
    ran = json.loads((texts / "run" / "result.json").read_text())
    assert made.accuracy["model.onnx"] == pytest.approx(ran["student"]["selected"]["test"]["acc1"], abs=1e-6)
    assert made.files["model_int8.onnx"] < made.files["model.onnx"]


def test_static_int8_where_a_teacher_saw_several_views(images: Path) -> None:
    given = student(images / "run")
    config = {**given.config, "data": {**given.config["data"], "augment": {"pad": 2, "flip": True, "period": 3}}}
    data = kd.run.build.datamodule(config)
    data.setup("fit")
    assert data.views == 3
    samples = list(_calibration(from_raw(given, torch.zeros(1, 3, 16, 16)), data))
    assert len(samples) == min(256, len(data.parts["train"].targets))


def test_what_differs_is_refused_and_leaves_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shifted(*arguments: Any) -> formats.Answer:
        answer = formats.onnx(*arguments)
        return lambda raw: answer(raw) + 0.01

    monkeypatch.setattr("kd.deploy.export.FORMATS", {"onnx": shifted})
    assert main(["export", str(images / "run"), f"out={tmp_path / 'out'}"]) == 1
    said = capsys.readouterr().err
    assert "differ from the run's by 0.01" in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


class Eigenvalues(nn.Module):
    """What ONNX has no operator for."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.linalg.eigvals(inputs.mean(1)).abs()


def of(network: nn.Module, shape: tuple[int, ...], node: Any = None, **more: Any) -> Student:
    """A student that no run has trained."""
    channels = shape[0] if shape else 0
    facts = {"input_shape": shape, "mean": [0.5] * channels, "std": [0.25] * channels, "class_names": list("abcd")}
    network.eval().requires_grad_(False)
    return Student(Path(), Path(), {"data": {}}, node, network, more.pop("task", Classification()), facts, **more)


def test_an_operator_that_onnx_lacks(tmp_path: Path) -> None:
    given = of(Eigenvalues(), (3, 8, 8))
    pixels = torch.rand(2, 3, 8, 8)
    module = from_raw(given, pixels)
    with pytest.raises(KdError, match=r"format = onnx is not possible.*aten.linalg_eig"):
        formats.onnx(given, module, module.raw(pixels), tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_timm_loads_its_folder(tmp_path: Path) -> None:
    import timm

    node = {"_target_": formats.TIMM, "name": "test_vit"}
    given = of(timm.create_model("test_vit", num_classes=4, img_size=32), (3, 32, 32), node)
    pixels = torch.rand(3, 3, 32, 32)
    module = from_raw(given, pixels)
    formats.timm(given, module, module.raw(pixels), tmp_path, None)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(pixels), given.network(pixels))
    assert list(loaded.pretrained_cfg["mean"]) == [0.5, 0.5, 0.5]
    with pytest.raises(KdError, match="format = timm is not possible"):
        formats.timm(replace(given, node=None), module, module.raw(pixels), tmp_path, None)


OF_IMAGES = sorted(
    file.stem for file in (CONF / "model").glob("*.yaml") if not re.search("transformers_model|null$", file.read_text())
)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_every_network_of_images_agrees(name: str, tmp_path: Path) -> None:
    """With random weights, and the batch statistics that these have."""
    node = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["model"]
    network = networks.network(node, "student.model", 10, (3, 32, 32))
    images = (torch.randint(0, 256, (5, 3, 32, 32)) / 255 - 0.5) / 0.25
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of this batch: without, logits would vanish or overflow
    network.train()(images)
    task = Segmentation() if name == "timm_unet" else Classification()
    given = of(network, (3, 32, 32), task=task)
    batches = [Batch(images).few(count) for count in (1, 5)]
    module = from_raw(given, batches[0].inputs)
    answer = formats.onnx(given, module, module.raw(batches[1].inputs), tmp_path, None)
    assert compare(module, answer, batches, Options("onnx"))[0] < 1e-4


def test_a_decoder_agrees(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32)
    given = of(AutoModelForCausalLM.from_config(config), (), task=CausalLM(), tokenizer=object())
    batches = []
    for samples, length in ((1, 4), (3, 9)):
        mask = torch.ones(samples, length, dtype=torch.int64)
        batches.append(Batch({"input_ids": torch.randint(0, 50, (samples, length)), "attention_mask": mask}))
    module = from_raw(given, batches[0].inputs)
    answer = formats.onnx(given, module, module.raw(batches[1].inputs), tmp_path, None)
    assert compare(module, answer, batches, Options("onnx"))[0] < 1e-4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["format=onx"], "format = onx is not allowed"),
        (["fromat=onnx"], "near: format"),
        (["format=hf", "quantize=static"], "quantize = static"),
        (["tolerance=-1"], "tolerance = -1"),
        (["opset=3"], "opset = 3"),
        (["weights=best"], "selected or last"),
        (["format=timm"], "format = timm is not possible"),
        (["format=hf"], "format = hf is not possible"),
        (["out={there}"], "is there already"),
    ],
)
def test_bad_arguments(argv: list[str], words: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [argument.replace("{there}", str(images / "onnx")) for argument in argv]
    assert main(["export", str(images / "run"), *argv]) == 1
    assert words in capsys.readouterr().err
    assert not (images / "run" / "export").exists() or not list((images / "run" / "export").iterdir())


def test_static_int8_knows_the_range_behind_a_relu6(tmp_path: Path) -> None:
    """The convolution's output goes from some −1,000 to 1,000, what the next layer reads from 0 to 6."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    with torch.no_grad():
        network[0].weight.mul_(600)
    images = torch.randn(64, 3, 8, 8)
    file, out = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    batch = {"x": {0: torch.export.Dim("batch")}}
    torch.onnx.export(network.eval(), (images,), file, input_names=["x"], dynamic_shapes=(batch["x"],), dynamo=True)
    samples = [{"x": one[None].numpy()} for one in images]
    onnx_runtime.quantise(file, out, "static", samples)
    plain, small = (onnx_runtime.answers(each) for each in (file, out))
    wanted, found = (np.concatenate([answer(sample) for sample in samples]) for answer in (plain, small))
    assert np.abs(found - wanted).max() < 0.1 * wanted.std()
