"""Loading optimizer state: checks before anything changes, keys of earlier versions, and the state's precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base_optimizers import BASE_OPTIONS
from .sharding import is_sharded

# What the public SAM package saves beyond the base optimizer's state: its own backup of the weights, or, in its first
# versions, the perturbation.
_FOREIGN_BACKUPS = ("old_p", "e_w")

# Keys of parameter groups that earlier versions of this package saved under other names.
_OLD_KEYS = {
    "looks": "looksam_step",
    "updates": "sam_step",
    "draws": "rng_offset",
    "choices": "mask_offset",
    "idle": "idle_params",
}

# State of torch's other optimizers that has its parameter's shape. Adafactor's rows and columns do not have it, and
# optimizers of other packages may keep less under these names too.
_OF_PARAM_SHAPE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

# Options that distinguish the classes; newer ones (maximize, foreach, ...) may be absent from an old checkpoint.
_OF_A_CLASS = ("lr", "momentum", "dampening", "weight_decay", "betas")


def rename_old_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state_dict whose groups have today's keys, if an earlier version saved it."""
    if not isinstance(state_dict.get("param_groups"), list):
        return dict(state_dict)
    groups = [
        {_OLD_KEYS.get(key, key): value for key, value in group.items()} if "rho" in group else group
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def check_state_dict(
    state_dict: Mapping[str, Any],
    groups: list[dict[str, Any]],
    own: tuple[str, ...],
    clashes: tuple[str, ...],
    *,
    fused: bool,
    torchs: bool,
) -> dict[str, Any]:
    """Return a copy of an optimizer's state_dict that fits `groups`.

    Args:
        own: names of SAM's options; those that the state_dict lacks keep their value in `groups`.
        clashes: names of the base optimizer's options that are named as SAM's are.
        fused: True if the base optimizer is fused: all its state has the parameter's shape, except for scalars.
        torchs: True if it is one of torch's other optimizers, some of whose state has that shape.

    Raises:
        ValueError: it is not an optimizer's, or of other parameters.
    """
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(
            f"not an optimizer's state_dict: it has no {' and no '.join(map(repr, missing))}, but "
            f"{sorted(map(str, state_dict))[:5]}; was a model's state_dict passed?"
        )
    saved_groups = [_own_group(group, clashes) for group in state_dict["param_groups"]]
    if len(saved_groups) != len(groups):
        raise ValueError(f"the state_dict has {len(saved_groups)} parameter groups, the optimizer {len(groups)}")
    params: dict[Any, Tensor] = {}
    for k, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"group {k} of the state_dict has {len(saved['params'])} parameters, "
                f"that of the optimizer {len(group['params'])}"
            )
        lacking = [name for name in _OF_A_CLASS if name in group and name not in saved]
        if lacking:
            raise ValueError(
                f"group {k} of the state_dict has no {lacking[0]!r}: it was saved by an optimizer of another class"
            )
        params.update(zip(saved["params"], group["params"], strict=True))
    state = {}
    for key, entry in state_dict["state"].items():
        if isinstance(entry, Mapping):
            entry = {name: value for name, value in entry.items() if name not in _FOREIGN_BACKUPS}
            if key in params:
                _check_shapes(key, entry, params[key], None if fused else _OF_PARAM_SHAPE if torchs else ())
        if key not in params or entry:
            state[key] = entry
    for saved, group in zip(saved_groups, groups, strict=True):
        for name in own:
            saved.setdefault(name, group[name])
        for name in clashes:
            saved[BASE_OPTIONS].setdefault(name, group[BASE_OPTIONS][name])
    return {**state_dict, "state": state, "param_groups": saved_groups}


def _own_group(saved: Mapping[str, Any], clashes: tuple[str, ...]) -> dict[str, Any]:
    """Return a copy of a saved group in SAM's form: each parameter once, and the base optimizer's options apart."""
    group = {**saved, "params": list(dict.fromkeys(saved["params"]))}
    if BASE_OPTIONS in saved and clashes:
        group[BASE_OPTIONS] = dict(saved[BASE_OPTIONS])
    elif clashes:  # saved by the bare base optimizer
        group[BASE_OPTIONS] = {name: group.pop(name) for name in clashes if name in group}
    elif BASE_OPTIONS in saved:
        del group[BASE_OPTIONS]
    return group


def _check_shapes(key: Any, entry: Mapping[str, Any], p: Tensor, names: tuple[str, ...] | None) -> None:
    """Check that the state of these names, or all of it, has the parameter's shape."""
    for name, value in entry.items():
        if not isinstance(value, Tensor) or name == "step" or not (names is None or name in names):
            continue
        if value.shape != p.shape:
            raise ValueError(
                f"the state_dict's {name!r} of parameter {key} is {tuple(value.shape)}, the parameter {tuple(p.shape)}"
            )
        if is_sharded(p) and not is_sharded(value):
            raise ValueError(
                f"parameter {key} is sharded and its {name!r} in the state_dict is whole: load it with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )


def keep_dtypes(adapted: Mapping[str, Any], state_dict: dict[str, Any]) -> None:
    """Give state that is about to be loaded the dtype that it was saved with: torch has cast it to the parameters'.

    A momentum of -0.0 among other numbers becomes 0.0, because -0.0 throughout means that it was never written.
    """
    saved = (i for group in state_dict["param_groups"] for i in group["params"])
    params = (p for group in adapted["param_groups"] for p in group["params"])
    for key, p in zip(saved, params, strict=True):
        entry = adapted["state"].get(p)
        original = state_dict["state"].get(key)
        if not entry or not isinstance(original, Mapping):
            continue
        for name, value in original.items():
            if isinstance(value, Tensor) and isinstance(entry.get(name), Tensor) and entry[name].dtype != value.dtype:
                entry[name] = value.to(device=p.device, copy=True, memory_format=torch.preserve_format)
        momentum = entry.get("momentum_buffer")
        if isinstance(momentum, Tensor) and momentum.any():
            entry["momentum_buffer"] = momentum + 0.0
