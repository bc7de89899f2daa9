"""Mistakes in one job of a sweep, or beside --config-dir, are explained as well as those in a single run (test_cli)."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from hydra.core.hydra_config import HydraConfig

from kd.config import timm_source
from kd.config.compose import checked
from kd.config.explain import explain, known_keys
from kd.errors import KdError, did_you_mean

MKD = "from kd.losses.base import Term\n\n\nclass MKD(Term):\n    def __init__(self, beta: float = 8.0): ...\n"


def said(*overrides: str, config_dir: Path | None = None) -> str:
    """The complaint about these overrides."""
    with pytest.raises(KdError) as caught:
        checked(overrides, config_dir and str(config_dir))
    return str(caught.value)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder (with a space in its name) of a loss whose YAML lists nothing but its ``_target_``."""
    (tmp_path / "outside_mkd.py").write_text(MKD)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my conf" / "loss").mkdir(parents=True)
    (tmp_path / "my conf" / "loss" / "mkd.yaml").write_text("mkd:\n  _target_: outside_mkd.MKD\n")
    return tmp_path / "my conf"


def test_a_typo_in_a_sweep_names_what_is_near(kd, tmp_path) -> None:
    single, swept = kd("train", "recipe.epoch=3"), kd("train", "-m", "recipe.epoch=3,4")
    assert (single.code, swept.code) == (1, 1)
    assert "there is no option recipe.epoch (near: recipe.epochs" in single.err
    assert swept.err == single.err + single.err.replace("recipe.epoch=3", "recipe.epoch=4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (("temperature=4",), "temperature (near: loss.kd.temperature with loss=[ce,kd], loss."),
        (("T=4", "loss=[at,ce]"), "T (near: loss.kd.temperature with loss=[at,ce,kd], loss."),
        (("temperature=4", "loss=[kd]"), "temperature (near: loss.kd.temperature)"),
        (("epoch=4",), "epoch (near: student.epoch, teacher.epoch)"),
    ],
)
def test_a_key_of_a_term_is_near_whether_the_term_is_chosen_or_not(overrides: tuple[str, ...], hint: str) -> None:
    assert f"{overrides[0]}: there is no option {hint}" in said(*overrides)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_given_for_a_section(kd, role: str) -> None:
    refused = f"{role}=runs/x is not allowed, {role} is a section: write {role}.checkpoint=runs/x for its weights, or"
    assert refused in kd("train", f"{role}=runs/x").err
    assert said(f"{role}=mlp").endswith(f"write model@{role}=mlp")


# ---------------------------------------------------------------------- --config-dir


def test_a_typo_in_a_key_of_a_term_from_outside_names_the_near_key(outside: Path) -> None:
    sentence = said("loss=[ce,mkd]", "loss.mkd.betta=1", config_dir=outside)
    assert "loss.mkd.betta is not an argument of outside_mkd.MKD (near: beta)" in sentence
    assert "[command line: loss.mkd.betta=1]" in sentence
    assert "not among the chosen" not in sentence


def test_a_term_from_outside_that_is_not_chosen_is_known(outside: Path) -> None:
    sentence = (
        "loss.mkd.beta=1 cannot be set: mkd is not among the chosen loss terms (ce); choose it with loss=[ce,mkd]"
    )
    assert said("loss.mkd.beta=1", config_dir=outside) == sentence
    assert "there is no option loss.mkd (near: loss." in said("loss.mkd.beta=1")


@pytest.mark.parametrize("verb", [("train",), ("eval",), ("train", "-m")])
def test_every_verb_looks_there_for_options(kd, outside: Path, verb) -> None:
    for place in (["--config-dir", str(outside)], [f"hydra.searchpath=['file://{outside}']"]):
        answer = kd(*verb, *place, "loss=[ce,mkdd]")
        assert answer.code == 1
        assert "loss=mkdd does not exist (near: mkd" in answer.err
        assert "options of loss: " in answer.err


