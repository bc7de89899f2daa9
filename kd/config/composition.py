"""Where the values of a config come from: the command line, and the files that Hydra composed. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from kd.config.signature import folder

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""Where the configuration files are: inside the installed package, or beside it in a checkout."""

LISTS = {"loss": "loss terms", "logger": "loggers", "callbacks": "callbacks"}
"""Groups of which several options may be chosen, and what they are."""


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return ``{"a.b": value}`` for every leaf of nested mappings."""
    if isinstance(node, Mapping) and node:
        return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): node}


def key_of(override: str) -> str:
    """Return the key: ``+loss.kd.temperature=4`` → ``loss.kd.temperature``; of a group its name, ``model@student``."""
    return override.partition("=")[0].lstrip("+~")


def command_line() -> dict[str, str]:
    """Map each key, also every leaf of a mapping, to the override that sets it; empty unless Hydra composes or runs."""
    found: dict[str, str] = {}
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for override in typed(given):
        found[key_of(override)] = override
        if "={" in override:
            value = OverridesParser.create().parse_override(override).value()
            found |= dict.fromkeys(flat(value, f"{key_of(override)}."), override)
    return found


def typed(overrides: Any) -> list[str]:
    """Return overrides as they were typed: reading Hydra's list would put what it says in the place of ``${…}``."""
    given: Any = OmegaConf.to_container(overrides, resolve=False) if OmegaConf.is_list(overrides) else overrides
    return list(given)


def choices() -> dict[str, str]:
    """Map each group (``model@student`` is one) to the option chosen. Hydra leaves out groups chosen as lists."""
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {group: str(option) for group, option in chosen.items() if option is not None}


def roots() -> list[Path]:
    """List the folders of configuration files: the package's, those of ``--config-dir`` and ``hydra.searchpath``."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else ()
    found = [Path(s.path) if s.schema == "file" else folder(s.path) for s in sources if s.schema in ("file", "pkg")]
    return list(dict.fromkeys([CONF, *(root for root in found if root is not None)]))


def options(group: str, folders: list[Path] | None = None) -> list[str]:
    """Return the options of a group in these folders, all of :func:`roots` by default."""
    files = (f for root in folders or roots() for f in (root / group).glob("*.yaml"))
    return sorted({f.stem for f in files if not f.name.startswith("_")})


def files_with(path: str) -> list[Path]:
    """Find, of the files of all chosen options, those that set the key with this dotted path.

    Hydra does not list the options of groups chosen as lists: ``loss.kd.weight`` is looked for in ``loss/kd.yaml``.
    """
    listed, name, *_ = [*path.split("."), ""]
    files = [("train.yaml", ""), (f"{listed}/{name}.yaml", listed)]
    for group, option in choices().items():
        folder_, _, package = group.partition("@")
        files.append((f"{folder_}/{option}.yaml", package or folder_.replace("/", ".")))
    there = [
        (root / file, package) for file, package in files for root in (roots() if HydraConfig.initialized() else [])
    ]
    return list(dict.fromkeys(found for file, package in there for found in _setting(file, package, path.split("."))))


def _setting(file: Path, package: str, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the file, and those of its own group in its defaults list, that set a key; ``package``: of its content."""
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    if header := re.match(r"#\s*@package\s+(\S+)", text):
        package = {"_global_": "", "_group_": package}.get(header[1], header[1])
    try:
        node = yaml.safe_load(text)
    except yaml.YAMLError:
        return
    node = node if isinstance(node, Mapping) else {}
    for other in node.get("defaults") or ():
        if isinstance(other, str) and other != "_self_":
            yield from _setting(file.parent / f"{other}.yaml", package, parts)
    above = package.split(".") if package else []
    inner: Any = {k: v for k, v in node.items() if k != "defaults"} if list(parts[: len(above)]) == above else {}
    for part in parts[len(above) :]:
        if not isinstance(inner, Mapping) or part not in inner:
            return
        inner = inner[part]
    if len(parts) > len(above):
        yield file


def spells(file: Path, key: str) -> bool:
    """Tell whether a YAML file has a line ``KEY: …``, at any depth."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return any(line.partition(":")[0].strip() == key for line in lines)
