"""The sbatch file: what each worker gets, and that a password stays out of it."""

from __future__ import annotations

import pickle
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gammaopt import UsageError
from gammaopt._slurm import Job, Work, program, sbatch_text, submit

JOB = Job(
    "postgresql+psycopg://db/gammaopt", "digits two", 8, 90, "long", 2, 1, 4.5, Path("logs"), Path("ck"), 30.0, None
)


def test_the_sbatch_file_says_it_all_and_is_a_shell_script(tmp_path: Path) -> None:
    text = sbatch_text(JOB)
    for line in (
        "--array=0-7", "--time=90", "--partition=long", "--cpus-per-task=2", "--gpus-per-node=1", "--mem=4608M",
        "--signal=USR1@60",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    assert (
        f"srun {shlex.quote(program())} worker --study 'digits two' --checkpoints ck --checkpoint-every 30 "
        "--storage postgresql+psycopg://db/gammaopt\n" in text
    )
    assert program() == "gammaopt" or Path(program()).parent == Path(sys.executable).parent
    assert "mkdir -p logs before sbatch" in text  # without it Slurm fails each job, and says so nowhere
    (tmp_path / "job.sh").write_text(text)
    assert subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=False).returncode == 0


@pytest.mark.parametrize("url", ["postgresql+psycopg://me:s3cret@db/x", "postgresql+psycopg://db/x?password=s3cret"])
def test_a_password_is_taken_from_the_environment(url: str, tmp_path: Path) -> None:
    text = sbatch_text(replace(JOB, storage=url, idle_seconds=60.0))
    assert "s3cret" not in text
    assert '--idle 60 --storage "$GAMMAOPT_STORAGE"\n' in text
    assert "mkdir -p logs before sbatch" in text  # without it Slurm fails each job, and says so nowhere
    (tmp_path / "job.sh").write_text(text)
    done = subprocess.run(
        [shutil.which("bash") or "bash", tmp_path / "job.sh"],
        env={"PATH": "/nowhere"},
        capture_output=True,
        check=False,
    )
    assert b"export it before sbatch" in done.stderr


@pytest.mark.parametrize("url", ["postgresql+psycopg://me:s3cret@db/x", "postgresql+psycopg://db/x?password=s3cret"])
def test_a_password_is_not_pickled_and_the_worker_takes_it_from_the_environment(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit", reason="pip install 'gammaopt[slurm]'")
    job = replace(JOB, storage=url, folder=tmp_path / "logs")
    monkeypatch.delenv("GAMMAOPT_STORAGE", raising=False)
    with pytest.raises(UsageError, match=r"holds a password, which would be written into .*; export GAMMAOPT_STORAGE"):
        submit(job, "local")
    sent: list[Work] = []
    monkeypatch.setattr(submitit.AutoExecutor, "submit", lambda _, work: sent.append(work))
    monkeypatch.setenv("GAMMAOPT_STORAGE", url)
    with pytest.raises(RuntimeWarning, match="No submission happened"):
        submit(job, "local")
    assert sent
    assert b"s3cret" not in pickle.dumps(sent[0])
    asked: list[str] = []
    monkeypatch.setattr("gammaopt.tuning._worker.work", lambda storage, *_, **__: asked.append(storage))
    sent[0]()
    assert asked == [url]


def test_a_machine_without_slurm_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="pip install 'gammaopt[slurm]'")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"no Slurm here .*see the sbatch file with --print"):
        submit(replace(JOB, folder=tmp_path / "logs"))
