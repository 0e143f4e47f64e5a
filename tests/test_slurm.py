"""The sbatch file: what each worker gets, and that a password stays out of it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gammaopt import UsageError
from gammaopt._slurm import Job, sbatch_text, submit

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
        "srun gammaopt worker --study 'digits two' --checkpoints ck --checkpoint-every 30 "
        "--storage postgresql+psycopg://db/gammaopt\n" in text
    )
    (tmp_path / "job.sh").write_text(text)
    assert subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=False).returncode == 0


@pytest.mark.parametrize("url", ["postgresql+psycopg://me:s3cret@db/x", "postgresql+psycopg://db/x?password=s3cret"])
def test_a_password_is_taken_from_the_environment(url: str, tmp_path: Path) -> None:
    text = sbatch_text(replace(JOB, storage=url, idle_seconds=60.0))
    assert "s3cret" not in text
    assert '--idle 60 --storage "$GAMMAOPT_STORAGE"\n' in text
    (tmp_path / "job.sh").write_text(text)
    done = subprocess.run(
        [shutil.which("bash") or "bash", tmp_path / "job.sh"],
        env={"PATH": "/nowhere"},
        capture_output=True,
        check=False,
    )
    assert b"export it before sbatch" in done.stderr


def test_a_machine_without_slurm_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="pip install 'gammaopt[slurm]'")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"no Slurm here .*see the sbatch file with --print"):
        submit(replace(JOB, folder=tmp_path / "logs"))
