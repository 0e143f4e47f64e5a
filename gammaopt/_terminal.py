"""What every command shares: a user's mistake is one line and exit code 2, and Ctrl-C says how to go on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from gammaopt._errors import MissingExtraError, UsageError

INTERRUPTED = 130  # what a shell reports for Ctrl-C


@contextmanager
def usage_errors() -> Iterator[None]:
    """Tell a mistake in one line, without a traceback, and a warning too; a bug keeps its own."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: on_stderr(f"gammaopt: {message}")
            yield
    except (UsageError, MissingExtraError) as error:
        typer.echo(f"gammaopt: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("\ngammaopt: stopped; run the same command again to go on", err=True)
        raise typer.Exit(INTERRUPTED) from None


def on_stderr(line: str) -> None:
    """A line of progress, for people and logs."""
    typer.echo(line, err=True)
