"""One online run: wrap a fresh network, take one pass over a stream with the drop-in optimizer, and record it.

Each batch is scored before the step that trains on it, so the online accuracy is an honest test accuracy. The loop
never reads a number back from the device inside a step: losses and hits are kept there and looked at now and then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammaopt._errors import UsageError, at_least, one_of, positive
from gammaopt._laws import Loss, OptimizerFamily
from gammaopt._plan import Parametrization, Plan
from gammaopt._wrap import wrap
from gammaopt.online.record import Curve, RunRecord, log_spaced, six_digits
from gammaopt.online.streams import Batches, Stream
from gammaopt.optim import SGD, Adam, AdamW

OptimizerName = Literal["sgd", "adam", "adamw"]
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
FAMILIES: dict[str, OptimizerFamily] = {"sgd": "sgd", "adam": "adam", "adamw": "adam"}

LOOK_EVERY = 50  # steps between two looks at the losses on the device
DIVERGED_RATIO = 1e3  # a loss this many times the loss of f = 0 has diverged
HELD_OUT_SAMPLES = 2048


@dataclass(frozen=True)
class Recipe:
    """How runs of one study are trained; γ, rate and seed are all that may differ between them.

    Args:
        build: makes a fresh network h; called after seeding torch's global generator.
        stream: where the batches come from.
        loss: ``"mse"`` (mean over samples and outputs, one-hot targets for classes) or ``"cross_entropy"``.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        steps: batches in the one pass.
        batch_size: samples in a batch.
        parametrization: ``"mean_field"``, or ``"as_is"`` for the initialisation that ``build`` gives.
        depth: effective depth of the network; the measured one if ``None``.
        knee: where the law bends; see :func:`gammaopt.wrap`.
        base: makes the network that rates were tuned on, for ``"as_is"``; called on the meta device, so it costs no
            memory and draws nothing. See :func:`gammaopt.wrap`.
        device: where to train.
        dtype: floating-point type of network and inputs.
    """

    build: Callable[[], nn.Module]
    stream: Stream
    loss: Loss = "cross_entropy"
    optimizer: OptimizerName = "sgd"
    steps: int = 1000
    batch_size: int = 32
    parametrization: Parametrization = "mean_field"
    depth: float | None = None
    knee: float | None = None
    base: Callable[[], nn.Module] | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        one_of("loss", self.loss, get_args(Loss))
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        at_least("steps", self.steps, 1)
        at_least("batch_size", self.batch_size, 1)
        if self.depth is not None:
            positive("depth", self.depth)


def train(recipe: Recipe, *, gamma: float, lr: float, seed: int, batches: Batches | None = None) -> RunRecord:
    """Train one network for one pass and return its record. A diverged run is a record too.

    The seed fixes the initialisation, the batches and their order, so runs that differ in γ or rate only are paired.

    Args:
        recipe: network, stream, loss, optimizer, budget.
        gamma: feature-learning strength, > 0.
        lr: the optimizer's ``lr``: the rate at γ = 1, before the law's factor s(γ).
        seed: any integer.
        batches: this seed's batches, if they have been made already; same numbers as without.

    Raises:
        UsageError: for a bad ``gamma`` or ``lr``, or ``batches`` of another seed or budget.

    Example:
        >>> from gammaopt.online import MLP, Staircase
        >>> recipe = Recipe(lambda: MLP(32, 1, width=16), Staircase(), loss="mse", steps=20)
        >>> record = train(recipe, gamma=10.0, lr=0.1, seed=0)
        >>> record.diverged_at is None, round(record.effective_lr, 4)
        (True, 0.4642)
    """
    positive("gamma", gamma), positive("lr", lr)
    if batches is None:
        batches = Batches(recipe.stream, seed, recipe.steps, recipe.batch_size, recipe.device)
    if (batches.seed, batches.size) != (seed, recipe.batch_size) or batches.steps < recipe.steps:
        raise UsageError(
            f"batches of seed {batches.seed}, size {batches.size}, {batches.steps} steps can't serve "
            f"seed {seed}, size {recipe.batch_size}, {recipe.steps} steps; record them anew"
        )
    with _seeded(recipe.device, seed):
        model, log = _run(recipe, gamma, lr, batches)
    plan = cast("Plan", model.gammaopt)
    effective_lr = lr * plan.law(FAMILIES[recipe.optimizer]).factor(gamma)
    return log.record(model, gamma=gamma, lr=lr, effective_lr=effective_lr, seed=seed)


def _run(recipe: Recipe, gamma: float, lr: float, batches: Batches) -> tuple[nn.Module, _Log]:
    model = _fresh_model(recipe, gamma, batches[0][0])
    optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), lr=lr)  # type: ignore[call-arg]
    criterion = CRITERIA[recipe.loss]
    log = _Log(recipe)
    for step in range(recipe.steps):
        inputs, targets = batches[step]
        output = model(inputs.to(recipe.dtype))
        loss = criterion(output, targets)
        log.add(loss, output, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % LOOK_EVERY == 0 and log.diverged_at() is not None:
            break
    return model, log


@contextmanager
def _seeded(device: str, seed: int) -> Iterator[None]:
    """torch's global generators, seeded for a run (initialisation, dropout) and given back as they were."""
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng([torch.device(device).index or 0] if cuda else []):
        torch.manual_seed(seed)
        yield


