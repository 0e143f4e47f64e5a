"""Every scheduler of torch at multipliers other than 1: its values in the groups, the reference's trajectory."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import NAMES, assert_equal_parameters, ours, plan_of, reference, run, theirs, twins
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

STEPS = 20
Make = Callable[[Any], Any]


def cyclic(optimizer: Any, **options: Any) -> Any:
    # It must be told not to cycle a momentum that the optimizer does not have.
    has = "betas" in optimizer.defaults or optimizer.defaults.get("momentum", 0) > 0
    return schedulers.CyclicLR(optimizer, 1e-3, 2e-2, step_size_up=3, cycle_momentum=has, **options)


def sequential(optimizer: Any) -> Any:
    warmup = schedulers.LinearLR(optimizer, start_factor=0.01, total_iters=5)
    return schedulers.SequentialLR(optimizer, [warmup, schedulers.CosineAnnealingLR(optimizer, 15)], milestones=[5])


def chained(optimizer: Any) -> Any:
    parts = [schedulers.ConstantLR(optimizer, 0.1, total_iters=4), schedulers.ExponentialLR(optimizer, 0.9)]
    return schedulers.ChainedScheduler(parts, optimizer=optimizer)


TABLE: dict[str, list[Make]] = {
    "LambdaLR": [
        lambda o: schedulers.LambdaLR(o, lambda t: 0.95**t),
        lambda o: schedulers.LambdaLR(o, lambda t: t / 9),
    ],
    "MultiplicativeLR": [lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9 if t % 2 else 1.05)],
    "StepLR": [lambda o: schedulers.StepLR(o, step_size=4, gamma=0.5)],
    "MultiStepLR": [lambda o: schedulers.MultiStepLR(o, milestones=[3, 9, 15], gamma=0.3)],
    "ConstantLR": [lambda o: schedulers.ConstantLR(o, factor=0.25, total_iters=6)],
    "LinearLR": [
        lambda o: schedulers.LinearLR(o, start_factor=0.01, total_iters=8),
        # Its last rate is −2e-19, by rounding.
        lambda o: schedulers.LinearLR(o, start_factor=1 / 3, total_iters=4, end_factor=0),
    ],
    "ExponentialLR": [lambda o: schedulers.ExponentialLR(o, gamma=0.8)],
    "SequentialLR": [sequential],
    "CosineAnnealingLR": [lambda o: schedulers.CosineAnnealingLR(o, T_max=12, eta_min=0.004)],
    "ChainedScheduler": [chained],
    "ReduceLROnPlateau": [lambda o: schedulers.ReduceLROnPlateau(o, patience=1, min_lr=0.002, threshold=0.5)],
    "CyclicLR": [cyclic, lambda o: cyclic(o, mode="exp_range", gamma=0.9)],
    "CosineAnnealingWarmRestarts": [lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2, eta_min=1e-3)],
    "OneCycleLR": [
        lambda o: schedulers.OneCycleLR(o, max_lr=0.02, total_steps=STEPS + 1, cycle_momentum="betas" in o.defaults),
        lambda o: schedulers.OneCycleLR(
            o, max_lr=0.02, total_steps=STEPS + 1, three_phase=True, anneal_strategy="linear", cycle_momentum=False
        ),
        # After its last step it writes a negative rate: one more step along the line.
        lambda o: schedulers.OneCycleLR(
            o, max_lr=0.02, total_steps=STEPS, anneal_strategy="linear", cycle_momentum=False
        ),
    ],
    "PolynomialLR": [lambda o: schedulers.PolynomialLR(o, total_iters=15, power=1.5)],
    "SWALR": [lambda o: SWALR(o, swa_lr=0.003, anneal_epochs=5)],
    # Only what every scheduler shares.
    "LRScheduler": [],
    # Two at once on one optimizer, as torch's own tests have them.
    "two together": [
        lambda o: [schedulers.ExponentialLR(o, 0.9), schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.5)]
    ],
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9, "weight_decay": 0.1}],
    "Adam": [{"weight_decay": 0.1}],
    "AdamW": [{"amsgrad": True}],
}
CASES = [(which, make) for which, makes in TABLE.items() for make in makes]


def test_the_table_has_every_scheduler_of_torch() -> None:
    modules = (schedulers, torch.optim.swa_utils)
    classes = [value for module in modules for value in vars(module).values() if inspect.isclass(value)]
    found = {c.__name__ for c in classes if issubclass(c, schedulers.LRScheduler) and not c.__name__.startswith("_")}
    assert found == set(TABLE) - {"two together"}


def advance(scheduler: Any, step: int) -> None:
    for part in scheduler if isinstance(scheduler, list) else [scheduler]:
        if isinstance(part, schedulers.ReduceLROnPlateau):
            part.step(1.0 / (1 + step // 6))
        else:
            part.step()


@pytest.mark.parametrize(("which", "make"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_trajectory_under_a_scheduler_is_the_references(name: str, which: str, make: Make) -> None:
    for options in OPTIONS[name]:
        model, twin, x, y = twins()
        optimizer = ours(name)(model.parameters(), lr=0.01, **options)
        plain = reference(name, twin, lr=0.01, **options)
        pair = make(optimizer), make(plain.settings)
        family = "sgd" if name == "SGD" else "adam"
        multipliers = plan_of(model).multipliers(family)  # type: ignore[arg-type]
        seen = set()
        for step in range(STEPS + 1):
            settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
            assert settings == {k: v for k, v in plain.settings.param_groups[0].items() if k != "params"}
            assert optimizer.effective_lrs() == {key: settings["lr"] * m for key, m in multipliers.items()}
            seen.add((settings["lr"], settings.get("momentum"), settings.get("betas")))
            if step == STEPS:  # what the scheduler wrote after the last step
                break
            run(model, optimizer, x, y, 1)
            run(twin, plain, x, y, 1)
            for scheduler in pair:
                advance(scheduler, step)
        assert len(seen) > 1, "the scheduler did nothing"
        assert_equal_parameters(model, twin)


def test_the_table_has_rates_below_zero() -> None:
    """Else torch mended its schedulers, and nothing above tests that such a rate is stepped with."""
    lowest: dict[str, float] = {}
    for which, makes in TABLE.items():
        for make in makes:
            optimizer = theirs("SGD")([torch.zeros(1, requires_grad=True)], lr=0.01)
            scheduler = make(optimizer)
            for step in range(STEPS):
                optimizer.step()
                advance(scheduler, step)
                lr = optimizer.param_groups[0]["lr"]
                lowest[which] = min(lowest.get(which, 0.0), lr)
    assert -1e-17 < lowest["LinearLR"] < 0
    assert lowest["OneCycleLR"] < -1e-4


@pytest.mark.parametrize(("which", "make"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_rate_is_scheduled_in_place_and_scaled_out_of_place(name: str, which: str, make: Make) -> None:
    model, twin, x, y = twins()
    lr, copy_of_lr = (torch.tensor(0.01, dtype=torch.float64) for _ in range(2))
    optimizer = ours(name)(model.parameters(), lr=lr)
    plain = reference(name, twin, lr=copy_of_lr)
    pair = make(optimizer), make(plain.settings)
    for step in range(6):
        run(model, optimizer, x, y, 1)
        run(twin, plain, x, y, 1)
        for scheduler in pair:
            advance(scheduler, step)
        assert optimizer.param_groups[0]["lr"] is lr
        assert torch.equal(lr, plain.settings.param_groups[0]["lr"])
    assert_equal_parameters(model, twin)


@pytest.mark.parametrize("name", NAMES)
def test_scheduler_and_optimizer_resume_together(name: str) -> None:
    model, twin, x, y = twins()
    optimizer, resumed = (ours(name)(net.parameters(), lr=0.01) for net in (model, twin))
    pair = [
        schedulers.OneCycleLR(o, 0.02, total_steps=30, cycle_momentum="betas" in o.defaults)
        for o in (optimizer, resumed)
    ]
    for _ in range(7):
        run(model, optimizer, x, y, 1)
        pair[0].step()
    twin.load_state_dict(model.state_dict())
    # load_state_dict keeps the very tensors it is given, in torch too.
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pair[1].load_state_dict(pair[0].state_dict())
    for _ in range(7):
        for net, opt, scheduler in zip((model, twin), (optimizer, resumed), pair, strict=True):
            run(net, opt, x, y, 1)
            scheduler.step()
    assert optimizer.effective_lrs() == resumed.effective_lrs()
    assert_equal_parameters(model, twin, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_stepping_the_scheduler_first_warns_as_with_torch(name: str) -> None:
    model, _, _, _ = twins()
    scheduler = schedulers.StepLR(ours(name)(model.parameters()), 3)
    with pytest.warns(UserWarning, match=r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
