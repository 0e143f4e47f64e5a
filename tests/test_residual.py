"""The depth rule: exact against a residual network written out, transfers across depth, and is nothing at m = 1."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import EtaLaw, Plan, Residual, UsageError, fold, unwrap, wrap

IN, WIDTH, OUT = 5, 12, 3
RULE = Residual(blocks="blocks.*", branches="f", base_depth=2)


class Branch(nn.Module):
    """Pre-LayerNorm: up(norm(h)) through tanh, and down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(h))))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = Branch(width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.f(h)  # type: ignore[no-any-return]


class Net(nn.Module):
    """A residual MLP; ``factor`` is what a hand-written depth rule multiplies its branches by."""

    factor = 1.0

    def __init__(self, depth: int, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(IN, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, OUT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h) if self.factor == 1 else h + self.factor * block.f(h)  # type: ignore[operator]
        return self.head(self.norm(h))  # type: ignore[no-any-return]


def make(depth: int, width: int = WIDTH) -> Net:
    torch.manual_seed(depth)
    return Net(depth, width).double()


X = torch.randn(16, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def plan_of(model: nn.Module) -> Plan:
    assert isinstance(model.gammaopt, Plan)
    return model.gammaopt


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_trajectory_is_that_of_a_network_that_multiplies_its_branches(name: str, alpha: float) -> None:
    depth, gamma, m = 6, 3.0, 6 / 2
    rule = Residual(blocks="blocks.*", branches=("f",), base_depth=2, alpha=alpha)
    net = make(depth)
    by_hand = copy.deepcopy(net)
    by_hand.factor = m**-alpha
    start = copy.deepcopy(by_hand)
    model = wrap(net, gamma, depth=2, knee=1.0, example_inputs=X, residual=rule)
    lr, eps, decay = 0.02, 1e-3, 0.1
    s = EtaLaw(2, "sgd" if name == "SGD" else "adam").factor(gamma)
    rate = m ** (2 * alpha - 1) if name == "SGD" else m ** (alpha - 1)
    groups: list[dict[str, Any]] = []
    for inside in (True, False):
        share = s * rate if inside else s
        params = [p for n, p in by_hand.named_parameters() if n.startswith("blocks.") == inside]
        groups.append({"params": params, "lr": lr * share, "weight_decay": decay / share})
        gradient = (m**-alpha if inside else 1.0) / gamma
        if name != "SGD":
            groups[-1]["eps"] = eps * gradient
        if name == "Adam":  # L2 decay is part of the gradient
            groups[-1]["weight_decay"] = decay * gradient
    options = {"momentum": 0.9} if name == "SGD" else {"eps": eps}
    ours = getattr(gammaopt, name)(model.parameters(), lr=lr, weight_decay=decay, **options)
    theirs = getattr(torch.optim, name)(groups, **({"momentum": 0.9} if name == "SGD" else {}))
    for _ in range(20):
        torch.testing.assert_close(model(X), (by_hand(X) - start(X)) / gamma, rtol=1e-11, atol=1e-12)
        train(model, ours, 1)
        theirs.zero_grad()
        ((by_hand(X) - start(X).detach()) / gamma - Y).square().mean().backward()
        theirs.step()
    for mine, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert float(model(X).detach().abs().max()) > 0.1


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("options", [{}, {"parametrization": "mean_field"}, {"base": Net(2, 6)}])
def test_at_the_base_depth_it_is_bit_identical_to_no_rule(name: str, options: dict[str, Any]) -> None:
    trained = []
    for residual in (None, Residual(blocks="blocks.*", base_depth=2, alpha=0.7)):
        net = make(2)
        torch.manual_seed(0)
        model = wrap(net, 2.0, example_inputs=X, residual=residual, **options)
        assert not any(module._forward_hooks for module in model.modules())
        train(model, getattr(gammaopt, name)(model.parameters(), lr=0.05), 5)
        trained.append(model)
    assert all(torch.equal(p, q) for p, q in zip(trained[0].parameters(), trained[1].parameters(), strict=True))
    trained[0].load_state_dict(trained[1].state_dict())


def stream_change(depth: int, name: str, residual: Residual | None) -> float:
    """Rms of how far the stream ahead of the readout's norm moved in a few steps of the blocks."""
    model: Any = wrap(make(depth, 64), 1.0, depth=2, knee=1.0, example_inputs=X, residual=residual)
    seen: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    lr = 0.02 if name == "SGD" else 1e-3
    train(model, getattr(gammaopt, name)(model.blocks.parameters(), lr=lr), 3)
    model(X)
    return float((seen[-1] - seen[0]).square().mean().sqrt())


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_stream_moves_as_much_at_every_depth(name: str) -> None:
    depths = (2, 8, 32)
    rule = Residual(blocks="blocks.*", branches="f", base_depth=2)
    with_rule = [stream_change(depth, name, rule) for depth in depths]
    without = [stream_change(depth, name, None) for depth in depths]
    assert max(with_rule) < 1.5 * min(with_rule), with_rule
    assert without[-1] > 5 * without[0], without


def test_plan_shows_m_and_the_factors() -> None:
    rule = Residual(blocks="blocks.*", branches="f", base_depth=2, alpha=0.75)
    plan = plan_of(wrap(make(8), 1.0, depth=2, knee=1.0, example_inputs=X, residual=rule))
    inside, outside = "blocks.3.f.norm.weight", "embed.weight"
    assert plan.scales("sgd")[inside] == pytest.approx((4**0.5, 4**-0.75))
    assert plan.scales("adam")[inside] == pytest.approx((4**-0.25, 4**-0.75))
    assert plan.scales("sgd")[outside] == plan.scales("adam")[outside] == (1.0, 1.0)
    text = plan.table()
    assert "8 residual blocks, m = 4, α = 0.75: branches × 0.3536" in text
    assert next(line for line in text.splitlines() if line.startswith(inside)).split()[-1] == "2"


def test_width_and_depth_transfer_together() -> None:
    rule = Residual(blocks="blocks.*", branches="f", base_depth=2, alpha=0.5)
    plain = plan_of(wrap(make(8, 24), 1.0, example_inputs=X, depth=2, knee=1.0, base=make(8, 6)))
    both = plan_of(wrap(make(8, 24), 1.0, example_inputs=X, depth=2, knee=1.0, base=make(8, 6), residual=rule))
    for name, scale in plain.scales("adam").items():
        lr, eps = (0.5, 0.5) if name.startswith("blocks.") else (1.0, 1.0)
        assert both.scales("adam")[name] == pytest.approx((scale.lr * lr, scale.eps * eps))


def moved(**options: Any) -> Any:
    model = wrap(make(6), 2.0, example_inputs=X, residual=RULE, **options)
    train(model, gammaopt.SGD(model.parameters(), lr=0.05), 3)
    return model


def test_copies_pickles_and_checkpoints_keep_the_branch_factor() -> None:
    model = moved()
    expected = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), expected)
        assert twin.gammaopt == model.gammaopt
    torch.manual_seed(9)
    fresh = wrap(Net(6).double(), 2.0, example_inputs=X, residual=RULE)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(X), expected)
    assert set(Net(6).state_dict()) == {name for name in model.state_dict() if "gammaopt" not in name}


