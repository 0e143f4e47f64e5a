"""What a folder of images holds: the layouts in which the paper's data sets are found, and folders of image files.

=============  ========================================================================================================
layout         files
=============  ========================================================================================================
cifar5m        ``part{i}.npz`` or ``cifar5m_part{i}.npz`` with X (n, 32, 32, 3) uint8 and Y (n,)
mnist1m        ``MNIST_images_{i}.npz`` (arr_0) or ``.npy``, with ``MNIST_labels_{i}.npy``, ``.npz.npy`` or ``.npz``
tinyimagenet   ``train/CLASS/images/*.JPEG``, and ``val/images/*.JPEG`` with ``val/val_annotations.txt``
imagefolder    ``CLASS/…/*.png`` and so on; or ``train/CLASS/…`` with ``val/CLASS/…`` or ``test/CLASS/…``
cifar10        ``cifar-10-batches-py`` as torchvision unpacks it
mnist          ``MNIST/raw`` as torchvision unpacks it
=============  ========================================================================================================

Image files are decoded once, in a random order, into one uint8 array: their classes' folders are then mixed on disk.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gammaopt._errors import UsageError, require
from gammaopt.online.streams._convert import Cache, fingerprint
from gammaopt.online.streams._mapped import Array, DamagedFileError, Member, members
from gammaopt.online.streams._order import permute

CIFAR5M = re.compile(r"^(?:cifar5m_)?part(\d+)\.npz$")
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MNIST_IMAGES = re.compile(r"^MNIST_images_(\d+)\.(?:npz|npy|npz\.npy)$")
MNIST_CLASSES = tuple("0123456789")
MNIST_LABELS, MNIST_SIDE = "MNIST_labels_{}", 28
Files: TypeAlias = dict[str, list[Path]]  # class → its image files
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".gif")
SIDE = 64  # of decoded images, unless told
DECODED = 256  # images decoded before they are written
LOOKED_AT = 64  # images of an array that tell it from another one


@dataclass
class Found:
    """Images of a folder.

    Attributes:
        layout: one of :data:`LAYOUTS`.
        images: arrays (n, height, width[, channels]), mapped; a data set is all of them.
        labels: their classes, int64.
        classes: names.
        identity: eight hexadecimal digits that tell this data set from another one, wherever it lies.
        side: of decoded image files; ``None`` where pixels are as they are stored.
        held_images, held_labels: the part that the layout itself holds out, if it has one.
    """

    layout: str
    images: list[Array]
    labels: list[Array]
    classes: list[str]
    identity: str = ""
    side: int | None = None
    held_images: Array | None = None
    held_labels: Array | None = None


def recognise(path: Path) -> str:
    """The layout of a folder.

    Raises:
        UsageError: if there is no such folder, or it has none of the layouts.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is {'a file' if path.exists() else 'not there'}; give the folder that holds the data")
    names = [entry.name for entry in path.iterdir()]
    if any(CIFAR5M.match(name) for name in names):
        return "cifar5m"
    if any(MNIST_IMAGES.match(name) for name in names):
        return "mnist1m"
    if (path / "wnids.txt").exists() or (path / "val" / "val_annotations.txt").exists():
        return "tinyimagenet"
    if (path / "cifar-10-batches-py").is_dir():
        return "cifar10"
    if (path / "MNIST" / "raw").is_dir():
        return "mnist"
    for base in (path / "train", path):
        if base.is_dir() and any(_image_files(folder, first=True) for folder in _folders(base)):
            return "imagefolder"
    raise UsageError(
        f"{path} holds {_told(names)}, none of the known layouts: part0.npz … (CIFAR-5M), MNIST_images_0.npz … "
        "(MNIST-1M), TinyImageNet, or a folder of images for each class"
    )


def open_layout(path: Path, layout: str, cache: Cache, side: int = SIDE) -> Found:
    """The images of a folder in that layout; converts what can't be mapped.

    Raises:
        DamagedFileError: for a file that is not whole.
        UsageError: for files that do not fit together.
    """
    return LAYOUTS[layout](path, cache, side)


