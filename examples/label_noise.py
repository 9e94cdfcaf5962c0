"""A plain loop around sam_step() compares SGD with SAM on digits, 40% of which have a wrong label.

    python examples/label_noise.py [--epochs 40] [--samples 1000]
"""

from __future__ import annotations

import argparse

import torch
from data import digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_sam import SAM
from fused_sam.training import sam_step


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def train(rho: float, epochs: int, samples: int) -> float:
    """Train, and return the accuracy on clean test labels. With rho 0 a step is SGD's, in one pass."""
    task = digits(noise=0.4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    x, y = task.train.x[:samples], task.train.y[:samples]
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            sam_step(model, loss_fn, (x[index], y[index]), optimizer)
        scheduler.step()
    model.eval()
    with torch.no_grad():
        return (model(task.test.x).argmax(1) == task.test.y).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # SAM makes two passes per step, so SGD gets twice the epochs.
    sgd = train(0.0, 2 * options.epochs, options.samples)
    sam = train(0.5, options.epochs, options.samples)
    print(f"40% wrong labels, accuracy on clean test images: SGD {sgd:.1%}, SAM {sam:.1%}")


if __name__ == "__main__":
    main()
