"""The residual experiment's interval is Student's, and its sentence follows from its claims."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import _sweep
import numpy as np
import pytest
import residual
from _experiment import Claim

from gammaopt._errors import UsageError


def row(measured: float) -> dict[str, Any]:
    return {
        "blocks": 2, "depth": 2.1, "gammas": [1.0, 10.0, 100.0], "log10_best": [0.0, measured - 0.1, 2 * measured],
        "predicted": 0.95, "measured": measured, "interval": (measured - 0.2, measured + 0.2),
    }  # fmt: skip


def sentence(*rows: dict[str, Any]) -> tuple[str, list[Claim]]:
    claims = [residual.claim(one) for one in rows]
    return residual.meaning(rows, claims), claims


def test_the_sentence_says_so_where_the_exponent_is_another_one() -> None:
    told, (claim,) = sentence(row(0.9))
    assert claim.holds
    assert told.startswith("The exponent of a normalised residual network is that of its effective depth: 6 weight")
    told, (_, claim) = sentence(row(0.9), row(0.5))
    assert not claim.holds
    assert claim.why == ("no single power: local slopes 0.40, 0.60, from 0.40 to 0.60, steepest between γ = 10 and 100")
    assert told.startswith("2/L_eff is not the exponent of 1 of 2 normalised residual networks")


def test_the_number_of_layers_is_told_as_another_exponent_only_where_the_interval_excludes_it() -> None:
    assert "(γ^0.95 by 2/L_eff, not γ^0.33 by the number of layers)" in sentence(row(0.9))[0]
    for unknown in ({**row(0.9), "interval": (0.3, 1.5)}, {**row(0.9), "interval": None}):
        assert sentence(unknown)[0].endswith("6 weight layers: γ^0.90 (γ^0.95 by 2/L_eff).")


GAMMAS = (1.0, 10.0, 100.0)


def rates(slopes: list[float]) -> list[list[float]]:
    """log₁₀ c of best rates of L_eff = 2, whose law is γ: a seed for each slope of log η*."""
    return [[(slope - 1) * math.log10(gamma) for gamma in GAMMAS] for slope in slopes]


def test_each_seed_has_a_slope_and_the_interval_is_over_them() -> None:
    values = np.array([0.8, 1.0, 1.3])
    found = residual.row_of(2, 2.0, GAMMAS, rates(list(values)))
    half = 4.3027 * values.std(ddof=1) / 3**0.5  # t of two degrees of freedom
    assert found["measured"] == pytest.approx(values.mean(), abs=1e-3)
    assert found["interval"] == pytest.approx([values.mean() - half, values.mean() + half], abs=1e-3)
    assert found["log10_best"] == pytest.approx([0.0, values.mean(), 2 * values.mean()], abs=1e-3)


def test_a_best_rate_at_the_end_of_the_grid_is_none_and_is_counted() -> None:
    made = rates([0.9, 1.1])
    made[0][2] = math.nan
    found = residual.row_of(2, 2.0, GAMMAS, made)
    assert found["outside"] == 1
    assert found["measured"] == pytest.approx(1.0, abs=1e-3)
    made[1][2] = math.nan
    with pytest.raises(UsageError, match="2 blocks: too few best rates of a seed lie inside the grid; widen its rates"):
        residual.row_of(2, 2.0, GAMMAS, made)


def test_the_best_rates_of_a_sweep_are_those_of_each_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seed 0 is best at 10^0.5, seed 1 at the end of the grid."""
    monkeypatch.setattr(_sweep, "run_all", lambda jobs, *_: jobs)
    monkeypatch.setattr(_sweep, "score", lambda job: (math.log10(job.lr) - (0.5 + job.seed)) ** 2)
    recipe: Any = None
    first, second = _sweep.best_rates(recipe, (1.0, 10.0), (0.0, 0.5, 1.0), 2, tmp_path / "runs.jsonl")
    assert first == pytest.approx([0.5, 0.5])
    assert all(map(math.isnan, second))
