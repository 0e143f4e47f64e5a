"""The mechanisms that γ governs, in numbers on small runs; slow: the experiments and all their claims."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import catapult_silent_alignment
import hessian_spectrum
import pytest
import torch
from _descent import Descent, descended
from _experiment import Claim, Place, above, number

from gammaopt.diagnostics import dynamics

Found = dict[str, Any]


def smoke_of(module: Any, folder: Path) -> Found:
    module.main(["--preset", "smoke", "--cores", "1", "--results", str(folder), "--work", str(folder / "work")])
    found: Found = json.loads((folder / "smoke.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def spectrum(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return smoke_of(hessian_spectrum, tmp_path_factory.mktemp("spectrum"))


@pytest.fixture(scope="module")
def catapult(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return smoke_of(catapult_silent_alignment, tmp_path_factory.mktemp("catapult"))


def claim(found: Found, start: str) -> Found:
    (one,) = (one for one in found["claims"] if one["what"].startswith(start))
    return dict(one)


def test_a_lazy_network_has_as_many_outliers_as_classes(spectrum: Found) -> None:
    (lazy,) = spectrum["spectra"]["spectra"]
    for when in ("start", "end"):
        assert lazy[when] == sorted(lazy[when], reverse=True)
        assert lazy[when][9] > 3 * lazy[when][10]
        assert lazy[when][0] < 1.5 * lazy[when][9]


def test_sharpness_at_the_end_falls_like_the_laws_say(spectrum: Found) -> None:
    assert claim(spectrum, "exponent of the sharpness, L = 3, γ ≤ 0.03")["measured"] == pytest.approx(-2, abs=0.2)
    assert claim(spectrum, "exponent of the sharpness, L = 3, γ ≥ 1")["measured"] == pytest.approx(-2 / 3, abs=0.15)
    assert all(
        point["largest_sharpness_lr"] < 1.6 for point in spectrum["sharpness"]["points"]
    )  # the edge decides nothing


def test_sharpness_times_rate_comes_to_two_from_below_and_stays(spectrum: Found) -> None:
    assert claim(spectrum, "sharpness × rate late, γ = 100")["measured"] == pytest.approx(2, abs=0.1)
    assert claim(spectrum, "what it would be without an edge")["measured"] > 2.3  # where a small rate would go
    assert spectrum["edge"]["curves"]["γ = 100"][0]["sharpness_lr"] < 0.2


def test_a_small_gamma_catapults_and_a_large_one_does_not(catapult: Found) -> None:
    lazy, rich = (next(c for c in catapult["catapult"]["cells"] if c["gamma"] == gamma) for gamma in (0.01, 100.0))
    assert lazy["catapult"] > 5
    assert lazy["final"] < 0.1
    before, after = lazy["sharpness_lr"]
    assert before > 2 > after
    assert rich["catapult"] is None
    assert rich["final"] < 0.2


def test_the_kernel_turns_to_the_targets_before_the_loss_moves(catapult: Found) -> None:
    rich, lazy = catapult["alignment"]["rich"], catapult["alignment"]["lazy"]
    waiting = [one for one in rich if one["loss"] >= 0.95 * rich[0]["loss"]]
    assert waiting[-1]["alignment"] > rich[0]["alignment"] + 0.2
    assert waiting[-1]["kernel_kept"] < 0.6
    assert rich[-1]["loss"] < 0.6 * rich[0]["loss"]
    assert lazy[-1]["loss"] < 0.6 * lazy[0]["loss"]
    assert lazy[-1]["kernel_kept"] > 0.95
    assert abs(lazy[-1]["alignment"] - lazy[0]["alignment"]) < 0.05


def test_a_descent_stops_where_it_diverges_or_has_learned() -> None:
    gone = descended(Descent(32, 64, 100.0, 50.0, steps=60))
    assert dynamics(gone.record).diverged_at is not None
    assert gone.record.steps < 60
    assert gone.end_sharpness is None
    learned = descended(Descent(32, 64, 1.0, 0.4, steps=200, until=0.3, measures=("sharpness",), per_decade=1))
    assert learned.record.steps < 60
    assert learned.end_sharpness == pytest.approx(learned.measured[-1].sharpness_lr / 0.4)  # type: ignore[operator]


def catapults(seeds: int, heights: dict[int, float], rich: bool = True) -> list[Claim]:
    """The claims of one lazy run for each seed, with these catapults, and of one rich run that trains, or of none."""
    preset = replace(catapult_silent_alignment.PRESETS["smoke"], seeds=seeds)
    plainly = {"rate": 1.0, "diverged": False, "final": 0.1, "sharpness_lr": [4.0, 1.0]}
    cells: list[Found] = [
        {**plainly, "gamma": 0.01, "seed": seed, "catapult": heights.get(seed)} for seed in range(seeds)
    ]
    if rich:
        cells += [{**plainly, "gamma": 100.0, "seed": 0, "catapult": None}]
    return catapult_silent_alignment.catapult_claims(preset, cells)


def sentence(claims: list[Claim]) -> str:
    return catapult_silent_alignment.in_words([*claims, above("alignment gained on the plateau", 0.1, 0.3)])


def test_a_seed_without_a_catapult_has_the_height_of_the_start() -> None:
    height, flatter, none = catapults(2, {0: 4.0})
    assert height.measured == pytest.approx(2.0)
    assert (height.holds, height.why) == (False, "1 of 2 seeds have no catapult")
    assert flatter.holds
    assert none.holds
    assert catapults(2, {0: 4.0, 1: 9.0})[0].measured == pytest.approx(6.0)


def test_the_sentence_says_that_there_is_a_catapult_only_where_there_is_one() -> None:
    assert sentence(catapults(1, {0: 4.0})) == (
        "At γ = 0.01 a catapult takes the loss to 4 times its start, and it comes back flatter; at γ = 100 no run has "
        "one, and the kernel's alignment with the targets rises by 0.30 before the loss moves."
    )
    none = catapults(2, {}, rich=False)
    assert [(claim.holds, claim.why) for claim in none] == [
        (False, "2 of 2 seeds have no catapult"), (False, "no run has a catapult"), (False, "no run trains"),
    ]  # fmt: skip
    assert [number(claim.measured) for claim in none] == ["1", "none", "none"]
    told = sentence(none)
    assert "At γ = 0.01 no catapult is shown, the loss goes to 1 times its start" in told
    assert "comes back" not in told
    assert "at γ = 100 no run trains" in told


def test_an_alignment_that_never_rises_is_a_failing_claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = SimpleNamespace(loss=1.0, alignment=0.3, kernel_kept=1.0)
    end = SimpleNamespace(measured=[one, one], loss=[1.0, 1.0])
    monkeypatch.setattr(catapult_silent_alignment, "on_all_cores", lambda _, runs, __: [end] * len(runs))
    monkeypatch.setattr(catapult_silent_alignment, "plain", lambda _: [])
    preset = catapult_silent_alignment.PRESETS["smoke"]
    made = catapult_silent_alignment.measure_alignment(preset, Place(tmp_path))["claims"]
    share = next(one for one in made if one["what"].startswith("its share"))
    assert (share["holds"], share["why"]) == (False, "a run's alignment never rises")


def test_the_outliers_of_many_classes_are_among_the_eigenvalues(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As many eigenvalues as a preset has would end before the outliers of 25 classes do."""
    asked: list[int] = []

    def eigenvalues(*_: object, k: int) -> Any:
        asked.append(k)
        return SimpleNamespace(values=torch.arange(k, 0, -1.0))

    monkeypatch.setattr(hessian_spectrum, "hessian_eigenvalues", eigenvalues)
    monkeypatch.setattr(Place, "stream", property(lambda _: SimpleNamespace(
        shape=(4,), classes=25, batches=lambda *_: (torch.zeros(1, 8, 4), torch.zeros(1, 8, dtype=torch.int64)),
    )))  # fmt: skip
    preset = replace(hessian_spectrum.PRESETS["smoke"], spectrum_samples=8, width=4)
    found = hessian_spectrum.spectrum((preset, 0.01, Place(tmp_path)))
    assert min(asked) > 25
    claims = hessian_spectrum.spectra_claims(found, 25)
    assert [claim.why for claim in claims if not claim.holds]
    assert any(claim.what.startswith("eigenvalue 25 over the next") for claim in claims)


@pytest.mark.slow
@pytest.mark.parametrize("module", [hessian_spectrum, catapult_silent_alignment], ids=lambda one: one.__name__)
def test_every_claim_of_the_experiment_holds(module: Any, tmp_path: Path) -> None:
    module.main(["--preset", "cpu", "--results", str(tmp_path), "--work", str(tmp_path / "work")])
    claims = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["claims"]
    assert [one for one in claims if not one["holds"]] == []
