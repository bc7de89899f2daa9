"""Where the values of a config come from: the command line, and the files that Hydra composed. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from kd.config.signature import folder

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""Where the configuration files are: inside the installed package, or beside it in a checkout."""


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a.b": value}`` for every leaf of nested mappings."""
    if isinstance(node, Mapping) and node:
        return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): node}


def key_of(override: str) -> str:
    """``+loss.kd.temperature=4`` → ``loss.kd.temperature``; of a group its name, ``model@student``."""
    return override.partition("=")[0].lstrip("+~")


def command_line() -> dict[str, str]:
    """Map each key, also every leaf of a mapping, to the override that sets it; empty unless Hydra composes or runs."""
    found: dict[str, str] = {}
    for override in HydraConfig.get().overrides.task if HydraConfig.initialized() else ():
        found[key_of(override)] = override
        if "={" in override:
            value = OverridesParser.create().parse_override(override).value()
            found |= dict.fromkeys(flat(value, f"{key_of(override)}."), override)
    return found


def choices() -> dict[str, str]:
    """Group (``model@student`` is one) → the option that was chosen. Hydra leaves out groups chosen as lists."""
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


def files_with(key: str, *more: Path) -> list[Path]:
    """Find, of the files of all chosen options (and ``more``, relative to a root), those with a line ``KEY: …``."""
    chosen = [Path("train.yaml"), *more]
    chosen += [Path(group.partition("@")[0]) / f"{option}.yaml" for group, option in choices().items()]
    there = roots() if HydraConfig.initialized() else []
    return [root / file for file in chosen for root in there if spells(root / file, key)]


def spells(file: Path, key: str) -> bool:
    """Tell whether a YAML file has a line ``KEY: …``, at any depth."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return any(line.partition(":")[0].strip() == key for line in lines)
