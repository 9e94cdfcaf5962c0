"""Groups of each update rule, which cover all of its options: four of each, for the tests of all backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fused_sam.backends.contract import AdamGroup, LionGroup, SGDGroup
from fused_sam.testing.tables import GROUPS

__all__ = ["GROUPS", "TRITON_GROUPS"]

# For the tests of Triton's kernels: other groups where these options meet in them.
TRITON_GROUPS: dict[str, Sequence[Any]] = {
    **GROUPS,
    "sgd": [
        SGDGroup(0.1, momentum=0.9, weight_decay=0.01),
        SGDGroup(0.2, momentum=0.8, dampening=0.3, weight_decay=0.02),
        SGDGroup(0.05, momentum=0.9, nesterov=True, maximize=True),
        SGDGroup(0.3),
    ],
    "adam": [
        AdamGroup(0.01, weight_decay=0.1, decoupled_weight_decay=True, eps=1e-3),
        AdamGroup(0.02, 0.7, 0.95, weight_decay=0.03, amsgrad=True, eps=1e-2),
        AdamGroup(0.05, 0.0, 0.5, maximize=True, eps=1e-3),
        AdamGroup(0.03, amsgrad=True, decoupled_weight_decay=True, eps=1e-3),
    ],
    "lion": [
        LionGroup(0.01, weight_decay=0.1),
        LionGroup(0.02, 0.7, 0.3, maximize=True),
        LionGroup(0.05, 0.0, 0.6),
        LionGroup(0.03, 0.3, 0.0, weight_decay=0.2),
    ],
}
