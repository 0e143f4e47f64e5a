"""``wrap``: the function it makes, and everything about the object that must not change."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import Plan, UsageError, effective_depth, unwrap, wrap
from gammaopt.online import MLP


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Logits."""
        h = self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        return self.head(h) * scale  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))  # type: ignore[no-any-return]


CASES = {
    "mlp": (lambda: MLP(9, 4, width=8, bias=True), (5, 9)),
    "conv": (Conv, (5, 1, 6, 6)),
    "attention": (Attention, (5, 3, 8)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    build, shape = CASES[name]
    return build(), torch.randn(*shape)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_output_is_zero_exactly_at_the_start(name: str, training: bool) -> None:
    net, x = make(name)
    model = wrap(net, 0.01, example_inputs=x).train(training)
    for _ in range(3):
        assert not model(x).any()


@pytest.mark.parametrize("name", CASES)
def test_same_object_class_hierarchy_names_and_signature(name: str) -> None:
    net, x = make(name)
    base, names, signature = type(net), [n for n, _ in net.named_parameters()], inspect.signature(net.forward)
    modules = [n for n, _ in net.named_modules()]
    model = wrap(net, 2.0, example_inputs=x)
    assert model is net
    assert isinstance(model, base)
    assert [n for n, _ in model.named_parameters()] == names
    assert [n for n, _ in model.named_modules()] == modules
    assert inspect.signature(model.forward) == signature
    assert set(names) <= set(model.state_dict())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("center", ["copy", "none"])
def test_output_is_the_formula_after_the_parameters_moved(name: str, center: str) -> None:
    net, x = make(name)
    net = net.double().eval()
    x = x.double()
    start = copy.deepcopy(net)
    model = wrap(net, 0.3, example_inputs=x, center=center)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    moved = copy.deepcopy(start)
    moved.load_state_dict(dict(model.named_parameters()), strict=False)
    expected = (moved(x) - (start(x) if center == "copy" else 0)) / 0.3
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_gradient_does_not_reach_the_frozen_copy() -> None:
    net, x = make("mlp")
    model = wrap(net, 0.5, example_inputs=x)
    plain = copy.deepcopy(unwrap(copy.deepcopy(model)))
    (model(x) * 3).sum().backward()
    (plain(x) * 3 / 0.5).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def moved_model(name: str) -> tuple[nn.Module, Tensor]:
    net, x = make(name)
    model = wrap(net, 0.5, example_inputs=x, loss="cross_entropy").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model, x


@pytest.mark.parametrize("name", CASES)
def test_copies_and_pickles_compute_the_same_and_stay_wrapped(name: str) -> None:
    model, x = moved_model(name)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert twin is not model
        assert torch.equal(twin(x), model(x))
        assert twin.gammaopt == model.gammaopt
        assert gammaopt.SGD(twin.parameters(), lr=0.1).effective_lrs()


def test_copies_of_a_class_that_copies_itself_stay_wrapped() -> None:
    """torch.fx's modules have their own deepcopy and pickle, which know only their own class."""
    net, x = make("mlp")
    traced = torch.fx.symbolic_trace(net)
    original = type(traced)
    model = wrap(traced, 0.5, depth=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert model(x).any()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(nn.Sequential(model))[0]):
        assert torch.equal(twin(x), model(x))
        assert gammaopt.SGD(twin.parameters(), lr=0.1).effective_lrs().keys() == dict(net.named_parameters()).keys()
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert next(model.parameters()).any()
    assert type(unwrap(model)) is original
    normalised = wrap(nn.utils.parametrizations.weight_norm(nn.Linear(9, 4)), 0.5, depth=1)
    assert gammaopt.SGD(copy.deepcopy(normalised).parameters(), lr=0.1).effective_lrs()


def test_a_shallow_copy_shares_parameters_and_plan() -> None:
    model, x = moved_model("mlp")
    twin = copy.copy(model)
    assert torch.equal(twin(x), model(x))
    assert gammaopt.SGD(model.parameters(), lr=0.1).effective_lrs()


def test_averaged_and_half_precision_checkpoints_are_of_the_same_gamma() -> None:
    net, _ = make("mlp")
    model = wrap(net, 3.3, depth=2.1, knee=0.7)
    saved = model.state_dict()
    averaged = {name: 0.7 * value + 0.3 * value for name, value in saved.items()}
    for cast in (torch.float64, torch.float16, torch.bfloat16):
        model.load_state_dict({name: value.to(cast) for name, value in averaged.items()})
        assert isinstance(model.gammaopt, Plan)
        assert (model.gammaopt.gamma, model.gammaopt.depth, model.gammaopt.knee) == (3.3, 2.1, 0.7)
    with pytest.raises(RuntimeError, match=r"saved at γ = 3.4375 and this model is wrapped with γ = 3.3"):
        model.load_state_dict({**saved, "gammaopt_plan": torch.tensor([3.44, 2.1, 0.7, 1, 1]).bfloat16()})
    with torch.device("meta"):
        assert model.state_dict()["gammaopt_plan"].device.type == "cpu"


class Rotary(nn.Module):
    """With frequencies that are in no checkpoint, as in HF's language models."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(9.0), persistent=False)
        self.layer = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.frequencies)  # type: ignore[no-any-return]


@pytest.mark.parametrize("assign", [True, False])
def test_buffers_that_no_checkpoint_has_come_from_the_model(assign: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 9)
    saved = wrap(Rotary(), 0.5, depth=1).state_dict()
    with torch.device("meta"):
        model = wrap(Rotary(), 0.5, depth=1)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(saved, assign=assign)
    model.frequencies = torch.arange(9.0)  # as whoever uses the meta device must do
    assert not model(x).any()
    model.frequencies.zero_()  # once only
    assert model(x).any()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("assign", [True, False])
def test_checkpoint_holds_theta_zero_and_loads_strictly(name: str, assign: bool, tmp_path: Path) -> None:
    model, x = moved_model(name)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.manual_seed(99)  # another initialisation, and so another θ₀
    other = wrap(CASES[name][0](), 0.5, example_inputs=x, loss="cross_entropy").eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True, assign=assign)
    assert torch.equal(other(x), model(x))
    assert len(list(other.parameters())) == len(list(model.parameters()))
    assert gammaopt.SGD(other.parameters(), lr=0.1).effective_lrs()


def test_checkpoint_without_theta_zero_is_refused_by_name() -> None:
    net, x = make("mlp")
    plain = net.state_dict()
    model = wrap(copy.deepcopy(net), 0.5, example_inputs=x)
    with pytest.raises(RuntimeError, match=r"Missing key.*gammaopt_theta0.1.weight"):
        model.load_state_dict(plain)
    wrapped_none = wrap(copy.deepcopy(net), 0.5, example_inputs=x, center="none")
    wrapped_none.load_state_dict(plain)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gammaopt_theta0"):
        wrapped_none.load_state_dict(model.state_dict())


def test_wrapped_part_of_a_larger_model_is_saved_and_loaded() -> None:
    model, x = moved_model("mlp")
    whole = nn.Sequential(model, nn.Linear(4, 2))
    twin = copy.deepcopy(whole)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert any("gammaopt_theta0" in name for name in whole.state_dict())
    twin.load_state_dict(whole.state_dict(), strict=True)
    assert torch.equal(twin(x), whole(x))


def test_theta_zero_moves_and_casts_with_the_model() -> None:
    model, x = moved_model("conv")
    assert model.double()(x.double()).dtype == torch.float64
    assert model.to("meta")(x.double().to("meta")).device.type == "meta"


@pytest.mark.parametrize("instance", [False, True])
def test_output_stays_zero_in_evaluation_while_running_statistics_move_and_theta_does_not(instance: bool) -> None:
    """The frozen copy's statistics are those of h₀ on the same batches; those of the start would be off, over γ."""
    net, x = make("conv")
    if instance:
        net.norm = nn.InstanceNorm2d(6, track_running_stats=True)
    plain = copy.deepcopy(net)
    model = wrap(net, 0.01, example_inputs=x)
    for _ in range(3):
        model(2 * x + 1)
        plain(2 * x + 1)
    assert not model.eval()(x).any()
    saved, expected = model.state_dict(), plain.state_dict()
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(saved[name], expected[name])  # once for each batch, as in the plain network
        assert torch.equal(saved[f"gammaopt_theta0.{name}"], expected[name])


def test_frozen_copy_uses_the_batchs_statistics_in_training_and_the_running_ones_after() -> None:
    net, x = make("conv")
    net.drop = nn.Identity()
    plain = copy.deepcopy(net)
    model = wrap(net, 1.0, example_inputs=x, depth=2, knee=1.0)
    reference: Any = model.gammaopt_theta0
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(reference(x), plain.train(mode)(x))


def test_frozen_copy_follows_a_part_that_is_put_in_another_mode() -> None:
    """As fine-tuning does: batch normalisation in eval(), the rest in training."""
    net, x = make("conv")
    model = wrap(net, 0.1, example_inputs=x).train()
    model.get_submodule("norm").eval()
    assert not model(x).any()
    model.get_submodule("drop").eval()
    assert torch.equal(model(x), model(x))
    assert not model(x).any()


def test_hooks_on_the_whole_run_once_around_f() -> None:
    net, x = make("mlp")
    calls: list[str] = []

    def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        calls.append("before")
        return (3 * args[0],)

    def after(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        calls.append("after")
        return out + 1

    net.register_forward_pre_hook(before)
    net.register_forward_hook(after)
    model = wrap(net, 0.5, depth=3)
    assert torch.equal(model(x), torch.ones(5, 4))
    assert calls == ["before", "after"]


def test_random_state_advances_as_for_the_plain_network() -> None:
    net, x = make("conv")
    torch.manual_seed(5)
    copy.deepcopy(net)(x)
    expected = torch.get_rng_state()
    model = wrap(net, 1.0, example_inputs=x)
    torch.manual_seed(5)
    model(x)
    assert torch.equal(torch.get_rng_state(), expected)


def test_unwrap_gives_the_plain_network_with_its_current_parameters() -> None:
    model, x = moved_model("conv")
    plain = unwrap(model)
    assert plain is model
    assert type(plain) is Conv
    assert set(plain.state_dict()) == set(Conv().state_dict())
    twin = Conv().eval()
    twin.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x), twin(x))
    with pytest.raises(UsageError, match="this Conv is not wrapped"):
        unwrap(plain)
    with pytest.raises(UsageError, match="belongs to no wrapped model"):
        gammaopt.SGD(plain.parameters(), lr=0.1)


def test_plan_holds_gamma_and_the_measured_depth() -> None:
    net, x = make("mlp")
    expected = effective_depth(net, x)
    model = wrap(net, 7.0, example_inputs=x)
    assert isinstance(model.gammaopt, Plan)
    assert model.gammaopt.gamma == 7.0
    assert model.gammaopt.depth == pytest.approx(expected, rel=1e-3)


def test_float32_centring_at_tiny_gamma_warns_and_float64_does_not() -> None:
    with pytest.warns(UserWarning, match=r"gamma=0.0001 in float32.*net.double\(\)"):
        wrap(MLP(9, 4), 1e-4, depth=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(MLP(9, 4).double(), 1e-4, depth=3)
        wrap(MLP(9, 4), 1e-3, depth=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0.0}, r"gamma=0 is not allowed; give a finite gamma > 0"),
        ({"gamma": -1.0}, r"gamma=-1 is not allowed"),
        ({"gamma": float("nan")}, r"gamma=nan is not allowed"),
        ({"gamma": float("inf")}, r"gamma=inf is not allowed"),
        ({"gamma": "rich"}, r"gamma='rich' is not a number"),
        ({"depth": None}, r"depth is not known; give depth=, or example_inputs="),
        ({"depth": 0}, r"depth=0 is not allowed"),
        ({"example_inputs": torch.ones(2, 8)}, r"example inputs of shape \(2, 8\) float32 do not fit MLP"),
        ({"parametrization": "mup"}, r"unknown parametrization 'mup'; choose one of: as_is, mean_field"),
        ({"center": "yes"}, r"unknown center 'yes'; choose one of: copy, zero_readout, none"),
        ({"loss": "nll"}, r"unknown loss 'nll'; choose one of: mse, cross_entropy"),
        ({"knee": 0.0}, r"knee=0 is not allowed"),
    ],
)
def test_bad_arguments_are_named_and_the_network_stays_as_it_was(arguments: dict[str, object], message: str) -> None:
    net = MLP(9, 4)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UsageError, match=message) as caught:
        wrap(net, **{"gamma": 1.0, "depth": 3.0, "parametrization": "mean_field", **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert type(net) is MLP
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_bad_networks_are_named() -> None:
    with pytest.raises(UsageError, match="ReLU has no trainable parameters"):
        wrap(nn.ReLU(), 1.0, depth=1)
    with pytest.raises(UsageError, match=r"net is a list; give a torch.nn.Module"):
        wrap([1], 1.0, depth=1)  # type: ignore[type-var]
    with pytest.raises(UsageError, match=r"parameter '0.weight' of this Sequential has no shape yet; run one batch"):
        wrap(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1)), 1.0, depth=2)
    with torch.device("meta"):
        empty = MLP(9, 4)
        x = torch.ones(2, 9)
    for given in ({}, {"depth": 3}, {"depth": 3, "knee": 1, "center": "zero_readout"}):
        with pytest.raises(UsageError, match=r"MLP is on the meta device, where nothing can be measured; give depth="):
            wrap(empty, 1.0, example_inputs=x, **given)
    model = wrap(MLP(9, 4), 2.0, depth=3)
    with pytest.raises(UsageError, match=r"already wrapped with γ = 2; call gammaopt.unwrap first"):
        wrap(model, 1.0, depth=1)


def test_network_with_a_tuple_output_says_so_when_called() -> None:
    model = wrap(nn.LSTM(3, 2), 1.0, depth=1)
    with pytest.raises(UsageError, match="GammaLSTM returns a tuple"):
        model(torch.ones(2, 3))
