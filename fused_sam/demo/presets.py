"""Each data set has defaults for the options that the user does not set."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Holds the defaults of one data set."""

    epochs: int
    seeds: int
    batch_size: int
    validation_share: float  # fraction of the training images
    widths: tuple[int, ...]  # of the network's hidden layers
    lrs: tuple[float, ...]
    rhos: tuple[float, ...]


PRESETS = {
    "digits": Preset(
        epochs=60,
        seeds=5,
        batch_size=64,
        validation_share=1 / 4,
        widths=(256, 256),
        lrs=(0.01, 0.02, 0.05, 0.1, 0.2),
        rhos=(0.1, 0.2, 0.4),
    ),
    "fashion-mnist": Preset(
        epochs=30,
        seeds=3,
        batch_size=128,
        validation_share=1 / 6,
        widths=(256, 256),
        lrs=(0.005, 0.01, 0.02, 0.05, 0.1),
        rhos=(0.05, 0.1, 0.2),
    ),
}
