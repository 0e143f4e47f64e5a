"""A γ study around your own training function: tuned fairly, confirmed on fresh seeds, resumable, with a report.

    python recipes/gamma_study.py                    # smoke preset: 2 × 12 trials and 6 fresh seeds on digits, CPU
    python recipes/gamma_study.py --trials 64 --fresh 12 --steps 1000 --out runs/mine
    python recipes/gamma_study.py --width 1024 --steps 20000 --trials 64 --device cuda
    gammaopt confirm runs/gamma_study --seeds 20 --objective recipes/gamma_study.py:train

What it shows: `train` is any function of a trial, which brings γ, rate, seed and settings; `gammaopt.tuning.study` does
the rest. One arm searches γ and the rate, the other the rate at γ = 1, both with the same number of trials and the same
seeds; the best of each is then trained on seeds that neither has seen, and compared in pairs. Kill it and start it
again: it goes on, and trains no finished run again. What decides a number and is not the study's goes into `settings`.
What to expect: about 46 % online accuracy at the tuned γ, 1 to 3 points above that of γ = 1 (six seeds, 95 %),
at a γ of about 1/4: the runs are short.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import gammaopt
from gammaopt.online import Digits
from gammaopt.tuning import ObjectiveTrial, Progress, study

BATCH_SIZE = 32
digits = Digits()


def prepared(gamma: float, width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(144, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )
    return gammaopt.wrap(net, gamma, depth=3, parametrization="mean_field", loss="cross_entropy")


def train(trial: ObjectiveTrial) -> None:
    """Your training function. Here the mean of the reports is the score: each batch scored before it is trained on."""
    device = trial.settings["device"]
    model = prepared(trial.gamma, trial.settings["width"], trial.seed).to(device)
    optimizer = gammaopt.SGD(model.parameters(), lr=trial.lr)
    batches = digits.batches(trial.seed, 0, trial.steps, BATCH_SIZE)
    for step, (x, y) in enumerate(zip(*(part.to(device) for part in batches), strict=True)):
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        trial.report(step, (outputs.argmax(-1) == y).float().mean() if loss.isfinite() else loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="of each arm")
    parser.add_argument("--fresh", type=int, default=6, help="seeds to confirm on, 10 or more for a result to show")
    parser.add_argument("--gamma-range", type=float, nargs=2, help="by default what the steps can train")
    parser.add_argument("--lr", type=float, default=2.0, help="about the best rate at γ = 1")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/gamma_study", help="folder of the study")
    args = parser.parse_args()

    with tqdm(desc="runs", unit="it") as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.runs_total
            bar.update(progress.runs - bar.n)

        result = study(
            train,
            args.out,
            law=gammaopt.EtaLaw(depth=3, optimizer="sgd", loss="cross_entropy"),
            base_lr=args.lr,
            steps=args.steps,
            gamma_range=tuple(args.gamma_range) if args.gamma_range else None,
            trials=args.trials,
            seeds=1,
            confirm_seeds=args.fresh,
            seed=args.seed,
            metric="online accuracy",
            percent=True,
            settings={"width": args.width, "device": args.device},
            batch_size=BATCH_SIZE,
            on_progress=show,
        )

    tuned = result.arms["tuned"]
    print(prepared(tuned.gamma, args.width, args.seed).gammaopt.table(tuned.lr))
    print(result.in_words())
    print(f"Report: {args.out}/report.html")
    print(f"online accuracy {100 * tuned.confirmed_score:.1f} % at γ = {tuned.gamma:.3g} (chance 10.0 %)")


if __name__ == "__main__":
    gammaopt.run_script(main)
