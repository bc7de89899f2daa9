"""``kd methods``: the loss terms there are, and of one its formula, its YAML, and how paper and code differ. No torch.

Everything is read from the YAML files and from the source of the terms, which is not imported.
"""

from __future__ import annotations

import argparse
import ast
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kd.cli.method_source import Module, declared, lineage, paragraphs, source
from kd.errors import KdError, did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
GOLDEN = PACKAGE.parent / "tests" / "golden"  # in a checkout only, as the next
STEPS = PACKAGE.parent / "experiments" / "benchmarks" / "methods.csv"
CASE = r"\d+|[-_][A-Za-z]?\d*"  # what may follow the name of a method in that of a golden file: kd_2, at-b
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast, where it is built
MARKS = ("<!-- kd methods --markdown -->\n", "<!-- end of kd methods -->")

KINDS = {  # folders of kd.losses, and what their methods compare
    "logits": "Answers: images, sentences, tokens, pixels",
    "tokens": "Answers of language models",
    "features": "Features of images",
    "relations": "Relations between samples",
    "dense": "Maps",
    "hidden": "Hidden states and attention of encoders and decoders",
    "other": "Of your own",
}

USAGE = """kd methods [NAME] [--markdown] [--write FILE] [--config-dir DIR]

Lists the loss terms of conf/loss, and of your own folder: what each reads, its default weight, what its training step
costs relative to kd's, whether its value and gradient are checked against numbers of a reference implementation (both
in a checkout), and the paper.

  kd methods                         all
  kd methods at                      formula, settings, and how paper and code differ
  kd methods --config-dir myconf     with those of myconf/loss
  kd methods --markdown              the same list as Markdown tables, one for each kind
  kd methods --write docs/methods.md the Markdown tables, put between their two marks in a file"""


@dataclass(frozen=True)
class Method:
    """One term of a YAML file."""

    name: str
    file: Path
    settings: dict[str, Any] = field(repr=False)

    @property
    def target(self) -> str:
        """The dotted path of the class."""
        return str(self.settings.get("_target_", ""))

    @property
    def weight(self) -> Any:
        """The default factor in the objective."""
        return self.settings.get("weight", 1.0)

    @cached_property
    def header(self) -> str:
        """The comment that opens the YAML."""
        lines = [x.lstrip("#").strip() for x in _opening(self.file)]
        return " ".join(x for x in lines if not x.startswith("@package"))

    @cached_property
    def what(self) -> str:
        """The header up to its bracket, or its first sentence."""
        return re.split(r" \(|[.;:] |\.$", self.header)[0]

    @cached_property
    def module(self) -> Module | None:
        """The source of the term; None where there is none to read."""
        return source(self.target.rpartition(".")[0])

    @cached_property
    def paper(self) -> str:
        """Authors, title, venue and year, as the module's docstring gives them; empty if it cites nothing."""
        first = (self.module.doc if self.module else "").split("\n\n")[0]
        return first.partition(": ")[2].rstrip(".") if year(first) else ""

    @cached_property
    def reads(self) -> str:
        """What the term reads of the networks and the batch."""
        name = self.target.rpartition(".")[2]
        classes = list(lineage(self.module, name)) if self.module else []
        if not classes:
            return "?"
        sides = [s for s in ("student", "teacher") if declared(classes, f"needs_{s}_logits", True)]
        taps = [self.settings.get(t, declared(classes, t, ())) for t in ("student_taps", "teacher_taps")]
        own = ast.unparse(ast.Module([c for c in classes if c.name != "Term"], []))
        found = {
            "logits": len(sides) == 2,
            f"the {''.join(sides)}'s logits": len(sides) == 1,
            "features": any(t is None or t for t in taps),
            "labels": bool(declared(classes, "needs_labels", False)),
            **{f"view {v}": True for v in declared(classes, "needs_views", ())},
            "index": bool(re.search(r"\bbatch\.index\b|\bsetup\.(size|train_index)\b", own)),
            "attention maps": bool(declared(classes, "needs_attention_maps", False)),
            "gradient of the inputs": bool(declared(classes, "needs_input_gradient", False)),
        }
        return ", ".join(word for word, true in found.items() if true)

    @property
    def kind(self) -> str:
        """The folder of ``kd.losses`` that it lies in, ``other`` for one of your own."""
        parts = self.target.split(".")
        return parts[2] if parts[:2] == ["kd", "losses"] and len(parts) > 4 else "other"

    @property
    def golden(self) -> bool | None:
        """Whether there are reference numbers; None outside a checkout."""
        if not GOLDEN.is_dir():
            return None
        return any(re.fullmatch(rf"{re.escape(self.name)}({CASE})?", f.stem) for f in GOLDEN.glob("*.npz"))


