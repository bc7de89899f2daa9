"""Which keys a config may have: those of the schema and, below a ``_target_``, what that takes. No torch.

Hydra leaves the sections with a ``_target_`` open (:mod:`kd.config.schema`), so that no argument needs a ``+``. What
nobody takes, or belongs to an option that was not chosen, is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kd.config import composition, own_options, timm_source
from kd.config.argument_types import complaint
from kd.config.composition import LISTS, flat
from kd.config.rules import shown
from kd.config.schema import Hardware, Paths, Protocol, Recipe, Root, Student, Teacher
from kd.config.signature import arguments
from kd.errors import did_you_mean

SECTIONS = (Student, Teacher, Recipe, Hardware, Protocol, Paths)
OBJECTIVE_KEYS = ("weight", "schedule", "checkpoint", "standardise")  # of every term: not arguments of the term itself
INSTANTIATE = ("_target_", "_args_", "_convert_", "_partial_", "_recursive_")  # Hydra's own
SINGLE = ("model@student", "model@teacher", "data", "task", "recipe", "distiller", "hardware", "experiment")
# arguments of lightning.Trainer that other keys of the config set, or that would break a run's bookkeeping
OWN_TRAINER_KEYS = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "accumulate_grad_batches", "gradient_clip_val"),
    *("check_val_every_n_epoch", "val_check_interval", "num_sanity_val_steps", "fast_dev_run", "overfit_batches"),
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "deterministic", "logger", "callbacks"),
    *("default_root_dir", "enable_progress_bar", "enable_checkpointing", "barebones", "use_distributed_sampler"),
    *("sync_batchnorm", "plugins"),
)
# arguments with the keys of another library, which it checks itself: of transformers, of peft, of timm
FREE = tuple(f"{role}.model.{name}." for role in ("student", "teacher") for name in ("config", "lora", "prune"))
# nodes that are made from a _target_: how one is chosen, where a key was set and there is none
MADE = {
    "student.model": "choose a network with model@student=NAME",
    "teacher.model": "choose a network with model@teacher=NAME",
    "recipe.optimizer": "choose a recipe, or set recipe.optimizer._target_",
    "recipe.scheduler": "choose a recipe with a schedule, or set recipe.scheduler._target_",
}

# of those that recipes set, or whose key a typed target leaves below it
OPTIMIZER_KEYS = ("momentum", "dampening", "nesterov", "weight_decay", "betas", "eps")


def problems(values: Mapping[str, Any], line: Mapping[str, str], skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield one sentence for each key that there is not, or that has no effect.

    ``line``: what the command line sets (:func:`kd.config.composition.command_line`); ``skip``: sections without
    effect here.
    """
    if broken := [*_several_options(line), *own_options.outer_keys(values, line)]:  # from which the others would follow
        yield from broken
        return
    yield from _of_the_schema(values, line)
    yield from _of_the_targets(values, line, skip)
    yield from _of_the_trainer(values, line)
    yield from _below_targets(values, line, skip)
    yield from _not_chosen(values, line, skip)


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every node with a ``_target_`` and its dotted path, outer ones first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, (list, tuple)):
        for position, value in enumerate(node):
            yield from targets(value, f"{path}.{position}")


def drop_left_out(values: dict[str, Any], line: Mapping[str, str]) -> None:
    """Remove what files set of terms and loggers that were not chosen.

    ``experiment=digits_kd loss=[ce]``: the temperature of the experiment belongs to a term that the command line leaves
    out. Where the command line chooses no terms, such a node stays: whoever wrote the file forgot the term.
    """
    typed = {".".join(key.split(".")[:2]) for key in line}
    for group in (g for g in LISTS if g != "loss" or "loss" in line):
        nodes, known = values[group], composition.options(group)
        left_out = {n for n in nodes if n in known and not _made(nodes[n]) and f"{group}.{n}" not in typed}
        values[group] = {name: node for name, node in nodes.items() if name not in left_out}


def _made(node: Any) -> bool:
    """Tell whether a node makes something, or says that there is nothing to make, or that it has no value yet."""
    return node in (None, "???") or (isinstance(node, Mapping) and "_target_" in node)


def _several_options(line: Mapping[str, str]) -> Iterator[str]:
    """Yield one sentence for each group of several options: Hydra merges a list's files, so that the last one wins."""
    for group in SINGLE:
        value = line.get(group, "").partition("=")[2]
        if value.startswith("[") and len(value.strip("[] ,").split(",")) > 1:
            yield f"{group}={value} is not allowed: choose one option, of several only the last would count"


