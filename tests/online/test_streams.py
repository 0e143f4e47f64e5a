"""Streams are stateless: a batch depends on (seed, step, size, split) alone, and no sample ever comes twice."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from gammaopt import UsageError
from gammaopt.online import Digits, Staircase, Stream
from gammaopt.online.streams import Batches, Split, _random

SPLITS: tuple[Split, ...] = ("train", "held_out")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(params=["digits", "staircase"])
def stream(request: pytest.FixtureRequest, digits: Digits) -> Stream:
    return digits if request.param == "digits" else Staircase(bits=20, terms=3)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [1, 5, 32])
def test_a_batch_is_the_same_bit_for_bit_in_whatever_chunk_it_is_asked(stream: Stream, size: int, split: Split) -> None:
    inputs, targets = stream.batches(3, 0, 12, size, split)
    for start, stop in [(0, 1), (0, 7), (3, 4), (3, 12), (11, 12), (5, 6)]:
        chunk = stream.batches(3, start, stop, size, split)
        assert same(chunk, (inputs[start:stop], targets[start:stop])), (start, stop)


def test_what_was_asked_before_and_the_global_generator_do_not_matter(stream: Stream) -> None:
    first = stream.batches(0, 4, 6, 8)
    torch.manual_seed(123)
    stream.batches(9, 0, 3, 8)
    before = torch.get_rng_state()
    assert same(stream.batches(0, 4, 6, 8), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_do_not_depend_on_the_number_of_threads(stream: Stream) -> None:
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            made.append(stream.batches(5, 0, 64, 32))
    finally:
        torch.set_num_threads(threads)
    assert same(*made)


def test_seeds_steps_and_splits_give_different_samples(stream: Stream) -> None:
    base = stream.batches(0, 0, 1, 16)[0]
    others = {
        "seed": stream.batches(1, 0, 1, 16)[0],
        "step": stream.batches(0, 1, 2, 16)[0],
        "split": stream.batches(0, 0, 1, 16, "held_out")[0],
        # (1, 11) and (11, 1) must not be glued into the same key.
        "seed 1, step 11": stream.batches(1, 11, 12, 16)[0],
        "seed 11, step 1": stream.batches(11, 1, 2, 16)[0],
    }
    drawn = {"base": base, **others}
    for name, a in drawn.items():
        for other, b in drawn.items():
            assert name == other or not torch.equal(a, b), (name, other)


def test_shapes_and_types_are_those_the_stream_announces(stream: Stream) -> None:
    inputs, targets = stream.batches(0, 2, 5, 7)
    assert inputs.shape == (3, 7, *stream.shape)
    assert targets.shape == (3, 7)
    assert inputs.dtype == torch.float32
    assert targets.dtype == (torch.int64 if stream.classes else torch.float32)


def test_no_digit_is_shown_twice_in_a_pass(digits: Digits) -> None:
    inputs, _ = digits.batches(0, 0, 200, 32)
    assert len(torch.unique(inputs.flatten(0, 1).flatten(1), dim=0)) == 200 * 32


def test_no_two_steps_of_a_long_pass_share_a_key(digits: Digits) -> None:
    # These two had the same low 32 bits of their hash, all that torch's generator keeps: one batch, twice.
    assert not same(digits.batches(0, 27_219, 27_220, 8), digits.batches(0, 57_902, 57_903, 8))
    keys = _random.keys(0, 0, 100_000, "train", torch.device("cpu"), "digit")
    assert len(torch.unique(keys)) == 100_000


def test_digits_have_about_zero_mean_and_unit_variance(digits: Digits) -> None:
    for split in SPLITS:
        pixels = digits.batches(1, 0, 300, 32, split)[0]
        # Base images, not pixels, are independent: 360 held-out ones leave about a per cent of the mean.
        assert abs(float(pixels.mean())) < 0.03, split
        assert abs(float(pixels.var()) - 1) < 0.04, split


def test_digits_show_every_class_about_equally_often_and_stay_within_it(digits: Digits) -> None:
    labels = digits.batches(2, 0, 100, 32)[1].flatten()
    shares = torch.bincount(labels, minlength=10) / len(labels)
    assert len(shares) == 10
    assert float((shares - 0.1).abs().max()) < 0.025


def test_base_images_are_split_by_index_and_none_is_lost(digits: Digits) -> None:
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    labels = torch.as_tensor(bunch.target)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[4::5] = True
    assert same(digits._base["train"], (images[~held_out], labels[~held_out]))
    assert same(digits._base["held_out"], (images[held_out], labels[held_out]))
    rows = torch.cat([digits._base[split][0].flatten(1) for split in SPLITS])
    assert len(torch.unique(rows, dim=0)) == len(labels), "an image stands in both parts"


@pytest.mark.parametrize(("asked", "poisoned"), [("train", "held_out"), ("held_out", "train")])
def test_a_split_is_drawn_from_its_own_base_images_only(asked: Split, poisoned: Split) -> None:
    stream = Digits()
    expected = stream.batches(0, 0, 20, 32, asked)
    images, labels = stream._base[poisoned]
    stream._base[poisoned] = (torch.full_like(images, torch.nan), labels)
    assert same(stream.batches(0, 0, 20, 32, asked), expected)
    assert bool(stream.batches(0, 0, 1, 32, poisoned)[0].isnan().any())


def test_an_augmented_digit_is_still_recognisable_by_its_nearest_base_image(digits: Digits) -> None:
    # Centre of the canvas against the base images: labels that were shuffled, or a map inside out, would give chance.
    inputs, labels = digits.batches(0, 0, 10, 32)
    shown = inputs.flatten(0, 1)[:, 0, 2:10, 2:10].flatten(1)
    base, base_labels = digits._base["train"]
    shown, known = (x - x.mean(1, keepdim=True) for x in (shown, base.flatten(1)))
    nearest = torch.argmax(shown / shown.norm(dim=1, keepdim=True) @ (known / known.norm(dim=1, keepdim=True)).T, 1)
    assert float((base_labels[nearest] == labels.flatten()).float().mean()) > 0.5


@pytest.mark.parametrize(("bits", "terms"), [(32, 4), (5, 5), (3, 1)])
def test_staircase_target_is_the_scaled_sum_of_the_first_k_parities(bits: int, terms: int) -> None:
    inputs, targets = Staircase(bits, terms).batches(7, 0, 3, 10)
    assert set(inputs.unique().tolist()) == {-1.0, 1.0}
    for x, y in zip(inputs.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        total, parity = 0.0, 1.0
        for bit in x[:terms]:
            parity *= bit
            total += parity
        assert y == pytest.approx(total / terms**0.5)


@pytest.mark.parametrize("terms", [1, 4])
def test_staircase_target_has_mean_zero_and_unit_variance(terms: int) -> None:
    _, targets = Staircase(32, terms).batches(0, 0, 200, 256)
    assert abs(float(targets.mean())) < 0.02
    assert abs(float(targets.var()) - 1) < 0.02


@pytest.mark.parametrize(
    ("bits", "terms", "message"),
    [
        (0, 1, "bits=0 is too small; give at least 1"),
        (8, 0, "terms=0 is too small; give at least 1"),
        (3, 4, "terms=4 is more than bits=3; give at most 3"),
        (2.5, 1, "bits=2.5 is not a whole number; give an integer >= 1"),
        (True, 1, "bits=True is not a whole number"),
    ],
)
def test_bad_staircase_sizes_name_the_value_and_the_fix(bits: int, terms: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Staircase(bits, terms)


class Counted:
    """A stream that notes which chunks it was asked for."""

    name = "counted"
    shape: tuple[int, ...] = (6,)
    classes = 0

    def __init__(self) -> None:
        self.inner, self.asked = Staircase(6, 2), list[tuple[int, int]]()

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        self.asked.append((start, stop))
        return self.inner.batches(seed, start, stop, size, split)


ORDER = [0, 149, 1, 63, 64, 130, 2, 128, 127, 0]


def test_kept_batches_and_batches_made_anew_have_the_same_values() -> None:
    stream = Staircase(6, 2)
    kept, anew = Batches(stream, 4, 150, 3), Batches(stream, 4, 150, 3, keep_bytes=0)
    for step in ORDER:
        inputs, targets = stream.batches(4, step, step + 1, 3)
        for batches in (kept, anew):
            assert same(batches[step], (inputs[0], targets[0])), step


def test_a_pass_that_fits_is_made_once_and_never_beyond_its_end() -> None:
    stream = Counted()
    batches = Batches(stream, 0, 150, 3)
    for step in ORDER:
        batches[step]
    assert sorted(stream.asked) == [(0, 64), (64, 128), (128, 150)]


def test_a_pass_that_does_not_fit_keeps_one_chunk() -> None:
    stream = Counted()
    batches = Batches(stream, 0, 150, 3, keep_bytes=4 * 150 * 3 * 6 - 1)
    for step in [0, 63, 64, 65, 0]:
        batches[step]
    assert stream.asked == [(0, 64), (64, 128), (0, 64)]


@pytest.mark.parametrize("step", [-1, 10, 64])
def test_a_step_outside_the_pass_is_an_index_error_that_says_the_range(step: int) -> None:
    with pytest.raises(IndexError, match=rf"step {step} is outside 0 … 9"):
        Batches(Staircase(6, 2), 0, 10, 3)[step]
