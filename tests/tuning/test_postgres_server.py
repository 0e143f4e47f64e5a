"""The tests' own PostgreSQL server leaves nothing running behind."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'gammaopt[postgres]'")

pytest_plugins = ["worker_processes"]

SCRIPT = """
import time
from postgres_server import running

with running() as server:
    print(server._process.pid, server.folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
@pytest.mark.usefixtures("postgres")  # skips where there is none
def test_the_server_ends_with_tests_that_are_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    ) as tests:
        assert tests.stdout is not None
        pid, folder = tests.stdout.readline().split()
        tests.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 60
    while (Path(folder) / "data" / "postmaster.pid").exists():
        assert time.monotonic() < deadline, f"the server {pid} lives on"
        time.sleep(0.05)
    shutil.rmtree(folder)