def test_a_checkpoint_of_another_depth_rule_is_refused() -> None:
    state = moved().state_dict()
    for residual, here in ((None, r"m = 1, α = 1"), (Residual("blocks.*", 3, "f", 0.5), r"m = 2, α = 0.5")):
        other = wrap(make(6), 2.0, example_inputs=X, residual=residual)
        with pytest.raises(RuntimeError, match=rf"with m = 3, α = 1 and this model has {here}; wrap the net with the"):
            other.load_state_dict(state)


def test_compiled_model_multiplies_too() -> None:
    model = moved()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-12, atol=1e-12)


def test_unwrap_takes_the_factor_off() -> None:
    model = moved()
    parameters = copy.deepcopy(model.state_dict())
    plain = unwrap(model)
    assert type(plain) is Net
    assert not any(module._forward_hooks for module in plain.modules())
    twin = make(6)
    twin.load_state_dict({name: value for name, value in parameters.items() if "gammaopt" not in name})
    assert torch.equal(plain(X), twin(X))


def test_fold_bakes_the_factor_into_the_branches() -> None:
    model = moved(center="none")
    expected = model(X).detach()
    plain = fold(model, X)
    assert type(plain) is Net
    assert not any(module._forward_hooks for module in plain.modules())
    torch.testing.assert_close(plain(X), expected, rtol=1e-12, atol=1e-12)


