"""Every loss against numbers that the reference implementations returned; inputs and settings come from the files.

``pytest --golden=DIR`` puts other cases through the same tests: every DIR/<method><suffix>.npz whose name
starts with a method below. Keys: inputs (``student_logits``, ``student_feature_0``, …), 0-d hyperparameters under the
names of our arguments, ``loss``, ``grad_<input>``, ``alt_loss__<other implementation>``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.losses.base import Batch, Output, Setup, Term
from kd.losses.features.at import AttentionTransfer
from kd.losses.features.hint import Hint
from kd.losses.functional import attention_transfer, cross_entropy, hint_loss, kl_divergence
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.kd import KnowledgeDistillation


class Case:
    """One file: tensors by name, hyperparameters, and the reference values."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        self.loss = float(arrays.pop("loss"))
        self.alternatives = {k[len("alt_loss__") :]: float(v) for k, v in arrays.items() if k.startswith("alt_loss__")}
        self.grads = {k[len("grad_") :]: v for k, v in arrays.items() if k.startswith("grad_")}
        rest = {k: v for k, v in arrays.items() if not k.startswith(("alt_loss__", "grad_"))}
        self.hyper: dict[str, Any] = {k: v.item() for k, v in rest.items() if v.ndim == 0}
        self.tensors = {k: torch.from_numpy(v) for k, v in rest.items() if v.ndim > 0}
        for name in self.grads:
            self.tensors[name].requires_grad_()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def layers(self, side: str) -> list[Tensor]:
        count = sum(name.startswith(f"{side}_feature_") for name in self.tensors)
        assert count > 0, "the case has no features"
        return [self.tensors[f"{side}_feature_{i}"] for i in range(count)]

    def over_layers(self, function: Callable[..., Tensor], **hyper: Any) -> Tensor:
        pairs = zip(self.layers("student"), self.layers("teacher"), strict=True)
        return torch.stack([function(s, t, **hyper) for s, t in pairs]).sum()

    def kl(self) -> Tensor:
        return kl_divergence(self["student_logits"], self["teacher_logits"], **self.hyper)

    def teacher_choice(self) -> Tensor:
        return self["teacher_logits"].argmax(-1)


FUNCTIONS: dict[str, Callable[[Case], Tensor]] = {
    "kd": Case.kl,
    "kd_deit_soft": lambda case: case.kl() / case["student_logits"].shape[-1],  # DeiT divides by rows × classes
    "kd_hard": lambda case: cross_entropy(case["student_logits"], case.teacher_choice(), **case.hyper),
    "fitnet": lambda case: case.over_layers(hint_loss, **case.hyper),
    "at": lambda case: case.over_layers(attention_transfer, **case.hyper),
}
TERMS: dict[str, Callable[[Case], Term]] = {
    "kd": lambda case: KnowledgeDistillation(**case.hyper),
    "kd_hard": lambda case: CrossEntropy(**case.hyper),
    "fitnet": lambda case: Hint(None, None, adapter="identity", **case.hyper),
    "at": lambda case: AttentionTransfer(**case.hyper),
}
OTHER_METHODS = {"kd_logits_mse"}  # reference files whose names look like cases of a method above


def method_of(name: str) -> str | None:
    """The method of a file name: the longest that it starts with, before a sign or a digit (``kdsvd`` is no ``kd``)."""
    known = [m for m in [*FUNCTIONS, *OTHER_METHODS] if re.match(rf"{m}($|[^a-zA-Z])", name)]
    method = max(known, key=len, default=None)
    return None if method in OTHER_METHODS else method


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--golden")
    names = sorted(path.stem for path in folder.glob("*.npz") if method_of(path.stem))
    if not names:
        raise pytest.UsageError(f"--golden {folder}: no case there, NAME.npz must start with {', '.join(FUNCTIONS)}")
    if metafunc.function is test_term:  # kd_deit_soft is a documented other reduction of kd, no term of its own
        names = [name for name in names if method_of(name) in TERMS]
    metafunc.parametrize("name", names)


@pytest.fixture
def case(golden: Path, name: str) -> Case:
    return Case(golden / f"{name}.npz")


