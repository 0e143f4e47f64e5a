"""One online run: wrap a fresh network, take one pass over a stream with the drop-in optimizer, and record it.

Each batch is scored before the step that trains on it, so the online accuracy is an honest test accuracy. The loop
never reads a number back from the device inside a step: losses and hits are kept there and looked at now and then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gammaopt._errors import UsageError, at_least, one_of, positive, whole
from gammaopt._laws import FLOAT64_BELOW_GAMMA, EtaLaw, Loss, OptimizerFamily
from gammaopt._plan import Parametrization, Plan
from gammaopt._wrap import Center, wrap
from gammaopt.online._device import check_device, on_device, seeded
from gammaopt.online._losses import check_output, hits, mean_loss
from gammaopt.online.record import Curve, RunRecord, log_spaced, six_digits
from gammaopt.online.streams import Batches, Stream
from gammaopt.optim import SGD, Adam, AdamW

OptimizerName = Literal["sgd", "adam", "adamw"]
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
FAMILIES: dict[str, OptimizerFamily] = {"sgd": "sgd", "adam": "adam", "adamw": "adam"}

LOOK_EVERY = 50  # steps between two looks at the losses on the device
DIVERGED_RATIO = 1e3  # a loss this many times the loss of f = 0 has diverged
HELD_OUT_SAMPLES = 2048
HELD_OUT_SLICE = 256  # of them passed through a stack, or a network with batch statistics, at a time


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
        dtype: floating-point type of network and inputs; float64 in float32's place for runs below γ = 0.01.
        momentum: of SGD, 0 ≤ momentum < 1.
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
    momentum: float = 0.0

    def __post_init__(self) -> None:
        self._check_parts()
        one_of("loss", self.loss, get_args(Loss))
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("steps", "batch_size"):  # as int: a record of them is JSON
            object.__setattr__(self, name, at_least(name, getattr(self, name), 1))
        if self.depth is not None:
            positive("depth", self.depth)
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum={self.momentum:g} must be ≥ 0 and < 1")
        if self.momentum and self.optimizer != "sgd":
            raise UsageError(f"momentum={self.momentum:g} goes with optimizer='sgd', not with {self.optimizer!r}")
        check_device(self.device)

    def at(self, gamma: float) -> Recipe:
        """The recipe in the precision that a run at γ needs: float64 in float32's place below γ = 0.01."""
        exact = self.dtype == torch.float32 and gamma < FLOAT64_BELOW_GAMMA
        return replace(self, dtype=torch.float64) if exact else self

    def _check_parts(self) -> None:
        """What makes networks and what makes batches, and not one given for the other."""
        for name, make in {"build": self.build, "base": self.base}.items():
            if isinstance(make, nn.Module):
                kind = type(make).__name__
                raise UsageError(
                    f"{name} is one {kind}, and every run needs a fresh one; give what makes it: lambda: {kind}(…)"
                )
            if not callable(make) and not (name == "base" and make is None):
                raise UsageError(f"{name}={make!r} can't be called; give what makes a network: lambda: MLP(144, 10)")
        stream: object = self.stream
        if isinstance(stream, type):
            raise UsageError(f"stream is the class {stream.__name__}; give an instance of it: {stream.__name__}(…)")
        if not all(hasattr(stream, name) for name in ("name", "shape", "classes", "batches")):
            raise UsageError(f"stream={stream!r} is no stream; give one, e.g. build_stream('digits')")


class Run(NamedTuple):
    """What may differ between runs of one recipe: γ, the optimizer's ``lr`` (the rate at γ = 1), and the seed."""

    gamma: float
    lr: float
    seed: int


