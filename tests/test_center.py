"""What stands in for −h₀ (zero readout, nothing), what undoes it (fold), and which part of an output is h."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import Plan, UsageError, fold, wrap
from gammaopt.online import MLP


def mlp(**kwargs: Any) -> MLP:
    torch.manual_seed(0)
    return MLP(9, 4, width=16, **kwargs).double()


X = torch.randn(8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(X) - Y).square().mean().backward()
    optimizer.step()


def train(model: nn.Module, steps: int = 20) -> None:
    optimizer = gammaopt.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        train_step(model, optimizer)


def test_zero_readout_starts_at_zero_without_a_second_forward() -> None:
    calls: list[int] = []
    net = mlp(bias=True)
    model = wrap(net, 0.1, example_inputs=X, center="zero_readout", parametrization="mean_field")
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    assert not model(X).any()
    assert calls == [1]
    assert not any("theta0" in name for name in model.state_dict())
    assert isinstance(model.gammaopt, Plan)
    # Measured before the readout was set to 0; the input layer's bias of 0 takes nothing from it.
    assert model.gammaopt.depth == pytest.approx(3.0)
    train(model)
    assert model(X).abs().max() > 0.1


def test_zero_readout_is_refused_where_the_output_does_not_vanish_and_where_nobody_can_see() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(9, 9)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x)  # type: ignore[no-any-return]

    net = Skip().double()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        UsageError, match=r"with its readout 'layer' at 0 the output of Skip is still .* use center='copy'"
    ):
        wrap(net, 1.0, example_inputs=X, center="zero_readout")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    frozen = mlp()
    frozen[-1].requires_grad_(False)
    with pytest.raises(UsageError, match=r"readout '5' is frozen and would stay at 0; use center='copy'"):
        wrap(frozen, 1.0, example_inputs=X, center="zero_readout")
    tied = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, 9, bias=False)).double()
    tied[2].weight = tied[0].weight
    with pytest.raises(UsageError, match=r"readout '2' is tied to '0', which would be 0 with it; use center='copy'"):
        wrap(tied, 1.0, example_inputs=X, center="zero_readout")
    normalised = mlp()
    nn.utils.parametrizations.weight_norm(normalised[-1])  # its weight is g·v/‖v‖
    with pytest.raises(
        UsageError, match=r"with its readout '5' at 0 the output of MLP is still nan; use center='copy'"
    ):
        wrap(normalised, 1.0, example_inputs=X, center="zero_readout")
    with pytest.raises(UsageError, match="center='zero_readout' needs example_inputs="):
        wrap(mlp(), 1.0, depth=3, center="zero_readout")


@pytest.mark.parametrize("center", ["zero_readout", "none"])
def test_fold_gives_a_plain_network_that_computes_f(center: Any) -> None:
    net = mlp(bias=True)
    names = list(net.state_dict())
    model = wrap(net, 0.3, example_inputs=X, center=center)
    train(model)
    expected = model(X).detach()
    plain = fold(model, X)
    assert plain is model
    assert type(plain) is MLP
    assert list(plain.state_dict()) == names
    torch.testing.assert_close(plain(X), expected, rtol=1e-12, atol=1e-12)


def test_fold_is_refused_where_it_is_not_exact() -> None:
    with pytest.raises(UsageError, match=r"frozen copy's part − h₀/γ, which no readout holds"):
        fold(wrap(mlp(), 0.3, depth=3), X)
    squashed = nn.Sequential(nn.Linear(9, 4), nn.Tanh()).double()
    model = wrap(squashed, 0.3, depth=1, center="none")
    expected = model(X).detach()
    with pytest.raises(UsageError, match=r"not linear in its readout '0'; keep it wrapped"):
        fold(model, X)
    assert torch.equal(model(X), expected)
    with pytest.raises(UsageError, match="this MLP is not wrapped; nothing to fold"):
        fold(mlp(), X)


def test_checkpoint_of_another_gamma_is_refused() -> None:
    a, b = wrap(mlp(), 3.0, depth=3), wrap(mlp(), 1.0, depth=3)
    with pytest.raises(RuntimeError, match=r"saved at γ = 3 and this model is wrapped with γ = 1; wrap the net with"):
        b.load_state_dict(a.state_dict())


def test_checkpoint_brings_the_rates_it_was_trained_with() -> None:
    """Depth and knee are measured on a random draw; a restart on another draw must not train at other rates."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(9, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
        )
        models.append(wrap(net.double(), 30.0, example_inputs=X))
    first, restarted = models
    a = gammaopt.SGD(first.parameters(), lr=0.1)
    b = gammaopt.SGD(restarted.parameters(), lr=0.1)
    assert a.effective_lrs() != b.effective_lrs()
    restarted.load_state_dict(first.state_dict())
    train_step(first, a)
    train_step(restarted, b)
    assert a.effective_lrs() == b.effective_lrs()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), restarted.parameters(), strict=True))


def test_plain_checkpoint_loads_where_nothing_is_centred() -> None:
    plain = mlp().state_dict()
    wrap(mlp(), 3.0, depth=3, center="none").load_state_dict(plain, strict=True)


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


class Structured(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body, self.head = nn.Linear(9, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        features = self.body(x)
        logits = self.head(features)
        if self.kind == "dict":
            loss = None if labels is None else logits.mean()
            return OrderedDict(logits=logits, features=features, loss=loss)
        return Pair(logits, features) if self.kind == "named" else (features, logits)


@pytest.mark.parametrize(
    ("kind", "output", "pick"),
    [
        ("dict", "logits", lambda out: out["logits"]),
        ("named", 0, lambda out: out.logits),
        ("tuple", 1, lambda out: out[1]),
        ("tuple", lambda out: out[1] * 2, lambda out: out),
    ],
)
def test_f_stands_where_h_was_and_the_rest_is_passed_on(kind: str, output: Any, pick: Any) -> None:
    torch.manual_seed(0)
    net = Structured(kind).double()
    start = copy.deepcopy(net)
    model = wrap(net, 0.5, example_inputs=X, output=output)
    assert not pick(model(X)).any()
    with torch.no_grad():
        net.head.weight.mul_(1.5)
    returned, moved = model(X), copy.deepcopy(start)
    moved.head.weight.data.mul_(1.5)
    h = (lambda out: output(out)) if callable(output) else pick
    torch.testing.assert_close(pick(returned), (h(moved(X)) - h(start(X))) / 0.5)
    if not callable(output):
        assert type(returned) is type(start(X))
        features = returned["features"] if kind == "dict" else returned[1 - output]
        assert torch.equal(features, start.body(X))


def test_loss_computed_inside_from_h_is_refused() -> None:
    model = wrap(Structured("dict").double(), 0.5, example_inputs=X, output="logits")
    with pytest.raises(UsageError, match=r"computed its loss inside, from h and not from f; don't pass it the labels"):
        model(X, labels=torch.zeros(8))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, r"Structured returns a OrderedDict; .* output= says which part it is"),
        ("logit", r"returns a OrderedDict without entry 'logit'; give another output="),
        (lambda out: out["loss"], r"returns a NoneType; .* give another output="),
        (lambda out: out["logits"][:0], r"returns an empty tensor of shape \(0, 4\)"),
    ],
)
def test_bad_outputs_are_named(output: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        wrap(Structured("dict").double(), 0.5, example_inputs=X, output=output)
