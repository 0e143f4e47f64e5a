"""``gammaopt portrait``: from a task's name and a grid to a folder with data and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast, get_args

from gammaopt._errors import UsageError, at_least, one_of
from gammaopt._files import write_atomically
from gammaopt._fit import FEWEST
from gammaopt._laws import Loss
from gammaopt.diagnostics import Grid, Portrait, portrait
from gammaopt.diagnostics._portrait import Unit
from gammaopt.online import Recipe, get_task
from gammaopt.online._device import check_device
from gammaopt.online.ensemble import Progress
from gammaopt.online.train import FAMILIES, OPTIMIZERS, OptimizerName
from gammaopt.report import ExponentRow, draw_portrait, exponents

BELOW, ABOVE, RATES = 30.0, 10.0, 11  # the default rates: this far around the task's rate at γ = 1, half a decade apart


class Drawn(NamedTuple):
    """The exponents and, if there are none, why; the picture; how many other records the folder holds besides."""

    rows: list[ExponentRow]
    no_rows: str
    picture: Path
    others: int


def no_exponents(made: Portrait) -> str:
    """Why a portrait has no exponents, in a line that says what would give some."""
    knee = made.law.knee
    if max(sum(g <= knee for g in made.grid.gammas), sum(g >= knee for g in made.grid.gammas)) < FEWEST:
        return f"No exponents: they need {FEWEST} γ ≤ {knee:g} or {FEWEST} γ ≥ {knee:g}; give more --gammas."
    return f"No exponents: under {FEWEST} γ have a best rate or edge inside the grid; widen --rates."


def draw(
    *,
    task: str,
    loss: str | None,
    optimizer: str,
    budgets: Sequence[int],
    gammas: tuple[float, float, int],
    rates: tuple[float, float, int] | None,
    unit: str,
    seeds: int,
    width: int | None,
    depth: int | None,
    out: Path | None,
    device: str,
    on_progress: Callable[[Progress], object],
) -> Drawn:
    """Train what is missing, and write the picture and the exponents into the folder."""
    chosen = get_task(task)
    loss = one_of("loss", loss or chosen.losses[0], chosen.losses)
    one_of("loss", loss, get_args(Loss)), one_of("optimizer", optimizer, OPTIMIZERS)
    for budget in budgets:
        at_least("steps", budget, 1)
    if len(set(budgets)) < len(budgets):
        raise UsageError(f"steps={sorted(budgets)} has a budget twice; give each once")
    width, depth = chosen.size(width, depth)
    check_device(device)
    one_of("unit", unit, get_args(Unit))
    if rates is None:
        if unit != "law":
            raise UsageError(f"unit={unit} has no default rates; give --rates LO HI N")
        centre = chosen.base_lr[FAMILIES[optimizer], cast("Loss", loss)]
        rates = centre / BELOW, centre * ABOVE, RATES
    grid = Grid.log(gammas, rates, seeds, cast("Unit", unit))
    recipe = Recipe(
        partial(chosen.build, width=width, depth=depth),
        chosen.stream(),
        cast("Loss", loss),
        cast("OptimizerName", optimizer),
        steps=max(budgets),
        batch_size=chosen.batch_size,
        depth=chosen.effective_depth(width, depth),
        device=device,
    )
    # Grids and budgets share a folder, for they share their runs; what makes other runs is in its name.
    where = "" if device == "cpu" else "-" + device.replace(":", "")
    folder = out or Path("runs") / f"portrait-{task}-{loss}-{optimizer}-L{depth}-N{width}{where}"
    made = portrait(recipe, grid, folder, budgets=budgets, on_progress=on_progress)
    rows = exponents(made)
    write_atomically(
        folder / "exponents.json", json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n"
    )
    partial_picture = folder / ".portrait.partial.png"
    draw_portrait(made).savefig(partial_picture, dpi=110)
    return Drawn(rows, no_exponents(made), partial_picture.replace(folder / "portrait.png"), made.others)
