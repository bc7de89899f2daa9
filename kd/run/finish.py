"""Write the end of a run: test the last and the val-selected student, keep what is to be kept, say how it went."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from kd.distill.distiller import Distiller
from kd.parallel import group
from kd.records import record, weight_files
from kd.records.durable import replacing
from kd.run import library_files, peers, weights
from kd.tasks.base import Task
from kd.tasks.metrics import retention

log = logging.getLogger(__name__)


def close(
    config: dict[str, Any],
    run_dir: Path | None,
    trainer: L.Trainer,
    module: Distiller,
    data: Any,
    best: Any,
    digest: str,
    again: bool = False,
) -> dict[str, Any]:
    """Test the last and the val-selected student, each once; predictions where they are to be kept.

    Without a ``run_dir`` no file is written. The module is left with the selected student. ``digest``: of the last
    student; ``again``: whether callbacks may have changed it after its validation.
    """
    if run_dir is not None:  # all of the last epoch: before the selected weights take their place
        _export(config, run_dir, module)
    data.setup("test")
    last_epoch, steps = module.epoch_trained, module.steps_done
    train_means = {k.partition("/")[2]: v for k, v in module.epoch_means.items()}
    same = best.epoch == last_epoch and best.step in (None, steps)
    changed = again and same and group.broadcast(best.digest != digest)
    same = same and not changed
    if again or last_epoch not in module.history:
        module.history[last_epoch] = _validated(trainer, module, data)
    last = {"epoch": last_epoch, "train": train_means, "val": _split(module.history[last_epoch])}
    picked = best.metrics or module.history[best.epoch]
    selected: dict[str, Any] = {"epoch": best.epoch, "val": _split(picked)}
    if config["protocol"].get("val_every_steps") is not None or config["recipe"].get("steps") is not None:
        last["step"], selected["step"] = steps, best.step
    keep = run_dir if config["protocol"]["keep_predictions"] else None
    state = best.read() if group.rank() == 0 else {}
    if not same:
        last.update(_test(trainer, module, data, "test_last"))
        weights.load(module.deployed, group.broadcast(state), run_dir or "selected", "student")
    library_files.close_folder(run_dir, "selected", module.deployed)
    selected.update(_test(trainer, module, data, "test", keep))
    last = {**selected, **last}  # the same student is tested once
    if keep is not None:
        trainer.loggers = []  # this pass is for the file: it is no point of the curves
        module.predictions = {}
        trainer.validate(module, datamodule=data, verbose=False)
        _save_predictions(keep / record.PREDICTIONS["val"], module)
    if best.digest is not None:
        selected["digest"] = best.digest
    outcome: dict[str, Any] = {"student": {"last": last, "selected": selected}, **peers.measured(module, data)}
    if module.teacher is not None:
        outcome["teacher"] = _teacher_part(config, module)
        if module.teacher_trained:
            outcome["teacher"]["weights"] = weight_files.TRAINED_ALONG
            if not same and "test" in selected:  # the teacher of that epoch is gone: nothing to agree with
                alone = module.task.names(False, module.num_classes)
                selected["test"] = {k: v for k, v in selected["test"].items() if k in alone}
    return outcome


def _validated(trainer: L.Trainer, module: Distiller, data: Any) -> dict[str, float]:
    """Validate the last student, which no validation of the fit has seen as it is; no point of the curves."""
    loggers, trainer.loggers = trainer.loggers, []
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.loggers = loggers
    return {name: float(value) for name, value in found.items()}


def _export(config: Mapping[str, Any], run_dir: Path, module: Distiller) -> None:
    """Keep the peers of a set-up, each as a file of its own, and what the terms have learned, for another run.

    Both as they are after the last epoch, which the files say.
    """
    epoch = {"epoch": module.epoch_trained}
    for name, network in module.peers.items():
        node = (config.get("networks") or {}).get(name)
        about = {} if node is None else {k: v for k, v in module.about.items() if k != "heads"} | {"model": node}
        weights.save(network, run_dir / f"{name}.safetensors", {**about, **epoch})
    if module.objective.terms.state_dict():
        weights.save(module.objective.terms, run_dir / weight_files.TERMS, epoch)
    library_files.close_folder(run_dir, "last", module.deployed)


def _teacher_part(config: Mapping[str, Any], module: Distiller) -> dict[str, Any]:
    """Return what the record says of the teacher; no metrics where its output cannot be compared with the student's."""
    assert module.teacher is not None
    part: dict[str, Any] = {"checkpoint": config["teacher"]["checkpoint"]}
    if "val" in module.teacher_metrics:
        part["val"] = module.teacher_metrics["val"]
    part |= {**_which(module.teacher.sources), **module.teacher_tested}
    if module.measures_teacher and not module.comparable:  # its tokens are others than the student's
        part["compared_by"] = module.task.across_tokenizers
    made = config["teacher"]["checkpoint"] is None and len(module.teacher.networks)
    if made and not module.sharded:  # made by its own code, perhaps with weights
        part["digest"] = weights.digest({k: v.cpu() for k, v in module.teacher.state_dict().items()})
    return part


