"""The frozen plan of a study: everything that decides its numbers, written down before the first run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gammaopt._errors import UsageError, at_least, one_of, positive
from gammaopt._laws import SMALLEST_FLOAT32_GAMMA, EtaLaw
from gammaopt.online.tasks import Task, get_task
from gammaopt.online.train import FAMILIES, OPTIMIZERS, Recipe

LAW_VERSION = 1  # of the formulas behind η*(γ): a study made under other formulas is another study
CONFIRM_OFFSET = 500_000  # distance between tuning and confirmation seeds


@dataclass(frozen=True)
class StudyPlan:
    """What a study will run. Equal plans give equal studies; a folder holds one.

    Args:
        task: name of a bundled task.
        loss: one of the task's losses; its default if ``None``.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        steps: batches in each run's one pass; the task's default if ``None``.
        trials: K·M, the budget of (γ, η) cells of the tuned arm and of rates at γ = 1; ≥ 4.
        seeds: seeds each trial is averaged over.
        confirm_seeds: fresh seeds for the confirmation; ≥ 2, and 10 or more for a result to be shown.
        gamma_range: lowest and highest γ searched.
        seed: base of every random choice.
        device: where the runs train.
    """

    task: str
    loss: str | None = None
    optimizer: str = "sgd"
    steps: int | None = None
    trials: int = 32
    seeds: int = 3
    confirm_seeds: int = 12
    gamma_range: tuple[float, float] = (0.01, 100.0)
    seed: int = 0
    device: str = "cpu"
    law_version: int = LAW_VERSION

    def __post_init__(self) -> None:
        task = get_task(self.task)
        if self.loss is None:
            object.__setattr__(self, "loss", task.losses[0])
        if self.steps is None:
            object.__setattr__(self, "steps", task.steps)
        one_of("loss", str(self.loss), task.losses)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name, minimum in {"steps": 1, "trials": 4, "seeds": 1, "confirm_seeds": 2, "seed": 0}.items():
            at_least(name, getattr(self, name), minimum)
        for name in ("seeds", "confirm_seeds"):
            if getattr(self, name) > CONFIRM_OFFSET:
                raise UsageError(f"{name}={getattr(self, name)} is too many; give at most {CONFIRM_OFFSET}")
        if not (isinstance(self.gamma_range, Sequence) and len(self.gamma_range) == 2):
            raise UsageError(f"gamma_range={self.gamma_range} is no pair; give the lowest and the highest γ")
        low, high = (positive("gamma", value) for value in self.gamma_range)
        if not low < high:
            raise UsageError(f"gamma_range={low:g} {high:g} is empty; give the lower γ first")
        object.__setattr__(self, "gamma_range", (low, high))
        _check_device(self.device)

    @property
    def rates(self) -> int:
        """M: how many of the rates at γ = 1 somebody tries who doesn't tune γ: about √(K·M), at least 4."""
        return max(4, round(math.sqrt(self.trials)))

    @property
    def tuning_seeds(self) -> range:
        """Seeds that every trial is averaged over."""
        start = self.seed * 2 * CONFIRM_OFFSET
        return range(start, start + self.seeds)

    @property
    def fresh_seeds(self) -> range:
        """Seeds that no trial has seen, for the confirmation."""
        start = self.seed * 2 * CONFIRM_OFFSET + CONFIRM_OFFSET
        return range(start, start + self.confirm_seeds)

    @property
    def definition(self) -> Task:
        """The task behind the name."""
        return get_task(self.task)

    @property
    def base_lr(self) -> float:
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
            dtype=torch.float64 if self.gamma_range[0] < SMALLEST_FLOAT32_GAMMA else torch.float32,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {**dataclasses.asdict(self), "gamma_range": list(self.gamma_range)}

    @property
    def digest(self) -> str:
        """Eight hex digits that name the plan; the device is not part of it."""
        values = {name: value for name, value in self.to_dict().items() if name != "device"}
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4).hexdigest()

    @property
    def folder(self) -> str:
        """Default name of the folder that holds the study."""
        return f"{self.task}-{self.loss}-{self.optimizer}-{self.steps}"

    def command(self) -> str:
        """The command line that runs this plan."""
        low, high = self.gamma_range
        words: list[object] = ["gammaopt", "tune", self.task, "--loss", self.loss, "--optimizer", self.optimizer]
        words += ["--steps", self.steps, "--trials", self.trials, "--seeds", self.seeds]
        words += ["--confirm-seeds", self.confirm_seeds, "--gamma-range", low, high]
        words += ["--device", self.device, "--seed", self.seed]
        return shlex.join(map(str, words))


def _check_device(name: str) -> None:
    import torch

    try:
        torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}; choose cpu, or cuda on a machine that has it") from None
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise UsageError(f"device {name!r} can't be used: {reason}; choose cpu") from None