def main(argv: Sequence[str]) -> int:
    """Print the table, or one method. Returns the exit code."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    given = _parsed(argv)
    methods = collect(given.config_dir)
    if given.name:
        print(page(_named(methods, given.name)))
    elif given.write:
        _write(Path(given.write), markdown(methods))
    else:
        print(markdown(methods) if given.markdown else table(methods))
    return 0


def collect(config_dir: str | None = None) -> list[Method]:
    """List all terms of conf/loss and ``config_dir``, by name. ``KdError`` for a folder or file that cannot be read."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise KdError(f"--config-dir {config_dir} is not a folder")
    folders = [CONF, *([Path(config_dir)] if config_dir is not None else [])]
    files = {file.stem: file for folder in folders for file in (folder / "loss").glob("[!_]*.yaml")}
    methods = []
    for file in files.values():
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), LOADER) or {}
        except yaml.YAMLError as error:
            raise KdError(f"{file} is not valid YAML: {str(error).splitlines()[0]}") from None
        terms = content.items() if isinstance(content, dict) else ()
        methods += [Method(str(name), file, node) for name, node in terms if isinstance(node, dict)]
    return sorted(methods, key=lambda m: m.name)


def table(methods: Sequence[Method]) -> str:
    """Format the list as aligned text; what is longest, the paper, stands last."""
    rows = _rows(methods)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(r[:-1], widths, strict=True)), r[-1]]).rstrip()
                     for r in rows)  # fmt: skip


def markdown(methods: Sequence[Method]) -> str:
    """Format the list as Markdown tables, one for each kind, in the order of :data:`KINDS`."""
    parts = []
    for kind, title in KINDS.items():
        if not (some := [m for m in methods if m.kind == kind]):
            continue
        head, *rows = _rows(some)
        lines = [head, ["---"] * len(head), *([f"`{row[0]}`", *row[1:]] for row in rows)]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(c.replace('|', '‖') for c in line)} |" for line in lines)]
    return "\n\n".join(parts)


def page(method: Method) -> str:
    """Say what there is to know of one method."""
    module = method.module
    lines = [f"{method.name}: {method.header}", "", f"reads {method.reads}"]
    differences = []
    if module is not None:
        lines += [module.doc, f"{method.target} in {module.path}"]
        for function in module.functions():
            about = [bool(re.search(r"\b(paper|code|variant)\b", p)) for p in function.paragraphs]
            about[:1] = [False][: len(about)]  # the first says what the function is
            told = [p for p, other in zip(function.paragraphs, about, strict=True) if not other]
            differences += [p for p, other in zip(function.paragraphs, about, strict=True) if other]
            lines += ["", function.call, *_indented(told)]
        term = module.definition(method.target.rpartition(".")[2])
        own = paragraphs(term) if term is not None else []
        differences += [p for p in own[1:] if re.search(r"\b(paper|code)\b", p)]
    lines += ["", "Paper and code", *_indented(differences or ["The source names no difference."])]
    return "\n".join([*lines, "", str(method.file), "", method.file.read_text(encoding="utf-8").rstrip()])


def year(text: str) -> str:
    """Find the last year that a citation gives; empty if it gives none.

    Numbers of arXiv have a point and do not count.
    """
    return next(reversed(re.findall(r"(?<![\d.])(?:19|20)\d\d(?![\d.]\d)", text)), "")


def _rows(methods: Sequence[Method]) -> list[list[str]]:
    golden, steps = any(m.golden is not None for m in methods), _steps()
    columns = ["name", "what", "reads", "weight"]
    columns += [*(["step"] if steps else []), *(["golden"] if golden else []), "paper"]
    rows = []
    for m in methods:
        checked = [steps.get(m.name) or "-"] if steps else []
        checked += [("yes" if m.golden else "no")] if golden else []
        rows.append([m.name, m.what, m.reads, f"{m.weight:g}" if isinstance(m.weight, (int, float)) else str(m.weight),
                     *checked, m.paper])  # fmt: skip
    return [columns, *rows]


def _steps() -> dict[str, str]:
    """Read what a training step with each term costs relative to kd's, as it was measured; empty outside a checkout."""
    if not STEPS.is_file():
        return {}
    with STEPS.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row["ratio"] for row in csv.DictReader(file)}


def _indented(parts: Sequence[str]) -> list[str]:
    return ["\n\n".join("\n".join(f"    {line}" for line in part.splitlines()) for part in parts)]


def _opening(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield line


def _named(methods: Sequence[Method], name: str) -> Method:
    found = [m for m in methods if m.name == name]
    if not found:
        names = [m.name for m in methods]
        raise KdError(f"there is no method {name}{did_you_mean(name, names)}; methods: {', '.join(names)}")
    return found[0]


def _write(file: Path, text: str) -> None:
    try:
        before, rest = file.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
    except (OSError, ValueError, IndexError):
        raise KdError(f"--write {file}: a file with the lines {' and '.join(m.strip() for m in MARKS)} once") from None
    file.write_text(f"{before}{MARKS[0]}\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kd methods", add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--write")
    parser.add_argument("--config-dir", "-cd")
    try:
        given, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise KdError(f"kd methods does not understand this: {error}") from None
    if rest:
        raise KdError(f"{rest[0]} is not understood: kd methods takes one NAME, --markdown, --write and --config-dir")
    return given
