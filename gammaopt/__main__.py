"""``python -m gammaopt`` and the console script: the command line, if what it needs is installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without its packages, say in one line how to install them."""
    try:
        from gammaopt.cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(_missing(error.name))
    run()


def _missing(name: str) -> int:
    print(f"gammaopt: the command line needs {name}; run: pip install 'gammaopt[tune]'", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
