"""A study of a user's own training function: its frozen plan, the record of a run, and the function itself.

The function can't be frozen, but what it is told can: everything that decides a number comes to it through its trial,
so that γ, rate, seed, steps and the user's own settings are those of the plan.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gammaopt._errors import UsageError, at_least, one_of, positive
from gammaopt._laws import EtaLaw, Loss, OptimizerFamily
from gammaopt.online.record import Curve
from gammaopt.tuning._budget import LAW_VERSION, Plan, RunBudget
from gammaopt.tuning._space import OCTAVES, trainable_gammas

PLATEAU_STEPS = 25.0  # T₁, about that of digits under cross-entropy; parity waits longer: see online.tasks

Objective = Callable[[Any], Any]


@dataclass(frozen=True)
class ObjectiveRecord:
    """What one run of a user's function earned.

    Attributes:
        gamma, lr, seed, steps: what was run; ``lr`` is the rate at γ = 1.
        effective_lr: η = ``lr``·s(γ), the rate after the law.
        score: what it returned, or the mean of its reports; the plan's ``diverged_score`` if it diverged.
        diverged_at: step (from 1) whose report was not finite; ``steps`` + 1 if only the score told; else ``None``.
        reports: (step, value), at most 40: means of what was reported between log-spaced steps.
    """

    gamma: float
    lr: float
    seed: int
    steps: int
    effective_lr: float
    score: float
    diverged_at: int | None
    reports: tuple[tuple[int, float], ...]

    @property
    def curve(self) -> Curve:
        """The reports; what they measure is the user's own, so there is no accuracy beside it."""
        return Curve(tuple(step for step, _ in self.reports), tuple(value for _, value in self.reports), ())

    def to_json(self) -> str:
        """One line of strict JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ObjectiveRecord:
        """The record that :meth:`to_json` wrote. Raises ``KeyError``/``TypeError`` for anything else."""
        return cls(**{**data, "reports": tuple((int(step), float(value)) for step, value in data["reports"])})


@dataclass(frozen=True)
class ObjectivePlan(Plan):
    """What a study of a user's function will run. See :func:`gammaopt.tuning.study` for the fields.

    ``source`` is the file that the function stands in. It is no part of the plan: a mistake in the function may be
    mended on the way.
    """

    objective: str
    depth: float
    optimizer: OptimizerFamily
    loss: Loss
    knee: float
    lazy_exponent: float | None
    base_lr: float
    steps: int
    trials: int = 32
    seeds: int = 3
    confirm_seeds: int = 12
    gamma_range: tuple[float, float] = None  # type: ignore[assignment]  # replaced by the trainable range
    plateau_steps: float = PLATEAU_STEPS
    octaves: float = OCTAVES
    sampler: str = "tpe"
    seed: int = 0
    metric: str = "score"
    direction: str = "maximize"
    percent: bool = False
    diverged_score: float | None = None
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    batch_size: int | None = None
    flops_per_step: float | None = None
    law_version: int = LAW_VERSION
    source: Path = field(default_factory=Path.cwd, compare=False)

    metric_at_end: ClassVar[str | None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("base_lr", positive("base_lr", self.base_lr))
        put("plateau_steps", positive("plateau_steps", self.plateau_steps))
        one_of("direction", self.direction, ("maximize", "minimize"))
        if not (isinstance(self.metric, str) and self.metric.strip()):
            raise UsageError(f"metric={self.metric!r} is no name; say what the score is, e.g. metric='accuracy'")
        if self.diverged_score is not None:
            limit = number(self.diverged_score)
            if limit is None or not math.isfinite(limit):
                raise UsageError(f"diverged_score={self.diverged_score!r} is no finite number; give a bad score")
            put("diverged_score", limit)
        elif self.direction == "minimize":
            raise UsageError(
                "direction='minimize' needs diverged_score: what a diverged run is worth, higher than the score of "
                "any run that trains, e.g. ten times that of an untrained network"
            )
        if self.batch_size is not None:
            at_least("batch_size", self.batch_size, 1)
        if self.flops_per_step is not None:
            put("flops_per_step", positive("flops_per_step", self.flops_per_step))
        put("settings", _json_values(self.settings))
        given: object = self.gamma_range
        if given is None and at_least("steps", self.steps, 1):
            put("gamma_range", trainable_gammas(self.law, self.steps, self.plateau_steps))
        self._check_budget()

    @property
    def law(self) -> EtaLaw:
        """The law that turns a rate at γ = 1 into the rate at γ."""
        return EtaLaw(self.depth, self.optimizer, self.loss, self.knee, lazy_exponent=self.lazy_exponent)

    @property
    def scale(self) -> float:  # type: ignore[override]
        """100 for a score that is shown in percent."""
        return 100.0 if self.percent else 1.0

    @property
    def worst(self) -> float:
        """What a diverged run is worth."""
        return 0.0 if self.diverged_score is None else self.diverged_score

    @property
    def curve(self) -> str:  # type: ignore[override]
        """What a run's curve shows."""
        return "reported value"

    @property
    def folder(self) -> str:
        """The function's name: studies in a storage are called by it."""
        return self.objective

    @property
    def title(self) -> str:
        """The function's name, loss and optimizer."""
        return f"{self.objective}, {self.loss}, {self.optimizer}".replace("_", " ")

    def names(self) -> dict[str, Any]:
        """The function's name, loss and optimizer."""
        return {"objective": self.objective, "loss": self.loss, "optimizer": self.optimizer}

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        values = {**dataclasses.asdict(self), "gamma_range": list(self.gamma_range)}
        del values["source"]
        return values

    def command(self, *, out: str | None = None, storage: str | None = None, study: str | None = None) -> str:
        """The call that makes this study."""
        shown, defaults = self.to_dict(), {each.name: each.default for each in dataclasses.fields(self)}
        law = {name: shown.pop(name) for name in ("depth", "optimizer", "loss", "knee", "lazy_exponent")}
        for name in ("objective", "plateau_steps", "law_version"):  # the range that the plateau gave is said
            del shown[name]
        if law["lazy_exponent"] is None:
            del law["lazy_exponent"]
        words = [self.objective, repr(out) if out else "…", f"law=EtaLaw({_arguments(law)})"]
        words += [_arguments({name: value for name, value in shown.items() if value and value != defaults[name]})]
        words += [f"storage={storage!r}"] if storage else []
        return f"gammaopt.tuning.study({', '.join(words)})"

    def option(self, name: str) -> str:
        """An argument of :func:`gammaopt.tuning.study`."""
        return f"`{name}`"

    def read_record(self, data: dict[str, Any]) -> ObjectiveRecord:
        """See :meth:`ObjectiveRecord.from_dict`."""
        return ObjectiveRecord.from_dict(data)

    def record_fields(self) -> list[str]:
        """Those of :class:`ObjectiveRecord` but the reports."""
        return [each.name for each in dataclasses.fields(ObjectiveRecord) if each.name != "reports"]

    def score(self, record: Any) -> float:
        """The record's ``score``, whatever the metric is called."""
        return float(record.score)

    def run_budget(self) -> RunBudget:
        """Steps, and samples and FLOPs as far as the user told them."""
        samples = None if self.batch_size is None else self.steps * self.batch_size
        return RunBudget(self.steps, samples, None if self.flops_per_step is None else self.steps * self.flops_per_step)


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _json_values(settings: object) -> dict[str, Any]:
    """The settings as they come back from a file: a study that goes on compares them."""
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise UsageError(f"settings={settings!r} is no dictionary with names; give e.g. settings={{'width': 64}}")
    for name, value in settings.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise UsageError(
                f"settings[{name!r}]={value!r} can't be written down; give numbers, strings, lists and dictionaries"
            ) from None
    values: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return values


