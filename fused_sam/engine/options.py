"""Options of SAM and its methods: their declaration, their checks, and errors that name them."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "..."})()  # the default of an option that has none


class Option:
    """One option of a method, as OPTIONS declares it: an attribute that checks what is assigned to it.

    Args:
        default: its value if the constructor is not given one; REQUIRED if it must be given. Its type is the option's:
            a bool, an int (a whole number), a float, or a string out of `choices`.
        low, high: the smallest and largest value.
        open_low, open_high: True excludes that value itself.
        choices: the values of a string.
        names: True if a sequence of names may take the place of a string out of `choices`; its value is a tuple.
        fixed: True if it cannot change after construction.
        help: one sentence for documentation.
    """

    def __init__(
        self,
        default: Any,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        open_low: bool = False,
        open_high: bool = False,
        choices: tuple[str, ...] = (),
        names: bool = False,
        type: type | None = None,
        fixed: bool = False,
        help: str = "",
    ) -> None:
        self.default = default
        self.low, self.high, self.open_low, self.open_high = low, high, open_low, open_high
        self.choices, self.names, self.fixed = choices, names, fixed
        self.type = type or (str if choices else default.__class__)
        self.help = help
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        try:
            return instance.__dict__[self.name]
        except KeyError:
            raise AttributeError(f"{instance.__class__.__name__}.{self.name} is set by SAM's constructor") from None

    def __set__(self, instance: Any, value: Any) -> None:
        value = self.check(value, instance.__class__.__name__)
        if self.fixed and instance.__dict__.get(self.name, value) != value:
            raise AttributeError(f"{instance.__class__.__name__}.{self.name} cannot change after construction")
        instance.__dict__[self.name] = value

    def check(self, value: Any, method: str) -> Any:
        """Return the value in the option's type.

        Raises:
            TypeError, ValueError: it is of another type or out of range.
        """
        title = f"{method}'s option {self.name}"
        if self.choices:
            if self.names and isinstance(value, (list, tuple)) and value and all(isinstance(x, str) for x in value):
                return tuple(value)
            if value not in self.choices:
                others = ", or a sequence of names" if self.names else ""
                raise ValueError(f"{title} must be {' or '.join(map(repr, self.choices))}{others}, not {value!r}")
            return value
        if self.type is bool:
            if isinstance(value, (str, Tensor)) or value not in (True, False):
                raise TypeError(f"{title} must be True or False, not {value!r}")
            return bool(value)
        if self.type is int:
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{title} must be a whole number, not {value!r}")
            check_range(title, value, self.low, self.high, open_low=self.open_low, open_high=self.open_high)
            return value
        return check_range(title, value, self.low, self.high, open_low=self.open_low, open_high=self.open_high)


def option(default: Any, **limits: Any) -> Any:
    """Declare an option of a method: `OPTIONS = {"alpha": option(0.4, low=0, high=1, help="...")}`; see Option."""
    return Option(default, **limits)


def merged(cls: type, name: str) -> dict[str, Any]:
    """Return the union of the mappings that a class and its parents, mixins included, declare under that name."""
    found: dict[str, Any] = {}
    for each in reversed(cls.__mro__):
        found.update(each.__dict__.get(name, {}))
    return found


def declare_options(cls: type, base: type) -> dict[str, Option]:
    """Make the OPTIONS of a class and its parents attributes of it; return them.

    A plain value in the class, under the name of an option that it inherits, is the option's new default.

    Raises:
        TypeError: one was not made by option(), or has the name of an option of `base`.
    """
    declared: dict[str, Option] = merged(cls, "OPTIONS")
    for name, each in declared.items():
        if not isinstance(each, Option):
            raise TypeError(f"{cls.__name__}.OPTIONS[{name!r}] must be made by fused_sam.option(), not {each!r}")
        if name in inspect.signature(base.__init__).parameters:  # type: ignore[misc]
            raise TypeError(
                f"{cls.__name__}.OPTIONS[{name!r}] is {base.__name__}'s own; its default goes into DEFAULTS"
            )
        each.name = name
        own = cls.__dict__.get(name, each)
        if not isinstance(own, Option):
            each = declared[name] = copy.copy(each)
            each.default = each.check(own, cls.__name__)
        elif name in cls.__dict__:
            each = declared[name] = own
        setattr(cls, name, each)
    return declared


def overrides(cls: type, name: str) -> bool:
    """Return True if a method has its own form of a hook, whose default does nothing."""
    return not getattr(getattr(cls, name), "is_default", False)


def set_options(instance: Any, options: dict[str, Option], given: dict[str, Any]) -> None:
    """Set an instance's options from keywords, which are taken out of `given`, or to their defaults."""
    for name, each in options.items():
        value = given.pop(name, each.default)
        if value is REQUIRED:
            raise TypeError(f"{type(instance).__name__} needs the option {name}: {each.help}")
        setattr(instance, name, value)


