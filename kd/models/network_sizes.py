"""Parameters and multiply-accumulates of networks by their names, without their weights: what ``kd models`` lists."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd.config.instantiate import make
from kd.config.sizes_table import COLUMNS, MOST, TABLE
from kd.records.durable import replacing

log = logging.getLogger(__name__)

Row = dict[str, Any]


def of_timm(name: str) -> Row:
    """Count a timm network with the head and the images that its weights have, at their fixed or usual size.

    MACs of networks of up to ``MOST`` parameters; None where the forward pass cannot be done without values.
    """
    config = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        network = timm.create_model(name)
    channels, *edges = config.input_size if config is not None else (3, 224, 224)
    weights = config.tag or "yes" if config is not None and config.has_weights else ""
    classes = getattr(network, "num_classes", "") or ""
    return _counted("timm", name, network, (channels, *edges), classes) | {"weights": weights}


def of_option(name: str, node: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> Row:
    """Count a network of ``conf/model`` for images of ``shape`` and so many classes."""
    with torch.device("meta"):
        network = make(node, f"model {name}", num_classes=classes, input_shape=shape)
    return _counted("kd", name, network, shape, classes) | {"weights": ""}


def _counted(library: str, name: str, network: nn.Module, shape: tuple[int, ...], classes: Any) -> Row:
    parameters = sum(p.numel() for p in network.parameters())
    row = {"library": library, "name": name, "parameters": parameters, "macs": ""}
    row |= {"input": "x".join(map(str, shape)), "classes": classes}
    if parameters <= MOST:
        row["macs"] = _macs(network.eval().requires_grad_(False), shape)
    return row


def _macs(network: nn.Module, shape: tuple[int, ...]) -> int | str:
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *shape, device="meta"))
    except Exception as error:  # a branch on values, an operation without a form for them
        log.info("%s: no MACs (%s)", type(network).__name__, (str(error).splitlines() or [type(error).__name__])[0])
        return ""
    return counter.get_total_flops() // 2


def write(made: Mapping[tuple[str, str], Callable[[], Row]], file: Path = TABLE) -> Iterator[Row]:
    """Write the table of networks, each by what counts it; rows that the file has are kept. Yields what is new.

    A network that cannot be made is left out, with a line. The file is renewed every 25 networks and at the end.
    """
    rows: dict[tuple[str, str], Row] = {}
    if file.is_file():
        with file.open(encoding="utf-8", newline="") as there:
            rows = {(row["library"], row["name"]): dict(row) for row in csv.DictReader(there)}
    rows = {key: row for key, row in rows.items() if key in made}
    for number, key in enumerate(key for key in made if key not in rows):
        try:
            rows[key] = made[key]()
        except Exception as error:  # of any network's own code
            log.warning("%s is left out: %s", key[1], (str(error).splitlines() or [type(error).__name__])[0])
            continue
        yield rows[key]
        if number % 25 == 0:
            _save(rows, file)
    _save(rows, file)


def _save(rows: Mapping[tuple[str, str], Row], file: Path) -> None:
    ordered = sorted(rows.values(), key=lambda row: (int(row["parameters"]), row["name"]))
    with replacing(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
