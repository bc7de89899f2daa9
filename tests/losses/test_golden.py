"""Every loss against numbers that the reference implementations returned; inputs and settings come from the files.

``pytest --golden DIR`` puts other cases through the same tests. A file belongs to the method of its name, or of its
entry ``method``; files of methods that the package has not are named at the end. Keys of a file:

- inputs and 0-d settings, under the names of the function's arguments (``student_logits``, ``targets`` or ``target``,
  ``temperature`` …); ``student_feature_0``, ``student_feature_1`` … are summed over, or make the list
  ``student_features``; of several functions in the method's file the one that takes them all, or the entry
  ``function``;
- ``loss``, and ``grad_<input>``;
- ``alt_loss__<other implementation>``: equal (EQUAL), or something else that is said (DIFFERENT). A file says it itself
  by ``alt_factor__<the same>`` (1: equal) or ``alt_variant__<the same>`` (the value of ``variant``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from kd.losses.base import Batch, Output, Setup
from kd.losses.functional import cross_entropy, kl_divergence
from tests import golden_option
from tests.golden_option import method_of

CONF = Path(__file__).parents[2] / "conf" / "loss"
ABOUT = ("method", "function")
UNREAD = {"targets"}  # reference files hold the labels also where the loss does not read them


class Case:
    """One file: tensors by name, settings, and the reference values."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        self.stem = path.stem
        self.about = {name: str(arrays.pop(name)) for name in ABOUT if name in arrays}
        self.method = method_of(path.stem, self.about.get("method"))
        self.loss = float(arrays.pop("loss"))
        self.alternatives, self.factors, self.variants, self.grads = (
            {k.removeprefix(start): arrays.pop(k) for k in list(arrays) if k.startswith(start)}
            for start in ("alt_loss__", "alt_factor__", "alt_variant__", "grad_")
        )
        renamed = {"targets" if k == "target" else k: v for k, v in arrays.items()}
        self.hyper: dict[str, Any] = {k: v.item() for k, v in renamed.items() if v.ndim == 0}
        self.tensors = {k: torch.from_numpy(v) for k, v in renamed.items() if v.ndim > 0}
        for name in self.grads:
            self.tensors[name].requires_grad_()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def layers(self, side: str) -> list[Tensor]:
        count = sum(name.startswith(f"{side}_feature_") for name in self.tensors)
        return [self.tensors[f"{side}_feature_{i}"] for i in range(count)]

    def calls(self, function: Callable[..., Tensor]) -> list[dict[str, Any]] | str:
        """The arguments of each call whose values are summed, or why the function does not take what is in the file."""
        parameters = inspect.signature(function).parameters
        given: dict[str, Any] = {**self.hyper, **self.tensors}
        layered = {f"{s}_feature": self.layers(s) for s in ("student", "teacher") if self.layers(s)}
        lists = {f"{name}s": tensors for name, tensors in layered.items()}
        single = {k: v for k, v in layered.items() if k in parameters}
        used = {k: v for k, v in {**given, **lists}.items() if k in parameters}
        read = {k for k in given if k in parameters or k.rpartition("_")[0] in single}
        read |= {k for k in given if k.rpartition("_")[0] + "s" in used and k.rpartition("_")[0] + "s" in lists}
        missing = [n for n, p in parameters.items() if p.default is p.empty and n not in used and n not in single]
        if missing or given.keys() - read - UNREAD:
            return f"lacks {missing or 'nothing'}, does not take {sorted(given.keys() - read - UNREAD) or 'nothing'}"
        rows = zip(*single.values(), strict=True) if single else [()]
        return [{**used, **dict(zip(single, row, strict=True))} for row in rows]

    def function(self) -> tuple[Callable[..., Tensor], list[dict[str, Any]]]:
        """The function of the method's file that takes exactly what is in this one, and the arguments of its calls."""
        module = import_module(golden_option.methods()[self.method])
        named = self.about.get("function")
        found = {n: self.calls(getattr(module, n)) for n in module.__all__ if named in (None, n)}
        fit = {n: calls for n, calls in found.items() if not isinstance(calls, str)}
        why = "; ".join(f"{n} {calls}" for n, calls in found.items() if isinstance(calls, str))
        assert len(fit) == 1, f"{self.stem}.npz fits {list(fit) or 'no function'} of {module.__name__}: {why}"
        ((name, calls),) = fit.items()
        return getattr(module, name), calls

    def value(self, **other: Any) -> Tensor:
        """Our value; ``other``: settings in the place of the file's."""
        if exception := self.exception():
            return exception(self)
        function, calls = self.function()
        return torch.stack([function(**{**call, **other}) for call in calls]).sum()

    def exception(self) -> Callable[[Case], Tensor] | None:
        """How a reference file that bears another name than our method is computed, where that is another way."""
        names = [name for name in EXCEPTIONS if golden_option.is_case(self.stem, name)]
        return EXCEPTIONS[names[0]] if names and self.method == golden_option.OTHER_NAMES[names[0]] else None

    def kl(self) -> Tensor:
        return kl_divergence(self["student_logits"], self["teacher_logits"], **self.hyper)


