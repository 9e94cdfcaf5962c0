"""The hyper-parameters of SAM with SGD, as every peer takes them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Hyper:
    """The defaults are those of a usual training of an image classifier."""

    rho: float = 0.05
    eps: float = 1e-12
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    dampening: float = 0.0
    nesterov: bool = False

    def sgd(self) -> dict[str, Any]:
        """The keyword arguments of `torch.optim.SGD`."""
        return {key: value for key, value in asdict(self).items() if key not in ("rho", "eps")}
