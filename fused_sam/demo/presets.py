"""Each data set has defaults for the options that the user does not set.

All optimizers get the same number of trials: SGD tries six learning rates, SAM tries two with three values of rho each.
SGD's grid is wide enough for the doubled epochs too, which need a smaller learning rate.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Holds the defaults of one data set."""

    epochs: int
    seeds: int
    tuning_seeds: int  # grids are compared on that many of the seeds, and winners are trained on all
    batch_size: int
    validation_share: float  # fraction of the training images
    sgd_lrs: tuple[float, ...]
    sam_lrs: tuple[float, ...]
    rhos: tuple[float, ...]


PRESETS = {
    "digits": Preset(
        epochs=30,
        seeds=5,
        tuning_seeds=3,
        batch_size=128,
        validation_share=1 / 4,
        sgd_lrs=(0.005, 0.01, 0.02, 0.03, 0.05, 0.1),
        sam_lrs=(0.02, 0.05),
        rhos=(0.1, 0.3, 0.5),
    ),
    "fashion-mnist": Preset(
        epochs=20,
        seeds=3,
        tuning_seeds=1,
        batch_size=256,
        validation_share=1 / 6,
        sgd_lrs=(0.003, 0.01, 0.02, 0.03, 0.05, 0.1),
        sam_lrs=(0.05, 0.1),
        rhos=(0.05, 0.1, 0.2),
    ),
}
