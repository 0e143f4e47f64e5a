"""What is frozen before the first run, so that a number can be traced: budget, seeds, grid, law, versions, commit.

It stands in the user attributes of every Optuna study, one attribute each, where a dashboard shows it, and in the
study's folder.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gammaopt.tuning._budget import Plan
    from gammaopt.tuning._space import Space


def frozen(plan: Plan, space: Space, trials: int, start: list[dict[str, float]], commit: str | None) -> dict[str, Any]:
    """Name → value of the attributes of one arm's study, ``plan`` last: it tells that the others are there."""
    return {
        "budget": {"trials": trials, "seeds_per_trial": plan.seeds, "steps_per_run": plan.steps},
        "tuning_seeds": list(plan.tuning_seeds),
        "fresh_seeds": list(plan.fresh_seeds),
        "grid_hash": space.digest(start),
        "law_version": plan.law_version,
        "versions": versions(),
        "git_commit": commit,
        "plan": plan.to_dict(),
    }


PACKAGES = ("torch", "numpy", "optuna", "scipy", "scikit-learn")

_installed = functools.cache(importlib.metadata.version)  # read from disk in milliseconds, and asked for by each cell


def versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    from gammaopt import __version__

    found = {name: _installed(name) for name in PACKAGES}
    return {"gammaopt": __version__, "python": platform.python_version(), **found, "machine": platform.machine()}


def git_commit(source: Path, *, but: str | None = None) -> str | None:
    """The commit that the file or folder belongs to; ``None`` outside git.

    It ends with ``-dirty`` if tracked files changed since, in the folder that ``source`` is or lies in; those in the
    folder ``but`` of that don't count: results that are written are no change of the code.
    """
    folder = source if source.is_dir() else source.parent
    where = [".", *([f":(exclude){but}"] if but else [])]
    try:
        found = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *where)
        # A package installed inside somebody's repository, in an ignored environment, is not of that repository.
        _git(folder, "ls-files", "--error-unmatch", str(source.resolve()))
    except (OSError, subprocess.SubprocessError):
        return None
    return found + ("-dirty" if changed else "")


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
