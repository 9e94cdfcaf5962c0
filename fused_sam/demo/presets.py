"""What each data set is trained with where the user names nothing else.

All optimizers get the same number of trials: where SGD tries six learning rates, SAM tries two with three values of rho
each. SGD's grid goes far enough on both sides for the doubled epochs too, which want a smaller learning rate.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    epochs: int
    seeds: int
    tuning_seeds: int  # the grids are compared on the first of the seeds, the winners trained on all
    batch_size: int
    validation_share: float  # of the training images
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