class Squashed(nn.Module):
    """A branch that is not linear in its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Sequential(nn.Linear(IN, IN), nn.Tanh()), nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.inner(x))  # type: ignore[no-any-return]


def test_fold_is_refused_where_a_branch_is_not_linear_in_its_last_layer() -> None:
    model = wrap(Squashed().double(), 2.0, depth=1, example_inputs=X, center="none", residual=Residual("inner", 2))
    expected = model(X).detach()
    with pytest.raises(
        UsageError, match=r"not linear in its readout 'out' and its branches in their last layers; keep"
    ):
        fold(model, X)
    assert torch.equal(model(X), expected)


class Odd(Net):
    """Its branches return what a rule can't multiply, or never run."""

    def __init__(self, kind: str) -> None:
        super().__init__(2)
        self.kind = kind
        for block in self.blocks:
            block.attn = nn.MultiheadAttention(WIDTH, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            if self.kind == "tuple":
                h = h + block.attn(h[None], h[None], h[None])[0][0]  # type: ignore[operator]
            h = block(h)
        return self.head(self.norm(h))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.4}, r"alpha=0.4 is not allowed; give alpha from 0.5 to 1"),
        ({"alpha": 1.5}, r"alpha=1.5 is not allowed"),
        ({"alpha": float("nan")}, r"alpha=nan is not allowed"),
        ({"base_depth": 0}, r"base_depth=0 is too small; give at least 1"),
        ({"base_depth": 2.5}, r"base_depth=2.5 is not a whole number"),
        ({"blocks": 3}, r"blocks=3 is no module name; give a string like 'blocks.\*'"),
        ({"blocks": ()}, r"blocks=\(\) names no module; give a pattern like 'blocks.\*'"),
        ({"blocks": "block.*"}, r"blocks='block.\*' matches no module of Odd; it has 'embed', 'blocks', .*: give the"),
        ({"branches": "mlp"}, r"branches=\['mlp'\] match no module of block 'blocks.0'; it has 'f', .*: give"),
        ({"branches": ("f", "mlp")}, r"branches='mlp' matches no module of the blocks of Odd; drop or mend it"),
        ({"branches": ("f", "f.down")}, r"branch 'blocks.0.f.down' is inside branch 'blocks.0.f': it would be"),
        ({"branches": "attn"}, r"branch 'blocks.0.attn' \(MultiheadAttention\) is not called on the example inputs"),
        ({"branches": "attn", "kind": "tuple"}, r"branch 'blocks.0.attn' \(MultiheadAttention\) returns a tuple, not"),
        ({"branches": "attn.out_proj", "kind": "tuple"}, r"\(NonDynamicallyQuantizableLinear\) is not called on"),
    ],
)
def test_bad_rules_are_named_and_the_network_stays_as_it_was(arguments: dict[str, Any], message: str) -> None:
    options = {"blocks": "blocks.*", "base_depth": 1, **arguments}
    net = Odd(options.pop("kind", "")).double()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UsageError, match=message) as caught:
        wrap(net, 1.0, depth=2, example_inputs=X, residual=Residual(**options))
    assert "\n" not in str(caught.value)
    assert type(net) is Odd
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_rule_needs_inputs_and_the_right_type() -> None:
    with pytest.raises(UsageError, match=r"residual= needs example_inputs= to see that every branch is called"):
        wrap(make(4), 1.0, depth=2, residual=RULE)
    with pytest.raises(UsageError, match=r"residual is a str; give gammaopt.Residual\(blocks=…, base_depth=…\)"):
        wrap(make(4), 1.0, depth=2, example_inputs=X, residual="blocks.*")  # type: ignore[arg-type]
