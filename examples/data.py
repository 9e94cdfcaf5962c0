"""The examples use data that every installation has: scikit-learn's digits and Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from fused_sam.demo.data import Task, load_digits, make_task


def digits(noise: float = 0.0, seed: int = 0) -> Task:
    """Return digits split into train, validation and test: 8 x 8 images as standardised rows of 64 pixels.

    A fraction `noise` of the training labels is random.
    """
    return make_task(load_digits(), seed, noise, validation_share=0.2)


def source_text(characters: int) -> Tensor:
    """Return bytes of standard library modules, int64 [characters], values 0 to 127."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += bytes(byte for byte in path.read_bytes() if byte < 128)
        if len(text) >= characters:
            break
    return torch.frombuffer(text[:characters], dtype=torch.uint8).long()
