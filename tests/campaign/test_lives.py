"""Random lives of every method with a program in plain torch, beside that program, on every backend, in float64.

A life is a small network, a base optimizer, options, and steps with events between them. The fused side alone is
copied, pickled, saved and loaded, moved to other memory, and interrupted by errors in its closure.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import VARIANTS
from support.campaign import Campaign
from support.family import clean, resume
from torch import Tensor, nn

import fused_sam
from campaign import plain_methods

# Triton's interpreter is too slow for lives. tests/test_triton_interpret.py runs its kernels.
BACKENDS = [v for v in VARIANTS if v.name != "triton"]

# Both sides compute in float64 and differ in the order of their operations. A step errs by 1e-16 of the weights' size,
# and a dozen steps with momentum amplify that by less than a thousand. A wrong term changes weights by more than 1e-6.
TOLERANCE = 1e-10


class OnPurposeError(Exception):
    """The error that an interrupted closure raises."""


def draw_base(draw: random.Random, momentum: bool) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return a base optimizer and its options; with `momentum`, one that a displacement can follow."""
    kind = draw.choice(["SGD", "SGD", "Adam", "AdamW", *([] if momentum else ["RMSprop", "NAdam", "Adagrad"])])
    cls = getattr(torch.optim, kind)
    decay = draw.choice([0.0, 0.01, 0.1])
    if kind == "SGD":
        rate = draw.uniform(0.01, 0.2)
        speed = draw.choice([0.5, 0.9] if momentum else [0.0, 0.5, 0.9])
        nesterov = speed > 0 and draw.random() < 0.3
        dampening = 0.0 if nesterov or not speed else draw.choice([0.0, 0.3])
        return cls, {"lr": rate, "momentum": speed, "weight_decay": decay, "nesterov": nesterov, "dampening": dampening}
    options: dict[str, Any] = {"lr": draw.uniform(1e-3, 1e-2), "weight_decay": decay}
    if kind in ("Adam", "AdamW"):
        options |= {"betas": (draw.choice([0.5, 0.9]), draw.choice([0.9, 0.999])), "amsgrad": draw.random() < 0.3}
    # Adam divides by the root of the second moment: an eps that is not tiny keeps the division from amplifying errors.
    return cls, {**options, "eps": 1e-4}


class Life:
    """One optimizer with its network. Both sides of a life are drawn from the same seed."""

    def __init__(self, seed: int, draw: random.Random) -> None:
        self.seed = seed
        self.sizes = [draw.randint(1, 9), *(draw.randint(1, 20) for _ in range(draw.randint(0, 2))), draw.randint(2, 4)]
        self.batch = draw.choice([3, 6, 12])
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in zip(self.sizes, self.sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.Tanh()]
        self.model = nn.Sequential(*layers[:-1]).double()
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7)
        self.optimizer: Any = None

    def groups(self) -> list[dict[str, Any]]:
        params = list(self.model.parameters())
        return [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() == 1]}]

    def closure(self, step: int, parts: int, fails: int = 0) -> Callable[..., Tensor]:
        """Return the closure of a step, over the batch or its micro-batch i. Its run number `fails` raises an error."""
        generator = torch.Generator().manual_seed(self.seed + step)
        x = torch.randn(self.batch, self.sizes[0], generator=generator, dtype=torch.float64)
        y = torch.randint(0, self.sizes[-1], (self.batch,), generator=generator)
        size, runs = self.batch // parts, 0

        def closure(i: int = 0) -> Tensor:
            nonlocal runs
            runs += 1
            part = slice(i * size, (i + 1) * size)
            loss = nn.functional.cross_entropy(self.model(x[part]), y[part])
            loss.backward()
            if runs == fails:
                raise OnPurposeError
            return loss

        return closure


def happen(event: str, life: Life) -> None:
    """Do to the fused side what must not change its steps."""
    optimizer = life.optimizer
    if event == "moved":
        for p in life.model.parameters():
            p.data = p.data.clone()
    elif event == "saved":
        clean(optimizer)
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.state.clear()
        optimizer.load_state_dict(state)
        resume(optimizer)
    elif event in ("copied", "pickled"):
        clean(optimizer)
        both = (life.model, optimizer)
        life.model, life.optimizer = copy.deepcopy(both) if event == "copied" else pickle.loads(pickle.dumps(both))
        resume(life.optimizer)


EVENTS = ["moved", "saved", "copied", "pickled"]


def live(case: str, backend: str, seed: int) -> tuple[int, str]:
    """Live a life on both sides. Return how many faults it had, and what was different."""
    draw = random.Random(f"{case} {seed}")
    plain_class, fused_class, draw_options = plain_methods.CASES[case]
    options = draw_options(draw)
    parts = options.get("num_microbatches", 1)
    cls, base = draw_base(draw, momentum="Momentum" in case)
    rate = base["lr"] / 3
    shape = draw.getrandbits(32)
    plain, fused = Life(seed, random.Random(shape)), Life(seed, random.Random(shape))
    groups = plain.groups()
    groups[1]["lr"] = rate
    plain.optimizer = plain_class(
        [p for group in groups for p in group["params"]], cls(groups, **base), **options
    )
    groups = fused.groups()
    groups[1]["lr"] = rate
    fused.optimizer = fused_class(groups, cls, backend=backend, **options, **base)
    faults = 0
    for step in range(draw.randint(3, 12)):
        if draw.random() < 0.4:
            happen(draw.choice(EVENTS), fused)
        if draw.random() < 0.2:
            for optimizer in (plain.optimizer.base, fused.optimizer):
                for group in optimizer.param_groups:
                    group["lr"] *= 0.8
        expected, found = plain.optimizer.step(plain.closure(step, parts)), None
        if draw.random() < 0.2 and "ESAM" not in case:  # which draws other elements when a step is repeated
            try:
                found = fused.optimizer.step(fused.closure(step, parts, fails=draw.choice([1, 2])))
            except OnPurposeError:
                faults += 1
        if found is None:
            found = fused.optimizer.step(fused.closure(step, parts))
        if abs(float(expected.detach()) - float(found.detach())) > TOLERANCE:
            return faults, f"step {step}: the loss is {float(found)}, in plain torch {float(expected)}"
        with fused.optimizer.unperturbed():
            for (name, p), q in zip(plain.model.named_parameters(), fused.model.parameters(), strict=True):
                error = float((p - q).detach().abs().max())
                if not error <= TOLERANCE * max(1.0, float(p.detach().abs().max())):
                    return faults, f"step {step}: {name} is off by {error:.1e}, base {cls.__name__} {base}, {options}"
    return faults, ""


@pytest.mark.parametrize("case", plain_methods.CASES)
def test_random_lives_equal_plain_torch(campaign: Campaign, case: str) -> None:
    for seed in campaign.rounds(short=1, share=0.2 / len(plain_methods.CASES)):
        for backend in BACKENDS:
            with backend.active():
                faults, difference = live(case, backend.name, seed)
            campaign.count(faults=faults)
            if difference:
                campaign.lose(f"{case} on {backend}, seed {seed}: {difference}")


def test_every_method_has_a_program_in_plain_torch() -> None:
    """A method of one's own without one is at least beside the other backends, in tests/test_random_programs.py."""
    classes = {fused for _, fused, _ in plain_methods.CASES.values()}
    # Their formulas are beside float64 loops in tests/test_methods_*.py.
    without = {"AsyncSAM", "FlatLoRA", "LayerSAM", "LookLayerSAM", "PrecondSAM", "RandomSAM"}
    assert {name for name, method in fused_sam.METHODS.items() if method not in classes} == without
