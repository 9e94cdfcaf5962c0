"""SAM with SGD or AdamW in torch's own operations, three ways: a loop over tensors, multi-tensor operations, compiled.

All compute equation 2 of arXiv 2010.01412, e = rho * g / (||g|| + eps), with the norm over all tensors. The weights go
to w + e, then back to w, and the base optimizer steps from there with the second gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from bench.hyper import Hyper


def base(params: list[Parameter], hyper: Hyper, **how: Any) -> Optimizer:
    """Return torch's own base optimizer in the implementation that `how` names."""
    return hyper.base(params, **hyper.options(), **how)


def gradients(params: list[Parameter]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def scale_of(grads: list[Tensor], hyper: Hyper) -> Tensor:
    """Return rho / (||g|| + eps), 0-dim."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return hyper.rho / (norm + hyper.eps)


class PerTensor:
    """SAM as the public SAM package computes it, operation by operation, in a loop over tensors.

    T_w = 1 multiplies every gradient, in the norm and in e, as in that package if it is not adaptive. The clone takes
    the weight's place again, and the next step replaces it.
    """

    def __init__(self, params: list[Parameter], hyper: Hyper) -> None:
        self.params, self.hyper = params, hyper
        self.backup: dict[Parameter, Tensor] = {}
        self.base = base(params, hyper, foreach=False)

    @torch.no_grad()
    def first_step(self) -> None:
        grads = gradients(self.params)
        norm = torch.stack([torch.linalg.vector_norm(1.0 * grad) for grad in grads]).norm()
        scale = self.hyper.rho / (norm + self.hyper.eps)
        for param, grad in zip(self.params, grads, strict=True):
            self.backup[param] = param.detach().clone()
            param.add_(1.0 * grad * scale)

    @torch.no_grad()
    def second_step(self) -> None:
        for param in self.params:
            param.data = self.backup[param]
        self.base.step()


class Foreach:
    """SAM in multi-tensor operations as they are usually written, with a fresh clone and with e as new tensors."""

    def __init__(self, params: list[Parameter], hyper: Hyper, **how: bool) -> None:
        self.params, self.hyper = params, hyper
        self.weights: list[Tensor] = list(params)
        self.backup: list[Tensor] = []
        self.base = base(params, hyper, **how)

    @torch.no_grad()
    def first_step(self) -> None:
        grads = gradients(self.params)
        self.backup = [weight.detach().clone() for weight in self.weights]
        torch._foreach_add_(self.weights, list(torch._foreach_mul(grads, scale_of(grads, self.hyper))))

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.weights, self.backup)
        self.backup = []
        self.base.step()


class InPlace:
    """SAM in torch's multi-tensor operations at their best, without temporaries and with one backup for all steps."""

    def __init__(self, params: list[Parameter], hyper: Hyper) -> None:
        self.params, self.hyper = params, hyper
        self.weights: list[Tensor] = list(params)
        self.backup = [torch.empty_like(weight) for weight in self.weights]
        self.base = base(params, hyper, fused=True)

    @torch.no_grad()
    def first_step(self) -> None:
        grads = gradients(self.params)
        scale = scale_of(grads, self.hyper)
        torch._foreach_copy_(self.backup, self.weights)
        if scale.is_cuda:  # a temporary costs less than a wait for the device's scale
            torch._foreach_add_(self.weights, list(torch._foreach_mul(grads, scale)))
        else:
            torch._foreach_add_(self.weights, grads, alpha=scale.item())

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.weights, self.backup)
        self.base.step()


class Compiled:
    """The multi-tensor code with SGD under `torch.compile`, in as few passes as the compiler finds."""

    def __init__(self, params: list[Parameter], hyper: Hyper) -> None:
        if hyper.base is not SGD:
            raise ValueError("it is written for SGD alone; leave it out")
        self.params, self.hyper = params, hyper
        self.weights = [param.detach() for param in params]
        self.backup = [torch.empty_like(weight) for weight in self.weights]
        self.momentum: list[Tensor] = []
        torch._inductor.config.compile_threads = 1  # no compiler processes run during the timing
        torch._dynamo.reset()  # so that no list of shapes counts against another's recompile limit
        self.perturb = torch.compile(perturb, dynamic=False, fullgraph=True)
        self.undo_sgd = torch.compile(undo_sgd, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def first_step(self) -> None:
        self.perturb(self.weights, gradients(self.params), self.backup, self.hyper)

    @torch.no_grad()
    def second_step(self) -> None:
        grads = gradients(self.params)
        if self.momentum:
            self.undo_sgd(self.weights, grads, self.backup, self.momentum, self.hyper)
            return
        # SGD's momentum starts as the first gradient, without dampening
        self.momentum = list(torch._foreach_add(grads, self.backup, alpha=self.hyper.weight_decay))
        torch._foreach_copy_(self.weights, self.backup)
        lookahead = self.hyper.momentum if self.hyper.nesterov else 0.0
        torch._foreach_add_(self.weights, self.momentum, alpha=-self.hyper.lr * (1 + lookahead))


def perturb(weights: list[Tensor], grads: list[Tensor], backup: list[Tensor], hyper: Hyper) -> None:
    torch._foreach_copy_(backup, weights)
    torch._foreach_add_(weights, list(torch._foreach_mul(grads, scale_of(grads, hyper))))


def undo_sgd(
    weights: list[Tensor], grads: list[Tensor], backup: list[Tensor], momentum: list[Tensor], hyper: Hyper
) -> None:
    steps = torch._foreach_add(grads, backup, alpha=hyper.weight_decay)
    torch._foreach_mul_(momentum, hyper.momentum)
    torch._foreach_add_(momentum, steps, alpha=1 - hyper.dampening)
    torch._foreach_copy_(weights, backup)
    if hyper.nesterov:
        torch._foreach_add_(weights, torch._foreach_add(steps, momentum, alpha=hyper.momentum), alpha=-hyper.lr)
    else:
        torch._foreach_add_(weights, momentum, alpha=-hyper.lr)
