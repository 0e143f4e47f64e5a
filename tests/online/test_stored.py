"""Images on disk: every form in which they are found, every way in which a file is broken, and one pass over them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gammaopt import UsageError
from gammaopt.online import build_stream
from gammaopt.online.streams import (
    Batches,
    FromDataset,
    FromIterable,
    Parity,
    Shard,
    Stored,
    cifar5m,
    imagefolder,
    mnist1m,
)
from gammaopt.online.streams._convert import Cache, Converted
from gammaopt.online.streams._mapped import DamagedFileError, members
from gammaopt.online.streams._order import Order, permute
from gammaopt.online.streams._stored import _read_ahead

Save = Callable[..., None]
PART = 60  # images of a part


def pictures(parts: int = 2, shape: tuple[int, ...] = (32, 32, 3)) -> list[np.ndarray[Any, Any]]:
    """Every image tells its number in its first two pixels."""
    draw = np.random.default_rng(0)
    made = []
    for part in range(parts):
        images = draw.integers(0, 256, (PART, *shape), dtype=np.uint8)
        number = part * PART + np.arange(PART)
        images.reshape(PART, -1)[:, 0], images.reshape(PART, -1)[:, 1] = number // 256, number % 256
        made.append(images)
    return made


def labels_of(part: int) -> np.ndarray[Any, Any]:
    return (part * PART + np.arange(PART)) % 10


def write_cifar(folder: Path, save: Save = np.savez, name: str = "part{}.npz", parts: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    for i, images in enumerate(pictures(parts)):
        save(folder / name.format(i), X=images, Y=labels_of(i))
    return folder


def numbers(stream: Stored, x: Tensor) -> list[int]:
    """Which images these are, from the pixels."""
    flat = x.flatten(0, 1)
    flat = flat * stream._std[:, None, None] + stream._mean[:, None, None]
    pixels = (flat * 255).round().long().permute(0, 2, 3, 1).flatten(1)
    return (256 * pixels[:, 0] + pixels[:, 1]).tolist()


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def plain_name(path: Path | str) -> str:
    """A cache file's name without the digest of its source."""
    return re.sub(r"\.[0-9a-f]{16}(?=\.npy)", "", Path(path).name)


def quiet(_: Converted) -> None:
    pass


def is_whole(stream: Stored, count: int) -> None:
    """A pass shows every image that is not held out once, held-out ones never, all with their own labels."""
    train, y = stream.batches(3, 0, stream.train_samples // 2, 2)
    shown = numbers(stream, train)
    held_count = count - stream.train_samples
    held, held_y = stream.batches(3, 0, held_count, 1, "held_out")
    hidden = numbers(stream, held)
    assert sorted(shown + hidden) == list(range(count))
    assert [n % 10 for n in shown] == y.flatten().tolist()
    assert [n % 10 for n in hidden] == held_y.flatten().tolist()
    assert shown != sorted(shown)


# Layouts


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["part{}.npz", "cifar5m_part{}.npz"])
def test_cifar_5m_in_each_form(tmp_path: Path, name: str, save: Save) -> None:
    told: list[Converted] = []
    stream = cifar5m(write_cifar(tmp_path / "data", save, name), held_out=20, on_progress=told.append)
    assert (stream.shape, stream.classes, stream.train_samples) == ((3, 32, 32), 10, 100)
    assert stream.name == "cifar5m-a7d240f0-held_out=20", "in each form the same, and on each machine"
    is_whole(stream, 2 * PART)
    cache = tmp_path / "data" / ".gammaopt"
    if save is np.savez:
        assert not cache.exists(), "stored members are mapped where they are"
        assert all(isinstance(images, np.memmap) for images in stream._images)
        assert not told
        return
    manifest = json.loads((cache / "manifest.json").read_text())
    assert len(manifest) == 4
    assert {entry["bytes"] for key, entry in manifest.items() if ".X." in key} == {
        next(cache.glob("*.X.*.npy")).stat().st_size
    }
    assert told[-1].done == told[-1].total
    told.clear()
    again = cifar5m(tmp_path / "data", held_out=20, on_progress=told.append)
    assert not told, "converted once"
    assert same(again.batches(0, 0, 3, 4), stream.batches(0, 0, 3, 4))


def test_stored_and_compressed_files_give_the_same_batches(tmp_path: Path) -> None:
    made = [
        cifar5m(write_cifar(tmp_path / save.__name__, save), on_progress=quiet).batches(1, 0, 5, 8)
        for save in (np.savez, np.savez_compressed)
    ]
    assert same(*made)


@pytest.mark.parametrize("label_end", [".npy", ".npz.npy", ".npz"])
@pytest.mark.parametrize("image_end", [".npz", ".npy", "-compressed.npz", "-float.npz"])
def test_mnist_1m_in_each_form(tmp_path: Path, image_end: str, label_end: str) -> None:
    for i, images in enumerate(pictures(2, (28, 28))):
        file = tmp_path / f"MNIST_images_{i}"
        if image_end == ".npy":
            np.save(file.with_suffix(".npy"), images)
        elif image_end == "-float.npz":
            np.savez(file, images.astype(np.float32) / 255)
        else:
            (np.savez_compressed if "compressed" in image_end else np.savez)(file, images)
        beside = str(tmp_path / f"MNIST_labels_{i}{label_end}")
        if label_end == ".npz":
            np.savez(beside, labels_of(i))
        else:
            with open(beside, "wb") as out:
                np.save(out, labels_of(i))
    stream = mnist1m(tmp_path, held_out=20, on_progress=quiet)
    assert (stream.shape, stream.classes) == ((1, 28, 28), 10)
    is_whole(stream, 2 * PART)


