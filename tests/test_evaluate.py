"""``kd eval`` measures what the run measured, and says what it cannot measure."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kd.records.record import config_hash, read_config


def record(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def as_begun(run) -> None:
    """The record of a run that began with its config as it is now."""
    rewrite(run, {**record(run), "config_hash": config_hash(read_config(run))})


def without_digest(run, which: str) -> None:
    """The record of a run of before there were digests."""
    found = record(run)
    del found["student"][which]["digest"]
    rewrite(run, found)


def rewrite(run, found: dict) -> None:
    (run / "result.json").write_text(json.dumps(found))


def numbers(kd, tmp_path, *arguments: str) -> dict:
    said = kd("eval", *arguments, f"out={tmp_path / 'out.json'}")
    assert said.code == 0, said.err
    return json.loads((tmp_path / "out.json").read_text())


@pytest.fixture
def run(tmp_path, teacher_run):
    """A copy of the teacher's run, to be changed."""
    return shutil.copytree(teacher_run, tmp_path / "run")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [("dropout: 0.2", "dropout: 0.5", "config_hash = "), ("\nseed: 0", "\nseed: 7", "seed = 7, 0 in result.json")],
)
def test_an_edited_config_is_not_measured(kd, run, before, after, said) -> None:
    text = (run / "config.yaml").read_text()
    assert before in text
    (run / "config.yaml").write_text(text.replace(before, after))
    answer = kd("eval", "run")
    assert answer.code == 1
    assert f"run = run: config.yaml was changed since the run began ({said}" in answer.err
    assert kd("eval", "student.checkpoint=run", "model@student=mlp_teacher").code == 0, "its weights are as they were"


def test_what_does_not_change_the_result_may_be_edited(kd, run) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("name: teacher", "name: t").replace("notes: ''", "notes: seen"))
    assert (run / "config.yaml").read_text() != text
    assert kd("eval", "run").code == 0


@pytest.mark.parametrize("which", ["selected", "last"])
def test_replaced_weights_are_neither_measured_nor_taught_with(kd, run, which) -> None:
    file = run / {"selected": "student.safetensors", "last": "student_last.safetensors"}[which]
    with safe_open(file, "pt") as handle:
        about = handle.metadata()
    state = load_file(file)
    save_file({name: tensor + 1 for name, tensor in state.items()}, file, about)
    network = "model@student=mlp_teacher"
    for arguments in (
        ["eval", "run", f"weights={which}"],
        ["eval", "student.checkpoint=run", f"student.epoch={which}", network],
        ["eval", "who=teacher", f"teacher.checkpoint={file}"],
        ["train", "hardware=cpu", "loss=[kd]", "teacher.checkpoint=run", f"teacher.epoch={which}"],
        ["train", "hardware=cpu", network, "student.checkpoint=run", f"student.epoch={which}"],
    ):
        said = kd(*arguments)
        assert said.code == 1, arguments
        assert f"{file.name} holds other weights than those that its run measured" in said.err, arguments
    save_file(state, file, {**about, "note": "the same weights"})
    assert kd("eval", "run", f"weights={which}").code == 0
    save_file({name: tensor + 1 for name, tensor in state.items()}, file, about)
    without_digest(run, which)
    assert kd("eval", "run", f"weights={which}").code == 0


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_run_is_measured_as_in_training(kd, tmp_path, teacher_run, split) -> None:
    found = numbers(kd, tmp_path, f"run={teacher_run}", f"split={split}")
    trained = record(teacher_run)["student"]["selected"][split]
    assert found["metrics"] == pytest.approx(trained, rel=1e-5)
    assert found["rows"] == {"val": 270, "test": 719}[split]


def test_last_and_selected_weights(kd, tmp_path, teacher_run) -> None:
    found = numbers(kd, tmp_path, f"run={teacher_run}", "weights=last")
    assert found["metrics"]["nll"] == pytest.approx(record(teacher_run)["student"]["last"]["test"]["nll"], rel=1e-5)


