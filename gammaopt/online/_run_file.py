"""A file of finished runs, one JSON line each, that loses nothing when its process is killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar

from gammaopt._errors import UsageError
from gammaopt.online.record import RunRecord


class _Record(Protocol):
    def to_json(self) -> str: ...


R = TypeVar("R", bound=_Record)


class RunFile(Generic[R]):
    """The records of a file, and where the next ones go. ``records`` are those of whole lines, in their order.

    Args:
        path: the file; it need not exist.
        read: makes a record from the JSON values of its line.
    """

    def __init__(self, path: Path, read: Callable[[dict[str, Any]], R]) -> None:
        self.path = path
        self._parse = read
        self.records = self._read()
        self._file: IO[str] | None = None

    def _read(self) -> list[R]:
        if not self.path.exists():
            return []
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"{self.path} can't be read ({error.strerror}); restore it, or choose another folder with --out"
            ) from None
        whole, _, rest = content.rpartition(b"\n")
        records = []
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                records.append(self._parse(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"{self.path} line {number} is not a run record ({type(error).__name__}); "
                    "restore the file, or choose another folder with --out"
                ) from None
        if rest:
            # The process was killed while it wrote this line: that run was not finished.
            with open(self.path, "r+b") as file:
                file.truncate(len(content) - len(rest))
        return records

    def add(self, *records: R) -> None:
        """Keep finished runs: on disk, all of them, before this returns."""
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._file.write("".join(record.to_json() + "\n" for record in records))
        self._file.flush()
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
