"""Files that are there whole or not at all, also after a power failure. No torch."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kd.errors import MachineFailure

_UMASK = os.umask(0o022)  # it can only be read by setting it
os.umask(_UMASK)


@contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what was written there is flushed to the disk and takes the name.

    Where it cannot be written, ``path`` stays as it was, and a ``MachineFailure`` names it. The temporary file is
    ``.NAME.tmp``, with ``mark`` before its ending, for files that several processes may write.
    """
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush_directory(path.parent)
    except (OSError, RuntimeError) as error:
        _remove(temporary)
        if isinstance(error, RuntimeError) and not _of_writing(error):
            raise
        raise MachineFailure(f"{path} cannot be written: {_reason(path, error)}") from error
    except BaseException:
        _remove(temporary)
        raise


def mark() -> str:
    """Return what tells the temporary files of this process from those of others: machine, process, six digits."""
    return f"{socket.gethostname()}.{os.getpid()}.{os.urandom(3).hex()}"


def share(path: Path) -> None:
    """Give a file the mode that the umask allows, as ``open`` does: safetensors writes for the owner alone."""
    with suppress(OSError):  # of file systems that keep no modes: what was written is whole all the same
        path.chmod(0o666 & ~_UMASK)


def _of_writing(error: RuntimeError) -> bool:
    """Tell whether it is an error of writing: ``torch.save`` makes a RuntimeError of an OSError, and has its own."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) or "inline_container" in str(found) or "PytorchStreamWriter" in str(found):
            return True
        found = found.__cause__ or found.__context__
    return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_directory(directory: Path) -> None:
    """Flush the new name as well; some file systems cannot, and do it by themselves."""
    try:
        _flush(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise


def _remove(temporary: Path) -> None:
    """Make room again; an error here would hide the first one."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError:
        return


def _reason(path: Path, error: BaseException) -> str:
    if not path.parent.is_dir():
        return f"there is no directory {path.parent} any more"
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return (found.strerror if isinstance(found, OSError) else None) or str(found or error).splitlines()[0]
