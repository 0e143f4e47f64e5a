"""The copy that diagnostics look at computes what the model does: in its modes, with its hooks, complex parts too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import UsageError
from gammaopt.diagnostics._function import Function

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def wrapped() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    return gammaopt.wrap(net, 0.5, depth=2, knee=1.0)


@pytest.mark.parametrize("nested", [False, True])
def test_f_is_zero_at_theta0_after_a_part_was_put_in_evaluation(nested: bool) -> None:
    model = wrapped()
    model[1].eval()
    function = Function(nn.Sequential(model, nn.Identity()) if nested else model)
    assert not function(X).any()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    torch.testing.assert_close(Function(model)(X).float(), model(X))


def test_a_frozen_copy_without_values_is_refused() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model = gammaopt.wrap(net, 0.5, depth=2).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    for part in (model, nn.Sequential(model, nn.Linear(1, 1))):
        with pytest.raises(UsageError, match=r"to_empty\(\) made its memory without values; load a checkpoint"):
            Function(part)


class Rotated(nn.Module):
    """Real parameters and outputs, and a complex buffer in between."""

    turn: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 2)
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout((x * self.turn).real - (x * self.turn).imag)
        return out


def test_a_complex_buffer_keeps_its_imaginary_part() -> None:
    torch.manual_seed(0)
    net = Rotated()
    torch.testing.assert_close(Function(net)(X).float(), net(X))
    assert Function(net).module.get_buffer("turn").dtype == torch.complex128
    assert Function(net, dtype=torch.float32).module.get_buffer("turn").dtype == torch.complex64
    assert Function(net).to(net.turn).dtype == torch.complex128


def test_hooks_that_are_part_of_the_function_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 1)).eval()
    net[1].register_forward_hook(lambda module, args, out: 3 * out)
    torch.testing.assert_close(Function(net)(X).float(), net(X))