def write_floats(folder: Path, pixels: np.ndarray[Any, Any]) -> Path:
    np.save(folder / "MNIST_images_0.npy", pixels)
    np.save(folder / "MNIST_labels_0.npy", np.arange(len(pixels)) % 10)
    return folder


@pytest.mark.parametrize(("scale", "shift"), [(1 / 127.5, -1.0), (1 / 255, 0.0), (1.0, 0.0)])
def test_floats_of_each_range_are_the_same_pixels(tmp_path: Path, scale: float, shift: float) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 28, 28), dtype=np.uint8)
    images[:256] = images[:256] % 2 * 128 + 127  # the first ones alone would look like 0 … 1 where −1 … 1 is meant
    stream = mnist1m(write_floats(tmp_path, (images * scale + shift).astype(np.float32)), on_progress=quiet)
    assert np.array_equal(stream._images[0], images)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(-0.42, 2.82, r"pixels from -0.42 to 2.82, neither"), (0.0, np.nan, "pixels that are no numbers")],
)
def test_floats_of_no_known_range_are_refused(tmp_path: Path, low: float, high: float, message: str) -> None:
    pixels = np.full((300, 28, 28), low, np.float32)
    pixels[-1] = high
    with pytest.raises(UsageError, match=message):
        mnist1m(write_floats(tmp_path, pixels), on_progress=quiet)
    assert not list(tmp_path.rglob("*.uint8.npy*"))


def test_compressed_floats_leave_no_float_array_beside_them(tmp_path: Path) -> None:
    pixels = pictures(1, (28, 28))[0]
    np.savez_compressed(tmp_path / "MNIST_images_0.npz", np.asfortranarray(pixels / np.float32(255)))
    np.save(tmp_path / "MNIST_labels_0.npy", labels_of(0))
    is_whole(mnist1m(tmp_path, held_out=20, on_progress=quiet), PART)
    cached = list((tmp_path / ".gammaopt").glob("*.npy"))
    assert [plain_name(path) for path in cached] == ["MNIST_images_0.uint8.npy"]
    assert cached[0].stat().st_size < 1.1 * pixels.size


def test_a_compressed_array_in_fortran_order_is_the_same_images(tmp_path: Path) -> None:
    images = pictures(1)[0]
    np.savez_compressed(tmp_path / "part0.npz", X=np.asfortranarray(images), Y=labels_of(0))
    assert np.array_equal(cifar5m(tmp_path, on_progress=quiet)._images[0], images)


def test_mean_and_deviation_are_those_of_the_training_part() -> None:
    images, labels = np.full((100, 4, 4), 10, np.uint8), np.arange(100) % 2
    hidden = Order(100, 50).held(np.arange(50))
    images[hidden] = 200
    stream = Stored("mine", [images], [labels], 2, held_out=50)
    assert float(stream._mean) == pytest.approx(10 / 255)


