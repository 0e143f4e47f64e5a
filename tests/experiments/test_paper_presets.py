"""The preset ``paper`` trains on the images of a data set: networks of their shape and classes, in every case."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import architectures
import knee
import numpy as np
import pytest
import residual
from _experiment import Place

from gammaopt.online import Recipe
from gammaopt.online.train import train


@pytest.fixture
def place(tmp_path: Path) -> Place:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8), np.arange(300) % 7
    np.savez(tmp_path / "part0.npz", X=images, Y=labels)
    return Place(tmp_path / "work", data=tmp_path)


def test_no_more_steps_are_asked_for_than_the_data_set_has(place: Place) -> None:
    there = place.stream.train_samples  # type: ignore[attr-defined]
    preset = architectures.PRESETS["smoke"]
    case = replace(preset.cases[0], steps=10_000)
    assert architectures.edge_job(preset, place, case, 3.0, 1.0, 0).recipe.steps == there // case.batch_size
    assert architectures.edge_job(preset, Place(place.work), case, 3.0, 1.0, 0).recipe.steps == 10_000
    name = architectures.name_of(case, 1.0, 0)
    assert json.loads(name)[3] == 10_000  # that an edge is kept under
    assert knee.recipe(knee.Preset(steps=10_000), place, "images", 8).steps == there // knee.BATCH_SIZE
    assert knee.recipe(knee.Preset(steps=10_000), Place(place.work), "digits", 8).steps == 10_000


def test_the_best_rates_of_residual_networks_take_no_more_steps_than_there_are(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def best_rates(recipe: Recipe, gammas: Sequence[float], *_: object) -> list[list[float]]:
        asked.append(recipe.steps)
        return [[0.0 for _ in gammas]]

    monkeypatch.setattr(residual, "best_rates", best_rates)
    residual.row(replace(residual.PRESETS["smoke"], steps=10_000), place, 1)
    assert asked == [place.stream.train_samples // residual.BATCH_SIZE]  # type: ignore[attr-defined]


def trains(recipe: Recipe) -> bool:
    return recipe.stream.name.startswith("cifar5m") and train(recipe, gamma=1.0, lr=0.01, seed=0).diverged_at is None


def test_an_architecture_is_built_for_the_images_and_looked_at_on_them(place: Place) -> None:
    preset = architectures.PRESETS["smoke"]
    case = replace(preset.cases[0], steps=2)
    job = architectures.edge_job(preset, place, case, 3.0, 1.0, 0)
    assert trains(job.recipe)
    assert architectures.mean_depth(case, architectures.crops(place)) == pytest.approx(3.0, abs=0.05)
    assert architectures.crops(Place(place.work)) is architectures.STREAM
    assert {case.title for case in architectures.PRESETS["paper"].cases} == {"CNN", "ViT", "ResNet-18"}


@pytest.mark.parametrize("task", knee.IMAGES)
def test_a_knee_is_predicted_and_measured_on_the_images(place: Place, task: str) -> None:
    preset = knee.Preset(cases=((task, 8),), steps=2)
    assert trains(knee.recipe(preset, place, task, 8))
    assert knee.predict(preset, place, task, 8) > 0
    assert {case[0] for case in knee.PRESETS["paper"].cases} == set(knee.IMAGES)


def test_residual_blocks_stand_between_the_images_and_their_classes(place: Place) -> None:
    stream = place.stream
    net = residual.network(stream.shape, stream.classes, 1, 16)
    x, y = (part[0] for part in stream.batches(0, 0, 1, 8))
    assert net(x).shape == (8, stream.classes)
    assert int(y.max()) < stream.classes
    assert residual.measured_depth(net, stream, 0) > 1
