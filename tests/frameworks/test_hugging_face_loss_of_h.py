"""HF Trainer: HF models compute their loss inside, from h; with f it has to be computed from the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import UsageError, wrap

transformers = pytest.importorskip("transformers", reason="needs the extra 'frameworks'")
pytest.importorskip("accelerate", reason="needs the extra 'frameworks'")

pytestmark = pytest.mark.filterwarnings("ignore")  # its advice, which is not about us


def vit(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=5, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(index % 5)}
        for index in range(8)
    ]


def loss_of_f(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels)


def prepared(seed: int) -> Any:
    return wrap(vit(seed), 2.0, depth=3, knee=1.0, output="logits", loss="cross_entropy")


def trainer_of(model: Any, folder: Path) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        remove_unused_columns=False, logging_steps=1, save_steps=3, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    optimizer = gammaopt.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return transformers.Trainer(
        model, arguments, train_dataset=samples(), compute_loss_func=loss_of_f, optimizers=(optimizer, None)
    )


def test_trainer_starts_from_zero_output_learns_and_restores(tmp_path: Path) -> None:
    batch = torch.stack([sample["pixel_values"] for sample in samples()])
    model = prepared(0)
    model.train()
    assert not model(pixel_values=batch).logits.any()
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(torch.tensor(5.0).log().item(), abs=1e-3)
    assert losses[-1] < losses[0]


class Pixels(nn.Module):
    """A model of the user's own: transformers 5.23 renames ViT's keys when saving, and resumes no ViT, ours or not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, pixel_values: Tensor) -> Any:
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.layers(pixel_values))


def test_trainer_resumes_theta0_and_optimizer_exactly(tmp_path: Path) -> None:
    model, resumed = (wrap(Pixels(seed), 2.0, depth=2, output="logits") for seed in (0, 5))
    trainer_of(model, tmp_path).train()
    trainer_of(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_trainer_builds_our_optimizer_with_its_own_groups(tmp_path: Path) -> None:
    model = wrap(vit(), 2.0, depth=3, output="logits")
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True),
        optimizer_cls_and_kwargs=(gammaopt.AdamW, {"lr": 0.01}),
    )
    optimizer = trainer.create_optimizer()
    assert len(optimizer.param_groups) == 2
    plan: Any = model.gammaopt
    multipliers = plan.multipliers("adam")
    assert optimizer.effective_lrs() == pytest.approx({name: 0.01 * m for name, m in multipliers.items()})


def test_labels_given_to_the_model_are_refused() -> None:
    model = wrap(vit(), 2.0, depth=3, output="logits")
    with pytest.raises(UsageError, match="computed its loss inside, from h and not from f"):
        model(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1]))
