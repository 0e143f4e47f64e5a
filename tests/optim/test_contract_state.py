"""Checkpoints and copies: torch's state both ways, and multipliers that no copy, pickle or load can lose."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import (
    NAMES,
    assert_equal_parameters,
    bare,
    deviation,
    model_and_data,
    ours,
    run,
    scales_of,
    theirs,
    twins,
)
from torch import Tensor, nn
from torch_cases import torch_cases

import gammaopt
from gammaopt._plan import Scale

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9, "weight_decay": 0.1}],
    "Adam": [{}, {"amsgrad": True, "weight_decay": 0.1}],
    "AdamW": [{}, {"amsgrad": True, "fused": True}],
}
CASES = [(name, options) for name in NAMES for options in OPTIONS[name]]


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        for key, value in state.items():
            torch.testing.assert_close(value, b["state"][index][key], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_state_has_torchs_shape_and_after_one_step_torchs_values(name: str, options: dict[str, Any]) -> None:
    model, twin, x, y = twins()
    options = {**options, "weight_decay": 0.0}  # the first gradient is then the same in both
    a, b = ours(name)(model.parameters(), lr=0.01, **options), theirs(name)(twin.parameters(), lr=0.01, **options)
    assert_same_state(a.state_dict(), b.state_dict())
    run(model, a, x, y, 1)
    run(twin, b, x, y, 1)
    assert_same_state(a.state_dict(), b.state_dict())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_state_loads_from_torch_and_back(name: str, options: dict[str, Any]) -> None:
    model, twin, x, y = twins()
    a, b = ours(name)(model.parameters(), lr=0.01, **options), theirs(name)(twin.parameters(), lr=0.02, **options)
    run(model, a, x, y, 3)
    run(twin, b, x, y, 3)
    rates = {key: 2 * rate for key, rate in a.effective_lrs().items()}
    for source, target in ((b, a), (a, theirs(name)(twin.parameters(), lr=0.5))):
        saved = copy.deepcopy(source.state_dict())
        target.load_state_dict(saved)
        assert_same_state(target.state_dict(), source.state_dict())
    # The loaded rate counts, with the multipliers that were there.
    assert a.effective_lrs() == pytest.approx(rates)
    run(model, a, x, y, 3)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("through", ["memory", "file", "pickle"])
def test_resumed_training_is_bit_identical(name: str, options: dict[str, Any], through: str) -> None:
    model, x, y = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.01, **options)
    run(model, optimizer, x, y, 3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if through == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    else:
        saved = copy.deepcopy(state) if through == "memory" else pickle.loads(pickle.dumps(state))
    run(model, optimizer, x, y, 3)
    fresh, _, _ = model_and_data()
    fresh.load_state_dict(saved["model"])
    resumed = ours(name)(fresh.parameters(), lr=0.5)
    resumed.load_state_dict(saved["optimizer"])
    run(fresh, resumed, x, y, 3)
    assert_equal_parameters(model, fresh, rtol=0, atol=0)
    assert_same_state(optimizer.state_dict(), resumed.state_dict())


def through_file(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": through_file,
    "twice": lambda pair: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(pair)))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_copies_keep_their_multipliers(name: str, options: dict[str, Any], how: str) -> None:
    model, x, y = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.01, **options)
    run(model, optimizer, x, y, 3)
    other, copied = COPIES[how]((model, optimizer))
    assert type(copied) is type(optimizer)
    assert copied.effective_lrs() == optimizer.effective_lrs()
    assert [list(group.scales) for group in copied._scales] == [scales_of(name, model)]
    assert copied._scales == optimizer._scales
    run(model, optimizer, x, y, 3)
    run(other, copied, x, y, 3)
    assert_equal_parameters(model, other, rtol=0, atol=0)
    # A copy takes new groups as the original does.
    extra = gammaopt.wrap(nn.Linear(2, 2).double(), 3.0, depth=1)
    copied.add_param_group({"params": extra.parameters()})
    assert len(copied.effective_lrs()) == len(optimizer.effective_lrs()) + 2


@pytest.mark.parametrize("name", NAMES)
def test_a_deepcopy_has_every_public_attribute(name: str) -> None:
    model, _, _ = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.01)
    optimizer.mine = 3
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    torchs = theirs(name)([nn.Parameter(torch.ones(1))])
    torchs.mine = 3
    kept = {key for key in vars(copy.deepcopy(optimizer)) if not key.startswith("_")}
    assert kept == {key for key in vars(copy.deepcopy(torchs)) if not key.startswith("_")} <= public


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_optimizer_of_its_own_law_keeps_it(name: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = ours(name)([parameter], lr=0.1, gamma=8.0, depth=3)
    copied = pickle.loads(pickle.dumps(optimizer))
    copied.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    expected = optimizer.effective_lrs()["parameter 0"]
    assert copied.effective_lrs() == {"parameter 0": expected, "parameter 1": expected}


@pytest.mark.parametrize("name", NAMES)
def test_state_of_an_older_torch_loads(name: str) -> None:
    newer = torch_cases()[name].newer_flags
    model, x, y = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.01)
    run(model, optimizer, x, y, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in newer:
            group.pop(flag, None)
    for state in old["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    optimizer.load_state_dict(old)
    reloaded = optimizer.state_dict()
    run(model, optimizer, x, y, 2)
    torchs = theirs(name)([p.detach().clone().requires_grad_() for p in model.parameters()])
    torchs.load_state_dict(old)
    assert reloaded["param_groups"] == torchs.state_dict()["param_groups"]


@pytest.mark.parametrize("name", NAMES)
def test_named_state_loads_into_unnamed_and_back(name: str) -> None:
    model, x, y = model_and_data()
    named, plain = ours(name)(model.named_parameters(), lr=0.01), ours(name)(model.parameters(), lr=0.02)
    run(model, named, x, y, 2)
    plain.load_state_dict(named.state_dict())
    assert plain.effective_lrs() == named.effective_lrs()
    named.load_state_dict(ours(name)(model.parameters(), lr=0.03).state_dict())
    assert "param_names" in named.param_groups[0]
    run(model, named, x, y, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_other_groups_is_refused_in_torchs_words_and_changes_nothing(name: str) -> None:
    model, x, y = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.01)
    run(model, optimizer, x, y, 1)
    before = optimizer.effective_lrs()
    for other in ([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}], [{"params": [torch.ones(1)]}]):
        messages = []
        for target in (optimizer, theirs(name)(list(model.parameters()))):
            with pytest.raises(ValueError, match="loaded state dict") as caught:
                target.load_state_dict(theirs(name)(other).state_dict())
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert optimizer.effective_lrs() == before
    run(model, optimizer, x, y, 1)


@pytest.mark.parametrize("name", NAMES)
def test_state_follows_the_dtype_of_the_parameters(name: str) -> None:
    model, x, y = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.01, **({"momentum": 0.9} if name == "SGD" else {}))
    run(model, optimizer, x, y, 2)
    saved = optimizer.state_dict()
    low, _, _ = model_and_data()
    low.float()
    resumed = ours(name)(low.parameters(), lr=0.01)
    resumed.load_state_dict(saved)
    assert {t.dtype for s in resumed.state.values() for key, t in s.items() if key != "step"} == {torch.float32}
    assert resumed.effective_lrs() == optimizer.effective_lrs()
    run(low, resumed, x.float(), y.float(), 1)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_replaced_in_place_keep_their_rates(name: str) -> None:
    """As sharding and offloading do: other tensors, same positions."""
    scales = [Scale(0.5, 2.0), Scale(4.0, 0.5)]
    params: list[Tensor] = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in scales]
    optimizer = bare(name, params, scales, lr=0.01)
    replaced = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer.param_groups[0]["params"] = replaced
    for old, new in zip(params, replaced, strict=True):
        old.grad, new.grad = torch.ones_like(old), torch.ones_like(new)
    twin = bare(name, params, scales, lr=0.01)
    optimizer.step()
    twin.step()
    assert deviation(replaced, params) == 0
