"""Turn Hydra's complaints into one sentence that names the key, the value, the file and similar names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.config import composition, timm_source
from kd.config.composition import CONF
from kd.config.keys import targets
from kd.config.signature import arguments
from kd.errors import ALIASES, did_you_mean, yaml_problem

EXTRAS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}  # launchers that come with an extra
KNOWN = (HydraException, OmegaConfBaseException, yaml.YAMLError)
"""The exceptions that :func:`explain` can say in a sentence."""
COMPOSING = (*KNOWN, ValueError, AssertionError)
"""The same while a config is composed and nothing else runs: Hydra and OmegaConf raise these two for some overrides."""


def explain(error: Exception, overrides: Sequence[str] = (), search: Sequence[str] = ()) -> str:
    """Write one sentence for an exception that Hydra, OmegaConf or the YAML reader raised while composing.

    ``search``: where configuration files are beside the package's own, as in ``hydra.searchpath``.
    """
    text = str(error)
    cause = str(error.__cause__ or "")
    if isinstance(error, MissingConfigException):
        return _missing_file(text, overrides)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {yaml_problem(error.problem)}"
    if isinstance(error, OverrideParseException):
        if not (error.override or "").isascii():
            return (
                f"{error.override} cannot be read as KEY=VALUE: quote a value with letters outside of ASCII twice, for "
                "example KEY='\"Größe\"'"
            )
        return (
            f"{error.override} cannot be read as KEY=VALUE: close every bracket, leave out spaces, and quote a value "
            "that holds spaces, commas or = signs twice, for example KEY=\"'a b'\""
        )
    found = re.search(r"In '([^']+)': \w+ raised while composing config:\n(.*)", text, re.DOTALL)
    if found:
        return f"{found[1]}.yaml: {_key_or_value(found[2], search)}"
    found = re.search(r"Could not override '([^']+)'", text)
    if found:
        return _not_an_option(found[1], text, cause, overrides, search)
    found = re.search(r"Error merging override (.+)", text)
    if found and (network := re.fullmatch(r"\+*(student|teacher)=(.+)", found[1])):
        role, value = network.groups()
        return f"{found[1]} is not allowed, {role} is a section: write {_network(role, value, search)}"
    if found and found[1].startswith("~") and "interpolation" in text + cause:  # Hydra reads what it deletes
        key = found[1][1:].partition("=")[0]
        return f"{found[1]} is not allowed, its value depends on another key: write {key}=null"
    if found:
        return f"{found[1]} is not allowed: {_lower(cause.splitlines()[0]) if cause else 'wrong type'}"
    found = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if found:
        return f"{found[1]} has several values: add -m to run each of them, or write a list as KEY=[a,b]"
    if text.startswith("Config group override must be a string or a list"):  # data=7, loss=null
        groups = [o for o in overrides if re.fullmatch(r"[\w@/]+=([-+\d.]+|null|true|false)", o)]
        typed = [o for o in groups if (CONF / o.partition("=")[0].partition("@")[0]).is_dir()]
        return f"{' or '.join(typed or groups)} is not allowed: a group takes the name of an option, or [a,list]"
    if isinstance(error, (ValueError, AssertionError)):  # student.model.hidden.x=3, where hidden is a list
        deep = " or ".join(o for o in overrides if "." in o.partition("=")[0]) or "the config"
        return f"{deep} cannot be set: {_lower(text)}"
    return " ".join(line.strip() for line in (text or repr(error)).splitlines()[:2])


def _network(role: str, value: str, search: Sequence[str]) -> str:
    """Say what a network's name, or else a place of weights, is to be given as."""
    if value in composition.options("model", _roots(search)):
        return f"model@{role}={value}"
    return f"{role}.checkpoint={value} for its weights, or model@{role}=NAME for a network"


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _missing_file(text: str, overrides: Sequence[str]) -> str:
    """Explain ``data=digitz``: the option, the group's options that look like it, and all of them when they are few."""
    found = re.search(r"In '([^']+)': Could not (?:find|load) '([^']+)'", text)
    if not found:
        return text.splitlines()[0]
    group, _, option = found[2].rpartition("/")
    there = [CONF, *(Path(root) for root in re.findall(r"path=file://(.+)", text))]
    options = composition.options(group, there)
    if not group:
        return f"there is no configuration file {found[2]}.yaml"
    if not options:
        return f"{group}={option} does not exist: there is no group {group}"
    if group == "hydra/launcher" and option in EXTRAS:
        return f"{group}={option} needs a package that is not installed: pip install 'kd[{EXTRAS[option]}]'"
    hint = did_you_mean(option, options)
    if group == "model" and (of_timm := _network_of_timm(option, overrides)):
        return of_timm
    return f"{group}={option} does not exist{hint}; options of {group}: {', '.join(options)}"


