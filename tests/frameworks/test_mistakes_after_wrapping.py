"""What a user may do after ``wrap`` that would give wrong rates or another function without a word."""

from __future__ import annotations

import copy
import gc
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


def test_an_optimizer_of_its_own_law_is_told_when_its_parameters_are_wrapped_after() -> None:
    net = Net()
    optimizer = gammaopt.SGD(net.parameters(), lr=0.1, gamma=2.0, depth=2)
    wrap(net, 3.0, depth=2)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"'body.weight' belongs to a model wrapped with γ = 3, but gamma=2 was"):
            optimizer.step()


def test_an_optimizer_follows_its_model_when_that_is_wrapped_again() -> None:
    model = wrap(Net(), 2.0, depth=2)
    optimizer = gammaopt.SGD(model.parameters(), lr=0.1)
    assert set(optimizer.effective_lrs().values()) == {0.2}
    wrap(unwrap(model), 3.0, depth=2)
    assert min(optimizer.effective_lrs().values()) == pytest.approx(0.3)


@pytest.mark.parametrize("together", [True, False])
def test_an_optimizer_follows_one_model_after_another_of_its_models_is_gone(together: bool) -> None:
    lives, gone = wrap(Net(), 2.0, depth=2), wrap(Net(), 4.0, depth=2)
    of_gone = list(gone.parameters())
    both = [*of_gone[:1], *lives.parameters(), *of_gone[1:]]
    groups = [{"params": both}] if together else [{"params": of_gone}, {"params": list(lives.parameters())}]
    optimizer = gammaopt.SGD(groups, lr=0.1)
    before = optimizer.effective_lrs()
    del gone
    gc.collect()
    wrap(unwrap(lives), 3.0, depth=2)
    then, now = list(before.values()), list(optimizer.effective_lrs().values())
    of_lives = slice(1, 5) if together else slice(4, 8)
    assert now[of_lives] == pytest.approx([0.3] * 4)
    assert list(optimizer.effective_lrs()) == list(before)
    for rates in (then, now):
        del rates[of_lives]
    assert now == then
    assert now == pytest.approx([0.4] * 4)


def test_a_model_that_was_wrapped_again_and_then_dropped_is_not_taken_for_an_unwrapped_one() -> None:
    model = wrap(Net(), 2.0, depth=2)
    optimizer = gammaopt.SGD(model.parameters(), lr=0.1)
    wrap(unwrap(model), 3.0, depth=2)
    rates = optimizer.effective_lrs()
    del model
    gc.collect()
    unwrap(wrap(Net(), 1.0, depth=2))  # so that the rates are looked up anew
    assert optimizer.effective_lrs() == rates


