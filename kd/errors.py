"""The one exception that is shown to users as a sentence instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class KdError(Exception):
    """Bad input. Its message is one plain sentence: the key, the value, and what is allowed.

    ``kind``: "run" where the same run would fail again, "machine" where it may go on, "unexpected" as of other errors.
    """

    kind = "run"


class MachineFailure(KdError):
    """The machine failed, not the run: no space, a killed or stopped process. The same run may go on later."""

    kind = "machine"


def named(error: Exception, where: Path) -> Exception:
    """The sentence of an error that the operating system raised, with its path or else ``where``; others unchanged."""
    if isinstance(error, OSError) and error.errno is not None:
        return MachineFailure(f"{error.filename or where}: {error.strerror}")
    return error


def kind(error: Exception) -> str:
    """What failed, for the record: see :class:`KdError`."""
    return error.kind if isinstance(error, KdError) else "unexpected"


def of_kind(sentence: str, kind: str) -> KdError:
    """The error of another process."""
    error = KdError(sentence)
    error.kind = kind
    return error


def near(name: str, known: Iterable[str], count: int = 3) -> str:
    """``" (near: a, b)"`` for the known names that look like ``name``, or an empty string."""
    names = sorted(set(known))
    matches = get_close_matches(name, names, n=count, cutoff=0.6)
    matches += [n for n in names if n not in matches and n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return f" (near: {', '.join(matches[:count])})" if matches else ""


def yaml_problem(problem: str | None) -> str:
    """What YAML's parser complains of, in words where its own do not help."""
    return "a tab; YAML wants spaces" if "'\\t'" in (problem or "") else f"not valid YAML ({problem})"