def _which(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Say which weights taught: ``weights`` and ``epoch`` of the teacher's run, lists of several."""
    kept = {key: [source.get(key) for source in sources] for key in ("weights", "epoch") if any(sources)}
    return {key: found[0] if len(found) == 1 else found for key, found in kept.items()}


def _test(trainer: L.Trainer, module: Distiller, data: Any, name: str, keep_in: Path | None = None) -> dict[str, Any]:
    if data.sizes["test"] == 0:  # from Python
        return {}
    module.test_name, module.predictions = name, {} if keep_in is not None else None
    trainer.test(module, datamodule=data, verbose=False)
    if keep_in is not None:
        _save_predictions(keep_in / record.PREDICTIONS["test"], module)
    return module.tested


def _save_predictions(path: Path, module: Distiller) -> None:
    shard = {name: torch.cat(parts).numpy() for name, parts in (module.predictions or {}).items()}
    module.predictions = None
    shards = group.gather(shard)
    if shards is None:
        return
    kept = {name: np.concatenate([s[name] for s in shards if s]) for name in shards[0]}
    order = np.argsort(kept["index"], kind="stable")
    with replacing(path) as temporary, temporary.open("wb") as file:
        index, target, logits = (kept[name][order] for name in ("index", "target", "logits"))
        np.savez_compressed(file, index=index, target=target, logits=logits)


def _split(metrics: Any) -> dict[str, float]:
    return {name.partition("/")[2]: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------------- what is printed


def opening_line(config: dict[str, Any], measured: dict[str, dict[str, int]], data: Any, task: Task) -> str:
    """Write one line: what learns what from whom."""
    roles = [f"{role} {size['parameters']:,} parameters" for role, size in measured.items()]
    weights = {name: node.get("weight", 1) for name, node in config["loss"].items()}
    terms = " + ".join(name if weight == 1 else f"{weight:g} × {name}" for name, weight in weights.items())
    terms += "" if set(weights.values()) == {1} else " (each is shown without its factor)"
    count = {k: "?" if v is None else v for k, v in data.sizes.items()}
    few = f" ({count['labelled']} labelled)" if count["labelled"] != count["train"] else ""
    classes = f"{task.outputs.format(data.num_classes)}, " if data.num_classes else ""
    return (
        f"{config['name']}: {', '.join(roles)}; loss {terms}; {classes}"
        f"{count['train']}{few}/{count['val']}/{count['test']} train/val/test; seed {config['seed']}"
    )


def summary(outcome: Mapping[str, Any], task: Task, run_dir: Path | None) -> str:
    """Write the end of a run: student last and selected, teacher, retention, and where everything is."""
    student, teacher = outcome["student"], outcome.get("teacher")
    last, selected = student["last"], student["selected"]
    along = ", trained along" if (teacher or {}).get("weights") == weight_files.TRAINED_ALONG else ""
    lines = {
        f"student, last epoch ({last['epoch'] + 1})": _metrics(last, task),
        f"student, selected by val ({selected['epoch'] + 1})": _metrics(selected, task),
        f"teacher{along}": "none" if teacher is None else _metrics(teacher, task),
    }
    for name, peer in outcome.get("peers", {}).items():
        lines[f"{name}, last epoch ({peer['epoch'] + 1})"] = _metrics(peer, task)
    if teacher is None or "test" not in teacher:
        lines["size"] = _size(student)
    else:
        lines["retention"] = f"{_retention(selected, teacher, task)}; {_size(student)} against {_size(teacher)}"
    if run_dir is not None:
        lines["run directory"] = str(run_dir.resolve())
    return "\n".join(f"{label:<30} {text}" for label, text in lines.items())


def _retention(student: Mapping[str, Any], teacher: Mapping[str, Any], task: Task) -> str:
    """Write the main metric as a share of the teacher's; where less is better, how many times the teacher's."""
    metric = task.metric(teacher.get("compared_by") or task.metrics[0].name) or task.metrics[0]
    ratio = retention(student["test"].get(metric.name), teacher["test"].get(metric.name))
    if metric.name not in teacher["test"]:
        return f"{metric.title} is beside the teacher"
    if ratio is None:
        return f"none: the teacher's {metric.title} is not above 0"
    return (
        f"{ratio:.1%} of the teacher's {metric.title}"
        if metric.better == "max"
        else (f"{ratio:.3f} times the teacher's {metric.title}")
    )


def _metrics(part: Mapping[str, Any], task: Task) -> str:
    main = task.metrics[0]
    if "test" not in part and "val" in part:  # there is no test set
        return f"val {main.title} {part['val'][main.name]:.4f}"
    if "test" not in part:
        return "not measured: its output is not compared with the student's"
    test = part["test"]
    if main.name not in test:
        return "what the student is compared with"  # it has no number of its own
    others = [m for m in task.metrics if m is not main and m.name in (task.summary or test) and m.name in test]
    beside = "".join(f"  {m.title} {test[m.name]:.4f}" for m in others)
    return f"val {main.title} {part['val'][main.name]:.4f}  test {main.title} {test[main.name]:.4f}{beside}"


def _size(part: Mapping[str, Any]) -> str:
    return f"{part['parameters']:,} parameters, {part['macs']:,} MACs" if "parameters" in part else "no network here"
