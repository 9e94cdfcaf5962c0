"""Weights as data-parallel training holds them: whole on every process (DDP), or in parts (FSDP2)."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn import Parameter

from bench.shapes import Shape
from bench.work import GRADIENT_SCALE, WEIGHT_SCALE, noise

WAYS = ("plain", "DDP", "FSDP2")


class Weights(nn.Module):
    """A model with parameters of these shapes, and a loss whose gradient is a constant of the usual size."""

    def __init__(self, shapes: list[Shape]) -> None:
        super().__init__()
        values = noise(shapes, WEIGHT_SCALE, 0, torch.device("cpu"))
        self.weights = nn.ParameterList(Parameter(value) for value in values)

    def forward(self, scale: Tensor) -> Tensor:
        return torch.stack([(weight * scale).sum() for weight in self.weights]).sum()


def trained(shapes: list[Shape], way: str) -> nn.Module:
    """Return a model whose parameters have gradients from a real backward pass."""
    model: nn.Module = Weights(shapes)
    if way == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    elif way == "FSDP2":
        # Imported here, because that takes a second.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    model(torch.tensor(GRADIENT_SCALE)).backward()
    return model
