"""Render sections of text, tables and pictures as one HTML page that needs no other file, and in Markdown. No torch."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kd.report.tables import Grid

SPREAD = re.compile(r"([−\d.,]+) (± [\d.,]+(?: \(n = \d+\))?|\[.*\])")


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    path: Path
    caption: str

    @property
    def file(self) -> str:
        """Return its name."""
        return self.path.name

    @property
    def data(self) -> str:
        """Return the picture itself as an address."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()

    @property
    def width(self) -> int:
        """Return its width on the page in pixels: it is drawn at twice as many."""
        return int.from_bytes(self.path.read_bytes()[16:20], "big") * 9 // 16


@dataclass
class Section:
    """A part of the page: text, tables, small print, pictures, points, in this order."""

    title: str
    before: list[str] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    points: list[str] = field(default_factory=list)


HOW: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}


def render(context: Mapping[str, Any]) -> dict[str, str]:
    """Return ``{"md": …, "html": …}`` of name, question, paper, claim, verdict and sections."""
    plain = jinja2.Environment(
        loader=jinja2.PackageLoader("kd.report", ""), autoescape=False, keep_trailing_newline=True, **HOW
    )
    plain.filters["markdown"] = markdown
    return {"html": html("report", context), "md": plain.get_template("report.md.j2").render(context)}


def html(name: str, context: Mapping[str, Any], package: str = "kd.report") -> str:
    """Render ``NAME.html.j2`` of a package, which may extend ``base.html.j2`` of this one; all text is escaped."""
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(where, "") for where in dict.fromkeys((package, "kd.report"))])
    page = jinja2.Environment(loader=loader, autoescape=True, **HOW)
    page.filters |= {"spread": spread, "unbroken": unbroken}
    return page.get_template(f"{name}.html.j2").render(context)


def spread(cell: str) -> str | Markup:
    """Set what follows a number in small print: ``97.47 ± 0.51``, ``70 [69, 71]``."""
    found = SPREAD.fullmatch(cell)
    return Markup('{}<span class="spread"> {}</span>').format(*found.groups()) if found else cell


def unbroken(cell: str) -> Markup:
    """Let the head of a column break between words, not at the hyphens of ``top-1``."""
    words = (
        Markup('<span class="unbroken">{}</span>' if "-" in word else "{}").format(word) for word in cell.split(" ")
    )
    return Markup(" ").join(words)


def markdown(grid: Grid) -> str:
    """Write a table in Markdown; rows that are set off are bold."""
    lines = [
        _line(grid.head),
        "|" + "|".join(" :-- " if i < grid.text else " --: " for i in range(len(grid.head))) + "|",
    ]
    for position, row in enumerate(grid.rows):
        lines.append(_line([f"**{cell}**" if cell else cell for cell in row] if position in grid.strong else row))
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
