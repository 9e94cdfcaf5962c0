"""SAM-ON perturbs only the norm layers' scales and shifts, about 0.1% of the weights, by a larger rho."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # _NormBase: BatchNorm, SyncBatchNorm, InstanceNorm


def norm_only_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Return two parameter groups for any method of the family: norm layers, and the rest with perturb=False.

    Use it to perturb about 0.1% of the weights, by a larger rho than for all of them.

        optimizer = fused_sam.SAM(norm_only_groups(model), rho=0.5, lr=0.1, momentum=0.9)

    Mueller et al., "Normalization Layers Are All That Sharpness-Aware Minimization Needs", NeurIPS 2023,
    arXiv 2306.04226. Published: can outperform perturbing all weights.

    Norm layers are BatchNorm, SyncBatchNorm, InstanceNorm, LayerNorm, GroupNorm and RMSNorm. Any class named ...Norm
    (or ...Norm2d) is one too if its `weight` has one dimension; only its parameters of one dimension then count. Each
    parameter is in one group, once, even if modules share it.

    Args:
        options: options of the norm layers' group: rho, adaptive, eta, weight_decay, ...

    Raises:
        ValueError: the model has no norm layer with a scale or shift.
    """
    norms = {id(p): p for module in model.modules() for p in _scales_and_shifts(module)}
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no norm layer with weights (BatchNorm, LayerNorm, GroupNorm, "
            "InstanceNorm, RMSNorm or a class named ...Norm): SAM-ON has nothing to perturb"
        )
    others = [p for p in model.parameters() if id(p) not in norms]
    groups = [{**options, "params": list(norms.values())}]
    return [*groups, {"params": others, "perturb": False}] if others else groups


def _scales_and_shifts(module: nn.Module) -> list[nn.Parameter]:
    own = list(module.parameters(recurse=False))
    if isinstance(module, _LAYERS):
        return own
    weight = getattr(module, "weight", None)
    named = type(module).__name__.rstrip("0123456789d").lower().endswith("norm")
    if not (named and isinstance(weight, nn.Parameter) and weight.dim() == 1):
        return []
    return [p for p in own if p.dim() == 1]
