"""Roles and mean-field rates, parameter by parameter, and the table that shows them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gammaopt import EtaLaw, Plan, UsageError, wrap
from gammaopt._roles import fan_in, rules_for
from gammaopt.online import MLP


def plan_of(net: nn.Module) -> Plan:
    assert isinstance(net.gammaopt, Plan)
    return net.gammaopt


def test_mean_field_rates_of_an_mlp() -> None:
    inputs, width, gamma = 20, 16, 50.0
    plan = plan_of(wrap(MLP(inputs, 3, width=width, depth=3, bias=True), gamma, depth=3, parametrization="mean_field"))
    s = EtaLaw(3).factor(gamma)
    assert plan.width == width
    assert plan.multipliers() == pytest.approx(
        {
            "1.weight": s * width / inputs,
            "1.bias": s * width,
            "3.weight": s * 1.0,
            "3.bias": s * width,
            "5.weight": s / width,
            "5.bias": s,
        }
    )


def test_mean_field_rates_of_a_convolution_count_the_kernel_area_and_groups() -> None:
    net = nn.Sequential(
        nn.Conv2d(6, 8, 3, groups=2),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    plan = plan_of(wrap(net, 1.0, depth=2, parametrization="mean_field"))
    multipliers = plan.multipliers()
    assert multipliers["0.weight"] == pytest.approx(8 / (3 * 9))
    assert multipliers["2.weight"] == multipliers["2.bias"] == multipliers["0.bias"] == 8
    assert multipliers["5.weight"] == pytest.approx(1 / 8)


def test_as_is_multiplies_every_rate_by_the_law_alone() -> None:
    plan = plan_of(wrap(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), 9.0, depth=2, loss="cross_entropy"))
    assert set(plan.multipliers().values()) == {EtaLaw(2, "sgd", "cross_entropy").factor(9.0)}


def test_mean_field_initialises_weights_at_their_scale_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    net = MLP(400, 300, width=500, depth=2, bias=True)
    wrap(net, 1.0, depth=2, parametrization="mean_field")
    values = {name: parameter.detach() for name, parameter in net.named_parameters()}
    assert float(values["1.weight"].std()) == pytest.approx(400**-0.5, rel=0.02)
    assert float(values["3.weight"].std()) == pytest.approx(1 / 500, rel=0.02)
    assert not values["1.bias"].any()
    assert not values["3.bias"].any()


class Reversed(nn.Module):
    """The readout is registered first and runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.body = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())  # type: ignore[no-any-return]


def test_readout_is_the_layer_that_runs_last_when_inputs_are_given() -> None:
    plan = plan_of(wrap(Reversed(), 1.0, example_inputs=torch.ones(2, 4), parametrization="mean_field"))
    assert {rule.name: rule.role for rule in plan.rules}["head.weight"] == "readout weight"
    assert plan.width == 8


def test_unknown_parameter_is_refused_under_mean_field_with_its_name_and_the_fix() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(5, 4))

    net = nn.Sequential(Lookup(), nn.Linear(4, 2))
    before = net.state_dict()["1.weight"].clone()
    with pytest.raises(
        UsageError,
        match=r"parameter '0.table' \(5, 4\) of Lookup has no known scaling .* roles=\{'0.table': …\}",
    ):
        wrap(net, 1.0, depth=2, parametrization="mean_field")
    assert type(net) is nn.Sequential
    assert torch.equal(net.state_dict()["1.weight"], before)


def test_all_unknown_parameters_are_named_at_once() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net.a, net.b = nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(3))
    message = (
        r"parameters 'a' \(5, 4\) of Sequential, 'b' \(3,\) of Sequential have .* roles=\{'a': …, 'b': …\} \(one of"
    )
    with pytest.raises(UsageError, match=message):
        wrap(net, 1.0, depth=2, parametrization="mean_field")


