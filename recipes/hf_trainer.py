r"""Hugging Face Trainer: a ViT built from a config, with gammaopt's AdamW and the loss of f.

    python recipes/hf_trainer.py                     # smoke preset: a tiny ViT on 32×32 crops of photographs, CPU
    python recipes/hf_trainer.py --gamma 3
    python recipes/hf_trainer.py --width 768 --layers 12 --heads 12 --patch-size 4 --steps 50000 --batch-size 256 \
        --lr 3e-4 --device cuda                      # ViT-B

What it shows: three things that a Transformers model needs. output="logits" says which part of what it returns is h;
compute_loss_func= takes the loss of f, since the loss inside the model would be that of h; and the Trainer builds
gammaopt.AdamW itself, with its own weight-decay groups and schedule.
What to expect: 50 to 55 % on held-out crops after 150 steps (three seeds), from f = 0 (loss 2.303) at the start.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import gammaopt
from gammaopt.online import Photos


class PhotoSamples(IterableDataset[dict[str, Tensor]]):
    """Fresh crops of the photographs that the scikit-image and scikit-learn packages carry: your data goes here.

    Each worker of the loader makes its own share; the Trainer itself deals what they make to the processes.
    """

    def __init__(self, samples: int, size: int, split: str = "train", seed: int = 0) -> None:
        self.photos, self.samples, self.size, self.split, self.seed = Photos(), samples, size, split, seed

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for step in range(worker, -(-self.samples // self.size), workers):
            inputs, targets = self.photos.batches(self.seed, step, step + 1, self.size, self.split)
            left = self.samples - step * self.size  # the last batch may be a smaller one
            for pixels, label in zip(inputs[0, :left], targets[0, :left], strict=True):
                yield {"pixel_values": pixels, "labels": label}


def loss_of_f(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits, labels)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = np.asarray(prediction.predictions)
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=1.0, help="feature-learning strength")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate tuned at γ = 1")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="processes that make the data")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)

    shape = {"image_size": 32, "patch_size": args.patch_size, "num_labels": 10}
    size = {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_attention_heads": args.heads}
    config = ViTConfig(**shape, **size, intermediate_size=4 * args.width)
    example = {"pixel_values": Photos().batches(args.seed, 0, 1, 32)[0][0]}
    model = gammaopt.wrap(
        ViTForImageClassification(config), args.gamma, example_inputs=example, output="logits", loss="cross_entropy"
    )
    print(model.gammaopt.table(args.lr, "adam"))

    with tempfile.TemporaryDirectory() as folder:  # yours to keep checkpoints in
        settings = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=128,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            weight_decay=0.05,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            use_cpu=args.device == "cpu",
            dataloader_num_workers=args.workers,
            seed=args.seed,
        )
        size = settings.train_batch_size * settings.world_size  # of all devices together
        trainer = Trainer(
            model,
            settings,
            train_dataset=PhotoSamples(args.steps * size, size, seed=args.seed),
            eval_dataset=PhotoSamples(1024, 128, "held_out", seed=args.seed),
            compute_loss_func=loss_of_f,
            compute_metrics=accuracy,
            optimizer_cls_and_kwargs=(gammaopt.AdamW, {"lr": args.lr}),
        )
        trainer.train()
        result = trainer.evaluate()["eval_accuracy"]
    print(f"held-out accuracy {100 * result:.1f} % (chance 10.0 %)")


if __name__ == "__main__":
    gammaopt.run_script(main)
