"""SAM and six methods of its family in plain torch, 7 to 20 lines each. The fused classes are tested against them.

    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = GSAM(model.parameters(), base, rho=0.05, alpha=0.6)

    def closure():
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)

w are the weights, L is the loss, g = grad L(w), g_s = grad L(w + e). Norms and dot products run over all parameters.
BASE(w, d) is one step of the base optimizer with the gradient d. `params` are all parameters of the base optimizer, and
every one gets a gradient. step(closure) clears gradients before each run and returns the loss of the first run.

Non-finite gradients, exceptions in the closure, AMP and sharded parameters are not handled here: the classes of the
same names in `fused_sam` handle them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

Vector = list[Tensor]  # one tensor per parameter
Closure = Callable[..., Tensor]


def dot(x: Vector, y: Vector) -> Tensor:
    """Return <x, y> over all parameters."""
    return torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum()


def norm(x: Vector) -> Tensor:
    """Return ||x|| over all parameters."""
    return dot(x, x).sqrt()


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, or 0 if b is 0."""
    return torch.where(b != 0, a / b, 0.0)


def axpby(a: float | Tensor, x: Vector, b: float | Tensor, y: Vector) -> Vector:
    """Return a x + b y."""
    return [a * u + b * v for u, v in zip(x, y, strict=True)]


def gradient(params: Vector, closure: Closure, e: Vector | None = None) -> tuple[Tensor, Vector]:
    """Return the loss and its gradient at w, or at w + e. The weights are w again afterwards."""
    clean = [p.clone() for p in params]
    if e is not None:
        for p, x in zip(params, e, strict=True):
            p.add_(x)
    for p in params:
        p.grad = None
    with torch.enable_grad():
        loss = closure()
    for p, w in zip(params, clean, strict=True):
        p.copy_(w)
    return loss, [p.grad for p in params if p.grad is not None]


class SAM:
    """Step with the gradient from the point of highest loss within a radius of rho, to first order.

    e = rho g / (||g|| + eps);  w = BASE(w, g_s)                     Foret et al., ICLR 2021, arXiv 2010.01412
    """

    eps = 1e-12

    def __init__(self, params: Iterable[Tensor], base: Optimizer, rho: float = 0.05) -> None:
        self.params, self.base, self.rho = list(params), base, rho

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """Update the weights and return the loss of the first run."""
        loss, d = self.direction(closure)
        for p, x in zip(self.params, d, strict=True):
            p.grad = x
        self.base.step()
        return loss

    def direction(self, closure: Closure) -> tuple[Tensor, Vector]:
        """Return the loss of the first run, and d."""
        loss, g = gradient(self.params, closure)
        _, g_s = gradient(self.params, closure, self.ascent(g))
        return loss, self.descent(g, g_s)

    def ascent(self, g: Vector) -> Vector:
        """Return e."""
        length = self.rho / (norm(g) + self.eps)
        return [length * x for x in g]

    def descent(self, g: Vector, g_s: Vector) -> Vector:
        """Return d."""
        return g_s


class ASAM(SAM):
    """SAM with a perturbation in proportion to each weight. scale="all" scales biases and norm layers too.

    T = |w| + eta, or 1 for tensors of fewer than two dimensions
    e = rho T^2 g / (||T g|| + eps);  w = BASE(w, g_s)               Kwon et al., ICML 2021, arXiv 2102.11600
    """

    def __init__(
        self, params: Iterable[Tensor], base: Optimizer, rho: float = 0.5, eta: float = 0.01, *, scale: str = "matrices"
    ) -> None:
        super().__init__(params, base, rho)
        self.eta, self.scale = eta, scale

    def ascent(self, g: Vector) -> Vector:
        scaled = [self.scale == "all" or w.dim() > 1 for w in self.params]
        T = [w.abs() + self.eta if s else torch.ones_like(w) for w, s in zip(self.params, scaled, strict=True)]
        Tg = [t * x for t, x in zip(T, g, strict=True)]
        return [t * x for t, x in zip(T, super().ascent(Tg), strict=True)]


