"""The inside of a run: build, fit, test, and the numbers of the record. Imports torch and lightning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from kd.config.instantiate import make
from kd.config.recipe import length, recorded, settings
from kd.config.recipe import protocol as complete_protocol
from kd.distill.distiller import Distiller
from kd.errors import KdError
from kd.parallel import group
from kd.records import record, weight_files
from kd.run import build, callbacks, compatibility, cost, finish, hardware, library_files, networks, pruning, weights
from kd.run.average import AverageStudent
from kd.run.data_facts import facts
from kd.run.ending import Ending
from kd.run.frozen_body import FrozenBody, FrozenNorms, refuse_random
from kd.tracking import loggers

log = logging.getLogger(__name__)


def fit(config: dict[str, Any], run_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Build from a checked config, fit (on from ``checkpoint``), test once; the part of the record that this yields.

    Of several processes each runs it, and the first one writes.
    """
    begin(config)
    refuse_random(config["student"], settings(config))
    data = build.datamodule(config)
    module = build.distiller(config, data)
    compatibility.check_steps(settings(config), module)
    return carry_out(config, run_dir, data, module, checkpoint)


def begin(config: Mapping[str, Any]) -> None:
    """Set up the process for a run: what is logged, threads, random numbers, the memory that is measured."""
    quieten()
    hardware.warn_of_slow_precision(config)
    hardware.keep_memory(config)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if config["hardware"]["threads"]:
        torch.set_num_threads(config["hardware"]["threads"])
    L.seed_everything(config["seed"], workers=True, verbose=False)


def carry_out(
    config: dict[str, Any],
    run_dir: Path | None,
    data: Any,
    module: Distiller,
    checkpoint: Path | None = None,
    further: Sequence[L.Callback] = (),
    resumable: bool = True,
    bar: bool = True,
) -> dict[str, Any]:
    """Fit a prepared module (on from ``checkpoint``), test once; the part of the record that this yields.

    Without a ``run_dir`` nothing is written. ``further``: callbacks beside those of every run. ``resumable``: whether
    checkpoints are kept to go on from. ``bar``: whether a terminal shows one.
    """
    before = weights.progress(checkpoint) if checkpoint else weights.Progress()
    spent = record.read(run_dir).get("wall_clock_s", 0.0) if checkpoint and run_dir else 0.0
    recipe, validated = settings(config), complete_protocol(config)
    protocol = selection(validated, module)
    compatibility.check_accumulation(recipe, validated, data)
    compatibility.check_predictions(validated, module.task)
    model = networks.description(module.student, config["student"]["model"])
    about = {"model": model, "data": facts(data), "seed": config["seed"]}
    about |= {"heads": module.heads} if module.heads else {}
    module.about = about
    stopper = pruning.callback(run_dir) if run_dir else None
    own_hooks = [*_chosen(config, protocol, module), *further]
    standard = callbacks.standard(run_dir, protocol, about, spent, recipe["steps"] is not None, resumable, bar)
    hooks = [*standard, *_of_recipe(recipe), *([stopper] if stopper else []), *own_hooks]
    first = group.rank() == 0
    extra = build.loggers(config, run_dir) if first and run_dir else []
    own = [loggers.MetricsFile(run_dir, before.steps)] if first and run_dir else []
    trainer = make_trainer(config, run_dir, [*own, *extra], hooks, module)
    for logger in extra:
        logger.log_hyperparams(config)
    examples = {"student": data.example(), "teacher": getattr(data, "for_teacher", data).example()}
    measured = cost.sizes(module, examples)
    if run_dir:
        tokenizer = getattr(data, "tokenizer", None)
        library_files.open_folders(run_dir, module.deployed, tokenizer, data.class_names)
    hardware.compile_networks(config, module)
    log.info("%s", finish.opening_line(config, measured, data, module.task))
    if first and (copies := data.copies_in_test() if hasattr(data, "copies_in_test") else 0):
        what = "images" if data.mean else "rows"
        log.warning("%d of %d test %s are copies of training %s", copies, data.sizes["test"], what, what)
    if checkpoint:
        log.info("resumed: %s are trained, after %.0f s", _trained(before, recipe, validated), spent)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if stopper and stopper.epoch is not None:
        return stopper.outcome(module.history)
    ending = next(h for h in hooks if isinstance(h, Ending))
    ending.note(trainer)
    described = {**about, "epoch": module.epoch_trained}
    if run_dir:
        last = weights.save(module.deployed, run_dir / weight_files.LAST, described)
    else:
        last = weights.digest(weights.whole_state(module.deployed))
    again = any(not getattr(hook, "observes_only", False) for hook in own_hooks)
    outcome: dict[str, Any] = {
        "data": {k: v for k, v in about["data"].items() if k != "seen"}
        | {"sizes": data.sizes}
        | ({"augmentation_off": list(off)} if (off := getattr(data, "augmentation_off", ())) else {}),
        "metrics": [m.describe() for m in module.task.metrics if m.name in module.task.names(True, module.num_classes)],
        "protocol": {**recorded(protocol, recipe), "epochs": recipe["epochs"] or module.epoch_trained + 1},
        **({"stopped": ending.stopped} if ending.stopped else {}),
        **finish.close(config, run_dir, trainer, module, data, hooks[0], last, again),
        "processes": group.world_size(),
    }
    outcome["student"]["last"]["digest"] = last
    if begun := getattr(module.student, "started_from", None):
        outcome["student"]["started_from"] = begun
    if ending.stopped:
        log.info("stopped at epoch %d, step %d: %s", *_place(ending.stopped), ending.stopped["why"])
    for role, size in measured.items():
        outcome[role] = {**outcome.get(role, {}), **size, **_latency(module, role, examples[role])}
    log.info("%s", finish.summary(outcome, module.task, run_dir))
    return outcome