class Gains(nn.Module):
    """Plain parameters as timm's LayerScale, HF's norms and others have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scale = LayerScale(4)
        self.rms = LlamaRMSNorm(4)
        self.slope = nn.PReLU(4)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.ones([])), nn.Parameter(torch.ones(1))
        self.q_bias, self.beta = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 2)


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.lambda1 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


def test_a_plain_parameter_is_read_off_its_name_where_that_tells() -> None:
    plan = plan_of(wrap(Gains(), 1.0, depth=1, parametrization="mean_field"))
    assert {rule.name: rule.role for rule in plan.rules if "head" not in rule.name} == {
        "layer_scale.gamma": "norm",
        "layer_scale.lambda1": "norm",
        "rms.weight": "norm",
        "slope.weight": "norm",
        "logit_scale": "scalar",
        "logit_bias": "scalar",
        "q_bias": "bias",
        "beta": "norm",
    }


@pytest.mark.parametrize("shape", [(4,), (1,), (), (1, 1, 1)])
def test_a_small_parameter_whose_name_tells_nothing_is_refused_where_width_matters(shape: tuple[int, ...]) -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        net.register_parameter("w", nn.Parameter(torch.ones(shape)))
        return net

    message = r"parameter 'w' \(.*\) of Sequential has no known scaling .* roles=\{'w': …\} \(one of: weight, bias, "
    with pytest.raises(UsageError, match=message):
        wrap(build(), 1.0, depth=2, parametrization="mean_field")
    with pytest.raises(UsageError, match=message):
        wrap(build(), 1.0, depth=2, base=build())
    assert plan_of(wrap(build(), 4.0, depth=2)).multipliers()["w"] == 4
    stated = plan_of(wrap(build(), 1.0, depth=2, parametrization="mean_field", roles={"w": "norm"}))
    assert stated.multipliers()["w"] == 4


def test_frozen_parameters_keep_their_values() -> None:
    """A pretrained backbone is not drawn anew, nor is a frozen readout scaled."""

    def build(width: int = 8) -> MLP:
        net = MLP(5, 2, width=width, depth=3, bias=True)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not name.startswith(("1.", "5.")))
        return net

    for options in ({"parametrization": "mean_field"}, {"base": build(4)}):
        net = build()
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        wrap(net, 1.0, depth=3, **options)
        changed = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed == ({"3.weight", "3.bias"} if "base" not in options else set())


def test_table_shows_each_parameter_with_its_effective_rate() -> None:
    plan = plan_of(wrap(MLP(20, 3, width=16, depth=2), 4.0, depth=2, parametrization="mean_field"))
    lines = plan.table(lr=0.5).splitlines()
    assert lines[0].startswith("γ = 4, L = 2, mean_field, sgd under mse: s(γ) = 4, lr = 0.5")
    assert lines[1].split() == ["parameter", "shape", "role", "multiplier", "effective", "rate"]
    assert lines[3].split() == ["1.weight", "16×20", "weight", "3.2", "1.6"]
    assert lines[4].split() == ["3.weight", "3×16", "readout", "weight", "0.25", "0.125"]
    assert str(plan).startswith(plan.table())
    assert max(map(len, lines)) <= 80


def test_table_says_what_was_frozen() -> None:
    net = MLP(20, 3, width=16, depth=2)
    net[1].requires_grad_(False)
    lines = plan_of(wrap(net, 4.0, depth=2)).table(lr=0.5).splitlines()
    assert lines[3].split() == ["1.weight", "16×20", "weight", "4", "frozen"]
    assert lines[4].split()[-1] == "2"


def test_adam_rates_in_mean_field_form() -> None:
    inputs, width, gamma = 20, 16, 50.0
    plan = plan_of(wrap(MLP(inputs, 3, width=width, depth=3, bias=True), gamma, depth=3, parametrization="mean_field"))
    s = EtaLaw(3, "adam").factor(gamma)
    scales = plan.scales("adam")
    assert {name: scale.lr for name, scale in scales.items()} == pytest.approx(
        {
            "1.weight": s / inputs,
            "1.bias": s,
            "3.weight": s / width,
            "3.bias": s,
            "5.weight": s / width,
            "5.bias": s,
        }
    )
    of_readout = {name: 1.0 if name.startswith("5.") else 1 / width for name in scales}
    assert {name: scale.eps * gamma for name, scale in scales.items()} == pytest.approx(of_readout)


class Everything(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.tokens = nn.Embedding(10, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.up = nn.ConvTranspose1d(8, 6, 4, stride=2, groups=2)
        self.recurrent = nn.LSTM(6, 8, batch_first=True)
        self.lora_A = nn.Parameter(torch.ones(2, 8))
        self.lora_B = nn.Parameter(torch.zeros(8, 2))
        low_rank = nn.Linear(2, 8, bias=False)  # as PEFT names them
        self.adapter = nn.ModuleDict({"lora_B": nn.ModuleDict({"default": low_rank})})
        nn.init.zeros_(low_rank.weight)
        self.layer_scale = nn.Parameter(torch.ones(8))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(8, 3)


def test_every_kind_of_parameter_has_its_role_and_fan_in() -> None:
    found = {rule.name: (rule.role, rule.fan_in) for rule in rules_for(Everything(), "head")}
    assert found == {
        "cls_token": ("embedding", None),
        "pos_embed": ("embedding", None),
        "tokens.weight": ("embedding", None),
        "attention.in_proj_weight": ("weight", 8),
        "attention.in_proj_bias": ("bias", None),
        "attention.out_proj.weight": ("weight", 8),
        "attention.out_proj.bias": ("bias", None),
        "norm.weight": ("norm", None),
        "norm.bias": ("norm", None),
        "up.weight": ("weight", 8 / 2 * 4 / 2),
        "up.bias": ("bias", None),
        "recurrent.weight_ih_l0": ("weight", 6),
        "recurrent.weight_hh_l0": ("weight", 8),
        "recurrent.bias_ih_l0": ("bias", None),
        "recurrent.bias_hh_l0": ("bias", None),
        "lora_A": ("weight", 8),
        "lora_B": ("weight", 2),
        "adapter.lora_B.default.weight": ("weight", 2),
        "layer_scale": ("norm", None),
        "temperature": ("scalar", None),
        "head.weight": ("readout weight", 8),
        "head.bias": ("readout bias", None),
    }


def test_a_layer_without_inputs_has_no_scale() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that there is nothing to initialise
        net = nn.Sequential(nn.Linear(0, 4), nn.ReLU(), nn.Linear(4, 1))
    plan = plan_of(wrap(net, 1.0, depth=2, parametrization="mean_field"))
    assert plan.multipliers() == {"0.weight": 4, "0.bias": 4, "2.weight": 0.25, "2.bias": 1}


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_transposed_convolution_has_unit_output_at_its_fan_in(stride: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(16, 32, 4, stride=stride, groups=groups, bias=False)
    layer.weight.data.normal_(0, fan_in(layer, tuple(layer.weight.shape)) ** -0.5)
    out = layer(torch.randn(8, 16, 12, 12)).detach()[..., 4:-4, 4:-4]
    assert float(out.square().mean()) == pytest.approx(1.0, rel=0.1)


def test_tokens_adapters_and_norms_keep_their_initialisation_under_mean_field() -> None:
    net = Everything()
    wrap(net, 1.0, depth=3, parametrization="mean_field")
    values = net.state_dict()
    assert not values["lora_B"].any()
    assert not values["cls_token"].any()
    assert bool((values["norm.weight"] == 1).all())
    assert values["tokens.weight"].std() > 0.5
    assert not values["tokens.weight"][0].any()  # the padding row, which no gradient would take back
    assert not values["adapter.lora_B.default.weight"].any()


def test_tied_readout_is_refused_under_mean_field_and_fine_as_is() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    net[1].weight = net[0].weight
    with pytest.raises(UsageError, match=r"no readout of its own .* '1.weight' is tied .* parametrization='as_is'"):
        wrap(net, 1.0, depth=2, parametrization="mean_field")
    assert set(plan_of(wrap(net, 4.0, depth=2)).multipliers().values()) == {4.0}


def test_roles_are_stated_where_modules_do_not_tell_and_misspellings_are_named() -> None:
    net = nn.Sequential(Reversed(), nn.Linear(2, 2))
    net.table = nn.Parameter(torch.ones(5, 4))
    wrap(net, 1.0, depth=3, parametrization="mean_field", roles={"table": "embedding"})
    assert plan_of(net).multipliers()["table"] == 2
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"roles names 'tabel', which is no parameter of Sequential"):
        wrap(other, 1.0, depth=3, roles={"tabel": "embedding"})
    with pytest.raises(
        UsageError, match=r"^unknown role 'matrix' for parameter '0.weight'; choose one of: weight, .*readout bias$"
    ):
        wrap(other, 1.0, depth=3, roles={"0.weight": "matrix"})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match=r"^unknown role 'other' for parameter '0.weight'"):  # it says nothing
        wrap(other, 1.0, depth=3, roles={"0.weight": "other"})


def test_roles_that_are_no_mapping() -> None:
    net: Any = MLP(6, 3)
    roles: Any = ["1.weight"]
    with pytest.raises(UsageError, match=r"^roles is a list; give a mapping of parameter names to roles$"):
        wrap(net, 1.0, depth=3, roles=roles)
