"""Targets made on the device: each is its formula, mean 0 and variance 1, and the global generator plays no part."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import hermite_e
from torch import Tensor

from gammaopt import UsageError
from gammaopt.online import Digits, Hermite, Parity, Photos, Staircase, Stream, Teacher, build_stream
from gammaopt.online.streams import Split, _random
from gammaopt.online.streams._order import Order

MULTI = ((1,), (1, 1), (1, 0, 2))
STREAMS_HERE: dict[str, Stream] = {
    "parity": Parity(20, 3),
    "staircase": Staircase(20, 3),
    "hermite": Hermite(12, MULTI),
    "teacher-mlp": Teacher((12,), 0, width=8),
    "teacher-cnn": Teacher((3, 8, 8), 4, network="cnn", width=4, depth=3),
}
SPLITS: tuple[Split, ...] = ("train", "held_out")


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.fixture(params=STREAMS_HERE)
def stream(request: pytest.FixtureRequest) -> Stream:
    return STREAMS_HERE[request.param]


def split_mix(state: int) -> int:
    """SplitMix64's next number, in Python's whole numbers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_words_are_those_of_split_mix_64_from_its_paper() -> None:
    keys = [0, 1, 2**63 - 1, -(2**63), -7]
    made = _random.words(torch.tensor(keys), 5)
    for row, key in zip(made.tolist(), keys, strict=True):
        state, expected = key % 2**64, []
        for _ in range(5):
            expected.append(split_mix(state))
            state = (state + 0x9E3779B97F4A7C15) % 2**64
        assert [word % 2**64 for word in row] == expected
    assert split_mix(0) == 0xE220A8397B1DCDAF  # the first number of seed 0 that its authors give


def test_draws_have_the_moments_of_their_distribution() -> None:
    keys, count = _random.keys(3, 0, 4, "train", torch.device("cpu")), 100_001
    n = 4 * count
    for draw, mean, variance in [
        (_random.uniforms, 0.5, 1 / 12),
        (_random.normals, 0.0, 1.0),
        (_random.triangular, 0.0, 1.0),
        (_random.bits, 0.5, 0.25),
    ]:
        made = draw(keys, count).double()
        assert made.shape == (4, count)
        assert abs(float(made.mean()) - mean) < 5 * math.sqrt(variance / n), draw.__name__
        assert abs(float(made.var()) / variance - 1) < 5 * math.sqrt(2 / n), draw.__name__
        neighbours = ((made[:, 1:] - mean) * (made[:, :-1] - mean)).mean() / variance
        assert abs(float(neighbours)) < 5 / math.sqrt(n), draw.__name__
        assert abs(float(((made[0] - mean) * (made[1] - mean)).mean() / variance)) < 5 / math.sqrt(count)
    whole = _random.integers(keys, count, 7)
    shares = torch.bincount(whole.flatten(), minlength=7) / n
    assert float((shares - 1 / 7).abs().max()) < 5 * math.sqrt(6 / 49 / n)


@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_is_the_same_bit_for_bit_in_whatever_chunk_it_is_asked(stream: Stream, split: Split) -> None:
    inputs, targets = stream.batches(3, 0, 12, 5, split)
    assert inputs.shape == (12, 5, *stream.shape)
    assert inputs.dtype == torch.float32
    assert targets.shape == (12, 5)
    assert targets.dtype == (torch.int64 if stream.classes else torch.float32)
    for start, stop in [(0, 1), (3, 12), (11, 12)]:
        assert same(stream.batches(3, start, stop, 5, split), (inputs[start:stop], targets[start:stop]))


