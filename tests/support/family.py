"""A problem with three different groups in float64, on which tests compute the SAM family's steps by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_sam
from examples.methods.vasso import VaSSO
from fused_sam import SAM
from fused_sam.methods.displaced import DisplacedSAM

from . import nets

STEPS = 10
Vector = list[Tensor]

# The group of each of the net's six parameters. The first one has two weights and the second one has their biases.
# The third one has the last layer, which is not perturbed.
GROUP_OF = [0, 1, 0, 1, 2, 2]
GROUPS: list[dict[str, Any]] = [
    {"rho": 0.2, "lr": 0.1, "weight_decay": 1e-2},
    {"rho": 0.1, "lr": 0.05, "momentum": 0.5},
    {"perturb": False, "rho": 0.3, "lr": 0.08, "nesterov": True},
]
SGD = {"lr": 1.0, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}


def model_and_groups(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[dict[str, Any]]]:
    model = nets.net(dtype=dtype)
    params = list(model.parameters())
    return model, [
        {"params": [p for p, k in zip(params, GROUP_OF, strict=True) if k == j], **g} for j, g in enumerate(GROUPS)
    ]


def options() -> dict[str, Any]:
    return dict(SGD)


class Problem:
    """The same net as plain lists of float64 tensors, with the perturbation and SGD written out."""

    def __init__(self) -> None:
        self._model = nets.net(dtype=torch.float64)
        self._params = list(self._model.parameters())
        self.w: Vector = [p.detach().clone() for p in self._params]
        self.v: list[Tensor | None] = [None] * len(self.w)
        self.perturbed = [GROUPS[k].get("perturb", True) for k in GROUP_OF]
        self.rho = [GROUPS[k]["rho"] for k in GROUP_OF]
        self.lr = [GROUPS[k]["lr"] for k in GROUP_OF]

    def gradient(self, w: Sequence[Tensor], step: int, part: slice | None = None) -> Vector:
        """Return the gradient at w for batch `step`, or for a part of that batch."""
        with torch.no_grad():
            for p, x in zip(self._params, w, strict=True):
                p.copy_(x)
        x, y = nets.batch(step, torch.float64)
        part = part or slice(None)
        loss = nn.functional.cross_entropy(self._model(x[part]), y[part])
        return list(torch.autograd.grad(loss, self._params))

    def perturb(self, d: Vector, *, scale: Callable[[Tensor], Tensor] = torch.ones_like, factor: float = 1.0) -> Vector:
        """Return w + rho T^2 d / ||T d||. The norm is over the perturbed groups."""
        t = [scale(x) for x in self.w]
        norm = sum((a * b).square().sum() for a, b, on in zip(t, d, self.perturbed, strict=True) if on) ** 0.5
        return [
            x + factor * rho * a.square() * b / norm if on else x
            for x, rho, a, b, on in zip(self.w, self.rho, t, d, self.perturbed, strict=True)
        ]

    def update(self, g: Vector) -> None:
        """Take a step of torch.optim.SGD as its documentation defines it."""
        for i, k in enumerate(GROUP_OF):
            o = {**SGD, **GROUPS[k]}
            d = g[i] + o["weight_decay"] * self.w[i]
            v = self.v[i]
            v = d if v is None else o["momentum"] * v + d
            self.v[i] = v
            self.w[i] = self.w[i] - o["lr"] * (d + o["momentum"] * v if o["nesterov"] else v)


def dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def sam_steps(model: nn.Module, optimizer: Any, steps: int = STEPS, count: list[int] | None = None) -> None:
    """Take steps of any method with a closure that follows torch's convention."""
    for step in range(steps):
        run = nets.closure_for(model, step, count)

        def closure(run: nets.Closure = run) -> Tensor:
            optimizer.zero_grad()
            return run()

        optimizer.step(closure)


# The rounding errors of ten steps. For float32 weights of size 1, each operation adds about 1e-7.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def assert_weights(model: nn.Module, expected: Vector) -> None:
    for i, (p, w) in enumerate(zip(model.parameters(), expected, strict=True)):
        error = float((p.detach().double() - w).abs().max())
        assert error < TOLERANCE[p.dtype], f"weight {i}: off by {error:.1e}"