def _network_of_timm(option: str, overrides: Sequence[str]) -> str:
    """Explain ``model@student=lcnet_035``: there is no such file, but timm has the network."""
    if option.partition(".")[0] not in timm_source.networks():
        return ""
    typed = [g for o in overrides for g in [o.partition("=")[0].lstrip("+")] if o.partition("=")[2] == option]
    role = typed[0].partition("@")[2] if typed else ""
    groups = [f"model@{r}=timm {r}.model.name={option}" for r in ([role] if role else ["student", "teacher"])]
    return f"{(typed or ['model'])[0]}={option} does not exist, but timm has that network: {' or '.join(groups)}"


def known_keys(overrides: Sequence[str], search: Sequence[str]) -> list[str]:
    """List the keys of the config that the overridden groups compose to, and the arguments of its targets."""
    running = GlobalHydra.instance().hydra  # of a sweep, which composes its jobs
    groups = [o for o in overrides if composition.key_of(o).partition("@")[0] in _groups(search)]
    for attempt in (groups, []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("train", overrides=[*attempt, *searched(search)])
        except Exception:
            continue
        finally:
            GlobalHydra.instance().hydra = running
        values = composition.flat(OmegaConf.to_container(cfg, resolve=False))
        own = {k.rpartition(".")[2] for k, v in values.items() if not str(v).startswith("${")}
        # data.batch_size is ${recipe.batch_size}: only the latter is to be set
        derived = {k for k, v in values.items() if str(v).startswith("${") and k.rpartition(".")[2] in own}
        keys = {*values, *(f"{path}.{name}" for path, name in _arguments(cfg))} - derived
        parents = {".".join(key.split(".")[:n]) for key in keys for n in range(1, key.count(".") + 1)}
        return sorted({*keys, *parents})
    return []


def _groups(search: Sequence[str]) -> set[str]:
    roots = [root for root in _roots(search) if root.is_dir()]
    return {folder.name for root in roots for folder in root.iterdir() if folder.is_dir()}


def _roots(search: Sequence[str]) -> list[Path]:
    return [CONF, *(Path(place.removeprefix("file://")) for place in search)]


def _arguments(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield path and name of every argument that a ``_target_`` takes, also of those that no file lists."""
    for path, node in targets(OmegaConf.to_container(cfg, resolve=False)):
        with contextlib.suppress(LookupError):
            yield from ((path, name) for name in arguments(node["_target_"]).names)


def searched(search: Sequence[str]) -> list[str]:
    """Return the override that adds places of configuration files, such as ``file:///home/me/conf``."""
    quoted = ",".join("'" + place.replace("'", r"\'") + "'" for place in dict.fromkeys(search))
    return [f"hydra.searchpath=[{quoted}]"] if search else []


def _not_an_option(key: str, text: str, cause: str, overrides: Sequence[str], search: Sequence[str]) -> str:
    source = re.search(r"In '([^']+)':", text)
    where = f"{source[1]}.yaml: " if source else ""
    groups = re.search(r"override one of (.+?)\??\n", text)
    if groups:
        choices = [g.strip() for g in groups[1].rstrip("?").split(",")]
        return f"{where}{key} is not a group here: write {' or '.join(choices)}"
    keys = known_keys(overrides, search)
    given = key
    deeper = re.search(r"full_key: (\S+)", cause)  # a mapping was given, and the mistake is inside it
    if deeper and deeper[1].startswith(f"{key}."):
        key = deeper[1]
    given = next((o for o in overrides if o.split("=")[0] in (key, given)), key)
    hint = _of_other_terms(key, keys, overrides, search) or did_you_mean(key, {*keys, *_groups(search)})
    return f"{where}{given}: there is no option {key}{hint}"


def _of_other_terms(key: str, keys: Sequence[str], overrides: Sequence[str], search: Sequence[str]) -> str:
    """Explain ``temperature=4`` without the term ``kd``: the term that has such a key, and how it is chosen.

    "" if a chosen term has it. ``keys``: those that there are, of the chosen terms.
    """
    last = key.rpartition(".")[2]
    wanted = {last, ALIASES.get(last, last)}
    if any(k.rpartition(".")[2] in wanted for k in keys):
        return ""
    terms = composition.options("loss", _roots(search))
    others = [o for o in overrides if composition.key_of(o) != "loss"]
    found = [k for k in known_keys([*others, f"loss=[{','.join(terms)}]"], search) if k.startswith("loss.")]
    found = sorted((k for k in found if k.rpartition(".")[2] in wanted), key=len)  # the plain method has a short name
    chosen = [term for term in terms if f"loss.{term}" in keys]
    named = [f"{k} with loss=[{','.join([*chosen, k.split('.')[1]])}]" for k in found]
    return f" (near: {', '.join(named[:3])})" if named else ""


def _key_or_value(text: str, search: Sequence[str]) -> str:
    full_key = re.search(r"full_key: (\S+)", text)
    first = text.splitlines()[0]
    if full_key and re.match(r"Key '.*' (is )?not in", first):
        return f"there is no option {full_key[1]}{did_you_mean(full_key[1], known_keys((), search))}"
    return f"{full_key[1]}: {_lower(first)}" if full_key else first
