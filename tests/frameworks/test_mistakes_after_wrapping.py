"""What a user may do after ``wrap`` that would give wrong rates or another function without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gammaopt
from gammaopt import UsageError, unwrap, wrap
from gammaopt.online import MLP


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("cls", [gammaopt.SGD, gammaopt.AdamW])
def test_a_replaced_head_is_named_with_the_fix(cls: Any) -> None:
    model = wrap(Net(), 2.0, depth=2)
    model.head = nn.Linear(8, 5)
    with pytest.raises(UsageError, match=r"parameter 'head.weight' \(5, 8\) had shape \(3, 8\) when GammaNet was") as e:
        cls(model.parameters(), lr=0.1)
    assert "call gammaopt.unwrap on the model and wrap it again" in str(e.value)
    again = wrap(unwrap(model), 2.0, depth=2)
    assert "head.weight" in cls(again.parameters(), lr=0.1).effective_lrs()


def test_an_added_parameter_is_named_with_the_fix() -> None:
    model: Any = wrap(Net(), 2.0, depth=2)
    model.extra = nn.Linear(3, 3)
    with pytest.raises(UsageError, match=r"parameter 'extra.weight' \(3, 3\) was not there when GammaNet was wrapped"):
        gammaopt.SGD(model.parameters(), lr=0.1)
    named = [parameter for name, parameter in model.named_parameters() if not name.startswith("extra")]
    assert len(gammaopt.SGD(named, lr=0.1).effective_lrs()) == 4


def test_optimizer_before_wrap() -> None:
    net = Net()
    with pytest.raises(UsageError, match=r"belongs to no wrapped model; call gammaopt.wrap"):
        gammaopt.SGD(net.parameters(), lr=0.1)
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    model = wrap(net, 2.0, depth=2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    (model(torch.ones(2, 6)) - 1).square().mean().backward()
    plain.step()  # torch's own optimizer holds the same parameters, and steps them at its own rate
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_checkpoint_of_another_gamma_says_both() -> None:
    saved = wrap(Net(), 2.0, depth=2).state_dict()
    with pytest.raises(RuntimeError, match="saved at γ = 2 and this model is wrapped with γ = 3; wrap the net with"):
        wrap(Net(), 3.0, depth=2).load_state_dict(saved)


def test_two_wrapped_models_in_one_optimizer_keep_their_own_rates() -> None:
    a, b = wrap(MLP(6, 3), 5.0, depth=3), wrap(MLP(6, 3), 0.1, depth=3)
    plans: list[Any] = [a.gammaopt, b.gammaopt]
    optimizer = gammaopt.SGD([{"params": a.parameters()}, {"params": b.parameters()}], lr=1.0)
    for group, plan in zip(optimizer._scales, plans, strict=True):
        assert [scale.lr for scale in group.scales] == list(plan.multipliers().values())


def test_wrapping_a_model_that_is_parallel_already() -> None:
    with pytest.raises(UsageError, match="wrap it before it becomes a DataParallel"):
        wrap(nn.DataParallel(Net()), 2.0, depth=2)
