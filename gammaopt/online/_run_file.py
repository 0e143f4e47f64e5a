"""A file of finished runs, one JSON line each, that loses nothing when its process is killed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from gammaopt._errors import UsageError
from gammaopt.online.record import RunRecord


class _Record(Protocol):
    def to_json(self) -> str: ...


R = TypeVar("R", bound=_Record)


def read_runs(path: Path, read: Callable[[dict[str, Any]], R]) -> tuple[list[R], int]:
    """The records of a file's whole lines, and the bytes of a half-written line after them. Changes nothing.

    Raises:
        UsageError: for a file that can't be read, or a line that is no record.
    """
    if not path.exists():
        return [], 0
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} can't be read ({error.strerror}); restore it, or choose another folder with --out"
        ) from None
    whole, _, rest = content.rpartition(b"\n")
    records = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            records.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} line {number} is not a run record ({type(error).__name__}); "
                "restore the file, or choose another folder with --out"
            ) from None
    return records, len(rest)


class RunFile(Generic[R]):
    """The records of a file, and where the next ones go. ``records`` are those of whole lines, in their order.

    Args:
        path: the file; it need not exist.
        read: makes a record from the JSON values of its line.
    """

    def __init__(self, path: Path, read: Callable[[dict[str, Any]], R]) -> None:
        self.path = path
        self.records, rest = read_runs(path, read)
        self._file: io.FileIO | None = None
        if rest:
            # The process was killed while it wrote this line: that run was not finished.
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size - rest)

    def add(self, *records: R) -> None:
        """Keep finished runs: with the system, all of them, before this returns.

        A killed process loses none. A power cut may take the last ones, which are trained again: no line waits for the
        disk.

        Raises:
            UsageError: if they can't be written, e.g. on a full disk. The file is then as it was.
        """
        content = "".join(record.to_json() + "\n" for record in records).encode()
        size: int | None = None
        try:
            if self._file is None:
                self._file = io.FileIO(self.path, "a")
            size = self._file.seek(0, io.SEEK_END)
            while content:  # unbuffered: a disk that fills up takes a part, and refuses the rest
                content = content[self._file.write(content) :]
        except OSError as error:
            if self._file is not None and size is not None:
                self._file.truncate(size)
            raise UsageError(
                f"{self.path} can't be written ({error.strerror}); make room, and run the same command to go on: "
                "the finished runs are kept"
            ) from None
        self.records += records

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def by_run(records: Iterable[RunRecord]) -> dict[tuple[float, float, int], list[RunRecord]]:
    """(γ, lr, seed) → its records, one for each budget."""
    runs: dict[tuple[float, float, int], list[RunRecord]] = {}
    for record in records:
        runs.setdefault((record.gamma, record.lr, record.seed), []).append(record)
    return runs
