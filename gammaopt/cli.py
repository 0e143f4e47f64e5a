"""The command line. torch is imported inside commands only, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

from gammaopt._errors import UsageError
from gammaopt._progress import after_line, range_line, study_progress, tenths
from gammaopt._study_commands import COMMANDS
from gammaopt._terminal import on_stderr, usage_errors
from gammaopt._worker_command import slurm, worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from gammaopt.online.ensemble import Progress as RunSteps
    from gammaopt.report import ExponentRow
    from gammaopt.tuning import TuneResult

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune the richness: hyperparameter transfer across the feature-learning strength γ.",
)

data = typer.Typer(help="Look at data sets on disk.")
app.add_typer(data, name="data")


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
    with usage_errors():
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
        tuple[float, float] | None,
        typer.Option(metavar="LO HI", help="Lowest and highest γ searched.", show_default="what the steps can train"),
    ] = None,
    octaves: Annotated[float, typer.Option(help="Rates searched on either side of the task's.")] = 5.0,
    sampler: Annotated[str, typer.Option(help="tpe or gp, after Sobol start points.")] = "tpe",
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Optuna storage; with --study from GAMMAOPT_STORAGE too.",
            show_default="SQLite in the study's folder",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study.", show_default="runs/TASK-LOSS-OPTIMIZER-STEPS")
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Have `gammaopt worker`s on --storage train it, under that name.")
    ] = None,
    grace: Annotated[
        int, typer.Option(metavar="SECONDS", help="Silence after which a worker is taken for lost.")
    ] = 120,
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
    with usage_errors():
        from gammaopt.tuning import Remote, StudyPlan
        from gammaopt.tuning import tune as run

        plan = StudyPlan(
            task, loss, optimizer, steps, trials, seeds, confirm_seeds, cast("tuple[float, float]", gamma_range), seed,
            device, octaves=octaves, sampler=sampler,
        )  # fmt: skip
        folder = out or Path("runs") / plan.folder
        remote = None
        if study is not None:
            if jobs is not None:
                raise UsageError(f"jobs={jobs} would train here, and the workers of --study {study} train; give one")
            remote, jobs = Remote(study, grace, (lambda _: None) if quiet else on_stderr), 1
            storage = storage or os.environ.get("GAMMAOPT_STORAGE")
        if jobs is None:
            jobs = len(os.sched_getaffinity(0)) if device == "cpu" else 1
        finished = (folder / "result.json").exists()
        line = (
            "This study is finished; writing its report again."
            if finished
            else None
            if gamma_range
            else range_line(plan)
        )
        with study_progress(plan, quiet=quiet or finished) as show:
            told = after_line(None if quiet else line, show)
            result = run(plan, folder, storage=storage, jobs=jobs, remote=remote, on_progress=told)
        _tell(result, folder, json, quiet)


app.command()(worker)
app.command()(slurm)
for _command in COMMANDS:
    app.command()(_command)


@app.command()
def portrait(
    task: Annotated[str, typer.Argument(help="Task to draw; `gammaopt tasks` lists them.")],
    loss: Annotated[str | None, typer.Option(help="mse or cross_entropy.", show_default="the task's")] = None,
    optimizer: Annotated[str, typer.Option(help="sgd, adam or adamw.")] = "sgd",
    steps: Annotated[
        list[int] | None, typer.Option(help="Budget; give it again for several.", show_default="300")
    ] = None,
    gammas: Annotated[
        tuple[float, float, int], typer.Option(metavar="LO HI N", help="Lowest and highest γ, and how many.")
    ] = (0.01, 1000.0, 11),
    rates: Annotated[
        tuple[float, float, int] | None,
        typer.Option(metavar="LO HI N", help="Lowest and highest rate, and how many.", show_default="set by the task"),
    ] = None,
    unit: Annotated[str, typer.Option(help="law: rates are c in η = c·s(γ); eta: they are η.")] = "law",
    seeds: Annotated[int, typer.Option(help="Seeds at which every cell is trained.")] = 1,
    width: Annotated[int | None, typer.Option(help="Of the hidden layers.", show_default="the task's")] = None,
    depth: Annotated[
        int | None, typer.Option(help="Weight layers L, or blocks of a ViT or ResNet.", show_default="the task's")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder.", show_default="runs/portrait-TASK-…")] = None,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, …")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print the exponents as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Train a grid of (γ, η) and draw its phase portrait with the predicted edges on it.

    Goes on where it stopped if it is started again; new γ, rates, seeds or budgets compute what is new only.
    """
    with usage_errors():
        from gammaopt._portrait_command import draw

        with _run_steps(quiet) as show:
            drawn = draw(
                task=task, loss=loss, optimizer=optimizer, budgets=steps or [300], gammas=gammas, rates=rates,
                unit=unit, seeds=seeds, width=width, depth=depth, out=out, device=device, on_progress=show,
            )  # fmt: skip
        typer.echo(_as_json(drawn.rows) if json else _as_table(drawn.rows, drawn.no_rows))
        console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        if drawn.others:
            console.print(
                f"The folder holds {drawn.others:,} results of other γ, rates, seeds or budgets too. They stay in\n"
                "runs.jsonl; picture, exponents and portrait.npz are of this grid alone.",
                markup=False,
            )
        console.print(f"Picture: {drawn.picture}", markup=False)


@data.command()
def check(
    path: Annotated[Path, typer.Argument(help="Folder of CIFAR-5M, MNIST-1M, TinyImageNet, or images by class.")],
    fast: Annotated[
        bool, typer.Option("--fast", help="Look at names, sizes and labels; don't read the images.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Say what a folder of images holds and what is wrong with it; exit code 1 if something is.

    Reads every image once and writes nothing.
    """
    with usage_errors():
        from gammaopt._data_command import check_folder, progress

        with progress(quiet) as show:
            checked = check_folder(path, fast=fast, on_progress=show)
        typer.echo(str(checked))
        if checked.problems:
            raise typer.Exit(1)


def _as_json(rows: list[ExponentRow]) -> str:
    import dataclasses
    import json

    return json.dumps([dataclasses.asdict(row) for row in rows], ensure_ascii=False)


def _as_table(rows: list[ExponentRow], no_rows: str = "") -> str:
    if not rows:
        return no_rows
    lines = [f"{'steps':>7}  {'exponent of the':<15}  {'where':<5}  predicted  measured  95 % interval"]
    lines += [
        f"{row.budget:>7,}  {row.what:<15}  {row.side}  {row.predicted:>9.2f}  {row.measured:>8.2f}  "
        + ("too few γ" if row.interval is None else f"{row.interval[0]:.2f} … {row.interval[1]:.2f}")
        for row in rows
    ]
    return "\n".join(lines)


@contextmanager
def _run_steps(quiet: bool) -> Iterator[Callable[[RunSteps], None]]:
    """A bar with run-steps per second on a terminal, a line for each tenth elsewhere, nothing if quiet."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    start, percent = time.monotonic(), tenths()

    def speed(progress: RunSteps) -> str:
        now = progress.done - progress.restored
        return f"{now / max(1e-9, time.monotonic() - start):,.0f} run-steps/s"

    if quiet or not console.is_terminal:

        def line(progress: RunSteps) -> None:
            if not quiet and (now := percent(progress.done, progress.total)) is not None:
                typer.echo(f"{now} % · {speed(progress)}", err=True)

        yield line
        return
    columns = (TextColumn("training"), BarColumn(bar_width=20), TextColumn("{task.fields[speed]}"))
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        row = bar.add_task("", total=None, speed="")
        yield lambda progress: bar.update(row, total=progress.total, completed=progress.done, speed=speed(progress))


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
