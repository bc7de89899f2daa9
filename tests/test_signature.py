"""Arguments read from source agree with what Python itself says after importing."""

from __future__ import annotations

import inspect

import pytest

from kd.config.signature import arguments


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.SGD",
        "torch.optim.Adam",
        "torch.optim.lr_scheduler.MultiStepLR",
        "kd.distill.schedules.Linear",
        "kd.distill.distiller.Distiller",
        "kd.distill.teacher.Teacher",
        "kd.records.record.write",
        "lightning.pytorch.callbacks.EarlyStopping",
    ],
)
def test_agrees_with_inspect(target: str) -> None:
    module, _, name = target.rpartition(".")
    real = inspect.signature(getattr(__import__(module, fromlist=[name]), name)).parameters
    assert set(arguments(target).names) == set(real)
    assert not arguments(target).any


def test_kwargs_accept_anything() -> None:
    assert arguments("timm.create_model").any


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("tork.optim.SGD", "there is no module 'tork'"),
        ("torch.optim.SGDD", "there is no 'SGDD' in torch.optim"),
        ("kd.distill.schedules.Liner", r"no 'Liner' in kd.distill.schedules \(near: Linear"),
    ],
)
def test_unknown_names_are_sentences(target: str, sentence: str) -> None:
    with pytest.raises(LookupError, match=sentence):
        arguments(target)


def test_folders_without_an_init_are_packages(tmp_path, monkeypatch) -> None:
    (tmp_path / "outer_ns" / "inner_ns").mkdir(parents=True)
    (tmp_path / "outer_ns" / "inner_ns" / "term.py").write_text("class Own:\n    def __init__(self, a): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert arguments("outer_ns.inner_ns.term.Own").names == ("a",)
    with pytest.raises(LookupError, match=r"'outer_ns.inner_ns.trem.Own' was not found"):
        arguments("outer_ns.inner_ns.trem.Own")


def test_a_module_that_does_not_parse_is_a_sentence(tmp_path, monkeypatch) -> None:
    (tmp_path / "outside_broken.py").write_text("class Own:\n    def __init__(self, a:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LookupError, match=r"outside_broken.py does not parse: .* \(outside_broken.py, line 2\)"):
        arguments("outside_broken.Own")
    (tmp_path / "outside_null.py").write_bytes(b"a = 1\0\n")
    with pytest.raises(LookupError, match=r"outside_null.py does not parse: .*null bytes"):
        arguments("outside_null.Own")


def test_a_subclass_inherits_its_base_arguments(tmp_path, monkeypatch) -> None:
    (tmp_path / "outside_base.py").write_text("class Base:\n    def __init__(self, a, b=1): ...\n")
    (tmp_path / "outside_sub.py").write_text("from outside_base import Base\nclass Sub(Base):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert arguments("outside_sub.Sub").names == ("a", "b")
