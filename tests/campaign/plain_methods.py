"""Programs in plain torch for every method: fused_sam.simple's, and here those that it does not have.

CASES names the plain class, the fused one, and how a life draws the options of both.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fused_sam
from examples.methods.vasso import VaSSO
from fused_sam import LESAM, StableSAM, UnnormalisedSAM, simple
from fused_sam.backends.contract import MASK
from fused_sam.backends.rng import mask_of, stream_key
from fused_sam.simple import Closure, Vector, axpby, norm


class PlainGCSAM(simple.SAM):
    """Perturbs along the gradient with its mean over all dimensions but the first taken off."""

    def ascent(self, g: Vector) -> Vector:
        return super().ascent([x - x.mean(dim=tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else x for x in g])


class PlainWSAM(simple.SAM):
    """Steps with (1 - a) g + a g_s; if decoupled, with g, and then by -lr a (g_s - g). a = gamma / (1 - gamma)."""

    def __init__(self, params: Any, base: Any, rho: float, *, gamma: float, decouple: bool) -> None:
        super().__init__(params, base, rho)
        self.a, self.decouple = gamma / (1 - gamma), decouple

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        loss = super().step(closure)
        if self.decouple:
            rates = {id(p): group["lr"] for group in self.base.param_groups for p in group["params"]}
            for p, x in zip(self.params, self.sharpness, strict=True):
                p.sub_(rates[id(p)] * self.a * x)
        return loss

    def descent(self, g: Vector, g_s: Vector) -> Vector:
        self.sharpness = axpby(1, g_s, -1, g)
        return g if self.decouple else axpby(1 - self.a, g, self.a, g_s)


class PlainESAM(simple.SAM):
    """Perturbs elements that the package's random numbers choose, by rho / beta."""

    def __init__(self, params: Any, base: Any, rho: float, *, beta: float, gamma: float, seed: int) -> None:
        super().__init__(params, base, rho)
        self.beta, self.seed, self.offset = beta, seed, 0

    def ascent(self, g: Vector) -> Vector:
        e = [x / self.beta for x in super().ascent(g)]
        masks = [mask_of(stream_key(self.seed, self.offset, i, MASK), x, self.beta) for i, x in enumerate(g)]
        self.offset += 2  # the perturbation and the update each raise it by 1
        return [torch.where(mask, x, 0.0) for mask, x in zip(masks, e, strict=True)]


class PlainUnnormalisedSAM(simple.SAM):
    """Perturbs by rho g."""

    def ascent(self, g: Vector) -> Vector:
        return [self.rho * x for x in g]


class PlainStableSAM(simple.SAM):
    """Scales the second gradient to the first one's norm."""

    def descent(self, g: Vector, g_s: Vector) -> Vector:
        return [norm(g) / norm(g_s) * x for x in g_s]


class PlainVaSSO(simple.SAM):
    """Perturbs along an average of the gradients, which begins with zeros."""

    def __init__(self, params: Any, base: Any, rho: float, *, theta: float) -> None:
        super().__init__(params, base, rho)
        self.theta, self.d = theta, [torch.zeros_like(p) for p in self.params]

    def ascent(self, g: Vector) -> Vector:
        self.d = axpby(1 - self.theta, self.d, self.theta, g)
        return super().ascent(self.d)


class PlainLESAM(simple.SAM):
    """Perturbs by min(sigma_t / ||g||, rho_max), with sigma_t on half a cosine."""

    def __init__(
        self, params: Any, base: Any, rho: float, *, sigma: float, rho_max: float, total: int, **_: float
    ) -> None:
        super().__init__(params, base, rho)
        self.sigma, self.rho_max, self.total, self.t = sigma, rho_max, total, 0

    def ascent(self, g: Vector) -> Vector:
        sigma = self.sigma * (1 + math.cos(math.pi * min(1.0, self.t / self.total))) / 2
        self.t += 1
        self.rho = min(sigma / float(norm(g)), self.rho_max)
        return super().ascent(g)


Draw = Callable[[random.Random], dict[str, Any]]


def draws(**ranges: Any) -> Draw:
    """Return a function that draws options: a number of a range, one of a list, or a constant."""

    def options(draw: random.Random) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, values in {"rho": (0.01, 0.5), **ranges}.items():
            if isinstance(values, tuple):
                found[name] = draw.uniform(*values)
            else:
                found[name] = draw.choice(values) if isinstance(values, list) else values
        return found

    return options


# Without a warm-up, and with a cosine from the first step on.
LESAM_DRAWS = draws(sigma=(0.01, 0.1), rho_max=(0.05, 0.5), total=[5, 50], warmup=0.0, decay_start=0.0)
CASES: dict[str, tuple[type[simple.SAM], type[fused_sam.SAM], Draw]] = {
    "SAM": (simple.SAM, fused_sam.SAM, draws()),
    "ASAM": (simple.ASAM, fused_sam.ASAM, draws(rho=(0.2, 1.5), eta=(0.0, 0.1), scale=["weights", "all"])),
    "MicrobatchSAM": (simple.MicrobatchSAM, fused_sam.MicrobatchSAM, draws(num_microbatches=[1, 3])),
    "GSAM": (simple.GSAM, fused_sam.GSAM, draws(alpha=(0.0, 1.0))),
    "LookSAM": (simple.LookSAM, fused_sam.LookSAM, draws(k=[1, 2, 3], alpha=(0.0, 1.0))),
    "FriendlySAM": (simple.FriendlySAM, fused_sam.FriendlySAM, draws(sigma=(0.5, 1.0), lmbda=(0.3, 0.9))),
    "MomentumSAM": (simple.MomentumSAM, fused_sam.MomentumSAM, draws(rho=(0.1, 1.0))),
    "GCSAM": (PlainGCSAM, fused_sam.GCSAM, draws()),
    "WSAM": (PlainWSAM, fused_sam.WSAM, draws(gamma=(0.1, 0.8), decouple=True)),
    "WSAM coupled": (PlainWSAM, fused_sam.WSAM, draws(gamma=(0.1, 0.8), decouple=False)),
    "ESAM": (PlainESAM, fused_sam.ESAM, draws(beta=(0.3, 1.0), gamma=1.0, seed=[0, 7, 2**40])),
    "StableSAM": (PlainStableSAM, StableSAM, draws()),
    "UnnormalisedSAM": (PlainUnnormalisedSAM, UnnormalisedSAM, draws()),
    "VaSSO": (PlainVaSSO, VaSSO, draws(theta=(0.1, 1.0))),
    "LESAM": (PlainLESAM, LESAM, LESAM_DRAWS),
}
