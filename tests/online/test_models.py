"""The paper's four networks: exact in mean-field form, alike at every width, and trainable as a stack."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import gammaopt
from gammaopt import EtaLaw, UsageError
from gammaopt.diagnostics import coordinate_check
from gammaopt.online import Recipe, Teacher, build_model, train, train_many
from gammaopt.online.train import Run

SHAPE, CLASSES, BATCH = (3, 8, 8), 3, 8
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"width": 12, "depth": 3, "bias": True}),
    "cnn": ("cnn", {"width": 6, "depth": 3, "bias": True}),
    "resnet18": ("resnet18", {"width": 4, "depth": 1}),
    "resnet18-group": ("resnet18", {"width": 8, "depth": 1, "norm": "group"}),
    "vit": ("vit", {"width": 16, "depth": 1, "head_size": 8}),
}


def make(name: str, **changed: Any) -> nn.Module:
    model, knobs = NETS[name]
    return build_model(model, SHAPE, CLASSES, **{**knobs, **changed})


def scales(net: nn.Module) -> dict[str, float]:
    """The factor a of every weight, from shapes alone: fan_in^(-1/2), 1/fan_in for the readout; 1 for vectors."""
    weights = {name: p for name, p in net.named_parameters() if p.dim() >= 2 and "pos_embed" not in name}
    readout = list(weights)[-1]
    return {name: p[0].numel() ** (-1.0 if name == readout else -0.5) for name, p in weights.items()}


@pytest.mark.parametrize("gamma", [0.1, 10.0])
@pytest.mark.parametrize("name", NETS)
def test_natural_form_follows_mean_field_form_step_by_step(name: str, gamma: float) -> None:
    """Reference: weights N(0, 1) times a in the forward pass, one rate N·η on all but the readout's bias; float64."""
    torch.manual_seed(0)
    net = make(name).double()
    model = gammaopt.wrap(net, gamma, depth=3.0, parametrization="mean_field")
    optimizer = gammaopt.SGD(model.parameters(), lr=0.05)

    plain = make(name).double().requires_grad_(False)
    a = scales(plain)
    readout_weight = list(a)[-1]
    readout_bias = readout_weight.replace("weight", "bias")
    width = dict(net.named_parameters())[readout_weight].shape[1]
    own = {key: (p.detach() / a.get(key, 1.0)).requires_grad_() for key, p in net.named_parameters()}
    start = {key: p.detach().clone() for key, p in own.items()}

    def explicit(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        folded = {key: p * a.get(key, 1.0) for key, p in weights.items()}
        return functional_call(plain, folded, (x,))  # type: ignore[no-any-return]

    eta = 0.05 * EtaLaw(3.0).factor(gamma)
    draw = torch.Generator().manual_seed(1)
    for step in range(8):
        x = torch.randn(BATCH, *SHAPE, dtype=torch.float64, generator=draw)
        y = F.one_hot(torch.randint(CLASSES, (BATCH,), generator=draw), CLASSES).double()
        f = model(x)
        optimizer.zero_grad()
        F.mse_loss(f, y).backward()
        optimizer.step()

        g = (explicit(own, x) - explicit(start, x)) / gamma
        gradients = torch.autograd.grad(F.mse_loss(g, y), list(own.values()))
        with torch.no_grad():
            for (key, p), gradient in zip(own.items(), gradients, strict=True):
                p.sub_((1 if key == readout_bias else width) * eta * gradient)
        size = max(1.0, float(g.detach().abs().max()))
        assert float((f - g).detach().abs().max()) < 1e-9 * size, step
    assert math.isfinite(size)
    assert float(f.detach().abs().max()) > 1e-5, "nothing moved: the agreement would prove nothing"


@pytest.mark.parametrize(
    ("name", "widths"), [("cnn", [8, 16, 32]), ("resnet18", [4, 8, 16]), ("vit", [16, 32, 64])], ids=lambda v: str(v)
)
def test_features_move_as_far_at_every_width(name: str, widths: list[int]) -> None:
    draw = torch.Generator().manual_seed(2)
    x, y = torch.randn(16, *SHAPE, generator=draw), torch.randint(CLASSES, (16,), generator=draw)

    def build(width: int) -> nn.Module:
        return gammaopt.wrap(make(name, width=width), 1.0, depth=3.0, parametrization="mean_field")

    check = coordinate_check(
        build,
        widths,
        x,
        lambda out: F.mse_loss(out, F.one_hot(y, CLASSES).float()),
        lambda model: gammaopt.SGD(model.parameters(), lr=0.05),
        steps=3,
        seeds=4,
        tolerance=0.35,  # at these widths
    )
    assert check.ok, str(check)


@pytest.mark.parametrize("name", NETS)
def test_a_stack_of_runs_gives_the_records_of_one_after_another(name: str) -> None:
    stream = Teacher(SHAPE, CLASSES, width=4)
    recipe = Recipe(partial(make, name), stream, "mse", steps=6, batch_size=8, depth=3.0, dtype=torch.float64)
    runs = [Run(1.0, 0.05, 0), Run(10.0, 0.05, 0), Run(1.0, 0.1, 1)]
    for run, record in zip(runs, train_many(recipe, runs), strict=True):
        alone = train(recipe, gamma=run.gamma, lr=run.lr, seed=run.seed)
        assert record.final_loss == pytest.approx(alone.final_loss, rel=1e-6)
        assert record.prequential_loss == pytest.approx(alone.prequential_loss, rel=1e-6)


def test_sizes_are_those_of_the_papers() -> None:
    def count(net: nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    # torchvision's ResNet-18 with a 3×3 stem in place of the 7×7 one, and 10 classes.
    assert count(build_model("resnet18", (3, 32, 32), 10)) == 11_173_962
    assert len([m for m in build_model("resnet18", (3, 32, 32), 10).modules() if isinstance(m, nn.Conv2d)]) == 20
    vit = build_model("vit", (3, 32, 32), 10, width=192, depth=12)
    block = 12 * 192**2 + 13 * 192  # attention 4N² + 4N, network 8N² + 5N, two norms 4N
    assert count(vit) == 12 * block + (48 + 1) * 192 + 64 * 192 + 2 * 192 + 10 * 193
    assert count(build_model("cnn", (3, 32, 32), 10, width=32)) == 32 * 27 + 2 * 32 * 32 * 9 + 10 * 32 * 16


@pytest.mark.parametrize("name", ["cnn", "resnet18", "resnet18-group", "vit"])
def test_width_and_depth_are_free_and_depth_adds_layers(name: str) -> None:
    deeper = {"cnn": 4}.get(name, 2)
    shallow, deep = make(name), make(name, depth=deeper)
    assert len(list(deep.parameters())) > len(list(shallow.parameters()))
    x = torch.randn(2, *SHAPE)
    assert make(name, width=32)(x).shape == deep(x).shape == (2, CLASSES)


def test_written_out_attention_is_torchs() -> None:
    from gammaopt.online.models._vit import Attention

    torch.manual_seed(0)
    attention = Attention(16, 4).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    q, k, v = attention.qkv(x).chunk(3, -1)
    heads = [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in (q, k, v)]
    expected = attention.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)


def test_batch_norm_without_running_statistics_sees_the_same_batch_in_h_and_h0() -> None:
    torch.manual_seed(0)
    model = gammaopt.wrap(make("resnet18"), 1.0, depth=2.0, parametrization="mean_field")
    x = torch.randn(4, *SHAPE)
    model.eval()
    assert float(model(x).detach().abs().max()) == 0
    assert not [name for name, _ in make("resnet18").named_buffers()]
    assert [name for name, _ in make("resnet18", running_stats=True).named_buffers() if "running_mean" in name]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:test_resnet", (1, 32, 32)),
        ("timm:test_vit", (3, 32, 32)),
        ("torchvision:shufflenet_v2_x0_5", (3, 32, 32)),
    ],
)
def test_networks_of_other_packages_come_by_name_and_train_wrapped(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    net = build_model(name, shape, 7)
    x = torch.randn(4, *shape)
    model = gammaopt.wrap(net, 2.0, example_inputs=x)
    optimizer = gammaopt.SGD(model.parameters(), lr=1e-3)
    before = [copy.deepcopy(p) for p in model.parameters()]
    F.cross_entropy(model(x), torch.arange(4)).backward()
    optimizer.step()
    assert model(x).shape == (4, 7)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_regression_stream_gets_one_output() -> None:
    assert build_model("mlp", (5,), 0)(torch.randn(2, 5)).shape == (2, 1)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: build_model("resnet19", SHAPE, 3), "unknown model 'resnet19'; choose one of: mlp, cnn, resnet18, vit"),
        (lambda: build_model("timm:resnet1", SHAPE, 3), "timm has no model 'resnet1'; did you mean resnet18"),
        (lambda: build_model("torchvision:resnet1", SHAPE, 3), "torchvision has no model 'resnet1'; did you mean"),
        (lambda: build_model("hf:bert", SHAPE, 3), "unknown package 'hf' in model 'hf:bert'; give timm:NAME"),
        (lambda: build_model("vit", (20,), 3), r"model 'vit' takes images, not inputs of shape \(20,\); give 'mlp'"),
        (lambda: build_model("timm:resnet18", (20,), 3), "takes images"),
        (lambda: build_model("torchvision:resnet18", (1, 32, 32), 3), "takes 3 channels, not 1; timm's take any"),
        (lambda: build_model("cnn", SHAPE, 3, widht=8), "model 'cnn' has no knob 'widht'; it has: width, depth, bias"),
        (lambda: build_model("timm:resnet18", SHAPE, 3, widht=8), "can't be made with num_classes=3.*widht"),
        (lambda: build_model("vit", SHAPE, 3, width=20), "width=20 is no multiple of head_size=16"),
        (lambda: build_model("vit", SHAPE, 3, patch=3), "can't be cut into patches of 3×3"),
        (lambda: build_model("resnet18", (3, 4, 8), 3), "side of shape=4 is too small; give at least 8"),
        (lambda: build_model("resnet18", SHAPE, 3, norm="layer"), "unknown norm 'layer'; choose one of: batch"),
        (lambda: build_model("cnn", (3, 6, 6), 3), "can't be halved 3 times"),
    ],
)
def test_a_mistake_names_the_value_and_the_fix(make_it: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_it()
