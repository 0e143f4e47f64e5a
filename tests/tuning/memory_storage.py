"""A storage in memory that has what a coordinator and workers ask of a server's."""

from __future__ import annotations

import time
from types import SimpleNamespace

import optuna
from optuna.trial import TrialState


class MemoryStorage(optuna.storages.InMemoryStorage):
    """Keeps when signs of life came; nobody is reaped."""

    def __init__(self) -> None:
        super().__init__()
        self.away_until = -float("inf")
        self.grace_period: int | None = None
        self.patience = 0.0
        self.beats: list[float] = []
        self.last_beat: dict[int, float] = {}
        self.engine = SimpleNamespace(dispose=lambda: None)

    def record_heartbeat(self, trial_id: int) -> None:
        self.beats.append(time.monotonic())
        self.last_beat[trial_id] = self.beats[-1]

    def silent(self, study_id: int, seconds: float) -> set[int]:
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        return {each._trial_id for each in running if time.monotonic() - self.last_beat[each._trial_id] > seconds}

    def remove_session(self) -> None: ...
