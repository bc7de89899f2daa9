"""``kd search``: the best student within limits of time, size or money, its shape and its recipe. No torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from kd.cli.hydra_app import run
from kd.config import explain
from kd.config.compose import checked
from kd.errors import KdError, did_you_mean
from kd.run.train import train
from kd.sweeps.architecture import SURGERY, axes
from kd.sweeps.limits import TIMED

FLAGS = {  # → the limit in hydra.sweeper.limits
    "--max-params": "parameters",
    "--max-macs": "macs",
    "--max-mb": "mb",
    "--max-peak-mb": "peak_mb",
    "--max-ms": "ms",
    "--max-latency-ratio": "latency_ratio",
    "--max-cost": "cost_month",
}
CUT = "model@student=none"  # the student is made from its teacher
OTHERS = ("--cost", "--trials", "--seed", "--config-dir")
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}

USAGE = """kd search [GROUP=OPTION ...] [KEY=VALUE ...] --max-LIMIT VALUE [--trials N]

Searches the shape of the student and its recipe for the best validation within limits, by Optuna: the Pareto front,
and which run to take. Every network is measured before it is trained; one above a limit is marked infeasible and not
trained. The same command again goes on; with more --trials as well.

  kd search teacher.checkpoint=RUN loss=[ce,kd] --max-params 5k
  kd search teacher.checkpoint=RUN loss=[ce,kd] --max-latency-ratio 0.5 --trials 40
  kd search model@student=none teacher.checkpoint=RUN … --max-mb 20           layers and widths cut from the teacher
  kd search model@student=timm student.model.name=A,B,C … --max-ms 5          sizes of your own

  --max-params 50k        parameters; --max-macs 2M: multiply-accumulates of a sample; --max-mb 1.5: weights in memory
  --max-peak-mb 40        memory of a pass of one sample with the weights, as kd bench measures it: seconds a network
  --max-latency-ratio 0.5 time of a pass of one sample ÷ the teacher's, of interleaved rounds, on this machine
  --max-ms 2              that time itself, in milliseconds
  --max-cost 100 --cost NAME|FILE.yaml    money a month, by prices by the hour as kd cost takes them; requests a second
                          are measured
  --trials 20             networks that are trained; --seed 0

Varied, where no argument sets it: depth and width of an MLP, of CIFAR's ResNets and WRNs, of a BERT by its config, or
of what is cut from the teacher; learning rate; temperature of kd. Arguments sweep in the grammar of kd train -m."""


def main(argv: Sequence[str]) -> int:
    """Choose what is varied, then run the search through the Optuna sweeper. Returns the exit code."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 1
    own, overrides = _parsed(argv)
    limits = {limit: _amount(flag, own[flag]) for flag, limit in FLAGS.items() if flag in own}
    if not limits:
        raise KdError(f"kd search needs a limit: {', '.join(FLAGS)}")
    if not (trials := own.get("--trials", "20")).isdecimal() or int(trials) < 1:
        raise KdError(f"--trials {trials} is not allowed: it must be a whole number, 1 or more")
    config_dir = own.get("--config-dir")
    fixed = _fixed(overrides)
    if CUT in fixed and not any(o.startswith(f"{SURGERY}.") for o in fixed):
        fixed.append(f"{SURGERY}.layers=1")  # what is cut from the teacher is varied
    base = checked(fixed, config_dir)
    varied = axes(base, [o for o in overrides if not o.startswith("hydra")])
    options = _options(own, limits, varied, overrides)
    folder = ["--config-dir", config_dir] if config_dir else []
    return run(["-m", *folder, "hydra/sweeper=optuna", *options, *overrides, *varied], train)


def _parsed(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Divide flags, with their values, from overrides. ``KdError`` for a flag that there is not."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for flag in (*FLAGS, *OTHERS):
        parser.add_argument(flag, dest=flag)
    try:
        given, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise KdError(f"kd search does not understand this: {error}") from None
    for argument in rest:
        if argument.startswith("-"):
            name = argument.partition("=")[0]
            near = did_you_mean(name, (*FLAGS, *OTHERS))
            raise KdError(f"{name} is not understood: kd search has no such limit{near}; limits: {', '.join(FLAGS)}")
        if "=" not in argument:
            raise KdError(
                f"{argument} is not understood: kd search takes GROUP=OPTION, KEY=VALUE and --max-LIMIT VALUE"
            )
    return {flag: value for flag, value in vars(given).items() if value is not None}, rest


def _amount(flag: str, text: str) -> float:
    """Read ``50k`` as 50,000. ``KdError`` for what is no number above 0."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d+))?([kMG]?)", text)
    value = float(found[1]) * 10 ** int(found[2] or 0) * UNITS.get(found[3], 1.0) if found else 0.0
    if not value > 0:
        raise KdError(f"{flag} = {text} is not allowed: it must be a number above 0, such as 0.5, 50k or 2M")
    return value


def _fixed(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that sweep nothing."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except explain.KNOWN as error:
        raise KdError(explain.explain(error, overrides)) from error
    return [o.input_line or "" for o in parsed if not o.is_sweep_override() and not o.is_hydra_override()]


def _options(
    own: Mapping[str, str],
    limits: Mapping[str, float],
    varied: Sequence[str],
    overrides: Sequence[str],
) -> list[str]:
    """Return the settings of the sweeper, and a directory for these arguments and limits."""
    found = [f"hydra.sweeper.limits={_node(limits)}", f"hydra.sweeper.n_trials={own.get('--trials', 20)}"]
    found += [f"hydra.sweeper.seed={own['--seed']}"] if "--seed" in own else []
    found += [f"hydra.sweeper.cost='{own['--cost']}'"] if "--cost" in own else []
    if not any(o.startswith("hydra.sweep.dir=") for o in overrides):
        what = sorted([*overrides, *varied, *found[:1]])
        name = OmegaConf.create({"words": what, "digest": "${kd.digest:${words}}"}).digest
        found.append(f"hydra.sweep.dir='${{paths.runs}}/search_{name}'")
    if any(name in TIMED for name in limits) and not any(o.startswith("hydra.launcher.n_jobs=") for o in overrides):
        found.append("hydra.launcher.n_jobs=1")  # what is timed must not meet what trains
    return found


def _node(limits: Mapping[str, float]) -> str:
    shown = {name: int(value) if value == int(value) else value for name, value in limits.items()}
    return "{" + ",".join(f"{name}:{value}" for name, value in shown.items()) + "}"
