"""The drop-in contract of SGD: the plain reference's trajectory, torch's groups and state, and nothing lost."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import EtaLaw, Plan, UsageError, wrap
from gammaopt.online import MLP

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
]
KERNELS: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, {"fused": True}, {"differentiable": False}]


def model_and_data(gamma: float = 5.0, **kwargs: Any) -> tuple[MLP, Tensor, Tensor]:
    torch.manual_seed(0)
    net = MLP(6, 3, width=8, depth=3, bias=True).double()
    options = {"depth": 3, "parametrization": "mean_field", **kwargs}
    return wrap(net, gamma, **options), torch.randn(10, 6).double(), torch.randn(10, 3).double()


def plan_of(model: nn.Module) -> Plan:
    assert isinstance(model.gammaopt, Plan)
    return model.gammaopt


def reference(model: nn.Module, lr: float, **options: Any) -> torch.optim.SGD:
    """Torch's own class with one group per tensor at lr·m and weight decay wd/m: slow, and plainly right."""
    multipliers = plan_of(model).multipliers()
    decay = options.pop("weight_decay", 0.0)
    groups = [
        {"params": [parameter], "lr": lr * multipliers[name], "weight_decay": decay / multipliers[name]}
        for name, parameter in model.named_parameters()
    ]
    return torch.optim.SGD(groups, **options)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = 10) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def assert_equal_parameters(a: nn.Module, b: nn.Module, **tolerance: Any) -> None:
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize(("options", "kernel"), list(itertools.product(OPTIONS, KERNELS)))
def test_trajectory_is_that_of_one_torch_group_per_tensor(options: dict[str, Any], kernel: dict[str, Any]) -> None:
    model, x, y = model_and_data()
    twin = copy.deepcopy(model)
    run(model, gammaopt.SGD(model.parameters(), lr=0.01, **options, **kernel), x, y)
    run(twin, reference(twin, 0.01, **options), x, y)
    assert_equal_parameters(model, twin, rtol=1e-12, atol=1e-14)
    assert not torch.equal(next(model.parameters()), next(model_and_data()[0].parameters()))


@pytest.mark.parametrize("options", OPTIONS)
def test_gamma_one_as_is_is_bit_identical_to_torch(options: dict[str, Any]) -> None:
    model, x, y = model_and_data(1.0, parametrization="as_is")
    twin = copy.deepcopy(model)
    run(model, gammaopt.SGD(model.parameters(), lr=0.01, **options), x, y)
    run(twin, torch.optim.SGD(twin.parameters(), lr=0.01, **options), x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_signature_opens_with_torchs_own() -> None:
    ours = list(inspect.signature(gammaopt.SGD).parameters.values())
    theirs = list(inspect.signature(torch.optim.SGD).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert [(p.name, p.kind) for p in ours[len(theirs) :]] == [
        (name, inspect.Parameter.KEYWORD_ONLY) for name in ("gamma", "depth", "loss", "knee")
    ]


def test_groups_and_state_dict_are_exactly_torchs_and_load_both_ways() -> None:
    model, x, y = model_and_data()
    twin = copy.deepcopy(model)
    ours = gammaopt.SGD(model.parameters(), lr=0.01, momentum=0.9)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    run(model, ours, x, y, steps=2)
    run(twin, theirs, x, y, steps=2)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert {k: set(v) for k, v in a["state"].items()} == {k: set(v) for k, v in b["state"].items()}
    theirs.load_state_dict(a)
    before = ours.effective_lrs()
    ours.load_state_dict(b)
    assert ours.effective_lrs() == before


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_keep_their_multipliers(twin_of: Any) -> None:
    model, x, y = model_and_data()
    optimizer = gammaopt.SGD(model.parameters(), lr=0.01, momentum=0.9)
    run(model, optimizer, x, y, steps=3)
    model_2, optimizer_2 = twin_of((model, optimizer))
    assert optimizer_2.effective_lrs() == optimizer.effective_lrs()
    run(model, optimizer, x, y, steps=3)
    run(model_2, optimizer_2, x, y, steps=3)
    assert_equal_parameters(model, model_2, rtol=0, atol=0)


def test_resumed_training_is_bit_identical() -> None:
    model, x, y = model_and_data()
    optimizer = gammaopt.SGD(model.parameters(), lr=0.01, momentum=0.9)
    run(model, optimizer, x, y, steps=3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, x, y, steps=3)
    torch.manual_seed(77)
    fresh = wrap(MLP(6, 3, width=8, depth=3, bias=True).double(), 5.0, depth=3, parametrization="mean_field")
    fresh.load_state_dict(saved[0])
    resumed = gammaopt.SGD(fresh.parameters(), lr=0.5)
    resumed.load_state_dict(saved[1])
    run(fresh, resumed, x, y, steps=3)
    assert_equal_parameters(model, fresh, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=12),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=0.02, step_size_up=3),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=12, eta_min=0.004),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.01, total_iters=5),
    ],
)
def test_absolute_schedulers_keep_the_ratios_between_parameters(make: Any) -> None:
    model, x, y = model_and_data()
    optimizer = gammaopt.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = make(optimizer)
    multipliers = plan_of(model).multipliers()
    for _ in range(8):
        run(model, optimizer, x, y, steps=1)
        scheduler.step()
        lr = optimizer.param_groups[0]["lr"]
        assert optimizer.effective_lrs() == pytest.approx({name: lr * m for name, m in multipliers.items()})


