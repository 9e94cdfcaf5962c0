"""Lion, which SAM fuses with the undo.

    optimizer = fused_sam.SAM(model.parameters(), fused_sam.Lion, rho=0.05, lr=1e-4, weight_decay=0.1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class Lion(Optimizer):
    r"""Lion, "evolved sign momentum": Chen et al., NeurIPS 2023, arXiv 2302.06675, algorithm 2.

        w = w - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * w);  m = beta2 * m + (1 - beta2) * g

    Use it for transformers with large batches. It keeps one moving average (AdamW keeps two), and its learning rate is
    3 to 10 times smaller than AdamW's, with a weight decay that is as much larger.

    Args:
        params: parameters, named parameters, or parameter groups.
        lr: learning rate, 0 or more; 1e-4 in the paper.
        betas: two numbers from 0 to below 1: of the direction and of the average.
        weight_decay: decoupled, as in AdamW; 0 or more.
        maximize: maximize the objective.

    State: "exp_avg", shape and dtype of the parameter (fp32 under SAM for bf16 and fp16 parameters).

    Raises:
        ValueError: an option is out of range.
        RuntimeError: a sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("lr as a tensor must have one element")
        if not lr >= 0:
            raise ValueError(f"lr must be 0 or more, not {lr!r}")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}] must be from 0 to below 1, not {beta!r}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, not {weight_decay!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` evaluates the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("Lion does not support sparse gradients")
                g = -p.grad if group["maximize"] else p.grad
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                m = state["exp_avg"]
                c = m.lerp(g, 1 - beta1)
                direction = torch.where(c.isnan(), c, c.sign())  # torch's sign of NaN is 0, which would hide it
                p.mul_(1 - lr * decay).sub_(lr * direction)
                m.lerp_(g, 1 - beta2)
        return loss
