"""What tests of the ensemble ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from gammaopt.online import ensemble


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def look_every(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``look_every(steps)`` has a stack looked at after so many steps, and a checkpoint written at each look."""

    def look(steps: int) -> None:
        monkeypatch.setattr(ensemble, "CHECKPOINT_SECONDS", 0.0)
        monkeypatch.setattr(ensemble, "LOOK_EVERY", steps)

    return look
