r"""MNIST-1M of your own: a class-conditional diffusion model writes the files that the stream `mnist1m` reads.

    python recipes/mnist1m_generator.py              # smoke preset: scikit-learn's digits scaled up, on the CPU
    python recipes/mnist1m_generator.py --root ~/data --out mnist1m --width 384 --layers 12 --heads 6 --patch-size 4 \
        --steps 200000 --batch-size 512 --lr 3e-4 --files 100 --images 10000 --sampling-steps 100 --device cuda

What it shows: gammaopt where the loss is no classifier's. The network predicts the image x from cos(a)·x + sin(a)·ε,
a = πt/2, and samples by DDIM (Song, Meng, Ermon, ICLR 2021). A killed run goes on and comes out as one that was not.
What to expect: the nearest real digit of about 97 % of the generated ones is of the class that it was made for.
"""

import argparse
import math
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import gammaopt


class Denoiser(nn.Module):
    """Transformer over patches, a single one in the smoke preset; time and class are added to every token."""

    def __init__(self, width: int, layers: int, heads: int, patch: int) -> None:
        super().__init__()
        self.embed, self.patch = nn.Conv2d(1, width, patch, patch), patch
        self.position = nn.Parameter(0.02 * torch.randn((28 // patch) ** 2, width))
        self.time, self.label = nn.Linear(32, width), nn.Embedding(10, width)
        block = partial(nn.TransformerEncoderLayer, width, heads, 4 * width, 0.0, "gelu", 1e-5, True, True)
        self.blocks = nn.Sequential(*(block() for _ in range(layers)))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, patch**2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] * 30 ** torch.linspace(0, 1, 16, device=t.device)
        told = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(y)
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position + told[:, None]
        return F.fold(self.readout(self.norm(self.blocks(tokens))).transpose(1, 2), 28, self.patch, stride=self.patch)


def real(root: str) -> tuple[Tensor, Tensor]:
    if not root:
        small, labels = map(torch.tensor, load_digits(return_X_y=True))
        return F.interpolate(small.float().view(-1, 1, 8, 8), 28, mode="bilinear") / 8 - 1, labels
    data = import_module("torchvision.datasets").MNIST(root, train=True, download=False)
    return data.data[:, None].float() / 127.5 - 1, data.targets.long()


def write(path: Path, save: partial[object]) -> None:
    with open(path.with_suffix(".partial"), "wb") as file:
        save(file)
    path.with_suffix(".partial").replace(path)  # what is under its own name is whole


@torch.no_grad()
def sample(model: nn.Module, labels: Tensor, x: Tensor, steps: int) -> Tensor:
    """From noise x to images (n, 28, 28) uint8: DDIM from t = 1 to 0."""
    for i in range(steps, 0, -1):
        a, b = (math.pi / 2 * j / steps for j in (i, i - 1))
        image = model(x, x.new_full((len(x),), i / steps), labels).clamp(-1, 1)
        x = math.cos(b) * image + math.sin(b) / math.sin(a) * (x - math.cos(a) * image)
    return ((x[:, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"width": 128, "layers": 2, "heads": 2, "patch-size": 28, "steps": 500, "batch-size": 64, "lr": 2e-3}
    files = {"files": 2, "images": 100, "sampling-steps": 20, "save-every": 100, "root": "", "out": "runs/mnist1m"}
    for name, default in {**sizes, **files, "gamma": 1.0, "seed": 0, "device": "cpu"}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(words)
    numbers = {k: v for k, v in vars(args).items() if k not in ("files", "save_every", "out", "device")}
    images, classes = (part.to(args.device) for part in real(args.root))
    torch.manual_seed(args.seed)
    model = Denoiser(args.width, args.layers, args.heads, args.patch_size).to(args.device)
    example = images[:8], torch.linspace(0, 1, 8, device=args.device), classes[:8]
    gammaopt.wrap(model, args.gamma, example_inputs=example, center="zero_readout")  # f = 0 at the start, no copy
    optimizer = gammaopt.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    print(model.gammaopt.table(args.lr, "adam"))
    begin, right, out, checkpoint = 0, 0.0, Path(args.out), Path(args.out) / "checkpoint.pt"
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        begin, kept, *states = torch.load(checkpoint, map_location=args.device)
        if kept != numbers:
            parser.error(f"{out} has a run of {sorted(kept.items() - numbers.items())}; give those, or another --out")
        model.load_state_dict(states[0]), optimizer.load_state_dict(states[1])
    for step in tqdm(range(begin, args.steps), desc="training"):
        draw = torch.Generator().manual_seed(args.seed * 10**9 + step)
        pick = torch.randint(len(images), (args.batch_size,), generator=draw).to(args.device)
        t = torch.rand(args.batch_size, generator=draw).to(args.device)
        noise, a = torch.randn(len(t), 1, 28, 28, generator=draw).to(args.device), math.pi / 2 * t[:, None, None, None]
        loss = F.mse_loss(model(a.cos() * images[pick] + a.sin() * noise, t, classes[pick]), images[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            write(checkpoint, partial(torch.save, [step + 1, numbers, model.state_dict(), optimizer.state_dict()]))
    for number in tqdm(range(args.files), desc="files"):
        path, draw = out / f"MNIST_images_{number}.npz", torch.Generator().manual_seed(args.seed * 10**9 - 1 - number)
        labels = torch.randperm(args.images, generator=draw) % 10
        if not path.exists():
            noise = torch.randn(args.images, 1, 28, 28, generator=draw).to(args.device)
            made = sample(model, labels.to(args.device), noise, args.sampling_steps).cpu().numpy()
            write(out / f"MNIST_labels_{number}.npy", partial(np.save, arr=labels.numpy()))
            write(path, partial(np.savez, arr_0=made))  # last: where images are, labels are
        made = torch.from_numpy(np.load(path)["arr_0"])[:1000].flatten(1).to(args.device) / 127.5 - 1
        nearest = classes[torch.cdist(made, images.flatten(1)).argmin(1)].cpu()
        right += (nearest == labels[:1000]).double().mean().item() / args.files
    print(f"{args.files} files in {out}: accuracy {100 * right:.1f} % (chance 10.0 %) by the nearest real digit")


if __name__ == "__main__":
    gammaopt.run_script(main)