def join_options(keywords: dict[str, Any], base_options: Any) -> dict[str, Any]:
    """Return the base optimizer's options, from keywords and from SAM's argument base_options.

    Raises:
        TypeError: base_options is no mapping of names, or sets an option that is a keyword too.
    """
    if base_options is None:
        return keywords
    check_names(base_options, "base_options")
    for name in base_options:
        if name in keywords:
            raise TypeError(f"{name} is set twice, as a keyword and in base_options: set it in one of them")
    return {**keywords, **base_options}


def split_base_options(group: dict[str, Any], own: Collection[str], k: int) -> dict[str, Any]:
    """Return a group in which "base_options" holds options that are named as SAM's are, and no others.

    The others become entries of the group, where schedulers look for them.

    Raises:
        TypeError: they are no mapping of names.
        ValueError: they set an option that the group itself sets too.
    """
    title = f"base_options of group {k}"
    check_names(group["base_options"], title)
    given = {name: value for name, value in group["base_options"].items() if name not in own}
    for name in given:
        if name in group:
            raise ValueError(f"{title} set {name}, which the group itself sets too: set it in one of them")
    clashes = {name: value for name, value in group["base_options"].items() if name in own}
    return {**group, **given, "base_options": clashes}


def check_names(options: Any, title: str) -> None:
    """Raise TypeError for anything but a mapping of options' names to values."""
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise TypeError(f'{title} must be a dict of option names, such as {{"rho": 0.9}}, not {options!r}')


def signature_of(cls: type, base: type, options: dict[str, Option], defaults: dict[str, Any]) -> inspect.Signature:
    """Return the signature of a method's constructor: that of `base` with the method's options and defaults."""
    parameters = []
    for p in list(inspect.signature(base.__init__).parameters.values())[1:]:  # type: ignore[misc]
        if p.kind is p.VAR_KEYWORD:
            for name, each in options.items():
                default = p.empty if each.default is REQUIRED else each.default
                parameters.append(inspect.Parameter(name, p.KEYWORD_ONLY, default=default))
        parameters.append(p.replace(default=defaults.get(p.name, p.default)))
    return inspect.Signature(parameters)


def is_number(x: Any) -> bool:
    """Return True for a real number or a tensor of one element."""
    return x.numel() == 1 if isinstance(x, Tensor) else isinstance(x, Real) and not isinstance(x, bool)


def check_group(group: dict[str, Any], k: int) -> None:
    """Raise ValueError or TypeError for SAM's options of group k that are out of range."""
    for name in ("rho", "eta"):
        value = group[name]
        if not is_number(value):
            raise TypeError(f"{name} of group {k} must be a number, not {value!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} of group {k} must be a finite number of 0 or more, not {value!r}")
    for name in ("adaptive", "perturb"):
        if isinstance(group[name], str) or group[name] not in (False, True):
            raise TypeError(f"{name} of group {k} must be True or False, not {group[name]!r}")


def check_range(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> float:
    """Return value as a float, if it is a number from low to high; `open_low` and `open_high` exclude the limits.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, not {value!r}")
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    if not (above and below):
        if not (open_low or open_high or math.isinf(low) or math.isinf(high)):
            raise ValueError(f"{name} must be from {low:g} to {high:g}, not {value!r}")
        lower = "" if low == -math.inf else f"above {low:g}" if open_low else f"at least {low:g}"
        upper = "" if high == math.inf else f"below {high:g}" if open_high else f"at most {high:g}"
        bounds = " and ".join(filter(None, (lower, upper))) or "a number"
        raise ValueError(f"{name} must be {bounds}, not {value!r}")
    return float(value)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return value, if it is a whole number of at least `least`.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
    return value
