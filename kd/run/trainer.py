"""The inside of a run: build, fit, test, and the numbers of the record. Imports torch and lightning."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd.config.instantiate import make
from kd.distill.distiller import Distiller
from kd.errors import KdError
from kd.parallel import group
from kd.records import record, weight_files
from kd.records.durable import replacing
from kd.run import build, callbacks, hardware, pruning, weights
from kd.tracking import loggers

log = logging.getLogger(__name__)


def fit(config: dict[str, Any], run_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Build from a checked config, fit (on from ``checkpoint``), test once; the part of the record that this yields.

    Of several processes each runs it, and the first one writes.
    """
    quieten()
    hardware.warn_of_slow_precision(config)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if config["hardware"]["threads"]:
        torch.set_num_threads(config["hardware"]["threads"])
    L.seed_everything(config["seed"], workers=True, verbose=False)
    before = weights.progress(checkpoint) if checkpoint else weights.Progress()
    spent = record.read(run_dir).get("wall_clock_s", 0.0) if checkpoint else 0.0
    data = build.datamodule(config)
    module = build.distiller(config, data)
    check_monitor(config["protocol"]["monitor"], module)
    check_steps(config["recipe"], module)
    about = {"model": config["student"]["model"], "data": build.facts(data), "seed": config["seed"]}
    module.about = about
    protocol = config["protocol"]
    if not module.objective.needs("logits"):
        unread = "no term reads the logits: %s picks no checkpoint, the last epoch is the selected one"
        log.info(unread, protocol["monitor"])
        protocol = {**protocol, "monitor": None, "mode": None}
    stopper = pruning.callback(run_dir)
    hooks = [*callbacks.standard(run_dir, protocol, about, spent), *([stopper] if stopper else [])]
    first = group.rank() == 0
    extra = build.loggers(config, run_dir) if first else []
    own = [loggers.whole(loggers.csv_logger(run_dir, before.steps))] if first else []
    trainer = make_trainer(config, run_dir, [*own, *extra], hooks, module)
    for logger in extra:
        logger.log_hyperparams(config)
    measured = sizes(module, data.input_shape)
    hardware.compile_networks(config, module)
    log.info("%s", opening_line(config, measured, data))
    if checkpoint:
        log.info("resumed: %d of %d epochs are trained, after %.0f s", before.epochs, config["recipe"]["epochs"], spent)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if stopper and stopper.epoch is not None:
        return stopper.outcome(module.history)
    weights.save(module.student, run_dir / weight_files.LAST, {**about, "epoch": trainer.current_epoch - 1})
    facts = {k: v for k, v in about["data"].items() if k != "seen"} | {"sizes": data.sizes}
    used = {"protocol": {**protocol, "epochs": config["recipe"]["epochs"]}}
    outcome: dict[str, Any] = {"data": facts, **used, **close(config, run_dir, trainer, module, data, hooks[0])}
    outcome["processes"] = group.world_size()
    networks = {"student": module.student, "teacher": module.teacher}
    for role, size in measured.items():
        speed = {} if module.sharded else {"latency_ms": latency_ms(networks[role], data.input_shape)}
        outcome[role] = {**outcome.get(role, {}), **size, **speed}
    log.info("%s", five_lines(outcome, run_dir))
    return outcome


