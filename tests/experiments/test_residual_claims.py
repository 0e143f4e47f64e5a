"""The residual experiment's interval is Student's, and its sentence follows from its claims."""

from __future__ import annotations

from typing import Any

import residual
from _experiment import Claim


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
    assert claim.why == "local slopes 0.40, 0.60"
    assert told.startswith("2/L_eff is not the exponent of 1 of 2 normalised residual networks")
