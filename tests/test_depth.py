"""Effective depth: exact where theory is, the measured values where it is not, and no trace left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import UsageError, effective_depth
from gammaopt.online import MLP


def mlp(depth: int, **kwargs: object) -> MLP:
    torch.manual_seed(depth)
    return MLP(12, 5, width=24, depth=depth, **kwargs).double()  # type: ignore[arg-type]


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_bias_free_relu_network_has_its_number_of_layers(depth: int) -> None:
    assert effective_depth(mlp(depth), batch(16, 12)) == pytest.approx(depth, abs=1e-12)


def logarithmic_derivative(net: nn.Module, x: Tensor) -> float:
    """d log‖h‖ / d log(scale of all parameters) at scale 1, by central differences."""

    def log_norm(scale: float) -> float:
        scaled = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in scaled.parameters():
                parameter.mul_(scale)
            return float(scaled(x).square().sum().log()) / 2

    return (log_norm(1 + 1e-5) - log_norm(1 - 1e-5)) / 2e-5


def test_it_equals_the_logarithmic_derivative_under_scaling_all_parameters() -> None:
    net = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 5)).double()
    depth = effective_depth(net, batch(16, 12), zero_biases=False)
    assert depth == pytest.approx(logarithmic_derivative(net, batch(16, 12)), rel=1e-6)


def test_bias_at_zero_and_frozen_layers_contribute_nothing() -> None:
    net = mlp(3, bias=True)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    assert effective_depth(net, batch(16, 12)) == pytest.approx(3, abs=1e-12)
    net[1].requires_grad_(False)
    assert effective_depth(net, batch(16, 12)) == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_biases_the_depth_does_not_depend_on_their_draw(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 24), nn.ReLU(), nn.Linear(24, 5))
    net = net.double()
    before = copy.deepcopy(net.state_dict())
    assert effective_depth(net, batch(8, 1, 6, 6)) == pytest.approx(3, abs=1e-12)
    assert effective_depth(net, batch(8, 1, 6, 6), zero_biases=False) < 2.7
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_weights_ahead_of_a_normalisation_contribute_nothing() -> None:
    norm = nn.BatchNorm1d(24, eps=1e-14, affine=False)
    net = nn.Sequential(nn.Linear(12, 24, bias=False), norm, nn.ReLU(), nn.Linear(24, 5, bias=False)).double()
    assert effective_depth(net, batch(16, 12)) == pytest.approx(1, abs=1e-10)


def test_resnet18_has_depth_two() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=10)
    nn.init.zeros_(resnet.fc.bias)
    assert effective_depth(resnet, torch.randn(4, 3, 64, 64)) == pytest.approx(2.00, abs=0.01)


def test_vision_transformer_agrees_with_the_logarithmic_derivative() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=3).double().eval()
    x = batch(2, 3, 224, 224)
    assert effective_depth(vit, x, zero_biases=False) == pytest.approx(logarithmic_derivative(vit, x), rel=1e-5)


def test_tuple_and_dict_inputs_are_passed_on() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 5, bias=False)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b)  # type: ignore[no-any-return]

    net, a, b = Sum(), torch.ones(2, 12), torch.ones(2, 12)
    assert effective_depth(net, (a, b)) == pytest.approx(effective_depth(net, {"a": a, "b": b})) == pytest.approx(1.0)


def test_it_leaves_no_trace() -> None:
    net = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 5))
    net[2].eval()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    effective_depth(net, torch.randn(8, 12, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [module.training for module in net] == [True, True, False, True]
    assert torch.equal(torch.get_rng_state(), state)


def test_wrapped_model_is_measured_before_centring() -> None:
    net = mlp(3)
    model = gammaopt.wrap(net, 100.0, depth=3)
    assert effective_depth(model, batch(16, 12)) == pytest.approx(3, abs=1e-12)


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter whose second factor is 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(12, 24).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(4, 12) / 12**0.5), nn.Parameter(torch.zeros(24, 4))
        self.out = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.base(x) + x @ self.A.T @ self.B.T))  # type: ignore[no-any-return]


def test_weights_that_start_at_zero_and_hide_depth_are_warned_of() -> None:
    torch.manual_seed(0)
    net, x = Adapted(), torch.randn(16, 12)
    with pytest.warns(UserWarning, match=r"depth of Adapted is 1 and too small: 'B' is 0 at the start, .* give depth="):
        model = gammaopt.wrap(net, 3.0, example_inputs=x)
    assert not model.B.any()
    gammaopt.wrap(Adapted(), 3.0, example_inputs=x, depth=3)  # no warning, which would be an error
    net = Adapted()
    net.out.requires_grad_(False)
    with pytest.raises(UsageError, match=r"depth of Adapted is 0; 'B' is 0 at the start, .* give depth="):
        gammaopt.wrap(net, 3.0, example_inputs=x)


def test_an_adapter_loaded_alone_is_not_warned_of_and_a_net_that_its_zeros_hold_back_is_not_refused() -> None:
    torch.manual_seed(0)
    model = gammaopt.wrap(Adapted(), 3.0, example_inputs=torch.randn(16, 12), depth=3)
    model.load_state_dict({"A": model.A + 1, "B": model.B + 1}, strict=False)

    class Held(nn.Module):  # ReZero: its gain is 0, and 1 would overflow
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gain, self.out = nn.Linear(12, 12), nn.Parameter(torch.zeros(1)), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + torch.expm1(200 * self.gain) * self.inner(x))  # type: ignore[no-any-return]

    assert gammaopt.wrap(Held(), 3.0, example_inputs=torch.randn(16, 12)).out.weight.isfinite().all()


def test_zero_gains_that_hide_nothing_are_not_warned_of() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.inner(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 12), Block(), nn.LayerNorm(12), nn.Linear(12, 5))
    model = gammaopt.wrap(net, 3.0, example_inputs=torch.randn(16, 12))
    assert isinstance(model.gammaopt, gammaopt.Plan)
    assert model.gammaopt.depth == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(
    ("net", "inputs", "message"),
    [
        (nn.Linear(12, 5), torch.ones(2, 7), r"example inputs of shape \(2, 7\) float32 do not fit Linear"),
        (nn.ReLU(), torch.ones(2, 7), r"ReLU has no trainable parameters"),
        (nn.Linear(12, 5, bias=False), torch.zeros(2, 12), r"squared norm 0; .* give other inputs, or depth="),
        (nn.Embedding(3, 2), torch.ones(2, 7), r"example inputs of .* do not fit Embedding"),
        (nn.LSTM(12, 5), torch.ones(2, 12), r"LSTM returns a tuple"),
    ],
)
def test_bad_models_and_inputs_are_named(net: nn.Module, inputs: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        effective_depth(net, inputs)
    assert "\n" not in str(caught.value)
