"""``kd eval`` measures what the run measured, and says what it cannot measure."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file


def record(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def numbers(kd, tmp_path, *arguments: str) -> dict:
    said = kd("eval", *arguments, f"out={tmp_path / 'out.json'}")
    assert said.code == 0, said.err
    return json.loads((tmp_path / "out.json").read_text())


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
