"""Every optimizer trains the same network, a plain multilayer perceptron."""

import torch
from torch import nn

WIDTHS = (512, 512)


def mlp(pixels: int, classes: int, seed: int) -> nn.Sequential:
    """Return a network pixels -> 512 -> 512 -> classes with ReLU between, initialised by the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for width_in, width_out in zip((pixels, *WIDTHS), (*WIDTHS, classes), strict=True):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
