"""A storage in memory that has what a coordinator and workers ask of a server's."""

from __future__ import annotations

import time
from types import SimpleNamespace

import optuna


class MemoryStorage(optuna.storages.InMemoryStorage):
    """Keeps when signs of life came; nobody is reaped."""

    def __init__(self) -> None:
        super().__init__()
        self.away_until = -float("inf")
        self.grace_period: int | None = None
        self.beats: list[float] = []
        self.engine = SimpleNamespace(dispose=lambda: None)

    def record_heartbeat(self, trial_id: int) -> None:
        self.beats.append(time.monotonic())

    def remove_session(self) -> None: ...
