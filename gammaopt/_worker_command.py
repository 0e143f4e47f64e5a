"""``gammaopt worker`` and ``gammaopt slurm``: processes that train the cells of a study, on any machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gammaopt._stopping import SIGNALS, asked_by
from gammaopt._terminal import on_stderr, usage_errors

Url = Annotated[
    str, typer.Option("--storage", metavar="URL", envvar="GAMMAOPT_STORAGE", help="The study's PostgreSQL storage.")
]
Name = Annotated[str, typer.Option("--study", metavar="NAME", help="Name that `gammaopt tune --study` gave it.")]
Checkpoints = Annotated[
    Path, typer.Option(help="Folder for runs in training; shared, any worker goes on with any other's.")
]
Every = Annotated[float, typer.Option(metavar="SECONDS", help="How often a checkpoint is written.", min=0)]
Idle = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Stop after so long without a cell.", show_default="never")
]
CHECKPOINTS = Path("runs/checkpoints")


def worker(
    storage: Url,
    study: Name,
    checkpoints: Checkpoints = CHECKPOINTS,
    checkpoint_every: Every = 30.0,
    idle: Idle = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing on stderr.")] = False,
) -> None:
    """Train cells of a study until it is done. Start as many as you like, on any machines.

    SIGTERM and SIGUSR1 write a checkpoint, hand the cell back, and end with exit code 0.
    """
    # Ahead of the imports, which take seconds: an array that is cancelled at once ends well too.
    with usage_errors(), asked_by(SIGNALS) as stopping:
        from gammaopt._errors import require

        require("optuna", "tune")
        from gammaopt.tuning._worker import work

        work(
            storage,
            study,
            checkpoints=checkpoints,
            checkpoint_seconds=checkpoint_every,
            idle_seconds=idle,
            stopping=stopping,
            say=(lambda _: None) if quiet else on_stderr,
        )


def slurm(
    storage: Url,
    study: Name,
    workers: Annotated[int, typer.Option(help="Workers in the array.", min=1)] = 4,
    minutes: Annotated[int, typer.Option(help="Time limit of each.", min=5)] = 60,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.", show_default="the cluster's")] = None,
    cpus: Annotated[int, typer.Option(help="Cores of each worker.", min=1)] = 1,
    gpus: Annotated[int, typer.Option(help="Accelerators of each worker.", min=0)] = 0,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Of each worker.", show_default="its own")] = None,
    folder: Annotated[Path, typer.Option(help="Folder for logs; on a shared disk.")] = Path("runs/slurm"),
    checkpoints: Checkpoints = CHECKPOINTS,
    checkpoint_every: Every = 30.0,
    idle: Idle = None,
    cluster: Annotated[str, typer.Option(help="slurm, or local: on this machine.")] = "slurm",
    show: Annotated[bool, typer.Option("--print", help="Print the sbatch file, and submit nothing.")] = False,
) -> None:
    """Submit an array of workers for a study to Slurm, or print its sbatch file.

    A minute before its time is up a worker writes a checkpoint and hands its cell back.
    """
    with usage_errors():
        from gammaopt._errors import one_of
        from gammaopt._slurm import Job, sbatch_text, submit

        one_of("cluster", cluster, ("slurm", "local"))
        job = Job(
            storage, study, workers, minutes, partition, cpus, gpus, memory, folder, checkpoints, checkpoint_every, idle
        )  # fmt: skip
        if show:
            typer.echo(sbatch_text(job), nl=False)
        else:
            typer.echo("\n".join(submit(job, cluster)))
