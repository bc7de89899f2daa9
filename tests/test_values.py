"""Values that are not allowed: refused before torch is imported, with the key, the value and what is allowed."""

from __future__ import annotations

import pytest

from kd.config.compose import checked
from kd.config.rules import FLAG, list_of, number, one_of, refusals, whole
from kd.errors import KdError

WRONG = {
    "name=../../x": "name = ../../x is not allowed: the run would lie outside of paths.runs",
    "name=a/../../x": "name = a/../../x is not allowed: the run would lie outside of paths.runs",
    "name=/tmp/x": "name = /tmp/x is not allowed: the run would lie outside of paths.runs",
    "name='a\nb'": r"name = 'a\nb' is not allowed: a text on one line",
    "name=": "name = '' is not allowed: a text on one line",
    "model@student=[mlp,resnet8]": "model@student=[mlp,resnet8] is not allowed: choose one option",
    "data=[digits,fake]": "data=[digits,fake] is not allowed: choose one option",
    "experiment=[digits_kd,digits_alone]": "experiment=[digits_kd,digits_alone] is not allowed: choose one option",
    "data.root=7": "data.root = 7 is not allowed: it must be the path of a folder",
    "data.augment=3": "data.augment = 3 is not allowed: it must be a mapping",
    "logger.wandb.timeout=-1": "logger.wandb.timeout = -1 is not allowed: it must be a finite number above 0",
    "logger.wandb.timeout=soon": "logger.wandb.timeout = soon is not allowed",
    "hardware.threads=0": "hardware.threads = 0 is not allowed: it must be a whole number from 1 to 1024",
    "hardware.threads=-2": "hardware.threads = -2 is not allowed",
    "hardware.threads=100000": "hardware.threads = 100000 is not allowed",
    "hardware.deterministic=maybe": "hardware.deterministic = maybe is not allowed: it must be true, false or warn",
    "distiller.log_every=0": "distiller.log_every = 0 is not allowed: it must be a whole number, 1 or more",
    "teacher.checkpoint=7": "teacher.checkpoint = 7 is not allowed: it must be a path",
    "teacher.checkpoint=[runs,7]": "teacher.checkpoint = ['runs', 7] is not allowed",
    "teacher.std=[0]": "teacher.std = [0.0] is not allowed: it must be a list of finite numbers above 0",
    "teacher.mean=[nan]": "teacher.mean = [nan] is not allowed: it must be a list of finite numbers",
    "teacher.weights=[-1,2]": "teacher.weights = [-1.0, 2.0] is not allowed: it must be a list of finite numbers, 0",
    "recipe.accumulate=0": "recipe.accumulate = 0 is not allowed: it must be a whole number, 1 or more",
    "recipe.gradient_clip=inf": "recipe.gradient_clip = inf is not allowed: it must be a finite number above 0",
    "recipe.optimizer.lr=nan": "recipe.optimizer.lr = nan is not allowed: it must be a finite number",
    "recipe.optimizer.lr=inf": "recipe.optimizer.lr = inf is not allowed: it must be a finite number",
    "recipe.scheduler.T_max=0": "recipe.scheduler.T_max = 0 is not allowed: it must be a finite number, 1 or more",
}


def batches() -> list[list[str]]:
    """The wrong values in batches that hold no key twice: all complaints of a batch come at once."""
    rest, found = [o for o in WRONG if "=[" not in o or "." in o.partition("=")[0]], []
    while rest:
        batch = list({o.partition("=")[0]: o for o in reversed(rest)}.values())
        rest = [o for o in rest if o not in batch]
        found.append(batch)
    return [*found, [o for o in WRONG if "=[" in o and "." not in o.partition("=")[0]]]


@pytest.mark.parametrize("batch", batches(), ids=len)
def test_a_wrong_value_is_one_sentence(batch: list[str]) -> None:
    with pytest.raises(KdError) as caught:
        checked(["logger=[wandb]", *batch])
    said = str(caught.value).splitlines()
    assert len(said) == len(batch)
    for override in batch:
        assert any(line.startswith(WRONG[override]) for line in said), override


RULES = {
    "a whole number, 1 or more, or null": (whole(1).or_null, [1, 10**400, None], [0, 1.0, True, "1"]),
    "a whole number from 0 to 3": (whole(0, 3), [0, 3], [-1, 4, None]),
    "a finite number": (number(), [-1.5, 0, 2], [float("nan"), float("inf"), False, "1", None]),
    "a finite number, 0 or more": (number(least=0), [0, 0.5], [-0.1]),
    "a number above 0 and at most 1": (number(above=0, most=1), [0.5, 1], [0, 1.1, float("nan")]),
    "a number, 0 or more and below 1": (number(least=0, below=1), [0, 0.9], [1, -0.1]),
    "a list of finite numbers above 0": (list_of(number(above=0)), [[1], (1, 2.5)], [[], [0], [1, "1"], "1", 1, None]),
    "x, null or false": (one_of("x", None, False), ["x", None, False], ["y", [], {}]),
    "true or false": (FLAG, [True, False], [1, 0, "true", None]),
}


@pytest.mark.parametrize("words", RULES)
def test_a_rule_says_what_it_allows(words: str) -> None:
    rule, fine, wrong = RULES[words]
    assert rule.words == words
    assert all(map(rule.fits, fine))
    assert not any(map(rule.fits, wrong))


def test_what_is_not_there_is_not_checked() -> None:
    rules = {"a.b": whole(1), "a.c": whole(1), "b": FLAG}
    assert refusals("x.", {"a": {"b": True}}, rules) == [
        "x.a.b = true is not allowed: it must be a whole number, 1 or more"
    ]


FINE = ["name=a/b.c", "model@student=[resnet8]", "hardware.threads=2", "teacher.weights=[0,1]", "data.root=null"]


def test_what_is_near_it_is_allowed() -> None:
    checked(FINE)


def test_no_number_beside_one_that_follows_from_it() -> None:
    with pytest.raises(KdError) as caught:
        checked(["recipe.epochs=0"])
    assert str(caught.value) == "recipe.epochs = 0 is not allowed: it must be a whole number, 1 or more, or null"
