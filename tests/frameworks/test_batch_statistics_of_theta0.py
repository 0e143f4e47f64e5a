"""DDP with batch normalisation: θ₀'s running statistics would be each rank's own, and so would f in evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gammaopt
from gammaopt import UsageError, _distributed, unwrap, wrap


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """The ranks' inputs have other means, so that statistics of one are not those of the other."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(8, 6, generator=generator) + rank, torch.randn(8, 3, generator=generator)


def train(rank: int, model: nn.Module, steps: int = 5) -> None:
    optimizer = gammaopt.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        x, y = batch(step, rank)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def on_both_ranks(rank: int, folder: Path) -> dict[str, Any]:
    x, _ = batch(99, 0)
    result: dict[str, Any] = {}
    for name, broadcast in (("shared", True), ("each rank's own, as the user asked", False)):
        model: Any = wrap(net(), 0.1, depth=2)
        ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
        train(rank, ddp)
        ddp.eval()(x)  # where DDP shares what the last step left
        result[name] = {
            "f": model(x).detach(),
            "theta0": [buffer.clone() for buffer in model.gammaopt_theta0.buffers()],
            "own": [buffer.clone() for buffer in model.buffers()],
        }
        if broadcast and rank == 0:
            model(x)  # evaluation on one rank alone, which must wait for nobody
    twin = copy.deepcopy(ddp)
    result["copy"] = float((twin(x) - ddp(x)).detach().abs().max())
    accumulated = DistributedDataParallel(wrap(net(), 0.1, depth=2))
    with accumulated.no_sync():
        accumulated(batch(0, rank)[0]).square().mean().backward()
    accumulated(batch(1, rank)[0]).square().mean().backward()
    result["synchronised"] = synchronised(rank)
    result["joined"] = joined(rank)
    return result


def joined(rank: int) -> dict[str, Any]:
    """Rank 0 has two batches less."""
    model: Any = wrap(net(), 0.1, depth=2)
    ddp = DistributedDataParallel(model)
    before = [buffer.clone() for buffer in model.gammaopt_theta0.buffers()]
    with ddp.join():
        train(rank, ddp, steps=2 + 2 * rank)
    count = int(model.gammaopt_theta0[1].num_batches_tracked) - int(before[2])
    with ddp.join(enable=False):
        ddp.eval()(batch(99, 0)[0])  # shared again
    theta0 = [buffer.clone() for buffer in model.gammaopt_theta0.buffers()]
    return {"theta0": theta0, "theta": [p.detach() for p in model.parameters()], "batches": count}


@pytest.fixture(scope="module")
def ranks(in_two_processes: Callable[[str, str], list[Any]]) -> list[Any]:
    return in_two_processes(__file__, "on_both_ranks")


def test_every_rank_evaluates_the_same_function(ranks: list[Any]) -> None:
    first, second = (rank["shared"] for rank in ranks)
    for key in ("own", "theta0"):
        assert all(torch.equal(a, b) for a, b in zip(first[key], second[key], strict=True))
    assert torch.equal(first["f"], second["f"])
    assert first["f"].abs().max() > 0.01
    assert [rank["copy"] for rank in ranks] == [0, 0]


def test_ranks_with_fewer_batches_join(ranks: list[Any]) -> None:
    """Ranks that have joined mirror torch's own messages only; one more of ours would be waited for."""
    first, second = (rank["joined"] for rank in ranks)
    assert [first["batches"], second["batches"]] == [2, 4]
    for key in ("theta", "theta0"):
        assert all(torch.equal(a, b) for a, b in zip(first[key], second[key], strict=True))


def test_buffers_that_are_sent_as_one_are_of_one_dtype_and_device() -> None:
    here, elsewhere = torch.zeros(2), torch.zeros(3, device="meta")
    kinds = list(_distributed._alike([here, elsewhere, torch.tensor(1), torch.zeros(4)]))
    assert [[tuple(tensor.shape) for tensor in kind] for kind in kinds] == [[(2,), (4,)], [(3,)], [()]]


def test_buffers_that_ddp_was_told_to_leave_alone_are_left_alone(ranks: list[Any]) -> None:
    first, second = (rank["each rank's own, as the user asked"] for rank in ranks)
    for key in ("own", "theta0"):
        assert not torch.equal(first[key][0], second[key][0])


def synchronised(rank: int) -> dict[str, Any]:
    """``SyncBatchNorm`` itself trains on accelerators only; what it is, and its evaluation, can be seen on a CPU."""

    def classes(model: Any) -> list[str]:
        return [type(model[1]).__name__, type(model.gammaopt_theta0[1]).__name__]

    result: dict[str, Any] = {}
    model: Any = wrap(net(), 0.1, depth=2)
    model.gammaopt_theta0[1].running_mean.fill_(0.5)
    model[1].running_mean.fill_(0.5)
    converted: Any = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    result["before"] = classes(model)
    x, _ = batch(0, rank)
    result["f"] = float(model.eval()(x).detach().abs().max())
    result["at a forward"] = classes(model)
    result["frozen"] = not any(p.requires_grad for p in model.gammaopt_theta0.parameters())
    result["keys"] = list(model.state_dict()) == list(wrap(net(), 0.1, depth=2).state_dict())
    other: Any = nn.SyncBatchNorm.convert_sync_batchnorm(wrap(net(), 0.1, depth=2))
    with suppress(ValueError):  # torch refuses the layer on a CPU, after the model was taken in
        DistributedDataParallel(other)
    result["by DDP"] = classes(other)
    result["unwrapped"] = type(unwrap(other)[1]).__name__
    part: Any = wrap(net(), 0.1, depth=2)
    part[1] = nn.SyncBatchNorm.convert_sync_batchnorm(part[1])
    part.eval()(x)
    result["a part"] = classes(part)
    group = dist.new_group([0, 1])
    grouped: Any = nn.SyncBatchNorm.convert_sync_batchnorm(wrap(net(), 0.1, depth=2), group)
    grouped.eval()(x)
    result["group"] = grouped[1].process_group is group and grouped.gammaopt_theta0[1].process_group is group
    for position, words in ((4, "was not there"), (2, "was a ReLU")):
        changed: Any = wrap(net(), 0.1, depth=2)
        built = nn.SyncBatchNorm(3 if position == 4 else 8)
        changed.eval()(x)
        changed.add_module(str(position), built)
        try:
            changed.eval()(x)
        except UsageError as error:
            result[words] = str(error)
    return result


def test_synchronised_batch_normalisation_after_wrapping_reaches_theta0(ranks: list[Any]) -> None:
    for rank in (each["synchronised"] for each in ranks):
        assert rank["before"] == ["SyncBatchNorm", "BatchNorm1d"]
        for when in ("at a forward", "by DDP", "a part"):
            assert rank[when] == ["SyncBatchNorm"] * 2
        assert rank["group"]
        for position, words in ((4, "was not there"), (2, "was a ReLU")):
            assert rank[words] == (
                f"part '{position}' of GammaSequential, a SyncBatchNorm, {words} when it was wrapped; "
                "call gammaopt.unwrap on the model and wrap it again"
            )
        assert rank["f"] == 0
        assert rank["frozen"]
        assert rank["keys"]
