"""The SAM family: each method is a subclass of SAM that overrides hooks, over the same primitives.

A method takes SAM's own options as well as its own, runs on every backend, and keeps what it remembers in the
optimizer's state and groups, so that a state_dict resumes it to the bit. This file is the registry: a method is
imported here, and METHODS, the package's exports, the tests, the benchmarks and the documentation follow.
"""

from fused_sam.sam import SAM as SAM

from .asam import ASAM as ASAM
from .async_sam import AsyncSAM as AsyncSAM
from .esam import ESAM as ESAM
from .flat_lora import FlatLoRA as FlatLoRA
from .friendly_sam import FriendlySAM as FriendlySAM
from .gcsam import GCSAM as GCSAM
from .gsam import GSAM as GSAM
from .layer_sam import LayerSAM as LayerSAM
from .layer_sam import LookLayerSAM as LookLayerSAM
from .le_sam import LESAM as LESAM
from .looksam import LookSAM as LookSAM
from .microbatch_sam import MicrobatchSAM as MicrobatchSAM
from .momentum_sam import MomentumSAM as MomentumSAM
from .mup import mup_rho_groups as mup_rho_groups
from .norm_only import norm_only_groups as norm_only_groups
from .precond_sam import PrecondSAM as PrecondSAM
from .random_sam import RandomSAM as RandomSAM
from .stable_sam import StableSAM as StableSAM
from .unnormalised_sam import UnnormalisedSAM as UnnormalisedSAM
from .wsam import WSAM as WSAM

METHODS: dict[str, type[SAM]] = {
    name: value for name, value in dict(globals()).items() if isinstance(value, type) and issubclass(value, SAM)
}
