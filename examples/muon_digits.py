"""A small transformer on digits: AdamW, Muon with AdamW, and SAM around both. Prints accuracy and what each costs.

Muon moves the matrices of the blocks; embedding, positions, norms and output layer stay with AdamW.

    python examples/muon_digits.py [--epochs 15] [--samples 1000]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from data import digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_sam import SAM, MuonWithAdamW
from fused_sam.training import sam_step


class RowTransformer(nn.Module):
    """Reads an image as eight words, its rows."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.positions = nn.Parameter(torch.randn(8, width) * 0.1)
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        words = self.embedding(x.view(-1, 8, 8)) + self.positions
        return self.head(self.blocks(words).mean(1))


def groups_of(model: RowTransformer, *, muon: bool) -> list[dict[str, Any]]:
    """Return the blocks as one group, whose matrices go to Muon, and the rest as a group for AdamW."""
    outside = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    blocks: dict[str, Any] = {"params": list(model.blocks.parameters())}
    if not muon:
        blocks["use_muon"] = False
    return [blocks, {"params": outside, "use_muon": False}]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def train(muon: bool, rho: float, epochs: int, samples: int) -> tuple[float, float, float]:
    """Train; return the accuracy on test images, milliseconds per step, and bytes of state per parameter."""
    task = digits()
    torch.manual_seed(0)
    model = RowTransformer()
    optimizer = SAM(groups_of(model, muon=muon), MuonWithAdamW, rho=rho, lr=0.01, adamw_lr=5e-3)
    x, y = task.train.x[:samples], task.train.y[:samples]
    seconds, steps = 0.0, 0
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(8):
            start = time.perf_counter()
            sam_step(model, loss_fn, (x[index], y[index]), optimizer)
            seconds, steps = seconds + time.perf_counter() - start, steps + 1
    model.eval()
    with torch.no_grad():
        accuracy = (model(task.test.x).argmax(1) == task.test.y).double().mean().item()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    return accuracy, 1e3 * seconds / steps, held / sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = 0.0
    for name, muon, rho in (("AdamW", False, 0.0), ("Muon", True, 0.0), ("SAM and Muon", True, 0.05)):
        accuracy, step, held = train(muon, rho, options.epochs, options.samples)
        base = base or step
        cost = f"{step:.1f} ms per step ({step / base:.2f}x AdamW), {held:.1f} bytes of state per parameter"
        print(f"{name}: accuracy on test images {accuracy:.1%}, {cost}")


if __name__ == "__main__":
    main()
