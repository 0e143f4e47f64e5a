"""Muon: torch's own over one group per tensor at lr·m, and factors that meet the spectral condition at every width."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from reference import EXACT, Reference, deviation, model_and_data, plan_of, run
from test_contract_schedulers import CASES, Make, advance
from torch import Tensor, nn

import gammaopt
from gammaopt import UsageError, wrap
from gammaopt.diagnostics import coordinate_check
from gammaopt.online import MLP

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no momentum": {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
    "plain momentum": {"nesterov": False, "weight_decay": 0.3},
    "spectral": {"adjust_lr_fn": "spectral_unclamped"},
    "as AdamW": {"adjust_lr_fn": "match_rms_adamw"},
    "other iteration": {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-2},
}


def data() -> tuple[MLP, MLP, Tensor, Tensor]:
    model, x, y = model_and_data()
    return model, copy.deepcopy(model), x, y


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def reference(model: nn.Module, **options: Any) -> Reference:
    scales = plan_of(model).scales("muon", adjust_lr_fn=options.get("adjust_lr_fn"))
    wanted = [scales[name] for name, parameter in model.named_parameters() if parameter.ndim == 2]
    return Reference("Muon", matrices(model), wanted, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trajectory_is_the_references(options: dict[str, Any]) -> None:
    model, twin, x, y = data()
    start = copy.deepcopy(matrices(model))
    run(model, gammaopt.Muon(matrices(model), lr=0.01, **options), x, y, 20)
    run(twin, reference(twin, lr=0.01, **options), x, y, 20)
    assert deviation(matrices(model), matrices(twin)) <= EXACT
    assert deviation(matrices(model), start) > 1e-3


@pytest.mark.parametrize(("which", "make"), CASES)
def test_trajectory_under_a_scheduler_is_the_references(which: str, make: Make) -> None:
    model, twin, x, y = data()
    ours, theirs = gammaopt.Muon(matrices(model), lr=0.01), reference(twin, lr=0.01)
    a, b = make(ours), make(theirs.settings)
    for step in range(10):
        run(model, ours, x, y, 1)
        run(twin, theirs, x, y, 1)
        assert ours.param_groups[0]["lr"] == theirs.settings.param_groups[0]["lr"], which
        advance(a, step)
        advance(b, step)
    assert deviation(matrices(model), matrices(twin)) <= EXACT


def test_state_is_torchs_and_loads_both_ways() -> None:
    model, twin, x, y = data()
    ours, theirs = gammaopt.Muon(matrices(model), lr=0.01), torch.optim.Muon(matrices(twin), lr=0.02)
    assert ours.state_dict()["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    run(model, ours, x, y, 3)
    run(twin, theirs, x, y, 3)
    rates = ours.effective_lrs()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert theirs.param_groups[0]["lr"] == 0.01
    theirs.param_groups[0]["lr"] = 0.02
    ours.load_state_dict(theirs.state_dict())
    assert ours.effective_lrs() == pytest.approx({name: 2 * rate for name, rate in rates.items()})
    run(model, ours, x, y, 1)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_keep_their_multipliers(how: Any) -> None:
    model, x, y = model_and_data()
    optimizer = gammaopt.Muon(matrices(model), lr=0.01)
    run(model, optimizer, x, y, 3)
    other, copied = how((model, optimizer))
    assert type(copied) is gammaopt.Muon
    assert copied.effective_lrs() == optimizer.effective_lrs()
    run(model, optimizer, x, y, 3)
    run(other, copied, x, y, 3)
    assert all(torch.equal(p, q) for p, q in zip(matrices(model), matrices(other), strict=True))


def test_a_state_with_another_adjustment_brings_its_factors() -> None:
    model, twin, _, _ = data()
    optimizer = gammaopt.Muon(matrices(model), lr=0.01)
    optimizer.load_state_dict(torch.optim.Muon(matrices(twin), lr=0.01, adjust_lr_fn="match_rms_adamw").state_dict())
    expected = plan_of(model).scales("muon", adjust_lr_fn="match_rms_adamw")
    assert optimizer.effective_lrs() == {name: 0.01 * expected[name].lr for name in optimizer.effective_lrs()}
    assert expected != plan_of(model).scales("muon")


class Shapes(nn.Module):
    """A table, a matrix that widens and one that narrows, and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(self.table(x))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("adjust", [None, "original", "spectral_unclamped", "match_rms_adamw"])
