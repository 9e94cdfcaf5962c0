"""The three ways of training that are compared, and what one step of each costs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    name: str  # as the user writes it
    label: str  # in tables and in the figure
    phrase: str  # in a sentence
    stretch: int  # times the epochs that were asked for
    passes: int  # forward and backward passes a step

    @property
    def climbs(self) -> bool:
        """Whether it is SAM, which has a rho."""
        return self.passes == 2

    def cost(self, epochs: int) -> int:
        """Gradient passes over the training data, when `epochs` were asked for."""
        return epochs * self.stretch * self.passes


METHODS = {
    method.name: method
    for method in (
        Method("sgd", "SGD", "SGD", stretch=1, passes=1),
        Method("sgd-2x", "SGD, 2x epochs", "SGD with twice the epochs", stretch=2, passes=1),
        Method("sam", "SAM", "SAM", stretch=1, passes=2),
    )
}
