"""Weights of many shapes, dtypes and layouts, and gradients for them, drawn from fixed seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fused_sam.testing.tables import values

# Sizes around the kernels' vector widths, tile (1,024) and chunk (16,384); a scalar, empty tensors, and several chunks.
ODD_SHAPES: list[tuple[int, ...]] = [
    (1,), (7,), (33,), (1023,), (1025,), (16385,), (), (0,), (3, 0), (5, 3, 2, 2), (100003,),
]  # fmt: skip


def weights(shapes: Sequence[Sequence[int]], dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(values(s, seed + i, dtype)) for i, s in enumerate(shapes)]


def doubled(params: Sequence[Tensor]) -> list[nn.Parameter]:
    """Return the same numbers in float64, contiguous."""
    return [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format).double()) for p in params]


# Layouts of a weight, as functions of its values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": lambda x: _in_gaps(x),
}


def _in_gaps(x: Tensor) -> Tensor:
    """Return a view of x's values in every second element of a larger tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7.0, dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def set_gradients(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Set each gradient, converted to the weight's dtype."""
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else g.to(p.dtype)


Pass = Sequence[Tensor | None]


def draw_passes(params: Sequence[Tensor], steps: int, seed: int = 100) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return for each step the first and the second gradients of all parameters, in the parameters' dtypes."""
    drawn = []
    for step in range(steps):
        both = [
            [values(p.shape, seed + 1000 * step + 500 * half + i, p.dtype) for i, p in enumerate(params)]
            for half in range(2)
        ]
        drawn.append((both[0], both[1]))
    return drawn


def take_steps(
    optimizer: Optimizer, params: Sequence[Tensor], passes: Sequence[tuple[Pass, Pass]]
) -> list[list[Tensor]]:
    """Take steps with the given gradients. Return the perturbed weights of each step."""
    perturbed = []
    for first, second in passes:
        set_gradients(params, first)
        optimizer.first_step(zero_grad=True)  # type: ignore[attr-defined]
        perturbed.append([p.detach().clone() for p in params])
        set_gradients(params, second)
        optimizer.second_step(zero_grad=True)  # type: ignore[attr-defined]
    return perturbed