def write_images(folder: Path, classes: list[str], each: int, inside: str = "", end: str = ".png") -> None:
    draw = np.random.default_rng(1)
    for label, name in enumerate(classes):
        where = folder / name / inside
        where.mkdir(parents=True)
        for i in range(each):
            pixels = draw.integers(0, 30, (24, 20, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(where / f"{name}_{i}{end}")


def brightness(x: Tensor, stream: Stored) -> list[int]:
    means = (x.flatten(0, 1) * stream._std[:, None, None] + stream._mean[:, None, None]).mean((1, 2, 3)) * 255
    return ((means - 15) / 60).round().int().tolist()


@pytest.mark.parametrize("layout", ["plain", "train and val", "tinyimagenet"])
def test_image_files_are_decoded_once_to_uint8_with_their_classes(tmp_path: Path, layout: str) -> None:
    classes = ["ant", "bee", "cat"]
    if layout == "plain":
        write_images(tmp_path, classes, 20)
    elif layout == "train and val":
        write_images(tmp_path / "train", classes, 20)
        write_images(tmp_path / "val", classes, 4)
    else:
        write_images(tmp_path / "train", classes, 20, "images", ".JPEG")
        write_images(tmp_path / "spare", classes, 4, "images", ".JPEG")
        (tmp_path / "val" / "images").mkdir(parents=True)
        lines = []
        for i, file in enumerate(sorted((tmp_path / "spare").rglob("*.JPEG"))):
            file.rename(tmp_path / "val" / "images" / f"val_{i}.JPEG")
            lines.append(f"val_{i}.JPEG\t{file.parent.parent.name}\t0\t0\t1\t1")
        (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
        for leftover in sorted((tmp_path / "spare").rglob("*"), reverse=True):
            leftover.rmdir()
        (tmp_path / "spare").rmdir()
        (tmp_path / "wnids.txt").write_text("\n".join(classes) + "\n")
    told: list[Converted] = []
    stream = imagefolder(tmp_path, side=16, on_progress=told.append)
    assert stream.shape == (3, 16, 16)
    assert stream.classes == 3
    assert stream.train_samples == (54 if layout == "plain" else 60)
    x, y = stream.batches(0, 0, 9, 6)
    assert brightness(x, stream) == y.flatten().tolist()
    held, held_y = stream.batches(0, 0, 2, 6, "held_out")
    assert brightness(held, stream) == held_y.flatten().tolist()
    assert len(set(y[:3].flatten().tolist())) == 3, "classes are mixed"
    told.clear()
    imagefolder(tmp_path, side=16, on_progress=told.append)
    assert not told
    next(tmp_path.rglob("bee_1.*")).unlink()
    imagefolder(tmp_path, side=16, on_progress=told.append)
    assert told, "a changed folder is decoded anew"


def test_cifar_10_and_mnist_come_through_torchvision_from_a_local_root(tmp_path: Path) -> None:
    import hashlib
    import struct
    from unittest import mock

    import torchvision

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 12)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    stream = build_stream("mnist", root=tmp_path)
    assert stream.shape == (1, 28, 28)
    y = stream.batches(0, 0, 3, 10)[1]
    assert sorted(y.flatten().tolist()) == sorted([*range(10)] * 3)
    assert stream.batches(0, 0, 1, 12, "held_out")[0].shape == (1, 12, 1, 28, 28)

    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    sums = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        rows = np.arange(4 * 3072, dtype=np.uint8).reshape(4, 3072)
        data = {"data": rows, "labels": [0, 1, 2, 3], "label_names": list("abcdefghij")}
        (base / name).write_bytes(pickle.dumps(data))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    real = torchvision.datasets.CIFAR10
    listed = [[name, sums[name]] for name in sums if name.startswith("data")]
    meta = {**real.meta, "md5": sums["batches.meta"]}
    with mock.patch.multiple(real, train_list=listed, test_list=[["test_batch", sums["test_batch"]]], meta=meta):
        stream = build_stream("cifar10", root=tmp_path)
    assert stream.shape == (3, 32, 32)
    assert stream.train_samples == 20  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"does not hold CIFAR10 as torchvision keeps it .* fetches it"):
        build_stream("cifar10", root=tmp_path / "nowhere")


def test_pixels_are_the_batches_as_they_are_stored(tmp_path: Path) -> None:
    stream = cifar5m(write_cifar(tmp_path), held_out=20)
    for split in ("train", "held_out"):
        pixels, labels = stream.pixels(3, 1, 4, 5, split)
        images, targets = stream.batches(3, 1, 4, 5, split)
        assert (pixels.shape, pixels.dtype) == ((3, 5, 32, 32, 3), torch.uint8)
        assert torch.equal(labels, targets)
        plain = (pixels.double() / 255 - stream._mean) / stream._std
        torch.testing.assert_close(images.double(), plain.movedim(-1, -3), rtol=0, atol=1e-5)


# Broken files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_file_is_named_with_its_bytes_and_leaves_nothing(tmp_path: Path, save: Save, keep: float) -> None:
    file = write_cifar(tmp_path / "data", save) / "part1.npz"
    content = file.read_bytes()
    cut = keep if isinstance(keep, int) else int(keep * len(content))
    file.write_bytes(content[:cut])
    with pytest.raises(DamagedFileError, match=rf"part1\.npz is cut off, or no npz file: its {cut:,} bytes") as caught:
        cifar5m(tmp_path / "data", on_progress=quiet)
    assert "\n" not in str(caught.value)
    left = {path.name for path in (tmp_path / "data" / ".gammaopt").glob("*")}
    assert not [name for name in left if name.startswith("part1") or "partial" in name]
    file.write_bytes(content)
    assert cifar5m(tmp_path / "data", on_progress=quiet).train_samples == 108


def test_a_truncated_npy_file_says_what_it_has_and_what_it_needs(tmp_path: Path) -> None:
    np.save(tmp_path / "MNIST_images_0.npy", pictures(1, (28, 28))[0])
    np.save(tmp_path / "MNIST_labels_0.npy", labels_of(0))
    file = tmp_path / "MNIST_images_0.npy"
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1000])
    message = rf"MNIST_images_0\.npy is cut off: it has {whole - 1000:,} of {whole:,} bytes; get it again"
    with pytest.raises(DamagedFileError, match=message):
        mnist1m(tmp_path)
    file.write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(DamagedFileError, match=r"MNIST_images_0\.npy \(220 bytes\) does not begin as an array file"):
        mnist1m(tmp_path)


def test_damage_inside_a_compressed_member_is_told_by_bytes_and_nothing_half_converted_is_left(tmp_path: Path) -> None:
    file = write_cifar(tmp_path, np.savez_compressed) / "part1.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = b"\x55" * 64
    file.write_bytes(content)
    total = PART * 32 * 32 * 3
    with pytest.raises(DamagedFileError, match=rf"part1\.npz:X is damaged after [\d,]+ of {total:,} bytes"):
        cifar5m(tmp_path, on_progress=quiet)
    cache = tmp_path / ".gammaopt"
    assert sorted(map(plain_name, cache.iterdir())) == ["lock", "manifest.json", "part0.X.npy", "part0.Y.npy"]
    assert {plain_name(name) for name in json.loads((cache / "manifest.json").read_text())} == {
        "part0.X.npy", "part0.Y.npy"
    }  # fmt: skip


