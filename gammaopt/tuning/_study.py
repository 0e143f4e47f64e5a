"""``study``: everything around a user's own training function that ``tune`` has around a bundled task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from gammaopt._errors import UsageError, require
from gammaopt._files import write_for_user
from gammaopt._laws import EtaLaw
from gammaopt.tuning._folder import Cell, Folder
from gammaopt.tuning._objective import (
    PLATEAU_STEPS,
    Objective,
    ObjectivePlan,
    ObjectiveRecord,
    check_objective,
    objective_name,
    source_of,
)
from gammaopt.tuning._result import TuneResult
from gammaopt.tuning._space import OCTAVES
from gammaopt.tuning._trial import DivergedError, ObjectiveTrial
from gammaopt.tuning._tune import Progress, run_study


def study(
    objective: Callable[[ObjectiveTrial], object],
    out: str | Path,
    *,
    law: EtaLaw,
    base_lr: float,
    steps: int,
    gamma_range: tuple[float, float] | None = None,
    plateau_steps: float = PLATEAU_STEPS,
    octaves: float = OCTAVES,
    trials: int = 32,
    seeds: int = 3,
    confirm_seeds: int = 12,
    seed: int = 0,
    sampler: Literal["tpe", "gp"] = "tpe",
    metric: str = "score",
    direction: Literal["maximize", "minimize"] = "maximize",
    percent: bool = False,
    diverged_score: float | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    flops_per_step: float | None = None,
    storage: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    quiet: bool = False,
) -> TuneResult:
    """Tune γ and the rate of your own training function, and confirm on fresh seeds: is it better than γ = 1?

    The function trains one run, as its :class:`ObjectiveTrial` says: a model wrapped with ``trial.gamma``, a gammaopt
    optimizer with ``trial.lr``, everything random from ``trial.seed``, ``trial.steps`` optimizer steps. It returns its
    score; if it returns nothing, the mean of its reports is the score, which for the accuracy on each batch before the
    step that trains on it is the prequential accuracy. A run diverged if it reports or returns NaN or infinity, raises
    :class:`DivergedError`, or scores worse than ``diverged_score``.

    The runs are ``tune``'s: ``trials`` cells of (γ, rate), as many rates at γ = 1, each over the same ``seeds``, then
    the best of both on ``confirm_seeds`` fresh seeds. Everything lies in the folder, where ``gammaopt status``,
    ``report``, ``confirm`` and ``export`` find it. Called again with the same arguments it goes on where it stopped and
    trains no finished run again, also after an error in the function, which is raised as it is with the cell in its
    notes. What the plan says must stay the same; the function itself may be mended.

    Args:
        objective: the training function, of one argument.
        out: folder of the study; made if missing.
        law: of your network, optimizer and loss, e.g. ``EtaLaw(depth=3, loss="cross_entropy")``; with the ``knee`` that
            ``wrap`` measured unless it is in mean-field form. It sets the range of γ and ``trial.effective_lr``; the
            optimizer has its own from the wrapped model.
        base_lr: about the best rate at γ = 1; rates are searched ``octaves`` on either side, at every γ alike.
        steps: optimizer steps of a run, the same for all.
        gamma_range: lowest and highest γ searched; by default what ``steps`` can train (0.01 to γ_max), as is printed.
        plateau_steps: T₁, how many steps γ = 1 waits before it learns, for that default.
        octaves, trials, seeds, confirm_seeds, seed, sampler: as in :class:`StudyPlan`.
        metric: what the score is called in the report.
        direction: ``"maximize"`` or ``"minimize"`` the score.
        percent: scores are fractions, to be shown in percent.
        diverged_score: what a diverged run is worth, and the limit beyond which a run counts as diverged: worse than
            any run that trains. 0 by default, as for an accuracy; to be given when minimising.
        settings: whatever else decides the numbers (a width, a data set's name …); JSON values, part of the plan, and
            handed to the function as ``trial.settings``.
        batch_size, flops_per_step: samples and FLOPs of a step, so that the report can state both budgets in them.
        storage: Optuna storage URL; SQLite in the folder if ``None``.
        on_progress: called before the first run and after each, instead of the lines on stderr.
        quiet: no lines on stderr.

    Returns:
        The result, also written to ``result.json`` and ``report.html`` in the folder.

    Raises:
        UsageError: for a bad argument or score, another study in the folder, or a folder in use.
        MissingExtraError: without ``pip install 'gammaopt[tune]'``.

    Example:
        >>> import tempfile, torch, gammaopt
        >>> from gammaopt.tuning import study
        >>> def train(trial):
        ...     torch.manual_seed(trial.seed)
        ...     net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        ...     model = gammaopt.wrap(net, trial.gamma, depth=2, parametrization="mean_field")
        ...     optimizer = gammaopt.SGD(model.parameters(), lr=trial.lr)
        ...     for step in range(trial.steps):
        ...         x = torch.randn(32, 8)
        ...         loss = torch.nn.functional.mse_loss(model(x), x[:, :1] * x[:, 1:2])
        ...         trial.report(step, loss)  # before the step that trains on it
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> with tempfile.TemporaryDirectory() as out:
        ...     result = study(train, out, law=gammaopt.EtaLaw(depth=2), base_lr=0.1, steps=5, trials=4, seeds=1,
        ...                    confirm_seeds=2, metric="loss", direction="minimize", diverged_score=100.0, quiet=True)
        >>> result.verdict in ("confirmed", "not confirmed", "worse", "range too small")
        True
    """
    check_objective(objective)
    if not isinstance(law, EtaLaw):
        raise UsageError(f"law={law!r} is no law; give gammaopt.EtaLaw(depth, optimizer, loss)")
    plan = ObjectivePlan(
        objective=objective_name(objective),
        depth=law.depth,
        optimizer=law.optimizer,
        loss=law.loss,
        knee=law.knee,
        lazy_exponent=law.lazy_exponent,
        base_lr=base_lr,
        steps=steps,
        trials=trials,
        seeds=seeds,
        confirm_seeds=confirm_seeds,
        gamma_range=gamma_range,  # type: ignore[arg-type]  # None is replaced by the trainable range
        plateau_steps=plateau_steps,
        octaves=octaves,
        sampler=sampler,
        seed=seed,
        metric=metric,
        direction=direction,
        percent=percent,
        diverged_score=diverged_score,
        settings=dict(settings) if isinstance(settings, Mapping) else settings or {},
        batch_size=batch_size,
        flops_per_step=flops_per_step,
        source=source_of(objective),
    )
    require("rich", "tune")
    from gammaopt._progress import after_line, range_line, study_progress

    finished = (Path(out) / "result.json").exists()
    with study_progress(plan, quiet=quiet or finished or on_progress is not None) as show:
        line = None if quiet or finished or gamma_range is not None else range_line(plan)
        told = after_line(line, on_progress or show)
        return run_study(plan, out, trainer_of(plan, objective), storage=storage, on_progress=told)


def confirm(objective: Callable[[ObjectiveTrial], object], out: str | Path, *, seeds: int) -> TuneResult:
    """Compare a study's choices with γ = 1 on ``seeds`` fresh seeds, those of the study first. Trains what is missing.

    The study itself stays as it is; the report is ``confirm-SEEDS.html`` in its folder. ``gammaopt confirm`` does the
    same.

    Args:
        objective: the study's training function.
        out: folder of the study.
        seeds: how many fresh seeds, at least 2.

    Raises:
        UsageError: if the folder holds no study of this function, or one that is still searching.
    """
    check_objective(objective)
    from gammaopt.report import html_report
    from gammaopt.tuning._state import confirm_in_folder, read_folder

    out = Path(out)
    state = read_folder(out)
    if not isinstance(state.plan, ObjectivePlan):
        raise UsageError(f"{out} holds a study of {state.plan.title}; run `gammaopt confirm {out} --seeds {seeds}`")
    result = confirm_in_folder(out, state, seeds, trainer_of(state.plan, objective))
    write_for_user(out / f"confirm-{seeds}.html", html_report(result))
    return result


def trainer_of(plan: ObjectivePlan, objective: Objective) -> Callable[[Folder], AbstractContextManager[_Trainer]]:
    """Who trains the cells of a study of a user's function: this process, one after the other.

    Raises:
        UsageError: if the study is of another function.
    """
    name = objective_name(objective)
    if name != plan.objective:
        raise UsageError(f"the study is of the function {plan.objective}, and this is {name}; give that one")
    return lambda _: nullcontext(_Trainer(plan, objective))


class _Trainer:
    def __init__(self, plan: ObjectivePlan, objective: Objective) -> None:
        self._plan, self._objective = plan, objective

    def run(self, cells: Iterable[Cell]) -> Iterator[ObjectiveRecord]:
        """Train the cells and yield each record as soon as it is there: what was finished is kept."""
        for cell in cells:
            yield self._train(cell)

    def _train(self, cell: Cell) -> ObjectiveRecord:
        trial = ObjectiveTrial(self._plan, cell)
        try:
            try:
                returned = self._objective(trial)
            except DivergedError:
                trial._diverged()
                returned = None
            return trial._record(returned)
        except Exception as error:
            again = "mend it and call study() again with the same arguments: it goes on from there"
            error.add_note(
                f"in the run γ = {cell.gamma:.6g}, lr = {cell.lr:.6g}, seed = {cell.seed} of {self._plan.objective}"
                + ("" if isinstance(error, UsageError) else f"; {again}")
            )
            raise
