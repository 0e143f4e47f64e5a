"""The laws' exponents, their inverse, and their refusals."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gammaopt import EtaLaw, UsageError

GAMMAS = st.floats(1e-4, 1e4)
DEPTHS = st.floats(0.5, 12.0)
KNEES = st.floats(0.1, 50.0)


def slope(law: EtaLaw, low: float, high: float) -> float:
    return math.log(law.factor(high) / law.factor(low)) / math.log(high / low)


@pytest.mark.parametrize("depth", [1.0, 2.0, 3.0, 5.0, 2.1])
@pytest.mark.parametrize(
    ("optimizer", "loss", "lazy", "rich_times_depth"),
    [
        ("sgd", "mse", 2.0, 2.0),
        ("sgd", "cross_entropy", 1.0, 2.0),
        ("adam", "mse", 1.0, 1.0),
        ("adam", "cross_entropy", 1.0, 1.0),
        ("muon", "mse", 1.0, 1.0),
    ],
)
def test_exponents_are_those_of_the_table(
    depth: float, optimizer: str, loss: str, lazy: float, rich_times_depth: float
) -> None:
    law = EtaLaw(depth, optimizer, loss)  # type: ignore[arg-type]
    assert slope(law, 1e-4, 1.0) == pytest.approx(lazy, rel=1e-12)
    assert slope(law, 1.0, 1e4) == pytest.approx(rich_times_depth / depth, rel=1e-12)


def test_kernel_regime_law_is_selected_by_lazy_exponent() -> None:
    assert slope(EtaLaw(3, "sgd", "cross_entropy", lazy_exponent=2), 1e-3, 1.0) == pytest.approx(2.0)


@given(depth=DEPTHS, knee=KNEES)
def test_factor_is_one_at_gamma_one_wherever_the_knee_is(depth: float, knee: float) -> None:
    assert EtaLaw(depth, knee=knee).factor(1.0) == pytest.approx(1.0, rel=1e-12)


def test_law_bends_at_the_knee() -> None:
    law = EtaLaw(4, knee=8.0)
    assert slope(law, 0.01, 8.0) == pytest.approx(2.0)
    assert slope(law, 8.0, 800.0) == pytest.approx(0.5)


@given(depth=DEPTHS, a=GAMMAS, b=GAMMAS)
def test_best_rate_never_falls_as_gamma_grows(depth: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    law = EtaLaw(depth)
    assert law.factor(low) <= law.factor(high) * (1 + 1e-12)


def test_lr_is_base_times_factor() -> None:
    assert EtaLaw(2).lr(0.3, 9.0) == pytest.approx(0.3 * 9.0)


@pytest.mark.parametrize(("depth", "expected"), [(1, 1.0), (2, 1 + math.log(64)), (3, 4.0), (4, 8.0), (6, 16.0)])
def test_sgd_plateau_at_whole_depths(depth: int, expected: float) -> None:
    assert EtaLaw(depth).plateau_steps(64.0, at_one=10) == pytest.approx(10 * expected)


def test_plateau_is_constant_below_the_knee_and_under_adam() -> None:
    assert EtaLaw(3).plateau_steps(0.01, at_one=10) == 10
    assert EtaLaw(3, "adam").plateau_steps(1e4, at_one=10) == 10


@given(depth=st.one_of(st.just(2.0), st.floats(2.2, 12.0)), knee=KNEES, gamma=st.floats(1.0, 1e4))
def test_gamma_max_inverts_plateau_steps(depth: float, knee: float, gamma: float) -> None:
    law = EtaLaw(depth, knee=knee)
    steps = max(50.0, law.plateau_steps(gamma, at_one=50))  # at γ = 1 it is 50 but for rounding
    found = law.gamma_max(steps, at_one=50)
    assert law.plateau_steps(found, at_one=50) == pytest.approx(steps, rel=1e-6)


@pytest.mark.parametrize("depth", [2.5, 3.0, 5.0])
def test_gamma_max_is_the_formula(depth: float) -> None:
    assert EtaLaw(depth).gamma_max(steps=3000, at_one=300) == pytest.approx((3000 / 300) ** (depth / (depth - 2)))


def test_gamma_max_is_unbounded_where_the_plateau_is() -> None:
    assert EtaLaw(3, "adam").gamma_max(100, at_one=100) == math.inf
    assert EtaLaw(1).gamma_max(100, at_one=10) == math.inf
    assert EtaLaw(1.5).gamma_max(1e6, at_one=10) == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EtaLaw(3).factor(0.0), r"gamma=0 .* gamma > 0"),
        (lambda: EtaLaw(3).factor(-2.0), r"gamma=-2 "),
        (lambda: EtaLaw(3).factor(math.nan), r"gamma=nan "),
        (lambda: EtaLaw(3).factor(math.inf), r"gamma=inf "),
        (lambda: EtaLaw(3).lr(-0.1, 1.0), r"base_lr=-0.1 "),
        (lambda: EtaLaw(0), r"depth=0 "),
        (lambda: EtaLaw(3, knee=-1), r"knee=-1 "),
        (lambda: EtaLaw(3, lazy_exponent=0), r"lazy_exponent=0 "),
        (lambda: EtaLaw(3, "sdg"), r"unknown optimizer 'sdg'; choose one of: sgd, adam"),  # type: ignore[arg-type]
        (lambda: EtaLaw(3, loss="nll"), r"unknown loss 'nll'; choose one of: mse, cross_entropy"),  # type: ignore[arg-type]
        (lambda: EtaLaw("deep"), r"depth='deep' is not a number"),  # type: ignore[arg-type]
        (lambda: EtaLaw(3).gamma_max(10, at_one=20), r"steps=10 is less than at_one=20"),
    ],
)
def test_bad_values_are_named(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_laws_import_no_torch() -> None:
    code = "import sys, gammaopt; gammaopt.EtaLaw(3).factor(2.0); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