# Options of each method's test cases. A method without an entry has one case with the default options.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "SAM": {},
    "ASAM": {"ASAM": {"eta": 0.02}},
    "MicrobatchSAM": {"MicrobatchSAM": {"num_microbatches": 1}},
    "ESAM": {
        "ESAM elements": {"beta": 0.5, "gamma": 1.0},
        "ESAM tensors": {"beta": 0.5, "gamma": 1.0, "mask": "tensors"},
    },
    "LookSAM": {"LookSAM": {"k": 3, "alpha": 0.4}},
    "LayerSAM": {"LayerSAM": {}, "LayerSAM group": {"norm": "group"}},
    "LookLayerSAM": {"LookLayerSAM": {"k": 3, "alpha": 0.4}},
    "PrecondSAM": {"PrecondSAM": {"eps": 1e-3}},
    "GSAM": {"GSAM": {"alpha": 0.5}},
    "FriendlySAM": {"FriendlySAM": {"sigma": 0.9, "lmbda": 0.7}},
    "WSAM": {"WSAM": {"gamma": 0.7}, "WSAM coupled": {"gamma": 0.7, "decouple": False}},
    "GCSAM": {"GCSAM": {}, "GCSAM switches": {"length": "gradient", "centralise_descent": True}},
    "MomentumSAM": {"MomentumSAM": {}, "MomentumSAM decay": {"authors_decay": True}},
    "LESAM": {"LESAM": {"sigma": 0.03, "rho_max": 0.3, "total": 8, "warmup": 0.2, "decay_start": 0.4}},
    "FlatLoRA": {"FlatLoRA": {"total": 8}},
    "VaSSO": {"VaSSO": {"theta": 0.3}},
}


def on_adam(method: type[SAM], params: Any, base_optimizer: Any = None, **options: Any) -> SAM:
    """Build a method that needs Adam's state over AdamW, where a test asks for SGD or for no base optimizer."""
    if base_optimizer in (None, torch.optim.SGD):
        base_optimizer = torch.optim.AdamW
        options = {k: v for k, v in options.items() if k not in ("momentum", "dampening", "nesterov")}
    return method(params, base_optimizer, **options)


NEED_ADAM = ("PrecondSAM",)


def builder(name: str, method: type[SAM]) -> Callable[..., SAM]:
    """Return what builds a method in a test, with what it needs beside parameters and options."""
    if name in NEED_ADAM:
        return partial(on_adam, method)
    return with_frozen if name == "FlatLoRA" else method


def cases(methods: Mapping[str, type[SAM]], options: Mapping[str, Any] = CASES) -> dict[str, Callable[..., Any]]:
    """Return, for each case of each method, a function that builds the optimizer with the case's options."""
    return {
        case: partial(builder(name, method), **chosen)
        for name, method in methods.items()
        for case, chosen in options.get(name, {name: {}}).items()
    }


def with_frozen(params: Any, *args: Any, **options: Any) -> SAM:
    """Return FlatLoRA over these parameters or groups, and a frozen weight in a group of its own."""
    given = list(params)
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    first = groups[0]["params"][0]
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(5)).to(first.dtype)
    return fused_sam.FlatLoRA([*groups, {"params": [nn.Parameter(values, requires_grad=False)]}], *args, **options)


# The methods of the package's registry, and those that examples/ defines through the public Step.
EXAMPLES: dict[str, type[SAM]] = {"VaSSO": VaSSO}
METHODS = cases({**fused_sam.METHODS, **EXAMPLES})
# The cases of one pass, whose weights are displaced between steps.
ONE_PASS = [
    case
    for name, method in fused_sam.METHODS.items()
    if issubclass(method, DisplacedSAM)
    for case in CASES.get(name, {name: {}})
]


WITH_SAM: dict[str, Callable[..., Any]] = {"SAM": SAM, **METHODS}


def clean(optimizer: Any) -> None:
    """Make the weights clean, so that the optimizer may be saved or copied."""
    if isinstance(optimizer, DisplacedSAM):
        optimizer.eval()


def resume(optimizer: Any) -> None:
    """Undo what `clean` did, so that training continues."""
    if isinstance(optimizer, DisplacedSAM):
        optimizer.train()


def built(method: str, backend: str, **extra: Any) -> tuple[nn.Module, Any]:
    """Return a float32 model and its optimizer."""
    model, groups = model_and_groups(torch.float32)
    return model, WITH_SAM[method](groups, backend=backend, **{**options(), **extra})


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    """Take steps of any method without a closure. `needs_second_pass` decides whether a step has two passes."""
    for step in steps:
        optimizer.zero_grad()
        nets.loss_of(model, step).backward()
        if optimizer.needs_second_pass:
            optimizer.first_step(zero_grad=True)
            nets.loss_of(model, step).backward()
        optimizer.step()
