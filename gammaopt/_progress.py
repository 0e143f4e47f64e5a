"""A study's progress on stderr: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gammaopt._terminal import on_stderr

if TYPE_CHECKING:
    from gammaopt.tuning import Progress
    from gammaopt.tuning._budget import Plan


def range_line(plan: Plan) -> str:
    """What range of γ the step budget gave, and how to set another."""
    from gammaopt.tuning._space import LEAST_HIGH, MOST_HIGH

    low, high = plan.gamma_range
    bound = {LEAST_HIGH: "the least range that is searched", MOST_HIGH: "the widest range that is searched"}
    why = f"{bound[high]} by default" if high in bound else f"what {plan.steps:,} steps can train"
    return f"γ from {low:g} to {high:g}: {why}; {plan.option('gamma_range')} sets it"


@contextmanager
def study_progress(plan: Plan, *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """What shows a study's progress on stderr: a bar on a terminal, plain lines elsewhere, nothing if quiet."""
    console = Console(stderr=True)
    if quiet:
        yield lambda _: None
    elif console.is_terminal:
        with _bar(console, plan) as show:
            yield show
    else:
        yield _PlainLines(console, plan)


def after_line(line: str | None, show: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """``show``, and before its first progress a line, if there is one: by then all options have turned out sound."""
    left = [line] if line else []

    def told(progress: Progress) -> None:
        while left:
            on_stderr(left.pop())
        show(progress)

    return told


def tenths() -> Callable[[int, int], int | None]:
    """The percent of (done, total), in tens, when a new tenth has begun; else ``None``: a log wants no line a step."""
    said = -1

    def percent(done: int, total: int) -> int | None:
        nonlocal said
        tenth, last = 10 * done // total, said
        said = tenth
        return None if tenth == last else 10 * tenth

    return percent


@contextmanager
def runs_progress() -> Iterator[Callable[[int, int], None]]:
    """What shows on stderr how many of some runs are done: a bar on a terminal, a line for each tenth elsewhere."""
    console, percent = Console(stderr=True), tenths()

    def line(done: int, total: int) -> None:
        if total and (now := percent(done, total)) is not None:
            on_stderr(f"{now} % · confirming · {done}/{total} runs")

    if not console.is_terminal:
        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("confirming"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("runs"))
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        row = bar.add_task("", total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def _best(progress: Progress, plan: Plan) -> str:
    best = progress.best
    return "" if best is None else f"best γ = {best.gamma:.3g}: {plan.shown(best.score, decimals=1)}"


def _done(progress: Progress) -> str:
    if progress.stage == "confirm":
        return f"{progress.runs}/{progress.runs_total} runs"
    return f"{progress.trials}/{progress.trials_total} trials"


_STAGES = {"tuned": "tuning γ", "one_equal_budget": "γ = 1", "confirm": "confirming"}


@contextmanager
def _bar(console: Console, plan: Plan) -> Iterator[Callable[[Progress], None]]:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns: tuple[Any, ...] = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=14),
        TextColumn("{task.fields[trials]}"),
        TextColumn("{task.fields[best]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        row = bar.add_task("starting", total=None, trials="", best="")
        start: int | None = None

        def show(progress: Progress) -> None:
            nonlocal start
            if start is None:
                # Runs finished by an earlier process must not count as speed.
                start = progress.runs - progress.new_runs
                bar.reset(row, total=progress.runs_total - start)
            bar.update(
                row,
                description=_STAGES[progress.stage],
                total=progress.runs_total - start,
                completed=progress.runs - start,
                trials=_done(progress),
                best=_best(progress, plan),
            )

        yield show


class _PlainLines:
    """One line for each tenth of the study, for logs."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console, self._plan, self._percent = console, plan, tenths()

    def __call__(self, progress: Progress) -> None:
        percent = self._percent(progress.runs, progress.runs_total)
        if percent is None:
            return
        self._console.print(
            f"{percent} % · {_STAGES[progress.stage]} · {_done(progress)} · {_best(progress, self._plan)}".rstrip(" ·"),
            highlight=False,
            markup=False,
        )
