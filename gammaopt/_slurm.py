"""An array of workers on a Slurm cluster: submitted with submitit, or as the text of an sbatch file.

Slurm sends SIGUSR1 a minute ahead of the time limit, and SIGTERM on preemption; a worker answers both with a checkpoint
and exit code 0. Its cell is back in the queue then, so nothing has to be requeued: submit more workers.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from gammaopt._errors import UsageError, require
from gammaopt._stopping import SIGNALS, asked_by

STORAGE = "GAMMAOPT_STORAGE"  # environment variable with the URL
SIGNAL_AHEAD = 60  # seconds before the time limit


@dataclass(frozen=True)
class Job:
    """What each worker of the array gets.

    Attributes:
        storage, study: the study; an empty ``storage`` is that of the environment's ``GAMMAOPT_STORAGE``.
        workers: how many.
        minutes: time limit of each.
        partition: of the cluster; its default if ``None``.
        cpus, gpus, memory_gb: resources of each.
        folder: for logs.
        checkpoints, checkpoint_seconds, idle_seconds: see :func:`gammaopt.tuning._worker.work`.
    """

    storage: str
    study: str
    workers: int
    minutes: int
    partition: str | None
    cpus: int
    gpus: int
    memory_gb: float | None
    folder: Path
    checkpoints: Path
    checkpoint_seconds: float
    idle_seconds: float | None


@dataclass(frozen=True)
class Work:
    """What submitit pickles and calls on the machine that the scheduler chose."""

    job: Job

    def __call__(self) -> int:
        """Work on the study; returns how many cells were finished."""
        # Ahead of the imports, which take seconds; SIGUSR2 is submitit's signal ahead of the time limit.
        with asked_by((*SIGNALS, signal.SIGUSR2)) as stopping:
            from gammaopt._terminal import on_stderr
            from gammaopt.tuning._worker import work

            return work(
                self.job.storage or os.environ[STORAGE],
                self.job.study,
                checkpoints=self.job.checkpoints,
                checkpoint_seconds=self.job.checkpoint_seconds,
                idle_seconds=self.job.idle_seconds,
                stopping=stopping,
                say=on_stderr,
            )


def submit(job: Job, cluster: str = "slurm") -> list[str]:
    """Submit the array; returns a line for each worker.

    Args:
        job: what to submit.
        cluster: ``"slurm"``, or ``"local"`` for processes on this machine.

    The job is pickled into its folder. A URL that holds a password stays out of it: workers take it from the
    environment, which the scheduler hands on.

    Raises:
        UsageError: where there is no Slurm, its folder can't be written, or a URL with a password is not in
            ``GAMMAOPT_STORAGE``.
        MissingExtraError: without ``pip install 'gammaopt[slurm]'``.
    """
    from gammaopt.tuning._search import has_secrets

    submitit = require("submitit", "slurm")
    if has_secrets(job.storage):
        if os.environ.get(STORAGE) != job.storage:
            raise UsageError(
                f"the storage's URL holds a password, which would be written into {job.folder}; "
                f"export {STORAGE} with that URL, and leave --storage out"
            )
        job = replace(job, storage="")
    try:
        executor = submitit.AutoExecutor(folder=job.folder, cluster=cluster)
    except RuntimeError as error:
        raise UsageError(
            f"no Slurm here ({error}); submit from a login node, or see the sbatch file with --print"
        ) from None
    except OSError as error:
        raise UsageError(f"{job.folder} can't be written ({error.strerror}); give another --folder") from None
    executor.update_parameters(
        name="gammaopt", timeout_min=job.minutes, gpus_per_node=job.gpus, slurm_signal_delay_s=SIGNAL_AHEAD,
        **({"mem_gb": job.memory_gb} if job.memory_gb is not None else {}),
        **({"slurm_partition": job.partition} if job.partition is not None else {}),
        **({"cpus_per_task": job.cpus} if cluster == "slurm" else {}),
    )  # fmt: skip
    with executor.batch():
        jobs = [executor.submit(Work(job)) for _ in range(job.workers)]
    return [f"worker {made.job_id}: {made.paths.stderr}" for made in jobs]


def program() -> str:
    """The command of this environment, which a job's shell may not have on its path."""
    beside = Path(sys.executable).with_name("gammaopt")
    return str(beside) if beside.exists() else "gammaopt"


def sbatch_text(job: Job) -> str:
    """The sbatch file of the array. A password stays out of it: the URL is then taken from the environment."""
    from gammaopt.tuning._search import has_secrets

    url = '"$GAMMAOPT_STORAGE"' if has_secrets(job.storage) else shlex.quote(job.storage)
    log = shlex.quote(f"{job.folder}/%A_%a.log")
    settings: dict[str, object] = {
        "job-name": "gammaopt", "array": f"0-{job.workers - 1}", "time": job.minutes, "cpus-per-task": job.cpus,
        "signal": f"USR1@{SIGNAL_AHEAD}", "output": log, "open-mode": "append",
        **({"gpus-per-node": job.gpus} if job.gpus else {}),
        **({"mem": f"{round(1024 * job.memory_gb)}M"} if job.memory_gb is not None else {}),
        **({"partition": shlex.quote(job.partition)} if job.partition is not None else {}),
    }  # fmt: skip
    words = ["srun", program(), "worker", "--study", job.study, "--checkpoints", str(job.checkpoints)]
    words += ["--checkpoint-every", f"{job.checkpoint_seconds:g}"]
    words += ["--idle", f"{job.idle_seconds:g}"] if job.idle_seconds is not None else []
    hint = f"# Slurm makes no folder for logs: mkdir -p {shlex.quote(str(job.folder))} before sbatch."
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in settings.items()), "", hint]
    if url.startswith('"$'):
        lines += [
            "# The URL holds a password: export GAMMAOPT_STORAGE before sbatch.",
            ': "${GAMMAOPT_STORAGE:?export it before sbatch}"',
        ]
    lines += [f"{shlex.join(words)} --storage {url}", ""]
    return "\n".join(lines)
