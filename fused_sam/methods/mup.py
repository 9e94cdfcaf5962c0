"""A rho per layer that follows from the layers' widths, so that one rho serves networks of all widths (muP^2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fused_sam.engine.options import check_range

Shape = Sequence[int]


def mup_rho_groups(
    model: nn.Module,
    base: nn.Module | Mapping[str, Shape],
    rho: float = 0.05,
    *,
    norm: str = "tensor",
    **options: Any,
) -> list[dict[str, Any]]:
    """Return parameter groups whose rho is scaled from a network of base width, for any method of the family.

    Use it with a network in the maximal update parametrization (muP), to tune rho once on a narrow network.

        base = Net(width=64)                     # may be on the meta device: only shapes are read
        optimizer = fused_sam.SAM(mup_rho_groups(Net(width=1024), base, rho=0.1), norm="tensor", lr=0.1)

    Haas, Xu, Cevher and Vankadara, "muP^2: Effective Sharpness Aware Minimization Requires Layerwise Perturbation
    Scaling", NeurIPS 2024, arXiv 2411.00075. The condition here is on spectral norms: ||e_l|| in proportion to
    sqrt(fan_out / fan_in) in every layer. With r_out and r_in, the growth of the fans from the base network,

        norm="tensor"   rho_l = rho sqrt(r_out / r_in), because a gradient's spectral norm is about its norm
        norm="global"   rho_l = rho (r_out / r_in) max over layers of sqrt(r_in / r_out), because in muP a layer's
                        gradient grows by sqrt(r_in / r_out), and the norm by the largest of these

    With "global" and growth n that is rho n^(3/2) for the input layer and biases, rho n^(1/2) for hidden layers, and
    rho n^(-1/2) for the output layer. A bias or a norm layer's scale has fan_in 1. Embeddings are read as input layers.

    The groups are sorted by rho, and parameters keep their names. SAM's launches do not depend on their number.

    Args:
        model: the network to train. Shared parameters count once.
        base: the same network at the width where rho was tuned, or its parameters' shapes by name.
        rho: as tuned on the base network.
        norm: as the optimizer's `norm`.
        options: of all groups.

    Raises:
        ValueError: a parameter that one network lacks or that has another number of dimensions, or another norm.
        TypeError: rho is no number.
    """
    rho = check_range("rho", rho, 0, math.inf, open_high=True)
    if norm not in ("tensor", "global"):
        raise ValueError(f'norm must be "tensor" or "global", as the optimizer\'s, not {norm!r}')
    shapes = {n: tuple(p.shape) for n, p in base.named_parameters()} if isinstance(base, nn.Module) else dict(base)
    params = dict(model.named_parameters())
    if missing := sorted(shapes.keys() ^ params.keys()):
        raise ValueError(f"only one of model and base has the parameter {missing[0]!r}: pass the same network twice")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    growth = {}
    for name, p in params.items():
        if len(shapes[name]) != p.dim():
            raise ValueError(
                f"parameter {name!r} is {tuple(p.shape)} in the model and {tuple(shapes[name])} in the base network"
            )
        out, into = (_fans(shape, id(p) in embeddings) for shape in (p.shape, shapes[name]))
        growth[name] = (out[0] / into[0], out[1] / into[1])
    largest = max((math.sqrt(r_in / r_out) for r_out, r_in in growth.values()), default=1.0)
    groups: dict[float, dict[str, Any]] = {}
    for name, (r_out, r_in) in growth.items():
        factor = math.sqrt(r_out / r_in) if norm == "tensor" else r_out / r_in * largest
        own = float(f"{rho * factor:.12g}")  # equal widths give one group
        groups.setdefault(own, {**options, "params": [], "rho": own})["params"].append((name, params[name]))
    return [groups[own] for own in sorted(groups)]


def _fans(shape: Shape, embedding: bool) -> tuple[int, int]:
    """Return fan_out and fan_in of a parameter; of an empty one 1."""
    if not shape:
        return 1, 1
    if embedding:
        return max(shape[-1], 1), max(shape[0], 1)
    return max(shape[0], 1), max(math.prod(shape[1:]), 1)