def test_keys_of_other_places_are_near_too(outside: Path) -> None:
    keys = known_keys(["loss=[ce,mkd]"], [f"file://{outside}"])
    assert {"loss.mkd.beta", "loss.mkd._target_"} <= set(keys)
    assert "(near: loss.mkd.beta" in said("loss=[ce,mkd]", "betta=1", config_dir=outside)


def test_a_study_takes_a_folder_of_options(kd, outside: Path, tmp_path: Path) -> None:
    (tmp_path / "question").mkdir()
    rows = "rows: {a: {overrides: ['loss=[ce,mkd]', loss.mkd.betta=1]}}\n"
    (tmp_path / "question" / "study.yaml").write_text(rows)
    answer = kd("study", "question", "--config-dir", str(outside))
    assert answer.code == 1
    assert "row a: loss.mkd.betta is not an argument of outside_mkd.MKD (near: beta)" in answer.err


def test_a_folder_that_is_not_there(kd) -> None:
    assert "kd: --config-dir nowhere is not a folder" in kd("train", "--config-dir", "nowhere").err


OWN = """
def net(width: int, num_classes: int): ...


class Data:
    def __init__(self, size: int = 3): ...
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of options, empty, beside a module with a network and a data module."""
    (tmp_path / "outside_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "conf").mkdir()
    return tmp_path / "conf"


def option(folder: Path, name: str, text: str) -> Path:
    """Write the file of an option."""
    file = folder / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("target", "choice", "advice"),
    [
        ("data._target_=outside_own.Data", "data=digits", "conf/data/outside_own.yaml with _target_: outside_own.Data"),
        (
            "student.model._target_=outside_own.net",
            "model@student=mlp",
            "conf/model/outside_own.yaml with model:, below it _target_: outside_own.net",
        ),
        ("loss.ce._target_=outside_own.net", "loss=ce", "--config-dir conf loss=[outside_own]"),
        ("recipe.optimizer._target_=torch.optim.LBFGS", "recipe=sgd_cosine", "set recipe.optimizer.momentum=null"),
    ],
)
def test_another_target_leaves_the_keys_of_the_chosen_option(own: Path, target: str, choice: str, advice: str) -> None:
    sentence = said(target, *([choice] if target.startswith("recipe") else []), config_dir=own)
    assert sentence.count("\n") == 0
    assert sentence.startswith(f"{target} leaves the keys of {choice} below it, and ")
    assert advice in sentence


def test_a_typed_key_that_another_target_does_not_take_is_named_alone(own: Path) -> None:
    first, second = said("data._target_=outside_own.Data", "data.siz=3", config_dir=own).splitlines()
    assert "does not take root, batch_size, eval_batch_size and 16 more" in first
    assert second == "data.siz is not an argument of outside_own.Data (near: size) [command line: data.siz=3]"


