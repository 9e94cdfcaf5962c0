"""The lists of shapes that are timed: real networks' parameters, and COUNTxSIZE for many equal tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from bench.errors import BenchError

Shape = tuple[int, ...]


def transformer24m(width: int = 960, vocabulary: int = 2048, blocks: int = 2) -> list[Shape]:
    """Return an embedding, two transformer blocks and a last norm without bias: 24.1M parameters in 26 tensors."""
    block: list[Shape] = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), *block * blocks, (width,)]


def resnet18(classes: int = 1000) -> list[Shape]:
    """Return ResNet-18's shapes (arXiv 1512.03385, table 1): 11,689,512 parameters in 62 tensors."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for stage in range(4):
        width = 64 * 2**stage
        for block in range(2):
            shapes += [(width, channels, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and stage:  # the shortcut changes the number of channels
                shapes += [(width, channels, 1, 1), (width,), (width,)]
            channels = width
    return [*shapes, (classes, channels), (classes,)]


def resnet50(classes: int = 1000) -> list[Shape]:
    """Return ResNet-50's shapes (arXiv 1512.03385, table 1): 25,557,032 parameters in 161 tensors."""
    shapes: list[Shape] = []

    def conv_norm(out: int, into: int, kernel: int) -> None:
        shapes.extend([(out, into, kernel, kernel), (out,), (out,)])

    conv_norm(64, 3, 7)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = 64 * 2**stage
        for block in range(blocks):
            conv_norm(inner, channels, 1)
            conv_norm(inner, inner, 3)
            conv_norm(4 * inner, inner, 1)
            if block == 0:  # the shortcut changes the number of channels
                conv_norm(4 * inner, channels, 1)
            channels = 4 * inner
    return [*shapes, (classes, channels), (classes,)]


def vit_b16(classes: int = 1000, image: int = 224) -> list[Shape]:
    """Return ViT-B/16's shapes (arXiv 2010.11929, table 1) at 224 pixels: 86,567,656 parameters in 152 tensors."""
    width, patch = 768, 16
    tokens = (image // patch) ** 2 + 1
    block: list[Shape] = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    stem: list[Shape] = [(1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,)]
    return [*stem, *block * 12, (width,), (width,), (classes, width), (classes,)]


NETWORKS: dict[str, Callable[[], list[Shape]]] = {
    "transformer24m": transformer24m,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vit-b16": vit_b16,
}
TITLES = {"transformer24m": "Transformer", "resnet18": "ResNet-18", "resnet50": "ResNet-50", "vit-b16": "ViT-B/16"}


def by_name(name: str) -> list[Shape]:
    """Return the shapes of a network in `NETWORKS`, or of COUNTxSIZE ("1000x256": 1,000 tensors of 256 elements).

    Raises:
        BenchError: the name is neither.
    """
    if name in NETWORKS:
        return NETWORKS[name]()
    equal = equal_tensors(name)
    if equal is None:
        raise BenchError(f"unknown shape {name!r}: choose {', '.join(NETWORKS)}, or COUNTxSIZE such as 1000x256")
    count, size = equal
    return [(size,)] * count


def equal_tensors(name: str) -> tuple[int, int] | None:
    """Return count and size of a COUNTxSIZE name; None for a network."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    return (int(match[1]), int(match[2])) if match else None


def title(name: str) -> str:
    """Return the title of a shape for plots."""
    if equal := equal_tensors(name):
        return f"{equal[0]:,} tensors of {equal[1]:,}"
    shapes = by_name(name)
    return f"{TITLES[name]}: {numel(shapes) / 1e6:.1f}M parameters, {len(shapes)} tensors"


def numel(shapes: list[Shape]) -> int:
    """Return the number of elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes)
