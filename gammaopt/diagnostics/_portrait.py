"""Phase portrait: one small network trained at every (γ, η) of a grid, in a folder that a killed job goes on in.

portrait.json    what the runs have in common, and the versions they were made with
runs.jsonl       one line for each finished run and budget; a cell found here is never trained again
stack.pt         the runs in training, while there are some
portrait.npz     the grid and budgets of the last call as arrays; runs of other grids and budgets stay in runs.jsonl
lock             held while a process works here
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gammaopt._errors import UsageError, at_least, one_of, positive, whole
from gammaopt._files import locked, write_atomically
from gammaopt._laws import EtaLaw
from gammaopt.online._checkpoint import saved_runs
from gammaopt.online._device import seeded
from gammaopt.online._run_file import RunFile, by_run
from gammaopt.online.ensemble import Progress, check_budgets, train_many
from gammaopt.online.record import RunRecord
from gammaopt.online.train import FAMILIES, Recipe, Run, built

Unit = Literal["law", "eta"]
TRAINED = 0.5  # of the loss of f = 0: below it a run counts as trained


@dataclass(frozen=True)
class Grid:
    """The cells of a portrait.

    Attributes:
        gammas: feature-learning strengths, ascending, whatever order they were given in.
        rates: learning rates, ascending too: c in η = c·s(γ) if ``unit`` is ``"law"``, or η itself if ``"eta"``.
        seeds: seeds at which every cell is trained.
        unit: what ``rates`` are.
    """

    gammas: tuple[float, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    unit: Unit = "law"

    def __post_init__(self) -> None:
        one_of("unit", self.unit, get_args(Unit))
        # Python's own numbers, which a record can be written with: NumPy's are given too. An edge lies between
        # neighbours, so those of the grid are neighbours in γ and rate.
        for name in ("gammas", "rates"):
            object.__setattr__(self, name, tuple(sorted(positive(name, value) for value in getattr(self, name))))
        object.__setattr__(self, "seeds", tuple(whole("seeds", seed) for seed in self.seeds))
        for name, numbers in {"gammas": self.gammas, "rates": self.rates, "seeds": self.seeds}.items():
            if not numbers:
                raise UsageError(f"the grid has no {name}; give at least one")
            if len(set(numbers)) < len(numbers):
                twice = next(n for i, n in enumerate(numbers) if n in numbers[:i])
                raise UsageError(f"{name} has {twice:g} twice; give each once")

    @classmethod
    def log(
        cls,
        gammas: tuple[float, float, int],
        rates: tuple[float, float, int],
        seeds: int = 1,
        unit: Unit = "law",
    ) -> Grid:
        """Log-spaced from (lowest, highest, how many); seeds 0 … ``seeds`` − 1."""
        at_least("seeds", seeds, 1)
        return cls(_log_spaced("gammas", *gammas), _log_spaced("rates", *rates), tuple(range(seeds)), unit)

    def run(self, gamma: float, rate: float, seed: int, law: EtaLaw) -> Run:
        """The run of a cell; its ``lr`` is the rate at γ = 1."""
        return Run(gamma, rate if self.unit == "law" else rate / law.factor(gamma), seed)


def _log_spaced(name: str, low: float, high: float, count: int) -> tuple[float, ...]:
    positive(f"lowest of {name}", low), at_least(f"number of {name}", count, 1)
    if not low <= high < math.inf:
        raise UsageError(f"{name} from {low:g} to {high:g} is empty; give the lower end first")
    if count == 1 and low != high:
        raise UsageError(f"one of {name} can't span {low:g} to {high:g}; give at least 2, or equal ends")
    step = math.log(high / low) / max(1, count - 1)
    # Six digits: the same cells whatever the last bit of a logarithm on another machine.
    return tuple(float(f"{low * math.exp(step * i):.6g}") for i in range(count))


@dataclass(frozen=True)
class Portrait:
    """Runs over a grid of γ and η, at one or several budgets.

    Attributes:
        grid: the cells.
        law: what the rates are relative to, with the exponents predicted for the stable edges.
        budgets: steps, ascending.
        records: one for each cell, seed and budget.
        others: how many more records of other cells, or at other budgets, the folder holds.
    """

    grid: Grid
    law: EtaLaw
    budgets: tuple[int, ...]
    records: tuple[RunRecord, ...]
    others: int = dataclasses.field(default=0, compare=False)

    def at(self, budget: int) -> tuple[RunRecord, ...]:
        """The records of one budget."""
        if budget not in self.budgets:
            raise UsageError(f"budget={budget} is none of the portrait's: {', '.join(map(str, self.budgets))}")
        return tuple(record for record in self.records if record.steps == budget)

    def arrays(self, budget: int) -> dict[str, NDArray[np.float64]]:
        """(γ, rate, seed) arrays: ``eta``, ``loss`` (held out; NaN if diverged), ``relative_loss`` to that of f = 0,
        ``accuracy``, ``prequential_accuracy`` and ``diverged``.
        """
        found = {(r.gamma, r.lr, r.seed): r for r in self.at(budget)}
        grid = self.grid
        shape = len(grid.gammas), len(grid.rates), len(grid.seeds)
        names = ("eta", "loss", "relative_loss", "accuracy", "prequential_accuracy", "diverged")
        arrays = {name: np.full(shape, np.nan) for name in names}
        for i, gamma in enumerate(grid.gammas):
            for j, rate in enumerate(grid.rates):
                for k, seed in enumerate(grid.seeds):
                    record = found[grid.run(gamma, rate, seed, self.law)]
                    loss = math.nan if record.final_loss is None else record.final_loss
                    values = (
                        record.effective_lr,
                        loss,
                        loss / record.curve.loss[0],
                        record.final_accuracy,
                        record.prequential_accuracy,
                        float(record.diverged_at is not None),
                    )
                    for name, value in zip(names, values, strict=True):
                        arrays[name][i, j, k] = value
        return arrays

    def trained_edge(self, budget: int) -> dict[float, float]:
        """γ → the smallest rate η at which the budget trains it (geometric mean over seeds), where there is one.

        A run is trained if it ends below half the loss of f = 0. A γ that even the smallest rate trains gives none:
        its edge lies below the grid.
        """
        arrays = self.arrays(budget)
        edges: dict[float, float] = {}
        for i, gamma in enumerate(self.grid.gammas):
            logs = []
            for k in range(len(self.grid.seeds)):
                trained = np.flatnonzero(arrays["relative_loss"][i, :, k] < TRAINED)
                if len(trained) and trained[0] > 0:
                    around = arrays["eta"][i, trained[0] - 1 : trained[0] + 1, k]
                    logs.append(float(np.log(around).mean()))
            if len(logs) == len(self.grid.seeds):
                edges[gamma] = math.exp(sum(logs) / len(logs))
        return edges


def predicted_trained_edge(law: EtaLaw, gamma: float) -> float:
    """The smallest rate that a budget trains, relative to the one at γ = 1.

    A run at the rate η learns in plateau(γ)·η*(γ)/η steps, which the budget must reach; so the edge is
    ∝ η*(γ)·plateau(γ), and ∝ 1/budget at every γ.
    """
    return law.factor(gamma) * law.plateau_steps(gamma, at_one=1.0)


def portrait(
    recipe: Recipe,
    grid: Grid,
    folder: str | Path,
    *,
    budgets: Sequence[int] | int = (),
    one_at_a_time: bool = False,
    on_progress: Callable[[Progress], object] | None = None,
) -> Portrait:
    """Train every cell of the grid that the folder doesn't hold yet; cells of other grids and budgets stay there.

    Args:
        recipe: network, stream, loss, optimizer; ``recipe.steps`` is the longest budget. Its ``depth`` and ``knee``
            give the law, so ``depth`` must be given.
        grid: γ's, rates and seeds.
        folder: made if it isn't there. A killed call goes on in it.
        budgets: steps at which a record is made (or one such number), all from the same runs; ``recipe.steps`` if
            empty.
        one_at_a_time: see :func:`gammaopt.online.train_many`.
        on_progress: called now and then with the run-steps of this call.

    Raises:
        UsageError: if the folder holds runs of another recipe or other versions, or other files, or is in use. Nothing
            in it is changed then.
    """
    if recipe.depth is None:
        raise UsageError("the recipe has no depth, which the law needs; give Recipe(depth=…)")
    if recipe.knee is None and recipe.parametrization != "mean_field":
        raise UsageError("the recipe has no knee, which the law needs outside mean-field form; give Recipe(knee=…)")
    law = EtaLaw(recipe.depth, FAMILIES[recipe.optimizer], recipe.loss, recipe.knee or 1.0)
    ends = tuple(check_budgets(budgets, recipe.steps))
    runs = [
        grid.run(gamma, rate, seed, law) for seed in grid.seeds for gamma in grid.gammas for rate in grid.rates
    ]  # fmt: skip
    folder, identity = Path(folder), {"recipe": _describe(recipe), "versions": _versions()}
    _check(folder, identity)
    with locked(folder):
        _check(folder, identity)
        if not (folder / "portrait.json").exists():
            write_atomically(folder / "portrait.json", json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
        file = RunFile(folder / "runs.jsonl", RunRecord.from_dict)
        try:
            _train_missing(recipe, runs, ends, file, one_at_a_time, on_progress)
        finally:
            file.close()
        # A kill between the lines of one run leaves some of its budgets twice: the last one of each counts.
        cells = {key: {record.steps: record for record in cell} for key, cell in by_run(file.records).items()}
        records = tuple(cells[run][end] for run in runs for end in ends)
        made = Portrait(grid, law, ends, records, sum(map(len, cells.values())) - len(records))
        arrays = {f"{name}_{end}": array for end in ends for name, array in made.arrays(end).items()}
        axes = {"gammas": np.array(grid.gammas), "rates": np.array(grid.rates), "seeds": np.array(grid.seeds)}
        partial = folder / "portrait.partial.npz"
        np.savez(partial, **axes, **arrays)  # type: ignore[arg-type]
        partial.replace(folder / "portrait.npz")
    return made


def _train_missing(
    recipe: Recipe,
    runs: Sequence[Run],
    ends: Sequence[int],
    file: RunFile[RunRecord],
    one_at_a_time: bool,
    on_progress: Callable[[Progress], object] | None,
) -> None:
    """Train the runs that the file lacks budgets of, each to the longest it lacks; those with the same one together.

    A shorter budget that only some of them lack comes from the same steps, but one at a time it would be trained anew.
    """
    held = {key: {record.steps for record in cell} for key, cell in by_run(file.records).items()}
    lacking: dict[tuple[int, ...], list[Run]] = {}
    missing: dict[tuple[int, ...], set[int]] = {}
    for run in runs:
        lacks = set(ends) - held.get(run, set())
        if lacks:
            key = tuple(sorted(lacks)) if one_at_a_time else (max(lacks),)
            lacking.setdefault(key, []).append(run)
            missing.setdefault(key, set()).update(lacks)
    checkpoint = file.path.with_name("stack.pt")
    begun = set(saved_runs(checkpoint))
    # What a killed call had begun comes first: another group would write its own checkpoint over it.
    groups = sorted(lacking.items(), key=lambda group: not begun & set(group[1]))
    lengths = [len(members) * (sum(key) if one_at_a_time else key[-1]) for key, members in groups]
    total, done, restored = sum(lengths), 0, 0
    for (key, members), length in zip(groups, lengths, strict=True):
        last = Progress(0, length)

        def show(progress: Progress) -> None:
            nonlocal last
            last = progress
            if on_progress is not None:
                on_progress(Progress(done + progress.done, total, restored + progress.restored))  # noqa: B023

        train_many(
            dataclasses.replace(recipe, steps=key[-1]),
            members,
            budgets=sorted(missing[key]),
            one_at_a_time=one_at_a_time,
            checkpoint=checkpoint,
            on_done=lambda _, records: file.add(*records),
            on_progress=show,
        )
        done, restored = done + length, restored + last.restored


def _describe(recipe: Recipe) -> dict[str, Any]:
    """What makes a cell of one recipe another than the same cell of another."""
    with seeded("cpu", 0):  # the caller's generator is left as it is
        network = _in_one_line(built(recipe))
    with torch.device("meta"):
        base = None if recipe.base is None else _in_one_line(recipe.base())
    return {
        "network": network,
        "base": base,
        "stream": recipe.stream.name,
        "loss": recipe.loss,
        "optimizer": recipe.optimizer,
        "momentum": recipe.momentum,
        "batch_size": recipe.batch_size,
        "parametrization": recipe.parametrization,
        "depth": recipe.depth,
        "knee": recipe.knee,
        "device": recipe.device,
        "dtype": str(recipe.dtype),
    }


def _in_one_line(net: nn.Module) -> str:
    return " ".join(repr(net).split())


def _versions() -> dict[str, str]:
    from gammaopt import __version__

    return {"gammaopt": __version__, "torch": importlib.metadata.version("torch")}


def _check(folder: Path, identity: dict[str, Any]) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose a folder with --out")
    path = folder / "portrait.json"
    if not path.exists():
        entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
        strangers = [name for name in entries if name != "lock" and not name.startswith(".portrait.json.")]
        if strangers:
            raise UsageError(
                f"{folder} holds other files ({', '.join(strangers[:3])}) and no portrait; "
                "choose an empty folder with --out"
            )
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        there = {**found["recipe"], **found["versions"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a readable portrait ({type(error).__name__}); "
            "restore it, or choose another folder with --out"
        ) from None
    for name, here in {**identity["recipe"], **identity["versions"]}.items():
        if there.get(name) != here:
            what = f"{name.replace('_', ' ')} ({_difference(there.get(name), here)})"
            raise UsageError(f"{folder} holds a portrait of another {what}; choose another folder with --out")


SHOWN = 40  # characters of a long value, from shortly ahead of where two of them part


def _difference(there: object, here: object) -> str:
    """``a there, b here``; of long values the part where they differ."""
    a, b = ("none" if value is None else str(value) for value in (there, here))
    if max(len(a), len(b)) > SHOWN:
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        start = max(a.rfind(" ", 0, max(0, same - 1)), 0)  # the word they part in and the one before it

        def shown(text: str) -> str:
            part = text[start:].strip()
            return ("…" if start else "") + (part if len(part) <= SHOWN else part[:SHOWN] + "…")

        a, b = shown(a), shown(b)
    return f"{a} there, {b} here"
