"""The preset ``paper`` trains on the images of a data set: networks of their shape and classes, in every case."""

from __future__ import annotations

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