FILES = {
    "model/mine": ("_target_: outside_own.net\nwidth: 3\n", ["model@{}=mine"], "model/mine.yaml lacks its outer key"),
    "loss/mine": ("_target_: outside_own.net\n", ["loss=[ce,mine]"], "a file of loss=[ce,mine] lacks its outer key"),
    "data/mine": ("data:\n  _target_: outside_own.Data\n", ["data=mine"], "data/mine.yaml has an outer key data: "),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_outer_key_too_few_or_too_many_is_the_only_complaint(own: Path, name: str, role: str) -> None:
    text, line, words = FILES[name]
    option(own, name, text)
    sentence = said(*(part.format(role) for part in line), config_dir=own)
    assert words in sentence
    assert sentence.count("\n") == 0


def test_the_file_that_is_named_is_the_one_that_sets_the_key(own: Path) -> None:
    """``root``, ``seed`` and ``batch_size`` are keys of other files as well."""
    file = option(own, "data/mine", "defaults: [_own, _self_]\n_target_: outside_own.Data\nseed: 1\n")
    base = option(own, "data/_own", "root: here\n")
    found = {line.partition(" ")[0]: line for line in said("data=mine", config_dir=own).splitlines()}
    assert set(found) == {"data.seed", "data.root"}
    assert found["data.seed"].endswith(f" [{file}]")
    assert found["data.root"].endswith(f" [{base}]")


# ---------------------------------------------------------------------- keys without a +


def test_weight_and_schedule_belong_to_every_term(outside: Path) -> None:
    schedule = "loss.mkd.schedule={_target_: kd.distill.schedules.Linear, start: 0}"
    loss = checked(["loss=[ce,mkd]", "loss.mkd.weight=2", schedule, "loss.mkd.beta=3"], str(outside))["loss"]
    assert (loss["mkd"]["weight"], loss["mkd"]["beta"]) == (2, 3)
    assert loss["mkd"]["schedule"] == {"_target_": "kd.distill.schedules.Linear", "start": 0}
    assert "loss.mkd.wieght is not an argument of outside_mkd.MKD (near: weight)" in said(
        "loss=[ce,mkd]", "loss.mkd.wieght=1", config_dir=outside
    )
    assert "loss.ce.schedule.start=1 cannot be set: loss.ce.schedule has no _target_" in said(
        "loss.ce.schedule.start=1"
    )


FREE = {
    "recipe.optimizer.weight_decay=1e-4": ("recipe", "optimizer", "weight_decay", 1e-4),
    "recipe.optimizer.amsgrad=true": ("recipe", "optimizer", "amsgrad", True),
    "recipe.scheduler.eta_min=0.001": ("recipe", "scheduler", "eta_min", 0.001),
    "hardware.trainer.limit_train_batches=3": ("hardware", "trainer", "limit_train_batches", 3),
    "data.test_fraction=0.3": ("data", "test_fraction", 0.3),
    "student.model.drop_path_rate=0.1": ("student", "model", "drop_path_rate", 0.1),
}


def test_what_a_target_takes_needs_no_plus() -> None:
    config = checked(["model@student=timm", *FREE])
    for override, (*path, value) in FREE.items():
        node = config
        for part in path:
            node = node[part]
        assert node == value, override


TYPOS = {
    "recipe.optimizer.weigt_decay=1": "recipe.optimizer.weigt_decay is not an argument of torch.optim.Adam (near: wei",
    "recipe.scheduler.eta_mn=1": "recipe.scheduler.eta_mn is not an argument of torch.optim.lr_scheduler.Cosine",
    "data.augment.padd=3": "data.augment.padd=3: there is no option data.augment.padd (near: data.augment.pad",
    "data.augment={padd: 3}": "data.augment={padd: 3}: there is no option data.augment.padd (near: data.augment.pad",
    "hardware.trainer.max_epoch=1": "hardware.trainer.max_epoch is not an argument of lightning.Trainer (near: max_epo",
    "teacher.model.hidden=[3]": "teacher.model.hidden=[3] cannot be set: teacher.model has no _target_: choose a "
    "network with model@teacher=NAME",
    "logger.wandb.timeout=3": "wandb is not among the chosen loggers (none); choose it with logger=[wandb]",
    "loss.kdd.weight=1": "loss.kdd.weight=1: there is no option loss.kdd (near: loss.kd",
    "student.foo.bar=1": "student.foo.bar=1: there is no option student.foo",
    "student.model.hidden.x=3": "student.model.hidden.x=3 cannot be set: ",
    "student.model=null": "student.model=null cannot be set: student.model has no _target_",
    "data=7": "data=7 is not allowed: a group takes the name of an option",
}


@pytest.mark.parametrize("override", TYPOS)
def test_a_typo_below_a_target_is_still_refused(override: str) -> None:
    assert TYPOS[override] in said(override)


def test_a_null_scheduler_takes_no_arguments() -> None:
    sentence = said("recipe=digits_long", "recipe.scheduler.eta_min=0.1")
    assert (
        "recipe.scheduler.eta_min=0.1 cannot be set: recipe.scheduler has no _target_: choose a recipe with" in sentence
    )


def test_a_target_of_any_argument_wants_a_plus_for_what_looks_mistyped(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "outside_net.py").write_text("def net(width, **more): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    net = ["student.model={_target_: outside_net.net, width: 3}", "model@student=none"]
    key = "student.model.widht=3"
    assert said(*net, key).startswith(
        f"{key}: outside_net.net takes any argument; if widht is meant and not width, write +{key}"
    )
    assert checked([*net, f"+{key}"])["student"]["model"]["widht"] == 3
    assert checked([*net, "student.model.depth=3"])["student"]["model"]["depth"] == 3


def test_a_config_that_is_shown_has_no_typo_either(kd) -> None:
    answer = kd("train", "--cfg", "job", "student.model.hiden=[3]")
    assert (answer.code, answer.out) == (1, "")
    assert "student.model.hiden is not an argument of kd.models.mlp.mlp (near: hidden)" in answer.err
    assert "student:" in kd("train", "--cfg", "job", "data=imagefolder", "student.model=???").out


# ---------------------------------------------------------------------- near names


ABBREVIATIONS = {
    ("loss=[ce,kd]", "loss.kd.T=2"): "(near: temperature)",
    ("loss=[ce,kd]", "loss.kd.tau=2"): "(near: temperature)",
    ("loss=[ce,kd]", "loss.kd.alpha=2"): "(near: weight)",
    ("loss=[ce,kd]", "T=2"): "(near: loss.kd.temperature",
    ("lr=0.1",): "(near: recipe.optimizer.lr)",
    ("recipe.lr=0.1",): "(near: recipe.optimizer.lr",
    ("epochs=3",): "(near: recipe.epochs)",
    ("loss=[ce,kd]", "loss.kd={T: 3}"): "(near: temperature)",
    ("bs=3",): "(near: recipe.batch_size)",
    ("batch_size=3",): "(near: recipe.batch_size,",
    ("wd=3",): "(near: recipe.optimizer.weight_decay)",
    ("lambda=3",): "(near: loss.ce.weight)",
}


@pytest.mark.parametrize("overrides", ABBREVIATIONS, ids=" ".join)
def test_abbreviations_of_the_field_are_understood(overrides: tuple[str, ...]) -> None:
    sentence = said(*overrides)
    assert ABBREVIATIONS[overrides] in sentence
    assert overrides[-1] in sentence, "key and value, as typed"


def test_the_same_section_comes_first() -> None:
    known = ["loss.at.weight", "loss.kd.weight", "recipe.epochs"]
    assert did_you_mean("loss.kd.alpha", known) == " (near: loss.kd.weight, loss.at.weight)"
    assert did_you_mean("recipe.epoch", known) == " (near: recipe.epochs)"
    assert did_you_mean("nothing", known) == ""


# ---------------------------------------------------------------------- networks of timm


def test_timm_is_read_without_importing_it() -> None:
    assert timm_source.networks() == set(timm.list_models())
    assert timm_source.may_take("drop_path_rate")
    assert not timm_source.may_take("drop_path_rat")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_of_timm_that_is_no_option(role: str) -> None:
    sentence = said(f"model@{role}=lcnet_035")
    assert f"model@{role}=timm {role}.model.name=lcnet_035" in sentence
    assert sentence.startswith(f"model@{role}=lcnet_035 does not exist")
    assert "timm" not in said(f"model@{role}=lcnet_0350").partition(";")[0]


def test_an_argument_that_no_network_of_timm_takes() -> None:
    sentence = said("model@student=timm", "student.model.drop_path_rat=0.1")
    assert "student.model.drop_path_rat is not an argument of any network of timm (near: drop_path_rate" in sentence
    assert "pretraned is not an argument of any network of timm (near: pretrained" in said(
        "model@student=timm", "student.model.pretraned=true"
    )


def test_an_error_of_another_kind_is_a_sentence() -> None:
    assert explain(ValueError("no number"), ["a.b=1", "seed=2"]) == "a.b=1 cannot be set: no number"


def test_a_deleted_key_whose_value_depends_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # as it is before a first run of the process
    with pytest.raises(KdError, match=r"momentum is not allowed, its value .*: write recipe\.optimizer\.momentum=null"):
        checked(["recipe=finetune", "~recipe.optimizer.momentum"])
    assert checked(["recipe=finetune", "recipe.optimizer.momentum=null"])["recipe"]["optimizer"]["momentum"] is None
