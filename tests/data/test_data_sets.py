"""The sets themselves: every YAML fits its class; files in torchvision's layout are read, or refused in a sentence."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from kd.config.composition import CONF
from kd.config.signature import arguments
from kd.data.images.base import DataModule
from kd.data.images.cifar import CIFAR
from kd.data.images.digits import Digits
from kd.data.images.fake import Fake
from kd.data.images.mnist import FILES, MNIST
from kd.data.text.base import TextModule
from kd.data.torch_datasets import TorchDatasets
from kd.errors import KdError

OPTIONS = sorted(path.stem for path in (CONF / "data").glob("*.yaml") if not path.stem.startswith("_"))


def config(name: str, **changes: Any) -> Any:
    """The composed ``data`` node of one option."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        node = compose(f"data/{name}")
    around = {"recipe": {"batch_size": 32}, "seed": 0, "paths": {"data": "nowhere"}, "data": changes}
    return OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(node)), around).data


def idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    """40 + 20 images in MNIST's layout."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count) % 10
        idx(raw / f"{part}-labels-idx1-ubyte", labels)
        idx(raw / f"{part}-images-idx3-ubyte", np.broadcast_to(labels[:, None, None] * 20, (count, 28, 28)))
    return tmp_path


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """20 + 10 images in CIFAR-100's layout, with their checksums in place of the true ones."""
    cls = torchvision.datasets.CIFAR100
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    contents: dict[str, dict[str, Any]] = {"meta": {"fine_label_names": [f"thing {c}" for c in range(100)]}}
    for part, count in (("train", 20), ("test", 10)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[part] = {"data": pixels, "fine_labels": [i % 4 for i in range(count)]}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(cls, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(cls, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(cls, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})
    return tmp_path


@pytest.mark.parametrize("name", OPTIONS)
def test_every_yaml_fits_its_class(name: str) -> None:
    node = config(name)
    keys = set(node) - {"_target_"}
    known = arguments(node["_target_"])
    assert not known.any
    assert keys == set(known.names), "every option appears in the YAML, and nothing else"
    bases = (DataModule, TextModule, TorchDatasets)
    base = next(base for base in bases if issubclass(get_class(node["_target_"]), base))
    assert set(inspect.signature(base.__init__).parameters) - {"self"} <= keys
    changes = {"folder": "pets"} if node.get("folder", "") is None else {}
    assert isinstance(instantiate(config(name, **changes)), base)


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_sets_without_files_run_from_their_yaml(name: str) -> None:
    module = instantiate(config(name))
    batch = next(iter(module.train_dataloader()))
    assert batch.inputs.shape == (32, *module.input_shape)
    assert len(module.class_names) == module.num_classes == 10
    assert len(module.mean) == len(module.std) == module.input_shape[0]


def test_mnist_layout_is_read(small_mnist: Path) -> None:
    module = MNIST(root=str(small_mnist), val_fraction=0.25)
    batch = next(iter(module.test_dataloader()))
    assert torch.equal(batch.targets, torch.arange(20) % 10)
    assert torch.allclose(batch.inputs[:, 0, 5, 5], batch.targets * 20 / 255)
    assert [len(module.parts[p].targets) for p in ("train", "val", "test")] == [30, 10, 20]


def test_cifar_layout_is_read(small_cifar: Path) -> None:
    module = CIFAR(root=str(small_cifar), val_fraction=0.2, mean=[0.5, 0.4, 0.3])
    batch = next(iter(module.test_dataloader()))
    original = torchvision.datasets.CIFAR100(str(small_cifar), train=False)
    expected = torch.from_numpy(original.data[3]).permute(2, 0, 1) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    assert torch.allclose(batch.inputs[3], expected, atol=1e-6)
    assert (module.class_names[7], module.num_classes) == ("thing 7", 100)
    assert module.split_facts["set"] == f"CIFAR-100 {module.digest}"


@pytest.mark.parametrize(
    ("module", "folder", "command"),
    [
        (MNIST, "MNIST/raw", "kd train data=mnist data.download=true"),
        (lambda **k: MNIST(name="fashion_mnist", **k), "FashionMNIST/raw", "data=fashion_mnist data.download=true"),
        (lambda **k: CIFAR(name="cifar10", **k), "cifar-10-batches-py", "data=cifar10 data.download=true"),
        (CIFAR, "cifar-100-python", "kd train data=cifar100 data.download=true"),
    ],
)
def test_a_missing_set_names_folder_command_and_variable(
    tmp_path: Path, module: Callable[..., DataModule], folder: str, command: str
) -> None:
    with pytest.raises(KdError) as caught:
        module(root=str(tmp_path)).setup()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(part in sentence for part in (str(tmp_path / folder), command, "KD_DATA", "paths.data"))


def test_no_root_is_a_sentence() -> None:
    with pytest.raises(KdError, match=r"data\.root = None is not allowed: set paths\.data, or KD_DATA"):
        MNIST().setup()


@pytest.mark.parametrize("module", [MNIST, CIFAR])
def test_a_failing_download_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: type[DataModule]
) -> None:
    def offline(self: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", offline)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", offline)
    with pytest.raises(KdError, match=r"data\.download = true, but .* could not be downloaded .*no route to host"):
        module(root=str(tmp_path), download=True).prepare_data()  # type: ignore[call-arg]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("length", [0, 6, 20])
def test_a_truncated_idx_file_is_named(small_mnist: Path, file: str, length: int) -> None:
    path = small_mnist / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(KdError, match=f"{file} is damaged") as caught:
        MNIST(root=str(small_mnist)).setup()
    assert str(path) in str(caught.value)


def test_a_damaged_cifar_file_is_named(small_cifar: Path) -> None:
    path = small_cifar / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(KdError, match="cifar-100-python/train is damaged: its MD5 is"):
        CIFAR(root=str(small_cifar)).setup()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"drop_classes": [12]}, "data.drop_classes = [12] is not allowed: classes are 0 to 9"),
        ({"drop_classes": list(range(10))}, "leaves no image to train on"),
        ({"drop_classes": "3"}, "data.drop_classes = 3 is not allowed: it must be a list of whole numbers, 0 or more"),
        (
            {"val_fraction": 0.0001},
            "data.val_fraction = 0.0001 leaves no image for validation: the training set has 1,078",
        ),
        ({"val_fraction": 0.9999}, "data.val_fraction = 0.9999 leaves none to train on"),
        ({"val_fraction": 0}, "data.val_fraction = 0 is not allowed: it must be a number above 0 and below 1"),
        ({"test_fraction": 1.5}, "data.test_fraction = 1.5 is not allowed"),
        ({"label_fraction": 0}, "data.label_fraction = 0 is not allowed: it must be a number above 0 and at most 1"),
        ({"label_fraction": float("nan")}, "data.label_fraction = nan is not allowed"),
        ({"batch_size": 0}, "data.batch_size = 0 is not allowed: it must be a whole number, 1 or more"),
        ({"eval_batch_size": 2.5}, "data.eval_batch_size = 2.5 is not allowed"),
        ({"train_size": 5000}, "data.train_size = 5000 is not allowed: there are 970 training images"),
        ({"train_size": 10, "drop_last": True}, "data.drop_last = true leaves no batch"),
        ({"test_shift": -1}, "data.test_shift = -1 is not allowed"),
        ({"test_shift": 8}, "data.test_shift = 8 is not allowed: the images are 8 x 8"),
        ({"augment": {"pad": -1}}, "data.augment.pad = -1 is not allowed"),
        ({"augment": {"pad": 900}}, "data.augment.pad = 900 is not allowed: it must be less than 8"),
        (
            {"augment": {"pad": 8, "pad_mode": "reflect"}},
            "data.augment.pad = 8 is not allowed: it must be less than 8, the images are 8 x 8",
        ),
        (
            {"augment": {"pad_mode": "wrap"}},
            "data.augment.pad_mode = wrap is not allowed: it must be constant or reflect",
        ),
        ({"augment": {"fliip": True}}, "data.augment.fliip is not an option (near: flip)"),
        ({"augment": {"scale": [0.5, 1]}}, "data.augment.scale is for image files only"),
        ({"mean": [0.1, 0.2]}, "data.mean = [0.1, 0.2] is not allowed: the images have 1 channel"),
        ({"std": [0.0]}, "data.std = [0.0] is not allowed"),
        ({"keep_unlabelled": "no"}, "data.keep_unlabelled = no is not allowed: it must be true or false"),
        ({"shuffle": None}, "data.shuffle = null is not allowed"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KdError) as caught:
        Digits(**options).setup()
    assert sentence in str(caught.value)


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(KdError) as caught:
        Fake(batch_size=0, val_fraction=2, augment={"flip": 3})
    assert len(str(caught.value).splitlines()) == 3


