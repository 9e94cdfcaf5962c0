"""Every optimizer trains the same network, a plain multilayer perceptron."""

from collections.abc import Sequence

import torch
from torch import nn


def mlp(pixels: int, classes: int, seed: int, widths: Sequence[int] = (512, 512)) -> nn.Sequential:
    """Return a network pixels -> widths -> classes with ReLU between, initialised by the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for width_in, width_out in zip((pixels, *widths), (*widths, classes), strict=True):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
