"""This module loads the images, splits them, and makes labels wrong.

Training and validation labels are replaced at the same rate, because real data with wrong labels has no clean ones to
choose rho with. Test labels stay as they are and choose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import DemoError
from .idx import read_idx

CLASSES = 10
TEST_FRACTION = 1 / 4  # of a data set without a test part

FASHION_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


@dataclass(frozen=True)
class Part:
    """Holds the images and labels of a split."""

    x: Tensor  # [images, pixels]
    y: Tensor  # int64 [images], 0 to CLASSES - 1

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> Part:
        return Part(self.x[index], self.y[index])


@dataclass(frozen=True)
class Source:
    """Holds a data set before any split."""

    images: Part
    test: Part | None  # None: the test part is cut off from `images`


@dataclass(frozen=True)
class Task:
    """Holds the splits of one seed: standardised float32 images, with labels that are noisy except in `test`."""

    train: Part
    validation: Part
    test: Part


def load_digits() -> Source:
    """Return scikit-learn's digits: 1,797 images of 64 pixels."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    return Source(Part(torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)), None)


def load_fashion_mnist(folder: Path) -> Source:
    """Return the images of Fashion-MNIST's four IDX .gz files: 60,000 and 10,000 images of 784 pixels.

    Raises:
        DemoError: a file is missing, truncated or not an IDX file.
    """
    for name in (name for pair in FASHION_FILES.values() for name in pair):
        if not (folder / name).is_file():
            raise DemoError(
                f"{folder / name} is missing: install Debian's package dataset-fashion-mnist, or name the folder "
                "of Fashion-MNIST's four IDX .gz files with --data-dir"
            )
    train = _read_part(folder, *FASHION_FILES["train"])
    test = _read_part(folder, *FASHION_FILES["test"])
    if train.x.shape[1] != test.x.shape[1]:
        raise DemoError(f"{folder}: training images have {train.x.shape[1]} pixels, test images {test.x.shape[1]}")
    return Source(train, test)


def _read_part(folder: Path, images: str, labels: str) -> Part:
    part = Part(read_idx(folder / images, 3).flatten(1), read_idx(folder / labels, 1).to(torch.int64))
    if len(part.x) != len(part.y):
        raise DemoError(f"{folder}: {images} has {len(part.x)} images, {labels} has {len(part.y)} labels")
    if int(part.y.max()) >= CLASSES:
        raise DemoError(f"{folder / labels} has the label {int(part.y.max())}; expected 0 to {CLASSES - 1}")
    return part


def replace_labels(labels: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace exactly round(fraction * n) of n labels by random ones.

    The new class is uniform over all classes, so a tenth of the replaced labels stays right by chance.

    Returns:
        The new labels, and the indices of the replaced ones, int64 [round(fraction * n)].
    """
    replaced = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    noisy = labels.clone()
    noisy[replaced] = torch.randint(CLASSES, (len(replaced),), generator=generator)
    return noisy, replaced


def make_task(source: Source, seed: int, noise: float, validation_share: float) -> Task:
    """Return the splits of one seed, with noise in the labels; the splits do not depend on the noise."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(source.images), generator=generator)
    test = source.test
    if test is None:
        cut = round(TEST_FRACTION * len(order))
        test, order = source.images[order[:cut]], order[cut:]
    cut = round(validation_share * len(order))
    validation, train = source.images[order[:cut]], source.images[order[cut:]]

    # One mean and one deviation for all pixels, so that a pixel that is nearly always blank is not scaled up.
    pixels = train.x.float()
    mean, deviation = pixels.mean(), pixels.std()

    def standardised(part: Part, y: Tensor) -> Part:
        return Part((part.x.float() - mean) / deviation, y)

    return Task(
        train=standardised(train, replace_labels(train.y, noise, generator)[0]),
        validation=standardised(validation, replace_labels(validation.y, noise, generator)[0]),
        test=standardised(test, test.y),
    )
