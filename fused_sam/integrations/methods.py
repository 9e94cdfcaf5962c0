"""What the integrations have to do for some methods: refuse those that need more than a framework gives, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fused_sam.methods import ESAM, MicrobatchSAM
from fused_sam.methods.displaced import DisplacedSAM
from fused_sam.sam import SAM


def refuse_method(sam: SAM, framework: str) -> None:
    """Raise an error if the method needs the samples of a batch, which the framework keeps to itself.

    Raises:
        TypeError: MicrobatchSAM with several micro-batches.
        ValueError: ESAM with gamma below 1.
    """
    if isinstance(sam, MicrobatchSAM) and sam.num_microbatches > 1:
        raise TypeError(
            f"MicrobatchSAM (num_microbatches={sam.num_microbatches}) does not work in {framework}, which makes both "
            "passes for a whole batch: use fused_sam.training.sam_step in a loop, or num_microbatches=1 or SAM here"
        )
    if isinstance(sam, ESAM) and sam.selected_fraction is not None:
        raise ValueError(
            f"ESAM (gamma={sam.gamma:g}) does not work in {framework}, which has no loss of each sample to select by: "
            "use fused_sam.training.sam_step in a loop, or gamma=1 here"
        )


@contextmanager
def displaced(sam: SAM) -> Iterator[None]:
    """Displace a one-pass method's weights for a forward pass. The step leaves them clean; so does an exception."""
    if not isinstance(sam, DisplacedSAM):
        yield
        return
    sam.clean_between_steps = True
    sam.train()
    try:
        yield
    except BaseException:
        sam.eval()
        raise
