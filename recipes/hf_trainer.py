r"""Hugging Face Trainer: a ViT built from a config, with gammaopt's AdamW and the loss of f.

    python recipes/hf_trainer.py                     # smoke preset: a tiny ViT on 32×32 crops of photographs, CPU
    python recipes/hf_trainer.py --gamma 3
    python recipes/hf_trainer.py --width 768 --layers 12 --heads 12 --patch-size 4 --steps 50000 --batch-size 256 \
        --lr 3e-4 --device cuda                      # ViT-B

What it shows: three things that a Transformers model needs. output="logits" says which part of what it returns is h;
compute_loss_func= takes the loss of f, since the loss inside the model would be that of h; and the Trainer builds
gammaopt.AdamW itself, with its own weight-decay groups and schedule.
What to expect: far above chance on held-out crops after 150 steps, from f = 0 (loss 2.303) at the start.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import gammaopt
from gammaopt.online import Photos


class PhotoSamples(IterableDataset[dict[str, Tensor]]):
    """Fresh crops of the photographs that the scikit-image and scikit-learn packages carry: your data goes here."""

    def __init__(self, samples: int, split: str = "train", seed: int = 0) -> None:
        self.photos, self.samples, self.split, self.seed = Photos(), samples, split, seed

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self.samples // 64):
            inputs, targets = self.photos.batches(self.seed, step, step + 1, 64, self.split)
            for pixels, label in zip(inputs[0], targets[0], strict=True):
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
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)

    config = ViTConfig(
        image_size=32,
        patch_size=args.patch_size,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.width,
        num_labels=10,
    )
    example = {"pixel_values": Photos().batches(args.seed, 0, 1, 32)[0][0]}
    model = gammaopt.wrap(
        ViTForImageClassification(config),
        gamma=args.gamma,
        example_inputs=example,
        output="logits",
        loss="cross_entropy",
    )
    print(model.gammaopt.table(args.lr, "adam"))

    with tempfile.TemporaryDirectory() as folder:  # yours to keep checkpoints in
        trainer = Trainer(
            model,
            TrainingArguments(
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
                seed=args.seed,
            ),
            train_dataset=PhotoSamples(args.steps * args.batch_size, seed=args.seed),
            eval_dataset=PhotoSamples(1024, "held_out", seed=args.seed),
            compute_loss_func=loss_of_f,
            compute_metrics=accuracy,
            optimizer_cls_and_kwargs=(gammaopt.AdamW, {"lr": args.lr}),
        )
        trainer.train()
        result = trainer.evaluate()["eval_accuracy"]
    print(f"held-out accuracy {100 * result:.1f} % (chance 10.0 %)")


if __name__ == "__main__":
    main()
