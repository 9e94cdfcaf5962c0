"""The check before any timing: all peers must compute the same from equal weights and gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from bench.errors import BenchError
from bench.peers import Peer
from bench.shapes import Shape
from bench.work import GRADIENT_SCALE, noise


def length(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm over all tensors."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def distance(these: Iterable[Tensor], those: Iterable[Tensor]) -> float:
    return length(this.detach() - that.detach() for this, that in zip(these, those, strict=True))


def check(peers: dict[str, tuple[Peer, list[Parameter]]], shapes: list[Shape], steps: int = 3) -> None:
    """Step all peers `steps` times in lockstep and compare them with the first. Gradients are restored afterwards.

    Two peers agree if their weights differ by at most 4 roundings per step plus 1e-5 of the distance moved. A weight is
    stored twice per step, and the update rounds inside; norms are summed in different orders. Both perturbed and
    updated weights are compared, because the updated ones do not show the perturbation.

    Raises:
        BenchError: a peer disagrees; it names the peer, the step and the distance.
    """
    (first, (_, anchor)), *others = peers.items()
    device = anchor[0].device
    original = [param.grad.clone() for param in anchor if param.grad is not None]
    rounding = 4 * torch.finfo(anchor[0].dtype).eps
    for step in range(steps):
        before = [param.detach().clone() for param in anchor]
        for half in (1, 2):
            fresh = noise(shapes, GRADIENT_SCALE, 2 * step + half, device)
            for peer, params in peers.values():
                set_gradients(params, fresh)
                peer.first_step() if half == 1 else peer.second_step()
            allowed = rounding * length(before) * (step + 1) + 1e-5 * distance(anchor, before)
            for name, (_, params) in others:
                if not (off := distance(params, anchor)) <= allowed:  # a NaN disagrees too
                    where = f"step {step + 1}, {'perturbed' if half == 1 else 'updated'} weights"
                    apart = f"{off:.2e} apart, {allowed:.2e} allowed"
                    raise BenchError(f"no ratio: {name} disagrees with {first} at {where}: {apart}")
    for _, params in peers.values():
        set_gradients(params, original)


@torch.no_grad()
def set_gradients(params: list[Parameter], values: list[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        if param.grad is not None:
            param.grad.copy_(value)