def check(loss: Tensor, case: Case) -> None:
    exact = all(t.dtype == torch.float64 for t in case.tensors.values() if t.is_floating_point())
    np.testing.assert_allclose(loss.item(), case.loss, rtol=1e-8 if exact else 1e-5)
    assert case.grads, "the case has no gradient"
    loss.backward()
    for name, expected in case.grads.items():
        actual = case[name].grad.numpy()
        # entries far below the largest are differences of nearly equal numbers: they count absolutely
        atol = 1e-12 * np.abs(expected).max() if exact else 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=1e-6 if exact else 1e-4, atol=atol, err_msg=name)


def test_function(case: Case, name: str) -> None:
    check(FUNCTIONS[method_of(name)](case), case)


def test_term(case: Case, name: str) -> None:
    make = TERMS[method_of(name)]
    student, teacher = (
        Output(
            logits=case.tensors.get(f"{side}_logits"),
            features={k: v for k, v in sorted(case.tensors.items()) if k.startswith(f"{side}_feature")},
        )
        for side in ("student", "teacher")
    )
    targets = case.teacher_choice() if teacher.has_logits else torch.empty(0)
    term = make(case)
    batch = Batch(torch.empty(0), targets, torch.empty(0))
    term.prepare(Setup(student, teacher, batch))
    check(term(student, teacher, batch), case)


def entropy_form(case: Case) -> Tensor:
    scaled = case["teacher_logits"] / case.hyper["temperature"]
    entropy = -(scaled.softmax(-1) * scaled.log_softmax(-1)).sum(-1).mean()
    return case.kl() + case.hyper["temperature"] ** 2 * entropy


def kd_over_classes(case: Case) -> Tensor:
    return case.kl() / case["student_logits"].shape[-1]


def kd_without_t2(case: Case) -> Tensor:
    return case.kl() / case.hyper["temperature"] ** 2


def at_paper(case: Case) -> Tensor:
    return case.over_layers(attention_transfer, **{**case.hyper, "variant": "paper"})


# what other implementations return in terms of ours; those that are not listed are equal to the reference value
DIFFERENT: dict[tuple[str, str], Callable[[Case], Tensor]] = {
    ("kd", "torchdistill_alpha_none_NO_T2"): kd_without_t2,
    ("kd", "torchdistill_alpha0p5_total_minus_half_ce"): lambda case: case.kl() / 2,
    ("kd", "deit_soft_class_mean"): kd_over_classes,
    ("kd", "pytorch_reduction_mean"): kd_over_classes,
    ("kd", "cls_kd_cross_entropy_form_alpha1"): entropy_form,
    ("kd", "mmrazor_soft_ce"): entropy_form,
    ("at", "torchdistill_mode_paper"): at_paper,
}
EQUAL = {
    "kd": {"mdistiller", "mmrazor", "timm", "attention_transfer_repo", "kd_zoo", "image_classification_sota"},
    "kd_hard": {"mmrazor_cross_entropy"},
    "at": {"mdistiller", "torchdistill_mode_code"},
}


def test_alternatives(case: Case, name: str) -> None:
    method = method_of(name)
    ours = FUNCTIONS[method](case).item()
    for other, value in case.alternatives.items():
        if other in EQUAL.get(method, ()):
            np.testing.assert_allclose(value, ours, rtol=1e-8, err_msg=other)
        elif (method, other) in DIFFERENT:
            np.testing.assert_allclose(value, DIFFERENT[method, other](case).item(), rtol=1e-8, err_msg=other)
            if case.hyper.get("temperature") != 1:  # at T = 1 nobody can forget T²
                assert not np.isclose(value, ours, rtol=1e-3), f"{other} is listed as different, but is not"


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("kd", "kd"),
        ("kd_2", "kd"),
        ("kd2", "kd"),
        ("kd_T2", "kd"),
        ("at-b", "at"),
        ("kd_hard_3", "kd_hard"),
        ("kdsvd", None),
        ("kd_logits_mse", None),
        ("attention", None),
    ],
)
def test_file_names(file: str, method: str | None) -> None:
    assert method_of(file) == method