@pytest.mark.parametrize("end", [".png", ".jpg"])
def test_a_broken_image_file_is_named_with_its_bytes_and_nothing_is_left(tmp_path: Path, end: str) -> None:
    write_images(tmp_path, ["ant", "bee"], 8, end=end)
    file = tmp_path / "bee" / f"bee_3{end}"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DamagedFileError, match=rf"bee_3\{end} \(200 bytes\) can't be decoded: .*; get it again"):
        imagefolder(tmp_path, side=16, on_progress=quiet)
    assert [path.name for path in (tmp_path / ".gammaopt").iterdir()] == ["lock"]
    file.unlink()
    assert imagefolder(tmp_path, side=16, on_progress=quiet).train_samples == 14


def test_a_killed_conversion_is_begun_anew_and_its_remains_are_swept(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / "data", np.savez_compressed)
    script = (
        "import os, signal, sys\nfrom gammaopt.online.streams import cifar5m\n"
        "def die(progress):\n"
        "    if progress.what.startswith('part1.X.'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "cifar5m(sys.argv[1], on_progress=die)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], check=False)
    assert done.returncode == -9
    cache = folder / ".gammaopt"
    assert [plain_name(path) for path in cache.glob("*.partial")] == ["part1.X.npy.partial"]
    is_whole(cifar5m(folder, held_out=20, on_progress=quiet), 2 * PART)
    assert not list(cache.glob("*.partial"))


def test_a_changed_source_or_a_damaged_cache_is_converted_again(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, np.savez_compressed)
    cifar5m(folder, on_progress=quiet)
    array = next((folder / ".gammaopt").glob("part0.X.*.npy"))
    array.write_bytes(array.read_bytes()[:-7])
    told: list[Converted] = []
    is_whole(cifar5m(folder, held_out=20, on_progress=told.append), 2 * PART)
    assert {plain_name(progress.what) for progress in told} == {"part0.X.npy"}
    np.savez_compressed(folder / "part1.npz", X=pictures(2)[1][::-1], Y=labels_of(1)[::-1])
    told.clear()
    is_whole(cifar5m(folder, held_out=20, on_progress=told.append), 2 * PART)
    assert {plain_name(progress.what) for progress in told} == {"part1.X.npy", "part1.Y.npy"}


def test_of_two_that_want_the_same_array_one_makes_it(tmp_path: Path) -> None:
    made: list[int] = []
    began = threading.Event()

    def pieces() -> Iterator[bytes]:
        made.append(1)
        began.set()
        yield bytes(100)

    def use() -> None:
        Cache(tmp_path, quiet).array("a", (100,), np.dtype(np.uint8), tmp_path / "b", "v1", pieces)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / "data", np.savez_compressed)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/cache can't be written: .*; give another folder as cache"):
        cifar5m(folder, cache=tmp_path / "file" / "cache")
    is_whole(cifar5m(folder, held_out=20, cache=tmp_path / "elsewhere", on_progress=quiet), 2 * PART)
    assert not (folder / ".gammaopt").exists()


