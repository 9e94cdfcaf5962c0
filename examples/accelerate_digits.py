"""SAM with accelerate trains on digits and accumulates gradients over two micro-batches; --bf16 adds autocast.

    accelerate launch examples/accelerate_digits.py        or        python examples/accelerate_digits.py [--bf16]
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from data import digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fused_sam import SAM
from fused_sam.integrations.accelerate import AcceleratedSAM


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=2,
        mixed_precision="bf16" if options.bf16 else "no",
    )
    task = digits()
    train = TensorDataset(task.train.x[: options.samples], task.train.y[: options.samples])
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    loader = DataLoader(train, batch_size=32, shuffle=True)
    updates = options.epochs * -(-len(loader) // 2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    step = AcceleratedSAM(accelerator, model, optimizer, loss_fn)
    for _ in range(options.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = step(batch)
                scheduler.step()

    model.eval()
    with torch.no_grad():
        test = task.test.x.to(accelerator.device)
        accuracy = (model(test).argmax(1).cpu() == task.test.y).double().mean().item()
    accelerator.print(f"last training loss {loss:.3f}, accuracy on test images {accuracy:.1%}")


if __name__ == "__main__":
    main()
