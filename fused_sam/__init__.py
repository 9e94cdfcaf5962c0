"""fused_sam: fused Sharpness-Aware Minimization for PyTorch.

    optimizer = fused_sam.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
"""

from importlib.metadata import PackageNotFoundError, version

from . import backends
from .sam import SAM

try:
    __version__ = version("fused_sam")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = ["SAM", "__version__", "backends"]
