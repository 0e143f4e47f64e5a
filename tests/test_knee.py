"""The knee: the probes against the exact Jacobian, the measured values, and where ``wrap`` puts it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from gammaopt import Plan, UsageError, knee, wrap
from gammaopt.online import MLP


def standard(width: int, *, outputs: int = 1) -> MLP:
    """Weights N(0, 1/fan_in), the standard form."""
    torch.manual_seed(0)
    net = MLP(32, outputs, width=width, depth=3).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5)
    return net


def inputs(n: int = 64) -> Tensor:
    return torch.randn(n, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def exact(net: nn.Module, x: Tensor) -> float:
    """The definition, with the whole Jacobian."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(net, p, (x,)))(parameters)
    logs = []
    for name, weight in parameters.items():
        norm = jacobian[name].flatten(2).square().sum(-1).mean().sqrt()
        logs.append(math.log(float(norm)) + math.log(float(torch.linalg.matrix_norm(weight, 2))))
    return math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("outputs", [1, 5])
def test_random_signs_estimate_the_definition(outputs: int) -> None:
    net = standard(24, outputs=outputs)
    assert knee(net, inputs(16)) == pytest.approx(exact(net, inputs(16)), rel=0.1)


@pytest.mark.parametrize(("width", "expected"), [(64, 5.5), (256, 11.0)])
def test_standard_form_has_the_measured_knee(width: int, expected: float) -> None:
    assert knee(standard(width), inputs()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("width", [64, 512])
def test_mean_field_form_has_a_knee_of_order_one(width: int) -> None:
    net = standard(width)
    wrap(net, 1.0, depth=3, parametrization="mean_field")
    assert 0.3 < knee(net, inputs()) < 2


def test_wrap_bends_the_law_at_the_knee_as_is_and_at_one_in_mean_field_form() -> None:
    net = standard(64)
    expected = knee(net, inputs())
    wrap(net, 3.0, example_inputs=inputs())
    assert isinstance(net.gammaopt, Plan)
    assert net.gammaopt.knee == pytest.approx(expected, rel=1e-3)
    assert net.gammaopt.law().factor(3.0) == pytest.approx(9.0)  # below the knee: lazy
    other = standard(64)
    wrap(other, 3.0, example_inputs=inputs(), parametrization="mean_field")
    assert isinstance(other.gammaopt, Plan)
    assert other.gammaopt.knee == 1.0
    stated = wrap(standard(64), 3.0, example_inputs=inputs(), knee=2.0)
    assert isinstance(stated.gammaopt, Plan)
    assert stated.gammaopt.knee == 2.0


def test_it_leaves_no_trace_and_repeats() -> None:
    net = standard(24)
    state = torch.get_rng_state()
    assert knee(net, inputs()) == knee(net, inputs())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_network_without_influence_is_named() -> None:
    net = standard(24)
    nn.init.zeros_(next(net.parameters()))
    nn.init.zeros_(list(net.parameters())[-1])
    with pytest.raises(UsageError, match=r"no weight of MLP has any influence .* give other inputs, or knee="):
        knee(net, inputs())
    normalised = nn.utils.parametrizations.weight_norm(nn.Linear(32, 1).double())
    with pytest.raises(UsageError, match=r"no weight of ParametrizedLinear has any influence .* or knee="):
        knee(normalised, inputs())


class Complex(nn.Module):
    """Re((−iW₂)(iW₁)x): the same function as the real network's, with weights that are not real."""

    def __init__(self, real: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8, bias=False, dtype=torch.complex128) for _ in real))
        with torch.no_grad():
            for mine, theirs, phase in zip(self.parameters(), real.parameters(), (1j, -1j), strict=True):
                mine.copy_(phase * theirs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(torch.complex128)).real  # type: ignore[no-any-return]


def test_complex_weights_are_pairs_of_real_ones() -> None:
    torch.manual_seed(0)
    real = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).double()
    x = inputs()[:, :8]
    assert knee(Complex(real), x) == pytest.approx(knee(real, x), rel=1e-12)
    model = wrap(Complex(real), 3.0, example_inputs=x)
    assert isinstance(model.gammaopt, Plan)
    assert model.gammaopt.depth == 2.0
    assert not model(x).any()


def test_the_default_device_does_not_matter() -> None:
    net, x = standard(24), inputs()
    expected = knee(net, x)
    with torch.device("meta"):
        assert knee(net, x) == expected
