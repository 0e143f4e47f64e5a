r"""A character-level GPT on the Python standard library's own sources: one rate at every γ, by Adam's law γ^(1/L).

    python recipes/language_model.py                 # smoke preset: a tiny GPT, three γ × three rates, CPU
    python recipes/language_model.py --layers 6 --heads 6 --width 384 --context 256 --batch-size 64 --steps 5000 \
        --gammas 1 --factors 0.1 0.3 1 3 --device cuda        # the size of nanoGPT's character model: tune --lr there

What it shows: `--lr` is tuned once, at γ = 1; at every other γ gammaopt.AdamW steps at lr·s(γ), where s(γ) follows γ
below the knee, which is 1 in mean-field form, and γ^(1/L) above it, with L the measured effective depth, about 2. The
table has a row for each γ, a column for each factor on the law's rate; at γ = 16 the left one is the rate of γ = 1.
What to expect: the lowest loss in the middle column at γ = 1, 4 and 16 (two seeds). Not beyond: at γ = 64 a quarter of
the law's rate is better, at γ = 1/4 four times it. 39 % of the next characters are right; always "space" gets 28 %.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import gammaopt

ALPHABET = 128  # ASCII


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(ALPHABET, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, ALPHABET, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        past = nn.Transformer.generate_square_subsequent_mask(text.shape[1], device=text.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=past, is_causal=True)
        logits: Tensor = self.readout(self.norm(x))
        return logits


def sources() -> Tensor:
    """All of the standard library's top-level modules as one text."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)
    return torch.tensor([byte for byte in text if byte < ALPHABET])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=0.2, help="learning rate tuned at γ = 1")
    parser.add_argument("--gammas", type=float, nargs="+", default=[1, 4, 16])
    parser.add_argument("--factors", type=float, nargs="+", default=[1 / 4, 1, 4], help="on the law's rate")
    for name, default in {"width": 32, "layers": 2, "heads": 2, "context": 32, "steps": 200, "batch-size": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text = sources()
    train_text, held_out_text = text.split(len(text) * 9 // 10)[:2]

    def batch(text: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text) - args.context, (size, 1), generator=torch.Generator().manual_seed(seed))
        windows = text[starts + torch.arange(args.context + 1)].to(args.device)
        return windows[:, :-1], windows[:, 1:]

    def train(gamma: float, lr: float) -> tuple[float, float, nn.Module]:
        """Loss and accuracy on held-out text, and the model."""
        torch.manual_seed(args.seed)
        net = GPT(args.width, args.layers, args.heads, args.context).to(args.device)
        example = batch(train_text, 4, 0)[0]
        model = gammaopt.wrap(net, gamma, example_inputs=example, parametrization="mean_field", loss="cross_entropy")
        optimizer = gammaopt.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda t: min(10 * (t + 1), args.steps - t) / args.steps
        )
        for step in range(args.steps):
            inputs, targets = batch(train_text, args.batch_size, step)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            progress.update()
        inputs, targets = batch(held_out_text, 256, 0)
        with torch.no_grad():
            logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss.item(), (logits.argmax(-1) == targets).float().mean().item(), model

    rows, results = [], []
    with tqdm(total=len(args.gammas) * len(args.factors) * args.steps, desc="training") as progress:
        for gamma in args.gammas:
            cells = [train(gamma, args.lr * factor) for factor in args.factors]
            results += [(loss, accuracy, gamma) for loss, accuracy, _ in cells]
            plan = cells[0][2].gammaopt
            rows.append(
                f"{gamma:<8.3g}{plan.law('adam').factor(gamma):>10.3g}" + "".join(f"{c[0]:>13.3f}" for c in cells)
            )
    print(plan.table(args.lr, "adam"))
    print(f"\n{'γ':<8}{'s(γ)':>10}" + "".join(f"{f'{factor:.3g} × law':>13}" for factor in args.factors))
    print("\n".join(rows))
    chance = torch.bincount(held_out_text).max().item() / len(held_out_text)
    _, accuracy, gamma = min(results)
    print(f"held-out accuracy {100 * accuracy:.1f} % at γ = {gamma:g} (chance {100 * chance:.1f} %: the commonest one)")


if __name__ == "__main__":
    gammaopt.run_script(main)
