"""Loading optimizer state: telling what fits before anything changes, and keeping its precision."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# What the public SAM package saves beside the base optimizer's state: its own backup of the weights.
_FOREIGN_BACKUP = "old_p"


def check_state_dict(state_dict: Any, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A copy of an optimizer's state_dict, free to be edited, that fits `groups`.

    Raises:
        TypeError: it is no mapping.
        ValueError: it is not an optimizer's, or of other parameters.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_state_dict() takes an optimizer's state_dict, not {type(state_dict).__name__}")
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(
            f"not an optimizer's state_dict: it has no {' and no '.join(map(repr, missing))}, but "
            f"{sorted(map(str, state_dict))[:5]}; was a model's state_dict passed?"
        )
    saved_groups = [dict(group) for group in state_dict["param_groups"]]
    if len(saved_groups) != len(groups):
        raise ValueError(f"the state_dict has {len(saved_groups)} parameter groups, the optimizer {len(groups)}")
    params: dict[Any, Tensor] = {}
    for k, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"group {k} of the state_dict has {len(saved['params'])} parameters, "
                f"that of the optimizer {len(group['params'])}"
            )
        params.update(zip(saved["params"], group["params"], strict=True))
    state = {}
    for key, entry in state_dict["state"].items():
        if isinstance(entry, Mapping):
            entry = {name: value for name, value in entry.items() if name != _FOREIGN_BACKUP}
            if key in params:
                _check_shapes(key, entry, params[key])
        if entry or key not in params:
            state[key] = entry
    checked = dict(copy(state_dict))
    checked.update(state=state, param_groups=saved_groups)
    return checked


def _check_shapes(key: Any, entry: Mapping[str, Any], p: Tensor) -> None:
    for name, value in entry.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape != p.shape:
            raise ValueError(
                f"the state_dict's {name!r} of parameter {key} is {tuple(value.shape)}, the parameter {tuple(p.shape)}"
            )


def keep_dtypes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Give loaded state the dtype that it was saved with: torch has cast it to the weights' dtype."""
    saved = (i for group in state_dict["param_groups"] for i in group["params"])
    params = (p for group in optimizer.param_groups for p in group["params"])
    for key, p in zip(saved, params, strict=True):
        entry = optimizer.state.get(p)
        original = state_dict["state"].get(key)
        if not entry or not isinstance(original, Mapping):
            continue
        for name, value in original.items():
            if isinstance(value, Tensor) and isinstance(entry.get(name), Tensor) and entry[name].dtype != value.dtype:
                entry[name] = value.to(device=p.device, copy=True, memory_format=torch.preserve_format)
