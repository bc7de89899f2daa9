"""``kd train`` from the command line to the record: alone, distilled, swept, resumed, refused."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd.data.images.digits import Digits
from kd.data.images.parts import Source
from kd.records import record
from kd.run import callbacks, cost, finish

FAST = ["recipe.epochs=2", "hardware=cpu"]


def only_run(folder: Path) -> tuple[Path, dict]:
    (file,) = folder.rglob("result.json")
    return file.parent, json.loads(file.read_text())


def test_the_default_trains_and_records(kd, tmp_path) -> None:
    said = kd("train", *FAST)
    assert said.code == 0, said.err
    run_dir, result = only_run(tmp_path)
    assert result["status"] == "finished"
    assert result["overrides"] == FAST
    assert result["protocol"]["monitor"] == "val/acc1"
    student = result["student"]
    assert student["parameters"] == 64 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10
    assert student["macs"] == 64 * 32 + 32 * 32 + 32 * 10
    for when in ("last", "selected"):
        assert 0 < student[when]["test"]["acc1"] <= student[when]["test"]["acc5"] <= 1
        assert len(student[when]["test_per_class"]) == 10
    assert "teacher" not in result
    assert result["wall_clock_s"] > 0
    assert {f.name for f in run_dir.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "result.json",
        "run.lock",
        "student.safetensors",
        "student_last.safetensors",
        "train.log",
    }
    assert str(run_dir.resolve()) in said.out.splitlines()[-1]
    assert sum(line.startswith("epoch ") for line in said.out.splitlines()) == 2


def test_the_epoch_line_and_the_csv_agree_with_the_record(kd, tmp_path) -> None:
    kd("train", *FAST)
    run_dir, result = only_run(tmp_path)
    rows = (run_dir / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    values = [dict(zip(header, row.split(","), strict=True)) for row in rows[1:]]
    last_val = [float(v["val/acc1"]) for v in values if v["val/acc1"]][-1]
    assert last_val == pytest.approx(result["student"]["last"]["val"]["acc1"])
    last_train = [float(v["train/ce"]) for v in values if v["train/ce"]][-1]  # one window an epoch: 13 batches < 50
    assert last_train == pytest.approx(result["student"]["last"]["train"]["ce"], rel=1e-6)


def test_distillation_with_every_term(kd, tmp_path) -> None:
    net = ["data=fake", "data.shape=[1,16,16]", "data.num_classes=4", "data.train_images=96", "data.test_images=32"]
    net += ["model@student=resnet8", "model@teacher=resnet8x4", "teacher.allow_random=true"]
    said = kd("train", *FAST, *net, "loss=[ce,kd,hint,at]", "loss.kd.schedule={_target_:kd.distill.schedules.Linear}")
    assert said.code == 0, said.err
    run_dir, result = only_run(tmp_path)
    assert set(result["student"]["last"]["train"]) == {"loss", "ce", "kd", "hint", "at", "acc1", "acc5"}
    assert result["student"]["adapter_parameters"] > 0
    assert {"agreement", "kl"} <= set(result["student"]["last"]["test"])
    assert result["teacher"]["parameters"] > result["student"]["parameters"]
    assert "weight/kd" in (run_dir / "metrics.csv").read_text().splitlines()[0]
    state = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("teacher.") for name in state)
    assert any(name.startswith("objective.terms.hint") for name in state)
    assert "teacher: val/acc1" in said.out.split("epoch 1/2")[0]


def test_the_total_is_the_weighted_sum(kd, tmp_path, teacher_run) -> None:
    said = kd(
        "train", *FAST, f"teacher.checkpoint={teacher_run}", "loss=[ce,kd]", "loss.ce.weight=0.3", "loss.kd.weight=2"
    )
    assert said.code == 0, said.err
    means = only_run(tmp_path)[1]["student"]["last"]["train"]
    assert means["loss"] == pytest.approx(0.3 * means["ce"] + 2 * means["kd"], rel=1e-5)


def test_a_run_directory_is_a_teacher_and_is_measured(kd, tmp_path, teacher_run) -> None:
    said = kd("train", *FAST, f"teacher.checkpoint={teacher_run}", "loss=[kd]")
    assert said.code == 0, said.err
    found = only_run(tmp_path)[1]
    (fingerprint,) = found["weights_read"]["teacher.checkpoint"]
    assert re.fullmatch("[0-9a-f]{12}", fingerprint)
    teacher = found["teacher"]
    own = json.loads((teacher_run / "result.json").read_text())["student"]["selected"]
    assert teacher["test"]["acc1"] == pytest.approx(own["test"]["acc1"])
    assert teacher["val"]["nll"] == pytest.approx(own["val"]["nll"], rel=1e-5)
    assert teacher["parameters"] == 85_002


def test_several_teachers(kd, tmp_path, teacher_run) -> None:
    said = kd("train", *FAST, f"teacher.checkpoint=[{teacher_run},{teacher_run}]", "loss=[kd]", "teacher.weights=[1,3]")
    assert said.code == 0, said.err
    assert only_run(tmp_path)[1]["teacher"]["parameters"] == 2 * 85_002


def test_the_same_seed_gives_the_same_student(kd, tmp_path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert kd("train", *FAST, f"seed={seed}", f"hydra.run.dir={name}").code == 0
    a, b, c = (load_file(tmp_path / n / "student_last.safetensors") for n in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_the_student_loads_in_plain_timm(kd, tmp_path) -> None:
    import timm

    data = ["data=fake", "data.train_images=40", "data.test_images=16", "data.num_classes=3"]
    said = kd("train", *data, "model@student=timm_resnet18", "recipe.epochs=1", "recipe.batch_size=16", "hardware=cpu")
    assert said.code == 0, said.err
    run_dir, _ = only_run(tmp_path)
    net = timm.create_model("resnet18", num_classes=3)
    net.load_state_dict(load_file(run_dir / "student.safetensors"))


def test_predictions_are_kept_when_asked(kd, tmp_path) -> None:
    import numpy as np

    assert kd("train", *FAST, "protocol.keep_predictions=true").code == 0
    run_dir, result = only_run(tmp_path)
    kept = np.load(run_dir / "predictions_test.npz")
    accuracy = (kept["logits"].argmax(1) == kept["target"]).mean()
    assert accuracy == pytest.approx(result["student"]["selected"]["test"]["acc1"])
    assert len(np.unique(kept["index"])) == len(kept["index"]) == 719


def test_loggers_by_configuration(kd, tmp_path) -> None:
    said = kd("train", *FAST, "logger=[wandb,tensorboard]", "tags=[a]", "hydra.run.dir=run")
    assert said.code == 0, said.err
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


# ---------------------------------------------------------------------- resume


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "kd.cli.main", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(kd, tmp_path, teacher_run, monkeypatch) -> None:
    """Killed in the middle of training, with dropout and augmentation, and resumed: equal weights and metrics."""
    # one thread everywhere: sums over another number of threads differ in their last bits
    arguments = [
        "recipe.epochs=12",
        "hardware=cpu",
        "hardware.threads=1",
        "model@student=mlp",
        "student.model.dropout=0.2",
    ]
    arguments += ["data.augment.pad=1", "loss=[ce,kd]", f"teacher.checkpoint={teacher_run}"]
    assert kd("train", *arguments, "hydra.run.dir=whole").code == 0
    killed = tmp_path / "killed"
    process = start(tmp_path, *arguments, "hydra.run.dir=killed")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 4/"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert json.loads((killed / "result.json").read_text())["status"] == "running"
    about = json.loads((killed / "result.json").read_text())
    record.write(killed, {**about, "weights_read": {"teacher.checkpoint": ["0" * 12]}})
    fails(kd("train", "resume=killed"), f"teacher.checkpoint = {teacher_run} holds other weights than when the run")
    assert about.pop("code_read") == {}
    record.write(killed, about)  # as before there was that key
    checkpoint = killed / "checkpoints" / "last.ckpt"
    kept = torch.load(checkpoint, weights_only=True)
    assert kept["callbacks"]["WallClock"]["seconds"] > 0
    kept["callbacks"]["WallClock"]["seconds"] += 1000  # as if it had been slow
    torch.save(kept, checkpoint)
    with monkeypatch.context() as patched:
        load = Digits.load
        inverted = lambda self: Source(load(self).train._replace(inputs=255 - load(self).train.inputs))  # noqa: E731
        patched.setattr(Digits, "load", inverted)
        fails(kd("train", "resume=killed"), "the data is not what it was when the run began: the samples are others")
    said = kd("train", "resume=killed")
    assert said.code == 0, said.err
    assert "epoch 1/" not in said.out
    assert re.search(rf"\nresumed: {kept['epoch'] + 1} of 12 epochs are trained, after 1\d\d\d s", said.out)
    whole, resumed = (load_file(tmp_path / n / "student_last.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert len(whole) == 6
    a, b = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "killed"))
    for result in (a, b):
        assert result["student"].pop("latency_ms") > 0  # a measurement, never twice the same
    assert a["student"] == b["student"]
    assert b["status"] == "finished"
    assert b["code_read"] is None, "what it ran before it was killed is not known"
    assert b["weights_read"] == a["weights_read"] == about["weights_read"]
    assert a["wall_clock_s"] < 1000 < b["wall_clock_s"] < 1200
    assert torch.load(checkpoint, weights_only=True)["callbacks"]["WallClock"]["seconds"] > 1000  # for a third sitting
    rows = (killed / "metrics.csv").read_text().splitlines()
    assert rows == (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    assert "is finished" in kd("train", "resume=killed").err


@pytest.mark.slow
def test_an_interrupted_run_says_so(tmp_path) -> None:
    process = start(tmp_path, "recipe.epochs=500", "hardware=cpu", "hydra.run.dir=run")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate()[0]
    assert process.wait() == 130, rest
    assert re.search(r"^kd: interrupted: all up to .* to go on: kd train resume=\S+/run$", rest, re.MULTILINE)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"


# ---------------------------------------------------------------------- bad input


def fails(said, sentence: str) -> None:
    assert said.code == 1
    assert sentence in said.err, said.err
    assert "Traceback" not in said.err + said.out


def test_a_random_teacher_is_refused(kd) -> None:
    fails(
        kd("train", *FAST, "model@teacher=mlp", "loss=[kd]"), "the teacher has random weights: give teacher.checkpoint"
    )


def test_a_term_without_its_teacher_is_refused(kd) -> None:
    fails(kd("train", *FAST, "loss=[ce,kd]"), "loss.kd needs a teacher")


def test_a_wrong_tap_lists_near_names(kd, teacher_run) -> None:
    arguments = [f"teacher.checkpoint={teacher_run}", "loss=[ce,hint]", "loss.hint.teacher_taps=[1]"]
    said = kd("train", *FAST, *arguments, "loss.hint.student_taps=[rellu1]")
    fails(said, "student tap rellu1 does not exist: there is no module rellu1 (near: relu1")


def test_a_tap_of_the_wrong_shape_is_named(kd, teacher_run) -> None:
    said = kd("train", *FAST, f"teacher.checkpoint={teacher_run}", "loss=[ce,at]")
    fails(said, "loss.at: at cannot compare student tap relu1 (vector: 32) with teacher tap relu1 (vector: ")


def test_other_classes_are_refused(kd, teacher_run) -> None:
    data = ["data=fake", "data.shape=[1,8,8]", "data.num_classes=7"]
    said = kd("train", *FAST, *data, f"teacher.checkpoint={teacher_run}", "loss=[kd]")
    fails(said, "was trained on 10 classes, the data has 7")


def test_classes_with_other_names_are_refused(kd, tmp_path, teacher_run) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(teacher_run / "student.safetensors", "pt") as handle:
        metadata = handle.metadata()
        tensors = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118 - not a dict
    about = json.loads(metadata["kd"])
    about["data"]["class_names"][4] = "four"
    save_file(tensors, tmp_path / "other.safetensors", {**metadata, "kd": json.dumps(about)})
    said = kd("train", *FAST, "teacher.checkpoint=other.safetensors", "loss=[kd]")
    fails(said, "was trained on other classes: class 4 is called 'four' there, '4' in the data")


def test_another_split_is_refused(kd, teacher_run) -> None:
    said = kd("train", *FAST, "data.split_seed=5", f"teacher.checkpoint={teacher_run}", "loss=[kd]")
    fails(said, "may have been trained on this run's test samples")


def test_another_image_size_must_be_decided(kd) -> None:
    assert kd("train", *FAST, "data=fake", "data.shape=[1,8,8]", "hydra.run.dir=small").code == 0
    arguments = [*FAST, "data=fake", "data.shape=[1,16,16]", "teacher.checkpoint=small", "loss=[kd]"]
    fails(kd("train", *arguments), "the teacher expects 8×8 images, the data gives 16×16: set teacher.resize=8")
    fails(kd("train", *arguments, "teacher.resize=0"), "teacher.resize = 0 is not allowed")
    said = kd("train", *arguments, "teacher.resize=8")
    assert said.code == 0, said.err


def test_a_bare_state_dict_needs_its_network(kd, tmp_path, teacher_run) -> None:
    torch.save(load_file(teacher_run / "student.safetensors"), tmp_path / "bare.pt")
    arguments = [*FAST, "teacher.checkpoint=bare.pt", "loss=[kd]"]
    fails(kd("train", *arguments), "does not say which network it belongs to: add model@teacher=NAME")
    fails(kd("train", *arguments, "model@teacher=mlp"), "does not fit the teacher: ")
    said = kd("train", *arguments, "model@teacher=mlp_teacher")
    assert said.code == 0, said.err


def test_a_truncated_checkpoint(kd, tmp_path, teacher_run) -> None:
    (tmp_path / "cut.safetensors").write_bytes((teacher_run / "student.safetensors").read_bytes()[:1000])
    said = kd("train", *FAST, "teacher.checkpoint=cut.safetensors", "loss=[kd]")
    fails(said, "cut.safetensors cannot be read: it is truncated")


def test_a_lightning_checkpoint_is_a_teacher(kd, teacher_run) -> None:
    checkpoint = teacher_run / "checkpoints" / "last.ckpt"
    said = kd("train", *FAST, f"teacher.checkpoint={checkpoint}", "model@teacher=mlp_teacher", "loss=[kd]")
    assert said.code == 0, said.err


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run(kd, tmp_path, monkeypatch, loss) -> None:
    """The sentence names the step, the term and the last good checkpoint; no later checkpoint is written."""
    from kd.losses.logits.ce import CrossEntropy

    original, calls = CrossEntropy.forward, []

    def poisoned(self, student, teacher, batch):
        calls.append(1)
        return original(self, student, teacher, batch) * (float(loss) if len(calls) == 1 + 13 + 5 else 1.0)

    monkeypatch.setattr(CrossEntropy, "forward", poisoned)
    said = kd("train", "recipe.epochs=3", "hardware=cpu", "hydra.run.dir=run")
    fails(said, "the loss is not finite: term ce at batch 5 of epoch 2 (a lower recipe.optimizer.lr")
    checkpoint = Path(said.err.split("last good checkpoint: ")[1].strip())
    assert checkpoint == (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve()
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert "term ce" in result["error"]
    assert result["failure"] == "run"
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()


def test_a_file_where_the_checkpoints_should_be(kd, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("mine")
    fails(kd("train", *FAST, "hydra.run.dir=run"), "run/checkpoints is a file: a run keeps its checkpoint in a direct")
    assert (tmp_path / "run" / "checkpoints").read_text() == "mine"
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_directory_that_is_deleted_while_it_runs(kd, tmp_path, monkeypatch, epoch) -> None:
    import shutil

    from kd.distill.distiller import Distiller

    begin = Distiller.on_train_epoch_start

    def delete(self) -> None:
        if self.current_epoch == epoch:
            shutil.rmtree(tmp_path / "run")
        begin(self)

    monkeypatch.setattr(Distiller, "on_train_epoch_start", delete)
    fails(kd("train", *FAST, "hydra.run.dir=run"), f"{tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "last.ckpt", "student.safetensors", "metrics.csv"])
def test_no_room_is_one_sentence_with_the_path(kd, tmp_path, monkeypatch, name) -> None:
    from kd.records import durable

    flush = durable._flush

    def full(path: Path) -> None:
        if path.name.startswith(f".{name}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    monkeypatch.setattr(durable, "_flush", full)
    said = kd("train", *FAST, "hydra.run.dir=run")
    fails(said, f"{name} cannot be written: No space left on device")
    assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.tmp"))
    if name != "result.json":
        assert record.read(tmp_path / "run")["failure"] == "machine"


def test_an_unwritable_run_directory(kd, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    fails(kd("train", *FAST, "hydra.run.dir=file/run"), "the run directory cannot be written: ")


def test_a_second_run_does_not_overwrite_the_first(kd, tmp_path) -> None:
    assert kd("train", *FAST, "hydra.run.dir=run").code == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    fails(kd("train", *FAST, "seed=1", "hydra.run.dir=run"), "run holds a run already: go on with resume=")
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_two_processes_do_not_train_in_one_directory(kd, tmp_path, monkeypatch) -> None:
    from kd.records import lock

    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    (tmp_path / "run").mkdir()
    with lock.held(tmp_path / "run" / lock.RUN):
        fails(kd("train", *FAST, "hydra.run.dir=run"), "run is in use: another process trains in it")
    assert kd("train", *FAST, "hydra.run.dir=run").code == 0


def test_a_last_batch_of_one_image_under_batch_norm(kd) -> None:
    data = ["data=fake", "data.train_size=33", "recipe.batch_size=32", "model@student=resnet8"]
    fails(kd("train", *FAST, *data), "recipe.batch_size = 32 leaves a last batch of one image (33 in all)")
    assert kd("train", *FAST, *data, "data.drop_last=true").code == 0


@pytest.mark.parametrize("swept", [[], ["-m"]])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_before_there_is_a_directory(kd, tmp_path, swept) -> None:
    sentence = "hardware.accelerator = gpu is not allowed here: torch finds no GPU (hardware=cpu)"
    fails(kd("train", *swept, "recipe.epochs=1", "hardware=ddp", "hardware.devices=4"), sentence)
    assert not list(tmp_path.iterdir())


def test_a_failed_start_can_be_repeated_in_its_directory(kd, tmp_path) -> None:
    fails(kd("train", *FAST, "model@teacher=mlp", "loss=[kd]", "hydra.run.dir=run"), "random weights")
    assert kd("train", *FAST, "hydra.run.dir=run").code == 0


def test_a_student_does_not_start_from_weights_that_saw_its_test_images(kd, teacher_run) -> None:
    start = ["model@student=mlp_teacher", f"student.checkpoint={teacher_run}"]
    assert kd("train", *FAST, *start).code == 0
    fails(kd("train", *FAST, *start, "data.split_seed=1"), "may have been trained on this run's test samples")


@pytest.mark.parametrize("debug", ["fast", "overfit", "anomaly"])
def test_debug_presets_with_a_teacher(kd, teacher_run, debug) -> None:
    arguments = [f"debug={debug}", f"teacher.checkpoint={teacher_run}", "loss=[ce,kd]", "data.eval_batch_size=64"]
    said = kd("train", "recipe.epochs=1", "hardware=cpu", *arguments)
    assert said.code == 0, said.err


def test_the_better_loss_is_the_smaller_one(kd, tmp_path) -> None:
    assert (
        kd("train", "recipe.epochs=4", "hardware=cpu", "protocol.monitor=val/nll", "recipe.optimizer.lr=0.003").code
        == 0
    )
    _, result = only_run(tmp_path)
    assert result["protocol"]["mode"] == "min"
    assert result["student"]["selected"]["epoch"] == 3  # it falls from epoch to epoch here


def test_labels_are_averaged_over_what_is_labelled(kd, tmp_path) -> None:
    """With a rate of almost 0 the mean training loss of few labels is that of the untrained network: ln 10, about."""
    arguments = ["data.label_fraction=0.03", "recipe.batch_size=8", "recipe.optimizer.lr=1e-9", "recipe.epochs=1"]
    assert kd("train", *arguments, "hardware=cpu").code == 0
    student = only_run(tmp_path)[1]["student"]["last"]
    assert student["train"]["ce"] == pytest.approx(student["val"]["nll"], rel=0.05)


def test_an_empty_split(kd) -> None:
    fails(kd("train", *FAST, "data.val_fraction=0.0001"), "data.val_fraction = 0.0001 leaves no image for validation")


def test_a_wrong_monitor_lists_what_is_measured(kd) -> None:
    fails(
        kd("train", *FAST, "protocol.monitor=val/top1"),
        "protocol.monitor = val/top1 is not measured; measured: val/acc1",
    )
    fails(
        kd("train", *FAST, "protocol.mode=min"),
        "protocol.mode = min is not allowed: the better val/acc1 is its maximum (or null)",
    )


def test_an_unexpected_error_keeps_its_traceback(kd, tmp_path, monkeypatch) -> None:

    monkeypatch.setattr(cost, "sizes", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kd("train", *FAST, "hydra.run.dir=run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_a_damaged_checkpoint_cannot_be_resumed(kd, tmp_path, monkeypatch) -> None:

    monkeypatch.setattr(finish, "close", lambda *a: 1 / 0)  # the run fails after its last epoch
    with pytest.raises(ZeroDivisionError):
        kd("train", *FAST, "hydra.run.dir=run")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:2000])
    fails(kd("train", "resume=run"), "last.ckpt cannot be read: it is truncated or not a checkpoint")
    checkpoint.write_bytes(whole)
    said = kd("train", "resume=run")
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("validations", "epoch"),
    [
        ([(0.80, 0.9), (0.85, 0.8), (0.85, 0.6), (0.85, 0.7), (0.80, 0.1)], 2),
        ([(0.85, 0.6), (0.85, 0.6)], 0),
        ([(0.85, None), (0.85, None), (0.9, None), (0.9, None)], 2),
    ],
    ids=["lower NLL", "earlier", "no NLL"],
)
def test_of_equal_validations_that_of_the_lower_nll_is_selected(validations, epoch) -> None:
    selected = callbacks.SelectedWeights(None, "val/acc1", "max", {})
    module = SimpleNamespace(history={}, steps_done=0, deployed=nn.Linear(1, 1))
    for number, (accuracy, nll) in enumerate(validations):
        module.history[number] = {"val/acc1": accuracy} | ({} if nll is None else {"val/nll": nll})
        state = SimpleNamespace(fn="fit")
        trainer = SimpleNamespace(state=state, callback_metrics=module.history[number], current_epoch=number)
        selected.on_validation_end(trainer, module)
    assert (selected.epoch, selected.best) == (epoch, max(accuracy for accuracy, _ in validations))
