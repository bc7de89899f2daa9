"""The one exception that is shown to users as a sentence instead of a traceback."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

LIBRARIES = (str(Path(__file__).parent), *(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")))


class KdError(Exception):
    """Bad input. Its message is one plain sentence: the key, the value, and what is allowed.

    ``kind``: what failed, for the record: "input" where something must be put right, "run" where the same run would
    fail again, "machine" where it may go on as it is; "unexpected" for all other errors.
    """

    kind = "input"


class RunFailure(KdError):
    """The run itself failed, by numbers that are not finite: with the same weights it would fail again."""

    kind = "run"


class MachineFailure(KdError):
    """The machine failed, not the run: no space, a killed or stopped process. The same run may go on later."""

    kind = "machine"


def named(error: Exception, where: Path) -> Exception:
    """Make a sentence of an error of the operating system, with its path or else ``where``; others stay unchanged."""
    if isinstance(error, OSError) and error.errno is not None:
        return MachineFailure(f"{error.filename or where}: {error.strerror}")
    return error


def kind(error: Exception) -> str:
    """Tell what failed, for the record: see :class:`KdError`."""
    return error.kind if isinstance(error, KdError) else "unexpected"


def of_kind(sentence: str, kind: str) -> KdError:
    """Make the error of another process."""
    error = KdError(sentence)
    error.kind = kind
    return error


def counted(number: int, what: str) -> str:
    """Write a number of things: "1 row", "2 rows", "1,000 rows"."""
    return f"{number:,} {what if number == 1 else what + 's'}"


def framed(where: str, error: Exception) -> KdError:
    """Make a sentence of an error in code of the user's own: ``in loss.mine: NameError: … (mine.py:33)``.

    Named is the innermost line outside of kd and the libraries, where there is one. Raise it ``from error``, so that
    the log has the traceback.
    """
    text = str(error).strip()
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if text.startswith("Caught "):  # in a worker of a DataLoader: the text is its traceback
        frames += re.findall(r'^ *File "(.+)", line (\d+)', text, re.MULTILINE)
        text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    own = [(name, line) for name, line in frames if not name.startswith((*LIBRARIES, "<frozen"))]
    name, line = (own or frames or [("", 0)])[-1]
    first = f": {text.splitlines()[0]}" if text else ""
    place = f" ({Path(name).name}:{line})" if name else ""
    return of_kind(f"in {where}: {type(error).__name__}{first}{place}", "unexpected")


# what a paper or another program calls it: what it is called here
ALIASES = {
    **dict.fromkeys(("T", "t", "tau", "temp"), "temperature"),
    **dict.fromkeys(("alpha", "coef", "factor", "lam", "lambd", "lambda"), "weight"),
    **dict.fromkeys(("max_epochs", "n_epochs", "num_epochs"), "epochs"),
    **dict.fromkeys(("bs", "batchsize"), "batch_size"),
    "learning_rate": "lr",
    "wd": "weight_decay",
}


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """Write ``" (near: a, b)"`` for the known names that resemble ``name``, or an empty string.

    Those of the same section come first; in a section those that end alike, or by what the last part is called here
    (:data:`ALIASES`), before those spelt alike, as a whole or in their last part.
    """
    names = sorted(set(known))
    last = _last(name)
    alike = [n for n in names if _last(n) in (last, ALIASES.get(last))]
    section = name.rpartition(".")[0]
    matches = sorted(alike, key=lambda n: n.rpartition(".")[0] != section)
    matches += get_close_matches(name, names, n=count, cutoff=0.6)
    if not matches:
        ends = get_close_matches(last, {_last(n) for n in names}, n=count, cutoff=0.75)
        matches = [n for end in ends for n in names if _last(n) == end]
    matches = sorted(dict.fromkeys(matches), key=lambda n: n.partition(".")[0] != name.partition(".")[0])
    return f" (near: {', '.join(matches[:count])})" if matches else ""


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def yaml_problem(problem: str | None) -> str:
    """Say what YAML's parser complains of, in words where its own do not help."""
    return "a tab; YAML wants spaces" if "'\\t'" in (problem or "") else f"not valid YAML ({problem})"