def _unknown(path: str, line: Mapping[str, str], known: Iterable[str]) -> str:
    """Say ``recipe.epocs=3: there is no option recipe.epocs (near: recipe.epochs)``, or with the file that sets it."""
    files = composition.files_with(path)
    where = next(_typed(path, line), "") or ", ".join(str(f) for f in files[:2])
    others = {key for key in known if key != path and not key.startswith(f"{path}.")}
    return f"{f'{where}: ' if where else ''}there is no option {path}{did_you_mean(path, others)}"


def _typed(path: str, line: Mapping[str, str]) -> Iterator[str]:
    """Yield the overrides that set this key, or one below it."""
    return (override for key, override in line.items() if key == path or key.startswith(f"{path}."))


def _of_the_schema(values: Mapping[str, Any], line: Mapping[str, str]) -> Iterator[str]:
    """Yield one sentence for each key that ``+foo=1`` adds and nothing reads, or that ``~data`` takes away."""
    schema = [f.name for f in fields(Root)]
    for name in values.keys() - set(schema):
        yield _unknown(name, line, schema)
    for section in SECTIONS:
        name = section.__name__.lower()
        known = [f"{name}.{f.name}" for f in fields(section)]
        for key in values.get(name) or {}:
            if f"{name}.{key}" not in known:
                yield _unknown(f"{name}.{key}", line, [*known, *flat(values)])
    for name in ("data", "task", "distiller"):
        if "_target_" not in (values.get(name) or {}):
            yield f"{name} is empty: choose one of the group's options, or give it a _target_"


def _of_the_targets(values: Mapping[str, Any], line: Mapping[str, str], skip: tuple[str, ...]) -> Iterator[str]:
    for path, node in targets(values):
        if path.partition(".")[0] in skip:
            continue
        target = node["_target_"]
        try:
            known = arguments(target)
        except LookupError as error:
            yield f"{path}._target_ = {target} cannot be found: {error}"
            continue
        names = [*known.names, *(OBJECTIVE_KEYS if path.startswith("loss.") and path.count(".") == 1 else ())]
        others = [key for key in node if key not in names and key not in INSTANTIATE]
        if path.startswith("recipe.") and path.endswith(".optimizer"):  # null of another optimiser's key is left out
            others = [key for key in others if node[key] is not None or key not in OPTIMIZER_KEYS]
        kept = [
            key for key in others if f"{path}.{key}" not in line
        ]  # of the chosen option, which a typed target keeps
        if kept and not known.any and f"{path}._target_" in line:
            yield own_options.kept(path, target, kept)
            others = [key for key in others if key not in kept]
        for key in others:
            yield from _not_an_argument(path, target, key, known.any, names, line)


