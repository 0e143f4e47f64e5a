"""Arrays on disk, mapped and not read: ``.npy`` files, and members of ``.npz`` files that are stored uncompressed.

An npz is a zip of npy files. A stored member is there byte for byte, so with p the place of its local header,

    place of the array = p + 30 + length of the name + length of the extra field + length of the npy header

can be mapped where it is; ``np.load(npz, mmap_mode=…)`` would read all of it. Every length is checked against the
file's, so a file that is cut off is told by name and bytes, not by a crash in the middle of a pass.
"""

from __future__ import annotations

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from gammaopt._errors import UsageError

Array = npt.NDArray[Any]
LOCAL_HEADER = 30  # bytes, before the name
PIECE = 16 * 2**20  # bytes read at a time
# What zipfile and numpy raise, over a few bytes that are not what they were: a method or encryption that is not known,
# a place before the file's beginning, a header that is no Python literal or asks for more memory than there is.
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    SyntaxError,
    LookupError,
    ArithmeticError,
    MemoryError,
    TypeError,
    ValueError,
)


class DamagedFileError(UsageError):
    """A data file that is not whole; the message names it and says how many bytes it has."""


@dataclass(frozen=True)
class Member:
    """One array of a file.

    Attributes:
        path: the file.
        name: of the member, without ``.npy``; empty for a plain npy file.
        shape, dtype: of the array.
        fortran: whether the first index runs fastest.
        offset: place of the array's first byte in the file, or ``None`` if it is compressed.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int | None

    @property
    def length(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.path}:{self.name}" if self.name else str(self.path)

    def mapped(self) -> Array:
        """The array, mapped read-only; not for a compressed one."""
        if self.offset is None:
            raise UsageError(f"{self} is compressed and can't be mapped; convert it first")
        if not self.length:
            return np.zeros(self.shape, self.dtype)
        order = "F" if self.fortran else "C"
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)  # type: ignore[call-overload, no-any-return]

    def pieces(self) -> Iterator[bytes]:
        """The array's bytes in their order, unpacked, with the checksum looked at when the last is read.

        Raises:
            DamagedFileError: that says after how many bytes.
        """
        done = 0
        try:
            with _opened(self) as file:
                _header(file, self.path)
                while piece := file.read(PIECE):
                    done += len(piece)
                    yield piece
        except UsageError:
            raise
        except BROKEN as error:
            raise DamagedFileError(
                f"{self} is damaged after {done:,} of {self.length:,} bytes ({error}); "
                f"the file has {self.path.stat().st_size:,} bytes: get it again"
            ) from None
        if done != self.length:
            raise DamagedFileError(f"{self} has {done:,} of {self.length:,} bytes; get the file again")


def members(path: Path) -> dict[str, Member]:
    """Name → array of an npz file; of an npy file the one under the empty name.

    Raises:
        DamagedFileError: if the file is cut off, no such file at all, or has arrays of Python objects.
    """
    size = path.stat().st_size
    if path.suffix == ".npy":
        with open(path, "rb") as file:
            shape, fortran, dtype = _header(file, path)
            return {"": _checked(Member(path, "", shape, dtype, fortran, file.tell()), size)}
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                info.filename.removesuffix(".npy"): _member(archive, info, path, size)
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
    except UsageError:
        raise
    except BROKEN as error:
        raise DamagedFileError(
            f"{path} is cut off, or no npz file: its {size:,} bytes are no whole zip ({error}); get it again"
        ) from None


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, size: int) -> Member:
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as inside:
        shape, fortran, dtype = _header(inside, path)
        begin = inside.tell()
    offset = None
    if info.compress_type == zipfile.ZIP_STORED:
        with open(path, "rb") as file:
            file.seek(info.header_offset)
            local = file.read(LOCAL_HEADER)
        offset = info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", local[26:30])) + begin
    member = Member(path, name, shape, dtype, fortran, offset)
    if not dtype.hasobject and begin + member.length != info.file_size:
        raise DamagedFileError(
            f"{member} has {info.file_size - begin:,} bytes where shape {shape} of {dtype} needs {member.length:,}; "
            "get the file again"
        )
    return _checked(member, size)


def _checked(member: Member, size: int) -> Member:
    if member.dtype.hasobject:
        raise DamagedFileError(f"{member} holds Python objects, not numbers; save it as an array of integers")
    if member.offset is not None and member.offset + member.length > size:
        raise DamagedFileError(
            f"{member.path} is cut off: it has {size:,} of {member.offset + member.length:,} bytes; get it again"
        )
    return member


def _opened(member: Member) -> IO[bytes]:
    if not member.name:
        return open(member.path, "rb")
    return zipfile.ZipFile(member.path).open(f"{member.name}.npy")


def _header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an npy file, read up to its first number."""
    try:
        version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call, unused-ignore]
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)  # type: ignore[no-untyped-call, unused-ignore]
        if any(side < 0 for side in shape):
            raise ValueError(f"shape {shape} is negative")
    except BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedFileError(
            f"{path} ({path.stat().st_size:,} bytes) does not begin as an array file: {reason}; get it again"
        ) from None
    return shape, fortran, dtype