class MicrobatchSAM(SAM):
    """mSAM: perturb each micro-batch along its own gradient. closure(i) computes the mean loss of micro-batch i.

    g_i = grad L_i(w);  d = mean_i grad L_i(w + rho g_i / (||g_i|| + eps));  w = BASE(w, d)
                                                                     Behdin et al., arXiv 2212.04343
    """

    def __init__(self, params: Iterable[Tensor], base: Optimizer, rho: float = 0.05, *, num_microbatches: int) -> None:
        super().__init__(params, base, rho)
        self.num_microbatches = num_microbatches

    def direction(self, closure: Closure) -> tuple[Tensor, Vector]:
        losses, mean = [], [torch.zeros_like(p) for p in self.params]
        for i in range(self.num_microbatches):
            loss, g_s = super().direction(lambda i=i: closure(i))
            losses.append(loss)
            mean = axpby(1, mean, 1 / self.num_microbatches, g_s)
        return torch.stack(losses).mean(), mean


class GSAM(SAM):
    """SAM that also reduces the surrogate gap, L(w + e) - L(w), without a change of L(w + e) to first order.

    c = <g, g_s> / (||g|| ||g_s||);  d = g_s - alpha (g - c ||g|| g_s / ||g_s||);  w = BASE(w, d)
                                                                     Zhuang et al., ICLR 2022, arXiv 2203.08065
    """

    def __init__(self, params: Iterable[Tensor], base: Optimizer, rho: float = 0.05, *, alpha: float = 0.4) -> None:
        super().__init__(params, base, rho)
        self.alpha = alpha

    def descent(self, g: Vector, g_s: Vector) -> Vector:
        along = ratio(dot(g, g_s), dot(g_s, g_s))  # c ||g|| / ||g_s||
        return axpby(1, g_s, -self.alpha, axpby(1, g, -along, g_s))


class LookSAM(SAM):
    """SAM on every k-th step. The steps between take one pass and reuse g_v, the part of g_s at right angles to g.

    t % k == 0:  g_v = g_s - (<g, g_s> / ||g||^2) g;  w = BASE(w, g_s)
    otherwise:   w = BASE(w, g + alpha (||g|| / ||g_v||) g_v)        Liu et al., CVPR 2022, arXiv 2203.02714
    """

    def __init__(
        self, params: Iterable[Tensor], base: Optimizer, rho: float = 0.05, *, k: int = 5, alpha: float = 0.7
    ) -> None:
        super().__init__(params, base, rho)
        self.k, self.alpha, self.t = k, alpha, 0

    def direction(self, closure: Closure) -> tuple[Tensor, Vector]:
        t, self.t = self.t, self.t + 1
        if t % self.k == 0:
            return super().direction(closure)
        loss, g = gradient(self.params, closure)
        return loss, axpby(1, g, self.alpha * ratio(norm(g), norm(self.g_v)), self.g_v)

    def descent(self, g: Vector, g_s: Vector) -> Vector:
        self.g_v = axpby(1, g_s, -ratio(dot(g, g_s), dot(g, g)), g)
        return g_s


class FriendlySAM(SAM):
    """F-SAM: perturb along what differs between this batch's gradient and the average m of the batches before.

    first step:  d = g, m = g;   later:  d = g - sigma m, then m = lmbda m + (1 - lmbda) g
    e = rho d / (||d|| + eps);  w = BASE(w, g_s)                     Li et al., CVPR 2024, arXiv 2403.12350
    """

    def __init__(
        self, params: Iterable[Tensor], base: Optimizer, rho: float = 0.05, *, sigma: float = 1.0, lmbda: float = 0.9
    ) -> None:
        super().__init__(params, base, rho)
        self.sigma, self.lmbda = sigma, lmbda
        self.m: Vector | None = None

    def ascent(self, g: Vector) -> Vector:
        d = g if self.m is None else axpby(1, g, -self.sigma, self.m)
        self.m = g if self.m is None else axpby(self.lmbda, self.m, 1 - self.lmbda, g)
        return super().ascent(d)


class MomentumSAM(SAM):
    """MSAM: perturb against the momentum v instead of along g, in one pass. The base is SGD with momentum or Adam(W).

    g = grad L(w - rho v / (||v|| + eps));  w = BASE(w, g)           Becker et al., arXiv 2401.12033

    Here the parameters hold w between steps. In the paper and in fused_sam they stay displaced until the next step.
    """

    def __init__(self, params: Iterable[Tensor], base: Optimizer, rho: float = 3.0) -> None:
        super().__init__(params, base, rho)

    def displacement(self) -> Vector | None:
        """Return -rho v / (||v|| + eps), or None before the first step."""
        states = [self.base.state.get(p, {}) for p in self.params]
        v = [s[name] for s in states for name in ("momentum_buffer", "exp_avg") if name in s]
        return [-x for x in self.ascent(v)] if v else None

    def direction(self, closure: Closure) -> tuple[Tensor, Vector]:
        return gradient(self.params, closure, self.displacement())
