"""fused_sam: fused Sharpness-Aware Minimization for PyTorch.

    optimizer = fused_sam.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
"""

from importlib.metadata import PackageNotFoundError, version

from . import backends, schedule, training
from .methods import (
    ASAM,
    ESAM,
    GCSAM,
    GSAM,
    WSAM,
    FriendlySAM,
    LookSAM,
    MicrobatchSAM,
    MomentumSAM,
    norm_only_groups,
)
from .sam import SAM

try:
    __version__ = version("fused_sam")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "ASAM",
    "ESAM",
    "GCSAM",
    "GSAM",
    "SAM",
    "WSAM",
    "FriendlySAM",
    "LookSAM",
    "MicrobatchSAM",
    "MomentumSAM",
    "__version__",
    "backends",
    "norm_only_groups",
    "schedule",
    "training",
]
