r"""FSDP2 by torchrun: wrap, then fully_shard, then the optimizer; θ₀ is sharded with the model.

    python recipes/fsdp2.py                          # smoke preset: starts two processes on the CPU by itself
    torchrun --standalone --nproc-per-node 8 recipes/fsdp2.py --width 2048 --layers 24 --heads 16 --batch-size 1024 \
        --steps 20000 --device cuda

What it shows: a transformer over rows of pixels, sharded block by block. fully_shard replaces every parameter by a
slice; gammaopt finds the rates again by name, and slices the frozen copy of the start in the same way, so that it
takes 1/N of the memory on each of N processes. γ, depth and θ₀ are in the state dict.
What to expect: 65 to 73 % on held-out digits after 200 steps (two seeds), and the plan table before sharding.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.run import main as torchrun
from tqdm import tqdm

import gammaopt
from gammaopt.online import Digits


class Transformer(nn.Module):
    """Encoder over the twelve rows of a digit."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.position = nn.Parameter(0.02 * torch.randn(12, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.embed(images[:, 0]) + self.position
        for block in self.blocks:
            rows = block(rows)
        logits: Tensor = self.readout(self.norm(rows).mean(1))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=1.0, help="feature-learning strength")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate tuned at γ = 1")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64, help="samples of all processes together")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        torchrun(["--standalone", "--nproc-per-node", "2", *sys.argv])
        return

    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(args.device, int(os.environ["LOCAL_RANK"]) if args.device == "cuda" else None)
    digits = Digits()

    def share(step: int, size: int, split: str = "train") -> tuple[Tensor, Tensor]:
        """This process's part of a batch of ``size``."""
        inputs, targets = digits.batches(args.seed, step, step + 1, size, split)
        return inputs[0, rank::world].to(device), targets[0, rank::world].to(device)

    torch.manual_seed(args.seed)  # the same network on every rank
    net = Transformer(args.width, args.layers, args.heads).to(device)
    example = digits.batches(args.seed, 0, 1, 32)[0][0].to(device)  # and the same example, so the same plan
    model = gammaopt.wrap(net, gamma=args.gamma, example_inputs=example, loss="cross_entropy")
    if rank == 0:
        print(model.gammaopt.table(args.lr, "adam"))
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = gammaopt.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)

    progress = tqdm(range(args.steps), desc="training", disable=rank > 0)
    for step in progress:
        inputs, targets = share(step, args.batch_size)
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")

    inputs, targets = share(0, 2048, "held_out")
    with torch.no_grad():
        right = (model(inputs).argmax(-1) == targets).sum()
    dist.all_reduce(right)
    if rank == 0:
        print(f"held-out accuracy {100 * right.item() / 2048:.1f} % (chance 10.0 %)")
    dist.destroy_process_group()


if __name__ == "__main__":
    gammaopt.run_script(main)
