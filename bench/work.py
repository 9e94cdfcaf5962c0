"""Weights and gradients to step on: equal for every peer at the start, in each peer's own memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from bench.shapes import Shape

WEIGHT_SCALE = 0.02  # the usual spread of a transformer's weights
GRADIENT_SCALE = 0.01


def noise(shapes: list[Shape], scale: float, seed: int, device: torch.device) -> list[Tensor]:
    """Return normal fp32 tensors of these shapes with standard deviation `scale`, the same for the same seed."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device).mul_(scale) for shape in shapes]


def parameters(weights: list[Tensor], gradients: list[Tensor]) -> list[Parameter]:
    """Return parameters with gradients, both copied from the arguments."""
    params = [Parameter(weight.clone()) for weight in weights]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()
    return params


def example(shapes: list[Shape], device: torch.device) -> list[Parameter]:
    """Return parameters with gradients, ready for a step."""
    params = [Parameter(weight) for weight in noise(shapes, WEIGHT_SCALE, 0, device)]
    for param, gradient in zip(params, noise(shapes, GRADIENT_SCALE, 1, device), strict=True):
        param.grad = gradient
    return params
