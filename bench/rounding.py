"""The effect of bf16 and fp16 on a perturbation: its realised length, its direction, and how many weights move at all.

`python -m bench.rounding` prints the table of docs/precision.md. The weights are ResNet-50's 25.6M, as Kaiming
initialises them; all gradients have the same spread, and e = rho * g / ||g||. The realised e is the difference between
the weights that the network computes with before and after first_step().
"""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

from bench.shapes import by_name
from fused_sam import SAM, RoundingWarning

MODES: dict[str, dict[str, Any]] = {
    "to nearest": {},
    "master_weights": {"master_weights": True},
    "stochastic_rounding": {"stochastic_rounding": True},
}


def drawn(shape: tuple[int, ...], generator: torch.Generator, spread: float) -> Tensor:
    return torch.randn(shape, generator=generator) * spread


def realised(shapes: list[tuple[int, ...]], dtype: torch.dtype, rho: float, mode: dict[str, Any]) -> dict[str, float]:
    """Return the realised e's length over rho, its cosine to the gradient, and the share of weights that did not move.

    `along` is its part along the gradient, over rho. The masters are fp32 numbers that bf16 or fp16 does not hold, as
    in the middle of a training.
    """
    generator = torch.Generator().manual_seed(0)
    fine = [drawn(s, generator, math.sqrt(2 / max(math.prod(s[1:]), 1)) if len(s) > 1 else 1.0) for s in shapes]
    params = [nn.Parameter(w.to(dtype)) for w in fine]
    optimizer = SAM(params, rho=rho, lr=0.0, **mode)
    if mode.get("master_weights"):
        for p, w in zip(params, fine, strict=True):
            optimizer.state[p]["master_weight"] = w.clone()
    wanted = []
    for p in params:
        p.grad = drawn(tuple(p.shape), generator, 1e-3).to(dtype)
        wanted.append(p.grad.clone())
    before = [p.detach().clone() for p in params]
    optimizer.first_step()
    square = product = moved = 0.0
    for p, b, g in zip(params, before, wanted, strict=True):
        e = p.detach().double() - b.double()
        square += float(e.square().sum())
        product += float((e * g.double()).sum())
        moved += float((e != 0).sum())
    length = math.sqrt(square)
    size = math.sqrt(sum(float(g.double().square().sum()) for g in wanted))
    count = sum(p.numel() for p in params)
    optimizer.restore()
    return {
        "length": length / rho,
        "cosine": product / (length * size) if length else 0.0,
        "unmoved": 1 - moved / count,
        "along": product / size / rho,
    }


def main(shape: Annotated[str, typer.Option(help="Use a shape of python -m bench.")] = "resnet50") -> None:
    """Print the table."""
    warnings.simplefilter("ignore", RoundingWarning)
    dtypes, rhos = (torch.bfloat16, torch.float16), (0.05, 0.5, 2.0)
    rows = [(dtype, rho, name) for dtype in dtypes for rho in rhos for name in MODES]
    lines = []
    for dtype, rho, name in track(rows, description="rounding"):
        found = realised(by_name(shape), dtype, rho, MODES[name])
        lines.append(
            f"| {str(dtype).removeprefix('torch.')} | {rho:g} | {name} | {found['length']:.2f} | {found['cosine']:.2f} "
            f"| {found['along']:.2f} | {found['unmoved']:.1%} |"
        )
    print("| weights | rho | mode | \\|\\|e\\|\\| / rho | cosine | part along g / rho | unmoved |\n" + "|---" * 7 + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