def cifar5m_part(_: Path, __: int, file: Path) -> tuple[Member, Member]:
    """Images and labels of a part of CIFAR-5M, not read."""
    arrays = members(file)
    images = _named(arrays, "X", file)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise UsageError(f"{images} is {images.dtype} of shape {images.shape}; CIFAR-5M has uint8 (n, 32, 32, 3)")
    return images, _named(arrays, "Y", file)


def mnist1m_part(path: Path, number: int, file: Path) -> tuple[Member, Member]:
    """Images and labels of a part of MNIST-1M, not read."""
    images = _only(file)
    if int(np.prod(images.shape[1:])) != MNIST_SIDE**2:
        raise UsageError(f"{images} has shape {images.shape}; MNIST-1M has (n, {MNIST_SIDE}, {MNIST_SIDE})")
    if images.dtype.kind not in "uif":
        raise UsageError(f"{images} is {images.dtype}; MNIST-1M has uint8, or floats from 0 to 1")
    beside = [path / (MNIST_LABELS.format(number) + end) for end in (".npy", ".npz.npy", ".npz")]
    label_file = next((candidate for candidate in beside if candidate.exists()), None)
    if label_file is None:
        raise UsageError(f"{file} has no labels beside it; put {beside[0].name} or {beside[1].name} into {path}")
    return images, _only(label_file)


def _cifar5m(path: Path, cache: Cache, _: int) -> Found:
    found = Found("cifar5m", [], [], list(CIFAR_CLASSES))
    for number, file in parts(path, "cifar5m").items():
        images, labels = cifar5m_part(path, number, file)
        found.images.append(cache.member(images))
        found.labels.append(classes_of(cache.member(labels), images.shape[0], str(labels)))
    found.identity = _identity(found.images, found.labels)
    return found


def _mnist1m(path: Path, cache: Cache, _: int) -> Found:
    found = Found("mnist1m", [], [], list(MNIST_CLASSES))
    for number, file in parts(path, "mnist1m").items():
        images, labels = mnist1m_part(path, number, file)
        found.images.append(_gray(cache, images))
        found.labels.append(classes_of(cache.member(labels), images.shape[0], str(labels)))
    found.identity = _identity(found.images, found.labels)
    return found


def _identity(images: Sequence[Array], labels: Sequence[Array]) -> str:
    """A digest of all shapes and labels and of some pixels, the same in whatever kind of file they lie."""
    seen = hashlib.blake2b(digest_size=4)
    for part, classes in zip(images, labels, strict=True):
        some = np.linspace(0, len(part) - 1, min(LOOKED_AT, len(part))).astype(np.int64)
        seen.update(f"{part.shape}\n".encode() + classes.tobytes() + np.ascontiguousarray(part[some]).tobytes())
    return seen.hexdigest()


def _gray(cache: Cache, member: Member) -> Array:
    """Images (n, 28, 28) uint8; from other numbers, by their range, once."""
    shape = (member.shape[0], MNIST_SIDE, MNIST_SIDE)
    if member.dtype == np.uint8:
        return cache.member(member).reshape(shape)

    def pieces() -> Iterator[bytes]:
        scale, shift = gray_scale(member)
        for values in _values(member):
            yield np.clip(np.rint((values.astype(np.float32) + shift) * scale), 0, 255).astype(np.uint8).tobytes()

    made = cache.array(
        f"{member.path.stem}.uint8", member.shape, np.dtype(np.uint8), member.path, f"{fingerprint(member)} as uint8",
        pieces, fortran=member.fortran,
    )  # fmt: skip
    return made.reshape(shape)


def gray_scale(member: Member, on_piece: Callable[[int], object] = lambda _: None) -> tuple[float, float]:
    """Scale and shift with which all pixels are 0 … 255, (pixel + shift)·scale; reads every one.

    Args:
        member: whole numbers or floats.
        on_piece: told the bytes of each piece that was read.

    Raises:
        DamagedFileError: if they can't be read to their end.
        UsageError: for pixels that are no numbers, or of no known range.
    """
    low, high = math.inf, -math.inf
    for values in _values(member):
        on_piece(values.nbytes)
        if not np.isfinite(values).all():
            raise UsageError(f"{member} has pixels that are no numbers; get the file again")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if -1.01 <= low < -0.01 and high <= 1.01:
        return 127.5, 1.0
    if low >= -0.01 and high <= 1.01:
        return 255.0, 0.0
    if low >= -0.01 and high <= 255.5:
        return 1.0, 0.0
    raise UsageError(
        f"{member} has pixels from {low:.3g} to {high:.3g}, neither −1 … 1, 0 … 1 nor 0 … 255; "
        "undo its standardisation, or save it as uint8"
    )


