"""Every loss against numbers that the reference implementations returned; inputs and settings come from the files.

``pytest --golden DIR`` puts other cases through the same tests. A file belongs to the method of its name, or of its
entry ``method``; one that bears the name of another implementation is computed as ``references`` says. Those left out,
with the reason, and those of methods that the package has not are named at the end. Keys of a file:

- inputs and 0-d settings, under the names of the function's arguments (``student_logits``, ``targets`` or ``target``,
  ``temperature`` …); ``student_feature_0``, ``student_feature_1`` … are summed over, or make the list
  ``student_features``; of several functions in the method's file the one that takes them all, or the entry
  ``function``; or ``reference``, a pattern of ``references`` that computes the file;
- ``loss``, and ``grad_<input>``; ``reference_float_bits``: 32 where the reference ran in single precision;
- ``alt_loss__<other implementation>``: equal (EQUAL), or something else that is said (DIFFERENT, both in
  ``references``). A file says it itself
  by ``alt_factor__<the same>`` (1: equal) or ``alt_variant__<the same>`` (the value of ``variant``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from kd.losses.base import Batch, Output, Setup
from tests import golden_option
from tests.golden_option import belongs, method_of
from tests.losses import references
from tests.losses.references import Case

CONF = Path(__file__).parents[2] / "conf" / "loss"
# relative error of the loss and of each entry of a gradient, and what an entry may be off in parts of the largest one:
# those far below it are differences of nearly equal numbers
TOLERANCES = {64: (1e-9, 1e-6, 1e-12), 32: (2e-5, 1e-4, 1e-4)}


def value(case: Case) -> Tensor:
    """Our value, by the function that takes what is in the file, or as its pattern says."""
    return case.value() if case.pattern is None else references.functions()[case.pattern](case)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--golden")
    names = [name for name, found in golden_option.cases(folder).items() if found.checked]
    if not names:
        known = ", ".join(golden_option.methods())
        raise pytest.UsageError(f"--golden {folder}: no case there, its name must be that of a method: {known}")
    if metafunc.function is test_term:  # only what a term sees: logits, labels and features, no weights of a network
        names = [name for name in names if of_a_term(Case(folder / f"{name}.npz"))]
    metafunc.parametrize("case", names, indirect=True)


def of_a_term(case: Case) -> bool:
    seen = ("student_logits", "teacher_logits", "targets", "student_feature_", "teacher_feature_")
    inputs = all(name.startswith(seen) for name in case.tensors)
    return inputs and case.pattern is None and (CONF / f"{case.method}.yaml").is_file()


@pytest.fixture
def case(golden: Path, request: pytest.FixtureRequest) -> Case:
    return Case(golden / f"{request.param}.npz")


def check(loss: Tensor, case: Case) -> None:
    of_loss, of_gradient, of_largest = TOLERANCES[case.bits]
    np.testing.assert_allclose(loss.item(), case.loss, rtol=of_loss)
    assert case.grads or case.pattern, "the case has no gradient"
    if case.grads:
        loss.backward()
    for name, expected in case.grads.items():
        actual = case[name].grad.numpy()
        atol = of_largest * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=of_gradient, atol=atol, err_msg=name)


def test_function(case: Case) -> None:
    check(value(case), case)


def test_term(case: Case) -> None:
    """The term of the method's YAML, with the settings of the file and all taps."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / f"{case.method}.yaml"))[case.method]
    settings = {k: v for k, v in node.items() if k not in ("weight", "schedule")} | case.hyper
    whole = {"student_taps": None, "teacher_taps": None, "adapter": "identity", "embedding": None}
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


def alternative(case: Case, other: str) -> Tensor | None:
    """What another implementation returns, in terms of ours; None where nobody says."""
    if other in case.variants:
        return case.value(variant=str(case.variants[other]))
    if other in case.factors:
        return value(case) * float(case.factors[other])
    name = case.pattern if case.method is None else case.method
    if other in references.merged("EQUAL").get(name, ()):
        return value(case)
    different = references.merged("DIFFERENT").get((name, other))
    return None if different is None else different(case)


def test_alternatives(case: Case) -> None:
    ours = value(case).item()
    for other, theirs in case.alternatives.items():
        said = alternative(case, other)
        assert said is not None, f"{case.stem}.npz: {other} is neither in EQUAL nor in DIFFERENT"
        single = case.bits == 32 or other.endswith("float32")
        np.testing.assert_allclose(theirs, said.item(), rtol=1e-6 if single else 1e-8, err_msg=other)
        name = case.pattern if case.method is None else case.method
        different = (name, other) in references.merged("DIFFERENT")
        if different and case.hyper.get("temperature") != 1:  # at T = 1 nobody can forget T²
            assert not np.isclose(theirs, ours, rtol=1e-9, atol=0), f"{other} is listed as different, but is not"


def test_every_file_of_our_own_has_a_method() -> None:
    found = golden_option.cases(golden_option.OWN)
    assert found
    assert all(of.checked for of in found.values()), found


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("kd", "kd"),
        ("kd_2", "kd"),
        ("kd2", "kd"),
        ("kd_T2", "kd"),
        ("at-b", "at"),
        ("kd_hard_3", "hard_label"),
        ("fitnet_2", "hint"),
        ("kdsvd", "kdsvd"),
        ("kd_logits_mse", None),
        ("attention", None),
    ],
)
def test_file_names(file: str, method: str | None) -> None:
    assert method_of(file) == method
    assert method_of("anything", method or "nothing") == method


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("one_jsd_beta0p3", "one_jsd_*"),
        ("one_jsd_nolabels", "one_jsd_nolabels"),
        ("one_jsd_nolabels_2", "one_jsd_nolabels"),
        ("one_jsd", None),
        ("another", "another"),
        ("another-b", "another"),
        ("another_topk", None),
        ("another_topkd_forward", "*d_forward"),
        ("one_jsd_forward", "*d_forward"),  # of two that match, the one with more letters
        ("kd5x4", "kd[0-9]x*"),
    ],
)
def test_the_closest_pattern(file: str, pattern: str | None) -> None:
    patterns = ["one_jsd_*", "one_jsd_nolabels", "another", "*d_forward", "kd[0-9]x*"]
    for order in (patterns, patterns[::-1]):
        assert references.closest(file, order) == pattern


def test_patterns_of_references() -> None:
    """No pattern is both computed and left out, each has a reason, and none takes a file of our own methods."""
    computed, left_out = references.functions(), references.left_out()
    assert computed
    assert not computed.keys() & left_out.keys()
    assert all(len(why) > 10 for why in left_out.values())
    for folder in (Path("somewhere"), golden_option.OWN):
        for stem in ("kd", "kd_2", "at-b"):
            assert belongs(folder / f"{stem}.npz") == golden_option.Found(method_of(stem))
        assert belongs(folder / "anything.npz", "kd") == golden_option.Found("kd")
        assert belongs(folder / "unheard_of.npz") == golden_option.Found()
        assert not belongs(folder / "unheard_of.npz").checked
        assert belongs(folder / "kd_hard_2.npz") == golden_option.Found("hard_label")
        assert belongs(folder / "kd_deit_soft_2.npz") == golden_option.Found("kd", "kd_deit_soft")


def test_a_pattern_of_the_very_name_is_for_the_files_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "left_out", lambda: {"at": "another method of this name"})
    other, own = (belongs(folder / "at.npz") for folder in (Path("somewhere"), golden_option.OWN))
    assert other == golden_option.Found("at", "at", "another method of this name")
    assert not other.checked
    assert own == golden_option.Found("at")
    assert belongs(Path("somewhere") / "at_2.npz") == golden_option.Found("at")
