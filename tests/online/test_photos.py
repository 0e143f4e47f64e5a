"""Photo crops: each is a window of one photograph, no pixel is seen in both splits, and the knobs do what they say."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gammaopt import UsageError
from gammaopt.online import build_stream
from gammaopt.online.streams import Photos, Split
from gammaopt.online.streams._photos import DEFAULTS, DIGESTS, MEAN, PHOTOGRAPHS, SIDE, STD, read, stripes

SPLITS: tuple[Split, ...] = ("train", "held_out")


@pytest.fixture(scope="module")
def photos() -> Photos:
    return Photos()


@pytest.fixture(scope="module")
def plain() -> Photos:
    return Photos(colour=0, brightness=0, noise=0)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def unscaled(pixels: Tensor) -> Tensor:
    """From zero mean and unit variance back to 0 … 1."""
    return pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [1, 5])
def test_a_batch_is_the_same_bit_for_bit_in_whatever_chunk_it_is_asked(photos: Photos, size: int, split: Split) -> None:
    inputs, labels = photos.batches(3, 0, 30, size, split)
    assert inputs.shape == (30, size, 3, 32, 32)
    assert inputs.dtype == torch.float32
    assert labels.dtype == torch.int64
    for start, stop in [(0, 1), (3, 30), (29, 30)]:
        assert same(photos.batches(3, start, stop, size, split), (inputs[start:stop], labels[start:stop]))


def test_another_object_threads_and_the_global_generator_do_not_matter(photos: Photos) -> None:
    first, threads = photos.batches(0, 4, 8, 20), torch.get_num_threads()
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert same(build_stream("photos").batches(0, 4, 8, 20), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_no_crop_comes_twice_in_a_pass_nor_in_another_seed_or_split(photos: Photos) -> None:
    parts = [photos.windows(0, 0, 60, 32), photos.windows(1, 0, 2, 32), photos.windows(0, 0, 2, 32, "held_out")]
    rows = torch.cat([windows.flatten(0, 1) for windows, _ in parts])
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_every_crop_is_its_window_of_the_photograph_interpolated(plain: Photos) -> None:
    # The reference looks up each pixel by itself, in float64.
    for split in SPLITS:
        windows, labels = plain.windows(1, 0, 1, 12, split)
        pixels = unscaled(plain.batches(1, 0, 1, 12, split)[0][0]).double().numpy()
        for crop, (x, y, side, top), label in zip(pixels, windows[0].tolist(), labels[0].tolist(), strict=True):
            image = read(list(PHOTOGRAPHS)[label]).double().numpy()
            expected = np.empty_like(crop)
            for i in range(SIDE):
                for j in range(SIDE):
                    turned = j if side > 0 else SIDE - 1 - j
                    across = x + abs(side) * (turned + 0.5) / SIDE - 0.5
                    down = y - top + abs(side) * (i + 0.5) / SIDE - 0.5
                    a, b = math.floor(across), math.floor(down)
                    u, v = across - a, down - b
                    expected[:, i, j] = (
                        (1 - u) * (1 - v) * image[:, b, a]
                        + u * (1 - v) * image[:, b, a + 1]
                        + (1 - u) * v * image[:, b + 1, a]
                        + u * v * image[:, b + 1, a + 1]
                    )
            np.testing.assert_allclose(crop, expected, atol=2e-3)


@pytest.mark.parametrize("asked", SPLITS)
def test_no_pixel_of_the_other_split_is_ever_touched(asked: Split) -> None:
    stream = Photos()
    expected = stream.batches(0, 0, 40, 32, asked)
    poisoned: Split = "held_out" if asked == "train" else "train"
    top = 0
    for name in PHOTOGRAPHS:
        shape = read(name).shape
        for stripe in stripes(shape, held_out=poisoned == "held_out"):
            stream._atlas[:, top + stripe.top : top + stripe.bottom, stripe.left : stripe.right] = math.nan
        top += shape[1]
    assert same(stream.batches(0, 0, 40, 32, asked), expected)
    assert bool(stream.batches(0, 0, 1, 32, poisoned)[0].isnan().all())


def test_stripes_cover_the_photograph_and_those_held_out_are_about_a_third() -> None:
    for name in PHOTOGRAPHS:
        shape = read(name).shape
        seen = np.zeros(shape[1:], int)
        for held_out in (False, True):
            for s in stripes(shape, held_out=held_out):
                seen[s.top : s.bottom, s.left : s.right] += 1 + 9 * held_out
        assert set(np.unique(seen)) == {1, 10}, name
        assert 0.25 < (seen == 10).mean() < 0.4, name


def test_pixels_have_about_zero_mean_and_unit_variance_and_classes_are_even(photos: Photos) -> None:
    for split, mean, variance in [("train", 0.03, 0.06), ("held_out", 0.15, 0.2)]:
        inputs, labels = photos.batches(2, 0, 60, 64, split)  # type: ignore[arg-type]
        assert float(inputs.mean((0, 1, 3, 4)).abs().max()) < mean, split
        assert float((inputs.var((0, 1, 3, 4)) - 1).abs().max()) < variance, split
        assert float((torch.bincount(labels.flatten(), minlength=10) / labels.numel() - 0.1).abs().max()) < 0.02


def test_knobs_widen_what_they_name() -> None:
    def sides(**knobs: object) -> Tensor:
        return Photos(3, **knobs).windows(0, 0, 8, 64)[0][..., 2]  # type: ignore[arg-type]

    assert float((sides() < 0).float().mean()) == pytest.approx(0.5, abs=0.08)
    assert float(sides(flip=False).min()) >= 32
    assert float(sides(scale=(1.0, 1.0)).abs().max()) == 32
    assert float(sides(scale=(1.5, 2.0)).abs().min()) >= 48
    base = Photos(3, colour=0, brightness=0, noise=0).batches(0, 0, 1, 64)[0]
    for knob in ("colour", "brightness", "noise"):
        knobs: dict[str, Any] = {"colour": 0.0, "brightness": 0.0, "noise": 0.0, knob: 0.2}
        changed = Photos(3, **knobs).batches(0, 0, 1, 64)[0]
        difference = (changed - base) * torch.tensor(STD)[:, None, None]
        if knob == "noise":
            assert float(difference.std()) == pytest.approx(0.2, rel=0.02)
        if knob == "brightness":  # the same for all pixels of a crop
            assert float(difference.std((-3, -2, -1)).max()) < 1e-5
            assert 0.19 < float(difference.abs().max()) <= 0.2 + 1e-5
        if knob == "colour":
            gain = (unscaled(changed) / unscaled(base).clamp(min=0.05)).log()[unscaled(base) > 0.05]
            assert 0.19 < float(gain.abs().max()) <= 0.2 + 1e-3
    assert int(Photos(3).batches(0, 0, 4, 64)[1].max()) == 2


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"classes": 11}, "classes=11 is more than there are photographs; give at most 10"),
        ({"classes": 1}, "classes=1 is too small"),
        ({"scale": (2.0, 1.0)}, r"scale=\(2.0, 1.0\) must be two numbers, the lower first, between 1 and 2"),
        ({"scale": (1.0, 3.0)}, "between 1 and 2"),
        ({"scale": (1.0, 1.5, 2.0)}, r"scale=\(1.0, 1.5, 2.0\) must be two numbers"),
        ({"scale": 1.5}, r"scale=1.5 must be two numbers"),
        ({"noise": "0.1"}, "noise='0.1' is not a number; give a finite noise >= 0"),
        ({"noise": -1.0}, "noise=-1 is not allowed; give a finite noise >= 0"),
        ({"colour": math.nan}, "colour=nan is not allowed; give a finite colour >= 0"),
        ({"blur": 1.0}, "stream 'photos' has no knob 'blur'"),
    ],
)
def test_a_mistake_names_the_value_and_the_fix(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_stream("photos", **knobs)


def test_other_knobs_are_in_the_name(photos: Photos) -> None:
    assert photos.name == Photos(scale=[1.0, 2.0]).name == "photos"
    other = Photos(3, scale=(1.0, 1.25), noise=0.03, flip=False)
    assert other.name == "photos-classes=3-scale=1:1.25-noise=0.03-flip=False"
    signature = inspect.signature(Photos).parameters
    assert {name: signature[name].default for name in DEFAULTS} == DEFAULTS


def test_pixels_are_pinned(photos: Photos) -> None:
    pixels = photos.batches(7, 3, 4, 2)[0]
    assert pixels[0, 0, :, 16, 16].tolist() == pytest.approx([-0.7305, -0.2440, -0.8899], abs=1e-3)


def test_a_photograph_with_other_pixels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIGESTS, "coffee.png", "0" * 16)
    with pytest.raises(
        UsageError, match=r"coffee\.png is another file than it was, with other pixels; reinstall skimage"
    ):
        Photos()
