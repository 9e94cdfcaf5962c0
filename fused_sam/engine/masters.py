"""Masters: fp32 copies of bf16 and fp16 parameters. Updates move the masters and round the parameters from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import LOW_PRECISION

from .layout import is_wrapper, match_layout
from .sharding import like, local

MASTER = "master_weight"  # its name in the optimizer's state


class Masters:
    """The masters of an optimizer's parameters, by the parameters' numbers.

    Args:
        params: the parameters, as user and state have them.
        local_params: this process's parts of them.
        wanted: SAM's option master_weights; without it there are none.
    """

    def __init__(self, params: Sequence[Tensor], local_params: Sequence[Tensor], *, wanted: bool) -> None:
        self._params = params
        self._local_params = local_params
        self.needed = [wanted and p.dtype in LOW_PRECISION and not is_wrapper(p) for p in local_params]
        self.any_needed = any(self.needed)
        self._masters: dict[int, Tensor] = {}
        self._versions: list[tuple[int, int]] = []  # of the parameters when they were written last

    def __getitem__(self, i: int) -> Tensor:
        return self._masters[i]

    def record_versions(self) -> None:
        """Note that this optimizer has just written the parameters."""
        self._versions = self._current_versions()

    def _current_versions(self) -> list[tuple[int, int]]:
        """Return the parameters' versions. A write to a DTensor counts on it and not on its part."""
        return [(p._version, part._version) for p, part in zip(self._params, self._local_params, strict=True)]

    def updated_tensors(self) -> list[Tensor]:
        """Return what an update moves: each parameter's master, or the parameter's part itself."""
        return [self._masters.get(i, p) for i, p in enumerate(self._local_params)]

    def write_params(self) -> None:
        """Round masters that a method has moved into their parameters."""
        if self._masters:
            torch._foreach_copy_([self._local_params[i] for i in self._masters], list(self._masters.values()))

    def sync(
        self,
        state: dict[Tensor, dict[str, Any]],
        match: Callable[[int, str, Tensor], Tensor],
        replaced: Callable[[], None],
        perturbed: Collection[int] = (),
    ) -> None:
        """Give every parameter that needs one a master, from the state or new, and copy a user's writes to parameters.

        Args:
            state: the optimizer's; a master of another layout than its parameter's is replaced there.
            match: returns a parameter's state of that name in the parameter's layout; may raise.
            replaced: called if a master has become another tensor.
            perturbed: parameters to leave out: the undo will overwrite what is written to them.
        """
        versions = self._current_versions()
        for i, p in enumerate(self._local_params):
            if not self.needed[i] or i in perturbed:
                continue
            stored = state.get(self._params[i], {}).get(MASTER)
            master = self._masters.get(i)
            if stored is not None and (master is None or local(stored) is not master):
                matched = match(i, MASTER, stored)
                if matched is not local(stored):
                    state[self._params[i]][MASTER] = like(matched, self._params[i])
                self._masters[i] = master = matched
                replaced()
            elif master is None:
                self._masters[i] = master = p.detach().float()
            if not self._versions or self._versions[i] != versions[i]:
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))
        self.record_versions()

    def forget(self) -> bool:
        """Drop all masters, because the state was replaced; return True if there were any."""
        had = bool(self._masters)
        self._masters.clear()
        return had

    def set(self, i: int, master: Tensor) -> None:
        """Make a tensor of the parameter's shape the master of parameter i."""
        self._masters[i] = match_layout(master, self._local_params[i])

    def inherit(self, old: Masters, index: dict[int, int]) -> None:
        """Take over another plan's masters; `index` maps the id of a parameter to its number here."""
        for j, master in old._masters.items():
            i = index.get(id(old._params[j]))
            if i is not None and self.needed[i] and master.shape == self._local_params[i].shape:
                self.set(i, master)

    def init_missing(self) -> None:
        """Give every parameter that needs a master and has none its own value."""
        for i, p in enumerate(self._local_params):
            if self.needed[i] and i not in self._masters:
                self._masters[i] = p.detach().float()