def _values(member: Member) -> Iterator[Array]:
    """The numbers of an array in the order of its file."""
    for piece in member.pieces():
        yield np.frombuffer(piece, member.dtype)


def _tinyimagenet(path: Path, cache: Cache, side: int) -> Found:
    return _decoded(path, "tinyimagenet", *tinyimagenet_files(path), cache, side)


def tinyimagenet_files(path: Path) -> tuple[Files, Files | None]:
    """Class → files, of the training images and of those held out."""
    train = _by_class(path / "train")
    if not train:
        raise UsageError(f"{path} has no train/CLASS/images/*.JPEG; give the folder that holds TinyImageNet")
    notes = path / "val" / "val_annotations.txt"
    if not notes.exists():
        return train, None
    held: Files = {name: [] for name in sorted(train)}
    for line in filter(str.strip, notes.read_text(encoding="utf-8").splitlines()):
        name, label = [*line.split("\t"), ""][:2]
        file = path / "val" / "images" / name
        if label not in held or not file.exists():
            raise UsageError(f"{notes} names {name} of class {label!r}, which is not there; unpack the archive again")
        held[label].append(file)
    if not any(held.values()):
        raise UsageError(f"{notes} names no image; unpack the archive again, or remove val/ to hold out some of train/")
    return train, held


def _imagefolder(path: Path, cache: Cache, side: int) -> Found:
    return _decoded(path, "imagefolder", *imagefolder_files(path), cache, side)


def imagefolder_files(path: Path) -> tuple[Files, Files | None]:
    """Class → files, of the training images and of those held out."""
    base = path / "train" if (path / "train").is_dir() else path
    beside = next((path / name for name in ("val", "test") if base != path and (path / name).is_dir()), None)
    train = _by_class(base)
    if len(train) < 2:
        raise UsageError(f"{base} has images of {len(train)} classes; give a folder with one folder for each class")
    if beside is None:
        return train, None
    held = _by_class(beside)
    if not set(held) <= set(train):
        raise UsageError(f"{beside} has {_told(sorted(set(held) - set(train)))}, no class of the training images")
    if not held:
        raise UsageError(
            f"{beside} has no images in class folders; put them into {beside.name}/CLASS, or remove it to hold out "
            "some of the training images"
        )
    return train, held


LAYOUTS: dict[str, Callable[[Path, Cache, int], Found]] = {
    "cifar5m": _cifar5m,
    "mnist1m": _mnist1m,
    "tinyimagenet": _tinyimagenet,
    "imagefolder": _imagefolder,
}


PARTS = {
    "cifar5m": (CIFAR5M, "part0.npz … or cifar5m_part0.npz …; give the folder that holds CIFAR-5M", cifar5m_part),
    "mnist1m": (MNIST_IMAGES, "MNIST_images_0.npz …; give the folder that holds MNIST-1M", mnist1m_part),
}


def parts(path: Path, layout: str) -> dict[int, Path]:
    """Number → image file of a layout whose files are numbered, in order."""
    pattern, wanted, _ = PARTS[layout]
    matches = [(match, entry) for entry in path.iterdir() if (match := pattern.match(entry.name))]
    found: dict[int, Path] = {}
    for match, entry in sorted(matches, key=lambda pair: (int(pair[0][1]), pair[1].name)):
        if int(match[1]) in found:
            raise UsageError(f"{found[int(match[1])]} and {entry.name} are the same part; keep one of them")
        found[int(match[1])] = entry
    if not found:
        raise UsageError(f"{path} has no {wanted}")
    return found


def _named(arrays: dict[str, Member], name: str, file: Path) -> Member:
    if name not in arrays:
        raise UsageError(f"{file} has no array {name!r}, but {_told(list(arrays))}; is it another data set?")
    return arrays[name]


def _only(file: Path) -> Member:
    arrays = members(file)
    if len(arrays) != 1:
        raise UsageError(f"{file} has {len(arrays)} arrays ({_told(list(arrays))}) where one is expected")
    return next(iter(arrays.values()))


