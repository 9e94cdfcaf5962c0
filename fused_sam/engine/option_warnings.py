"""Warnings of options that are accepted, and that are probably not what was meant."""

from __future__ import annotations

import difflib
from typing import Any

from .user_warnings import OptionWarning, warn

SMALLEST_ADAPTIVE_RHO = 0.5  # the authors of ASAM use 0.5 to 2
LIKENESS = 0.8  # of a misspelt key and the key that was meant, by difflib

SYNONYMS = {"learning_rate": "lr", "wd": "weight_decay"}

# What torch itself and its schedulers put into a group.
TORCHS = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


def warn_of_small_rho(group: dict[str, Any]) -> bool:
    """Warn if a group is adaptive and has the rho that is meant for groups that are not; return True if so."""
    small = bool(group["adaptive"]) and bool(group["perturb"]) and 0 < float(group["rho"]) < SMALLEST_ADAPTIVE_RHO
    if small:
        warn(
            f"adaptive=True with the default rho {float(group['rho']):g} hardly perturbs: rho is then relative to the "
            "weights, and the authors of ASAM use 0.5 to 2. Pass rho=0.5, or the rho that you mean",
            OptionWarning,
        )
    return small


def warn_of_misspelt_options(optimizer: Any, first: int = 0) -> None:
    """Warn, once per optimizer, if a group from number `first` on has a key that nothing reads and that looks misspelt.

    torch takes unknown keys, because programs keep notes of their own in a group.
    """
    stepper = optimizer.stepper
    if stepper.warned_of_options:
        return
    base = stepper.base
    known = {*optimizer.defaults, *base.defaults, *stepper.settings.own_options, *optimizer._options, "base_options"}
    known.update(getattr(base.cls, "GROUP_OPTIONS", ()))  # of a base optimizer that writes its own groups
    found = [
        f"{key!r} in group {k} (meant is probably {meant!r})"
        for k, group in enumerate(optimizer.param_groups[first:], first)
        for key in group
        if (meant := likely_key(key, known)) is not None
    ]
    if found:
        stepper.warned_of_options = True
        text = f"neither SAM nor {base.cls.__name__} reads {', '.join(found)}: correct the name, or drop it"
        warn(text, OptionWarning)


def likely_key(key: Any, known: set[str]) -> str | None:
    """Return the known key that an unknown one was probably meant to be; None if there is none."""
    if not isinstance(key, str) or key in known or key in TORCHS:
        return None
    plain = key.lower().replace("-", "_").strip("_ ")
    if plain in SYNONYMS:
        return SYNONYMS[plain]
    parts = plain.split("_")
    if plain not in known and any(name in parts for name in known):  # a name of its own, such as lr_scale
        return None
    compounds = (name for name in known if "_" in name and name != plain)
    if any(plain.startswith(f"{name}_") or plain.endswith(f"_{name}") for name in compounds):
        return None
    close = difflib.get_close_matches(plain, known, n=1, cutoff=LIKENESS)
    return close[0] if close else None
