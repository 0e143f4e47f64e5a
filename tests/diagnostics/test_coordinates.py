"""The coordinate check tells parametrizations that transfer across width from those that don't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import UsageError, wrap
from gammaopt.diagnostics import CoordinateCheck, coordinate_check
from gammaopt.online import MLP

WIDTHS = (32, 128, 512)
X = torch.randn(32, 10, generator=torch.Generator().manual_seed(0))
Y = X[:, :1] * X[:, 1:2]


def loss(out: Tensor) -> Tensor:
    return (out - Y).square().mean()


def check(optimizer: str, lr: float, gamma: float = 1.0, **kwargs: Any) -> CoordinateCheck:
    def build(width: int) -> nn.Module:
        options = {key: value() if callable(value) else value for key, value in kwargs.items()}
        return wrap(MLP(10, 1, width=width, bias=True), gamma, depth=3, **options)

    return coordinate_check(
        build, WIDTHS, X, loss, lambda model: getattr(gammaopt, optimizer)(model.parameters(), lr=lr)
    )


@pytest.mark.parametrize(("optimizer", "lr"), [("SGD", 0.1), ("Adam", 0.1)])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 30.0])
def test_mean_field_form_transfers(optimizer: str, lr: float, gamma: float) -> None:
    found = check(optimizer, lr, gamma, parametrization="mean_field")
    assert found.ok, str(found)
    assert [layer.name for layer in found.layers] == ["1", "3", "5", "output"]
    assert "transfers across width" in str(found)


@pytest.mark.parametrize(("optimizer", "lr"), [("SGD", 0.05), ("Adam", 0.003)])
def test_base_shapes_transfer(optimizer: str, lr: float) -> None:
    found = check(optimizer, lr, base=lambda: MLP(10, 1, width=32, bias=True))
    assert found.ok, str(found)


def test_torchs_own_form_does_not_transfer_and_the_verdict_names_the_layer() -> None:
    found = check("Adam", 0.003)
    assert not found.ok
    assert found.worst.slope > 0.4
    assert f"does not transfer: {found.worst.name} has the worst slope" in str(found)


def test_bad_arguments_are_named() -> None:
    build = lambda width: wrap(MLP(10, 1, width=width), 1.0, depth=3)
    sgd = lambda model: gammaopt.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"widths=\[32, 32\] can't give a slope"):
        coordinate_check(build, [32, 32], X, loss, sgd)
    with pytest.raises(UsageError, match="steps=0 is too small"):
        coordinate_check(build, [32, 64], X, loss, sgd, steps=0)
    frozen = lambda model: torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(UsageError, match=r"the output of layer '1' changed by 0 at width 32"):
        coordinate_check(build, [32, 64], X, loss, frozen)