def classes_of(labels: Array, count: int, told: str, classes: int = 10) -> Array:
    """Labels as int64 (n,), from whole numbers or one-hot rows: ``count`` of them, 0 … ``classes`` − 1."""
    if labels.dtype.kind not in "biuf":
        raise UsageError(f"{told} has labels of type {labels.dtype}; give whole numbers")
    if labels.ndim == 2 and labels.shape[1] > 1:
        labels = labels.argmax(1)
    if labels.size != count:
        raise UsageError(f"{told} has {labels.size:,} labels for {count:,} images; get both files again")
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise UsageError(f"{told} has labels from {labels.min()} to {labels.max()}, outside 0 … {classes - 1}")
    whole = np.asarray(labels, np.int64).reshape(-1)
    if labels.dtype.kind == "f" and not np.array_equal(whole, labels.reshape(-1)):
        raise UsageError(f"{told} has labels that are no whole numbers")
    return whole


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path, *, first: bool = False) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and not file.name.startswith("."))
    return [file for _, file in zip(range(1), files, strict=False)] if first else sorted(files)


def _by_class(path: Path) -> Files:
    found = {folder.name: _image_files(folder) for folder in _folders(path)} if path.is_dir() else {}
    return {name: files for name, files in found.items() if files}


def _decoded(path: Path, layout: str, train: Files, held: Files | None, cache: Cache, side: int) -> Found:
    classes = sorted(train)
    seen = hashlib.blake2b(digest_size=4)
    for split, files in {"train": train, "held_out": held or {}}.items():
        of_split = [(name, file) for name, own in sorted(files.items()) for file in own]
        for name, file in of_split:
            seen.update(_line(split, name, file.relative_to(path), file.stat().st_size))
        for _, file in of_split[:: max(1, len(of_split) // LOOKED_AT)]:  # others may have names and sizes in common
            seen.update(file.read_bytes())
    images, labels = _decode(path, "train", train, classes, cache, side)
    found = Found(layout, [images], [labels], classes, seen.hexdigest(), side)
    if held is not None:
        found.held_images, found.held_labels = _decode(path, "held_out", held, classes, cache, side)
    return found


def _line(*words: object) -> bytes:
    """Words for a digest; a name may be of bytes that are no UTF-8."""
    return (" ".join(map(str, words)) + "\n").encode(errors="surrogateescape")


def _decode(
    path: Path, split: str, files: Files, classes: Sequence[str], cache: Cache, side: int
) -> tuple[Array, Array]:
    """All files of a split as one array (n, side, side, 3), and their classes."""
    listed = [(file, label) for label, name in enumerate(classes) for file in files.get(name, [])]
    order = permute(np.arange(len(listed)), len(listed), 0)
    listed = [listed[i] for i in order]
    seen = hashlib.blake2b(digest_size=16)
    for file, label in listed:
        stat = file.stat()
        seen.update(_line(file.relative_to(path), stat.st_size, stat.st_mtime_ns, label))

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(listed), DECODED):
            yield b"".join(decode(file, side) for file, _ in listed[start : start + DECODED])

    shape = (len(listed), side, side, 3)
    images = cache.array(f"{split}-{side}", shape, np.dtype(np.uint8), path, seen.hexdigest(), pieces)
    return images, np.array([label for _, label in listed], np.int64)


def decode(file: Path, side: int) -> bytes:
    """An image file as side × side × 3 bytes: its middle square, shrunk.

    Raises:
        DamagedFileError: if it can't be decoded.
    """
    library = require("PIL.Image", "vision")
    try:
        with library.open(file) as image:
            left, top = ((length - min(image.size)) / 2 for length in image.size)
            box = (left, top, left + min(image.size), top + min(image.size))
            square = image.convert("RGB").resize((side, side), library.Resampling.BILINEAR, box)
            return bytes(square.tobytes())
    except (OSError, ValueError, SyntaxError, library.DecompressionBombError) as error:
        raise DamagedFileError(
            f"{file} ({file.stat().st_size:,} bytes) can't be decoded: {error}; get it again or remove it"
        ) from None


def _told(names: Sequence[str]) -> str:
    """The first few of a list, for a message."""
    return (
        ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"
    )
