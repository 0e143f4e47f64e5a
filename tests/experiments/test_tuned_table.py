"""The table of studies says where differences at the rates of γ = 1 are of both signs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tuned_vs_one


@pytest.mark.parametrize(("smallest", "told"), [(0.0, "both signs"), (0.0123, "+1.23"), (-0.0123, "-1.23")])
def test_a_smallest_difference_of_zero_is_one_of_both_signs(smallest: float, told: str) -> None:
    result: Any = SimpleNamespace(smallest_difference=smallest)
    assert tuned_vs_one.least(result) == told
