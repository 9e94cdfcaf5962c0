"""SAM as a plain program around an unmodified torch optimizer, with which random programs compare the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

OPTIONS = {"rho": 0.05, "adaptive": False, "eta": 0.0, "perturb": True}
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class PlainSAM:
    """SAM's methods, implemented with a copy of the weights and torch's own optimizer. It caches nothing else."""

    def __init__(self, groups: Any, cls: type[Optimizer], max_norm: float | None = None, **options: Any) -> None:
        own = {name: options.pop(name, value) for name, value in OPTIONS.items()}
        self.base = cls([{**own, **group} for group in groups], **options)
        self._own = own
        self._max_norm = math.inf if max_norm is None else max_norm
        self._saved: dict[Tensor, Tensor] | None = None
        self._bad = False  # True if the first gradients are not finite
        self.step_was_skipped = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        return self.base.state

    @property
    def perturbed(self) -> bool:
        return self._saved is not None

    @property
    def needs_second_pass(self) -> bool:
        return any(group["rho"] > 0 and group["perturb"] for group in self.param_groups)

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.base.add_param_group({**self._own, **group})

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        self._saved, self._bad = {}, False
        if self.needs_second_pass:
            rows = [(p, self._scale(p, g), g) for g in self.param_groups if g["perturb"] for p in g["params"]]
            rows = [row for row in rows if row[0].grad is not None]
            norm = math.sqrt(sum(float((t * p.grad).double().square().sum()) for p, t, _ in rows))
            self._bad = not math.isfinite(norm)
            for p, t, group in rows:
                self._saved[p] = p.detach().clone()
                if not self._bad and norm > 0:
                    p.add_(t * t * p.grad, alpha=group["rho"] / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, fresh: bool = False) -> Any:
        """Take a step. With `fresh`, the present gradients are those of the first pass."""
        loss = None
        if closure is not None:
            evaluate = torch.enable_grad()(closure)
            if not fresh:
                self.zero_grad()
                loss = evaluate()
            if self.needs_second_pass:
                self.first_step(zero_grad=True)
                try:
                    second = evaluate()
                except BaseException:
                    self.restore()
                    raise
                loss = second if fresh else loss
        self._update()
        return loss

    def _update(self) -> None:
        first_is_bad = self.perturbed and self._bad
        self.restore()
        present = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in present))
        self.step_was_skipped = first_is_bad or not math.isfinite(norm)
        if self.step_was_skipped:
            return
        unclipped = [p.grad.clone() for p in present]
        for p in present:
            p.grad.mul_(min(1.0, self._max_norm / (norm + 1e-6)))
        self.base.step()
        if isinstance(self.base, _FUSED):  # SAM clips these within the update; it clips other gradients in place
            for p, g in zip(present, unclipped, strict=True):
                p.grad.copy_(g)

    @torch.no_grad()
    def restore(self) -> None:
        for p, saved in (self._saved or {}).items():
            p.copy_(saved)
        self._saved = None

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        perturbed = {p: p.detach().clone() for p in self._saved or {}}
        saved, self._saved = self._saved, None
        with torch.no_grad():
            for p, clean in (saved or {}).items():
                p.copy_(clean)
        yield
        self._saved = saved
        with torch.no_grad():
            for p, w in perturbed.items():
                p.copy_(w)

    @staticmethod
    def _scale(p: Tensor, group: dict[str, Any]) -> Tensor:
        return p.abs() + group["eta"] if group["adaptive"] else torch.ones_like(p)
