"""Phase portraits: cells, resume, extension, mistakes, and the lines drawn on them."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from gammaopt import EtaLaw
from gammaopt._errors import UsageError
from gammaopt._portrait_command import no_exponents
from gammaopt.cli import _as_table
from gammaopt.diagnostics import Grid, Portrait, portrait
from gammaopt.diagnostics import _portrait as module
from gammaopt.diagnostics._portrait import predicted_trained_edge
from gammaopt.online import MLP, Curve, Digits, Parity, Progress, Recipe, Run, RunRecord, ensemble, train, train_many
from gammaopt.online._stack import Stack
from gammaopt.report import draw_portrait, exponents
from gammaopt.report._portrait import DEAD_HATCH, HATCH

RECIPE = Recipe(partial(MLP, 144, 10, width=16), Digits(), "mse", steps=30, batch_size=8, depth=3.0)
GRID = Grid((0.5, 2.0), (1.0, 4.0, 1e5), (0, 1))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that portraits really trained, in order."""
    runs: list[Run] = []
    real = train_many

    def spy(recipe: Recipe, cells: list[Run], **options: Any) -> list[RunRecord]:
        runs.extend(cells)
        return real(recipe, cells, **options)

    monkeypatch.setattr(module, "train_many", spy)
    return runs


def test_every_cell_is_the_run_of_its_gamma_and_rate(tmp_path: Path) -> None:
    made = portrait(RECIPE, GRID, tmp_path / "p", budgets=(10, 30))
    law = EtaLaw(3.0)
    assert len(made.records) == 2 * 3 * 2 * 2
    for budget in (10, 30):
        arrays = made.arrays(budget)
        for i, gamma in enumerate(GRID.gammas):
            for j, c in enumerate(GRID.rates):
                for k, seed in enumerate(GRID.seeds):
                    alone = train(dataclasses.replace(RECIPE, steps=budget), gamma=gamma, lr=c, seed=seed)
                    assert arrays["eta"][i, j, k] == pytest.approx(law.lr(c, gamma))
                    assert arrays["diverged"][i, j, k] == (alone.diverged_at is not None)
                    assert arrays["accuracy"][i, j, k] == pytest.approx(alone.final_accuracy, abs=1e-3)
                    expected = math.nan if alone.final_loss is None else alone.final_loss
                    assert arrays["loss"][i, j, k] == pytest.approx(expected, rel=1e-3, nan_ok=True)
    saved = np.load(tmp_path / "p" / "portrait.npz")
    assert saved["gammas"].tolist() == [0.5, 2.0]
    np.testing.assert_array_equal(saved["loss_30"], made.arrays(30)["loss"])


def test_eta_as_unit_is_the_rate_itself(tmp_path: Path) -> None:
    made = portrait(RECIPE, Grid((0.5, 2.0), (0.3,), unit="eta"), tmp_path)
    assert [record.effective_lr for record in made.records] == pytest.approx([0.3, 0.3])


def test_a_grid_may_be_given_in_numpys_numbers(tmp_path: Path) -> None:
    grid = Grid(np.array([0.5, 2.0]), (np.float32(1.0),), tuple(np.arange(2)))  # type: ignore[arg-type]
    assert grid == Grid((0.5, 2.0), (1.0,), (0, 1))
    made = portrait(RECIPE, grid, tmp_path)
    assert portrait(RECIPE, grid, tmp_path) == made == portrait(RECIPE, Grid((0.5, 2.0), (1.0,), (0, 1)), tmp_path)
    with pytest.raises(UsageError, match=r"seeds=0\.5 is not a whole number"):
        Grid((1.0,), (1.0,), (0.5,))  # type: ignore[arg-type]