@pytest.mark.parametrize("undo", ["unwrap", "fold"])
def test_an_optimizer_of_a_model_that_was_unwrapped_refuses_to_step_the_plain_one(undo: str) -> None:
    x = torch.ones(2, 6)
    model = wrap(Net(), 8.0, depth=2, center="none")
    optimizer = gammaopt.SGD(model.parameters(), lr=0.1)
    plain = unwrap(model) if undo == "unwrap" else gammaopt.fold(model, x)
    plain(x).square().mean().backward()
    before = [parameter.detach().clone() for parameter in plain.parameters()]
    for look in (optimizer.step, optimizer.effective_lrs, optimizer.step):
        with pytest.raises(UsageError) as caught:
            look()
        assert str(caught.value) == (
            "the model of parameter 'body.weight' was unwrapped since this SGD was built, and its rates are those of "
            "the wrapped one; build a torch.optim optimizer for the plain network, or wrap it again"
        )
    assert all(torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    wrap(plain, 3.0, depth=2)
    assert min(optimizer.effective_lrs().values()) == pytest.approx(0.3)
    optimizer.step()


def test_unwrapping_a_copy_leaves_the_models_own_optimizer_alone() -> None:
    model = wrap(Net(), 8.0, depth=2)
    optimizer = gammaopt.SGD(model.parameters(), lr=0.1)
    unwrap(copy.deepcopy(model))
    model(torch.ones(2, 6)).square().mean().backward()
    optimizer.step()
    alone = copy.deepcopy(optimizer)  # of parameters that no model holds
    unwrap(model)
    alone.step()


def test_a_wrapped_model_that_is_referenced_nowhere_is_named_as_a_cause() -> None:
    parameters = list(wrap(Net(), 2.0, depth=2).parameters())
    gc.collect()
    with pytest.raises(UsageError) as caught:
        gammaopt.SGD(parameters, lr=0.1)
    assert "and keep the model (one that is referenced nowhere is gone)" in str(caught.value)


def test_a_replaced_head_that_would_broadcast_is_named_when_the_model_is_called() -> None:
    model: Any = wrap(Net(), 2.0, depth=2)
    model.head = nn.Linear(8, 1)
    with pytest.raises(
        UsageError, match=r"output of GammaNet has shape \(2, 1\) and had \(2, 3\) when it was wrapped;"
    ):
        model(torch.ones(2, 6))


def test_a_part_that_is_wrapped_already() -> None:
    whole = nn.Sequential(wrap(Net(), 2.0, depth=2), nn.Linear(3, 1))
    with pytest.raises(
        UsageError, match=r"part '0' of this Sequential is already wrapped with γ = 2; call gammaopt.un"
    ):
        wrap(whole, 1.0, depth=2)
    part: Any = nn.Sequential(Net(), nn.Linear(3, 1))
    optimizer = gammaopt.SGD(wrap(part, 2.0, depth=2).parameters(), lr=0.1)
    inner = wrap(part[0], 3.0, depth=2)
    with pytest.raises(UsageError, match=r"parameter 'body.weight' \(8, 6\) belongs to two wrapped models; unwrap one"):
        optimizer.step()
    unwrap(inner)
    optimizer.step()


@pytest.mark.parametrize("center", ["copy", "none"])
def test_checkpoint_of_another_width_or_depth_is_named_in_one_line(center: Any) -> None:
    def build(width: int, depth: int) -> nn.Module:
        return wrap(MLP(6, 3, width=width, depth=depth), 2.0, depth=2, center=center)

    model = build(8, 3)
    for width, depth, line in [
        (16, 3, "another width: '1.weight' is (16, 6) there and (8, 6) here; build the net at the checkpoint's width"),
        (8, 2, "another depth: '5.weight' of the model is not in the checkpoint; build the net with the checkpoint's"),
        (8, 4, "another depth: '7.weight' of the checkpoint is not in the model; build the net with the checkpoint's"),
    ]:
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(build(width, depth).state_dict())
        assert isinstance(caught.value, UsageError)
        assert str(caught.value).splitlines()[0].startswith(f"the checkpoint was saved at {line}")
    line = (
        r"^the checkpoint is of a plain network, without 'gammaopt_plan' and θ₀; load it into the net before gammaopt.w"
    )
    with pytest.raises(UsageError, match=line):
        wrap(Net(), 2.0, depth=2).load_state_dict(Net().state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):  # another network: torch's words alone
        model.load_state_dict({"module.1.weight": torch.ones(8, 6)})


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.layer(x)
        return h.mean() if self.kind == "scalar" else h[:, :0] if self.kind == "unitless" else h[:0]


def test_empty_and_scalar_outputs() -> None:
    for kind, line in [
        ("scalar", r"^Odd returns a scalar, not an output for each sample; if that is a loss, compute it from the mod"),
        ("empty", r"^Odd returns an empty tensor of shape \(0, 3\); give a batch with samples$"),
        ("unitless", r"^Odd returns an empty tensor of shape \(2, 0\); give its output at least one unit$"),
    ]:
        with pytest.raises(UsageError, match=line):
            wrap(Odd(kind), 1.0, example_inputs=torch.ones(2, 6))
    model = wrap(Odd("empty"), 1.0, depth=1)
    with pytest.raises(UsageError, match=r"^GammaOdd returns an empty tensor of shape \(0, 3\)"):
        model(torch.ones(2, 6))


@pytest.mark.parametrize("center", ["copy", "none"])
def test_a_scalar_output_that_no_example_inputs_told_of(center: Any) -> None:
    """A net that returns its loss would be trained by (loss − loss₀)/γ."""
    model = wrap(Odd("scalar"), 0.5, depth=1, center=center)
    x = torch.ones(2, 6)
    line = (
        r"^GammaOdd returns a scalar, not an output for each sample, and 1/γ was applied to that; if it is a loss, "
        r"compute it from the model's output instead, or give output= to gammaopt.wrap$"
    )
    assert torch.vmap(model)(torch.ones(4, 2, 6)).shape == (4,)
    with pytest.warns(UserWarning, match=line):
        model(x)
    model(x)  # once


def test_a_list_of_example_inputs() -> None:
    x = torch.ones(2, 6)
    line = (
        r"^example inputs of \[shape \(2, 6\) float32\] do not fit Net: .*; a list is passed as one argument: give a "
        r"tensor, or a tuple of the positional arguments$"
    )
    with pytest.raises(UsageError, match=line):
        wrap(Net(), 1.0, example_inputs=[x])  # type: ignore[arg-type]
    assert wrap(Net(), 1.0, example_inputs=(x,)) is not None


def test_all_parameters_frozen() -> None:
    line = r"^Net has no trainable parameters: there is nothing to train; call requires_grad_\(True\) on some$"
    with pytest.raises(UsageError, match=line):
        wrap(Net().requires_grad_(False), 1.0, depth=1)


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
    rates = optimizer.effective_lrs()
    assert list(rates.values()) == [rate for plan in plans for rate in plan.multipliers().values()]
    assert rates["1.weight"] != rates["1.weight (2)"]


def test_wrapping_or_unwrapping_what_is_compiled_already() -> None:
    with pytest.raises(UsageError, match=r"^net is compiled already; wrap it before torch.compile, and compile wh"):
        wrap(torch.compile(Net(), backend="eager"), 2.0, depth=2)  # type: ignore[type-var]
    compiled: Any = torch.compile(wrap(Net(), 2.0, depth=2), backend="eager")
    with pytest.raises(UsageError, match=r"^this OptimizedModule is not wrapped; its part '_orig_mod' is: unwrap"):
        unwrap(compiled)
    assert type(unwrap(compiled._orig_mod)) is Net


def test_wrapping_a_model_that_is_parallel_already() -> None:
    with pytest.raises(UsageError, match="wrap it before it becomes a DataParallel"):
        wrap(nn.DataParallel(Net()), 2.0, depth=2)
