"""``import gammaopt`` is light: torch and numpy only when a name asks for them, optional packages never."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import gammaopt

OPTIONAL = ["optuna", "scipy", "matplotlib", "typer", "rich", "sklearn", "sqlalchemy", "timm", "mup"]


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after running ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return set(json.loads(run.stdout))


def test_importing_the_package_pulls_no_optional_package_even_when_every_name_is_used() -> None:
    code = "import gammaopt\nfor name in gammaopt.__all__: getattr(gammaopt, name)"
    found = modules_after(code)
    assert {"torch", "numpy"} <= found
    assert not found & set(OPTIONAL)


def test_importing_the_package_alone_answers_at_once_without_torch() -> None:
    assert not modules_after("import gammaopt\ngammaopt.EtaLaw(3).factor(2.0)") & {"torch", "numpy", *OPTIONAL}


def test_every_public_name_resolves_and_is_listed() -> None:
    assert sorted(gammaopt.__all__, key=str.lower) == sorted(set(gammaopt.__all__), key=str.lower)
    for name in gammaopt.__all__:
        assert getattr(gammaopt, name).__module__.startswith("gammaopt")
        assert name in dir(gammaopt)


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'gammaopt' has no attribute 'AdamZ'"):
        _ = gammaopt.AdamZ  # type: ignore[attr-defined, unused-ignore]


def test_errors_are_the_builtin_kinds_a_program_expects() -> None:
    assert issubclass(gammaopt.UsageError, ValueError)
    assert issubclass(gammaopt.MissingExtraError, ImportError)
