"""Masters: fp32 copies of bf16 and fp16 weights, which the updates move and the weights are roundings of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import LOW_PRECISION

from .layout import fitting
from .sharding import like, local

MASTER = "master_weight"  # its name in the optimizer's state


class Masters:
    """The masters of an optimizer's parameters, by the parameters' numbers.

    Args:
        owners: the parameters, as user and state know them.
        params: this process's parts of them.
        wanted: SAM's option master_weights; without it there are none.
    """

    def __init__(self, owners: Sequence[Tensor], params: Sequence[Tensor], *, wanted: bool) -> None:
        self._owners = owners
        self._params = params
        self.due = [wanted and p.dtype in LOW_PRECISION for p in params]  # whose weight is to have one
        self.any_due = any(self.due)
        self._of: dict[int, Tensor] = {}
        self._versions: list[tuple[int, int]] = []  # of the weights as they were written last

    def __getitem__(self, i: int) -> Tensor:
        return self._of[i]

    def wrote(self) -> None:
        """The weights have just been written by this optimizer."""
        if self.any_due:
            self._versions = self._written_at()

    def _written_at(self) -> list[tuple[int, int]]:
        """The weights' versions; writing to a DTensor counts on it and not on its part."""
        return [(owner._version, p._version) for owner, p in zip(self._owners, self._params, strict=True)]

    def written(self) -> list[Tensor]:
        """What an update moves: each parameter's master, or itself."""
        return [self._of.get(i, p) for i, p in enumerate(self._params)]

    def publish(self) -> None:
        """Round masters that someone else has moved into their weights."""
        if self._of:
            torch._foreach_copy_([self._params[i] for i in self._of], list(self._of.values()))

    def follow(
        self,
        state: dict[Tensor, dict[str, Any]],
        fit: Callable[[int, str, Tensor], Tensor],
        exchanged: Callable[[], None],
        undone: Collection[int] = (),
    ) -> None:
        """Have a master for every weight that is due one: the state's, or a new one; and follow weights that someone
        else has written.

        Args:
            state: the optimizer's; a master that does not lie as its weight does is replaced there.
            fit: lays a parameter's state of that name out as the parameter is; may raise.
            exchanged: called where a master has become another tensor.
            undone: parameters to leave out: what is written to them will be overwritten.
        """
        now = self._written_at()
        for i, p in enumerate(self._params):
            if not self.due[i] or i in undone:
                continue
            kept = state.get(self._owners[i], {}).get(MASTER)
            master = self._of.get(i)
            if kept is not None and (master is None or local(kept) is not master):
                fitted = fit(i, MASTER, kept)
                if fitted is not local(kept):
                    state[self._owners[i]][MASTER] = like(fitted, self._owners[i])
                self._of[i] = master = fitted
                exchanged()
            elif master is None:
                self._of[i] = master = p.detach().float()
            if not self._versions or self._versions[i] != now[i]:
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))
        self.wrote()

    def forget(self) -> bool:
        """Let go of all, because the state was replaced; returns whether there were any."""
        had = bool(self._of)
        self._of.clear()
        return had

    def take(self, i: int, master: Tensor) -> None:
        """Let this tensor of the weight's shape, laid out as the weight is, be the master of parameter i."""
        self._of[i] = fitting(master, self._params[i])

    def inherit(self, old: Masters, index: dict[int, int]) -> None:
        """Take over another plan's masters; `index` has the numbers of the parameters here, by their identity."""
        for j, master in old._of.items():
            i = index.get(id(old._owners[j]))
            if i is not None and self.due[i] and master.shape == self._params[i].shape:
                self.take(i, master)

    def begin(self) -> None:
        """Give every weight that is due a master and has none its own value."""
        for i, p in enumerate(self._params):
            if self.due[i] and i not in self._of:
                self._of[i] = p.detach().float()
