"""The demo compares three methods of training. Each has its cost per step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Holds a method's names and its cost."""

    name: str  # as the user writes it
    label: str  # in tables and in the figure
    phrase: str  # in a sentence
    stretch: int  # how many times the requested epochs it trains for
    passes: int  # forward and backward passes per step

    @property
    def is_sam(self) -> bool:
        """True if the method is SAM, which has a rho."""
        return self.passes == 2

    def cost(self, epochs: int) -> int:
        """Return the number of gradient passes over the training data for the requested `epochs`."""
        return epochs * self.stretch * self.passes


METHODS = {
    method.name: method
    for method in (
        Method("sgd", "SGD", "SGD", stretch=1, passes=1),
        Method("sgd-2x", "SGD, 2x epochs", "SGD with twice the epochs", stretch=2, passes=1),
        Method("sam", "SAM", "SAM", stretch=1, passes=2),
    )
}