def number(value: object) -> float | None:
    """A number or a tensor of one element as a float, ``None`` for anything else."""
    try:
        plain = value.item() if hasattr(value, "item") else value
        return None if isinstance(plain, (str, bytes, bool)) else float(plain)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def objective_name(objective: Objective) -> str:
    """What a user calls the function."""
    while isinstance(objective, functools.partial):
        objective = objective.func
    return str(getattr(objective, "__name__", type(objective).__name__))


def source_of(objective: Objective) -> Path:
    """The file that the function stands in; the working folder if there is none, as in a notebook."""
    while isinstance(objective, functools.partial):
        objective = objective.func
    code = objective if hasattr(objective, "__name__") else type(objective)
    try:
        file = Path(inspect.getsourcefile(code) or "")
    except TypeError:
        file = Path()
    return file if file.is_file() else Path.cwd()


def check_objective(objective: object) -> None:
    """Raise :class:`UsageError` unless it is a function of one argument."""
    if inspect.isclass(objective):
        raise UsageError(f"objective={objective.__name__} is a class; give a function, or an instance with __call__")
    if not callable(objective):
        raise UsageError(f"objective={objective!r} is no function; give a function of the trial")
    name = objective_name(objective)
    if inspect.iscoroutinefunction(objective) or inspect.isgeneratorfunction(objective):
        raise UsageError(f"objective={name} is asynchronous or a generator; give a function that returns its score")
    try:
        inspect.signature(objective).bind(None)
    except ValueError:  # a function in C may not tell
        return
    except TypeError:
        raise UsageError(
            f"objective={name}({', '.join(inspect.signature(objective).parameters)}) can't be called with a trial; "
            f"give a function of one argument, as {name}(trial)"
        ) from None


def load_objective(text: str) -> Objective:
    """The function called ``FILE.py:NAME``, or ``MODULE:NAME``.

    Raises:
        UsageError: if there is no such file or function.
    """
    where, _, name = text.rpartition(":")
    if not where:
        raise UsageError(f"objective={text!r} names no function; give FILE.py:NAME")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise UsageError(f"{where} is no file; give --objective FILE.py:NAME")
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(module.__name__, module)  # dataclasses look there
        sys.path.insert(0, str(Path(where).resolve().parent))  # as `python FILE.py` does, for what stands beside it
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name != where:
                raise
            raise UsageError(f"there is no module {where!r}; give --objective FILE.py:NAME") from None
    found = getattr(module, name, None)
    if found is None:
        raise UsageError(f"{where} has no function {name!r}; give --objective FILE.py:NAME")
    check_objective(found)
    objective: Objective = found
    return objective
