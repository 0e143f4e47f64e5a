"""Lightning: the wrapped model lives in a LightningModule; its checkpoint must bring θ₀, θ and the optimizer back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import gammaopt
from gammaopt import wrap
from gammaopt.online import MLP

pytest.importorskip("lightning", reason="needs the extra 'frameworks'")

import lightning.pytorch as pl

pytestmark = pytest.mark.filterwarnings("ignore")  # its advice on workers and logging, which is not about us


class Task(pl.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = wrap(MLP(6, 3, width=8, depth=3, bias=True), 3.0, depth=3)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss: Tensor = (self.model(x) - y).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = gammaopt.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def trainer(folder: Path, steps: int) -> Any:
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def loader() -> Any:
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def test_fit_equals_the_plain_loop_and_resumes_exactly(tmp_path: Path) -> None:
    whole, first = Task(), Task()
    trainer(tmp_path, 6).fit(whole, loader())
    fitted = trainer(tmp_path, 3)
    fitted.fit(first, loader())
    fitted.save_checkpoint(tmp_path / "three.ckpt")
    resumed = Task(seed=5)
    trainer(tmp_path, 6).fit(resumed, loader(), ckpt_path=tmp_path / "three.ckpt", weights_only=False)

    plain = Task().model
    optimizer = gammaopt.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    (x, y) = next(iter(loader()))
    for _ in range(6):
        optimizer.zero_grad()
        (plain(x) - y).square().mean().backward()
        optimizer.step()
        scheduler.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(whole.model.state_dict()[name], value)
        assert torch.equal(resumed.model.state_dict()[name], value)
