"""Width transfer from a base network: what it is relative to, and that it is nothing at the base's own width."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gammaopt
from gammaopt import Plan, UsageError, wrap
from gammaopt.online import MLP


def mlp(width: int) -> MLP:
    torch.manual_seed(0)
    return MLP(20, 3, width=width, depth=3, bias=True)


def plan_of(net: nn.Module) -> Plan:
    assert isinstance(net.gammaopt, Plan)
    return net.gammaopt


def test_sgd_and_adam_rates_relative_to_the_base() -> None:
    plan = plan_of(wrap(mlp(256), 1.0, depth=3, base=mlp(64)))
    r = 256 / 64
    sgd = {"1.weight": r, "1.bias": r, "3.weight": 1.0, "3.bias": r, "5.weight": 1 / r, "5.bias": 1.0}
    adam = {"1.weight": 1.0, "1.bias": 1.0, "3.weight": 1 / r, "3.bias": 1.0, "5.weight": 1 / r, "5.bias": 1.0}
    assert plan.multipliers("sgd") == pytest.approx(sgd)
    assert plan.multipliers("adam") == pytest.approx(adam)
    eps = {name: 1.0 if name.startswith("5.") else 1 / r for name in adam}
    assert {name: scale.eps for name, scale in plan.scales("adam").items()} == pytest.approx(eps)


def test_ratios_are_those_of_mean_field_form_at_the_two_widths() -> None:
    relative = plan_of(wrap(mlp(256), 1.0, depth=3, base=mlp(64)))
    wide = plan_of(wrap(mlp(256), 1.0, depth=3, parametrization="mean_field"))
    narrow = plan_of(wrap(mlp(64), 1.0, depth=3, parametrization="mean_field"))
    for family in ("sgd", "adam"):
        ratios = {n: m / narrow.multipliers(family)[n] for n, m in wide.multipliers(family).items()}
        assert relative.multipliers(family) == pytest.approx(ratios)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_same_network_as_base_is_bit_identical_to_torch(name: str) -> None:
    x, y = torch.randn(8, 20), torch.randn(8, 3)
    ours, theirs = mlp(64), mlp(64)
    wrap(ours, 1.0, example_inputs=x, base=mlp(64), center="none")
    a = getattr(gammaopt, name)(ours.parameters(), lr=0.01, weight_decay=0.1)
    b = getattr(torch.optim, name)(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_readout_alone_is_scaled_at_the_start() -> None:
    plain, net = mlp(256), mlp(256)
    wrap(net, 1.0, depth=3, base=mlp(64))
    for name, parameter in plain.named_parameters():
        factor = (64 / 256) ** 0.5 if name == "5.weight" else 1.0
        torch.testing.assert_close(dict(net.named_parameters())[name], parameter * factor)


def test_base_as_meta_module_mapping_and_mup_file_agree(tmp_path: Path) -> None:
    mup = pytest.importorskip("mup")
    with torch.device("meta"):
        meta = MLP(20, 3, width=64, depth=3, bias=True)
    shapes = {name: parameter.shape for name, parameter in mlp(64).named_parameters()}
    path = tmp_path / "base.bsh"
    mup.make_base_shapes(mlp(64), mlp(32), str(path))
    expected = plan_of(wrap(mlp(256), 1.0, depth=3, base=mlp(64))).multipliers()
    for base in (meta, shapes, path, str(path)):
        assert plan_of(wrap(mlp(256), 1.0, depth=3, base=base)).multipliers() == expected


def test_bad_bases_are_named(tmp_path: Path) -> None:
    net = mlp(64)
    before = copy.deepcopy(net.state_dict())
    not_shapes = {
        "bad": b"- 1\n- 2\n",
        "not yaml": b"a: b: c\n",
        "binary": bytes(range(256)),
        "empty": b"",
        "flat": b"a: 1\n",
        "no date": b"a: 2001-99-99\n",
    }
    for name, content in not_shapes.items():
        (tmp_path / f"{name}.bsh").write_bytes(content)
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    cases: list[tuple[Any, str]] = [
        (MLP(20, 3, width=32, depth=2, bias=True), r"parameter '5.weight' of net is not in base"),
        ({"1.weight": (32, 20)}, r"parameter '1.bias' of net is not in base"),
        (tmp_path / "none.bsh", r"none.bsh' can't be read \(No such file or directory\)"),
        *(
            (tmp_path / f"{name}.bsh", rf"{name}.bsh is not a file of base shapes; make one with mup.make_base_shapes")
            for name in not_shapes
        ),
        ("a\0b", r"^base shapes 'a\\x00b' can't be read \(.*null.*\); give the path of a .bsh file$"),
        ({**shapes, "1.weight": (20,)}, r"is \(64, 20\) in net and \(20,\)"),
        *(
            ({**shapes, "1.weight": bad}, r"^base shape of '1.weight' is .*; give a tuple of integers >= 1$")
            for bad in (64, (0, 20), (-8, 20), ("a", "b"), (8.5, 20), None)
        ),
        *(
            (
                bad,
                rf"^base is a {type(bad).__name__}; give a torch.nn.Module, a mapping of parameter names to shapes, or",
            )
            for bad in (64, [(32, 20)], lambda: mlp(32))
        ),
    ]
    for base, message in cases:
        with pytest.raises(UsageError, match=message):
            wrap(net, 1.0, depth=3, base=base)
    with pytest.raises(UsageError, match=r"base= goes with parametrization='as_is', not with 'mean_field'"):
        wrap(net, 1.0, depth=3, base=mlp(32), parametrization="mean_field")
    assert type(net) is MLP
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
