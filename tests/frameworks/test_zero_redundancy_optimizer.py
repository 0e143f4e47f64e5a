"""ZeroRedundancyOptimizer: it builds our class on a part of the parameters, which must keep their own rates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import gammaopt
from gammaopt import wrap
from gammaopt.online import MLP

CASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (gammaopt.SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (gammaopt.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def checks(rank: int, folder: Path) -> dict[str, float]:
    found = {}
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(8, 6, generator=generator).double(), torch.randn(8, 3, generator=generator).double()
    half = slice(4 * rank, 4 * rank + 4)
    for name, (cls, options) in CASES.items():
        torch.manual_seed(0)
        single = wrap(MLP(6, 3, width=8, depth=3, bias=True).double(), 3.0, depth=3, parametrization="mean_field")
        model = copy.deepcopy(single)
        ddp = DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(ddp.parameters(), optimizer_class=cls, **options)
        train(ddp, optimizer, x[half], y[half])
        train(single, cls(single.parameters(), **options), x, y)
        pairs = zip(model.parameters(), single.parameters(), strict=True)
        found[name] = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return found


@pytest.fixture(scope="module")
def ranks(in_two_processes: Callable[[str, str], list[Any]]) -> list[Any]:
    return in_two_processes(__file__, "checks")


@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_that_of_one_process(ranks: list[Any], name: str) -> None:
    assert all(rank[name] < 1e-12 for rank in ranks)
