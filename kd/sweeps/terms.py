"""Keys of a loss term belong to the jobs that have the term: ``loss=[ce],[ce,kd] loss.kd.temperature=1,4`` is three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from kd.config.composition import key_of
from kd.config.schema import Root
from kd.errors import KdError
from kd.sweeps.engine import Engine

PLAIN = tuple(f.name for f in fields(Root) if f.type in ("str", "int", "str | None", "list[str]"))  # seed, name, …


class Terms:
    """Which overrides apply to which job of a sweep, by the terms that its other overrides choose.

    ``jobs``: the overrides of every job. A key of a term that none of them has stays where it is: it is a mistake, and
    is refused when the job is composed.
    """

    def __init__(self, engine: Engine, jobs: Sequence[Sequence[str]]) -> None:
        self.engine = engine
        self.known: dict[tuple[str, ...], frozenset[str] | None] = {}
        self.somewhere: frozenset[str] = frozenset()
        if any(term_of(override) for job in jobs for override in job):
            self.somewhere = self.somewhere.union(*(self.of(job) or () for job in jobs))

    def of(self, overrides: Sequence[str]) -> frozenset[str] | None:
        """Find the terms that these overrides choose; None where they do not compose. Cached by equal choices."""
        choices = tuple(o for o in overrides if _chooses(o))
        if choices not in self.known:
            try:
                self.known[choices] = self.engine.terms(choices)
            except KdError:  # said when the job itself is composed
                self.known[choices] = None
        return self.known[choices]

    def applying(self, overrides: Sequence[str]) -> tuple[str, ...]:
        """Return the overrides without those of terms that are not chosen here, but in another job."""
        if not self.somewhere:
            return tuple(overrides)
        chosen = self.of(overrides)
        left_out = self.somewhere - chosen if chosen is not None else ()
        return tuple(o for o in overrides if term_of(o) not in left_out)


def term_of(override: str) -> str | None:
    """Return ``kd`` of ``loss.kd.temperature=4``; None for other keys."""
    section, _, rest = key_of(override).partition(".")
    return rest.partition(".")[0] if section == "loss" and rest else None


def _chooses(override: str) -> bool:
    """Tell whether an override may decide which terms there are: a group, or a term spelt out or taken away."""
    key = key_of(override)
    return (
        ("." not in key and key not in PLAIN)
        or (term_of(override) is not None and (key.endswith("._target_") or override.startswith("~")))
        or ("={" in override and key.startswith("loss."))
    )
