"""FSDP2: ``fully_shard`` replaces parameters by slices; θ₀, the rates and the checkpoints have to follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import gammaopt
from gammaopt import UsageError, unwrap, wrap
from gammaopt.online import MLP

CENTERS = ("copy", "zero_readout", "none")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
STEPS = 4
# Another initialisation measures another depth and knee, and so other rates: where two must agree, they are given.
FIXED: dict[str, Any] = {"depth": 3.0, "knee": 1.0}


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 6, generator=generator).to(dtype), torch.randn(8, 3, generator=generator).to(dtype)


def wrapped(center: Any = "copy", dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    net = MLP(6, 3, width=8, depth=3, bias=True).to(dtype)
    return wrap(net, 3.0, **{"example_inputs": data(dtype)[0], "center": center, **options})


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Layer by layer, and the rest with the root, as is usual."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    fully_shard(layers[0], **options)
    fully_shard(model, **options)
    return model


def optimizer_of(model: nn.Module, name: str = "SGD") -> torch.optim.Optimizer:
    if name == "SGD":
        return gammaopt.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return gammaopt.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = STEPS) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def full(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }


def deviation(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def trajectory(rank: int, center: str, dtype: torch.dtype, optimizer: str) -> float:
    x, y = data(dtype)
    half = slice(4 * rank, 4 * rank + 4)
    model = shard(wrapped(center, dtype))
    train(model, optimizer_of(model, optimizer), x[half], y[half])
    single = wrapped(center, dtype)
    train(single, optimizer_of(single, optimizer), x, y)
    return deviation(full(model), full(single))


def state_dicts(rank: int, whole: bool, broadcast: bool, optimizer: str) -> float:
    """Train, save, load into another initialisation, train on: against training without the break."""
    x, y = data()
    half = slice(4 * rank, 4 * rank + 4)
    options = StateDictOptions(full_state_dict=whole, broadcast_from_rank0=broadcast, strict=True)
    model = shard(wrapped(**FIXED))
    ours = optimizer_of(model, optimizer)
    train(model, ours, x[half], y[half])
    # A copy: what is loaded into an optimizer is not copied by torch, and both would go on with the same momentum.
    states = copy.deepcopy(get_state_dict(model, ours, options=StateDictOptions(full_state_dict=whole)))
    fresh = shard(wrapped(seed=5, **FIXED))
    theirs = optimizer_of(fresh, optimizer)
    if broadcast and rank == 1:
        states = ({}, {})
    # Not set_state_dict, which takes an empty dict for "no model to load" and leaves rank 0 waiting.
    set_model_state_dict(fresh, states[0], options=options)
    set_optimizer_state_dict(fresh, theirs, states[1], options=options)
    train(model, ours, x[half], y[half])
    train(fresh, theirs, x[half], y[half])
    return deviation(full(model), full(fresh))


def files(rank: int, folder: Path, kind: str) -> float:
    """The same through ``torch.distributed.checkpoint`` files; ``kind`` says what is saved and loaded."""
    x, y = data()
    half = slice(4 * rank, 4 * rank + 4)

    def prepare(seed: int, how: str) -> nn.Module:
        model = wrapped(seed=seed, **FIXED)
        return nn.parallel.DistributedDataParallel(model) if how == "ddp" else shard(model)

    first, second = kind.split(" to ")
    model = prepare(0, first)
    ours = optimizer_of(model, "AdamW")
    train(model, ours, x[half], y[half])
    states = get_state_dict(model, ours)
    save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / kind.replace(" ", "_"))
    fresh = prepare(5, second)
    theirs = optimizer_of(fresh, "AdamW")
    blank = get_state_dict(fresh, theirs)
    loaded: dict[str, Any] = {"model": blank[0], "optimizer": blank[1]}
    load(loaded, checkpoint_id=folder / kind.replace(" ", "_"))
    set_state_dict(fresh, theirs, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(model, ours, x[half], y[half])
    train(fresh, theirs, x[half], y[half])
    ends = [full(m.module if isinstance(m, nn.parallel.DistributedDataParallel) else m) for m in (model, fresh)]
    return deviation(*ends)


def message(act: Callable[[], Any]) -> str:
    try:
        act()
    except UsageError as error:
        return str(error)
    return ""


def checks(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for center in CENTERS:
        for name, dtype in DTYPES.items():
            found[f"trajectory {center} {name}"] = trajectory(rank, center, dtype, "SGD")
    found["trajectory AdamW"] = trajectory(rank, "copy", torch.float64, "AdamW")
    for whole, broadcast in ((False, False), (True, False), (True, True)):
        for optimizer in ("SGD", "AdamW"):
            found[f"state dicts {whole} {broadcast} {optimizer}"] = state_dicts(rank, whole, broadcast, optimizer)
    for kind in ("sharded to sharded", "ddp to sharded", "sharded to ddp"):
        found[f"files {kind}"] = files(rank, folder, kind)

    x, _ = data(torch.float32)
    other_seed = shard(wrapped(dtype=torch.float32, seed=rank, depth=3, example_inputs=None))
    found["start, another seed on each rank"] = float(other_seed(x).detach().abs().max())
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mixed = shard(wrapped(dtype=torch.float32), mp_policy=half)
    found["start, bfloat16"] = float(mixed(x).detach().abs().max())
    model = shard(wrapped())
    gammaopt.SGD(model.parameters(), lr=0.1)
    reference: Any = model.gammaopt_theta0
    tensors = list(reference.parameters())
    found["theta0 is sharded"] = all(isinstance(tensor, DTensor) for tensor in tensors)
    model(data()[0]).sum().backward()
    found["theta0 stays sharded"] = all(isinstance(tensor, DTensor) for tensor in reference.parameters())
    with torch.device("meta"):
        blank = wrap(MLP(6, 3, width=8, depth=3, bias=True).double(), 3.0, **FIXED)
    shard(blank).to_empty(device="cpu")
    found["emptied"] = message(lambda: blank(data()[0]))
    source = shard(wrapped(**FIXED))
    blank.load_state_dict(source.state_dict())
    found["loaded after to_empty"] = deviation(full(blank), full(source))
    found["start after to_empty"] = float(blank(data()[0]).detach().abs().max())
    apart = shard(wrapped(depth=3.0 + rank))
    found["plans"] = message(lambda: apart(data()[0]))
    part = nn.Sequential(wrapped(), nn.Linear(3, 2).double())
    fully_shard(part)
    found["part"] = message(lambda: gammaopt.SGD(part[0].parameters(), lr=0.1))
    found["unwrap"] = message(lambda: unwrap(shard(wrapped())))
    torch.manual_seed(0)
    found["wrap"] = message(lambda: wrap(shard(MLP(6, 3)), 2.0, depth=3))
    return found


@pytest.fixture(scope="module")
def ranks(in_two_processes: Callable[[str, str], list[Any]]) -> list[Any]:
    return in_two_processes(__file__, "checks")


def assert_small(ranks: list[Any], start: str, tolerance: float) -> None:
    values = {name: rank[name] for rank in ranks for name in rank if name.startswith(start)}
    assert values
    assert all(value <= tolerance for value in values.values()), values


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_trajectory_is_that_of_one_process_on_the_joined_batch(
    ranks: list[Any], center: str, dtype: str, tolerance: float
) -> None:
    assert_small(ranks, f"trajectory {center} {dtype}", tolerance)
    assert_small(ranks, "trajectory AdamW", 1e-10)


def test_state_dicts_full_and_sharded_resume_exactly(ranks: list[Any]) -> None:
    assert_small(ranks, "state dicts", 0)


def test_checkpoint_files_resume_across_kinds_of_parallelism(ranks: list[Any]) -> None:
    assert_small(ranks, "files", 1e-12)


def test_output_starts_at_zero_also_in_bfloat16_or_with_other_seeds(ranks: list[Any]) -> None:
    assert_small(ranks, "start", 0)


def test_theta0_is_a_slice_on_each_rank_before_and_after_a_step(ranks: list[Any]) -> None:
    assert all(rank["theta0 is sharded"] and rank["theta0 stays sharded"] for rank in ranks)


def test_meta_device_needs_a_checkpoint(ranks: list[Any]) -> None:
    assert all("to_empty() made its memory without values" in rank["emptied"] for rank in ranks)
    assert_small(ranks, "loaded after to_empty", 0)


def test_mistakes_are_named_on_every_rank(ranks: list[Any]) -> None:
    for rank in ranks:
        assert "with depth = 3 and 4; give depth= and knee= to wrap" in rank["plans"]
        assert "call fully_shard on the wrapped model itself first" in rank["part"]
        assert "class of this FSDPGammaMLP was changed after wrapping" in rank["unwrap"]
        assert "wrap it before it becomes a FSDPMLP" in rank["wrap"]
