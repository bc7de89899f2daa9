"""``kd models``: networks by size, ours and timm's, with what they need and which of them have trained weights."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from kd.config import timm_source
from kd.config.composition import CONF
from kd.config.sizes_table import MOST, read
from kd.errors import KdError, counted, did_you_mean

DEFAULT = "5M"
UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000}
SHAPES = {"mlp_800": ((1, 28, 28), 10), "mlp_1200": ((1, 28, 28), 10), "mlp": ((1, 8, 8), 10)}  # others: CIFAR-100's
SHAPES["mlp_teacher"] = SHAPES["mlp"]
OPEN = ("timm_model", "timm_unet", "transformers_model")  # factories that make any network of a library

USAGE = f"""kd models [NAME-PART] [--max-params {DEFAULT}] [--min-params N] [--pretrained] [--write]

Lists networks by their number of parameters: those of conf/model, and timm's. Parameters and MACs (multiply-accumulates
of one image) are those of the shown size of the images and number of classes; other classes change the last layer.
MACs are counted up to {MOST // 1_000_000}M parameters, and blank above.

  kd models                              up to {DEFAULT} parameters
  kd models mobilenet --max-params 10M   names with this part; K, M and G are thousands, millions and billions
  kd models --pretrained                 those with trained weights: student.model.pretrained=true
  kd models --write                      count what the table lacks, after an update of timm (minutes)"""


def main(argv: Sequence[str]) -> int:
    """Print the table. Returns the exit code."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    given = _parsed(argv)
    if given.write:
        return _write()
    least, most = (_number(key, getattr(given, f"{key}_params")) for key in ("min", "max"))
    if least > most:
        over = f"it is more than --max-params {given.max_params}"
        raise KdError(f"--min-params {given.min_params} is not allowed: {over}")
    rows = [row for row in read() if row["library"] == "kd" or row["name"] in timm_source.networks()]
    named = [row for row in rows if (given.part or "").lower() in row["name"].lower()]
    if not named:
        raise KdError(f"no network has {given.part} in its name{did_you_mean(given.part, [r['name'] for r in rows])}")
    chosen = [row for row in named if least <= int(row["parameters"]) <= most]
    chosen = [row for row in chosen if row["weights"]] if given.pretrained else chosen
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    if chosen:
        console.print(_table(chosen))
    larger = sum(int(row["parameters"]) > most for row in named)
    more = f"; {larger} have more than {given.max_params} parameters" if larger else ""
    print(f"{counted(len(chosen), 'network')}{more}")
    if blank := sum(not row["macs"] for row in chosen):
        print(f"{counted(blank, 'network')} without MACs: they are counted up to {MOST // 1_000_000}M parameters")
    if chosen:
        print("choose one with model@student=NAME, of timm with model@student=timm student.model.name=NAME")
    return 0


def _table(rows: Sequence[dict[str, str]]) -> Table:
    table = Table()
    for name, side in (("network", "left"), ("of", "left"), ("parameters", "right"), ("MACs", "right")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for name in ("image", "classes", "trained weights"):
        table.add_column(name)
    for row in rows:
        macs = f"{int(row['macs']):,}" if row["macs"] else ""
        numbers = (f"{int(row['parameters']):,}", macs)
        table.add_row(row["name"], row["library"], *numbers, row["input"], row["classes"], row["weights"])
    return table


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("kd models", usage=USAGE, add_help=False, exit_on_error=False)
    parser.add_argument("part", nargs="?", default="")
    parser.add_argument("--max-params", default=None)
    parser.add_argument("--min-params", default="0")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--write", action="store_true")
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise KdError(f"kd models: {error}") from None
    if unknown:
        options = ("--max-params", "--min-params", "--pretrained", "--write")
        raise KdError(f"{unknown[0]} is not an option of kd models{did_you_mean(unknown[0], options)}")
    if given.max_params is None:
        given.max_params = DEFAULT if given.min_params == "0" else "1000G"  # all that are larger
    return given


def _number(key: str, text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGkmg]?)", text)
    if found is None:
        raise KdError(f"--{key}-params {text} is not allowed: it must be a number, such as 500000, 500K or 1.5M")
    return float(found[1]) * UNITS[found[2].upper()]


def _write() -> int:
    """Count what the table lacks, in the installed timm."""
    import timm

    from kd.models import network_sizes  # start-up: torch

    made: dict[tuple[str, str], Callable[[], Any]] = {}
    for file in sorted((CONF / "model").glob("*.yaml")):
        node = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("model") or {}
        target = str(node.get("_target_", ""))
        if target.startswith("kd.models.") and not target.endswith(OPEN):
            shape, classes = SHAPES.get(file.stem, ((3, 32, 32), 100))
            made["kd", file.stem] = partial(network_sizes.of_option, file.stem, node, shape, classes)
    made |= {("timm", name): partial(network_sizes.of_timm, name) for name in timm.list_models()}
    for row in network_sizes.write(made):
        print(f"{row['name']}  {row['parameters']:,}", flush=True)
    return 0
