"""The SAM family: each method is SAM with a few hooks filled in, over the same primitives.

A method of this folder takes SAM's own options beside its own, runs on every backend, and keeps what it remembers in
the optimizer's state and groups, so that a state_dict resumes it to the bit.
"""

from .asam import ASAM
from .esam import ESAM
from .friendly_sam import FriendlySAM
from .gcsam import GCSAM
from .gsam import GSAM
from .looksam import LookSAM
from .microbatch_sam import MicrobatchSAM
from .momentum_sam import MomentumSAM
from .norm_only import norm_only_groups
from .wsam import WSAM

__all__ = [
    "ASAM",
    "ESAM",
    "GCSAM",
    "GSAM",
    "WSAM",
    "FriendlySAM",
    "LookSAM",
    "MicrobatchSAM",
    "MomentumSAM",
    "norm_only_groups",
]
