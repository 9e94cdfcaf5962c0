"""SAM trains on digits in Lightning, with automatic optimization. Only the mixin and the optimizer are new.

    python examples/lightning_digits.py [--epochs 15] [--samples 1000]
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from data import digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fused_sam import SAM
from fused_sam.integrations.lightning import SAMMixin


class Digits(SAMMixin, lightning.LightningModule):
    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.net = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.1), nn.Linear(96, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)  # logged in the first pass only
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = SAM(self.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    task = digits()
    train = TensorDataset(task.train.x[: options.samples], task.train.y[: options.samples])
    test = TensorDataset(task.test.x, task.test.y)
    model = Digits(options.epochs)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=len(test)))
    metrics = trainer.callback_metrics
    print(f"training loss {metrics['train_loss']:.3f}, accuracy on test images {metrics['accuracy']:.1%}")


if __name__ == "__main__":
    main()
