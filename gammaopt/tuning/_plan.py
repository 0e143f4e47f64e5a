"""The frozen plan of a bundled task's study: everything that decides its numbers, written down before the first run."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gammaopt._errors import at_least, one_of
from gammaopt._laws import FLOAT64_BELOW_GAMMA, EtaLaw
from gammaopt.online._device import check_device
from gammaopt.online.record import RunRecord
from gammaopt.online.tasks import Task, get_task
from gammaopt.online.train import FAMILIES, OPTIMIZERS, Recipe
from gammaopt.tuning._budget import CONFIRM_OFFSET as CONFIRM_OFFSET
from gammaopt.tuning._budget import LAW_VERSION, Plan, RunBudget
from gammaopt.tuning._space import OCTAVES, trainable_gammas


@dataclass(frozen=True)
class StudyPlan(Plan):
    """What a study of a bundled task will run. Equal plans give equal studies; a folder holds one.

    Args:
        task: name of a bundled task.
        loss: one of the task's losses; its default if ``None``.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        steps: batches in each run's one pass; the task's default if ``None``.
        trials: K·M, the budget of (γ, η) cells of the tuned arm and of rates at γ = 1; ≥ 4.
        seeds: seeds each trial is averaged over.
        confirm_seeds: fresh seeds for the confirmation; ≥ 2, and 10 or more for a result to be shown.
        gamma_range: lowest and highest γ searched; by default what the step budget can train, see
            :func:`trainable_gammas`.
        seed: base of every random choice.
        device: where the runs train.
        octaves: how far on either side of the task's base rate rates are searched.
        sampler: ``"tpe"`` or ``"gp"``, after Sobol start points.
    """

    task: str
    loss: str | None = None
    optimizer: str = "sgd"
    steps: int | None = None
    trials: int = 32
    seeds: int = 3
    confirm_seeds: int = 12
    gamma_range: tuple[float, float] = None  # type: ignore[assignment]  # replaced by the trainable range
    seed: int = 0
    device: str = "cpu"
    law_version: int = LAW_VERSION
    octaves: float = OCTAVES
    sampler: str = "tpe"

    metric: ClassVar[str] = "prequential_accuracy"  # type: ignore[misc]
    direction: ClassVar[str] = "maximize"  # type: ignore[misc]
    metric_at_end: ClassVar[str | None] = "final_accuracy"  # type: ignore[misc]
    scale: ClassVar[float] = 100.0  # type: ignore[misc]

    def __post_init__(self) -> None:
        task = get_task(self.task)
        if self.loss is None:
            object.__setattr__(self, "loss", task.losses[0])
        if self.steps is None:
            object.__setattr__(self, "steps", task.steps)
        one_of("loss", str(self.loss), task.losses)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        given: object = self.gamma_range
        if given is None and at_least("steps", self.steps, 1):  # type: ignore[arg-type]
            object.__setattr__(self, "gamma_range", self.trainable_range())
        self._check_budget()
        check_device(self.device)

    def trainable_range(self) -> tuple[float, float]:
        """The range of γ that its step budget can train."""
        return trainable_gammas(self.law, int(self.steps or 1), self.definition.plateau_steps.get(self.law.loss, 1.0))

    @property
    def definition(self) -> Task:
        """The task behind the name."""
        return get_task(self.task)

    @property
    def base_lr(self) -> float:  # type: ignore[override]
        """The centre of the searched rates, at γ = 1."""
        return self.definition.base_lr[FAMILIES[self.optimizer], self.loss]  # type: ignore[index]

    @property
    def law(self) -> EtaLaw:
        """The law that turns a rate at γ = 1 into the rate at γ."""
        return EtaLaw(self.definition.depth, FAMILIES[self.optimizer], self.loss)  # type: ignore[arg-type]

    def recipe(self) -> Recipe:
        """How its runs are trained."""
        import torch

        task = self.definition
        return Recipe(
            build=task.build,
            stream=task.stream(),
            loss=self.loss,  # type: ignore[arg-type]
            optimizer=self.optimizer,  # type: ignore[arg-type]
            steps=int(self.steps or task.steps),
            batch_size=task.batch_size,
            depth=task.depth,
            device=self.device,
            # Both arms alike: centring in float32 would cost the smallest γ its digits.
            dtype=torch.float64 if self.gamma_range[0] < FLOAT64_BELOW_GAMMA else torch.float32,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {**dataclasses.asdict(self), "gamma_range": list(self.gamma_range)}

    @property
    def folder(self) -> str:
        """Default name of the folder that holds the study."""
        return f"{self.task}-{self.loss}-{self.optimizer}-{self.steps}"

    def command(self, *, out: str | None = None, storage: str | None = None, study: str | None = None) -> str:
        """The command line that runs this plan."""
        low, high = self.gamma_range
        words: list[object] = ["gammaopt", "tune", self.task, "--loss", self.loss, "--optimizer", self.optimizer]
        words += ["--steps", self.steps, "--trials", self.trials, "--seeds", self.seeds]
        words += ["--confirm-seeds", self.confirm_seeds, "--gamma-range", low, high]
        words += ["--device", self.device, "--seed", self.seed]
        words += ["--octaves", self.octaves] if self.octaves != OCTAVES else []
        words += ["--sampler", self.sampler] if self.sampler != "tpe" else []
        for option, value in {"--out": out, "--storage": storage, "--study": study}.items():
            words += [] if value is None else [option, value]
        return shlex.join(map(str, words))

    @property
    def title(self) -> str:
        """Task, loss and optimizer."""
        return f"{self.task}, {self.loss}, {self.optimizer}".replace("_", " ")

    def names(self) -> dict[str, Any]:
        """Task, loss and optimizer."""
        return {"task": self.task, "loss": self.loss, "optimizer": self.optimizer}

    @property
    def curve(self) -> str:  # type: ignore[override]
        """What a run's curve shows."""
        return f"online loss ({str(self.loss).replace('_', ' ')})"

    @property
    def source(self) -> Path:  # type: ignore[override]
        """The whole package: the task's code is in it, and what trains it."""
        return Path(__file__).parents[1]

    def read_record(self, data: dict[str, Any]) -> RunRecord:
        """See :meth:`RunRecord.from_dict`."""
        return RunRecord.from_dict(data)

    def record_fields(self) -> list[str]:
        """Those of :class:`RunRecord` but the curve."""
        return [field.name for field in dataclasses.fields(RunRecord) if field.name != "curve"]

    def run_budget(self) -> RunBudget:
        """Steps, samples, and the FLOPs of network and frozen copy, counted on one batch."""
        recipe = self.recipe()
        return RunBudget(recipe.steps, recipe.steps * recipe.batch_size, recipe.steps * flops_per_step(recipe))


def flops_per_step(recipe: Recipe) -> float:
    """Floating-point operations of one step of one run: forward and backward, and the frozen copy's forward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.random.fork_rng([]):
        net, counter = recipe.build(), FlopCounterMode(display=False)
    inputs = torch.zeros(recipe.batch_size, *recipe.stream.shape)
    with counter:
        net(inputs).sum().backward()
        with torch.no_grad():
            net(inputs)
    return float(counter.get_total_flops())
