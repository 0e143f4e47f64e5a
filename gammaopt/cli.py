"""The command line. torch is imported inside commands only, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gammaopt._errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gammaopt.tuning import Progress, TuneResult

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune the richness: hyperparameter transfer across the feature-learning strength γ.",
)

INTERRUPTED = 130  # what a shell reports for Ctrl-C


def _show_version(wanted: bool) -> None:
    if wanted:
        from gammaopt import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def tasks() -> None:
    """List the bundled tasks."""
    with _usage_errors():
        from gammaopt.online.tasks import TASKS

        for task in TASKS.values():
            typer.echo(f"{task.name}: {task.summary}")
            typer.echo(f"    {task.steps} steps of {task.batch_size} samples; losses: {', '.join(task.losses)}")


@app.command()
def tune(
    task: Annotated[str, typer.Argument(help="Task to study; `gammaopt tasks` lists them.")],
    loss: Annotated[str | None, typer.Option(help="mse or cross_entropy.", show_default="the task's")] = None,
    optimizer: Annotated[str, typer.Option(help="sgd, adam or adamw.")] = "sgd",
    steps: Annotated[int | None, typer.Option(help="Batches in each run.", show_default="the task's")] = None,
    trials: Annotated[int, typer.Option(help="Pairs (γ, rate) to try, and as many rates at γ = 1.")] = 32,
    seeds: Annotated[int, typer.Option(help="Seeds averaged in each trial.")] = 3,
    confirm_seeds: Annotated[int, typer.Option(help="Fresh seeds for the confirmation.")] = 12,
    gamma_range: Annotated[
        tuple[float, float], typer.Option(metavar="LO HI", help="Lowest and highest γ searched.")
    ] = (0.01, 100.0),
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Optuna storage.", show_default="SQLite in the study's folder")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study.", show_default="runs/TASK-LOSS-OPTIMIZER-STEPS")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, …")] = "cpu",
    seed: Annotated[int, typer.Option(help="Base of every random choice.")] = 0,
    jobs: Annotated[
        int | None, typer.Option(help="Processes to train in.", show_default="one per core; 1 on an accelerator")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Tune γ on a task, then confirm on fresh seeds: does it beat γ = 1 at the same budget?

    Goes on where it stopped if it is started again with the same options.
    """
    with _usage_errors():
        from gammaopt.tuning import StudyPlan
        from gammaopt.tuning import tune as run

        plan = StudyPlan(
            task, loss, optimizer, steps, trials, seeds, confirm_seeds, gamma_range, seed, device
        )  # fmt: skip
        folder = out or Path("runs") / plan.folder
        if jobs is None:
            jobs = len(os.sched_getaffinity(0)) if device == "cpu" else 1
        finished = (folder / "result.json").exists()
        with _finished(quiet) if finished else _progress(quiet) as show:
            result = run(plan, folder, storage=storage, jobs=jobs, on_progress=show)
        _tell(result, folder, json, quiet)


def _tell(result: TuneResult, folder: Path, json: bool, quiet: bool) -> None:
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    for note in result.notes:
        console.print(f"Note: {note}.", markup=False)
    if json:
        sys.stdout.write(result.to_json())
    else:
        words = result.in_words()
        typer.echo(textwrap.fill(words, shutil.get_terminal_size().columns) if sys.stdout.isatty() else words)
    console.print(f"Report: {folder / 'report.html'}", markup=False)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """A user's mistake is one line and exit code 2; Ctrl-C says how to go on."""
    try:
        yield
    except (UsageError, MissingExtraError) as error:
        typer.echo(f"gammaopt: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("\ngammaopt: stopped; run the same command again to go on", err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """What shows a study's progress on stderr: a bar on a terminal, plain lines elsewhere, nothing if quiet."""
    console = Console(stderr=True)
    if quiet:
        yield lambda _: None
    elif console.is_terminal:
        with _bar(console) as show:
            yield show
    else:
        yield _PlainLines(console)


@contextmanager
def _finished(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """One line instead of progress, once the folder has turned out to be sound."""
    said = quiet

    def show(_: Progress) -> None:
        nonlocal said
        if not said:
            typer.echo("This study is finished; writing its report again.", err=True)
        said = True

    yield show


def _best(progress: Progress) -> str:
    best = progress.best
    return "" if best is None else f"best γ = {best.gamma:.3g}: {100 * best.score:.1f} %"


def _done(progress: Progress) -> str:
    if progress.stage == "confirm":
        return f"{progress.runs}/{progress.runs_total} runs"
    return f"{progress.trials}/{progress.trials_total} trials"


_STAGES = {"tuned": "tuning γ", "one_equal_budget": "γ = 1", "confirm": "confirming"}


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[Progress], None]]:
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
                best=_best(progress),
            )

        yield show


class _PlainLines:
    """One line for each tenth of the study, for logs."""

    def __init__(self, console: Console) -> None:
        self._console, self._tenth = console, -1

    def __call__(self, progress: Progress) -> None:
        tenth = 10 * progress.runs // progress.runs_total
        if tenth == self._tenth:
            return
        self._tenth = tenth
        self._console.print(
            f"{10 * tenth} % · {_STAGES[progress.stage]} · {_done(progress)} · {_best(progress)}".rstrip(" ·"),
            highlight=False,
            markup=False,
        )


def main() -> None:
    """Entry point of the console script: a mistake in the arguments is one line and exit code 2 too."""
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except Exception as error:
        # Not by class: typer brings its own click in some versions and takes the installed one in others.
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(str(error.format_message()).split()).removesuffix(".")
        typer.echo(f"gammaopt: {message}; see gammaopt --help", err=True)
        code = 2
    sys.exit(code or 0)