def _of_recipe(recipe: dict[str, Any]) -> list[L.Callback]:
    """Make the callbacks that a recipe asks for: an average of the student, what of it is frozen, and until when."""
    average = [AverageStudent(**recipe["ema"])] if recipe["ema"] else []
    frozen = [FrozenBody(recipe["frozen_body"])] if recipe["frozen_body"] else []
    norms = [FrozenNorms()] if recipe["frozen_norms"] else []
    return [*average, *frozen, *norms]


def _chosen(config: dict[str, Any], protocol: dict[str, Any], module: Distiller) -> list[L.Callback]:
    """Make the callbacks of the config; those that watch a metric are given its direction."""
    metrics = {name: module.task.metric(name) for name in module.task.names(module.comparable, module.num_classes)}
    better = {f"val/{name}": metric.better for name, metric in metrics.items() if metric is not None}
    return build.callbacks(config, protocol, better)


def _latency(module: Distiller, role: str, example: Any) -> dict[str, float]:
    """Measure the milliseconds of a pass of student or teacher; nothing of sharded ones."""
    network: Any = {"student": module.deployed, "teacher": module.teacher}[role]
    return {} if module.sharded else {"latency_ms": cost.latency_ms(network, module.task, example)}


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
    config: dict[str, Any], run_dir: Path | None, run_loggers: list[Any], hooks: list[Any], module: Distiller
) -> L.Trainer:
    """Make Lightning's trainer for the recipe, protocol and hardware of the config."""
    recipe, protocol = settings(config), complete_protocol(config)
    machine = hardware.trainer_arguments(config, module)
    selected = next((h for h in hooks if isinstance(h, callbacks.SelectedWeights)), None)
    lean = module.automatic_optimization  # else the module does it: Lightning refuses both
    several = 1 if lean else max(1, len(module.optimizer_names()))  # Lightning counts the steps of all optimisers
    arguments: dict[str, Any] = {
        "max_epochs": recipe["epochs"] or -1,
        **({"max_steps": recipe["steps"] * several} if recipe["steps"] else {}),
        **(
            {"accumulate_grad_batches": recipe["accumulate"], "gradient_clip_val": recipe["gradient_clip"]}
            if lean
            else {}
        ),
        **_validations(recipe, protocol),
        **machine,
        "plugins": [*machine["plugins"], callbacks.WholeCheckpoints(selected)],
        "logger": run_loggers,
        "callbacks": hooks,
        "default_root_dir": str(run_dir) if run_dir else None,
        "enable_checkpointing": any(isinstance(h, L.pytorch.callbacks.ModelCheckpoint) for h in hooks),
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


def _validations(recipe: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    if protocol["val_every_steps"] is None:
        return {"check_val_every_n_epoch": protocol["val_every"]}
    # Lightning counts batches here
    return {"check_val_every_n_epoch": None, "val_check_interval": protocol["val_every_steps"] * recipe["accumulate"]}


def _trained(before: weights.Progress, recipe: dict[str, Any], protocol: dict[str, Any]) -> str:
    """Write how far a run was: in the unit of its length, steps where it validates by them."""
    if recipe["steps"] is None and protocol["val_every_steps"] is None:
        return f"{before.epochs} of {recipe['epochs']} epochs"
    return f"{before.steps} steps, of {length(recipe)},"


def _place(stopped: dict[str, Any]) -> tuple[int, int]:
    return stopped["epoch"] + 1, stopped["step"]


def selection(protocol: dict[str, Any], module: Distiller) -> dict[str, Any]:
    """Complete the protocol with the metric that picks the checkpoint, and its direction; by default the task's first.

    ``KdError`` for a metric that this run will not measure, before the first epoch. Where no term reads what the
    metrics are made of, none picks: the last epoch is the selected one.
    """
    task = module.task
    monitor = protocol["monitor"] or f"val/{task.metrics[0].name}"
    known = [f"val/{name}" for name in task.names(module.comparable, module.num_classes)]
    if monitor not in known:
        raise KdError(f"protocol.monitor = {monitor} is not measured; measured: {', '.join(known)}")
    metric = task.metric(monitor.partition("/")[2])
    assert metric is not None
    if protocol["mode"] not in (None, metric.better):
        allowed = f"the better {monitor} is its {metric.better}imum (or null)"
        raise KdError(f"protocol.mode = {protocol['mode']} is not allowed: {allowed}")
    trained = bool(module.objective.needs("student_logits")) or module.deployed is not module.student
    if task.needs_logits and not trained:
        log.info("no term reads the logits: %s picks no checkpoint, the last epoch is the selected one", monitor)
        return {**protocol, "monitor": None, "mode": None}
    return {**protocol, "monitor": monitor, "mode": metric.better}