def quieten() -> None:
    """Silence Lightning's advice that does not apply here; what a user must know is in our own lines."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # small sets are served from memory
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        ".*LeafSpec.*is deprecated.*",  # inside of Lightning
        ".*The number of training batches .* is smaller than the logging interval.*",  # we log by ourselves
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*module.* in eval mode at the start of training.*",  # the teacher
        ".*GPU available but not used.*",  # hardware=cpu asked for it
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*The dirpath has changed from .*",  # a run whose directory was moved goes on
        ".*Starting from v1.9.0, `tensorboardX` has been removed.*",
        ".*It is recommended to use .* when logging on epoch level.*",  # the metrics come together by themselves
    ):
        warnings.filterwarnings("ignore", message=message)


def make_trainer(
    config: dict[str, Any], run_dir: Path, run_loggers: list[Any], hooks: list[Any], module: Distiller
) -> L.Trainer:
    """Lightning's trainer for the recipe, protocol and hardware of the config."""
    recipe = config["recipe"]
    machine = hardware.trainer_arguments(config, module)
    selected = next((h for h in hooks if isinstance(h, callbacks.SelectedWeights)), None)
    arguments: dict[str, Any] = {
        "max_epochs": recipe["epochs"],
        "accumulate_grad_batches": recipe["accumulate"],
        "gradient_clip_val": recipe["gradient_clip"],
        "check_val_every_n_epoch": config["protocol"]["val_every"],
        **machine,
        "plugins": [*machine["plugins"], callbacks.WholeCheckpoints(selected)],
        "logger": run_loggers,
        "callbacks": hooks,
        "default_root_dir": str(run_dir),
        "enable_progress_bar": any(isinstance(h, callbacks.RichProgressBar) for h in hooks),
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,  # the dry batch and the teacher's measurement have seen the split already
        "use_distributed_sampler": False,  # the data modules shard by themselves
    }
    return make(
        {"_target_": "lightning.Trainer", **(config["hardware"]["trainer"] or {})},
        f"hardware.accelerator = {config['hardware']['accelerator']}",
        **arguments,
    )


def check_monitor(monitor: str, module: Distiller) -> None:
    """Refuse a metric that this run will not measure, before the first epoch."""
    known = [f"val/{name}" for name in module.task.metric_names(module.teacher is not None)]
    if monitor not in known:
        raise KdError(f"protocol.monitor = {monitor} is not measured; measured: {', '.join(known)}")


def check_steps(recipe: dict[str, Any], module: Distiller) -> None:
    """Refuse what Lightning cannot do for a distiller that steps its optimisers itself, two of them for example."""
    if module.automatic_optimization:
        return
    for key, idle in (("gradient_clip", None), ("accumulate", 1)):
        if recipe[key] not in (idle, 0):
            raise KdError(
                f"recipe.{key} = {recipe[key]} is not allowed with {type(module).__name__}, which steps its optimisers "
                f"itself (manual optimisation): set recipe.{key}={'null' if idle is None else idle}, and do it in "
                "its training_step"
            )


# ---------------------------------------------------------------------- sizes


