"""DDP: ranks that were seeded differently would keep different θ₀ and measure different depths, and drift apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gammaopt
from gammaopt import UsageError, wrap

CENTERS = ("copy", "zero_readout", "none")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
STEPS = 5


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 6, generator=generator).to(dtype), torch.randn(8, 3, generator=generator).to(dtype)


def net(seed: int, dtype: torch.dtype) -> nn.Sequential:
    """With tanh, which is not homogeneous: its depth depends on weights and batch."""
    torch.manual_seed(seed)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def deviation(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((mine - other).abs().max()) for mine, other in pairs)


def one_case(rank: int, center: Any, dtype: torch.dtype) -> dict[str, Any]:
    """This rank's own seed and example batch; against one process with rank 0's, on the joined batch."""
    x, y = data(dtype)
    half = slice(4 * rank, 4 * rank + 4)
    model = wrap(net(rank, dtype), 3.0, example_inputs=x[half], center=center)
    measured = model.gammaopt.depth  # type: ignore[union-attr]
    ddp = DistributedDataParallel(model)
    plan: Any = model.gammaopt
    start = float(model(x).detach().abs().max())
    train(ddp, gammaopt.SGD(ddp.parameters(), lr=0.05, momentum=0.9), x[half], y[half])
    single = wrap(net(0, dtype), 3.0, example_inputs=x[:4], center=center)
    train(single, gammaopt.SGD(single.parameters(), lr=0.05, momentum=0.9), x, y)
    return {
        "deviation": deviation(model, single),
        "moved": deviation(single, wrap(net(0, dtype), 3.0, depth=3, center="none"))
        if center == "none"
        else float(single(x).detach().abs().max()),
        "start": start,
        "depth": (measured, plan.depth),
    }


def trajectories(rank: int, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {
        f"{center} {name}": one_case(rank, center, dtype) for center in CENTERS for name, dtype in DTYPES.items()
    }
    x, _ = data(torch.float64)

    def message(prepare: Callable[[], Any]) -> str:
        try:
            prepare()
        except UsageError as error:
            return str(error)
        return ""

    late = wrap(net(rank, torch.float64), 3.0, example_inputs=x[4 * rank :])
    gammaopt.SGD(late.parameters(), lr=0.1)
    result["optimizer first"] = message(lambda: DistributedDataParallel(late))
    result["gamma"] = message(lambda: DistributedDataParallel(wrap(net(0, torch.float64), 2.0 + rank, depth=3)))
    whole = nn.Sequential(wrap(net(rank, torch.float64), 3.0, depth=3), nn.ReLU())
    result["part"] = DistributedDataParallel(whole)(x).detach().abs().max().item()
    result["wrapped twice"] = message(lambda: wrap(DistributedDataParallel(net(0, torch.float64)), 2.0, depth=3))
    twin = copy.deepcopy(whole)
    result["copies"] = deviation(twin, whole)
    return result


@pytest.fixture(scope="module")
def ranks(in_two_processes: Callable[[str, str], list[Any]]) -> list[Any]:
    return in_two_processes(__file__, "trajectories")


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_trajectory_is_that_of_one_process_on_the_joined_batch(
    ranks: list[Any], center: str, dtype: str, tolerance: float
) -> None:
    for rank in ranks:
        case = rank[f"{center} {dtype}"]
        assert case["deviation"] < tolerance
        assert case["moved"] > 1e-2
        assert center == "none" or case["start"] == 0
    assert len({rank[f"{center} {dtype}"]["depth"][1] for rank in ranks}) == 1


def test_ranks_measured_different_depths_before(ranks: list[Any]) -> None:
    assert len({rank["copy float64"]["depth"][0] for rank in ranks}) == 2


def test_wrapped_part_of_a_larger_model_is_shared_too(ranks: list[Any]) -> None:
    assert [rank["part"] for rank in ranks] == [0, 0]


def test_what_cannot_be_mended_is_an_error_on_every_rank(ranks: list[Any]) -> None:
    for rank in ranks:
        assert "wrapped GammaSequential with depth = " in rank["optimizer first"]
        assert "build the optimizer after DistributedDataParallel" in rank["optimizer first"]
        assert rank["gamma"] == (
            "the ranks wrapped GammaSequential with gamma = 2 and 3; give every rank the same gamma"
        )
        assert "wrap it before it becomes a DistributedDataParallel" in rank["wrapped twice"]