def test_wrong_shapes_and_names_are_refused() -> None:
    with pytest.raises(KdError, match=r"data\.shape = \[3, 32\] is not allowed"):
        Fake(shape=[3, 32])
    with pytest.raises(KdError, match=r"data\.name = kmnist is not allowed: it must be mnist or fashion_mnist"):
        MNIST(name="kmnist")


@pytest.mark.data
@pytest.mark.parametrize(("name", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion_mnist", 0.2860, 0.3530)])
def test_real_mnist(kd_data: str, name: str, mean: float, std: float) -> None:
    module = instantiate(config(name, root=kd_data))
    module.setup()
    assert [len(module.parts[p].targets) for p in ("train", "val", "test")] == [54000, 6000, 10000]
    pixels = module.parts["train"].inputs.float() / 255
    assert (float(pixels.mean()), float(pixels.std())) == pytest.approx((mean, std), abs=1e-4)
    batch = next(iter(module.val_dataloader()))
    assert batch.inputs.shape == (512, 1, 28, 28)
    assert torch.bincount(module.parts["val"].targets).min() > 500


@pytest.mark.data
def test_real_stamps(kd_data: str) -> None:
    """A folder of photographs as an engineer has it: cut-outs of 96 pixels, inputs as EfficientNet-Lite wants them."""
    own = {"folder": "stamps8", "image_size": 96, "crop_pct": 1.0, "num_workers": 0, "val_fraction": 0.2}
    own |= {"augment": {"pad": 8}, "mean": [0.5], "std": [0.5]}
    module = instantiate(config("imagefolder", root=kd_data, **own))
    batch = next(iter(module.train_dataloader()))
    assert batch.inputs.shape == (32, 3, 96, 96)
    assert [len(module.parts[p].targets) for p in ("train", "val", "test")] == [145, 38, 56]
    assert (module.num_classes, module.class_names[0], module.mean) == (8, "bird", [0.5] * 3)
    assert -1 <= float(batch.inputs.min()) < float(batch.inputs.max()) <= 1
