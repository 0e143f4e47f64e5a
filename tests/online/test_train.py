"""One online run, held against a plain reference loop in float64; and what it records when it goes well or diverges."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammaopt import Plan, UsageError
from gammaopt._laws import Loss
from gammaopt.online import MLP, TASKS, Digits, Recipe, RunRecord, Staircase, Stream, get_task, train
from gammaopt.online.streams import Batches

WIDTH = 16
DIGITS = Digits()
STAIRCASE = Staircase(10, 3)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are far too small for two
    yield
    torch.set_num_threads(threads)


@dataclass
class Watched:
    """Builds networks, and keeps what the last one answered when it was called as f."""

    make: Callable[[], nn.Module]
    net: nn.Module | None = None
    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def __call__(self) -> nn.Module:
        net = self.net = self.make()
        self.outputs.clear()
        self.inputs.clear()

        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # θ₀'s copy carries this hook too, and the plain net is probed before it is wrapped.
            if module is net and hasattr(module, "gammaopt"):
                self.inputs.append(args[0].detach().clone())
                self.outputs.append(output.detach().clone())

        net.register_forward_hook(note)
        return net

    def state(self, prefix: str = "") -> dict[str, Tensor]:
        assert self.net is not None
        theta0 = "gammaopt_theta0."
        state = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        if prefix:
            return {name.removeprefix(theta0): t for name, t in state.items() if name.startswith(theta0)}
        return {name: t for name, t in state.items() if not name.startswith(theta0)}


def mlp(stream: Stream, *, bias: bool = False, depth: int = 3) -> Callable[[], nn.Module]:
    return lambda: MLP(math.prod(stream.shape), stream.classes or 1, width=WIDTH, depth=depth, bias=bias)


def recipe_for(stream: Stream, loss: Loss, *, steps: int = 60, bias: bool = False, depth: int = 3) -> Recipe:
    build = Watched(mlp(stream, bias=bias, depth=depth))
    return Recipe(build, stream, loss=loss, steps=steps, batch_size=8, depth=float(depth), dtype=torch.float64)


def watched(recipe: Recipe) -> Watched:
    assert isinstance(recipe.build, Watched)
    return recipe.build


@dataclass
class Reference:
    """What the plain loop saw."""

    outputs: list[Tensor]
    losses: list[float]
    accuracies: list[float]
    final_loss: float
    final_accuracy: float
    weights: dict[str, Tensor]


def law(loss: Loss, gamma: float, depth: int) -> float:
    """η*(γ)/η*(1), written out."""
    if gamma >= 1:
        return float(gamma ** (2 / depth))
    return gamma**2 if loss == "mse" else gamma


def plain_loop(recipe: Recipe, start: dict[str, Tensor], gamma: float, lr: float, seed: int, depth: int) -> Reference:
    """Frozen copy, explicit (h − h₀)/γ, torch's own SGD with one group for each tensor; score, then step."""
    assert isinstance(recipe.build, Watched)
    net = recipe.build.make().double()
    net.load_state_dict(start)
    frozen = copy.deepcopy(net)
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    width = layers[-1].in_features
    groups = []
    for layer in layers:
        last = layer is layers[-1]
        a = 1 / layer.in_features if last else layer.in_features**-0.5
        groups.append({"params": [layer.weight], "lr": lr * law(recipe.loss, gamma, depth) * width * a**2})
        if layer.bias is not None:
            factor = 1 if last else width
            groups.append({"params": [layer.bias], "lr": lr * law(recipe.loss, gamma, depth) * factor})
    optimizer = torch.optim.SGD(groups, lr=0.0)

    def f(x: Tensor) -> Tensor:
        return torch.as_tensor((net(x) - frozen(x).detach()) / gamma)

    def criterion(output: Tensor, y: Tensor) -> Tensor:
        if recipe.loss == "cross_entropy":
            return -F.log_softmax(output, 1)[torch.arange(len(y)), y].mean()
        target = torch.eye(10, dtype=torch.float64)[y] if recipe.stream.classes else y.double()[:, None]
        return ((output - target) ** 2).mean()

    def hits(output: Tensor, y: Tensor) -> float:
        return float((output.argmax(1) == y).double().mean()) if recipe.stream.classes else 0.0

    seen = Reference([], [], [], 0.0, 0.0, {})
    for step in range(recipe.steps):
        inputs, targets = recipe.stream.batches(seed, step, step + 1, recipe.batch_size)
        output = f(inputs[0].double())
        loss = criterion(output, targets[0])
        seen.outputs.append(output.detach())
        seen.losses.append(float(loss.detach()))
        seen.accuracies.append(hits(output.detach(), targets[0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        inputs, targets = recipe.stream.batches(seed, 0, 1, 2048, "held_out")
        output = f(inputs[0].double())
    seen.outputs.append(output)
    seen.final_loss, seen.final_accuracy = float(criterion(output, targets[0])), hits(output, targets[0])
    seen.weights = {name: tensor.detach() for name, tensor in net.named_parameters()}
    return seen


@pytest.mark.parametrize("gamma", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    ("stream", "loss", "lr", "bias", "depth"),
    [
        (DIGITS, "cross_entropy", 2.0, False, 3),
        (DIGITS, "cross_entropy", 1.0, True, 2),
        (DIGITS, "mse", 10.0, False, 3),
        (DIGITS, "mse", 5.0, True, 4),
        (STAIRCASE, "mse", 0.3, True, 3),
    ],
    ids=["digits-ce", "digits-ce-bias-L2", "digits-mse", "digits-mse-bias-L4", "staircase-mse-bias"],
)
def test_a_run_follows_the_plain_loop_step_by_step_in_float64(
    stream: Stream, loss: Loss, lr: float, bias: bool, depth: int, gamma: float
) -> None:
    recipe = recipe_for(stream, loss, bias=bias, depth=depth)
    record = train(recipe, gamma=gamma, lr=lr, seed=5)
    run = watched(recipe)
    expected = plain_loop(recipe, run.state("theta0"), gamma, lr, 5, depth)

    assert record.diverged_at is None
    assert len(run.outputs) == recipe.steps + 1
    assert not run.outputs[0].any(), "f must be exactly 0 before the first step"
    for step, (mine, theirs) in enumerate(zip(run.outputs, expected.outputs, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=f"f differs at step {step}")
    for name, weight in expected.weights.items():
        torch.testing.assert_close(run.state()[name], weight, rtol=1e-9, atol=1e-10)
    assert float(run.outputs[-1].abs().max()) > 0.01, "the run must have moved for this to compare anything"

    assert record.effective_lr == pytest.approx(lr * law(loss, gamma, depth), rel=1e-12)
    assert record.prequential_loss == pytest.approx(math.fsum(expected.losses) / 60, rel=1e-9)
    assert record.prequential_accuracy == pytest.approx(math.fsum(expected.accuracies) / 60, abs=1e-12)
    assert record.final_loss == pytest.approx(expected.final_loss, rel=1e-9)
    assert record.final_accuracy == pytest.approx(expected.final_accuracy, abs=1e-12)
    for (before, end), mean_loss, accuracy in zip(
        pairwise([0, *record.curve.steps]), record.curve.loss, record.curve.accuracy, strict=True
    ):
        assert mean_loss == pytest.approx(np.mean(expected.losses[before:end]), rel=1e-5)
        assert accuracy == pytest.approx(np.mean(expected.accuracies[before:end]), abs=1e-5)


def small(loss: Loss = "cross_entropy", steps: int = 30, stream: Stream = DIGITS) -> Recipe:
    return Recipe(Watched(mlp(stream)), stream, loss=loss, steps=steps, batch_size=8, depth=3.0)


def test_the_same_run_twice_gives_the_same_record_bit_for_bit() -> None:
    first = train(small(), gamma=0.3, lr=2.0, seed=1)
    torch.manual_seed(99)
    torch.randn(5)
    assert train(small(), gamma=0.3, lr=2.0, seed=1) == first
    assert train(small(), gamma=0.3, lr=2.0, seed=2) != first


def test_runs_of_a_seed_are_paired_whatever_their_gamma_and_rate() -> None:
    recipe = small()
    run = watched(recipe)
    seen = []
    for gamma, lr in [(0.1, 1.0), (10.0, 3.0)]:
        train(recipe, gamma=gamma, lr=lr, seed=3)
        seen.append((run.state("theta0"), list(run.inputs)))
    (start, inputs), (other_start, other_inputs) = seen
    assert start.keys() == other_start.keys() != set()
    assert all(torch.equal(start[name], other_start[name]) for name in start)
    assert len(inputs) == len(other_inputs) == recipe.steps + 1
    assert all(torch.equal(a, b) for a, b in zip(inputs, other_inputs, strict=True))
    train(recipe, gamma=0.1, lr=1.0, seed=4)
    assert not torch.equal(run.state("theta0")["1.weight"], start["1.weight"])
    assert not torch.equal(run.inputs[0], inputs[0])


def test_the_training_batches_are_the_streams_in_order_and_the_last_call_is_held_out() -> None:
    recipe = small(steps=5)
    train(recipe, gamma=1.0, lr=1.0, seed=8)
    *steps, final = watched(recipe).inputs
    assert torch.equal(torch.stack(steps), DIGITS.batches(8, 0, 5, 8)[0])
    assert torch.equal(final, DIGITS.batches(8, 0, 1, 2048, "held_out")[0][0])


def test_global_random_states_are_left_alone() -> None:
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    train(small(steps=10), gamma=1.0, lr=1.0, seed=0)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))


def test_a_network_with_dropout_is_fixed_by_the_seed_too() -> None:
    recipe = Recipe(with_dropout, DIGITS, steps=10, batch_size=8, depth=2.0)
    torch.manual_seed(0)
    first = train(recipe, gamma=1.0, lr=1.0, seed=0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert train(recipe, gamma=1.0, lr=1.0, seed=0) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_ready_made_batches_change_nothing() -> None:
    recipe = small()
    alone = train(recipe, gamma=0.3, lr=2.0, seed=1)
    for keep_bytes in (0, 2**20):
        # Longer than the run: a pass that serves several budgets.
        batches = Batches(recipe.stream, 1, recipe.steps + 5, recipe.batch_size, keep_bytes=keep_bytes)
        assert train(recipe, gamma=0.3, lr=2.0, seed=1, batches=batches) == alone


def test_a_base_network_scales_readout_and_rates_and_leaves_the_draws_alone() -> None:
    plain = replace(small(), parametrization="as_is", knee=1.0)
    wide = replace(plain, base=lambda: MLP(144, 10, width=WIDTH // 4, depth=3))
    starts, nets = [], []
    for recipe in (plain, wide):
        train(recipe, gamma=1.0, lr=1.0, seed=3)
        starts.append(watched(recipe).state("theta0"))
        nets.append(watched(recipe).net)
    first, second = starts
    assert torch.equal(first["1.weight"], second["1.weight"])
    assert torch.equal(first["3.weight"], second["3.weight"])
    torch.testing.assert_close(second["5.weight"], first["5.weight"] / 2)  # √(base width / width)
    assert nets[1] is not None
    assert isinstance(nets[1].gammaopt, Plan)
    assert nets[1].gammaopt.multipliers("sgd") == pytest.approx({"1.weight": 4.0, "3.weight": 1.0, "5.weight": 0.25})


def test_a_base_network_of_the_same_width_changes_nothing_and_stands_on_the_meta_device() -> None:
    devices: list[str] = []

    def base() -> nn.Module:
        net = mlp(DIGITS)()
        devices.extend(parameter.device.type for parameter in net.parameters())
        return net

    plain = replace(small(), parametrization="as_is")
    assert train(replace(plain, base=base), gamma=2.0, lr=1.0, seed=3) == train(plain, gamma=2.0, lr=1.0, seed=3)
    assert devices == ["meta"] * 3


@pytest.mark.parametrize(("seed", "steps", "size"), [(2, 30, 8), (1, 29, 8), (1, 30, 9)])
def test_batches_of_another_seed_budget_or_size_are_refused(seed: int, steps: int, size: int) -> None:
    batches = Batches(DIGITS, seed, steps, size)
    with pytest.raises(UsageError, match=rf"seed {seed}, size {size}, {steps} steps .* record them anew"):
        train(small(), gamma=1.0, lr=1.0, seed=1, batches=batches)


@pytest.mark.parametrize(("loss", "lr"), [("mse", 1e7), ("cross_entropy", 1e9)])
@pytest.mark.parametrize("gamma", [0.1, 1.0, 100.0])
def test_a_diverged_run_is_a_record_with_finite_scores(loss: Loss, lr: float, gamma: float) -> None:
    record = train(small(loss, steps=120), gamma=gamma, lr=lr, seed=0)
    assert record.diverged_at is not None
    assert 2 <= record.diverged_at <= 120
    assert 0 <= record.prequential_accuracy <= (record.diverged_at - 1) / 120
    assert record.prequential_loss is not None
    assert math.isfinite(record.prequential_loss)
    assert (record.final_accuracy, record.final_loss) == (0.0, None)
    assert all(step < record.diverged_at for step in record.curve.steps)
    line = record.to_json()
    assert json.loads(line, parse_constant=pytest.fail) == json.loads(line)
    assert RunRecord.from_dict(json.loads(line)) == record


def test_divergence_is_dated_by_the_first_bad_loss_even_between_two_looks() -> None:
    recipe = replace(recipe_for(DIGITS, "mse", steps=120), dtype=torch.float32)
    for lr in (300.0, 1e3, 1e7):
        record = train(recipe, gamma=1.0, lr=lr, seed=0)
        outputs = watched(recipe).outputs
        targets = DIGITS.batches(0, 0, len(outputs), 8)[1]
        losses = [
            float(F.mse_loss(output, F.one_hot(target, 10).float()))
            for output, target in zip(outputs, targets, strict=True)
        ]
        bad = [step for step, loss in enumerate(losses, 1) if not loss <= 1e3 * losses[0]]
        assert bad
        assert record.diverged_at == bad[0]


def test_accuracy_before_divergence_counts_and_the_rest_of_the_run_scores_zero() -> None:
    # f = 0 answers class 0 at step 1: the only hits of a run that is lost at step 2.
    record = train(small("mse", steps=40), gamma=1.0, lr=1e30, seed=0)
    assert record.diverged_at == 2
    first = DIGITS.batches(0, 0, 1, 8)[1]
    assert record.prequential_accuracy == pytest.approx(float((first == 0).double().mean()) / 40, abs=1e-12)
    assert record.curve.steps == (1,)
    assert record.prequential_loss == pytest.approx(0.1, rel=1e-6)  # a tenth of the one-hot entries is 1


@pytest.mark.parametrize("steps", [1, 7, 40, 41, 300])
def test_the_curve_is_log_spaced_and_its_weighted_mean_is_the_prequential_loss(steps: int) -> None:
    record = train(small(steps=steps), gamma=1.0, lr=1.0, seed=0)
    ends = record.curve.steps
    assert len(ends) <= 40
    assert (ends[0], ends[-1]) == (1, steps)
    assert all(a < b for a, b in pairwise(ends))
    if steps > 100:  # later points lie one ratio apart, up to the rounding to whole steps
        ratio = steps ** (1 / 39)
        assert all(b / a == pytest.approx(ratio, abs=1.01 / a + 1e-9) for a, b in pairwise(ends) if a > 20)
    weights = [b - a for a, b in pairwise([0, *ends])]
    assert sum(w * x for w, x in zip(weights, record.curve.loss, strict=True)) / steps == pytest.approx(
        record.prequential_loss, rel=1e-5
    )
    assert sum(w * x for w, x in zip(weights, record.curve.accuracy, strict=True)) / steps == pytest.approx(
        record.prequential_accuracy, abs=1e-5
    )


def test_a_regression_run_has_losses_and_no_accuracy() -> None:
    record = train(small("mse", stream=STAIRCASE), gamma=1.0, lr=0.1, seed=0)
    assert record.prequential_accuracy == record.final_accuracy == 0.0
    assert record.final_loss is not None
    assert record.curve.loss[0] == pytest.approx(float(STAIRCASE.batches(0, 0, 1, 8)[1].square().mean()), rel=1e-5)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, "fast"])
@pytest.mark.parametrize("name", ["gamma", "lr"])
def test_a_bad_gamma_or_rate_names_the_value_and_the_fix(name: str, bad: Any) -> None:
    values: dict[str, Any] = {"gamma": 1.0, "lr": 1.0, name: bad}
    with pytest.raises(UsageError) as caught:
        train(small(), gamma=values["gamma"], lr=values["lr"], seed=0)
    shown = repr(bad) if isinstance(bad, str) else f"{bad:g}"
    assert f"{name}={shown}" in str(caught.value)
    assert f"give a finite {name} > 0" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "unknown loss 'hinge'; choose one of: mse, cross_entropy"),
        ({"optimizer": "adamz"}, "unknown optimizer 'adamz'; choose one of: sgd, adam, adamw"),
        ({"steps": 0}, "steps=0 is too small; give at least 1"),
        ({"batch_size": 0}, "batch_size=0 is too small; give at least 1"),
        ({"steps": 2.5}, "steps=2.5 is not a whole number"),
        ({"depth": -3.0}, "depth=-3 is not allowed; give a finite depth > 0"),
    ],
)
def test_a_bad_recipe_names_the_value_and_the_fix(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(small(), **change)  # type: ignore[arg-type]


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown task 'cifar'; choose one of: digits"):
        get_task("cifar")


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_bundled_task_is_complete(task: object) -> None:
    task = get_task(getattr(task, "name"))  # noqa: B009 - mypy sees an object here
    if task.name.startswith("photos"):
        pytest.importorskip("skimage")
    stream, net = task.stream(), task.build()
    inputs, _ = stream.batches(0, 0, 1, 4)
    assert net(inputs[0]).shape == (4, stream.classes)
    assert set(task.base_lr) == {(family, loss) for family in ("sgd", "adam") for loss in task.losses}
    assert all(lr > 0 for lr in task.base_lr.values())
    from gammaopt import effective_depth, wrap

    depths = []
    for seed in range(4):
        torch.manual_seed(seed)
        net = wrap(task.build(), 1.0, depth=1.0, parametrization="mean_field")
        depths.append(effective_depth(net, stream.batches(seed, 0, 1, 128)[0][0]))
    assert sum(depths) / 4 == pytest.approx(task.depth, abs=0.1)
    width, depth = task.size()
    assert task.effective_depth(width, depth) == task.depth
    assert task.size(width=8) == (8, depth)
    if not task.homogeneous:  # measured anew: more blocks are not more depth
        assert task.effective_depth(width, depth + 1) == pytest.approx(task.depth, abs=0.6)
    else:
        assert task.effective_depth(width, depth + 1) == depth + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"build": MLP(144, 10, width=8)}, r"build is one MLP, and every run needs a fresh one; .*lambda: MLP\(…\)"),
        ({"base": MLP(144, 10, width=8)}, r"base is one MLP, and every run needs a fresh one"),
        ({"build": 5}, r"build=5 can't be called"),
        ({"stream": Digits}, r"stream is the class Digits; give an instance of it: Digits\(…\)"),
        ({"stream": "digits"}, r"stream='digits' is no stream; give one, e\.g\. build_stream"),
        ({"device": "gpu"}, r"unknown device 'gpu'; choose cpu, or cuda"),
    ],
)
def test_parts_of_a_recipe_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**{"build": partial(MLP, 144, 10, width=8), "stream": Digits(), **changes})


def test_a_build_that_makes_no_network_or_one_with_other_outputs() -> None:
    recipe = Recipe(lambda: torch.ones(3), Digits(), steps=2, batch_size=8, depth=3.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(UsageError, match=r"build made a Tensor, not a torch\.nn\.Module"):
        train(recipe, gamma=1.0, lr=0.1, seed=0)
    for loss in ("cross_entropy", "mse"):
        recipe = Recipe(partial(MLP, 144, 4, width=8), Digits(), loss, steps=2, batch_size=8, depth=3.0)
        with pytest.raises(UsageError, match=r"shape \(8, 4\), and the stream's targets are 10 classes"):
            train(recipe, gamma=1.0, lr=0.1, seed=0)
