"""The architectures' intervals are over seeds, their table has all networks, and their sentence follows from claims."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import architectures
import numpy as np
import pytest
from torch import nn

from gammaopt import effective_depth

GAMMAS = (1.0, 10.0, 100.0)


def row(slopes: list[float], reach: float = 0.0) -> dict[str, Any]:
    (case,) = architectures.PRESETS["smoke"].cases
    edges = [[slope * math.log10(gamma) for slope in slopes] for gamma in GAMMAS]
    return architectures.row(case, 3.0, GAMMAS, edges, reach)


def test_the_interval_is_that_of_one_slope_for_each_seed() -> None:
    values = np.array([0.5, 0.6, 0.8])
    found = row(list(values))
    half = 4.3027 * values.std(ddof=1) / 3**0.5  # t of two degrees of freedom: nine edges are three seeds
    assert found["measured"] == pytest.approx(values.mean(), abs=1e-4)
    assert found["interval"] == pytest.approx([values.mean() - half, values.mean() + half], abs=1e-3)


def test_edges_are_known_no_closer_than_their_search() -> None:
    assert row([0.6, 0.6], reach=0.1)["interval"] == pytest.approx([0.5, 0.7])


def test_the_sentence_counts_the_exponents_that_hold() -> None:
    rows = [row([0.6, 0.7]), row([1.2, 1.3])]
    claims = [architectures.claim(one) for one in rows]
    assert [claim.holds for claim in claims] == [True, False]
    assert claims[1].why == "one power from γ = 1 to 100: local slopes 1.25, 1.25"
    assert "within 0.2 in 1 of 2 of the paper's architectures" in architectures.meaning(rows, claims)


def test_a_norm_is_added_or_removed_and_the_depth_says_so() -> None:
    looks, photos = {look.title: look for look in architectures.LOOKED}, architectures.STREAM

    def depth(look: architectures.Look, norm: str) -> float:
        return effective_depth(
            architectures.fresh(look.model, look.knobs, photos, 0, norm), architectures.images(photos, 0)
        )

    pytest.importorskip("skimage")
    for name in ("MLP with layer norm", "CNN with batch norm"):
        assert depth(looks[name], "own") == pytest.approx(3.0, abs=0.01)
        assert depth(looks[name], "added") == pytest.approx(2.0, abs=0.01)
    vit = looks["ViT without normalisation"]
    net = architectures.fresh(vit.model, vit.knobs, architectures.STREAM, 0, "removed")
    assert not [module for module in net.modules() if isinstance(module, nn.LayerNorm)]
    assert depth(vit, "removed") > depth(vit, "own") + 1


def test_the_table_has_each_architecture_with_and_without_norm_and_says_what_is_missing() -> None:
    pytest.importorskip("skimage")
    smoke = architectures.PRESETS["smoke"]
    table = architectures.table(smoke, architectures.STREAM, [row([0.6, 0.7])])
    lines = [line.split(" | ") for line in table.splitlines()[2:4]]
    assert [line[0] for line in lines] == ["| CNN, width 4, depth 3", "| MLP, width 64, depth 3"]
    assert [line[3] for line in lines] == ["0.67", "0.67"]
    assert [line[4] for line in lines] == ["0.65 |", "measured on digits by depth.py |"]
    looked = architectures.table(replace(smoke, looked_at=architectures.LOOKED[-2:]), architectures.STREAM, [])
    assert [line.split(" | ")[4] for line in looked.splitlines()[3:5]] == ["not measured |"] * 2
    assert "| ResNet-18 without normalisation, width 4, depth 2 |" in looked
    titles = {case.title for case in architectures.PRESETS["cpu"].cases} | {one.title for one in architectures.LOOKED}
    assert titles == {
        "MLP", "MLP with layer norm", "CNN", "CNN with batch norm", "ViT", "ViT without normalisation", "ResNet-18",
        "ResNet-18 without normalisation",
    }  # fmt: skip
