"""A PostgreSQL server of the tests' own, on a socket in a temporary folder, from the distribution's binaries."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

USER = "gammaopt"
PR_SET_PDEATHSIG = 1  # of Linux
LIMIT = 30  # seconds for the server to answer


def binaries() -> Path | None:
    """The folder with ``initdb`` and ``postgres``, the newest if there are several."""
    found = [Path(where).parent for name in ("postgres",) if (where := shutil.which(name))]
    for pattern in ("lib/postgresql/*/bin", "pgsql-*/bin", "local/pgsql/bin"):
        found += sorted(Path("/usr").glob(pattern), key=lambda path: [int(d) for d in path.parts if d.isdigit()])[::-1]
    return next((path for path in found if (path / "postgres").exists() and (path / "initdb").exists()), None)


class Server:
    """A running server; each test has a database of its own on it."""

    def __init__(self, folder: Path) -> None:
        where = binaries()
        if where is None:
            raise FileNotFoundError("no PostgreSQL server binary; install the package postgresql")
        self._binaries, self.folder, self._made = where, folder, 0
        # PostgreSQL refuses to run as root.
        self._user = (
            next((name for name in ("postgres", "nobody") if _exists(name)), None) if os.getuid() == 0 else None
        )
        if self._user is not None:
            shutil.chown(folder, self._user)
        words = ["initdb", "--pgdata=data", f"--username={USER}", "--auth=trust", "--no-locale", "--encoding=UTF8"]
        self._run([*words, "--no-sync"])
        self.start()

    def _run(self, words: list[str]) -> None:
        command = [str(self._binaries / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=self.folder, user=self._user, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{words[0]}: {done.stderr}")

    def start(self) -> None:
        """Start it and wait until it answers."""
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.folder,
            "shared_buffers": "16MB",
            "fsync": "off",
        }
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with open(self.folder / "log", "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", "data", *words],
                cwd=self.folder, user=self._user, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the tests, which end it
                preexec_fn=_end_with_parent,  # and a SIGTERM or SIGKILL of theirs ends it too
            )  # fmt: skip
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                psycopg.connect(host=str(self.folder), user=USER, dbname="postgres").close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """Break off all connections and stop it."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=LIMIT)

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._made += 1
        name = f"test{self._made}"
        with psycopg.connect(host=str(self.folder), user=USER, dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql+psycopg://{USER}@/{name}?host={self.folder}"


def _end_with_parent() -> None:
    """Called in the child: it gets SIGINT, PostgreSQL's fast shutdown, when the process that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


@contextmanager
def running() -> Iterator[Server]:
    """A server in a short-named folder: a socket's path may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="gammaopt-pg-"))
    try:
        server = Server(folder)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
