"""Arrays made once and kept: what can't be mapped as it is becomes an ``.npy`` file in a cache folder.

Its name has a digest of its source's place and fingerprint, so several data sets can share a folder, and one that has
changed gets a new file. An array is written under another name and moved to its own when it is whole, then entered in
``manifest.json``. One that is not in the manifest is made; processes that want the same one wait for the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gammaopt._errors import UsageError
from gammaopt._files import write_atomically
from gammaopt.online.streams._mapped import Array, Member, members

MANIFEST = "manifest.json"
PARTIAL = ".partial"


class Converted(NamedTuple):
    """How far a conversion is."""

    what: str
    done: int
    total: int


OnConvert = Callable[[Converted], object]


class Lines:
    """A line on stderr for each tenth of a large conversion, and one at the end of any."""

    LARGE = 256 * 2**20  # bytes

    def __init__(self) -> None:
        self._said: tuple[str, int] | None = None

    def __call__(self, progress: Converted) -> None:
        """Say how far it is, unless that was said already."""
        done = (progress.what, 10 * progress.done // max(1, progress.total))
        if done != self._said and (done[1] == 10 or progress.total >= self.LARGE):
            print(f"{progress.what}: {progress.done / 1e6:,.1f} of {progress.total / 1e6:,.1f} MB", file=sys.stderr)
            self._said = done


def fingerprint(member: Member) -> str:
    """Of the file that an array is in: another one where the file was changed."""
    stat = member.path.stat()
    return f"{member.path.name}:{member.name} {stat.st_size} {stat.st_mtime_ns}"


class Cache:
    """A folder of arrays and its manifest.

    Args:
        folder: made when the first array is.
        on_progress: told how far each conversion is; lines on stderr if ``None``.
    """

    def __init__(self, folder: Path, on_progress: OnConvert | None = None) -> None:
        self.folder, self.on_progress = folder, on_progress or Lines()

    def member(self, member: Member) -> Array:
        """The array of a file: mapped in place where it is stored, else from here."""
        if member.offset is not None:
            return member.mapped()
        return self.array(
            f"{member.path.stem}.{member.name}", member.shape, member.dtype, member.path, fingerprint(member),
            member.pieces, fortran=member.fortran,
        )  # fmt: skip

    def array(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        source: Path,
        fingerprint: str,
        pieces: Callable[[], Iterable[bytes]],
        *,
        fortran: bool = False,
    ) -> Array:
        """The array of ``source``, mapped; made from ``pieces`` unless it has been.

        Args:
            name: what the file's name begins with.
            shape, dtype, fortran: of the array.
            source: the file or folder from which it is made.
            fingerprint: differs where the source does.
            pieces: the array's bytes in their order.

        Raises:
            UsageError: if the folder can't be written, and whatever ``pieces`` raises. Nothing is left behind then.
        """
        name = f"{name}.{self._digest(source, fingerprint)}.npy"
        if not self._has(name, fingerprint):
            with self._lock():
                if not self._has(name, fingerprint):  # the process that held the lock may have made it
                    self._make(name, shape, dtype, fingerprint, pieces, fortran)
        return members(self.folder / name)[""].mapped()

    def _digest(self, source: Path, fingerprint: str) -> str:
        # The source's place as seen from here: a data set that is moved with its own cache finds it again.
        place = os.path.relpath(source.resolve(), self.folder.resolve())
        return hashlib.blake2b(f"{place}\n{fingerprint}".encode(errors="surrogateescape"), digest_size=8).hexdigest()

    def _manifest(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _has(self, name: str, fingerprint: str) -> bool:
        entry = self._manifest().get(name)
        path = self.folder / name
        return (
            entry is not None
            and entry.get("made_from") == fingerprint
            and path.exists()
            and path.stat().st_size == entry.get("bytes")
        )

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "a", encoding="utf-8")  # noqa: SIM115 - held until the array is made
        except OSError as error:
            raise UsageError(
                f"{self.folder} can't be written: {error.strerror}; give another folder as cache"
            ) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.folder.glob(f"*{PARTIAL}"):  # by a process that was killed
                left.unlink()
            yield

    def _make(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        fingerprint: str,
        pieces: Callable[[], Iterable[bytes]],
        fortran: bool,
    ) -> None:
        total = math.prod(shape) * dtype.itemsize
        partial = self.folder / f"{name}{PARTIAL}"
        try:
            with open(partial, "wb") as file:
                described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": fortran, "shape": shape}
                np.lib.format.write_array_header_2_0(file, described)  # type: ignore[no-untyped-call, unused-ignore]
                begin = file.tell()
                for piece in pieces():
                    file.write(piece)
                    self.on_progress(Converted(name, file.tell() - begin, total))
                file.flush()
                os.fsync(file.fileno())
            size = partial.stat().st_size
            if size != begin + total:
                raise UsageError(
                    f"{name} came out with {size - begin:,} bytes of {total:,}; its source changed: try again"
                )
            partial.replace(self.folder / name)
        except OSError as error:
            raise UsageError(
                f"{partial.parent / name} can't be written ({error.strerror}); it needs {total:,} bytes: "
                "make room, or give another folder as cache"
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        entry = {"made_from": fingerprint, "bytes": size, "shape": list(shape), "dtype": str(dtype)}
        write_atomically(
            self.folder / MANIFEST, json.dumps({**self._manifest(), name: entry}, indent=1, ensure_ascii=False) + "\n"
        )
