"""DistributedDataParallel by torchrun: wrap before it, build the optimizer after it.

    python recipes/ddp.py                            # smoke preset: starts two processes on the CPU by itself
    torchrun --standalone --nproc-per-node 8 recipes/ddp.py --width 4096 --batch-size 4096 --steps 20000 --device cuda

What it shows: DistributedDataParallel gives every process the first one's parameters; gammaopt has it give them θ₀ and
the plan too, so that all of them step the same function at the same rates. An optimizer built on the parameters of
the parallel model finds its rates as ever.
What to expect: about 86 % on held-out digits after one pass, and the same within 1 point for 1, 2 and 4 processes. A
`Shard` of a stream gives each process batches that no other sees, and makes no more of them than are trained on.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.run import main as torchrun
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import gammaopt
from gammaopt.online import Digits
from gammaopt.online.streams import Shard


def build(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(144, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=1.0, help="feature-learning strength")
    parser.add_argument("--lr", type=float, default=0.2, help="learning rate tuned at γ = 1")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32, help="samples of all processes together")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        torchrun(["--standalone", "--nproc-per-node", "2", *sys.argv])
        return

    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(args.device, int(os.environ["LOCAL_RANK"]) if args.device == "cuda" else None)
    if args.batch_size % world:
        parser.error(f"--batch-size {args.batch_size} is no multiple of {world} processes")
    digits = Shard(Digits(), rank, world)  # batch t here is batch t·world + rank of the whole stream

    def batch(step: int, size: int, split: str = "train") -> tuple[Tensor, Tensor]:
        inputs, targets = digits.batches(args.seed, step, step + 1, size, split)
        return inputs[0].to(device), targets[0].to(device)

    torch.manual_seed(args.seed)
    net = build(args.width).to(device)
    model = gammaopt.wrap(
        net, gamma=args.gamma, example_inputs=batch(0, 64)[0], parametrization="mean_field", loss="cross_entropy"
    )
    parallel = DistributedDataParallel(model)
    optimizer = gammaopt.SGD(parallel.parameters(), lr=args.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    if rank == 0:
        print(model.gammaopt.table(args.lr))

    progress = tqdm(range(args.steps), desc="training", disable=rank > 0)
    for step in progress:
        inputs, targets = batch(step, args.batch_size // world)
        loss = F.cross_entropy(parallel(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")

    inputs, targets = (part[rank::world] for part in batch(0, 2048, "held_out"))  # these are the same everywhere
    with torch.no_grad():
        right = (parallel(inputs).argmax(-1) == targets).sum()
    dist.all_reduce(right)
    if rank == 0:
        print(f"held-out accuracy {100 * right.item() / 2048:.1f} % (chance 10.0 %)")
    dist.destroy_process_group()


if __name__ == "__main__":
    gammaopt.run_script(main)
