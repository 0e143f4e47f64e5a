"""Baked groups for other optimizers: the trajectories of gammaopt's own, and of optimizers it does not have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import assert_equal_parameters, model_and_data, ours, plan_of, run, scales_of, theirs, twins
from torch import nn

import gammaopt
from gammaopt import UsageError, param_groups

STEPS = 20


@pytest.mark.parametrize(
    ("name", "baked", "options"),
    [
        ("SGD", {}, {"momentum": 0.9}),
        ("SGD", {"weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}),
        ("Adam", {"eps": 1e-3}, {"amsgrad": True}),
        ("Adam", {"eps": 1e-8, "weight_decay": 0.1}, {}),
        ("Adam", {"weight_decay": 0.1}, {"eps": 0.0}),
        ("AdamW", {"eps": 1e-2, "weight_decay": 0.1}, {"fused": True}),
    ],
)
def test_torchs_class_over_baked_groups_has_gammaopts_trajectory(
    name: str, baked: dict[str, Any], options: dict[str, Any]
) -> None:
    model, twin, x, y = twins()
    coupled = name == "Adam"
    groups = param_groups(twin, 0.01, optimizer="sgd" if name == "SGD" else "adam", coupled=coupled, **baked)
    run(model, ours(name)(model.parameters(), lr=0.01, **baked, **options), x, y, STEPS)
    run(twin, theirs(name)(groups, **options), x, y, STEPS)
    assert_equal_parameters(model, twin)


@pytest.mark.parametrize("family", ["sgd", "adam"])
def test_one_group_per_distinct_scale_with_every_parameter_once(family: Any) -> None:
    model, _, _ = model_and_data()
    groups = param_groups(model, 0.01, optimizer=family)
    multipliers = plan_of(model).multipliers(family)
    assert len(groups) == len(set(multipliers.values())) > 1
    assert all(set(group) == {"params", "lr"} for group in groups)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates == {id(p): 0.01 * multipliers[name] for name, p in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(multipliers)


def test_eps_and_weight_decay_are_there_only_if_given_and_eps_may_split_a_group() -> None:
    model, _, _ = model_and_data()
    groups = param_groups(model, 0.01, optimizer="adam", weight_decay=0.0, eps=1e-8)
    assert all(set(group) == {"params", "lr", "weight_decay", "eps"} for group in groups)
    assert all(group["weight_decay"] == 0 for group in groups)
    assert len(groups) == len(set(scales_of("Adam", model))) > len(param_groups(model, 0.01, optimizer="adam"))


def test_schedulers_that_multiply_rates_keep_the_trajectory() -> None:
    model, twin, x, y = twins()
    optimizers = gammaopt.SGD(model.parameters(), lr=0.01), torch.optim.SGD(param_groups(twin, 0.01))
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=STEPS) for o in optimizers]
    for _ in range(STEPS):
        for net, optimizer, scheduler in zip((model, twin), optimizers, schedulers, strict=True):
            run(net, optimizer, x, y, 1)
            scheduler.step()
    assert_equal_parameters(model, twin)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_torchs_muon_steps_matrices_at_baked_rates() -> None:
    model, x, y = model_and_data()
    model.float()
    groups = param_groups(model, 0.01, optimizer="muon", weight_decay=0.5)
    matrices = [{**group, "params": [p for p in group["params"] if p.ndim == 2]} for group in groups]
    matrices = [group for group in matrices if group["params"]]
    optimizer = torch.optim.Muon(matrices, momentum=0.0, nesterov=False)
    before = copy.deepcopy(dict(model.named_parameters()))
    run(model, optimizer, x.float(), y.float(), 1)
    multipliers = plan_of(model).multipliers("muon")
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            assert torch.equal(parameter, before[name])
            continue
        # Muon steps by an orthogonalised matrix times √max(1, rows/columns); its spectral norm is about 1.
        step = (before[name] * (1 - 0.01 * 0.5) - parameter).detach()
        rows, columns = parameter.shape
        size = float(torch.linalg.matrix_norm(step, 2)) / max(1.0, rows / columns) ** 0.5
        assert 0.6 < size / (0.01 * multipliers[name]) < 1.3
    losses = []
    for _ in range(60):
        run(model, optimizer, x.float(), y.float(), 1)
        losses.append(float((model(x.float()) - y.float()).square().mean().detach()))
    assert losses[-1] < losses[0]


def test_a_module_that_holds_wrapped_models() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (model_and_data(gamma)[0] for gamma in (5.0, 0.2))

    pair = Pair()
    groups = param_groups(pair, 0.01)
    expected = {0.01 * m for part in (pair.a, pair.b) for m in plan_of(part).multipliers().values()}
    assert {group["lr"] for group in groups} == expected
    pair.register_parameter("own", nn.Parameter(torch.ones(2)))
    with pytest.raises(UsageError, match=r"parameter 'own' \(2,\) of this Pair belongs to no wrapped model; call"):
        param_groups(pair, 0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, r"lr=0 is not allowed; give a finite lr > 0"),
        ({"lr": -0.1}, r"lr=-0.1 is not allowed"),
        ({"lr": "fast"}, r"lr='fast' is not a number"),
        ({"optimizer": "lion"}, r"unknown optimizer 'lion'; choose one of: sgd, adam"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1 is not allowed"),
        ({"eps": float("nan")}, r"eps=nan is not allowed"),
        ({"model": nn.Linear(2, 2)}, r"this Linear is not wrapped; call gammaopt.wrap\(net, gamma=…\) first"),
        ({"model": nn.ReLU()}, r"this ReLU is not wrapped"),
        ({"model": [torch.ones(2)]}, r"model is a list; give the wrapped torch.nn.Module"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    model, _, _ = model_and_data()
    with pytest.raises(UsageError, match=message) as caught:
        param_groups(**{"model": model, "lr": 0.1, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_gammaopts_own_optimizers_refuse_baked_groups_which_have_gamma_already(name: str) -> None:
    model, _, _ = model_and_data()
    message = rf"^these groups are of gammaopt.param_groups, .*{name} would count it twice; give it model"
    with pytest.raises(UsageError, match=message):
        ours(name)(param_groups(model, lr=0.1), lr=0.1)
    with pytest.raises(UsageError, match="count it twice"):
        ours(name)([{**group, "weight_decay": 0.0} for group in param_groups(model, lr=0.1)], lr=0.1)
    kept = theirs(name)(param_groups(model, lr=0.1), lr=0.1).param_groups
    assert {type(group["params"]) for group in kept} == {list}
