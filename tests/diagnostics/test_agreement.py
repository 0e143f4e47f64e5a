"""Agreement of functions: the formulas, streams of batches, and rich networks against lazy ones."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gammaopt
from gammaopt import UsageError
from gammaopt.diagnostics import agreement, agreements

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))


def linear(seed: int, outputs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, outputs), nn.Dropout(0.5))


def test_numbers_are_the_formulas_whatever_the_batches() -> None:
    a, b = linear(0), linear(1)
    f, g = (net[0](X).double().detach() for net in (a, b))  # type: ignore[index]
    found = agreement(a, b, X)
    assert found.samples == 30
    assert found.distance == pytest.approx(float((f - g).norm() / (f.norm() * g.norm()).sqrt()), rel=1e-6)
    assert found.cosine == pytest.approx(float((f * g).sum() / (f.norm() * g.norm())), rel=1e-6)
    assert found.labels == pytest.approx(float((f.argmax(1) == g.argmax(1)).double().mean()))
    streams: list[Any] = [X.split(7), [(part, None) for part in X.split(11)]]
    for stream in streams:
        again = agreement(a, b, stream)
        assert again.distance == pytest.approx(found.distance)
        assert again.labels == pytest.approx(found.labels)
    assert a.training


def test_one_output_agrees_by_sign_and_pairs_are_named() -> None:
    nets = {gamma: linear(seed, 1) for seed, gamma in enumerate((0.1, 1.0, 10.0))}
    found = agreements(nets, X)
    assert list(found) == [(0.1, 1.0), (0.1, 10.0), (1.0, 10.0)]
    f, g = (nets[gamma][0](X) for gamma in (0.1, 10.0))  # type: ignore[index]
    assert found[0.1, 10.0].labels == pytest.approx(float(((f > 0) == (g > 0)).double().mean()))


def test_a_wrapped_model_enters_as_f() -> None:
    net = linear(0)
    model = gammaopt.wrap(copy.deepcopy(net), 2.0, depth=1, knee=1.0)
    assert agreement(model, net, X).distance == math.inf  # f = 0 at the start
    assert agreement(model, model, X).distance == 0
    with torch.no_grad():
        model[0].weight *= 3.0  # type: ignore[index]
        net[0].bias.zero_()  # type: ignore[index]
    found = agreement(model, net, X)  # f = (3 − 1) w·x/2
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize("own", [False, True])
def test_reading_a_shuffled_loader_leaves_generators_as_they_were(own: bool) -> None:
    generator = torch.Generator().manual_seed(3) if own else None
    loader: Any = DataLoader(TensorDataset(X, X), batch_size=7, shuffle=True, generator=generator)
    a, b = linear(0), linear(1)
    mine, before = None if generator is None else generator.get_state(), torch.get_rng_state()
    assert agreement(a, b, loader).cosine == pytest.approx(agreement(a, b, X).cosine)
    assert torch.equal(torch.get_rng_state(), before)
    if generator is not None and mine is not None:
        assert torch.equal(generator.get_state(), mine)


def test_outputs_without_a_class_dimension_may_end_in_a_batch_of_one() -> None:
    a, b = (nn.Sequential(linear(seed, 1), nn.Flatten(0)) for seed in (0, 1))
    whole = agreement(a, b, X)
    assert agreement(a, b, list(X.split(29))).labels == pytest.approx(whole.labels)
    assert whole.labels == pytest.approx(float(((a[0][0](X) > 0) == (b[0][0](X) > 0)).double().mean()))  # type: ignore[index]


def test_a_pair_is_one_batch_with_its_targets() -> None:
    a, b = linear(0), linear(1)
    assert agreement(a, b, (X, X.flip(0))) == agreement(a, b, X)
    assert agreement(a, b, [X[:15], X[15:]]).samples == 30


def test_classes_are_in_dimension_one_where_there_are_places() -> None:
    a, b = (nn.Sequential(linear(seed, 6), nn.Unflatten(1, (3, 2))) for seed in (0, 1))
    same = (a[0][0](X).reshape(30, 3, 2).argmax(1) == b[0][0](X).reshape(30, 3, 2).argmax(1)).double().mean()  # type: ignore[index]
    assert agreement(a, b, X).labels == pytest.approx(float(same))


def test_a_model_that_normalises_with_its_batch_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(UsageError, match="agreement is a function of single samples, and '1' normalises"):
        agreement(net, copy.deepcopy(net), X)
    assert agreement(net.eval(), copy.deepcopy(net), X).distance == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match=r"outputs have shapes \(30, 2\) and \(30, 3\)"):
        agreement(linear(0), linear(0, 2), X)
    with pytest.raises(UsageError, match="the stream has no batch"):
        agreement(linear(0), linear(1), [])
    with pytest.raises(UsageError, match="1 models can't agree"):
        agreements([linear(0)], X)