def test_each_matrix_moves_by_the_norm_that_the_spectral_condition_asks_for(adjust: str | None) -> None:
    torch.manual_seed(0)
    model = wrap(Shapes(), 1.0, depth=3, parametrization="mean_field")
    lr, unit = 0.01, 0.2 if adjust == "match_rms_adamw" else 1.0
    optimizer = gammaopt.Muon(matrices(model), lr=lr, momentum=0.0, weight_decay=0.0, adjust_lr_fn=adjust)
    before = copy.deepcopy(dict(model.named_parameters()))
    for parameter in matrices(model):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = {n: (p - before[n]).detach() / (lr * unit) for n, p in model.named_parameters() if p.ndim == 2}
    for name in ("up.weight", "down.weight", "head.weight"):
        rows, columns = moved[name].shape
        assert 0.6 < float(torch.linalg.matrix_norm(moved[name], 2)) / (rows / columns) ** 0.5 < 1.3, name
    # A table is read by rows: their coordinates move by about the rate.
    assert 0.6 < float(moved["table.weight"].square().mean().sqrt()) < 1.3


def test_factors_do_not_depend_on_the_gradients_size() -> None:
    """At another γ the gradients are γ times smaller, and eps with them."""
    steps = []
    for gamma in (1.0, 2.0**13):  # a power of 2: rounding in bfloat16 is the same
        model, x, y = model_and_data(gamma)
        optimizer = gammaopt.Muon(matrices(model), lr=0.01, eps=0.1, weight_decay=0.0)
        before = copy.deepcopy(matrices(model))
        run(model, optimizer, x, y, 1)
        factor = gammaopt.EtaLaw(3, "muon").factor(gamma)
        steps.append([(p - q).detach() / factor for p, q in zip(matrices(model), before, strict=True)])
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


def test_width_transfer_from_a_base_and_nothing_at_its_own_width() -> None:
    def net(width: int) -> MLP:
        torch.manual_seed(0)
        return MLP(6, 3, width=width, depth=3)

    at_base = wrap(net(16), 1.0, depth=3, base=net(16))
    for adjust in (None, "match_rms_adamw", "spectral_unclamped"):
        assert set(plan_of(at_base).scales("muon", adjust_lr_fn=adjust).values()) == {(1.0, 1.0)}
    wider = plan_of(wrap(net(64), 1.0, depth=3, base=net(16)))
    lrs = list(wider.multipliers("muon").values())
    assert lrs == pytest.approx([1.0, 1.0, 0.5])  # only the readout narrows: √(3/64) over √(3/16)
    assert [s.lr for s in wider.scales("muon", adjust_lr_fn="match_rms_adamw").values()] == pytest.approx(
        [1.0, 0.5, 0.25]
    )
    as_is = plan_of(wrap(net(64), 4.0, depth=2))
    assert as_is.multipliers("muon") == as_is.multipliers("adam")


def test_activations_move_as_much_at_every_width() -> None:
    x = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    y = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    check = coordinate_check(
        lambda width: wrap(MLP(10, 2, width=width), 1.0, depth=3, parametrization="mean_field"),
        [32, 64, 128, 256],
        x,
        lambda out: (out - y).square().mean(),
        lambda model: gammaopt.Muon(model.parameters(), lr=0.05),
        tolerance=0.25,
    )
    assert check.ok, check


def test_refusals_are_torchs_and_the_packages() -> None:
    model, _, _ = model_and_data()
    bad: list[tuple[Any, dict[str, Any]]] = [
        (list(model.parameters()), {}),
        (matrices(model), {"momentum": -1.0}),
        (matrices(model), {"adjust_lr_fn": "none"}),
        (matrices(model), {"weight_decay": -1.0}),
    ]
    for params, options in bad:
        with pytest.raises(ValueError) as expected:  # noqa: PT011
            torch.optim.Muon(params, **options)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            gammaopt.Muon(params, **options)
        assert str(caught.value) == str(expected.value)
    with pytest.raises(UsageError, match=r"^lr=-1 is not allowed; give a finite lr >= 0$"):
        gammaopt.Muon(matrices(model), lr=-1.0)
    assert set(gammaopt.Muon(matrices(model), lr=0.0).effective_lrs().values()) == {0.0}
    with pytest.raises(UsageError, match=r"parameter 0 \(2, 2\) belongs to no wrapped model"):
        gammaopt.Muon([nn.Parameter(torch.ones(2, 2))])


def test_signature_opens_with_torchs_own() -> None:
    mine = list(inspect.signature(gammaopt.Muon).parameters.values())
    torchs = list(inspect.signature(torch.optim.Muon).parameters.values())
    assert [(p.name, p.kind, p.default) for p in mine[: len(torchs)]] == [(p.name, p.kind, p.default) for p in torchs]
    assert [p.name for p in mine[len(torchs) :]] == ["gamma", "depth", "loss", "knee"]


def test_hooks_fire_once_and_a_closure_is_evaluated_with_gradients() -> None:
    model, x, y = model_and_data()
    optimizer = gammaopt.Muon(matrices(model), lr=0.01)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(x) - y).square().mean()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert calls == ["pre", "post"]
