"""Measure a run's language model by EleutherAI's lm-evaluation-harness (the extra ``lm-eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kd.errors import KdError, did_you_mean


def harness(
    folder: Path, tasks: Sequence[str], limit: int | None = None, tasks_folder: str | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Measure the causal language model of a folder that ``from_pretrained`` reads, tokenizer included.

    ``tasks``: names of the harness, or of YAML files in ``tasks_folder``, which may be data alone: a task that names
    code (``!function``, ``custom_dataset``) is the user's own script, as a config is. ``limit``: samples of a task;
    None: all. Returns ``tasks``: name → metric → {value, stderr}, and the harness's ``version``.

    ``KdError``: the harness is not installed, there is no such task, or it fails (data that cannot be had, for one).
    """
    try:
        import lm_eval  # an extra, and eight seconds
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise KdError("lm_eval needs the lm-evaluation-harness: pip install 'kd[lm-eval]'") from None
    if not (folder / "config.json").is_file():
        raise KdError(f"lm_eval reads networks of transformers, and there is none in {folder}")
    manager = TaskManager(include_path=tasks_folder)
    known = manager.all_tasks
    if unknown := [name for name in tasks if name not in known]:
        near = did_you_mean(unknown[0], known)
        raise KdError(f"lm_eval = {unknown[0]} is not allowed: the harness has no such task{near}")
    try:
        found: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "trust_remote_code": False},
            tasks=list(tasks),
            limit=limit,
            batch_size=batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            task_manager=manager,
            log_samples=False,
        )
    except Exception as error:  # of any library below: data sets, the hub, the task's own code
        raise KdError(
            f"lm_eval = {','.join(tasks)} failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    measured = {name: _metrics(values) for name, values in found["results"].items()}
    return {"tasks": measured, "version": lm_eval.__version__}


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return metric → value and standard error; the harness writes ``metric,filter`` and ``metric_stderr,filter``."""
    made: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        name, comma, kept = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue
        metric = name.removesuffix("_stderr") + ("" if kept == "none" else f" ({kept})")
        made.setdefault(metric, {})["stderr" if name.endswith("_stderr") else "value"] = float(value)
    return made
