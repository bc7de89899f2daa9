"""Hydra's complaints, said in one plain sentence that names the key, the value, the file and what is near."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.config import CONF, flat
from kd.errors import near, yaml_problem

EXTRAS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}  # launchers that come with an extra
KNOWN = (HydraException, OmegaConfBaseException, yaml.YAMLError)
"""The exceptions that :func:`explain` can say in a sentence."""


def explain(error: Exception, overrides: Sequence[str] = (), config: str = "train") -> str:
    """One sentence for an exception that Hydra, OmegaConf or the YAML reader raised while composing."""
    text = str(error)
    cause = str(error.__cause__ or "")
    if isinstance(error, MissingConfigException):
        return _missing_file(text)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {yaml_problem(error.problem)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read as KEY=VALUE: close every bracket, leave out spaces, and quote a value "
            "that holds spaces, commas or = signs twice, for example KEY=\"'a b'\""
        )
    found = re.search(r"In '([^']+)': \w+ raised while composing config:\n(.*)", text, re.DOTALL)
    if found:
        return f"{found[1]}.yaml: {_key_or_value(found[2], overrides, config)}"
    found = re.search(r"Could not override '([^']+)'", text)
    if found:
        return _not_an_option(found[1], text, cause, overrides, config)
    found = re.search(r"Error merging override (.+)", text)
    if found:
        return f"{found[1]} is not allowed: {_lower(cause.splitlines()[0]) if cause else 'wrong type'}"
    found = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if found:
        return f"{found[1]} has several values: add -m to run each of them, or write a list as KEY=[a,b]"
    return " ".join(line.strip() for line in (text or repr(error)).splitlines()[:2])


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _missing_file(text: str) -> str:
    """``data=digitz``: the option, the group's options that look like it, and all of them when they are few."""
    found = re.search(r"In '([^']+)': Could not (?:find|load) '([^']+)'", text)
    if not found:
        return text.splitlines()[0]
    group, _, option = found[2].rpartition("/")
    folders = [CONF / group, *(Path(root) / group for root in re.findall(r"path=file://(\S+)", text))]
    options = sorted({f.stem for d in folders if d.is_dir() for f in d.glob("*.yaml") if not f.name.startswith("_")})
    if not group:
        return f"there is no configuration file {found[2]}.yaml"
    if not options:
        return f"{group}={option} does not exist: there is no group {group}"
    if group == "hydra/launcher" and option in EXTRAS:
        return f"{group}={option} needs a package that is not installed: pip install 'kd[{EXTRAS[option]}]'"
    hint = near(option, options)
    return f"{group}={option} does not exist{hint}; options of {group}: {', '.join(options)}"


def known_keys(overrides: Sequence[str], config: str) -> list[str]:
    """The keys of the composed config, with as many of the overrides (the groups, above all) as compose."""
    running = GlobalHydra.instance().hydra  # of a sweep, which composes its jobs
    for attempt in ([o for o in overrides if "." not in o.split("=")[0]], []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose(config, overrides=list(attempt))
        except Exception:
            continue
        finally:
            GlobalHydra.instance().hydra = running
        keys = list(flat(OmegaConf.to_container(cfg, resolve=False)))
        parents = {".".join(key.split(".")[:n]) for key in keys for n in range(1, key.count(".") + 1)}
        return sorted({*keys, *parents})
    return []


def _not_an_option(key: str, text: str, cause: str, overrides: Sequence[str], config: str) -> str:
    source = re.search(r"In '([^']+)':", text)
    where = f"{source[1]}.yaml: " if source else ""
    groups = re.search(r"override one of (.+?)\??\n", text)
    if groups:
        choices = [g.strip() for g in groups[1].rstrip("?").split(",")]
        return f"{where}{key} is not a group here: write {' or '.join(choices)}"
    parts = key.split(".")
    if parts[0] == "loss" and len(parts) > 2:
        chosen = {k.split(".")[1] for k in known_keys(overrides, config) if k.startswith("loss.")}
        if parts[1] not in chosen:
            return (
                f"{where}{key} cannot be set: {parts[1]} is not among the chosen loss terms "
                f"({', '.join(sorted(chosen))}); choose it with loss=[{','.join([*sorted(chosen), parts[1]])}]"
            )
    names = [g.name for g in CONF.iterdir() if g.is_dir()]
    keys = known_keys(overrides, config)
    given = key
    deeper = re.search(r"full_key: (\S+)", cause)  # a mapping was given, and the mistake is inside it
    if deeper and deeper[1].startswith(f"{key}."):
        key = deeper[1]
    given = next((o for o in overrides if o.split("=")[0] in (key, given)), key)
    return f"{where}{given}: there is no option {key}{near(key, {*keys, *names})}"


def _key_or_value(text: str, overrides: Sequence[str], config: str) -> str:
    full_key = re.search(r"full_key: (\S+)", text)
    first = text.splitlines()[0]
    if full_key and re.match(r"Key '.*' (is )?not in", first):
        return f"there is no option {full_key[1]}{near(full_key[1], known_keys((), config))}"
    return f"{full_key[1]}: {_lower(first)}" if full_key else first
