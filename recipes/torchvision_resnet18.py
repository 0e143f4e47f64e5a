r"""torchvision's ResNet-18, unchanged, at any feature-learning strength γ.

    python recipes/torchvision_resnet18.py           # smoke preset: 32×32 crops of photographs, CPU
    python recipes/torchvision_resnet18.py --gamma 0.3
    python recipes/torchvision_resnet18.py --data imagenet --size 224 --classes 1000 --batch-size 256 \
        --steps 450000 --device cuda                 # imagenet/train/CLASS/*.jpg and imagenet/val/CLASS/*.jpg

What it shows: the network keeps torchvision's initialisation and BatchNorm; `wrap` measures its effective depth (2: a
ResNet's convolutions are scale-invariant) and its knee, which bend the law. center="zero_readout" starts at f = 0
without a second copy of the network: no extra memory, no extra forward pass, and `fold` gives a plain network back.
What to expect: 11 million parameters tell ten photographs apart after 60 steps: 38 to 41 % on held-out crops.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets, models, transforms
from tqdm import tqdm

import gammaopt
from gammaopt.online import Photos


def folder(args: argparse.Namespace, *, training: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images in folders named by class: epoch after epoch of train/, or one of val/."""
    random = [transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(args.size * 8 // 7), transforms.CenterCrop(args.size)]
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = [*(random if training else centre), transforms.ToTensor(), normalise]
    images = datasets.ImageFolder(args.data / ("train" if training else "val"), transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(images, args.batch_size, shuffle=training, num_workers=args.workers)
    yield from loader
    while training:
        yield from loader


def photos(args: argparse.Namespace, *, training: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh batches of the photographs that the scikit-image and scikit-learn packages carry."""
    stream = Photos()
    for step in range(args.steps if training else 8):
        split = "train" if training else "held_out"
        inputs, targets = stream.batches(args.seed, step, step + 1, args.batch_size, split)
        yield inputs[0], targets[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=1.0, help="feature-learning strength")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate tuned at γ = 1")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--data", type=Path, help="folder with train/CLASS/… and val/CLASS/… instead of the photographs"
    )
    parser.add_argument("--size", type=int, default=32, help="side of an image in --data")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    batches = folder if args.data else photos
    torch.manual_seed(args.seed)

    net = models.resnet18(num_classes=args.classes)
    example = next(iter(batches(args, training=True)))[0][:8]
    model = gammaopt.wrap(
        net, gamma=args.gamma, example_inputs=example, center="zero_readout", loss="cross_entropy"
    ).to(args.device)
    optimizer = gammaopt.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.steps)
    print(model.gammaopt.table(args.lr))

    progress = tqdm(
        zip(range(args.steps), batches(args, training=True), strict=False), total=args.steps, desc="training"
    )
    for step, (inputs, targets) in progress:
        loss = F.cross_entropy(model(inputs.to(args.device)), targets.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")

    plain = gammaopt.fold(model, example.to(args.device)).eval()  # torchvision's own class again; it computes f
    right = total = 0
    with torch.no_grad():
        for inputs, targets in batches(args, training=False):
            right += int((plain(inputs.to(args.device)).argmax(-1).cpu() == targets).sum())
            total += len(targets)
    print(f"held-out accuracy {100 * right / total:.1f} % (chance {100 / args.classes:.1f} %)")


if __name__ == "__main__":
    gammaopt.run_script(main)
