"""The hyper-parameters of SAM with SGD or AdamW, as every peer takes them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch.optim import SGD, AdamW, Optimizer

OF_SAM = ("rho", "eps")


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of SAM with SGD; the defaults suit the training of an image classifier."""

    rho: float = 0.05
    eps: float = 1e-12
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    dampening: float = 0.0
    nesterov: bool = False

    @property
    def base(self) -> type[Optimizer]:
        return SGD

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the base optimizer."""
        return {key: value for key, value in asdict(self).items() if key not in OF_SAM}


@dataclass(frozen=True)
class AdamHyper(Hyper):
    """Hyper-parameters of SAM with AdamW; the defaults suit the training of a transformer."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05

    @property
    def base(self) -> type[Optimizer]:
        return AdamW

    def options(self) -> dict[str, Any]:
        return {"lr": self.lr, "betas": (self.beta1, self.beta2), "weight_decay": self.weight_decay}