def test_only_new_cells_are_trained(tmp_path: Path, trained: list[Run]) -> None:
    first = portrait(RECIPE, GRID, tmp_path)
    assert len(trained) == 12
    trained.clear()
    assert portrait(RECIPE, GRID, tmp_path) == first
    assert trained == []
    wider = dataclasses.replace(GRID, gammas=(0.5, 2.0, 8.0), seeds=(0, 1, 2))
    made = portrait(RECIPE, wider, tmp_path)
    assert len(trained) == 3 * 3 * 3 - 12
    assert set(first.records) < set(made.records)
    trained.clear()
    assert portrait(RECIPE, GRID, tmp_path) == first
    assert trained == []


class KilledError(Exception):
    pass


def test_a_killed_portrait_goes_on(tmp_path: Path, trained: list[Run]) -> None:
    whole = portrait(RECIPE, GRID, tmp_path / "whole", budgets=(10, 30))

    def kill(progress: Progress) -> None:
        if progress.done > 0.5 * progress.total:
            raise KilledError

    with pytest.raises(KilledError):
        portrait(RECIPE, GRID, tmp_path / "killed", budgets=(10, 30), on_progress=kill)
    with open(tmp_path / "killed" / "runs.jsonl", "a", encoding="utf-8") as file:
        # Killed while it wrote the two lines of a run: one is whole, one is not.
        file.write(whole.records[0].to_json() + "\n" + whole.records[1].to_json()[:30])
    trained.clear()
    again = portrait(RECIPE, GRID, tmp_path / "killed", budgets=(10, 30))
    assert again == whole
    assert len(trained) > 0
    # The run of the odd line has three lines now: both budgets are there, so it is held.
    trained.clear()
    assert portrait(RECIPE, GRID, tmp_path / "killed", budgets=(10, 30)) == whole
    assert trained == []


def test_one_budget_twice_is_not_two_budgets(tmp_path: Path, trained: list[Run]) -> None:
    grid = Grid((2.0,), (1.0,))
    whole = portrait(RECIPE, grid, tmp_path, budgets=(10, 30))
    first = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "runs.jsonl").write_text(2 * first)
    trained.clear()
    assert portrait(RECIPE, grid, tmp_path, budgets=(10, 30)) == whole
    assert len(trained) == 1


KILLED = """
    import sys, time
    from functools import partial
    from pathlib import Path
    from gammaopt.diagnostics import Grid, portrait
    from gammaopt.online import MLP, Digits, Recipe, ensemble

    def stop(progress):
        if progress.done > 0.8 * progress.total:
            print("ready", flush=True)
            time.sleep(60)

    ensemble.CHECKPOINT_SECONDS, ensemble.STACK_BYTES = 0.0, 6 * 8 * 2720  # two stacks of six
    recipe = Recipe(partial(MLP, 144, 10, width=16), Digits(), "mse", steps=200, batch_size=8, depth=3.0)
    portrait(recipe, Grid((0.5, 2.0), (1.0, 4.0, 1e5), (0, 1)), Path(sys.argv[1]), on_progress=stop)
"""


