"""Private: which tensors a step works on, and the calls that work on them. Methods use fused_sam.step instead."""