def test_the_global_generator_and_the_number_of_threads_do_not_matter(stream: Stream) -> None:
    first, before, threads = stream.batches(0, 4, 20, 32), torch.get_rng_state(), torch.get_num_threads()
    torch.manual_seed(123)
    drawn = torch.get_rng_state()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert same(stream.batches(0, 4, 20, 32), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.set_rng_state(before)


def test_no_sample_comes_twice_in_a_pass_nor_in_another_seed_or_split(stream: Stream) -> None:
    parts = [
        stream.batches(0, 0, 40, 32)[0],
        stream.batches(1, 0, 2, 32)[0],
        stream.batches(0, 0, 2, 32, "held_out")[0],
    ]
    rows = torch.cat([part.flatten(0, 1).flatten(1) for part in parts])
    # 20 bits have 2^20 patterns, and 1,408 of them meet by chance about once.
    assert len(rows) - len(torch.unique(rows, dim=0)) <= (6 if stream.shape == (20,) else 0)


def test_the_first_numbers_are_pinned() -> None:
    # On every machine the same: exact integers, or float64 rounded once.
    assert _random.words(torch.tensor([0]), 2).tolist() == [[-2152535657050944081, 7960286522194355700]]
    assert Parity(8, 2).batches(0, 0, 1, 2)[0].flatten().int().tolist() == [
        1,
        1,
        1,
        1,
        -1,
        1,
        1,
        1,
        -1,
        1,
        -1,
        1,
        1,
        -1,
        -1,
        -1,
    ]
    assert Hermite(2).batches(0, 0, 1, 1)[0].flatten().tolist() == [-0.4959801137447357, -1.2705579996109009]


def test_the_first_targets_are_pinned() -> None:
    # In float64 and rounded once; the order in which a product is summed may cost its last bits.
    pinned = [0.06640391796827316, 0.04492167383432388, 0.019577279686927795, -0.2380390614271164]
    assert Hermite(12, MULTI).batches(5, 0, 1, 4)[1][0].tolist() == pytest.approx(pinned, rel=1e-6)
    pinned = [0.03709826618432999, -0.4495870769023895, -0.44767218828201294, -1.0307759046554565]
    assert Teacher((12,), 0, width=8).batches(5, 0, 1, 4)[1][0].tolist() == pytest.approx(pinned, rel=1e-6)
    classes = Teacher((3, 8, 8), 4, network="cnn", width=4, depth=3).batches(5, 0, 1, 8)[1]
    assert classes[0].tolist() == [0, 1, 1, 3, 2, 2, 2, 1]


def test_real_images_come_in_the_same_order_and_place_on_every_machine() -> None:
    digits, labels = Digits().batches(7, 3, 4, 8)
    assert labels[0].tolist() == [0, 2, 4, 0, 2, 7, 9, 3]
    assert digits[0, :4].flatten(1)[:, 77].tolist() == pytest.approx([-0.0690, 1.5426, 1.0951, 0.1088], abs=1e-3)
    windows, photographs = Photos().windows(7, 3, 4, 2)
    assert windows[0, 0].tolist() == pytest.approx([109.99769, 2448.7505, -62.72487, 2357.0], abs=1e-3)
    assert photographs.tolist() == [[7, 7]]
    assert Order(1000, 100).at(np.arange(6), 5).tolist() == [780, 969, 765, 651, 884, 652]
    assert Order(1000, 100).held(np.arange(4)).tolist() == [768, 814, 85, 975]
    assert Order(100_000, 1000, 16).at(np.arange(6), 5).tolist() == [67793, 4648, 4643, 24192, 32457, 50376]


@pytest.mark.parametrize(("bits", "degree"), [(20, 3), (4, 4), (5, 1)])
def test_a_parity_is_the_sign_of_the_product_and_even(bits: int, degree: int) -> None:
    inputs, targets = Parity(bits, degree).batches(1, 0, 100, 64)
    assert set(inputs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(targets, (inputs[..., :degree].prod(-1) > 0).long())
    assert abs(float(targets.double().mean()) - 0.5) < 0.03


@pytest.mark.parametrize("monomials", [((2,),), ((3,),), MULTI])
def test_a_hermite_target_is_its_formula_with_mean_zero_and_unit_variance(
    monomials: tuple[tuple[int, ...], ...],
) -> None:
    stream = Hermite(12, monomials)
    torch.testing.assert_close(
        stream.directions.T @ stream.directions, torch.eye(stream.directions.shape[1], dtype=torch.float64)
    )
    inputs, targets = stream.batches(2, 0, 100, 400)
    z = (inputs.double() @ stream.directions).numpy()
    expected = np.zeros(z.shape[:-1])
    for monomial in monomials:
        product = np.ones_like(expected)
        for i, degree in enumerate(monomial):
            product *= hermite_e.hermeval(z[..., i], [0] * degree + [1]) / math.sqrt(math.factorial(degree))
        expected += product / math.sqrt(len(monomials))
    np.testing.assert_allclose(targets.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert abs(float(targets.mean())) < 0.03
    assert abs(float(targets.var()) - 1) < 0.1  # of a polynomial of degree 3: heavy tails


def test_a_stream_with_other_knobs_has_another_name() -> None:
    """A checkpoint or a portrait's folder knows a stream by its name."""
    made: list[Hermite | Teacher] = [
        Hermite(12, MULTI), Hermite(12, MULTI, draw=1), Teacher((12,)), Teacher((12,), width=8),
        Teacher((12,), depth=2), Teacher((12,), draw=3),
    ]  # fmt: skip
    assert len({stream.name for stream in made}) == len(made)
    assert made[1].name == f"{made[0].name}-draw=1"
    assert Teacher((12,)).name == "teacher-mlp-12-0"  # as ever, where nothing was changed


def test_two_classes_of_a_hermite_target_are_its_sign() -> None:
    numbers, signs = Hermite(12, MULTI), Hermite(12, MULTI, classes=2)
    (inputs, targets), (same_inputs, classes) = (stream.batches(3, 0, 4, 50) for stream in (numbers, signs))
    assert torch.equal(inputs, same_inputs)
    assert torch.equal(classes, (targets > 0).long())
    assert signs.name == f"{numbers.name}-sign"
    assert (numbers.classes, signs.classes) == (0, 2)


def test_a_teacher_answers_with_its_network_standardised() -> None:
    stream = Teacher((12,), 0, width=8)
    inputs, targets = stream.batches(5, 0, 40, 100)
    said = stream._net(inputs.flatten(0, 1).double())[:, 0]
    torch.testing.assert_close(targets.flatten(), ((said - stream._mean) / stream._std).float())
    assert abs(float(targets.mean())) < 0.06
    assert abs(float(targets.var()) - 1) < 0.1
    assert same(Teacher((12,), 0, width=8).batches(5, 0, 1, 4), stream.batches(5, 0, 1, 4))
    assert not torch.equal(Teacher((12,), 0, width=8, draw=1).batches(5, 0, 1, 4)[1], stream.batches(5, 0, 1, 4)[1])


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_a_teacher_of_classes_shows_each_about_equally_often(network: str) -> None:
    labels = build_stream("teacher", shape=(3, 8, 8), classes=5, network=network, width=16).batches(0, 0, 20, 100)[1]
    shares = torch.bincount(labels.flatten(), minlength=5) / labels.numel()
    assert shares.shape == (5,)
    assert float((shares - 0.2).abs().max()) < 0.04


@pytest.mark.parametrize("name", ["digits", "hermite", "parity", "photos", "staircase", "teacher"])
def test_every_stream_is_built_by_its_name(name: str) -> None:
    stream = build_stream(name)
    x, y = stream.batches(0, 0, 1, 2)
    assert x.shape == (1, 2, *stream.shape)
    assert y.shape == (1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parity(4, 5), "degree=5 is more than bits=4; give at most 4"),
        (lambda: Hermite(8, ()), r"monomials=\(\) must be one or more, all different"),
        (lambda: Hermite(8, ((1,), (1, 0))), "all different"),
        (lambda: Hermite(8, ((0, 0),)), r"monomial \(0, 0\) is constant; give it a degree >= 1"),
        (lambda: Hermite(1, ((1, 1),)), "has 2 directions, more than inputs=1"),
        (lambda: Hermite(4, ((-1,),)), "degree of a monomial=-1 is too small"),
        (lambda: Hermite(4, classes=3), "classes=3 must be 0 for the target itself, or 2 for its sign"),
        (lambda: Teacher((4,), width=1, depth=9), r"says the same to every input \(width=1, depth=9, draw=0"),
        (lambda: Teacher(8), r"shape=8 is no shape; give a tuple, such as \(32,\)"),  # type: ignore[arg-type]
        (lambda: Hermite(8, (2,)), r"monomials=\(2,\) must be lists of degrees"),  # type: ignore[arg-type]
        (lambda: Teacher((8,), 1), "classes=1 leaves nothing to tell apart"),
        (lambda: Teacher((8,), network="cnn"), r"shape=\(8,\) is no image"),
        (lambda: build_stream("parity", degre=2), "stream 'parity' has no knob 'degre'; it has: bits, degree"),
        (lambda: build_stream("cifar"), "unknown stream 'cifar'; choose one of: cifar10, cifar5m, digits"),
        (lambda: build_stream("cifar5m"), "stream 'cifar5m' reads files; say where they are: path=FOLDER"),
    ],
)
def test_a_mistake_names_the_value_and_the_fix(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()  # type: ignore[operator]
