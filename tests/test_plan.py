"""Roles and mean-field rates, parameter by parameter, and the table that shows them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gammaopt import EtaLaw, Plan, UsageError, wrap
from gammaopt.online import MLP


def plan_of(net: nn.Module) -> Plan:
    assert isinstance(net.gammaopt, Plan)
    return net.gammaopt


def test_mean_field_rates_of_an_mlp() -> None:
    inputs, width, gamma = 20, 16, 50.0
    plan = plan_of(wrap(MLP(inputs, 3, width=width, depth=3, bias=True), gamma, depth=3, parametrization="mean_field"))
    s = EtaLaw(3).factor(gamma)
    assert plan.width == width
    assert plan.multipliers() == pytest.approx(
        {
            "1.weight": s * width / inputs,
            "1.bias": s * width,
            "3.weight": s * 1.0,
            "3.bias": s * width,
            "5.weight": s / width,
            "5.bias": s,
        }
    )


def test_mean_field_rates_of_a_convolution_count_the_kernel_area_and_groups() -> None:
    net = nn.Sequential(
        nn.Conv2d(6, 8, 3, groups=2),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    plan = plan_of(wrap(net, 1.0, depth=2, parametrization="mean_field"))
    multipliers = plan.multipliers()
    assert multipliers["0.weight"] == pytest.approx(8 / (3 * 9))
    assert multipliers["2.weight"] == multipliers["2.bias"] == multipliers["0.bias"] == 8
    assert multipliers["5.weight"] == pytest.approx(1 / 8)


def test_as_is_multiplies_every_rate_by_the_law_alone() -> None:
    plan = plan_of(wrap(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), 9.0, depth=2, loss="cross_entropy"))
    assert set(plan.multipliers().values()) == {EtaLaw(2, "sgd", "cross_entropy").factor(9.0)}


def test_mean_field_initialises_weights_at_their_scale_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    net = MLP(400, 300, width=500, depth=2, bias=True)
    wrap(net, 1.0, depth=2, parametrization="mean_field")
    values = {name: parameter.detach() for name, parameter in net.named_parameters()}
    assert float(values["1.weight"].std()) == pytest.approx(400**-0.5, rel=0.02)
    assert float(values["3.weight"].std()) == pytest.approx(1 / 500, rel=0.02)
    assert not values["1.bias"].any()
    assert not values["3.bias"].any()


class Reversed(nn.Module):
    """The readout is registered first and runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.body = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())  # type: ignore[no-any-return]


def test_readout_is_the_layer_that_runs_last_when_inputs_are_given() -> None:
    plan = plan_of(wrap(Reversed(), 1.0, example_inputs=torch.ones(2, 4), parametrization="mean_field"))
    assert {rule.name: rule.role for rule in plan.rules}["head.weight"] == "readout weight"
    assert plan.width == 8


def test_unknown_parameter_is_refused_under_mean_field_with_its_name_and_the_fix() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    before = net.state_dict()["1.weight"].clone()
    with pytest.raises(UsageError, match=r"parameter '0.weight' \(5, 4\) of Embedding .* parametrization='as_is'"):
        wrap(net, 1.0, depth=2, parametrization="mean_field")
    assert type(net) is nn.Sequential
    assert torch.equal(net.state_dict()["1.weight"], before)


def test_table_shows_each_parameter_with_its_effective_rate() -> None:
    plan = plan_of(wrap(MLP(20, 3, width=16, depth=2), 4.0, depth=2, parametrization="mean_field"))
    lines = plan.table(lr=0.5).splitlines()
    assert lines[0].startswith("γ = 4, L = 2, mean_field, sgd under mse: s(γ) = 4, lr = 0.5")
    assert lines[1].split() == ["parameter", "shape", "role", "multiplier", "effective", "rate"]
    assert lines[3].split() == ["1.weight", "16×20", "weight", "3.2", "1.6"]
    assert lines[4].split() == ["3.weight", "3×16", "readout", "weight", "0.25", "0.125"]
    assert str(plan) == plan.table()
    assert max(map(len, lines)) <= 80


def test_mean_field_rates_are_refused_for_other_optimizers() -> None:
    plan = plan_of(wrap(MLP(20, 3, depth=2), 4.0, depth=2, parametrization="mean_field"))
    with pytest.raises(UsageError, match="mean_field rates are defined for SGD, not for adam"):
        plan.multipliers("adam")
