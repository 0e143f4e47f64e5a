"""Many runs of one recipe at once: their parameters stand in one stack, and one step trains all of them.

A small network leaves a machine idle: most of a step's time goes into starting operations. K runs that differ in γ,
rate and seed only are one batched network with parameters (K, …), so K steps start as many operations as one. The
sum of the runs' losses has each run's gradient in its own slice, so no run sees another.

``h(x; θ₀)`` depends on seed and batch alone: it is computed once and serves every (γ, η) of its seed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError, at_least, positive, whole
from gammaopt.online._checkpoint import Scores, begun_runs, restore, save, saved_runs
from gammaopt.online._device import on_device, seeded
from gammaopt.online._graph import Stepper
from gammaopt.online._stack import CannotStackError, Seeds, Stack, check_forward
from gammaopt.online._traces import Traces
from gammaopt.online.record import RunRecord
from gammaopt.online.train import FAMILIES, LOOK_EVERY, Recipe, Run, built, summarise, train

STACK_BYTES = 32 * 2**20  # parameters, gradients and states of a stack: about a processor's last-level cache
ALONE_BYTES = 2**20  # a run that has this much of its own fills the processor by itself
KEPT_SEEDS = 4  # whose batches are kept where runs come one at a time, or in one call after another
CHECKPOINT_SECONDS = 30.0
LOOK_SECONDS = 5.0  # between two looks where steps are slow: whoever asks for the end gives a minute

Done = Callable[[Run, list[RunRecord]], object]


class StopTraining(Exception):  # noqa: N818 - not an error
    """Raised by ``on_progress`` to stop :func:`train_many`; the stack in training is written to its checkpoint."""


class Progress(NamedTuple):
    """How far :func:`train_many` is, in run-steps: one step of one run. A diverged run's remaining steps count.

    Attributes:
        done: run-steps behind us.
        total: run-steps of the whole call.
        restored: those of ``done`` that an earlier call took: they came from its checkpoint.
    """

    done: int
    total: int
    restored: int = 0


def train_many(
    recipe: Recipe,
    runs: Iterable[Run],
    *,
    budgets: Sequence[int] | int = (),
    stack: int | None = None,
    one_at_a_time: bool = False,
    shared: Seeds | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float | None = None,
    on_done: Done | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> list[RunRecord]:
    """Train many runs of a recipe together; the same records as :func:`train` gives one by one.

    Runs below γ = 0.01 are trained in float64 if the recipe says float32, which loses too much of h − h₀ there. A
    chaotic run ends with another loss than alone in float64 too: one whose loss climbs far above that of f = 0 without
    diverging, e.g. under cross-entropy at γ = 1e-3 and c ≥ 1.
    A run that diverges is recorded and leaves the stack, which goes on without it.

    Args:
        recipe: network, stream, loss, optimizer; ``recipe.steps`` is the longest budget.
        runs: γ, rate and seed of each, all different.
        budgets: steps at which a record is made (or one such number), each at most ``recipe.steps``. The rate is
            constant, so a run of 1,000 steps holds the one of 300. Only ``recipe.steps`` if empty.
        stack: how many runs to train together; by default as many as the caches or the accelerator hold, and one
            where a single run fills the machine.
        one_at_a_time: train run by run, with the modules as they are: for networks that can't be stacked.
        shared: batches and h₀ of each seed, kept from one call of the same recipe to the next.
        checkpoint: file for the state of the stack in training, written now and then and removed when its runs are
            done; a call with all or some of the same runs, networks, budgets and versions goes on from there. Its
            folder is made if it isn't there. A file that is no checkpoint is left alone, and an error.
        checkpoint_seconds: how often it is written; every 30 s if ``None``.
        on_done: called with each run and its records, as soon as they are known.
        on_progress: called now and then; may raise :class:`StopTraining`.

    Returns:
        A record for each run and budget: all budgets of the first run, then of the second …

    Raises:
        UsageError: for repeated runs, a bad budget, or a module that can't be stacked: named, with the fix.

    Example:
        >>> from gammaopt.online import MLP, Staircase
        >>> recipe = Recipe(lambda: MLP(32, 1, width=16), Staircase(), loss="mse", steps=20)
        >>> records = train_many(recipe, [Run(gamma, 0.1, 0) for gamma in (1.0, 10.0)], budgets=(10, 20))
        >>> [(record.gamma, record.steps) for record in records]
        [(1.0, 10), (1.0, 20), (10.0, 10), (10.0, 20)]
    """
    runs = check_runs(runs)
    ends = check_budgets(budgets, recipe.steps)
    if stack is not None:
        at_least("stack", stack, 1)
    saving = _Saving(checkpoint, CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds)
    each = sum(ends) if one_at_a_time else ends[-1]  # one run's steps: a run alone is trained anew for each budget
    progress = _Progress(len(runs) * each, on_progress)
    results: dict[Run, list[RunRecord]] = {}

    def finish(run: Run, records: list[RunRecord]) -> None:
        results[run] = records
        if on_done is not None:
            on_done(run, records)

    with on_device(recipe.device):
        for dtype, members in _by_dtype(recipe, runs, saving.runs()):
            seeds = _seeds(dataclasses.replace(recipe, dtype=dtype), shared)
            if one_at_a_time:
                for run in members:
                    batches = seeds.batches(run.seed)
                    cut = [dataclasses.replace(seeds.recipe, steps=end) for end in ends]
                    finish(run, [train(part, **run._asdict(), batches=batches) for part in cut])
                    seeds.forget(but=KEPT_SEEDS)
                    progress.add(each)
                continue
            size = stack or _stack_size(seeds, members)
            asked = set(members)
            begun = [run for run in saving.begun(seeds, ends) if run in asked]
            queue = _stacks(members, size, begun if len(begun) <= (stack or len(begun)) else [])
            while queue:
                part = queue.pop(0)
                progress.keep()
                try:
                    made = Stack(seeds, part, alone=size == len(part) == 1)
                    _train_stack(made, ends, saving, finish, progress)
                    seeds.forget(but=KEPT_SEEDS)
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                    torch.cuda.empty_cache()
                    half = (len(part) + 1) // 2
                    queue = [part[:half], part[half:], *queue]
                    progress.rewind()
    return [record for run in runs for record in results[run]]


def _seeds(recipe: Recipe, shared: Seeds | None) -> Seeds:
    return shared if shared is not None and shared.recipe == recipe else Seeds(recipe)


def check_runs(runs: Iterable[Run]) -> list[Run]:
    """The runs, γ and rates as floats and seeds as ints, each once."""
    example = "[Run(1.0, 0.1, 0), …]: γ, rate and seed of each"
    if isinstance(runs, Run) or not isinstance(runs, Iterable):
        raise UsageError(f"runs={runs!r} is no list of runs; give {example}")
    checked = []
    for run in runs:
        try:
            gamma, lr, seed = run
        except (TypeError, ValueError):
            raise UsageError(f"{run!r} among the runs is no run; give {example}") from None
        checked.append(Run(positive("gamma", gamma), positive("lr", lr), whole("seed", seed, example)))
    if len(set(checked)) < len(checked):
        twice = next(run for i, run in enumerate(checked) if run in checked[:i])
        raise UsageError(f"the run γ={twice.gamma:g}, lr={twice.lr:g}, seed={twice.seed} is given twice; drop one")
    return checked


def check_budgets(budgets: Sequence[int] | int, steps: int) -> list[int]:
    """The budgets in ascending order, each once; only ``steps`` if there are none."""
    if not isinstance(budgets, Iterable):
        budgets = (budgets,)
    ends = sorted({at_least("budget", budget, 1) for budget in budgets} or {steps})
    if ends[-1] > steps:
        raise UsageError(f"budget={ends[-1]} is more than the recipe's steps={steps}; give at most {steps}")
    return ends


def _by_dtype(recipe: Recipe, runs: list[Run], begun: list[Run]) -> list[tuple[torch.dtype, list[Run]]]:
    """The runs by the precision they need; those with ``begun`` ones first: others would write over its checkpoint."""
    groups: dict[torch.dtype, list[Run]] = {}
    for run in runs:
        groups.setdefault(recipe.at(run.gamma).dtype, []).append(run)
    return sorted(groups.items(), key=lambda group: set(begun).isdisjoint(group[1]))


def _stacks(runs: list[Run], size: int, begun: list[Run]) -> list[list[Run]]:
    """Runs in stacks of about equal size, ``size`` at most, those of a seed side by side: they share their batches.

    ``begun``, those of the runs that a checkpoint holds, come first and as one stack: it goes on, whatever runs were
    added since, and whichever of its own were finished and handed over before a kill.
    """
    held = set(begun)
    rest = sorted((run for run in runs if run not in held), key=lambda run: run.seed)
    count = math.ceil(len(rest) / size)
    bounds = [round(i * len(rest) / count) for i in range(count + 1)] if count else []
    return [*([begun] if begun else []), *(rest[a:b] for a, b in pairwise(bounds))]


def _stack_size(seeds: Seeds, runs: list[Run]) -> int:
    """How many runs to train together, from the bytes that each has of its own. No timing: always the same."""
    net, device = seeds[runs[0].seed].net, torch.device(seeds.recipe.device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, int(0.5 * free / bytes_per_run(seeds.recipe)))
    # Stacked weights make a convolution a grouped one, which the processor's library runs slower than one by one.
    convolution = any(isinstance(module, nn.modules.conv._ConvNd) for module in net.modules())
    each = _state_bytes(seeds.recipe, net)
    return 1 if convolution or each > ALONE_BYTES else max(1, STACK_BYTES // each)


def together(recipe: Recipe, seed: int = 0) -> int:
    """How many runs of the recipe :func:`train_many` trains in one stack by itself: 1 where more don't pay.

    Returns 0 where the network can't be stacked, which leaves ``one_at_a_time=True``.
    """
    seeds, pair = Seeds(recipe), [Run(1.0, 1.0, seed), Run(1.0, 1.0, seed + 1)]
    with on_device(recipe.device):
        try:
            check_forward(Stack(seeds, pair))
        except CannotStackError:
            return 0
        return _stack_size(seeds, pair)


def bytes_per_run(recipe: Recipe) -> int:
    """What one run of a stack has of its own: parameters, gradients, optimizer states and saved activations."""
    inputs, _ = recipe.stream.batches(0, 0, 1, recipe.batch_size)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with on_device(recipe.device), seeded(recipe.device, 0), hooks:  # the caller's generator is left as it is
        net = built(recipe).to(recipe.dtype)
        output = net(inputs[0].to(recipe.dtype))
    for parameter in net.parameters():
        kept.pop(parameter.data_ptr(), None)
    del output
    return _state_bytes(recipe, net) + sum(kept.values())


def _state_bytes(recipe: Recipe, net: nn.Module) -> int:
    states = int(bool(recipe.momentum)) if recipe.optimizer == "sgd" else 2
    return (2 + states) * sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)


class _Saving:
    """The checkpoint of a call, if it has one: when it is written, and whether what lies there is of this call.

    Only that is removed: a call that is done before its first checkpoint is due may have another's beside it.
    """

    def __init__(self, path: str | Path | None, seconds: float) -> None:
        self._path, self._seconds = None if path is None else Path(path), seconds
        self._ours, self._last = False, 0.0

    def runs(self) -> list[Run]:
        return [] if self._path is None else saved_runs(self._path)

    def begun(self, seeds: Seeds, ends: list[int]) -> list[Run]:
        return [] if self._path is None else begun_runs(self._path, seeds, ends)

    def restore(self, ends: list[int], stack: Stack, traces: Traces, scores: Scores) -> None:
        self._last = time.monotonic()
        if self._path is not None and restore(self._path, ends, stack, traces, scores):
            self._ours = True

    def due(self) -> bool:
        return time.monotonic() - self._last > self._seconds

    def write(self, runs: list[Run], ends: list[int], stack: Stack, traces: Traces, scores: Scores) -> None:
        if self._path is not None:
            save(self._path, runs, ends, stack, traces, scores)
            self._ours, self._last = True, time.monotonic()

    def remove(self) -> None:
        if self._path is not None and self._ours:
            self._path.unlink(missing_ok=True)
            self._ours = False


class _Progress:
    def __init__(self, total: int, tell: Callable[[Progress], object] | None) -> None:
        self._now, self._kept, self._tell = Progress(0, total), Progress(0, total), tell

    def add(self, run_steps: int, *, restored: bool = False) -> None:
        done, total, before = self._now
        self._now = Progress(done + run_steps, total, before + run_steps * restored)
        if self._tell is not None:
            self._tell(self._now)

    def keep(self) -> None:
        self._kept = self._now

    def rewind(self) -> None:
        self._now = self._kept


def _train_stack(
    stack: Stack,
    ends: list[int],
    saving: _Saving,
    finish: Done,
    progress: _Progress,
) -> None:
    """Train one stack to the longest budget and hand over the records of its runs."""
    recipe, runs, steps = stack.recipe, stack.runs, ends[-1]
    traces = Traces(runs, steps)
    scores: Scores = {}
    saving.restore(ends, stack, traces, scores)
    if stack.step:
        progress.add(stack.step * len(runs), restored=True)
    if stack.step == 0:
        check_forward(stack)
    take_step = Stepper(stack)
    while stack.step < steps and stack.runs:
        until = min(steps, stack.step + LOOK_EVERY, *(end for end in ends if end > stack.step))
        began, since = stack.step, time.monotonic()
        while stack.step < until and time.monotonic() - since < LOOK_SECONDS:
            traces.add(*take_step())
        alive = traces.look(stack.runs)
        if len(alive) < len(stack.runs):
            stack.keep(alive)
        if stack.step in ends and stack.runs:
            scores.update({(run, stack.step): score for run, score in zip(stack.runs, stack.scores(), strict=True)})
        try:
            progress.add((stack.step - began) * len(runs))
        except StopTraining:
            saving.write(runs, ends, stack, traces, scores)
            raise
        if saving.due():
            saving.write(runs, ends, stack, traces, scores)
    try:
        progress.add((steps - stack.step) * len(runs))  # all diverged
    except StopTraining:
        saving.write(runs, ends, stack, traces, scores)
        raise
    for run in runs:
        law = stack.seeds[run.seed].plan.law(FAMILIES[recipe.optimizer])
        losses, shares = traces.losses[traces.runs[run]], traces.shares[traces.runs[run]]
        # A run that had diverged by the end of a budget has no score there: it had left the stack.
        finish(run, [summarise(run, end, law, losses, shares, scores.get((run, end), (0.0, math.nan))) for end in ends])
    saving.remove()
