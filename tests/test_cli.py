"""The command line: help at once, and one plain sentence for whatever is mistyped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kd.cli import hydra_app
from kd.cli.main import VERBS
from kd.config.compose import checked
from kd.config.composition import CONF, options
from kd.errors import KdError

LOSSES = ", ".join(options("loss", [CONF]))


def test_help_lists_the_verbs(kd) -> None:
    said = kd("--help")
    assert said.code == 0
    for verb in VERBS:
        assert f"\n  {verb}" in said.out
        assert kd(verb, "--help").out


def test_version(kd) -> None:
    from kd import __version__

    assert kd("--version").out.strip() == __version__


def test_an_unknown_verb_names_the_near_one(kd) -> None:
    said = kd("trian")
    assert said.code == 1
    assert said.err.startswith("kd: there is no verb trian (near: train); verbs: train, eval, ")


def test_without_a_verb_it_says_how(kd) -> None:
    said = kd()
    assert said.code == 1
    assert "kd VERB" in said.out


def test_train_help_shows_groups_and_keys(kd) -> None:
    said = kd("train", "--help")
    assert said.code == 0
    for word in ("model: ", f"loss: {LOSSES}\n", "epochs: 30", "resume=RUN"):
        assert word in said.out


def test_the_config_can_be_printed(kd) -> None:
    said = kd("train", "--cfg", "job", "loss=[ce,kd]", "loss.kd.temperature=2", "loss.kd.weight=0.5")
    assert said.code == 0
    assert "temperature: 2" in said.out
    assert "weight: 0.5" in said.out


def test_the_defaults_tree_can_be_printed(kd) -> None:
    assert "loss/ce" in kd("train", "--info", "defaults-tree").out


TYPOS = [
    (["recipe.epocs=3"], "recipe.epocs=3: there is no option recipe.epocs (near: recipe.epochs"),
    (["losss=[ce]"], "losss=[ce]: there is no option losss (near: loss"),
    (["loss=[ce,kdd]"], "loss=kdd does not exist (near: kd, "),
    (["loss=[ce,qqqq]"], f"loss=qqqq does not exist; options of loss: {LOSSES}"),
    (["data=digitz"], "data=digitz does not exist (near: digits); options of data: "),
    (["model@student=resnet21"], "model=resnet21 does not exist (near: resnet"),
    (["model=mlp"], "model is not a group here: write model@student or model@teacher"),
    (["experiment=nope"], "experiment=nope does not exist; options of experiment: "),
    (["loss.kd.temperature=3"], "kd is not among the chosen loss terms (ce); choose it with loss=[ce,kd]"),
    (
        ["loss=[ce,kd]", "loss.kd.temprature=3"],
        "loss.kd.temprature is not an argument of kd.losses.logits.kd.KnowledgeDistillation (near: temperature)",
    ),
    (
        ["student.model.hiden=[3]"],
        "student.model.hiden is not an argument of kd.models.mlp.mlp (near: hidden) [command line: student.",
    ),
    (["+recipe.optimizer.momentun=3"], "recipe.optimizer.momentun is not an argument of torch.optim.Adam"),
    (["+recipe.foo=3"], "there is no option recipe.foo"),
    (["+foo=3"], "there is no option foo"),
    (["~data"], "data is empty"),
    (["~loss.ce"], "loss is empty: choose at least one term"),
    (["seed=abc"], "seed=abc is not allowed: value 'abc' of type 'str' could not be converted to Integer"),
    (["recipe.epochs=1,2"], "recipe.epochs=1,2 has several values: add -m"),
    (["data.label=größe"], "data.label=größe cannot be read as KEY=VALUE: quote a value with letters outside of ASCII"),
    (["recipe"], "recipe cannot be read as KEY=VALUE"),
    (["loss=[ce,kd"], "loss=[ce,kd cannot be read as KEY=VALUE: close every bracket"),
    (["recipe.optimizer.lr=fast"], "recipe.optimizer.lr = fast is not allowed: it must be a finite number"),
    (["recipe.scheduler.T_max=x"], "recipe.scheduler.T_max = x is not allowed: it must be a finite number, 1 or more"),
    (["student.model._target_=kd.models.mlp.mpl"], "there is no 'mpl' in kd.models.mlp (near: mlp)"),
    (["student.model._target_=nowhere.X"], "student.model._target_ = nowhere.X cannot be found"),
    (["loss=[ce,kd]", "loss.kd.temperature=0"], "loss.kd.temperature = 0 is not allowed"),
    (["loss=[ce,kd]", "loss.kd.temperature=-1"], "loss.kd.temperature = -1 is not allowed"),
    (["loss.ce.weight=-1"], "loss.ce.weight = -1 is not allowed: it must be a finite number, 0 or more"),
    (["loss.ce.weight=heavy"], "loss.ce.weight = heavy is not allowed: it must be a finite number, 0 or more"),
    (["recipe.epochs=0"], "recipe.epochs = 0 is not allowed: it must be a whole number, 1 or more"),
    (["protocol.val_every=7"], "protocol.val_every = 7 is not allowed: it must divide recipe.epochs = 30"),
    (["protocol.mode=best"], "protocol.mode = best is not allowed: it must be max, min or null"),
    (["hardware.devices=0"], "hardware.devices = 0 is not allowed"),
    (["+hardware.trainer.max_epochs=3"], "hardware.trainer.max_epochs = 3 is not allowed"),
    (["seed=-1"], "seed = -1 is not allowed"),
    (["student.model=???"], "student.model has no value: set it, for example student.model=…"),
    (
        ["+hardware.trainer.max_epoch=3"],
        "hardware.trainer.max_epoch is not an argument of lightning.Trainer (near: max_",
    ),
    (
        ["hardware.trainer={max_epoch: 3}"],
        "hardware.trainer.max_epoch is not an argument of lightning.Trainer (near: max_epochs",
    ),
    (["--nonsense"], "the flags are not understood: unrecognized arguments: --nonsense"),
    (["resume=nowhere"], "nowhere is not a run directory: there is no config.yaml in it"),
    (["resume=nowhere", "seed=3"], "resume=nowhere takes no other arguments (given: seed=3)"),
]


@pytest.mark.parametrize(("arguments", "sentence"), TYPOS, ids=[" ".join(a) for a, _ in TYPOS])
def test_a_typo_is_one_sentence_and_leaves_nothing(kd, tmp_path, arguments, sentence) -> None:
    said = kd("train", *arguments)
    assert said.code == 1
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert not list(tmp_path.iterdir())


def test_all_complaints_come_at_once(kd) -> None:
    said = kd("train", "loss.ce.weight=-1", "recipe.epochs=0")
    assert len(said.err.splitlines()) == 2


def experiment(folder: Path, text: str) -> list[str]:
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\n" + text)
    return ["--config-dir", str(folder / "conf"), "experiment=mine"]


YAML_TYPOS = [
    ("reciep:\n  epochs: 3\n", ["experiment/mine.yaml", "there is no option reciep (near: recipe"]),
    ("recipe:\n  epochz: 3\n", ["experiment/mine.yaml", "there is no option recipe.epochz (near: recipe.epochs"]),
    ("recipe:\n  epochs: many\n", ["experiment/mine.yaml", "recipe.epochs: value 'many'"]),
    ("recipe:\n epochs: 3\n  lr: 2\n", ["experiment/mine.yaml, line 4", "not valid YAML"]),
    ("recipe:\n\tepochs: 3\n", ["experiment/mine.yaml, line 3: a tab; YAML wants spaces"]),
    ("defaults:\n  - override /data: digitz\n", ["data=digitz does not exist (near: digits)"]),
    ("defaults:\n  - override /datas: digits\n", ["experiment/mine.yaml", "datas"]),
    ("loss:\n  ce:\n    wieght: 3\n", ["loss.ce.wieght is not an argument", "(near: weight", "mine.yaml"]),
    ("student:\n  model:\n    hiden: [3]\n", ["student.model.hiden is not an argument", "(near: hidden", "mine.yaml"]),
    ("data:\n  val_fractoin: 0.1\n", ["data.val_fractoin is not an argument", "(near: val_fraction", "mine.yaml"]),
    ("loss:\n  kd:\n    temperature: 3\n", ["loss.kd = {'temperature': 3} has no _target_"]),
]


def test_keys_of_a_term_that_the_command_line_leaves_out_do_not_matter(tmp_path) -> None:
    """The experiment sets ``loss.kd.temperature``."""
    assert checked(["experiment=digits_kd", "loss=[ce]"])["loss"] == {
        "ce": {**checked(["loss=[ce]"])["loss"]["ce"], "weight": 0.1}
    }
    assert list(checked(["experiment=digits_kd"])["loss"]) == ["ce", "kd"]
    with pytest.raises(
        KdError, match=r"^loss\.kd\.temperature=2 cannot be set: kd is not among the chosen loss terms \(ce\)"
    ):
        checked(["experiment=digits_kd", "loss=[ce]", "loss.kd.temperature=2"])
    folder, *flags = experiment(tmp_path, "loss:\n  kdd:\n    temperature: 3\n")[1:]
    with pytest.raises(KdError, match=r"experiment/mine\.yaml: there is no option loss\.kdd \(near: loss\.kd"):
        checked([*flags, "loss=[ce]"], folder)


@pytest.mark.parametrize(("text", "parts"), YAML_TYPOS, ids=[t.replace("\n", " ") for t, _ in YAML_TYPOS])
def test_a_typo_in_a_file_names_the_file(kd, tmp_path, text, parts) -> None:
    said = kd("train", *experiment(tmp_path, text))
    assert said.code == 1
    for part in parts:
        assert part in said.err
    assert "Traceback" not in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["conf"]


def test_the_exit_code_reaches_the_shell_before_torch_is_imported(tmp_path) -> None:
    code = (
        "import sys; from kd.cli.main import main; r = main(['train', 'recipe.epocs=3']); print('torch' in sys.modules)"
    )
    code += "; sys.exit(r)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.strip() == "False"
    assert done.stderr.startswith("kd: recipe.epocs=3")


def test_python_m_is_the_same_command(tmp_path) -> None:
    command = [sys.executable, "-m", "kd.cli.main", "train", "recipe.epocs=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no option recipe.epocs" in done.stderr


@pytest.mark.parametrize(("swept", "said"), [([], "interrupted"), (["-m"], f"interrupted: {hydra_app.SAME_COMMAND}")])
def test_an_interrupted_sweep_says_how_to_go_on(kd, monkeypatch, swept, said) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hydra_app.hydra, "main", lambda **_: lambda task: interrupted)
    monkeypatch.setattr(hydra_app, "run_job", interrupted)
    answer = kd("train", *swept, "seed=0")
    assert (answer.code, answer.err) == (130, f"kd: {said}\n")
