"""``gammaopt data check`` tells what is there and every problem, not only the first, and leaves the folder alone."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gammaopt import UsageError
from gammaopt._data_command import Checked, check_folder
from gammaopt.online.streams import cifar5m, mnist1m
from gammaopt.online.streams._stored import order_of

N = 50


def cifar(folder: Path, parts: int = 3, compressed: bool = False) -> None:
    draw = np.random.default_rng(0)
    for i in range(parts):
        save = np.savez_compressed if compressed else np.savez
        save(folder / f"part{i}.npz", X=draw.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8), Y=np.arange(N) % 10)


def checked(folder: Path, fast: bool = False) -> Checked:
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    made = check_folder(folder, fast=fast, on_progress=lambda _: None)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    assert max(map(len, str(made).replace(str(folder), "").splitlines())) < 200
    return made


@pytest.mark.parametrize("compressed", [False, True])
def test_a_sound_folder(tmp_path: Path, compressed: bool) -> None:
    cifar(tmp_path, compressed=compressed)
    made = checked(tmp_path)
    assert made.problems == []
    text = str(made)
    assert text.startswith(f"{tmp_path}: CIFAR-5M (stream 'cifar5m')")
    how = "converted at first use" if compressed else "mapped in place"
    assert f"  part1.npz: 50 images, 0.2 MB, {how}" in text
    assert "150 sound images: one pass shows 135, 15 are held out" in text
    assert "10 classes, from 10.00 % to 10.00 % of images" in text
    assert text.endswith("Nothing is wrong.")


def test_every_problem_is_told_and_what_is_sound_is_counted(tmp_path: Path) -> None:
    cifar(tmp_path, 6, compressed=True)
    (tmp_path / "part0.npz").unlink()
    content = (tmp_path / "part1.npz").read_bytes()
    (tmp_path / "part1.npz").write_bytes(content[:1000])
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    (tmp_path / "part2.npz").write_bytes(flipped)
    np.savez(tmp_path / "part3.npz", X=np.zeros((N, 32, 32, 3), np.uint8), Y=np.arange(N))
    made = checked(tmp_path)
    assert made.images == 2 * N
    told = "\n".join(made.problems)
    assert len(made.problems) == 4
    assert "there are parts up to 5, but not 0" in told
    assert "part1.npz is cut off, or no npz file: its 1,000 bytes" in told
    assert "part2.npz:X is damaged after" in told
    assert "part3.npz:Y has labels from 0 to 49, outside 0 … 9" in told
    assert str(made).endswith("4 problems found.")


def test_a_flipped_bit_in_a_stored_member_is_found_unless_told_to_be_fast(tmp_path: Path) -> None:
    cifar(tmp_path, 1)
    content = bytearray((tmp_path / "part0.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "part0.npz").write_bytes(content)
    (problem,) = checked(tmp_path).problems
    assert f"part0.npz:X is damaged after 0 of {N * 3072:,} bytes (Bad CRC-32" in problem
    assert f"the file has {len(content):,} bytes" in problem
    assert checked(tmp_path, fast=True).problems == []


@pytest.mark.parametrize("form", ["stored", "compressed", "mnist"])
def test_whatever_few_bytes_are_changed_the_check_ends_and_names_the_file(tmp_path: Path, form: str) -> None:
    draw = np.random.default_rng(0)
    name = "MNIST_images_0.npy" if form == "mnist" else "part0.npz"
    if form == "mnist":
        np.save(tmp_path / name, np.zeros((10, 28, 28), np.uint8))
        np.save(tmp_path / "MNIST_labels_0.npy", np.arange(10))
    else:
        save = np.savez if form == "stored" else np.savez_compressed
        save(tmp_path / name, X=np.zeros((10, 32, 32, 3), np.uint8), Y=np.arange(10))
    content = (tmp_path / name).read_bytes()
    ends = [*range(min(200, len(content))), *range(max(0, len(content) - 700), len(content))]  # headers, directory
    found = 0
    for _ in range(400):
        spoilt = bytearray(content)
        for place in draw.choice(ends, draw.integers(1, 5)):
            spoilt[place] = draw.integers(256)
        (tmp_path / name).write_bytes(spoilt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of a header from Python 2
            made = check_folder(tmp_path, fast=False, on_progress=lambda _: None)
        assert all(name in problem for problem in made.problems), made.problems
        found += bool(made.problems)
    assert found > (20 if form == "mnist" else 200)


def test_the_sizes_of_a_split_that_the_folder_itself_has_are_told(tmp_path: Path) -> None:
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 12)):
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + bytes(count * 784))
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    assert "30 sound images: one pass shows 30, 12 are held out" in str(checked(tmp_path / "mnist"))
    tiny = tmp_path / "tiny"
    (tiny / "val" / "images").mkdir(parents=True)
    image = Image.fromarray(np.zeros((9, 9, 3), np.uint8))
    for name in ("ant", "bee"):
        (tiny / "train" / name / "images").mkdir(parents=True)
        for i in range(4):
            image.save(tiny / "train" / name / "images" / f"{i}.JPEG")
        image.save(tiny / "val" / "images" / f"{name}.JPEG")
    (tiny / "val" / "val_annotations.txt").write_text("ant.JPEG\tant\nbee.JPEG\tbee\n")
    text = str(checked(tiny))
    assert "TinyImageNet (stream 'imagefolder')" in text
    assert "8 sound images: one pass shows 8, 2 are held out" in text
    assert text.endswith("Nothing is wrong.")


def test_an_image_too_large_to_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("ant", "bee"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / folder / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    problems = checked(tmp_path).problems
    assert len(problems) == 2
    assert "0.png" in problems[0]
    assert "can't be decoded: Image size (1600 pixels) exceeds limit" in problems[0]


def test_a_page_in_place_of_mnist_is_told(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for what in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{what}-ubyte").write_bytes(b"<!DOCTYPE html><html><body>moved</body></html>")
    (problem,) = checked(tmp_path).problems
    assert f"{tmp_path} does not hold MNIST as torchvision keeps it" in problem


def test_image_files(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(np.full((9, 7, 3), 20 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    assert checked(tmp_path).problems == []
    (tmp_path / "bee" / "4.png").write_bytes((tmp_path / "bee" / "4.png").read_bytes()[:50])
    (tmp_path / "ant" / "2.png").write_bytes(b"")
    made = checked(tmp_path)
    assert len(made.problems) == 2
    assert "2.png (0 bytes) can't be decoded" in made.problems[0]
    assert made.images == 18
    assert checked(tmp_path, fast=True).problems == []


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (np.linspace(-2, 2, 20 * 784), "has pixels from -2 to 2, neither −1 … 1, 0 … 1 nor 0 … 255"),
        (np.full(20 * 784, np.nan), "has pixels that are no numbers"),
        (np.zeros(20 * 784, bool), "is bool; MNIST-1M has uint8, or floats from 0 to 1"),
    ],
    ids=["standardised", "nan", "bool"],
)
def test_images_that_the_stream_refuses_are_a_problem(
    tmp_path: Path, images: np.ndarray, problem: str, save: Callable[..., None]
) -> None:
    save(tmp_path / "MNIST_images_0.npz", images.reshape(20, 28, 28))
    np.save(tmp_path / "MNIST_labels_0.npy", np.arange(20) % 10)
    with pytest.raises(UsageError, match=problem):
        mnist1m(tmp_path, cache=tmp_path.with_name(f"{tmp_path.name}-cache"), on_progress=lambda _: None)
    made = checked(tmp_path)
    (told,) = made.problems
    assert problem in told
    assert made.images == 0


def test_too_few_images_are_a_problem(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    made = checked(tmp_path)
    assert made.problems == [
        "imagefolder has 8 images, too few to hold a tenth of them out; give more, or held_out= how many"
    ]
    assert "8 sound images" in str(made)
    assert "0 are held out" not in str(made)


def test_the_numbers_of_a_pass_are_those_of_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert order_of("cifar5m", 6_000_000, 3072).train == 6_000_000 - 10_112  # whole blocks
    monkeypatch.setattr("gammaopt.online.streams._stored.SCATTERED", 0)
    monkeypatch.setattr("gammaopt.online.streams._stored.BLOCK", 4)
    cifar(tmp_path)
    stream = cifar5m(tmp_path)
    assert (stream.train_samples, stream.held_samples) == (132, 18)
    assert "150 sound images: one pass shows 132, 18 are held out" in str(checked(tmp_path))


def test_a_broken_image_of_a_held_out_part_is_not_counted(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "val" / "ant" / "0.png").write_bytes(b"no image")
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"no image")
    text = str(checked(tmp_path))
    assert "5 sound images: one pass shows 5, 3 are held out" in text
    assert "2 classes, from 40.00 % to 60.00 % of images" in text


def test_a_folder_of_something_else_is_one_line() -> None:
    with pytest.raises(UsageError, match="none of the known layouts"):
        check_folder(Path(__file__).parent, fast=True, on_progress=lambda _: None)


@pytest.mark.parametrize(("spoil", "code"), [(lambda _: None, 0), (lambda f: os.truncate(f / "part0.npz", 99), 1)])
def test_the_command_exits_with_1_if_something_is_wrong(
    tmp_path: Path, spoil: Callable[[Path], None], code: int
) -> None:
    cifar(tmp_path, 2)
    spoil(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "gammaopt", "data", "check", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert ("Nothing is wrong." if code == 0 else "1 problem found.") in done.stdout
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_not_there_is_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gammaopt", "data", "check", "nowhere"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gammaopt: nowhere is not there; give the folder that holds the data\n"
