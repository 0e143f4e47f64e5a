"""A run works on its own device, whichever is current. Without an accelerator torch.cuda is stood for by a record of
what was asked of it: that streams, captures and generators are asked for on the run's device can be seen there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gammaopt._errors import UsageError
from gammaopt.online import MLP, Digits, Recipe, Run, ensemble, train, train_many
from gammaopt.online._device import check_device, cuda_device, on_device, seeded
from gammaopt.online._graph import CudaGraphs


class Machine:
    """Stands for torch.cuda with two devices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.seeds: dict[int, int] = {}
        self.asked: list[tuple[str, int]] = []
        self.streams = {i: f"default stream of {i}" for i in (0, 1)}
        machine = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.index = torch.device(device).index
                machine.asked.append(("stream", self.index))

            def wait_stream(self, other: Any) -> None:
                machine.asked.append(("wait", self.index))
                assert getattr(other, "index", None) == self.index

        class Graph:
            def replay(self) -> None:
                machine.asked.append(("replay", machine.current))

        @contextlib.contextmanager
        def graph(_: Graph, *, stream: Stream) -> Iterator[None]:
            assert stream.index == machine.current
            machine.asked.append(("capture", machine.current))
            yield

        @contextlib.contextmanager
        def current(device: torch.device) -> Iterator[None]:
            before, machine.current = machine.current, int(torch.device(device).index)
            yield
            machine.current = before

        def seed(value: int) -> None:
            self.seeds[self.current] = value

        @contextlib.contextmanager
        def stream(stream: Stream) -> Iterator[None]:
            machine.asked.append(("beside", stream.index))
            yield

        fakes = {
            "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "device": current, "stream": stream,
            "current_device": lambda: self.current, "current_stream": Stream, "manual_seed": seed,
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_device_without_an_index_is_the_current_one(machine: Machine) -> None:
    machine.current = 1
    assert cuda_device("cuda") == torch.device("cuda:1")
    assert cuda_device("cuda:0") == torch.device("cuda:0")
    assert cuda_device("cpu") is None


def test_the_runs_device_is_current_while_it_works(machine: Machine) -> None:
    with on_device("cuda:1"):
        assert machine.current == 1
    assert machine.current == 0
    with on_device("cpu"):
        assert machine.current == 0


def test_a_graph_is_recorded_and_replayed_on_the_runs_device(machine: Machine) -> None:
    made = torch.ones(1), torch.zeros(1)
    graphs = CudaGraphs(torch.device("cuda:1"))
    assert graphs.beside(lambda: made) is made
    replay = graphs(lambda: made)
    assert replay() is made
    names = {name for name, _ in machine.asked}
    assert {"stream", "wait", "beside", "capture", "replay"} == names
    assert {index for _, index in machine.asked} == {1}
    assert machine.current == 0


def test_only_the_generators_of_the_processor_and_of_the_device_are_seeded_and_given_back(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked: list[Any] = []

    @contextlib.contextmanager
    def fork(devices: list[Any]) -> Iterator[None]:
        forked.extend(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    before = torch.get_rng_state()
    with seeded("cuda:1", 7):
        drawn = torch.rand(3)
    torch.set_rng_state(before)
    assert (machine.seeds, forked) == ({1: 7}, [torch.device("cuda:1")])
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_the_processors_generator_is_given_back_and_an_accelerators_left_alone(machine: Machine) -> None:
    before = torch.get_rng_state()
    with seeded("cpu", 7):
        drawn = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert machine.seeds == {}


@pytest.mark.parametrize(
    "work",
    [
        lambda recipe: train(recipe, gamma=1.0, lr=0.1, seed=0),
        lambda recipe: train_many(recipe, [Run(1.0, 0.1, 0), Run(2.0, 0.1, 1)]),
        lambda recipe: train_many(recipe, [Run(1.0, 0.1, 0)], one_at_a_time=True),
        lambda recipe: ensemble.together(recipe),
        lambda recipe: ensemble.bytes_per_run(recipe),
    ],
    ids=["train", "train_many", "one_at_a_time", "together", "bytes_per_run"],
)
def test_whatever_works_for_a_recipe_has_its_device_current(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[Recipe], object]
) -> None:
    inside: list[str] = []
    seen: list[list[str]] = []

    @contextlib.contextmanager
    def spy(name: str) -> Iterator[None]:
        inside.append(name)
        yield
        inside.pop()

    for module in (ensemble, sys.modules[train.__module__]):
        monkeypatch.setattr(module, "on_device", spy)

    class Watched(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(list(inside))
            output: torch.Tensor = super().forward(x)
            return output

    work(Recipe(lambda: Watched(144, 10, width=4), Digits(), steps=3, batch_size=4, depth=3.0))
    assert seen
    assert all("cpu" in names for names in seen)
    assert inside == []


def test_devices_that_there_are_not() -> None:
    check_device("cpu")
    with pytest.raises(UsageError, match=r"unknown device 'gpu'; choose cpu, or cuda on a machine that has it"):
        check_device("gpu")
    with pytest.raises(UsageError, match=r"device 'meta' can't be used"):
        check_device("meta")
