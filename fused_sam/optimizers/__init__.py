"""Base optimizers that torch.optim lacks, as ordinary classes that train without SAM as well."""

from .lion import Lion
from .muon import MuonWithAdamW

__all__ = ["Lion", "MuonWithAdamW"]
