"""A checkpoint whose γ, parametrization, base, roles or centring is not the model's: said in words, γ first."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gammaopt
from gammaopt import Plan, UsageError, wrap
from gammaopt._errors import CheckpointError
from gammaopt._plan import Scale
from gammaopt.online import MLP

BASES = {"base": 8, "another base": 32}  # the net's own width is 16
KINDS = ("as_is", "mean_field", "base", "another base")


def wrapped(kind: str, gamma: float = 2.0, **settings: Any) -> Any:
    torch.manual_seed(0)
    how: dict[str, Any] = {"parametrization": kind} if kind not in BASES else {"base": MLP(6, 3, width=BASES[kind])}
    return wrap(MLP(6, 3, width=16), gamma, depth=3, **how, **settings)


WORDS = {"as_is": "parametrization='as_is'", "mean_field": "parametrization='mean_field'"}


@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("here", KINDS)
def test_another_parametrization_or_base_is_refused_because_the_rates_are_others(saved: str, here: str) -> None:
    source, model = wrapped(saved), wrapped(here)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rates = [gammaopt.Adam(each.parameters(), lr=0.1).effective_lrs() for each in (source, model)]
    if saved == here:
        model.load_state_dict(source.state_dict())
        return
    assert rates[0] != rates[1]
    with torch.no_grad():
        next(source.parameters()).add_(1)
    with pytest.raises(UsageError) as caught:
        model.load_state_dict(source.state_dict())
    assert isinstance(caught.value, RuntimeError)
    there = WORDS.get(saved, "base=")
    expected = (
        "the checkpoint was saved with another base= or roles=, where one lr means other rates; "
        "wrap the net with the checkpoint's"
        if {saved, here} == set(BASES)
        else f"the checkpoint was saved under {there} and this model is wrapped with {WORDS.get(here, 'base=')}, "
        f"where one lr means other rates; wrap the net with the checkpoint's {there}"
    )
    assert str(caught.value) == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # nothing half loaded
    with pytest.raises(RuntimeError) as of_part:
        nn.Sequential(model).load_state_dict(nn.Sequential(source).state_dict())
    assert expected in str(of_part.value)


def test_other_roles_are_refused_where_they_change_rates() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.head = nn.Parameter(torch.ones(6, 6)), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x @ self.odd)  # type: ignore[no-any-return]

    def build(role: Any, parametrization: Any) -> nn.Module:
        return wrap(Net(), 2.0, depth=2, parametrization=parametrization, roles={"odd": role})

    saved = build("weight", "mean_field").state_dict()
    with pytest.raises(UsageError, match=r"^the checkpoint was saved with another roles=, where one lr means other ra"):
        build("embedding", "mean_field").load_state_dict(saved)
    # Role pairs whose rates differ under SGD alone (6 and 1), and under Adam alone (1/6 and 1).
    for role, other in (("embedding", "scalar"), ("weight", "scalar")):
        with pytest.raises(UsageError, match=r"^the checkpoint was saved with another roles="):
            build(other, "mean_field").load_state_dict(build(role, "mean_field").state_dict())
    build("weight", "mean_field").load_state_dict(saved)
    build("weight", "as_is").load_state_dict(build("embedding", "as_is").state_dict())


def test_a_base_of_the_nets_own_width_is_like_none() -> None:
    own = wrap(MLP(6, 3, width=16), 2.0, depth=3, base=MLP(6, 3, width=16))
    own.load_state_dict(wrapped("as_is").state_dict())
    wrapped("as_is").load_state_dict(own.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_averages_and_casts_of_a_checkpoint_are_not_another_plan(dtype: torch.dtype) -> None:
    for kind in KINDS:
        model = wrapped(kind, loss="cross_entropy")
        saved = model.state_dict()
        model.load_state_dict({name: (0.7 * value + 0.3 * value).to(dtype) for name, value in saved.items()})


def test_another_loss_is_the_users_to_choose_but_is_said_where_the_rates_differ() -> None:
    line = (
        r"^the checkpoint was trained for loss='cross_entropy' and this model is wrapped for loss='mse': SGD's rates "
        r"are 0.5 × the checkpoint's; to go on at its rates wrap the net with loss='cross_entropy'$"
    )
    with pytest.warns(UserWarning, match=line):
        wrapped("as_is", 0.5).load_state_dict(wrapped("as_is", 0.5, loss="cross_entropy").state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped("as_is", 2.0).load_state_dict(wrapped("as_is", 2.0, loss="cross_entropy").state_dict())


def test_checkpoint_of_another_version_of_the_plan() -> None:
    model = wrapped("as_is")
    saved = {**model.state_dict(), "gammaopt_plan": torch.tensor([2.0, 3, 1], dtype=torch.float64)}
    with pytest.raises(UsageError, match=r"^the checkpoint's 'gammaopt_plan' has 3 numbers and 8 are known here; load"):
        model.load_state_dict(saved)


def test_a_partial_checkpoint_of_another_base_copies_nothing() -> None:
    source, model = wrapped("base"), wrapped("another base")
    with torch.no_grad():
        next(source.parameters()).add_(1)
    saved = source.state_dict()
    del saved["5.weight"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"^the checkpoint was saved with another base= or roles=") as caught:
        model.load_state_dict(saved, strict=False)
    assert "another depth" in str(caught.value).splitlines()[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("inside", [False, True])
def test_another_width_is_not_said_to_be_other_roles(inside: bool) -> None:
    narrow, wide = (wrap(MLP(6, 3, width=w), 2.0, depth=3, parametrization="mean_field") for w in (8, 16))
    parts: list[nn.Module] = [nn.Sequential(each) if inside else each for each in (narrow, wide)]
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        parts[1].load_state_dict(parts[0].state_dict())
    assert "roles=" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (torch.tensor(2.0), r"is of shape \(\) and float32, not the numbers of a plan"),
        (torch.ones(8, dtype=torch.int64), r"is of shape \(8,\) and int64, not the numbers of a plan"),
        (torch.ones(8, device="meta"), r"is on the meta device, not the numbers of a plan"),
        (torch.full((8,), torch.nan), r"is \[nan, .*\], not the numbers of a plan"),
        (torch.tensor([torch.nan, 3, 1, 1, 1, 0, 0, 0]), r"is \[nan, .*\], not the numbers of a plan"),
        (torch.tensor([2.0, 3, 1, 1, 1, 7, 0, 0]), r"is \[2.0, .*\], not the numbers of a plan"),
        (torch.tensor([2.0, 3, 1, 1, 1, 0, 0, 2]), r"is \[2.0, .*\], not the numbers of a plan"),
        ([2.0, 3, 1], r"is a list, not the numbers of a plan"),
    ],
)
def test_an_entry_that_is_no_plan(entry: Any, line: str) -> None:
    model = wrapped("as_is")
    with pytest.raises(UsageError, match=rf"the checkpoint's 'gammaopt_plan' {line}"):
        model.load_state_dict({**model.state_dict(), "gammaopt_plan": entry})


@pytest.mark.parametrize("gamma", [1e-5, 1e5])
def test_a_gamma_that_half_precision_can_not_hold_is_said_to_be_lost_in_the_cast(gamma: float) -> None:
    model = wrapped("as_is", gamma, center="none")
    saved = {name: value.half() for name, value in model.state_dict().items()}
    line = (
        rf"^the checkpoint was cast to float16, which can't hold the γ = {gamma:g} of this model; leave "
        r"'gammaopt_plan' in float64 when you cast one$"
    )
    with pytest.raises(UsageError, match=line):
        model.load_state_dict(saved)
    model.load_state_dict({**saved, "gammaopt_plan": model.state_dict()["gammaopt_plan"]})


def test_the_fingerprint_does_not_hang_on_the_last_bit_of_a_decimal_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprints = set()
    for factor in (1.0005, math.nextafter(1.0005, 0), math.nextafter(1.0005, 2), 1.003):
        monkeypatch.setattr(Plan, "_width_factors", lambda *_, factor=factor: Scale(factor))
        fingerprints.add(dataclasses.replace(wrapped("as_is").gammaopt).fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("other", ["zero_readout", "none"])
def test_another_centring_is_one_clear_line_ahead_of_torchs_keys(other: str) -> None:
    x = torch.ones(2, 6)
    copied, not_copied = wrapped("as_is"), wrapped("as_is", example_inputs=x, center=other)
    with pytest.raises(UsageError) as caught:
        not_copied.load_state_dict(copied.state_dict())
    line, _, rest = str(caught.value).partition("\n")
    assert line == (
        "the checkpoint has θ₀, so its model was wrapped with center='copy', and this one with another center=; "
        "wrap the net with center='copy'"
    )
    assert "Unexpected key(s)" in rest
    with pytest.raises(UsageError) as caught:
        copied.load_state_dict(not_copied.state_dict())
    line, _, rest = str(caught.value).partition("\n")
    assert line == (
        "the checkpoint has no θ₀, so its model was wrapped with center='zero_readout' or 'none', and this one with "
        "center='copy'; wrap the net with the checkpoint's center="
    )
    assert "Missing key(s)" in rest


def test_of_several_mismatches_gamma_comes_first_and_all_are_named() -> None:
    source = wrap(MLP(6, 3, width=8), 5.0, depth=3, parametrization="mean_field", center="none")
    with pytest.raises(UsageError) as caught:
        wrapped("as_is").load_state_dict(source.state_dict())
    starts = [
        "the checkpoint was saved at γ = 5 and this model is wrapped with γ = 2; wrap the net with the checkpoint's γ",
        "the checkpoint was saved under parametrization='mean_field'",
        "the checkpoint was saved at another width: '1.weight' is (8, 6) there and (16, 6) here",
        "the checkpoint has no θ₀",
    ]
    lines = str(caught.value).splitlines()
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def measured(gamma: float = 2.0, **settings: Any) -> Any:
    torch.manual_seed(0)
    return wrap(MLP(6, 3, width=16), gamma, example_inputs=X, **settings)


def test_a_stated_depth_or_knee_is_not_replaced_by_another_one_silently() -> None:
    saved = measured().state_dict()
    for settings, line in (
        (
            {"depth": 2.0},
            r"^the checkpoint was saved at depth = 3 and .* wrapped with depth=2, .* without depth= ",
        ),
        (
            {"knee": 50.0},
            r"^the checkpoint was saved at knee = .* wrapped with knee=50, .* without knee= ",
        ),
    ):
        model = measured(**settings)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=line) as caught:
            model.load_state_dict(saved)
        assert len(str(caught.value).splitlines()) == 1
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    measured(depth=3.0).load_state_dict(saved)  # the same one
    model = measured()  # a measured one is replaced
    model.load_state_dict(measured(depth=2.0, knee=50.0).state_dict())
    assert (model.gammaopt.depth, model.gammaopt.knee) == (2, 50)


def test_a_checkpoint_with_theta_zero_and_no_plan_may_be_of_any_gamma() -> None:
    saved = measured(30.0).state_dict()
    del saved["gammaopt_plan"]
    line = "the checkpoint has θ₀ and no 'gammaopt_plan', so nothing tells at which γ it was saved; save the model's"
    with pytest.raises(CheckpointError, match=f"^{line}"):
        measured(2.0).load_state_dict(saved)
    with pytest.warns(UserWarning, match=f"^{line}"):
        measured(2.0).load_state_dict(saved, strict=False)
    whole = nn.Sequential(measured(30.0))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .0.gammaopt_plan"):
        whole.load_state_dict({f"0.{name}": value for name, value in saved.items()})


def test_a_plain_checkpoint_that_is_loaded_with_strict_false_leaves_theta_zero_and_says_so() -> None:
    plain = MLP(6, 3, width=16).state_dict()
    model = measured()
    with pytest.warns(UserWarning, match=r"^the checkpoint has no θ₀, .* load it into the net before gammaopt.wrap$"):
        model.load_state_dict(plain, strict=False)
    assert model(X).abs().max() > 0
    model.load_state_dict(plain, strict=False)  # given other parameters on its way, as by an average: no warning
    measured(center="none").load_state_dict(plain, strict=False)  # no θ₀ to miss, and so no warning


def test_a_checkpoint_of_another_width_is_told_in_a_few_lines() -> None:
    torch.manual_seed(0)
    saved = wrap(MLP(6, 3, width=8), 2.0, depth=3).state_dict()
    with pytest.raises(CheckpointError) as caught:
        wrapped("as_is").load_state_dict(saved)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("the checkpoint was saved at another width: '1.weight' is (8, 6) there")
    assert lines[2].startswith("\tsize mismatch for")
    assert lines[3].endswith("more")
    assert len(lines) == 4


def test_a_plain_checkpoint_in_pieces_fills_a_model_on_the_meta_device() -> None:
    """Half-way the parameters are there and θ₀ is not: nothing can be compared, and nothing is warned of."""
    with torch.device("meta"):
        net = nn.Linear(4, 2)
    model = wrap(net, gamma=2.0, depth=1.0, knee=1.0)
    for name, value in nn.Linear(4, 2).state_dict().items():
        model.load_state_dict({name: value}, strict=False, assign=True)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_all_that_a_sharded_checkpoint_asks_for_is_on_one_device() -> None:
    """Or torch.distributed.checkpoint finds "Multiple devices" where a whole state dict is handed to an accelerator."""
    with torch.device("meta"):
        net = nn.Linear(4, 2)
    model = wrap(net, gamma=2.0, depth=1.0, knee=1.0)
    assert {buffer.device for _, buffer in model.named_buffers(recurse=False)} == {torch.device("meta")}