def mean_squared_error(output: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples and outputs; class targets become one-hot vectors."""
    if targets.is_floating_point():
        return F.mse_loss(output, targets.to(output.dtype).view_as(output))
    return F.mse_loss(output, F.one_hot(targets, output.shape[-1]).to(output.dtype))


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mean_squared_error,
    "cross_entropy": F.cross_entropy,
}


def _hits(output: Tensor, targets: Tensor) -> Tensor:
    """Which samples were answered right. f = 0 ties all classes and argmax takes the first: chance."""
    if targets.is_floating_point():
        return torch.zeros(len(targets), dtype=torch.bool, device=output.device)
    return output.argmax(-1) == targets


def _fresh_model(recipe: Recipe, gamma: float, example: Tensor) -> nn.Module:
    with torch.device("meta"):
        base = None if recipe.base is None else recipe.base()
    model = wrap(
        recipe.build().to(recipe.dtype),
        gamma,
        depth=recipe.depth,
        example_inputs=example.to("cpu", recipe.dtype),
        parametrization=recipe.parametrization,
        knee=recipe.knee,
        loss=recipe.loss,
        base=base,
    )
    return model.to(recipe.device)


class _Log:
    """Losses and answers of a run, step by step, left on the device until somebody looks."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._losses: list[Tensor] = []
        self._hits: list[Tensor] = []

    def add(self, loss: Tensor, output: Tensor, targets: Tensor) -> None:
        """Keep a step's loss, and which of its samples were answered right."""
        self._losses.append(loss.detach())
        self._hits.append(_hits(output, targets))

    def diverged_at(self) -> int | None:
        """First step, from 1, whose loss is not finite or beyond the limit. The first loss is that of f = 0."""
        losses = torch.stack(self._losses).cpu()
        bad = ~torch.isfinite(losses) | (losses > DIVERGED_RATIO * losses[0])
        return int(bad.nonzero()[0]) + 1 if bad.any() else None

    def record(self, model: nn.Module, *, gamma: float, lr: float, effective_lr: float, seed: int) -> RunRecord:
        recipe, diverged_at = self.recipe, self.diverged_at()
        good = recipe.steps if diverged_at is None else diverged_at - 1
        losses = torch.stack(self._losses).double().cpu()[:good]
        hits = torch.stack(self._hits).double().mean(-1).cpu()[:good]
        accuracy, loss = (0.0, None) if diverged_at is not None else _held_out(recipe, model, seed)
        if loss is None:  # the last step blew the weights up: the batch after it would have shown it
            accuracy, diverged_at = 0.0, diverged_at or recipe.steps + 1
        ends = [step for step in log_spaced(recipe.steps) if step <= good]
        spans = list(pairwise([0, *ends]))
        return RunRecord(
            gamma=gamma,
            lr=lr,
            seed=seed,
            steps=recipe.steps,
            effective_lr=effective_lr,
            prequential_accuracy=float(hits.sum()) / recipe.steps,
            prequential_loss=float(losses.mean()) if good else None,
            final_accuracy=accuracy,
            final_loss=loss,
            diverged_at=diverged_at,
            curve=Curve(
                steps=tuple(ends),
                loss=tuple(six_digits(float(losses[a:b].mean())) for a, b in spans),
                accuracy=tuple(six_digits(float(hits[a:b].mean())) for a, b in spans),
            ),
        )


@torch.no_grad()
def _held_out(recipe: Recipe, model: nn.Module, seed: int) -> tuple[float, float | None]:
    """Accuracy and loss on held-out samples: the same for every run of a seed."""
    inputs, targets = recipe.stream.batches(seed, 0, 1, HELD_OUT_SAMPLES, "held_out")
    inputs, targets = inputs[0].to(recipe.device, recipe.dtype), targets[0].to(recipe.device)
    model.eval()
    output = model(inputs)
    loss = float(CRITERIA[recipe.loss](output, targets))
    return float(_hits(output, targets).double().mean()), loss if math.isfinite(loss) else None