EXCEPTIONS: dict[str, Callable[[Case], Tensor]] = {
    "kd_deit_soft": lambda case: case.kl() / case["student_logits"].shape[-1],  # DeiT divides by rows × classes
    "kd_hard": lambda case: cross_entropy(case["student_logits"], case["teacher_logits"].argmax(-1), **case.hyper),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--golden")
    names = [name for name, method in golden_option.cases(folder).items() if method]
    if not names:
        known = ", ".join(golden_option.methods())
        raise pytest.UsageError(f"--golden {folder}: no case there, its name must be that of a method: {known}")
    if metafunc.function is test_term:  # only what a term sees: logits, labels and features, no weights of a network
        names = [name for name in names if of_a_term(Case(folder / f"{name}.npz"))]
    metafunc.parametrize("case", names, indirect=True)


def of_a_term(case: Case) -> bool:
    seen = ("student_logits", "teacher_logits", "targets", "student_feature_", "teacher_feature_")
    inputs = all(name.startswith(seen) for name in case.tensors)
    return inputs and case.exception() is None and (CONF / f"{case.method}.yaml").is_file()


@pytest.fixture
def case(golden: Path, request: pytest.FixtureRequest) -> Case:
    return Case(golden / f"{request.param}.npz")


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


def test_function(case: Case) -> None:
    check(case.value(), case)


def test_term(case: Case) -> None:
    """The term of the method's YAML, with the settings of the file and all taps."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / f"{case.method}.yaml"))[case.method]
    settings = {k: v for k, v in node.items() if k not in ("weight", "schedule")} | case.hyper
    whole = {"student_taps": None, "teacher_taps": None, "adapter": "identity"}
    settings |= {key: value for key, value in whole.items() if key in node}
    term = instantiate(settings)
    student, teacher = (
        Output(
            logits=case.tensors.get(f"{side}_logits"),
            features={f"{side}_feature_{i}": feature for i, feature in enumerate(case.layers(side))},
        )
        for side in ("student", "teacher")
    )
    batch = Batch(torch.empty(0), case.tensors.get("targets"), torch.empty(0))
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


def at_with_epsilon(case: Case) -> Tensor:
    """The map is divided by its norm + 1e-6, and is a sum over the channels."""

    def maps(side: str) -> Iterator[Tensor]:
        for feature in case.layers(side):
            whole = feature.abs().pow(case.hyper.get("p", 2)).sum(1).flatten(1)
            yield whole / (torch.linalg.vector_norm(whole, dim=1, keepdim=True) + 1e-6)

    pairs = zip(maps("student"), maps("teacher"), strict=True)
    return torch.stack([(s - t).square().mean() for s, t in pairs]).sum()


# what other implementations return: equal to the reference value, or this
EQUAL = {
    "kd": {"mdistiller", "mmrazor", "timm", "attention_transfer_repo", "kd_zoo", "image_classification_sota"},
    "ce": {"mmrazor_cross_entropy"},
    "at": {"mdistiller", "torchdistill_mode_code"},
}
DIFFERENT: dict[tuple[str, str], Callable[[Case], Tensor]] = {
    ("kd", "torchdistill_alpha_none_NO_T2"): kd_without_t2,
    ("kd", "torchdistill_alpha0p5_total_minus_half_ce"): lambda case: case.kl() / 2,
    ("kd", "deit_soft_class_mean"): kd_over_classes,
    ("kd", "pytorch_reduction_mean"): kd_over_classes,
    ("kd", "cls_kd_cross_entropy_form_alpha1"): entropy_form,
    ("kd", "mmrazor_soft_ce"): entropy_form,
    ("at", "torchdistill_mode_paper"): lambda case: case.value(variant="paper"),
    ("at", "kd_zoo_abs_sum_eps1e6"): at_with_epsilon,
}


def alternative(case: Case, other: str) -> Tensor | None:
    """What another implementation returns, in terms of ours; None where nobody says."""
    if other in case.variants:
        return case.value(variant=str(case.variants[other]))
    if other in case.factors:
        return case.value() * float(case.factors[other])
    if other in EQUAL.get(case.method, ()):
        return case.value()
    different = DIFFERENT.get((case.method, other))
    return None if different is None else different(case)


def test_alternatives(case: Case) -> None:
    ours = case.value().item()
    for other, value in case.alternatives.items():
        said = alternative(case, other)
        assert said is not None, f"{case.stem}.npz: {other} is neither in EQUAL nor in DIFFERENT"
        np.testing.assert_allclose(value, said.item(), rtol=1e-8, err_msg=other)
        if (case.method, other) in DIFFERENT and case.hyper.get("temperature") != 1:  # at T = 1 nobody can forget T²
            assert not np.isclose(value, ours, rtol=1e-9, atol=0), f"{other} is listed as different, but is not"


def test_every_file_of_our_own_has_a_method() -> None:
    found = golden_option.cases(golden_option.ROOT / "tests" / "golden")
    assert found
    assert all(found.values()), found


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("kd", "kd"),
        ("kd_2", "kd"),
        ("kd2", "kd"),
        ("kd_T2", "kd"),
        ("at-b", "at"),
        ("kd_hard_3", "ce"),
        ("fitnet_2", "hint"),
        ("kdsvd", None),
        ("kd_logits_mse", None),
        ("attention", None),
    ],
)
def test_file_names(file: str, method: str | None) -> None:
    assert method_of(file) == method
    assert method_of("anything", method or "nothing") == method
