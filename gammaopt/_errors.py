"""Errors a user can cause: one line that names the value and the fix.

They are ordinary ``ValueError``/``ImportError`` to a program; the command line turns exactly these into one
line on stderr and exit code 2, so that a bug in the package is never mistaken for a user's mistake.
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType


class UsageError(ValueError):
    """A value the caller can mend; the message names it and says how."""


class CheckpointError(UsageError, RuntimeError):
    """A checkpoint of another model. Also a ``RuntimeError``, which is what torch raises and its callers expect."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def run_script(main: Callable[[], object]) -> None:
    """Call a script's ``main``: what it was given wrongly is one line on stderr and exit code 2, and no traceback.

    Example:
        >>> run_script(lambda: positive("gamma", -1.0))
        Traceback (most recent call last):
        SystemExit: 2
    """
    try:
        main()
    except (UsageError, MissingExtraError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def positive(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise :class:`UsageError` unless it is finite and > 0."""
    try:
        if isinstance(value, (str, bool)):  # float() would take both
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name}={value!r} is not a number; give a finite {name} > 0") from None
    if not (math.isfinite(number) and number > 0):
        raise UsageError(f"{name}={number:g} is not allowed; give a finite {name} > 0")
    return number


def rate(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise :class:`UsageError` unless it is finite and ≥ 0: schedulers write 0."""
    try:
        return 0.0 if not isinstance(value, (str, bool)) and value == 0 else positive(name, value)
    except UsageError as error:
        raise UsageError(str(error).replace(f"finite {name} > 0", f"finite {name} >= 0")) from None


def at_least(name: str, value: int, minimum: int) -> int:
    """Return ``value`` as an ``int``, or raise :class:`UsageError` unless it is an integer >= ``minimum``."""
    number = whole(name, value, f"an integer >= {minimum}")
    if number < minimum:
        raise UsageError(f"{name}={value} is too small; give at least {minimum}")
    return number


def whole(name: str, value: int, wanted: str = "an integer") -> int:
    """Return ``value`` as an ``int``, or raise :class:`UsageError` unless it is an integer: of NumPy's too."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name}={value!r} is not a whole number; give {wanted}") from None


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return ``value``, or raise :class:`UsageError` unless it is one of ``allowed``."""
    names = list(allowed)
    if value not in names:
        raise UsageError(f"unknown {name} {value!r}; choose one of: {', '.join(names)}")
    return value


def check_knobs(owner: str, made: Callable[..., object], knobs: Iterable[str], given: int = 0) -> None:
    """Raise :class:`UsageError` for a name that ``made`` does not take, its first ``given`` parameters aside."""
    taken = list(inspect.signature(made).parameters)[given:]
    for knob in knobs:
        if knob not in taken:
            raise UsageError(f"{owner} has no knob {knob!r}; it has: {', '.join(taken) or 'none'}")


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise :class:`MissingExtraError` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs the package {error.name!r}, which is not installed; run: pip install 'gammaopt[{extra}]'"
        ) from None