def train(recipe: Recipe, *, gamma: float, lr: float, seed: int, batches: Batches | None = None) -> RunRecord:
    """Train one network for one pass and return its record. A diverged run is a record too.

    The seed fixes the initialisation, the batches and their order, so runs that differ in γ or rate only are paired.
    Below γ = 0.01 a float32 recipe is trained in float64, as by :func:`train_many`.

    Args:
        recipe: network, stream, loss, optimizer, budget.
        gamma: feature-learning strength, > 0.
        lr: the optimizer's ``lr``: the rate at γ = 1, before the law's factor s(γ).
        seed: any integer.
        batches: this seed's batches, if they have been made already; same numbers as without.

    Raises:
        UsageError: for a bad ``gamma``, ``lr`` or ``seed``, or ``batches`` of another seed or budget.

    Example:
        >>> from gammaopt.online import MLP, Staircase
        >>> recipe = Recipe(lambda: MLP(32, 1, width=16), Staircase(), loss="mse", steps=20)
        >>> record = train(recipe, gamma=10.0, lr=0.1, seed=0)
        >>> record.diverged_at is None, round(record.effective_lr, 4)
        (True, 0.4642)
    """
    gamma, lr, seed = positive("gamma", gamma), positive("lr", lr), whole("seed", seed)
    recipe = recipe.at(gamma)
    if batches is None:
        batches = Batches(recipe.stream, seed, recipe.steps, recipe.batch_size, recipe.device)
    if (batches.seed, batches.size) != (seed, recipe.batch_size) or batches.steps < recipe.steps:
        raise UsageError(
            f"batches of seed {batches.seed}, size {batches.size}, {batches.steps} steps can't serve "
            f"seed {seed}, size {recipe.batch_size}, {recipe.steps} steps; record them anew"
        )
    with on_device(recipe.device):
        with seeded(recipe.device, seed):
            model, log = _run(recipe, gamma, lr, batches)
        score = held_out(recipe, seed, model) if log.diverged_at() is None else (0.0, math.nan)
    plan = cast("Plan", model.gammaopt)
    return summarise(
        Run(gamma, lr, seed), recipe.steps, plan.law(FAMILIES[recipe.optimizer]), log.losses(), log.hits(), score
    )