def mistyped(values: Mapping[str, Any], line: Mapping[str, str], skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield one sentence for each typed value that is not of the type that its target's source tells."""
    for path, node in targets(values):
        typed = [key for key, value in node.items() if f"{path}.{key}" in line and value is not None]
        if not typed or path.partition(".")[0] in skip:
            continue
        with suppress(LookupError):  # there is no such target: that is said already
            types = arguments(node["_target_"]).types
            for key in typed:
                if words := complaint(node[key], types.get(key, "")):
                    yield f"{path}.{key} = {shown(node[key])} is not allowed: {words}"


def _not_an_argument(
    path: str, target: str, key: str, takes_any: bool, names: list[str], line: Mapping[str, str]
) -> Iterator[str]:
    where = _where(path, key, line)
    if not takes_any:
        yield f"{path}.{key} is not an argument of {target}{did_you_mean(key, names)}{where}"
    elif target in timm_source.TARGETS:
        if not timm_source.may_take(key):
            likely = did_you_mean(key, {*names, *timm_source.arguments()})
            yield f"{path}.{key} is not an argument of any network of timm{likely}{where}"
    elif close := _mistyped(f"{path}.{key}", names, line):
        typed = line[f"{path}.{key}"]
        yield f"{typed}: {target} takes any argument; if {key} is meant and not {close}, write +{typed}"


def _mistyped(path: str, names: Iterable[str], line: Mapping[str, str]) -> str:
    """Find the argument that a typed key resembles, where the target takes any; "" if a ``+`` or a file has it."""
    key = path.rpartition(".")[2]
    if line.get(path, "+").startswith("+") or composition.files_with(path):
        return ""
    return next(iter(get_close_matches(key, names, 1, cutoff=0.8)), "")


def _where(path: str, key: str, line: Mapping[str, str]) -> str:
    """Return the override that sets this key, or the configuration files that spell it, for the complaint about it."""
    if override := line.get(f"{path}.{key}"):
        return f" [command line: {override}]"
    files = composition.files_with(f"{path}.{key}")
    return f" [{', '.join(str(f) for f in files[:2])}]" if files else ""


def _of_the_trainer(values: Mapping[str, Any], line: Mapping[str, str]) -> Iterator[str]:
    node = (values.get("hardware") or {}).get("trainer") or {}
    trainer = arguments("lightning.Trainer").names if node else ()
    for key, value in node.items():
        path = f"hardware.trainer.{key}"
        if key in OWN_TRAINER_KEYS or (key, value) == ("limit_val_batches", 0):
            yield f"{path} = {value} is not allowed: the recipe, protocol and hardware sections set it"
        elif key not in trainer:
            where = _where("hardware.trainer", key, line)
            yield f"{path} is not an argument of lightning.Trainer{did_you_mean(key, trainer)}{where}"


def _below_targets(values: Mapping[str, Any], line: Mapping[str, str], skip: tuple[str, ...]) -> Iterator[str]:
    """Yield one sentence for each key as in ``data.augment.padd=3``.

    An argument that is a mapping has the keys that some configuration file spells.
    """
    every: list[Path] = []
    for path, override in line.items():
        *parents, key = path.split(".")
        nodes = [values, *_along(values, parents)]
        below = [node for node in nodes if "_target_" in node]
        if override.startswith(("+", "~")) or not below or below[-1] is nodes[-1] or parents[0] in skip:
            continue
        if (parents[0] == "loss" and parents[2:] == ["schedule"]) or path.startswith(FREE):  # without its _target_
            continue
        if len(nodes) <= len(parents) or isinstance(nodes[-1].get(key), Mapping):
            continue
        every = every or [file for root in composition.roots() for file in root.rglob("*.yaml")]
        if not any(composition.spells(file, key) for file in every):
            known = {f"{'.'.join(parents)}.{other}" for other in nodes[-1]} - {path}
            yield f"{override}: there is no option {path}{did_you_mean(path, known)}"


def _along(values: Mapping[str, Any], parts: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the mappings on the way down, as far as there are any."""
    node: Any = values
    for part in parts:
        node = node.get(part)
        if not isinstance(node, Mapping):
            return
        yield node


def _not_chosen(values: Mapping[str, Any], line: Mapping[str, str], skip: tuple[str, ...]) -> Iterator[str]:
    """Yield one sentence for each node that holds keys but no ``_target_``: what it is for was not chosen."""
    for group, kind in LISTS.items():
        for name in () if group in skip else (n for n, node in values[group].items() if not _made(node)):
            yield _option_not_chosen(group, kind, name, values[group], line)
    nodes = {f"{s}.{k}": values[s][k] for s, _, k in (path.partition(".") for path in MADE) if s not in skip}
    if "loss" not in skip:
        nodes |= {
            f"loss.{name}.schedule": node["schedule"]
            for name, node in values["loss"].items()
            if isinstance(node, Mapping) and "schedule" in node
        }
    for path, node in nodes.items():
        several = node if path == "teacher.model" and isinstance(node, (list, tuple)) else [node]
        if not all(_made(one) for one in several):
            typed = next(_typed(path, line), f"{path} = {node}")
            advice = MADE.get(path, f"say which, for example {path}._target_=kd.distill.schedules.Linear")
            yield f"{typed} cannot be set: {path} has no _target_: {advice}"


def _option_not_chosen(group: str, kind: str, name: str, nodes: Mapping[str, Any], line: Mapping[str, str]) -> str:
    path = f"{group}.{name}"
    typed = list(_typed(path, line))
    known, chosen = composition.options(group), [n for n, node in nodes.items() if n != name and _made(node)]
    list_ = f"{group}=[{','.join([*chosen, name])}]"
    if name not in known:
        where = typed[0] if typed else ", ".join(str(f) for f in composition.files_with(path)[:2]) or path
        return f"{where}: there is no option {path}{did_you_mean(path, {f'{group}.{n}' for n in (*known, *chosen)})}"
    if typed:
        return (
            f"{typed[0]} cannot be set: {name} is not among the chosen {kind} "
            f"({', '.join(chosen) or 'none'}); choose it with {list_}"
        )
    return f"{path} = {nodes[name]} has no _target_: choose it as well, for example {list_}"
