"""What a study asks of the record of a run, whoever trained it: a bundled task's, or a user's own function."""

from __future__ import annotations

from typing import Protocol

from gammaopt.online.record import Curve


class Record(Protocol):
    """One run's γ, rate, seed, scores and curve. The plan says which attribute is the score."""

    @property
    def gamma(self) -> float:
        """Feature-learning strength."""

    @property
    def lr(self) -> float:
        """What the optimizer was given: the rate at γ = 1."""

    @property
    def seed(self) -> int:
        """Of initialisation and data."""

    @property
    def steps(self) -> int:
        """The budget of the run."""

    @property
    def effective_lr(self) -> float:
        """η = ``lr``·s(γ)."""

    @property
    def diverged_at(self) -> int | None:
        """The step, from 1, at which the run diverged; ``None`` if it did not."""

    @property
    def curve(self) -> Curve:
        """The run in time, for its picture."""

    @property
    def reports(self) -> tuple[tuple[int, float], ...]:
        """(step, score so far), at most 40, log-spaced."""

    def to_json(self) -> str:
        """One line of strict JSON."""
