"""Files that survive a kill: written whole or not at all, and folders that one process works in at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gammaopt._errors import UsageError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by a file with ``content``, text in UTF-8, whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_for_user(path: Path, content: str | bytes, fix: str = "make room, and run the same command to go on") -> None:
    """:func:`write_atomically`, where it is the user who can make it possible: ``fix`` says how.

    Raises:
        UsageError: if it can't be written, e.g. on a full disk. What was there stays.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UsageError(f"{path} can't be written ({error.strerror}); {fix}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def locked(path: Path, name: str = "lock", *, wait: bool = False) -> Iterator[None]:
    """Make the folder and hold its file ``name`` for this process, and thereby what that stands for.

    Raises:
        UsageError: if it can't be written, or another process holds it, unless this is to ``wait``.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / name, "a", encoding="utf-8")  # noqa: SIM115 - held until the work stops
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}; choose another folder with --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UsageError(
                f"{path} is in use by another process; wait for it, or choose another folder with --out"
            ) from None
        yield
