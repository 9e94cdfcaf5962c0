"""Groups of each update rule, which cover all of its options: four of each, for the tests of all backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fused_sam.backends.contract import AdamGroup, LionGroup, SGDGroup

GROUPS: dict[str, Sequence[Any]] = {
    "sgd": [
        SGDGroup(0.1),
        SGDGroup(0.2, momentum=0.9, weight_decay=0.03),
        SGDGroup(0.05, momentum=0.8, dampening=0.3, maximize=True),
        SGDGroup(0.3, momentum=0.7, nesterov=True, weight_decay=0.01),
    ],
    # The eps is far above rounding. With 1e-8, rounding of a gradient near 0 would decide the sign of an element.
    "adam": [
        AdamGroup(0.1, 0.8, 0.95, eps=1e-3, weight_decay=0.05),
        AdamGroup(0.2, 0.9, 0.99, eps=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
        AdamGroup(0.05, 0.0, 0.9, eps=1e-3, maximize=True, amsgrad=True),
        AdamGroup(0.3, 0.7, 0.8, eps=1e-1, decoupled_weight_decay=True, amsgrad=True),
    ],
    # The betas are 0 and on both sides of 0.5, where the moving average changes its formula.
    "lion": [
        LionGroup(0.1, weight_decay=0.05),
        LionGroup(0.2, 0.7, 0.3),
        LionGroup(0.05, 0.0, 0.6, maximize=True),
        LionGroup(0.3, 0.3, 0.0, weight_decay=0.2),
    ],
}

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
