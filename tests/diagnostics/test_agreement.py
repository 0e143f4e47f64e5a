"""Agreement of functions: the formulas, streams of batches, and rich networks against lazy ones."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

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


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match=r"outputs have shapes \(30, 2\) and \(30, 3\)"):
        agreement(linear(0), linear(0, 2), X)
    with pytest.raises(UsageError, match="the stream has no batch"):
        agreement(linear(0), linear(1), [])
    with pytest.raises(UsageError, match="1 models can't agree"):
        agreements([linear(0)], X)
