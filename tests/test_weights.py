"""Weights from every kind of file, and every kind of bad file."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd.errors import KdError
from kd.run import weights


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def same(net: nn.Module, state: dict) -> bool:
    fresh = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    weights.load(fresh, state, "file", "teacher")
    return all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


def test_own_file_carries_what_is_known(net, tmp_path) -> None:
    weights.save(net, tmp_path / "student.safetensors", {"model": {"_target_": "x"}})
    state, about = weights.read(tmp_path)  # a run directory
    assert about == {"model": {"_target_": "x"}}
    assert same(net, state)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {**{f"student.{k}": v for k, v in s.items()}, "objective.terms.x": torch.zeros(1)}},
    ],
)
def test_plain_and_wrapped_state_dicts(net, tmp_path, wrap) -> None:
    torch.save(wrap(net.state_dict()), tmp_path / "file.pt")
    assert same(net, weights.read(tmp_path / "file.pt")[0])


def test_foreign_safetensors(net, tmp_path) -> None:
    save_file(net.state_dict(), str(tmp_path / "model.safetensors"))
    assert same(net, weights.read(tmp_path / "model.safetensors")[0])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, writer) -> None:
    monkeypatch.chdir(tmp_path)
    if writer == "torch":
        torch.save({"a": Evil()}, "evil.pt")
    else:
        with open("evil.pt", "wb") as handle:
            pickle.dump({"a": Evil()}, handle)
    with pytest.raises(KdError, match=r"evil\.pt is refused: it is a pickle that would run code"):
        weights.read("evil.pt")
    assert not os.path.exists("pwned")


@pytest.mark.parametrize("name", ["cut.pt", "empty.pt", "text.pt", "cut.safetensors", "empty.safetensors"])
def test_damaged_files_are_sentences(net, tmp_path, name) -> None:
    file = tmp_path / name
    if name.startswith("cut"):
        if file.suffix == ".pt":
            torch.save(net.state_dict(), file)
        else:
            save_file(net.state_dict(), str(file))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.write_bytes(b"hello world" if name == "text.pt" else b"")
    with pytest.raises(KdError, match=f"{name} cannot be read: it is truncated or not a"):
        weights.read(file)


def test_missing_files_and_empty_directories(tmp_path) -> None:
    with pytest.raises(KdError, match="does not exist: give a run directory"):
        weights.read(tmp_path / "nothing.pt")
    with pytest.raises(KdError, match="holds no weights"):
        weights.read(tmp_path)


def test_a_file_without_tensors(tmp_path) -> None:
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    with pytest.raises(KdError, match="holds no state dict"):
        weights.read(tmp_path / "numbers.pt")


def test_what_does_not_fit_is_named(net) -> None:
    state = net.state_dict()
    with pytest.raises(KdError, match=r"does not fit the teacher: 1\.weight is \(9, 9\) in the file and \(2, 4\)"):
        weights.load(net, {**state, "1.weight": torch.zeros(9, 9)}, "f", "teacher")
    with pytest.raises(KdError, match=r"lacks 0\.bias and has other \(1 missing, 1 unexpected\)"):
        weights.load(
            net, {**{k: v for k, v in state.items() if k != "0.bias"}, "other": torch.zeros(1)}, "f", "student"
        )
