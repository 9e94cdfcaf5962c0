"""fused_sam: fused Sharpness-Aware Minimization for PyTorch.

    optimizer = fused_sam.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
"""

from . import backends, schedule, training
from .engine.rounding import RoundingWarning
from .engine.user_warnings import (
    AbandonedStepWarning,
    GradScaleWarning,
    LargeRhoWarning,
    NoGradientWarning,
    OptionWarning,
    PlainStepWarning,
    SecondBackwardWarning,
    SelectionWarning,
    SkippedStepsWarning,
)
from .info import __version__
from .methods import *  # noqa: F403  # every method of the registry
from .methods import METHODS
from .optimizers import Lion, MuonWithAdamW
from .step import Step, TensorVector, option

__all__ = [
    "METHODS",
    "AbandonedStepWarning",
    "GradScaleWarning",
    "LargeRhoWarning",
    "Lion",
    "MuonWithAdamW",
    "NoGradientWarning",
    "OptionWarning",
    "PlainStepWarning",
    "RoundingWarning",
    "SecondBackwardWarning",
    "SelectionWarning",
    "SkippedStepsWarning",
    "Step",
    "TensorVector",
    "__version__",
    "backends",
    "mup_rho_groups",  # noqa: F405
    "norm_only_groups",  # noqa: F405
    "option",
    "schedule",
    "training",
]
__all__ += METHODS
