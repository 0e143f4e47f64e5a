"""The knee experiment's claims are about bends over knees, and its sentence follows from its claims."""

from __future__ import annotations

from typing import Any

import knee


def row(measured: float) -> dict[str, Any]:
    return {
        "task": "digits", "width": 64, "gammas": [0.1, 1.0, 10.0], "log10_edge": [-2.0, 0.0, 0.7], "predicted": 10.0,
        "measured": measured, "low": measured / 2, "high": measured * 2,
    }  # fmt: skip


def test_a_bend_within_the_tolerance_holds_and_says_so_where_its_interval_excludes_the_knee() -> None:
    near, off = (knee.claim(row(measured)) for measured in (9.0, 25.0))
    assert (near.holds, near.off, near.why) == (True, None, "")
    assert off.holds
    assert off.row.endswith(
        "| 0.32 … 3.16 | 2.5 | 1.25 … 5 | yes, off by +1.5: "
        "local slopes 2.00, 0.70, where 2 below the bend and 0.67 above it are predicted |"
    )
    # The interval reaches beyond the range, as the page says of numbers within a tolerance.
    assert off.interval is not None
    assert off.interval[1] == 5.0


def test_the_sentence_counts_bends_that_miss() -> None:
    rows = [row(9.0), row(1.0)]
    claims = [knee.claim(one) for one in rows]
    assert [claim.holds for claim in claims] == [True, False]
    assert claims[1].why.startswith("local slopes 2.00, 0.70, where 2 below the bend")
    told = knee.meaning(rows, claims)
    assert "γ ≈ 1.0 to 9.0" in told
    assert "1 of 2 bends lie within half a decade of it, the furthest off by a factor of 10.0" in told
