"""The knee experiment's interval is the jackknife's with Student's t, and its sentence follows from its claims."""

from __future__ import annotations

from typing import Any

import knee
import numpy as np
import pytest


def row(measured: float) -> dict[str, Any]:
    return {
        "task": "digits", "width": 64, "gammas": [0.1, 1.0, 10.0], "log10_edge": [-2.0, 0.0, 0.7], "predicted": 10.0,
        "measured": measured, "low": measured / 2, "high": measured * 2,
    }  # fmt: skip


def test_the_jackknife_of_a_mean_is_students_interval_of_it() -> None:
    values = np.array([0.1, 0.4, 0.2, 0.9, 0.3])
    without = [float(np.delete(values, i).mean()) for i in range(5)]
    assert knee.jackknife_half(without) == pytest.approx(2.7764 * values.std(ddof=1) / 5**0.5, rel=1e-4)


def test_the_sentence_counts_bends_that_miss() -> None:
    rows = [row(9.0), row(1.0)]
    claims = [knee.claim(one) for one in rows]
    assert [claim.holds for claim in claims] == [True, False]
    assert claims[1].why == "local slopes 2.00, 0.70"
    told = knee.meaning(rows, claims)
    assert "γ ≈ 1.0 to 9.0" in told
    assert "1 of 2 bends lie within half a decade of it, the furthest off by a factor of 10.0" in told
