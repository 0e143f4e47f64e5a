"""Tasks on all cores: a failing task and Ctrl-C end the others soon, and what was made until then is kept."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
from _sweep import on_all_cores, resumed


def test_a_failing_task_ends_the_queue_and_what_ran_beside_it_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "slept.jsonl"
    tasks = {"fails": -1.0, **{str(number): 1.0 for number in range(40)}}
    with pytest.raises(ValueError, match="must be non-negative"):
        resumed(time.sleep, tasks, kept, 2)
    names = [json.loads(line)[0] for line in kept.read_text().splitlines()]
    assert "0" in names
    assert len(names) <= 4  # one ran beside it, and three were handed out


def test_ctrl_c_ends_the_processes_and_keeps_what_was_done() -> None:
    before, kept = set(multiprocessing.active_children()), set[int]()

    def keep(number: int, _: None) -> None:
        if not kept:
            kept.add(number)
            time.sleep(3)  # the other process's short task ends meanwhile
            raise KeyboardInterrupt
        kept.add(number)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        on_all_cores(time.sleep, [0.0, 0.5, 120.0, 120.0, 120.0, 120.0, 120.0], 2, keep)
    assert time.monotonic() - began < 100
    assert kept == {0, 1}
    assert set(multiprocessing.active_children()) <= before
