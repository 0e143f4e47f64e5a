"""The cells of a batch train together, and their records are those of the one-run trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gammaopt.report
import gammaopt.tuning._workers as module
from gammaopt.online import CNN, MLP, TASKS, Digits, Recipe, RunRecord, ensemble, train
from gammaopt.online._stack import Stack
from gammaopt.online.ensemble import together
from gammaopt.tuning import StudyPlan, tune
from gammaopt.tuning._folder import Cell
from gammaopt.tuning._search import _batch_end
from gammaopt.tuning._workers import SHARE, Trainer, Workers, _shares

PLAN = StudyPlan("digits", "mse", steps=12, trials=8, seeds=2, confirm_seeds=2, gamma_range=(0.1, 10.0))
CELLS = [Cell(gamma, lr, seed) for gamma in (0.2, 5.0) for lr in (4.0, 1e5) for seed in (0, 1, 2)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 10))


def as_cell(record: RunRecord) -> Cell:
    return Cell(record.gamma, record.lr, record.seed)


def test_cells_trained_together_have_the_records_of_the_one_run_trainer() -> None:
    records = {as_cell(record): record for record in Workers(PLAN, 1).run(CELLS)}
    assert list(records) == sorted(CELLS, key=lambda cell: cell.seed)
    for cell, record in records.items():
        alone = train(PLAN.recipe(), gamma=cell.gamma, lr=cell.lr, seed=cell.seed)
        assert (record.diverged_at, record.steps) == (alone.diverged_at, alone.steps)
        assert record.effective_lr == pytest.approx(alone.effective_lr)
        assert record.prequential_loss == pytest.approx(alone.prequential_loss, rel=1e-5)
        assert record.prequential_accuracy == pytest.approx(alone.prequential_accuracy, abs=1 / 384)
    assert {record.diverged_at is None for record in records.values()} == {True, False}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_record_is_the_same_to_the_last_bit_in_a_stack_of_any_size(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Or a study's numbers would depend on the number of processes, and on where it was stopped."""
    whole = {as_cell(record): record for record in Workers(PLAN, 1).run(CELLS)}
    monkeypatch.setattr(module, "SHARE", size)
    assert {as_cell(record): record for record in Workers(PLAN, 1).run(reversed(CELLS))} == whole


def test_a_study_trains_each_batch_of_trials_in_one_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    real = Trainer.__call__

    def spy(self: Trainer, cells: list[Cell], checkpoint: Path | None = None) -> list[RunRecord]:
        assert self.stack >= len(cells)
        trained.append(len(cells))
        return real(self, cells, checkpoint)

    monkeypatch.setattr(Trainer, "__call__", spy)
    monkeypatch.setattr(gammaopt.report, "html_report", lambda result: result.in_words())
    tune(PLAN, tmp_path)
    assert trained[:4] == [8, 8, 8, 8]  # two arms of four Sobol points, then four of TPE's, on two seeds each
    assert len(trained) == 5


