"""``gammaopt status``, ``report``, ``confirm`` and ``export``: any study, from its folder or from its storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gammaopt._terminal import on_stderr, usage_errors

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from gammaopt.tuning import TuneResult
    from gammaopt.tuning._folder import Folder as Folder_
    from gammaopt.tuning._state import StudyState
    from gammaopt.tuning._tune import Trains

Folder = Annotated[Path | None, typer.Argument(help="Folder of the study.", show_default="--storage and --study")]
Url = Annotated[
    str | None, typer.Option("--storage", metavar="URL", envvar="GAMMAOPT_STORAGE", help="Storage of its workers.")
]
Name = Annotated[str | None, typer.Option("--study", metavar="NAME", help="Its name in that storage.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]


def _read(folder: Path | None, storage: str | None, name: str | None) -> StudyState:
    from gammaopt._errors import UsageError, require

    for module in ("optuna", "scipy", "matplotlib"):
        require(module, "tune")
    from gammaopt.tuning._state import read_folder, read_storage

    if folder is not None and name is None:
        return read_folder(folder)
    if folder is not None or name is None or storage is None:
        raise UsageError("which study? Give its folder, or --storage URL --study NAME")
    return read_storage(storage, name)


def status(folder: Folder = None, storage: Url = None, study: Name = None, json: Json = False) -> None:
    """Show how far a study is. Changes nothing, and may be asked while it runs."""
    with usage_errors():
        state = _read(folder, storage, study)
        from gammaopt.tuning._state import summary

        figures = summary(state)
        if json:
            from json import dumps

            typer.echo(dumps(figures, ensure_ascii=False))
            return
        plan = state.plan
        typer.echo(f"{state.where}: {plan.title}, {plan.steps} steps")
        for name, arm in figures["arms"].items():
            best = arm["best"]
            tail = "" if best is None else f", best γ = {best['gamma']:.3g}, lr = {best['lr']:.3g}: "
            tail += "" if best is None else plan.shown(best["score"], decimals=1)
            typer.echo(f"  {name:<16}{arm['trials']:>5}/{plan.trials} trials, {arm['diverged']} diverged{tail}")
        confirm = figures["confirm"]
        of = "" if confirm["runs_total"] is None else f"/{confirm['runs_total']}"
        typer.echo(f"  {'confirm':<16}{confirm['runs']:>5}{of} runs on fresh seeds")
        if figures["queue"] is not None:
            typer.echo(f"  {'cells':<16}{_queue_in_words(figures['queue'])}")
        if figures["in_words"] is not None:
            typer.echo(figures["in_words"])


def _queue_in_words(counts: dict[str, int]) -> str:
    always = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "done"}
    if_any = {"FAIL": "lost and queued again", "PRUNED": "handed back or given up"}
    shown = {**always, **{state: words for state, words in if_any.items() if counts.get(state)}}
    return ", ".join(f"{counts.get(state, 0)} {words}" for state, words in shown.items())


def report(
    folder: Folder = None,
    storage: Url = None,
    study: Name = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the report.", show_default="report.html in the folder, or NAME.html")
    ] = None,
) -> None:
    """Write the HTML report of a finished study, and print its verdict."""
    with usage_errors():
        state = _read(folder, storage, study)
        _write_report(state.result(), out or (folder / "report.html" if folder else Path(f"{study}.html")))


def _write_report(result: TuneResult, out: Path) -> None:
    from gammaopt.report import html_report

    _written(out, html_report(result))
    typer.echo(result.in_words())
    on_stderr(f"Report: {out}")


def _written(path: Path, text: str) -> None:
    from gammaopt._files import write_for_user

    write_for_user(path, text, "give another --out")


def confirm(
    folder: Folder = None,
    storage: Url = None,
    study: Name = None,
    seeds: Annotated[
        int | None, typer.Option(help="Fresh seeds; those of the study come first.", show_default="the study's", min=2)
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes to train in; workers train a study with a storage.", min=1)] = 1,
    objective: Annotated[
        str | None, typer.Option(metavar="FILE.py:NAME", help="The function that a study of your own trains with.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the report.", show_default="[NAME-]confirm-SEEDS.html"),
    ] = None,
    json: Json = False,
) -> None:
    """Compare a study's choices with γ = 1 on fresh seeds, on more of them if you like. Trains what is missing."""
    with usage_errors():
        if folder is None and (jobs > 1 or objective is not None):
            from gammaopt._errors import UsageError

            given = f"jobs={jobs}" if jobs > 1 else f"objective={objective}"
            raise UsageError(f"{given} would train here, and the workers of a storage train its study; drop it")
        state = _read(folder, storage, study)
        from gammaopt._progress import runs_progress
        from gammaopt.tuning._state import confirm_in_folder, confirm_with_workers

        with runs_progress() as show:
            if folder is not None:
                result = confirm_in_folder(folder, state, seeds, _workers_of(state, jobs, objective), show)
            else:
                result = confirm_with_workers(str(storage), state, seeds, on_stderr, show)
        name = f"confirm-{len(result.confirm.seeds)}.html"
        from gammaopt.report import html_report

        target = out or (folder / name if folder else Path(f"{study}-{name}"))
        _written(target, html_report(result))
        typer.echo(result.to_json() if json else result.in_words(), nl=not json)
        on_stderr(f"Report: {target}")


def _workers_of(
    state: StudyState, jobs: int, objective: str | None
) -> Callable[[Folder_], AbstractContextManager[Trains]]:
    """Who trains what a confirmation lacks: processes, or a user's own function."""
    from gammaopt._errors import UsageError
    from gammaopt.tuning._objective import ObjectivePlan, load_objective
    from gammaopt.tuning._plan import StudyPlan
    from gammaopt.tuning._study import trainer_of
    from gammaopt.tuning._workers import Workers

    plan = state.plan
    if isinstance(plan, StudyPlan):
        if objective is not None:
            raise UsageError(f"{state.where} is a study of the bundled task {plan.task}; leave out --objective")
        return lambda folder: Workers(plan, jobs, checkpoints=folder.path)
    assert isinstance(plan, ObjectivePlan)
    if objective is not None:
        return trainer_of(plan, load_objective(objective))

    def none(_: Folder_) -> AbstractContextManager[Trains]:
        raise UsageError(
            f"{state.where} trains with your function {plan.objective}; give --objective FILE.py:NAME, "
            "or call gammaopt.tuning.confirm() with it"
        )

    return none


def export(
    folder: Folder = None,
    storage: Url = None,
    study: Name = None,
    what: Annotated[str, typer.Option(help="runs, or trials: means over the tuning seeds.")] = "runs",
    format: Annotated[str, typer.Option(help="csv, or jsonl: one JSON object a line, curves included.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="stdout")] = None,
) -> None:
    """Write what a study has measured so far as a table."""
    with usage_errors():
        from gammaopt._errors import one_of

        one_of("what", what, ("runs", "trials")), one_of("format", format, ("csv", "jsonl"))
        state = _read(folder, storage, study)
        from gammaopt.tuning._state import table

        text = table(state, what, format)
        if out is None:
            typer.echo(text, nl=False)
        else:
            _written(out, text)


COMMANDS: tuple[Callable[..., None], ...] = (status, report, confirm, export)
