"""Where an optimizer's multipliers come from: wrapped models, or gamma= and depth=; and what is said if neither is.

Shown on SGD; the contract tests beside this file hold all classes to torch's behaviour.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import assert_equal_parameters, model_and_data, plan_of, reference, run
from torch import nn

import gammaopt
from gammaopt import EtaLaw, UsageError


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
    run(twin, reference("SGD", twin, lr=0.01), x, y)
    assert_equal_parameters(model, twin, rtol=1e-12, atol=1e-14)


def test_several_wrapped_models_share_an_optimizer() -> None:
    a, _, _ = model_and_data(5.0)
    b, _, _ = model_and_data(0.1)
    optimizer = gammaopt.SGD([*a.parameters(), *b.parameters()], lr=1.0)
    expected = [*plan_of(a).multipliers().values(), *plan_of(b).multipliers().values()]
    assert [[scale.lr for scale in group.scales] for group in optimizer._scales] == [expected]


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
        ({"lr": -1e-3}, r"lr=-0.001 is not allowed; give a finite lr >= 0"),
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


@pytest.mark.parametrize(("name", "decoupled"), [("Adam", False), ("Adam", True), ("AdamW", True)])
def test_weight_decay_means_the_same_at_every_gamma(name: str, decoupled: bool) -> None:
    """Coupled, it goes through Adam's normalisation with a gradient ∝ 1/γ; decoupled, each step takes lr·λ·w."""
    options: dict[str, Any] = {"decoupled_weight_decay": decoupled} if name == "Adam" else {}
    steps = []
    for gamma in (1.0, 100.0):
        model, x, y = model_and_data(gamma)
        before = copy.deepcopy(list(model.parameters()))
        optimizer = getattr(gammaopt, name)(model.parameters(), lr=0.01, eps=0.1, weight_decay=0.5, **options)
        run(model, optimizer, x, y, 1)
        shrunk = 1 - 0.01 * 0.5 if decoupled else 1.0
        moves = [(p - shrunk * q).detach() for p, q in zip(model.parameters(), before, strict=True)]
        steps.append([move / EtaLaw(3, "adam").factor(gamma) for move in moves])
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)