def sizes(module: Distiller, input_shape: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """Parameters and multiply-accumulates an image, of student and teacher; adapters are counted apart."""
    example = torch.zeros(1, *input_shape)
    adapters = sum(p.numel() for p in module.objective.parameters())
    found = {"student": {**size(module.student, example), "adapter_parameters": adapters}}
    if module.teacher is not None:
        found["teacher"] = size(module.teacher, example)
    return found


def size(network: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Number of parameters, and multiply-accumulate operations of one forward pass of ``example``."""
    training = network.training
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(example)
    network.train(training)
    return {"parameters": sum(p.numel() for p in network.parameters()), "macs": counter.get_total_flops() // 2}


def latency_ms(network: Any, input_shape: tuple[int, ...], passes: int = 30) -> float:
    """Median milliseconds of an eager forward pass of one image, where the weights are. Noisy on a busy machine."""
    weight = next(network.parameters())
    device = weight.device
    example = torch.zeros(1, *input_shape, device=device, dtype=weight.dtype)
    training = network.training
    network.eval()
    times = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _ in range(3 + passes):  # the first ones warm up
            start = time.perf_counter()
            network(example)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    network.train(training)
    return round(1000 * statistics.median(times[3:]), 4)


# ---------------------------------------------------------------------- the end of a run


def close(
    config: dict[str, Any], run_dir: Path, trainer: L.Trainer, module: Distiller, data: Any, best: Any
) -> dict[str, Any]:
    """Test the last and the val-selected student, each once; predictions where they are to be kept."""
    data.setup("test")
    last_epoch = trainer.current_epoch - 1
    train_means = {k.partition("/")[2]: v for k, v in module.epoch_means.items()}
    last = {"epoch": last_epoch, "train": train_means, "val": _split(module.history[last_epoch])}
    selected: dict[str, Any] = {"epoch": best.epoch, "val": _split(module.history[best.epoch])}
    keep = config["protocol"]["keep_predictions"]
    state = best.read() if group.rank() == 0 else {}
    if best.epoch != last_epoch:
        last.update(_test(trainer, module, data, "test_last"))
        weights.load(module.student, group.broadcast(state), run_dir, "student")
    selected.update(_test(trainer, module, data, "test", run_dir if keep else None))
    last = {**selected, **last}  # the same student is tested once
    if keep:
        trainer.loggers = []  # this pass is for the file: it is no point of the curves
        module.predictions = {}
        trainer.validate(module, datamodule=data, verbose=False)
        _save_predictions(run_dir / "predictions_val.npz", module)
    outcome: dict[str, Any] = {"student": {"last": last, "selected": selected}}
    if module.teacher is not None:
        teacher = {"checkpoint": config["teacher"]["checkpoint"], "val": module.teacher_metrics["val"]}
        outcome["teacher"] = {**teacher, **_which(module.teacher.sources), **module.teacher_tested}
        if config["teacher"]["checkpoint"] is None and not module.sharded:  # made by its own code, perhaps with weights
            outcome["teacher"]["digest"] = weights.digest({k: v.cpu() for k, v in module.teacher.state_dict().items()})
        if module.teacher_trained:
            outcome["teacher"]["weights"] = weight_files.TRAINED_ALONG
            if best.epoch != last_epoch:  # the teacher of that epoch is gone: nothing to agree with
                beside = {*module.task.metric_names(True)} - {*module.task.metric_names(False)}
                selected["test"] = {k: v for k, v in selected["test"].items() if k not in beside}
    return outcome


def _which(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Which weights taught: ``weights`` and ``epoch`` of the teacher's run, lists of several."""
    kept = {key: [source.get(key) for source in sources] for key in ("weights", "epoch") if any(sources)}
    return {key: found[0] if len(found) == 1 else found for key, found in kept.items()}


def _test(trainer: L.Trainer, module: Distiller, data: Any, name: str, keep_in: Path | None = None) -> dict[str, Any]:
    module.test_name, module.predictions = name, {} if keep_in is not None else None
    trainer.test(module, datamodule=data, verbose=False)
    if keep_in is not None:
        _save_predictions(keep_in / "predictions_test.npz", module)
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


# ---------------------------------------------------------------------- what is said


def opening_line(config: dict[str, Any], measured: dict[str, dict[str, int]], data: Any) -> str:
    """One line: what learns what from whom."""
    roles = [f"{role} {size['parameters']:,} parameters" for role, size in measured.items()]
    terms, count = "+".join(config["loss"]), data.sizes
    few = f" ({count['labelled']} labelled)" if count["labelled"] < count["train"] else ""
    return (
        f"{config['name']}: {', '.join(roles)}; loss {terms}; {data.num_classes} classes, "
        f"{count['train']}{few}/{count['val']}/{count['test']} train/val/test; seed {config['seed']}"
    )


def five_lines(outcome: dict[str, Any], run_dir: Path) -> str:
    """The end of a run: student last and selected, teacher, retention, and where everything is."""
    student, teacher = outcome["student"], outcome.get("teacher")
    last, selected = student["last"], student["selected"]
    along = ", trained along" if (teacher or {}).get("weights") == weight_files.TRAINED_ALONG else ""
    lines = {
        f"student, last epoch ({last['epoch'] + 1})": _metrics(last),
        f"student, selected by val ({selected['epoch'] + 1})": _metrics(selected),
        f"teacher{along}": "none" if teacher is None else _metrics(teacher),
    }
    if teacher is None:
        lines["size"] = _size(student)
    else:
        share = selected["test"]["acc1"] / max(teacher["test"]["acc1"], 1e-12)
        lines["retention"] = f"{share:.1%} of the teacher's top-1; {_size(student)} against {_size(teacher)}"
    lines["run directory"] = str(run_dir.resolve())
    return "\n".join(f"{label:<30} {text}" for label, text in lines.items())


def _metrics(part: dict[str, Any]) -> str:
    test, val = part["test"], part["val"]
    agreement = f"  agreement {test['agreement']:.4f}" if "agreement" in test else ""
    return (
        f"val top-1 {val['acc1']:.4f}  test top-1 {test['acc1']:.4f}  NLL {test['nll']:.4f}  "
        f"ECE {test['ece']:.4f}{agreement}"
    )


def _size(part: dict[str, Any]) -> str:
    return f"{part['parameters']:,} parameters, {part['macs']:,} MACs"
