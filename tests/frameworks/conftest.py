"""Run a function of a test file in two processes that talk over gloo on the loopback interface.

This file is also the program that those processes run. They meet through a file, so no port has to be free.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import gammaopt

WORLD = 2
LIMIT = 90  # seconds; a hang is a failure

Launch = Callable[[str, str], list[Any]]


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """``in_two_processes(__file__, "function")`` → what ``function(rank, folder)`` returned on ranks 0 and 1."""

    def launch(file: str, function: str) -> list[Any]:
        folder = tmp_path_factory.mktemp(function)
        root = Path(gammaopt.__file__).parent.parent
        environment = {
            **os.environ,
            "PYTHONPATH": str(root),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        logs = [folder / f"{rank}.log" for rank in range(WORLD)]
        with ExitStack() as stack:
            children = [
                subprocess.Popen(
                    [sys.executable, __file__, file, function, str(rank), str(folder)],
                    env=environment,
                    stdout=stack.enter_context(logs[rank].open("w")),
                    stderr=subprocess.STDOUT,
                )
                for rank in range(WORLD)
            ]
            try:
                for child in children:
                    child.wait(timeout=LIMIT)
            finally:
                for child in children:
                    child.kill()
                    child.wait()
        said = "\n".join(log.read_text() for log in logs)
        assert [child.returncode for child in children] == [0] * WORLD, said
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]

    return launch


def main(file: str, function: str, rank: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", timedelta(seconds=LIMIT / 2), world_size=WORLD, rank=int(rank)
    )
    try:
        result = runpy.run_path(file)[function](int(rank), Path(folder))
        torch.save(result, Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