def test_a_killed_study_goes_on_in_the_midst_of_its_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gammaopt.report, "html_report", lambda result: result.in_words())
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(ensemble, "LOOK_EVERY", 4)
    steps, last = 0, 12 + 10  # the second batch's stack, two steps after its second checkpoint
    real = Stack.train_step

    def killed(self: Stack) -> tuple[Tensor, Tensor]:
        nonlocal steps
        if steps == last:
            raise KeyboardInterrupt
        steps += 1
        return real(self)

    whole = tune(PLAN, tmp_path / "whole")
    monkeypatch.setattr(Stack, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(PLAN, tmp_path / "killed")
    assert len(list((tmp_path / "killed").glob("stack-*.pt"))) == 1
    assert len((tmp_path / "killed" / "runs.jsonl").read_text().splitlines()) == 8
    steps, last = 0, -1
    again = tune(PLAN, tmp_path / "killed")
    assert steps == 4 + 3 * 12, "of the stack that was cut off the last four steps, and the three after it"
    assert (again.arms, again.confirm, again.trials) == (whole.arms, whole.confirm, whole.trials)
    assert list((tmp_path / "killed").glob("*stack-*")) == []


def test_a_share_is_that_of_its_checkpoint_and_the_others_are_made_of_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(ensemble, "LOOK_EVERY", 4)
    whole = {as_cell(record): record for record in Workers(PLAN, 1).run(CELLS)}
    real = Stack.train_step

    def killed(self: Stack) -> tuple[Tensor, Tensor]:
        if self.step == 9:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            list(Workers(PLAN, 1, checkpoints=tmp_path).run(CELLS[3:8]))
    (tmp_path / "stack-0.pt").write_bytes(b"cut off")
    trained: list[list[Cell]] = []
    call = Trainer.__call__

    def spy(self: Trainer, cells: list[Cell], checkpoint: Path | None = None) -> list[RunRecord]:
        trained.append(cells)
        return call(self, cells, checkpoint)

    monkeypatch.setattr(Trainer, "__call__", spy)
    with pytest.warns(UserWarning, match=r"stack-0\.pt is damaged and is kept as stack-0\.damaged; the runs"):
        again = {as_cell(record): record for record in Workers(PLAN, 1, checkpoints=tmp_path).run(CELLS)}
    assert again == whole
    assert [set(share) for share in trained] == [set(CELLS[3:8]), set(CELLS) - set(CELLS[3:8])]
    assert [path.name for path in tmp_path.iterdir()] == ["stack-0.damaged"]


def test_a_study_killed_while_a_finished_share_is_handed_over_trains_none_of_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Workers(PLAN, 1, checkpoints=tmp_path).run(CELLS)
    first = next(share)
    del share  # killed: it never comes to the other records
    monkeypatch.setattr(module, "train_many", pytest.fail)
    rest = [cell for cell in CELLS if cell != as_cell(first)]
    assert {as_cell(record) for record in Workers(PLAN, 1, checkpoints=tmp_path).run(rest)} == set(rest)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_finished_runs_is_set_aside_and_they_are_trained_again(tmp_path: Path) -> None:
    (tmp_path / "stack-0.jsonl").write_text("{not json}\n" * 3, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"stack-0\.jsonl is damaged and is kept as stack-0\.damaged-runs; the runs"):
        records = {as_cell(record) for record in Workers(PLAN, 1, checkpoints=tmp_path).run(CELLS[:2])}
    assert records == set(CELLS[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["stack-0.damaged-runs"]


def test_all_given_points_are_one_batch_and_the_others_come_in_about_eight() -> None:
    def ends(trials: int, start: int) -> list[int]:
        made = [0]
        while made[-1] < trials:
            made.append(_batch_end(trials, start, made[-1]))
        return made[1:]

    assert ends(32, 16) == [16, 20, 24, 28, 32]
    assert ends(200, 100) == [100, 113, 126, 139, 152, 165, 178, 191, 200]
    assert ends(6, 4) == [4, 6]
    assert ends(4, 4) == [4]
    # Some of a batch may have been told before a kill: the batch ends where it would have ended.
    assert [_batch_end(32, 16, done) for done in (0, 7, 15, 16, 19, 20, 31)] == [16, 16, 16, 20, 20, 24, 32]


@pytest.mark.parametrize(
    ("jobs", "size", "expected"),
    [
        (1, 48, [12]),
        (2, 48, [6, 6]),
        (2, 4, [3, 3, 3, 3]),
        (5, 48, [2, 3, 2, 3, 2]),
        (16, 48, [1] * 12),
        (2, 1, [1] * 12),
    ],
)
def test_shares_keep_every_process_busy(jobs: int, size: int, expected: list[int]) -> None:
    shares = _shares(CELLS, jobs, size)
    assert [len(share) for share in shares] == expected
    flat = [cell for share in shares for cell in share]
    assert sorted(flat, key=str) == sorted(CELLS, key=str)
    assert [cell.seed for cell in flat] == sorted(cell.seed for cell in CELLS)


def test_how_many_runs_train_together_follows_from_the_network() -> None:
    recipe = Recipe(partial(MLP, 144, 10, width=64), Digits(), steps=5, batch_size=8, depth=3.0)
    assert together(recipe) > SHARE
    assert together(replace(recipe, build=partial(MLP, 144, 10, width=512))) == 1
    assert together(replace(recipe, build=partial(CNN, (1, 12, 12), 10, width=4, depth=3))) == 1
    assert together(replace(recipe, build=with_dropout, parametrization="as_is")) == 0


def test_a_network_that_cannot_be_stacked_trains_one_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], build=with_dropout))
    records = {as_cell(record): record for record in Workers(PLAN, 1).run(CELLS[:4])}
    for cell in CELLS[:4]:
        assert records[cell] == train(PLAN.recipe(), gamma=cell.gamma, lr=cell.lr, seed=cell.seed)
