"""The readout: the last layer that the selected output depends on, whatever else runs later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gammaopt import Plan, UsageError, knee, wrap
from gammaopt._roles import fan_in, rules_for


class TwoHeads(nn.Module):
    """``a`` is read off a deeper trunk than ``b``, which runs last and is registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.deeper = nn.Linear(8, 16), nn.Linear(16, 16)
        self.a, self.b = nn.Linear(16, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.relu_(self.trunk(x))
        a = self.a(torch.relu_(self.deeper(z)))
        return {"a": a, "b": self.b(z)}


def plan_of(net: nn.Module) -> Plan:
    assert isinstance(net.gammaopt, Plan)
    return net.gammaopt


@pytest.mark.parametrize(
    ("output", "expected"),
    [("a", "a"), ("b", "b"), (lambda r: r["a"], "a"), (lambda r: r["a"].sum(1) + r["b"][:, 0], "b")],
)
def test_it_is_of_the_selected_output(output: Any, expected: str) -> None:
    model = wrap(TwoHeads(), 2.0, example_inputs=torch.ones(4, 8), parametrization="mean_field", output=output)
    assert plan_of(model).readout == expected
    roles = {rule.name: rule.role for rule in plan_of(model).rules}
    assert [name for name, role in roles.items() if role == "readout weight"] == [f"{expected}.weight"]
    centred = wrap(TwoHeads(), 2.0, example_inputs=torch.ones(4, 8), center="zero_readout", output="a")
    assert not centred.a.weight.any()
    assert centred.b.weight.any()


def test_frozen_layers_and_a_forward_without_gradients_do_not_hide_it() -> None:
    net = TwoHeads().requires_grad_(False)
    net.trunk.requires_grad_(True)
    assert plan_of(wrap(net, 2.0, depth=1, example_inputs=torch.ones(4, 8), knee=1.0, output="a")).readout == "a"

    class Unrecorded(TwoHeads):
        @torch.no_grad()
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return super().forward(x)

    assert (
        plan_of(wrap(Unrecorded(), 2.0, depth=1, knee=1.0, example_inputs=torch.ones(4, 8), output="a")).readout == "b"
    )


def test_the_zeros_change_neither_the_output_nor_the_dtype() -> None:
    seen: list[Tensor] = []
    net = TwoHeads().to(torch.bfloat16)
    net.b.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    net(x)
    wrap(net, 2.0, depth=3, knee=1.0, example_inputs=x, output="a", center="none")
    assert seen[1].dtype == torch.bfloat16
    assert torch.equal(seen[0], seen[1])


def test_an_output_that_is_one_tensor_has_no_entries() -> None:
    for output in ("logits", 0):
        with pytest.raises(
            UsageError, match=rf"^Linear returns one float32 tensor, .* output={output!r} .*drop output=$"
        ):
            wrap(nn.Linear(8, 2), 2.0, example_inputs=torch.ones(4, 8), output=output)


def test_inputs_with_values_for_a_net_without_are_told_the_fix() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    with pytest.raises(
        UsageError, match=r"on the meta device and the example inputs are not, .* give depth= and knee="
    ):
        wrap(net, 2.0, example_inputs=torch.ones(4, 8))
    assert plan_of(wrap(net, 2.0, depth=2, knee=3.0)).knee == 3.0


class Conv1D(nn.Module):
    """Hugging Face's Linear layer with a weight (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.3), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_conv1d_of_hugging_face_is_a_linear_layer_with_a_transposed_weight() -> None:
    torch.manual_seed(0)
    turned = nn.Sequential(Conv1D(6, 4), nn.ReLU(), Conv1D(3, 6)).double()
    linear = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for mine, theirs in zip(linear.parameters(), turned.parameters(), strict=True):
            mine.copy_(theirs.T if theirs.dim() == 2 else theirs)
    x = torch.randn(16, 4, dtype=torch.float64)
    assert knee(turned, x) == pytest.approx(knee(linear, x), rel=1e-12)
    assert fan_in(turned[0], (4, 6)) == 4
    assert [rule.role for rule in rules_for(turned, "2")] == ["weight", "bias", "readout weight", "readout bias"]
    plans = [plan_of(wrap(net, 2.0, example_inputs=x, parametrization="mean_field")) for net in (turned, linear)]
    assert plans[0].scales("sgd") == plans[1].scales("sgd")
    assert plans[0].scales("adam") == plans[1].scales("adam")
    # Torch's adjustment is by the shape it sees, (in, out): the product of both is what a Linear layer has.
    of_torch = (max(1.0, 4 / 6) ** 0.5, max(1.0, 6 / 4) ** 0.5)
    made = [plan.scales("muon")["0.weight"].lr * own for plan, own in zip(plans, of_torch, strict=True)]
    assert made[0] == pytest.approx(made[1], rel=1e-12)


def test_gpt2_is_wrapped_with_defaults_and_untied_in_mean_field_form() -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 31, (4, 8), generator=torch.Generator().manual_seed(0))

    def build(*, tied: bool) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=31, n_positions=16, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=tied
        )
        return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]

    model = wrap(build(tied=True), 2.0, example_inputs={"input_ids": ids}, output="logits")
    assert not model(input_ids=ids).logits.any()
    assert 0 < plan_of(model).knee < 10
    plan = plan_of(
        wrap(build(tied=False), 2.0, example_inputs={"input_ids": ids}, output="logits", parametrization="mean_field")
    )
    rules = {rule.name: rule for rule in plan.rules}
    assert plan.readout == "lm_head"
    assert rules["transformer.h.0.mlp.c_proj.weight"].fan_in == 128
    assert plan.width == 32
