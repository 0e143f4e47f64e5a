"""Comparisons across seeds have the interval of pairs, which share seeds; those that miss have reasons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import agreement
import pytest
from _intervals import pairs_interval

PRESET = replace(agreement.PRESETS["cpu"], gammas=(0.03, 0.1, 100.0, 1000.0), seeds=3)


def found(gains: list[float]) -> dict[str, Any]:
    pairs = {f"{a:g} {b:g}": [[0.5, 0.5, 0.5]] for a in PRESET.gammas for b in PRESET.gammas if a < b}
    seeds = {f"{gamma:g}": [[0.2, 0.2, 0.2]] for gamma in PRESET.gammas}
    seeds["100"] = [[0.2 + gain for gain in gains]]
    alignment = {f"{gamma:g}": [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]] for gamma in PRESET.gammas}
    return {"across_gammas": pairs, "across_seeds": seeds, "alignment": alignment}


def test_the_interval_across_seeds_is_that_of_pairs() -> None:
    gains = [0.1, 0.4, 0.3]
    claims = agreement.claims_of(PRESET, found(gains))
    (across,) = (claim for claim in claims if claim.what.startswith("cosine between seeds"))
    assert across.measured == pytest.approx(0.8 / 3)
    assert across.interval == pytest.approx(pairs_interval(gains, 3))
    assert all(claim.why for claim in claims if not claim.holds)
