"""Flat-LoRA: adapters learn mirrored digits while the frozen network below them carries noise.

A network is trained on digits, and then frozen. Adapters of rank 4 beside its two hidden layers learn to read mirrored
images from few samples: by AdamW alone, and by FlatLoRA around AdamW (Li et al., arXiv 2409.14396). Both take one pass
per step. The program prints the accuracies and what a step cost.

    python examples/flat_lora.py [--epochs 30] [--samples 300] [--rho 0.3]
"""

from __future__ import annotations

import argparse
import copy
from time import perf_counter

import torch
from data import digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fused_sam


class LoRA(nn.Module):
    """A frozen linear layer, and an adapter B A of low rank beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def mirrored(images: Tensor) -> Tensor:
    return images.view(-1, 8, 8).flip(2).reshape(-1, 64)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int) -> float:
    """Train in batches of 32, and return the milliseconds per step."""
    start, steps = perf_counter(), 0
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(32):
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return 1000 * (perf_counter() - start) / steps


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--samples", type=int, default=300, help="mirrored images that the adapters learn from")
    parser.add_argument("--rho", type=float, default=0.3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = digits()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    train(base, torch.optim.AdamW(base.parameters(), lr=1e-3), task.train.x, task.train.y, 10)
    x, y = mirrored(task.train.x[: options.samples]), task.train.y[: options.samples]
    test_x, test_y = mirrored(task.test.x), task.test.y
    before = accuracy(base, test_x, test_y)

    found = {}
    for name in ("LoRA", "Flat-LoRA"):
        torch.manual_seed(1)
        model = copy.deepcopy(base)
        model[0], model[2] = LoRA(model[0]), LoRA(model[2])
        model[4].requires_grad_(False)
        if name == "LoRA":
            adapters = [p for p in model.parameters() if p.requires_grad]
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(adapters, lr=5e-3)
            cost = train(model, optimizer, x, y, options.epochs)
        else:
            total = options.epochs * -(-len(x) // 32)
            flat = fused_sam.FlatLoRA(model.parameters(), torch.optim.AdamW, rho=options.rho, total=total, lr=5e-3)
            cost = train(model, flat, x, y, options.epochs)
            flat.eval()  # the frozen weights without noise, bit for bit
            assert torch.equal(model[0].base.weight, base[0].weight)
        found[name] = accuracy(model, test_x, test_y), cost
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    print(f"{trained:,} weights in adapters, {frozen:,} frozen; accuracy on mirrored images before: {before:.1%}")
    for name, (reached, cost) in found.items():
        print(f"{name}: accuracy on mirrored images {reached:.1%}, {cost:.2f} ms per step")


if __name__ == "__main__":
    main()
