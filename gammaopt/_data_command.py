"""``gammaopt data check``: what a folder of images holds, and everything that is wrong with it.

Every part and every image is looked at, however many are broken, and nothing is converted or written. Unless told to be
fast, each byte is read: a zip's checksums, an image's decoder and the range of floats then say whether it is sound.
What the stream would refuse is a problem, and the numbers told are those of its pass over what is sound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gammaopt._errors import UsageError
from gammaopt.online.streams._convert import Converted, Lines
from gammaopt.online.streams._layouts import (
    CIFAR_CLASSES,
    MNIST_CLASSES,
    PARTS,
    SIDE,
    Files,
    classes_of,
    decode,
    gray_scale,
    imagefolder_files,
    parts,
    recognise,
    tinyimagenet_files,
)
from gammaopt.online.streams._mapped import Member
from gammaopt.online.streams._stored import order_of
from gammaopt.online.streams._user import from_torchvision

OnProgress = Callable[[Converted], object]
TITLES = {
    "cifar5m": "CIFAR-5M",
    "mnist1m": "MNIST-1M",
    "tinyimagenet": "TinyImageNet",
    "imagefolder": "folders of images",
    "cifar10": "CIFAR-10, as torchvision keeps it",
    "mnist": "MNIST, as torchvision keeps it",
}


@dataclass
class Checked:
    """What was found; prints as the command's answer."""

    path: Path
    layout: str
    classes: int = 10
    images: int = 0
    train: int = 0
    held: int | None = None
    labels: Counter[int] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {TITLES[self.layout]} (stream {self.stream!r})", *self.files]
        if self.images:
            of_pass = f": one pass shows {self.train:,}, {self.held:,} are held out" if self.train else ""
            lines.append(f"{self.images:,} sound images{of_pass}")
        if self.labels.total():
            shares = [self.labels[label] / self.labels.total() for label in range(self.classes)]
            lines.append(
                f"{self.classes} classes, from {100 * min(shares):.2f} % to {100 * max(shares):.2f} % of images"
            )
        found = len(self.problems)
        lines += [f"wrong: {problem}" for problem in self.problems]
        lines.append(f"{found} problem{'s' * (found > 1)} found." if found else "Nothing is wrong.")
        return "\n".join(lines)

    @property
    def stream(self) -> str:
        """Name under which ``build_stream`` knows it."""
        return "imagefolder" if self.layout == "tinyimagenet" else self.layout


def check_folder(path: Path, *, fast: bool, on_progress: OnProgress) -> Checked:
    """Look at everything in ``path``.

    Raises:
        UsageError: if there is no such folder, or it has none of the known layouts.
    """
    checked = Checked(path, recognise(path))
    if checked.layout in PARTS:
        _check_parts(checked, fast, on_progress)
    elif checked.layout in ("cifar10", "mnist"):
        _check_torchvision(checked)
    else:
        _check_files(checked, fast, on_progress)
    return checked


def _split(checked: Checked, one: int) -> None:
    """How many of the sound images, each of ``one`` bytes, the stream shows in a pass and holds out."""
    if checked.held is not None:
        checked.train = checked.images
    elif checked.images:
        try:
            order = order_of(checked.stream, checked.images, one)
        except UsageError as error:
            checked.problems.append(str(error))
        else:
            checked.train, checked.held = order.train, order.images - order.train


def _check_parts(checked: Checked, fast: bool, on_progress: OnProgress) -> None:
    try:
        found = parts(checked.path, checked.layout)
    except UsageError as error:
        checked.problems.append(str(error))
        return
    missing = sorted(set(range(max(found))) - set(found))
    if missing:
        told = ", ".join(map(str, missing))
        checked.problems.append(f"there are parts up to {max(found)}, but not {told}; get them, or leave them out")
    members_of = PARTS[checked.layout][2]
    classes = CIFAR_CLASSES if checked.layout == "cifar5m" else MNIST_CLASSES
    one = 0
    for number, file in found.items():
        try:
            images, labels = members_of(checked.path, number, file)
            values = np.frombuffer(b"".join(labels.pieces()), labels.dtype)
            found_labels = classes_of(
                values.reshape(labels.shape, order="F" if labels.fortran else "C"),
                images.shape[0],
                str(labels),
                len(classes),
            )
            if not fast:
                _read(images, on_progress)
        except UsageError as error:
            checked.problems.append(str(error))
            continue
        how = "mapped in place" if images.offset is not None and images.dtype == np.uint8 else "converted at first use"
        checked.files.append(f"  {file.name}: {images.shape[0]:,} images, {images.length / 1e6:,.1f} MB, {how}")
        checked.images += images.shape[0]
        checked.labels.update(found_labels.tolist())
        one = int(np.prod(images.shape[1:]))
    _split(checked, one)


def _read(member: Member, on_progress: OnProgress) -> None:
    """Read every byte, and of numbers that the stream must convert the range."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        on_progress(Converted(str(member.path.name), done, member.length))

    if member.dtype != np.uint8:
        gray_scale(member, more)
    else:
        for piece in member.pieces():
            more(len(piece))


def _check_torchvision(checked: Checked) -> None:
    try:
        stream = from_torchvision("cifar10" if checked.layout == "cifar10" else "mnist", checked.path)
    except UsageError as error:
        checked.problems.append(str(error))
        return
    checked.images = checked.train = stream.train_samples
    checked.held = stream.held_samples
    checked.labels.update(stream.labels.tolist())


def _check_files(checked: Checked, fast: bool, on_progress: OnProgress) -> None:
    try:
        listed = tinyimagenet_files if checked.layout == "tinyimagenet" else imagefolder_files
        train, held = listed(checked.path)
    except UsageError as error:
        checked.problems.append(str(error))
        return
    checked.classes = len(train)
    total = sum(map(len, train.values()))
    if not fast:
        _keep_sound(checked, [train, held or {}], on_progress)
    checked.images = sum(map(len, train.values()))
    checked.held = None if held is None else sum(map(len, held.values()))
    for label, name in enumerate(sorted(train)):
        checked.labels[label] = len(train[name])
    checked.files.append(f"  {total:,} files for training, decoded at first use")
    _split(checked, 3 * SIDE**2)


def _keep_sound(checked: Checked, splits: list[Files], on_progress: OnProgress) -> None:
    """Decode every file, and take the broken ones out of their lists and into the problems."""
    total = sum(file.stat().st_size for split in splits for own in split.values() for file in own)
    done = 0
    for split in splits:
        for name, own in split.items():
            split[name] = []
            for file in own:
                try:
                    decode(file, 1)
                    split[name].append(file)
                except UsageError as error:
                    checked.problems.append(str(error))
                done += file.stat().st_size
                on_progress(Converted(checked.path.name, done, total))


@contextmanager
def progress(quiet: bool) -> Iterator[OnProgress]:
    """A bar on a terminal, lines for large files elsewhere, nothing if quiet."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda _: None
    elif not console.is_terminal:
        yield Lines()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            row = bar.add_task("reading", total=None)
            yield lambda p: bar.update(row, description=p.what, completed=p.done, total=p.total)
