"""The log of a run: what the console and ``train.log`` get. No torch."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kd.errors import KdError


class _Console(logging.StreamHandler):
    """Writes to what ``sys.stdout`` is at that moment: progress bars and tests replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    def handleError(self, log_record: logging.LogRecord) -> None:
        """Ignore a reader that went away (``| head``) and a full disk: neither stops a run or fills the terminal."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(log_record)

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


class _File(logging.FileHandler):
    """A line that does not fit on the disk is lost: the run fails where a file that counts does not fit."""

    def handleError(self, log_record: logging.LogRecord) -> None:
        """Lose the line, as the console does."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(log_record)


def start_logging(run_dir: Path | None, verbose: bool = True) -> list[logging.Handler]:
    """Log to the console (warnings alone, unless ``verbose``) and, in a ``run_dir``, to ``train.log``."""
    console = _Console()
    console.setLevel(logging.INFO if verbose else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    if run_dir is not None:
        try:
            file = _File(run_dir / "train.log", encoding="utf-8")
        except OSError as error:
            raise unwritable(error) from None
        assert file.stream is not None
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers = [file] if _is_stdout(file.stream) else [console, file]
    logger = logging.getLogger("kd")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    return handlers


def _is_stdout(stream: Any) -> bool:
    """Tell whether what is printed goes into this file already, as in the jobs of a sweep."""
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), os.fstat(stream.fileno()))
    except (OSError, ValueError, AttributeError):  # replaced by something that is no file
        return False


def unwritable(error: OSError) -> KdError:
    """Name what cannot be written, and why."""
    return KdError(f"the run directory cannot be written: {error.filename}: {error.strerror}")


@contextmanager
def logged(run_dir: Path | None, verbose: bool = True) -> Iterator[None]:
    """Log as :func:`start_logging` until the block ends; the process may be the user's own."""
    logger = logging.getLogger("kd")
    level, propagate = logger.level, logger.propagate
    handlers = start_logging(run_dir, verbose)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        for handler in handlers:
            logger.removeHandler(handler)
            with suppress(OSError):  # what a full disk has not taken
                handler.close()


def log_to_file(text: str) -> None:
    """Write a line into the run's own log only: what is to be known of a run, but not read in each."""
    _file_alone(logging.INFO, text)


def log_failure(error: Exception) -> None:
    """Write the whole traceback into the run's own log only: the console gets it, or one sentence, from the caller."""
    _file_alone(logging.ERROR, "".join(traceback.format_exception(error)))


def _file_alone(level: int, text: str) -> None:
    for handler in logging.getLogger("kd").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(logging.LogRecord("kd", level, __file__, 0, text, None, None))