def test_a_portrait_killed_with_9_goes_on_from_its_checkpoint_and_trains_no_finished_cell(
    tmp_path: Path, trained: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(KILLED), str(tmp_path / "p")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
        finally:
            process.kill()
    assert (tmp_path / "p" / "stack.pt").exists()
    finished = (tmp_path / "p" / "runs.jsonl").read_text()
    assert finished.count("\n") == 6
    steps: list[int] = []
    step = Stack.train_step

    def counted(self: Stack) -> tuple[Tensor, Tensor]:
        steps.append(len(self.runs))
        return step(self)

    recipe = dataclasses.replace(RECIPE, steps=200)
    with monkeypatch.context() as patch:
        patch.setattr(Stack, "train_step", counted)
        again = portrait(recipe, GRID, tmp_path / "p")
    assert len(trained) == 6
    assert 0 < len(steps) <= 100
    assert max(steps) == 4, "two of the six had diverged and left the stack before the kill"
    assert (tmp_path / "p" / "runs.jsonl").read_text().startswith(finished)
    assert not (tmp_path / "p" / "stack.pt").exists()
    for ours, whole in zip(again.records, portrait(recipe, GRID, tmp_path / "whole").records, strict=True):
        assert (ours.gamma, ours.lr, ours.seed, ours.diverged_at) == (
            whole.gamma,
            whole.lr,
            whole.seed,
            whole.diverged_at,
        )
        assert ours.final_loss == (whole.final_loss and pytest.approx(whole.final_loss, rel=1e-4))


def test_another_recipe_or_version_is_refused_and_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    portrait(RECIPE, GRID, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = dataclasses.replace(RECIPE, build=partial(MLP, 144, 10, width=8))
    with pytest.raises(UsageError, match=r"a portrait of another network \((.*)\); choose another folder") as said:
        portrait(other, GRID, tmp_path)
    assert "out_features=16" in str(said.value)
    assert "out_features=8" in str(said.value)
    assert len(str(said.value)) < 200 + len(str(tmp_path))
    with pytest.raises(UsageError, match=r"another loss \(mse there, cross_entropy here\)"):
        portrait(dataclasses.replace(RECIPE, loss="cross_entropy"), GRID, tmp_path)
    with pytest.raises(UsageError, match=r"another batch size \(8 there, 4 here\)"):
        portrait(dataclasses.replace(RECIPE, batch_size=4), GRID, tmp_path)
    monkeypatch.setattr(module, "_versions", lambda: {"gammaopt": "0.0", "torch": "0.0"})
    with pytest.raises(UsageError, match=r"another gammaopt \(.* there, 0\.0 here\)"):
        portrait(RECIPE, GRID, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_base_is_another_portrait(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, parametrization="as_is", knee=1.0, steps=3)
    grid = Grid((1.0,), (0.1,))
    portrait(dataclasses.replace(recipe, base=partial(MLP, 144, 10, width=4)), grid, tmp_path / "based")
    portrait(recipe, grid, tmp_path / "plain")
    for base, folder in ((None, "based"), (partial(MLP, 144, 10, width=8), "based"), (recipe.build, "plain")):
        with pytest.raises(UsageError, match=r"holds a portrait of another base \(.* there, .* here\)"):
            portrait(dataclasses.replace(recipe, base=base), grid, tmp_path / folder)


DESCRIBED = dataclasses.replace(RECIPE, parametrization="as_is", knee=2.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"build": partial(MLP, 144, 10, width=8)},
        {"base": partial(MLP, 144, 10, width=8)},
        {"stream": Parity(20, 3)},
        {"loss": "cross_entropy"},
        {"optimizer": "adam"},
        {"momentum": 0.5},
        {"batch_size": 4},
        {"parametrization": "mean_field"},
        {"depth": 2.0},
        {"knee": 1.0},
        {"dtype": torch.float64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_recipes_description_tells_all_that_makes_another_run(changes: dict[str, Any]) -> None:
    here, there = module._describe(DESCRIBED), module._describe(dataclasses.replace(DESCRIBED, **changes))
    assert {name for name in here if here[name] != there[name]} == {
        "network" if "build" in changes else next(iter(changes))
    }
    assert set(here) == {field.name for field in dataclasses.fields(Recipe)} - {"build", "steps"} | {"network"}


def test_describing_a_recipe_leaves_the_callers_generator_alone() -> None:
    before = torch.get_rng_state()
    module._describe(RECIPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_budgets_train_no_longer_than_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Run]
) -> None:
    whole = portrait(RECIPE, GRID, tmp_path / "whole", budgets=(5, 10, 30))
    portrait(RECIPE, GRID, tmp_path / "p", budgets=30)
    steps: list[int] = []
    real = Stack.train_step

    def counted(self: Stack) -> tuple[Tensor, Tensor]:
        steps.append(self.step)
        return real(self)

    monkeypatch.setattr(Stack, "train_step", counted)
    both = portrait(RECIPE, GRID, tmp_path / "p", budgets=(10, 30))
    assert (both.at(10), both.at(30), both.others) == (whole.at(10), whole.at(30), 0)
    assert max(steps) == 9
    steps.clear()
    trained.clear()
    told: list[Progress] = []
    wider = dataclasses.replace(GRID, gammas=(0.5, 2.0, 8.0))
    grown = portrait(RECIPE, wider, tmp_path / "p", budgets=(5, 10, 30), on_progress=told.append)
    assert [(len(group), max(group)) for group in (steps[:5], steps[5:])] == [(5, 4), (30, 29)]
    assert len(trained) == 12 + 6
    assert told[0].total == told[-1].total == told[-1].done == 12 * 5 + 6 * 30
    assert set(whole.records) < set(grown.records)
    steps.clear()
    again = portrait(RECIPE, GRID, tmp_path / "p", budgets=(5, 10))
    assert steps == []
    assert again.others == len(grown.records) - len(again.records)


def test_one_at_a_time_trains_no_budget_that_is_held(tmp_path: Path) -> None:
    portrait(RECIPE, Grid((0.5,), (1.0,)), tmp_path, budgets=10)
    told: list[Progress] = []
    grid = Grid((0.5, 2.0), (1.0,))
    made = portrait(RECIPE, grid, tmp_path, budgets=(10, 30), one_at_a_time=True, on_progress=told.append)
    assert told[-1] == Progress(30 + 40, 30 + 40)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(made.records) == 4


def test_what_a_killed_call_had_begun_comes_ahead_of_what_was_asked_for_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Run]
) -> None:
    monkeypatch.setattr(ensemble, "LOOK_EVERY", 10)
    portrait(RECIPE, Grid((0.5,), (1.0, 4.0)), tmp_path, budgets=30)

    def stop(progress: Progress) -> None:
        if progress.done > 0.5 * progress.total:
            raise ensemble.StopTraining

    with pytest.raises(ensemble.StopTraining):
        portrait(RECIPE, Grid((2.0,), (1.0, 4.0)), tmp_path, budgets=(10, 30), on_progress=stop)
    trained.clear()
    told: list[Progress] = []
    portrait(RECIPE, Grid((0.5, 2.0), (1.0, 4.0)), tmp_path, budgets=(10, 30), on_progress=told.append)
    assert [run.gamma for run in trained] == [2.0, 2.0, 0.5, 0.5]
    assert told[-1].restored == 2 * 20


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file; choose a folder"):
        portrait(RECIPE, GRID, tmp_path / "file")
    with pytest.raises(UsageError, match=r"holds other files \(file\) and no portrait"):
        portrait(RECIPE, GRID, tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "portrait.json").write_text("{")
    with pytest.raises(UsageError, match=r"portrait\.json is not a readable portrait"):
        portrait(RECIPE, GRID, tmp_path / "p")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid((), (1.0,)), "the grid has no gammas; give at least one"),
        (lambda: Grid((1.0,), ()), "the grid has no rates"),
        (lambda: Grid((1.0,), (1.0,), ()), "the grid has no seeds"),
        (lambda: Grid((1.0,), (1.0,), (3, 3)), "seeds has 3 twice; give each once"),
        (lambda: Grid((1.0, 1.0), (1.0,)), "gammas has 1 twice"),
        (lambda: Grid((1.0,), (-1.0,)), "rates=-1"),
        (lambda: Grid((1.0,), (1.0,), unit="foo"), "unknown unit 'foo'; choose one of: law, eta"),  # type: ignore[arg-type]
        (lambda: Grid.log((1.0, 0.1, 3), (1.0, 2.0, 2)), "gammas from 1 to 0.1 is empty; give the lower end first"),
        (lambda: Grid.log((1.0, 10.0, 0), (1.0, 2.0, 2)), "number of gammas=0"),
        (lambda: Grid.log((1.0, 10.0, 1), (1.0, 2.0, 2)), "one of gammas can't span 1 to 10"),
        (lambda: Grid.log((1.0, 10.0, 2), (1.0, 2.0, 2), 0), "seeds=0"),
    ],
)
def test_a_grid_without_cells_or_with_one_twice(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_a_recipe_must_say_what_the_law_needs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the recipe has no depth"):
        portrait(dataclasses.replace(RECIPE, depth=None), GRID, tmp_path)
    with pytest.raises(UsageError, match="the recipe has no knee"):
        portrait(dataclasses.replace(RECIPE, parametrization="as_is"), GRID, tmp_path)
    with pytest.raises(UsageError, match="budget=0"):
        portrait(RECIPE, GRID, tmp_path, budgets=(0,))
    with pytest.raises(UsageError, match="budget=31 is more than the recipe's steps=30"):
        portrait(RECIPE, GRID, tmp_path, budgets=(31,))
    assert list(tmp_path.iterdir()) == []


def made_up(steps: int = 100) -> Portrait:
    """A portrait whose edges follow the laws exactly: trained above ∝ η*·plateau/steps, stable below 10·s(γ)."""
    law = EtaLaw(4.0)
    grid = Grid.log((0.01, 100.0, 9), (1e-4, 100.0, 61))
    records = []
    for budget in (steps, 10 * steps):
        for gamma in grid.gammas:
            for rate in grid.rates:
                eta = law.lr(rate, gamma)
                trained = eta > predicted_trained_edge(law, gamma) / budget
                stable = rate < 10
                loss = (0.01 * (1 + abs(math.log(rate))) if trained else 0.95) if stable else None
                curve = Curve((1,), (1.0,), (0.0,))
                records.append(
                    RunRecord(
                        gamma,
                        rate,
                        0,
                        budget,
                        eta,
                        0.5,
                        0.5,
                        0.5,
                        min(loss, 0.99) if loss else None,
                        None if stable else 3,
                        curve,
                    )
                )
    return Portrait(grid, law, (steps, 10 * steps), tuple(records))


def test_the_trained_edge_is_found_and_moves_with_the_budget_as_the_plateau_law_says() -> None:
    made = made_up()
    for budget in made.budgets:
        edges = made.trained_edge(budget)
        for gamma, eta in edges.items():
            assert eta == pytest.approx(predicted_trained_edge(made.law, gamma) / budget, rel=0.3)
    # η*·plateau: γ^(2/4)·γ^(1 − 2/4) = γ above the knee, γ² below.
    assert predicted_trained_edge(made.law, 100.0) == pytest.approx(100.0)
    assert predicted_trained_edge(made.law, 0.1) == pytest.approx(0.01)


def test_a_grid_given_in_another_order_has_the_same_edges() -> None:
    made = made_up()
    turned = dataclasses.replace(made.grid, gammas=made.grid.gammas[::-1], rates=made.grid.rates[::-1])
    assert dataclasses.replace(made, grid=turned).trained_edge(100) == made.trained_edge(100) != {}
    assert turned == made.grid


def test_exponents_are_those_of_the_law() -> None:
    rows = exponents(made_up())
    assert {(row.budget, row.what, row.side) for row in rows} == {
        (budget, what, side)
        for budget in (100, 1000)
        for what in ("best rate", "stable edge")
        for side in ("γ ≤ 1", "γ ≥ 1")
    }
    for row in rows:
        assert row.predicted == (2.0 if row.side == "γ ≤ 1" else 0.5)
        assert row.measured == pytest.approx(row.predicted, abs=0.02)
        assert row.interval is not None
        assert row.interval[0] - 1e-9 <= row.measured <= row.interval[1] + 1e-9


def test_three_points_have_an_exponent_and_no_interval() -> None:
    """Each resample of three points that has three γ is the points themselves: it would be an interval of no width."""
    made = made_up()
    gammas = made.grid.gammas[-3:]
    few = dataclasses.replace(
        made,
        grid=dataclasses.replace(made.grid, gammas=gammas),
        records=tuple(record for record in made.records if record.gamma in gammas),
    )
    rows = exponents(few)
    assert {row.what for row in rows} == {"best rate", "stable edge"}
    assert all(row.interval is None and row.measured == pytest.approx(0.5, abs=0.02) for row in rows)
    assert all(line.endswith("  too few γ") for line in _as_table(rows).splitlines()[1:])


def test_the_picture_has_a_column_for_each_budget_and_hatches_what_diverged() -> None:
    made = made_up()
    figure = draw_portrait(made)
    planes = [axes for axes in figure.axes if axes.get_xscale() == "log"]
    assert len(planes) == 4
    for axes in planes:
        hatched = [c for c in axes.collections if c.get_hatch() == HATCH]
        assert len(hatched) == 1
        assert len(hatched[0].get_paths()) == int(np.isnan(made.arrays(100)["loss"]).sum())
        labels = {line.get_label() for line in axes.lines}
        assert {"stable edge ∝ γ²", "stable edge ∝ γ", "stable edge ∝ γ^(2/4)", "not trained yet below"} <= labels
    (edge,) = [line for line in planes[0].lines if line.get_label() == "stable edge ∝ γ^(2/4)"]
    x, y = np.asarray(edge.get_xdata(), float), np.asarray(edge.get_ydata(), float)
    assert np.polyfit(np.log(x), np.log(y), 1)[0] == pytest.approx(0.5)
    assert y[0] == pytest.approx(10.0, rel=0.2)
    assert "diverged" in in_legend(figure)


def in_legend(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_the_legend_names_nothing_that_is_not_drawn() -> None:
    made = made_up()
    grid = dataclasses.replace(made.grid, rates=tuple(rate for rate in made.grid.rates if rate < 10))
    whole = dataclasses.replace(made, grid=grid, records=tuple(r for r in made.records if r.lr < 10))
    names = in_legend(draw_portrait(whole))
    assert "not trained yet below" in names
    assert "diverged" not in names


def test_cells_that_died_above_the_edge_are_dotted_and_in_the_legend() -> None:
    """They ended with a number, at about the loss of f = 0; what is not trained yet, below, is as dark."""
    made = made_up()
    assert "blew up: loss no better than f = 0" not in in_legend(draw_portrait(made))
    records = tuple(
        dataclasses.replace(r, final_loss=1.0, diverged_at=None) if r.final_loss is None and r.gamma > 9 else r
        for r in made.records
    )
    died = sum(r.final_loss == 1.0 and r.steps == 100 for r in records)
    figure = draw_portrait(dataclasses.replace(made, records=records))
    assert "blew up: loss no better than f = 0" in in_legend(figure)
    (dotted,) = [c for c in figure.axes[0].collections if c.get_hatch() == DEAD_HATCH]
    assert len(dotted.get_paths()) == died > 0


def test_no_exponents_says_what_would_give_some() -> None:
    """Three γ around the bend have two on each side, which no other rates can mend."""
    made = made_up()

    def of(gammas: tuple[float, ...], rates: tuple[float, ...]) -> Portrait:
        grid = dataclasses.replace(made.grid, gammas=gammas, rates=rates)
        chosen = tuple(r for r in made.records if r.gamma in gammas and r.lr in rates)
        return dataclasses.replace(made, grid=grid, records=chosen)

    around = of(made.grid.gammas[3:6], made.grid.rates)
    narrow = of(made.grid.gammas, made.grid.rates[:2])
    for few, fix in ((around, "give more --gammas"), (narrow, "widen --rates")):
        assert exponents(few) == []
        message = _as_table([], no_exponents(few))
        assert fix in message
        assert len(message) <= 80


def test_a_grid_of_one_cell_still_has_a_picture(tmp_path: Path) -> None:
    made = portrait(RECIPE, Grid((2.0,), (1.0,)), tmp_path)
    assert exponents(made) == []
    draw_portrait(made).savefig(tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "portrait.json").read_text())["recipe"]["loss"] == "mse"