def test_step_hooks_fire_once_and_closure_is_evaluated_once() -> None:
    model, x, y = model_and_data()
    optimizer = gammaopt.SGD(model.parameters(), lr=0.01)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss: Tensor = (model(x) - y).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(float(y.square().mean()))
    assert calls == ["pre", "closure", "post"]


def test_tensor_lr_is_used_and_never_changed() -> None:
    model, x, y = model_and_data()
    twin = copy.deepcopy(model)
    lr = torch.tensor(0.01, dtype=torch.float64)
    run(model, gammaopt.SGD(model.parameters(), lr=lr, foreach=False), x, y, steps=3)
    run(twin, gammaopt.SGD(twin.parameters(), lr=0.01), x, y, steps=3)
    assert lr.item() == 0.01
    assert_equal_parameters(model, twin, rtol=1e-12, atol=1e-14)


def test_zero_lr_set_later_is_inert() -> None:
    model, x, y = model_and_data()
    before = copy.deepcopy(list(model.parameters()))
    optimizer = gammaopt.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    run(model, optimizer, x, y, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_parameters_without_gradient_are_left_alone() -> None:
    model, x, y = model_and_data()
    model[1].requires_grad_(False)
    optimizer = gammaopt.SGD(model.parameters(), lr=0.01, momentum=0.9)
    twin = copy.deepcopy(model)
    run(model, optimizer, x, y)
    run(twin, reference(twin, 0.01, momentum=0.9), x, y)
    assert_equal_parameters(model, twin, rtol=1e-12, atol=1e-14)


def test_groups_of_the_users_own_and_named_parameters() -> None:
    model, _, _ = model_and_data()
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named.items() if n.endswith("bias")], "lr": 0.002},
        {"params": [p for n, p in named.items() if n.endswith("weight")]},
    ]
    optimizer = gammaopt.SGD(groups, lr=0.01)
    multipliers = plan_of(model).multipliers()
    assert optimizer.effective_lrs() == pytest.approx(
        {name: (0.002 if name.endswith("bias") else 0.01) * m for name, m in multipliers.items()}
    )
    assert gammaopt.SGD(model.named_parameters(), lr=0.01).param_groups[0]["param_names"] == list(named)


def test_a_group_added_later_gets_its_multipliers_and_a_bad_one_leaves_nothing() -> None:
    model, x, y = model_and_data()
    parameters = list(model.parameters())
    optimizer = gammaopt.SGD(parameters[:2], lr=0.01)
    with pytest.raises(UsageError, match=r"parameter 2 \(2,\) belongs to no wrapped model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": parameters[2:]})
    twin = copy.deepcopy(model)
    run(model, optimizer, x, y)
    run(twin, reference(twin, 0.01), x, y)
    assert_equal_parameters(model, twin, rtol=1e-12, atol=1e-14)


def test_several_wrapped_models_share_an_optimizer() -> None:
    a, _, _ = model_and_data(5.0)
    b, _, _ = model_and_data(0.1)
    optimizer = gammaopt.SGD([*a.parameters(), *b.parameters()], lr=1.0)
    expected = [*plan_of(a).multipliers().values(), *plan_of(b).multipliers().values()]
    assert optimizer._multipliers == [expected]


def test_parameters_of_no_wrapped_model_need_gamma_and_depth() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(UsageError, match=r"parameter 0 \(2, 3\) belongs to no wrapped model; call gammaopt.wrap"):
        gammaopt.SGD(net.parameters(), lr=0.1)
    optimizer = gammaopt.SGD(net.parameters(), lr=0.1, gamma=0.1, depth=4, loss="cross_entropy")
    law = EtaLaw(4, "sgd", "cross_entropy")
    assert optimizer.effective_lrs() == {f"parameter {i}": pytest.approx(0.1 * law.factor(0.1)) for i in range(2)}
    assert set(optimizer.param_groups[0]) == set(torch.optim.SGD(net.parameters()).param_groups[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"lr=0 is not allowed; give a finite lr > 0"),
        ({"lr": -1e-3}, r"lr=-0.001 is not allowed"),
        ({"lr": float("nan")}, r"lr=nan is not allowed"),
        ({"lr": "fast"}, r"lr='fast' is not a number"),
        ({"gamma": 2.0}, r"gamma= was given without depth=; give both"),
        ({"depth": 2.0}, r"depth= was given without gamma=; give both"),
        ({"gamma": -2.0, "depth": 3}, r"gamma=-2 is not allowed"),
        ({"gamma": 2.0, "depth": 3}, r"parameter '1.weight' belongs to a model wrapped with γ = 5, but gamma=2"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    model, _, _ = model_and_data()
    with pytest.raises(UsageError, match=message) as caught:
        gammaopt.SGD(model.parameters(), **{"lr": 0.1, **options})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_grad_scaler_skips_a_step_that_overflowed() -> None:
    model, x, _ = model_and_data()
    model.float()
    optimizer = gammaopt.SGD(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = copy.deepcopy(list(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.scale((model(x.float()) * torch.inf).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() < 8.0
