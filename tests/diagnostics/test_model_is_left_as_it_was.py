"""Kernels, agreement and sharpness leave no trace on a model: weights, gradients, buffers, modes, hooks, generators.

The Hessian's own file has the same for spectra, the monitor's for a run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt.diagnostics import agreement, agreements, feature_kernel, ntk, ntk_eigenvalues, sharpness

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 4, generator=GENERATOR), torch.randn(6, 2, generator=GENERATOR)


class Attention(nn.Module):
    """Dropout, normalisation and a weight that is used twice; ``tied`` is one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.again, self.readout = nn.Linear(8, 8, bias=False), nn.Linear(8, 2)
        self.tied = self.again.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block(self.embed(x[..., None])).mean(1)
        out: Tensor = self.readout(self.again(self.again(hidden)))
        return out


def normalised() -> nn.Module:
    """Running statistics in evaluation, while the rest trains."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    net[1].eval()
    return net


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    return net


class Drawing(nn.Module):
    """It draws in evaluation too, on which nothing depends: whoever runs it moves torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout(torch.tanh(self.hidden(x))) + 0 * torch.rand(2).to(x)
        return out


NETS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "batch norm": normalised,
    "frozen": frozen,
    "drawing": Drawing,
}
LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "ntk": lambda net: ntk(net, X),
    "ntk, sample by sample": lambda net: ntk(net, X, layerwise=False, full=True),
    "ntk_eigenvalues": lambda net: ntk_eigenvalues(net, X),
    "feature_kernel": lambda net: feature_kernel(net, X),
    "agreement": lambda net: agreement(net, copy.deepcopy(net), X).distance,
    "agreements": lambda net: agreements([net, net, net], [(X, Y), (X, Y)])[0, 2].cosine,
    "sharpness": lambda net: sharpness(net, "mse", (X, Y), optimizer=torch.optim.SGD(net.parameters(), lr=0.1)),
}


def snapshot(net: nn.Module) -> dict[str, Any]:
    reference = getattr(net, "_gammaopt_reference", None)
    modules = [*net.modules(), *(reference.modules() if reference is not None else ())]
    return {
        **{f"state {key}": value.clone() for key, value in net.state_dict().items()},
        **{f"grad {key}": None if p.grad is None else p.grad.clone() for key, p in net.named_parameters()},
        "parameters": [(key, id(p), p.requires_grad) for key, p in net.named_parameters(remove_duplicate=False)],
        "modes": [module.training for module in modules],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        "random": torch.get_rng_state(),
        "numpy": str(np.random.get_state()[1]),  # type: ignore[index]
        "switches": (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.get_default_dtype()),
    }


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_nothing_changes_and_dropout_is_off(name: str, wrapped: bool) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    if wrapped:
        gammaopt.wrap(net, 2.0, depth=2, knee=1.0)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = snapshot(net)
    for what, look in LOOKS.items():
        first, second = look(net), look(net)
        torch.testing.assert_close(second, first, rtol=0, atol=0, msg=f"{what} draws at random")
        after = snapshot(net)
        for key, value in before.items():
            same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
            assert same, f"{what} changed {key}"
