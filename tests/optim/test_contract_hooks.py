"""What stands around a step: hooks, profiler, closures, printing, zero_grad. Each as often and as named as torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import NAMES, bare, model_and_data, ours, run, theirs, twins
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gammaopt
from gammaopt._plan import Scale


def log_of_calls(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    calls: list[str] = []

    def note(what: str) -> Any:
        return lambda *_: calls.append(what)

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_state_dict_pre_hook(note("state_dict pre")),
        optimizer.register_state_dict_post_hook(note("state_dict post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_post_hook(note("load post")),
    ]

    def closure() -> Tensor:
        calls.append("closure with grad" if torch.is_grad_enabled() else "closure without grad")
        optimizer.zero_grad()
        loss: Tensor = (model(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step()
    with torch.no_grad():
        optimizer.step(closure=closure)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    for handle in handles:
        handle.remove()
    optimizer.step()
    optimizer.state_dict()
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_hooks_and_closures_are_called_exactly_as_torch_calls_them(name: str) -> None:
    model, twin, x, y = twins()
    given = log_of_calls(ours(name)(model.parameters(), lr=0.01), model, x, y)
    assert given == log_of_calls(theirs(name)(twin.parameters(), lr=0.01), twin, x, y)
    assert given.count("pre") == given.count("post") == given.count("global pre") == 3
    assert given.count("closure with grad") == 2


@pytest.mark.parametrize("name", NAMES)
def test_hooks_may_change_arguments_and_state_dicts(name: str) -> None:
    model, x, y = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.01)
    (model(x) - y).square().mean().backward()
    optimizer.register_step_pre_hook(lambda itself, *_: ((itself, lambda: 7.0), {}))
    assert optimizer.step() == 7.0
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "extra"})
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_the_step_stands_once_in_a_profile_under_its_own_name(name: str) -> None:
    model, x, y = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.01)
    run(model, optimizer, x, y, 1)
    assert type(optimizer).step.hooked
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events if event.name.startswith("Optimizer.")]
    assert names == [f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"]


@pytest.mark.parametrize("name", NAMES)
def test_a_subclass_may_override_step_and_its_hooks_still_fire_once(name: str) -> None:
    class Own(ours(name)):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Silent(ours(name)):  # type: ignore[misc]
        pass

    model, x, y = model_and_data()
    for cls, times in ((Silent, 1), (Own, 2)):
        optimizer = cls(model.parameters(), lr=0.01)
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        run(model, optimizer, x, y, 1)
        # An own step() that calls super().step() is hooked twice by torch itself.
        assert len(calls) == times == torch_calls(theirs(name), own=cls is Own)


def torch_calls(cls: Any, own: bool) -> int:
    def step(self: Any, closure: Any = None) -> Any:
        return cls.step(self, closure)

    derived = type("Own", (cls,), {"step": step} if own else {})
    calls: list[int] = []
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = derived([parameter])
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step()
    return len(calls)


@pytest.mark.parametrize("name", NAMES)
def test_it_prints_as_torchs_and_has_no_keys_of_its_own(name: str) -> None:
    model, twin, _, _ = twins()
    groups: Any = [
        [{"params": net[1].parameters(), "lr": 0.5}, {"params": net[3].parameters()}] for net in (model, twin)
    ]
    a, b = ours(name)(groups[0], lr=0.01), theirs(name)(groups[1], lr=0.01)
    assert repr(a) == repr(b)
    assert a.defaults == b.defaults
    assert [list(group) for group in a.param_groups] == [list(group) for group in b.param_groups]
    assert a.state_dict() == b.state_dict()
    # Nothing that torch pickles or copies is missing, and all of ours is private.
    assert {key for key in set(vars(a)) ^ set(vars(b)) if not key.startswith("_")} == set()
    assert "lr_scale" not in a.param_groups[0]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_zero_grad(name: str, set_to_none: bool) -> None:
    model, x, y = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.01)
    run(model, optimizer, x, y, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    for parameter in model.parameters():
        assert parameter.grad is None if set_to_none else not parameter.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("kernel", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("name", NAMES)
def test_zero_rate_and_zero_gradients_are_inert(name: str, kernel: dict[str, Any]) -> None:
    """``torch.distributed.checkpoint`` makes a fresh optimizer's state by such a step."""
    model, x, y = model_and_data()
    before = copy.deepcopy(list(model.parameters()))
    optimizer = ours(name)(model.parameters(), lr=0.01, weight_decay=0.1, **kernel)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    run(model, optimizer, x, y, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    optimizer.param_groups[0].update(lr=0.01, weight_decay=0.0)
    fresh = ours(name)(model.parameters(), lr=0.01, weight_decay=0.0, **kernel)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fresh.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_any_gradient_does_nothing(name: str) -> None:
    model, _, _ = model_and_data()
    before = copy.deepcopy(list(model.parameters()))
    optimizer = ours(name)(model.parameters(), lr=0.01, weight_decay=0.1)
    assert optimizer.step() is None
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_the_default_dtype_does_not_matter(name: str, dtype: torch.dtype) -> None:
    results = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            parameter = nn.Parameter(torch.linspace(0, 1, 5, dtype=torch.float64))
            optimizer = bare(name, [parameter], [Scale(2.0, 0.5)], lr=0.01, foreach=True)
            for _ in range(3):
                parameter.grad = parameter.detach().clone()
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-12 if name == "SGD" else 1e-6, atol=0)


def test_named_parameters_are_kept_and_named_in_rates() -> None:
    model, _, _ = model_and_data()
    optimizer = gammaopt.AdamW(model.named_parameters(), lr=0.01)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert list(optimizer.effective_lrs()) == optimizer.param_groups[0]["param_names"]
