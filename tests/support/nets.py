"""Small nets and data, and the training loops of users' programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fused_sam import SAM

Closure = Callable[[], Tensor]


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(32, 6, generator=generator).to(dtype), torch.randint(0, 3, (32,), generator=generator)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step, next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x).float() if x.dtype in (torch.bfloat16, torch.float16) else model(x), y)


def closure_for(model: nn.Module, step: int, count: list[int] | None = None) -> Closure:
    """Return a closure that runs forward and backward passes and does not clear gradients."""

    def closure() -> Tensor:
        if count is not None:
            count.append(step)
        loss = loss_of(model, step)
        loss.backward()
        return loss

    return closure


def two_steps(model: nn.Module, optimizer: SAM, step: int) -> None:
    """Take one step with first_step() and second_step()."""
    loss_of(model, step).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, step).backward()
    optimizer.second_step(zero_grad=True)


def train(model: nn.Module, optimizer: SAM, steps: range) -> None:
    for step in steps:
        two_steps(model, optimizer, step)


def train_plain(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Take steps of one pass, as with any torch optimizer."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def groups_of(model: nn.Module, **of_biases: Any) -> list[dict[str, Any]]:
    """Return the weights as one group and the biases as another, which has its own options."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], **of_biases},
    ]