def test_beside_a_teacher_agreement_and_kl(kd, tmp_path, teacher_run) -> None:
    kd(
        "train",
        "recipe.epochs=2",
        "hardware=cpu",
        f"teacher.checkpoint={teacher_run}",
        "loss=[kd]",
        "hydra.run.dir=run",
    )
    found = numbers(kd, tmp_path, "run=run")
    assert found["metrics"] == pytest.approx(record(tmp_path / "run")["student"]["selected"]["test"], rel=1e-5)
    own = numbers(kd, tmp_path, "run=run", "who=teacher")
    assert own["metrics"] == pytest.approx(record(teacher_run)["student"]["selected"]["test"], rel=1e-5)


def test_a_teacher_is_its_own_twin(kd, tmp_path, teacher_run) -> None:
    arguments = ["model@student=mlp_teacher", f"student.checkpoint={teacher_run}", f"teacher.checkpoint={teacher_run}"]
    found = numbers(kd, tmp_path, *arguments)
    assert found["metrics"]["agreement"] == 1.0
    assert found["metrics"]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_foreign_checkpoint(kd, tmp_path, teacher_run) -> None:
    save_file(load_file(teacher_run / "student.safetensors"), tmp_path / "plain.safetensors")
    found = numbers(kd, tmp_path, "student.checkpoint=plain.safetensors", "model@student=mlp_teacher")
    assert found["metrics"]["acc1"] == pytest.approx(record(teacher_run)["student"]["selected"]["test"]["acc1"])


def test_a_key_of_the_run_can_be_changed(kd, tmp_path, teacher_run) -> None:
    clean = numbers(kd, tmp_path, f"run={teacher_run}")
    moved = numbers(kd, tmp_path, f"run={teacher_run}", "data.test_shift=1")
    assert moved["metrics"]["acc1"] < clean["metrics"]["acc1"]


def test_a_student_is_fed_with_the_statistics_it_was_trained_on(kd, tmp_path) -> None:
    kd("train", "recipe.epochs=2", "hardware=cpu", "data.mean=[0.9]", "data.std=[0.05]", "hydra.run.dir=run")
    found = numbers(kd, tmp_path, "student.checkpoint=run", "model@student=mlp")  # the data's are 0 and 1 here
    assert found["metrics"]["nll"] == pytest.approx(
        record(tmp_path / "run")["student"]["selected"]["test"]["nll"], rel=1e-3
    )


def test_a_run_of_before_an_option_takes_it(kd, tmp_path, teacher_run) -> None:
    import shutil

    shutil.copytree(teacher_run, tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("  trust: null\n", ""))
    assert "trust" not in (tmp_path / "run" / "config.yaml").read_text()
    assert kd("eval", "run=run", "teacher.trust=true").code == 0


def test_eval_does_not_need_the_code_of_the_loss(kd, tmp_path, teacher_run) -> None:
    import shutil

    shutil.copytree(teacher_run, tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("kd.losses.logits.ce.CrossEntropy", "gone.Loss"))
    as_begun(tmp_path / "run")
    assert kd("eval", "run=run").code == 0


def test_a_run_needs_no_key(kd, tmp_path, teacher_run) -> None:
    assert numbers(kd, tmp_path, str(teacher_run), "split=val") == numbers(
        kd, tmp_path, f"run={teacher_run}", "split=val"
    )
    weights = teacher_run / "student.safetensors"
    assert (
        f"{weights} is a file: kd eval takes a run directory, or student.checkpoint={weights}"
        in kd("eval", str(weights)).err
    )