def _run(recipe: Recipe, gamma: float, lr: float, batches: Batches) -> tuple[nn.Module, _Log]:
    model = fresh_model(recipe, gamma, batches[0][0])
    settings: dict[str, Any] = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {}
    optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), lr=lr, **settings)  # type: ignore[call-arg]
    log = _Log()
    for step in range(recipe.steps):
        inputs, targets = batches[step]
        output = model(inputs.to(recipe.dtype))
        if step == 0:
            check_output(recipe.loss, recipe.stream.classes, output)
        loss = mean_loss(recipe.loss, output, targets)
        log.add(loss, output, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % LOOK_EVERY == 0 and log.diverged_at() is not None:
            break
    return model, log


def built(recipe: Recipe) -> nn.Module:
    """A network of the recipe. Raises :class:`UsageError` if ``build`` makes something else."""
    net: object = recipe.build()
    if not isinstance(net, nn.Module):
        raise UsageError(f"build made a {type(net).__name__}, not a torch.nn.Module; return the network from it")
    return net


def fresh_model(recipe: Recipe, gamma: float, example: Tensor, center: Center = "copy") -> nn.Module:
    """A network of the recipe, wrapped, on its device, drawn from torch's global generator."""
    with torch.device("meta"):
        base = None if recipe.base is None else recipe.base()
    model = wrap(
        built(recipe).to(recipe.dtype),
        gamma,
        depth=recipe.depth,
        example_inputs=example.to("cpu", recipe.dtype),
        parametrization=recipe.parametrization,
        center=center,
        knee=recipe.knee,
        loss=recipe.loss,
        base=base,
    )
    return model.to(recipe.device)


class _Log:
    """Losses and answers of a run, step by step, left on the device until somebody looks."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._hits: list[Tensor] = []

    def add(self, loss: Tensor, output: Tensor, targets: Tensor) -> None:
        """Keep a step's loss, and which of its samples were answered right."""
        self._losses.append(loss.detach())
        self._hits.append(hits(output, targets))

    def diverged_at(self) -> int | None:
        """See :func:`first_bad`."""
        return first_bad(torch.stack(self._losses).cpu())

    def losses(self) -> Tensor:
        """Loss of each step so far."""
        return torch.stack(self._losses).double().cpu()

    def hits(self) -> Tensor:
        """Share of right answers at each step so far."""
        return torch.stack(self._hits).double().mean(-1).cpu()


def first_bad(losses: Tensor) -> int | None:
    """First step, from 1, whose loss is not finite or beyond the limit. The first loss is that of f = 0."""
    bad = bad_losses(losses, losses[:1])
    return int(bad.nonzero()[0]) + 1 if bad.any() else None


def bad_losses(losses: Tensor, first: Tensor) -> Tensor:
    """Which losses are not finite, or beyond the limit that the first one sets."""
    return ~torch.isfinite(losses) | (losses > DIVERGED_RATIO * first)


def summarise(
    run: Run, steps: int, law: EtaLaw, losses: Tensor, shares: Tensor, score: tuple[float, float]
) -> RunRecord:
    """The record of a run of ``steps`` steps.

    Args:
        run: what was run.
        steps: the budget.
        law: gives the effective rate.
        losses, shares: loss, and share of right answers, of the steps there are (float64, on the CPU).
        score: held-out accuracy and loss at the end; of no meaning if the run diverged.
    """
    diverged_at = first_bad(losses[:steps])
    good = steps if diverged_at is None else diverged_at - 1
    accuracy, loss = score
    if diverged_at is None and not math.isfinite(loss):
        diverged_at = steps + 1  # the last step blew the weights up: the batch after it would have shown it
    ends = [step for step in log_spaced(steps) if step <= good]
    # NumPy's: one call for all means of a curve, and a tenth of torch's time for each number of a small array.
    losses_before, shares_before = losses.numpy()[:good], shares.numpy()[:good]
    return RunRecord(
        gamma=run.gamma,
        lr=run.lr,
        seed=run.seed,
        steps=steps,
        effective_lr=run.lr * law.factor(run.gamma),
        prequential_accuracy=float(shares_before.sum()) / steps,
        prequential_loss=float(losses_before.mean()) if good else None,
        final_accuracy=accuracy if diverged_at is None else 0.0,
        final_loss=loss if diverged_at is None else None,
        diverged_at=diverged_at,
        curve=Curve(
            steps=tuple(ends),
            loss=_means(losses_before, ends),
            accuracy=_means(shares_before, ends),
        ),
    )


def _means(values: NDArray[np.float64], ends: list[int]) -> tuple[float, ...]:
    """Means between the ``ends``, (steps,) → as many numbers, six digits each."""
    if not ends:
        return ()
    starts = [0, *ends[:-1]]
    means = np.add.reduceat(values[: ends[-1]], starts) / np.subtract(ends, starts)
    return tuple(map(six_digits, means.tolist()))


@torch.no_grad()
def held_out(recipe: Recipe, seed: int, model: nn.Module) -> tuple[float, float]:
    """Accuracy and loss on held-out samples: the same for every run of a seed."""
    inputs, targets = held_out_samples(recipe, seed)
    model.eval()
    output = torch.cat([model(part) for part in inputs.split(HELD_OUT_SLICE if mixes_samples(model) else len(inputs))])
    loss = float(mean_loss(recipe.loss, output, targets))
    return float(hits(output, targets).double().mean()), loss


def mixes_samples(net: nn.Module) -> bool:
    """Whether an output depends on the other samples of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())


def held_out_samples(recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs (n, *shape) and targets (n,) that no run trains on."""
    inputs, targets = recipe.stream.batches(seed, 0, 1, HELD_OUT_SAMPLES, "held_out")
    return inputs[0].to(recipe.device, recipe.dtype), targets[0].to(recipe.device)