def bad_folders(folder: Path) -> dict[str, Callable[[], object]]:
    def two_forms() -> None:
        write_cifar(folder)
        write_cifar(folder, name="cifar5m_part{}.npz")
        cifar5m(folder)

    def few_labels() -> None:
        np.savez(folder / "part0.npz", X=pictures(1)[0], Y=labels_of(0)[:-3])
        cifar5m(folder)

    def odd_labels() -> None:
        np.savez(folder / "part0.npz", X=pictures(1)[0], Y=labels_of(0) + 1)
        cifar5m(folder)

    def other_arrays() -> None:
        np.savez(folder / "part0.npz", images=pictures(1)[0])
        cifar5m(folder)

    def other_shape() -> None:
        np.savez(folder / "part0.npz", X=pictures(1)[0][:, :16], Y=labels_of(0))
        cifar5m(folder)

    def objects() -> None:
        np.savez(folder / "part0.npz", X=np.array([None, 1]), Y=labels_of(0))
        cifar5m(folder)

    def no_labels() -> None:
        np.savez(folder / "MNIST_images_0.npz", pictures(1, (28, 28))[0])
        mnist1m(folder)

    def one_class() -> None:
        write_images(folder, ["ant"], 3)
        imagefolder(folder)

    def all_held() -> None:
        cifar5m(write_cifar(folder), held_out=500)

    return {
        r"part0\.npz and part0\.npz are the same part|cifar5m_part0\.npz and part0\.npz are the same part": two_forms,
        r"part0\.npz:Y has 57 labels for 60 images; get both files again": few_labels,
        r"part0\.npz:Y has labels from 1 to 10, outside 0 … 9": odd_labels,
        r"part0\.npz has no array 'X', but images": other_arrays,
        r"part0\.npz:X is uint8 of shape \(60, 16, 32, 3\); CIFAR-5M has uint8": other_shape,
        r"part0\.npz:X holds Python objects": objects,
        r"MNIST_images_0\.npz has no labels beside it; put MNIST_labels_0\.npy or MNIST_labels_0\.npz\.npy": no_labels,
        r"has images of 1 classes": one_class,
        r"cifar5m-\w+ has 120 images; held_out=500 of them leaves none": all_held,
        r"empty holds nothing, none of the known layouts": lambda: imagefolder(_made(folder / "empty")),
        r"nowhere is not there; give the folder": lambda: cifar5m(folder / "nowhere"),
        r"has no part0\.npz … or cifar5m_part0\.npz": lambda: cifar5m(_made(folder / "empty")),
    }


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("message", bad_folders(Path()))
def test_files_that_do_not_fit_together_are_named(tmp_path: Path, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bad_folders(tmp_path)[message]()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.ones((20, 4, 4), np.float32), np.arange(20) % 3, "mine: images are float32; give uint8"),
        (np.ones((20, 4, 4), np.uint8), np.arange(20) % 4, "mine has labels from 0 to 3, outside 0 … 2"),
        (np.ones((20, 4, 4), np.uint8), np.arange(20) / 10, "mine has labels that are no whole numbers"),
    ],
)
def test_arrays_of_another_kind_are_told(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Stored("mine", [images], [labels], 3)


def test_labels_as_one_hot_rows_or_a_column_are_the_classes() -> None:
    images, labels = pictures(1)[0], np.arange(PART) % 10
    plain = Stored("mine", [images], [labels], 10)
    for rows in (np.eye(10)[labels], labels[:, None]):
        assert torch.equal(Stored("mine", [images], [rows], 10).labels, plain.labels)


# One pass


def test_a_permutation_is_one_for_every_size_and_key() -> None:
    for size in [1, 2, 3, 7, 64, 1000, 1025]:
        orders = [permute(np.arange(size), size, key) for key in (0, 1, -(2**63))]
        assert all(sorted(order.tolist()) == list(range(size)) for order in orders), size
    moved = np.abs(permute(np.arange(10_000), 10_000, 5) - np.arange(10_000))
    assert moved.mean() == pytest.approx(10_000 / 3, rel=0.05)  # of a random one
    follows = np.diff(permute(np.arange(10_000), 10_000, 5))
    assert np.mean(follows == 1) < 0.01


@pytest.mark.parametrize(("images", "held", "block"), [(1000, 100, 1), (1003, 100, 8), (5000, 1, 16), (96, 81, 8)])
def test_a_pass_and_the_held_out_part_together_are_all_images(images: int, held: int, block: int) -> None:
    order = Order(images, held, block)
    assert images - order.train >= held
    for seed in (0, 1):
        shown = order.at(np.arange(order.train), seed)
        hidden = order.held(np.arange(images - order.train))
        assert sorted([*shown.tolist(), *hidden.tolist()]) == list(range(images))
        # What was asked before does not matter.
        some = np.array([order.train - 1, 0, order.train // 2])
        assert order.at(some, seed).tolist() == shown[some].tolist()
    assert order.at(np.arange(order.train), 0).tolist() != order.at(np.arange(order.train), 1).tolist()


@pytest.mark.parametrize("size", [0, 5])
def test_a_place_outside_of_a_permutation_is_an_error_and_no_endless_walk(size: int) -> None:
    with pytest.raises(IndexError, match=rf"places 0 … 5 are not all in 0 … {size - 1}"):
        permute(np.array([0, 5]), size, 0)


def empty_held(folder: Path) -> dict[str, Callable[[], object]]:
    def flat() -> None:
        write_images(folder / "train", ["ant", "bee"], 3)
        (folder / "train" / "ant" / "ant_0.png").rename(_made(folder / "val") / "ant_0.png")
        imagefolder(folder, on_progress=quiet)

    def no_lines() -> None:
        write_images(folder / "train", ["ant", "bee"], 3, "images", ".JPEG")
        (_made(folder / "val") / "val_annotations.txt").write_text("\n")
        (folder / "wnids.txt").write_text("ant\nbee\n")
        imagefolder(folder, on_progress=quiet)

    images, labels = pictures(1)[0], labels_of(0)
    return {
        r"val has no images in class folders; put them into val/CLASS, or remove it": flat,
        r"val_annotations\.txt names no image": no_lines,
        r"mine: 0 held-out images of shape \(32, 32, 3\) with 0 labels; give at least one": lambda: Stored(
            "mine", [images], [labels], 10, held=(images[:0], labels[:0])
        ),
        r"mine: 3 held-out images of shape \(16, 32, 3\) with 3 labels": lambda: Stored(
            "mine", [images], [labels], 10, held=(images[:3, :16], labels[:3])
        ),
        r"list: held has no items; give some": lambda: FromDataset([(torch.zeros(1), 0)] * 3, 2, held=[]),
    }


@pytest.mark.parametrize("message", empty_held(Path()))
def test_a_held_out_part_that_is_empty_or_of_another_shape_is_told(tmp_path: Path, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        empty_held(tmp_path)[message]()


def test_blocks_stay_together_on_disk_and_yet_batches_are_mixed() -> None:
    order = Order(64 * 64 * 16, 64, 16)
    window = order.at(np.arange(64 * 16), 0)
    assert len(np.unique(window // 16)) == 64, "a window is whole blocks"
    assert len(np.unique(window[:128] // 16)) > 48, "a batch has images of many blocks"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_cifar(tmp_path)


def test_a_batch_is_the_same_in_whatever_chunk_after_whatever_and_from_another_object(folder: Path) -> None:
    stream = cifar5m(folder)
    whole = stream.batches(4, 0, 20, 5)
    stream.batches(5, 0, 1, 3)
    torch.manual_seed(9)
    for start, stop in [(0, 1), (3, 20), (19, 20)]:
        expected = (whole[0][start:stop], whole[1][start:stop])
        assert same(stream.batches(4, start, stop, 5), expected)
        assert same(cifar5m(folder).batches(4, start, stop, 5), expected)
    assert not same(stream.batches(5, 0, 1, 5), stream.batches(4, 0, 1, 5))
    assert same(stream.batches(5, 0, 1, 5, "held_out"), stream.batches(4, 0, 1, 5, "held_out"))


def test_the_next_chunk_is_asked_of_the_disk_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = cifar5m(folder, held_out=20)
    asked: list[list[int]] = []
    monkeypatch.setattr("gammaopt.online.streams._stored._read_ahead", lambda _, index: asked.append(index.tolist()))
    stream.batches(0, 0, 2, 7)
    ahead = asked[:2]  # before those of the chunk itself, from either part: the disk reads while these are copied
    asked.clear()
    stream.batches(0, 2, 4, 7)
    assert ahead == asked[2:]
    asked.clear()
    stream.batches(0, 0, 20, 5)
    assert len(asked) == 2, "nothing comes after the end of the pass"


def test_a_process_asks_the_disk_for_its_own_next_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = cifar5m(folder, held_out=20)
    asked: list[list[int]] = []
    monkeypatch.setattr("gammaopt.online.streams._stored._read_ahead", lambda _, index: asked.append(index.tolist()))
    shares = [Shard(stream, rank, 4) for rank in range(4)]
    for share in shares:
        share.batches(0, 0, 1, 5)
        ahead = asked[:2]  # of either part
        asked.clear()
        share.batches(0, 1, 2, 5)
        assert ahead == asked[2:], share.rank
        asked.clear()


def test_a_folder_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    for name in "ab":
        write_images(tmp_path / name, ["ant", "bee"], 10)
    first = next((tmp_path / "b").rglob("*.png"))
    names = [imagefolder(tmp_path / name, side=16, on_progress=quiet).name for name in "ab"]
    assert names[0] == names[1], "wherever it lies"
    assert re.fullmatch(r"imagefolder-[0-9a-f]{8}-side=16", names[0])
    first.write_bytes(first.read_bytes() + b"more")
    names += [imagefolder(tmp_path / "b", side=side, on_progress=quiet).name for side in (16, 20)]
    assert len(set(names)) == 3
    (tmp_path / "c").mkdir()
    stored = []
    for images, labels in [
        (pictures(1)[0], labels_of(0)),
        (255 - pictures(1)[0], labels_of(0)),
        (pictures(1)[0], labels_of(1)[::-1]),
    ]:
        np.savez(tmp_path / "c" / "part0.npz", X=images, Y=labels)
        stored.append(cifar5m(tmp_path / "c").name)
    assert len(set(stored)) == 3


def test_a_shared_cache_keeps_data_sets_apart(tmp_path: Path) -> None:
    when = 10**18
    for name, value in (("a", 15), ("b", 200)):
        for label in ("ant", "bee"):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(10):
                file = tmp_path / name / label / f"{i}.ppm"
                Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file)
                os.utime(file, ns=(when, when))  # the same names, sizes and times
    first = imagefolder(tmp_path / "a", side=8, cache=tmp_path / "cache", on_progress=quiet)
    second = imagefolder(tmp_path / "b", side=8, cache=tmp_path / "cache", on_progress=quiet)
    assert first.pixels(0, 0, 1, 4)[0].unique().tolist() == [15]
    assert second.pixels(0, 0, 1, 4)[0].unique().tolist() == [200]
    assert len(list((tmp_path / "cache").glob("train-8.*.npy"))) == 2
    assert first.name != second.name, "their pixels tell them apart"


def test_blocks_give_whole_passes_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gammaopt.online.streams._stored.SCATTERED", 0)
    monkeypatch.setattr("gammaopt.online.streams._stored.BLOCK", 4)
    is_whole(cifar5m(folder, held_out=20), 2 * PART)


def test_pixels_have_zero_mean_and_unit_variance_and_classes_are_even(folder: Path) -> None:
    stream = cifar5m(folder)
    x, y = stream.batches(0, 0, stream.train_samples // 4, 4)
    assert float(x.mean((0, 1, 3, 4)).abs().max()) < 0.01
    assert float((x.var((0, 1, 3, 4)) - 1).abs().max()) < 0.01
    assert float((torch.bincount(y.flatten()) / y.numel() - 0.1).abs().max()) < 0.03


@pytest.mark.parametrize("resident", [3072 * 50, 3072 * 61 + 5, 10**9])
def test_what_is_kept_on_the_device_changes_no_batch(folder: Path, resident: int) -> None:
    plain, kept = cifar5m(folder), cifar5m(folder, resident=resident)
    assert vars(kept)["_kept"] is None, "nothing is kept ahead of the first batch, on whichever device it is asked"
    assert same(kept.batches(2, 0, 10, 7), plain.batches(2, 0, 10, 7))
    assert len(vars(kept)["_kept"]) == min(2 * PART, resident // 3072)
    sent = pickle.dumps(kept)
    assert len(sent) < 20_000, "what is kept is not sent"
    assert same(pickle.loads(sent).batches(2, 0, 10, 7), plain.batches(2, 0, 10, 7))
    assert same(kept.batches(2, 0, 2, 7, "held_out"), plain.batches(2, 0, 2, 7, "held_out"))
    assert same(kept.to("cpu").batches(2, 0, 10, 7), plain.batches(2, 0, 10, 7))


def test_the_end_of_the_pass_is_an_error_before_the_first_step(folder: Path) -> None:
    stream = cifar5m(folder, held_out=20)
    message = r"cifar5m-\w+-held_out=20 has 100 training samples, 14 batches of 7; steps=15 is more than one pass"
    with pytest.raises(UsageError, match=message):
        stream.batches(0, 14, 15, 7)
    with pytest.raises(UsageError, match=message):
        Batches(stream, 0, 15, 7)
    assert Batches(stream, 0, 14, 7)[13][0].shape == (7, 3, 32, 32)


def test_a_pickled_stream_carries_no_images_and_finds_them_again(tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        stream = cifar5m(write_cifar(tmp_path / save.__name__, save), on_progress=quiet)
        sent = pickle.dumps(stream)
        assert len(sent) < 20_000
        assert same(pickle.loads(sent).batches(1, 0, 3, 5), stream.batches(1, 0, 3, 5))


@pytest.mark.parametrize("sent", [lambda s: s.to("cpu"), lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
@pytest.mark.parametrize("part", [slice(60, None), slice(60, 120, 2), slice(None, None, -1)])
def test_a_slice_of_a_mapped_file_stays_that_slice_wherever_it_goes(
    tmp_path: Path, part: slice, sent: Callable[[Stored], Stored]
) -> None:
    np.save(tmp_path / "a.npy", np.concatenate(pictures(2)))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    labels = np.arange(2 * PART) % 10
    stream = Stored("mine", [mapped[part]], [labels[part]], 10, held=(mapped[30:60], labels[30:60]))
    twin = sent(stream)
    for split in ("train", "held_out"):
        assert same(twin.batches(0, 0, 5, 6, split), stream.batches(0, 0, 5, 6, split))
    shown = numbers(stream, stream.batches(0, 0, 5, 6)[0])
    assert set(shown) <= set(np.arange(2 * PART)[part].tolist())
    batches = Batches(stream, 0, 5, 6)
    assert [n for step in range(5) for n in numbers(stream, batches[step][0][None])] == shown


def test_the_bytes_asked_for_ahead_are_those_of_the_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.concatenate(pictures(2)))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, begin, count, __: asked.append((begin, begin + count)))
    _read_ahead(mapped[60:], np.arange(3))
    _read_ahead(mapped[60::2], np.arange(3))  # not in one piece: nothing is asked for
    begin = mapped.offset + 60 * 3072
    assert asked == [(begin, begin + 3 * 3072)]


def test_two_processes_never_see_the_same_sample_in_one_pass(folder: Path) -> None:
    script = (
        "import hashlib, sys\nfrom gammaopt.online.streams import Shard, cifar5m, Parity\n"
        "for stream in (cifar5m(sys.argv[1]), Parity(64, 2)):\n"
        "    x, y = Shard(stream, int(sys.argv[2]), 2).batches(0, 0, 9, 6)\n"
        "    print(*(hashlib.md5(row.numpy().tobytes()).hexdigest() for row in x.flatten(0, 1)))\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(folder), str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    seen = [process.communicate()[0].splitlines() for process in running]
    for mine, theirs in zip(*seen, strict=True):
        assert len(mine.split()) == len(theirs.split()) == 54
        assert len({*mine.split(), *theirs.split()}) == 108


def test_shares_together_are_the_whole_stream(folder: Path) -> None:
    stream = cifar5m(folder)
    whole = stream.batches(0, 0, 12, 4)
    for rank in range(3):
        share = Shard(stream, rank, 3)
        assert same(share.batches(0, 0, 4, 4), (whole[0][rank::3], whole[1][rank::3]))
        assert same(share.batches(0, 0, 1, 4, "held_out"), stream.batches(0, 0, 1, 4, "held_out"))
    with pytest.raises(UsageError, match="rank=3 is outside 0 … 2"):
        Shard(stream, 3, 3)
    with pytest.raises(UsageError, match="more than one pass"):
        Shard(stream, 2, 3).batches(0, 0, 10, 4)
    # 108 samples are 27 batches of 4: of two processes one would have 14 and wait for the other, which has 13.
    for rank in range(2):
        assert Shard(stream, rank, 2).batches(0, 12, 13, 4)[1].shape == (1, 4)
        message = r"cifar5m-\w+ has 108 training samples, 13 batches of 4 for each of 2 processes; steps=14 is more"
        with pytest.raises(UsageError, match=message):
            Shard(stream, rank, 2).batches(0, 13, 14, 4)
        with pytest.raises(UsageError, match=message):
            Batches(Shard(stream, rank, 2), 0, 14, 4)


# A user's own


def test_a_map_style_data_set_is_shown_once_in_a_pass_and_held_out_apart() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(100.0)[:, None], torch.arange(100) % 7)
    stream = FromDataset(data, 7, held_out=20)
    assert (stream.name, stream.shape) == ("tensordataset-held_out=20", (1,))
    x, y = stream.batches(0, 0, 20, 4)
    held = stream.batches(0, 0, 5, 4, "held_out")[0]
    assert sorted([*x.flatten().tolist(), *held.flatten().tolist()]) == list(range(100))
    assert torch.equal(x.flatten().long() % 7, y.flatten())
    assert same(stream.batches(0, 3, 5, 4), (x[3:5], y[3:5]))
    with pytest.raises(UsageError, match="tensordataset-held_out=20 has 80 training samples, 20 batches of 4"):
        stream.batches(0, 20, 21, 4)


def test_an_iterable_is_read_in_its_order_and_begun_anew_for_an_earlier_step() -> None:
    pairs = [(np.full(3, i, np.float32), 0.5 * i) for i in range(60)]
    stream = FromIterable(pairs, 0, held_out=12, name="mine")
    x, y = stream.batches(0, 0, 12, 4)
    assert x[..., 0].flatten().tolist() == list(range(12, 60))
    assert y.flatten().tolist() == [0.5 * i for i in range(12, 60)]
    assert same(stream.batches(7, 2, 4, 4), (x[2:4], y[2:4]))
    assert stream.batches(0, 0, 2, 6, "held_out")[0][..., 0].flatten().tolist() == list(range(12))
    with pytest.raises(
        UsageError, match=r"mine-held_out=12 ended after 48 training samples, 12 batches of 4; steps=13 is more"
    ):
        stream.batches(0, 11, 13, 4)
    once = FromIterable(iter(pairs), 0, held_out=2)
    once.batches(0, 0, 3, 4)
    with pytest.raises(UsageError, match="is an iterator and 12 of its samples are gone"):
        once.batches(0, 0, 1, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(torch.zeros(2), 5)] * 20, "target 5 is no class 0 … 2"),
        ([torch.zeros(3)] * 20, "an item is Tensor, not a pair"),
        ([("text", 1)] * 20, "not a pair of an input and a target of numbers"),
        ([(torch.zeros(2), 1)] * 1, "has 1 items; held_out=1 of them leaves none"),
        ([(torch.zeros(2 + i % 2), 1) for i in range(20)], r"inputs have shapes \(2,\) and \(3,\); make them one size"),
    ],
)
def test_a_data_set_of_something_else_is_told(data: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FromDataset(data, 3).batches(0, 0, 4, 4)


class Items(torch.utils.data.IterableDataset[Any]):
    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(2), 1)] * 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FromDataset(Items(), 3), r"dataset is Items, which has no length or no items by number; give a map"),
        (
            lambda: FromDataset([(torch.zeros(2), torch.zeros(3))] * 20, 0),
            r"a target has shape \(3,\); give",
        ),
        (lambda: FromIterable([(torch.zeros(2), 1)] * 10, 3, held_out=10), "has 10 samples; held_out=10 leaves none"),
        (
            lambda: Stored("mine", [np.zeros((20, 4), np.uint8)], [np.zeros(20)], 2),
            r"mine: images have shape \(4,\); give",
        ),
        (lambda: Stored("mine", [np.zeros((20, 4, 4), np.uint8)], [], 2), "1 arrays of images with 0 of labels"),
        (lambda: Shard(Parity(), 0, 4).batches(0, 3, 3, 4), "start=3, stop=3 asks for no batch; give stop > start"),
        (lambda: FromDataset([(torch.zeros(2), 1)] * 20, 3).batches(0, 2, 1, 4), "start=2, stop=1 asks for no batch"),
    ],
)
def test_a_mistake_names_the_value_and_the_fix(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_held_out_is_in_the_name_of_a_users_data() -> None:
    pairs = [(torch.zeros(2), 1)] * 50
    made = [FromDataset(pairs, 3, held_out=20), FromDataset(pairs, 3, held_out=30), FromDataset(pairs, 3)]
    assert [stream.name for stream in made] == ["list-held_out=20", "list-held_out=30", "list"]
    assert FromIterable(pairs, 3, held_out=5).name == "list-held_out=5"


def test_an_iterable_that_shuffles_is_refused_before_it_trains_on_what_is_held_out() -> None:
    class Shuffled:
        turn = 0

        def __iter__(self) -> Iterator[Any]:
            self.turn += 1
            return iter([(torch.tensor([float(i)]), 0) for i in np.random.default_rng(self.turn).permutation(50)])

    stream = FromIterable(Shuffled(), 2, held_out=10)
    stream.batches(0, 0, 2, 4)
    with pytest.raises(UsageError, match="shuffled-held_out=10 began anew with other samples than before"):
        stream.batches(0, 0, 1, 4)


def test_members_tell_where_arrays_lie(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=np.arange(6).reshape(2, 3), f=np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    held = members(tmp_path / "a.npz")
    assert np.array_equal(held["X"].mapped(), np.arange(6).reshape(2, 3))
    assert np.array_equal(held["f"].mapped(), np.arange(6.0).reshape(2, 3))
    assert b"".join(held["X"].pieces()) == np.arange(6).tobytes()


def test_what_a_test_set_of_its_own_and_too_few_images_mean_for_held_out_is_said() -> None:
    images, labels = np.zeros((9, 8, 8), np.uint8), np.zeros(9, np.int64)
    with pytest.raises(UsageError, match="mine has 9 images, too few to hold a tenth of them out; give more"):
        Stored("mine", [images], [labels], 2)
    assert Stored("mine", [images], [labels], 2, held_out=3).name == "mine-held_out=3"
    with pytest.raises(UsageError, match="held_out=3 is given, and the data has a test set of 9 images of its own"):
        Stored("mine", [images], [labels], 2, held=(images, labels), held_out=3)