def test_a_run_is_measured_from_another_directory(kd, tmp_path, monkeypatch, teacher_run) -> None:
    (tmp_path / "t").symlink_to(teacher_run)
    kd("train", "recipe.epochs=1", "hardware=cpu", "teacher.checkpoint=t", "loss=[kd]", "hydra.run.dir=run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert kd("eval", "run=../run").code == 0


def test_the_table_is_printed(kd, teacher_run) -> None:
    said = kd("eval", f"run={teacher_run}")
    for word in ("student on test (719 rows)", "acc1", "nll", "ece", "accuracy of class 9"):
        assert word in said.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run=nowhere"], "nowhere is not a run directory"),
        (["run=RUN", "split=train"], "split = train is not allowed: it must be val or test"),
        (["run=RUN", "who=me"], "who = me is not allowed: it must be student or teacher"),
        (["run=RUN", "data.tset_shift=1"], "the run has no key data.tset_shift (near: data.test_shift"),
        (["run=RUN", "data=mnist"], "the run has no key data"),
        (["run=RUN", "seed=5"], "seed=5 changes nothing here, a run's config is resolved: set data.seed"),
        (
            ["run=RUN", "recipe.epochs=abc"],
            "recipe.epochs: Value 'abc' of type 'str' could not be converted to Integer",
        ),
        (["run=RUN", "student.checkpoint=x"], "leave out run= to measure a checkpoint"),
        (["run=RUN", "who=teacher"], "there is no teacher: give teacher.checkpoint=RUN"),
        (["run=RUN", "out=no/such/folder/x.json"], "cannot be written: its folder does not exist"),
        (["model@student=mlp"], "the student has no weights: give run=RUN or student.checkpoint=FILE"),
        (["nonsense"], "nonsense is neither a run directory nor KEY=VALUE"),
        (["splt"], "splt is neither a run directory nor KEY=VALUE (near: split)"),
        (["run=RUN", "run=x"], "kd eval measures one run, given: "),
        (["run=RUN", "--force"], "--force is not understood: kd eval takes RUN, --config-dir DIR and KEY=VALUE"),
    ],
)
def test_bad_input(kd, teacher_run, arguments, sentence) -> None:
    said = kd("eval", *(a.replace("RUN", str(teacher_run)) if a == "run=RUN" else a for a in arguments))
    assert said.code == 1
    assert sentence in said.err
    assert "Traceback" not in said.err


def test_a_student_of_a_test_split_seen_in_training_is_not_silent(kd, teacher_run) -> None:
    said = kd("eval", f"run={teacher_run}", "data.split_seed=3")
    assert said.code == 1
    assert "may have been trained on" in said.err


def test_the_last_weights_are_measured_where_they_are_asked_for(kd, tmp_path, teacher_run) -> None:
    run = tmp_path / "run"
    shutil.copytree(teacher_run, run)
    last = {name: torch.zeros_like(tensor) for name, tensor in load_file(run / "student_last.safetensors").items()}
    about = safe_open(run / "student.safetensors", "pt").metadata()
    save_file(last, run / "student_last.safetensors", metadata=about)
    without_digest(run, "last")
    asked = ["model@student=mlp_teacher", f"student.checkpoint={run}", "hardware=cpu"]
    found = [kd("eval", *asked, *more, "out=found.json") for more in ([], ["student.epoch=last"])]
    assert [said.code for said in found] == [0, 0], [said.err for said in found]
    assert "acc1" in found[0].out
    assert json.loads((tmp_path / "found.json").read_text())["metrics"]["acc1"] < 0.2


def test_a_run_directory_makes_nothing_of_the_system(kd, tmp_path, teacher_run) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim.txt"
    shutil.copytree(teacher_run, run)
    victim.write_text("kept")
    text = (run / "config.yaml").read_text()
    for key in (
        "student:\n  model:\n    _target_: kd.models.mlp.mlp",
        "task:\n  _target_: kd.tasks.classification.Classification",
    ):
        assert key in text
        before = key.rpartition("_target_: ")[0]
        indent = before.rpartition("\n")[2]
        lines = f"{before}_target_: builtins.open\n{indent}file: {victim}\n{indent}mode: w"
        (run / "config.yaml").write_text(text.replace(key, lines))
        as_begun(run)
        said = kd("eval", str(run))
        assert said.code == 1
        assert "builtins.open" in said.err
        assert victim.read_text() == "kept"


def test_a_teacher_that_brings_its_own_weights_can_be_measured_again(kd, tmp_path, monkeypatch) -> None:
    (tmp_path / "own_net.py").write_text(
        "import torch\nfrom kd.models.mlp import mlp\n\n\n"
        "def made(num_classes, input_shape):\n    torch.manual_seed(5)\n"
        "    return mlp(num_classes=num_classes, input_shape=input_shape, hidden=[16])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    teacher = ["+teacher.model={_target_: own_net.made}", "teacher.allow_random=true", "loss=[ce,kd]"]
    assert kd("train", "recipe.epochs=1", "hardware=cpu", "hydra.run.dir=run", *teacher).code == 0
    said = kd("eval", "run", "out=found.json")
    assert said.code == 0, said.err
    assert "agreement" in json.loads((tmp_path / "found.json").read_text())["metrics"]
