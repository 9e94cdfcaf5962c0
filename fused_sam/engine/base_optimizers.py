"""The second half of a SAM step: undo the perturbation and let the base optimizer move the parameters.

A base optimizer in FUSED below is fused with the undo into one pass. Any other optimizer class runs its own step on
restored parameters. docs/architecture.md lists what it takes to add a fused base optimizer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_sam.backends.contract import (
    ADAM,
    LION,
    SGD,
    UPDATED,
    AdamGroup,
    LionGroup,
    SGDGroup,
    Status,
    UpdateRule,
)
from fused_sam.backends.reference import grad_factor
from fused_sam.optimizers import Lion

from .calls import GradSnapshot, UpdatePlan

_VERSION = "_fused_sam_version"  # of a momentum at the last update

Group = dict[str, Any]  # one of an optimizer's param_groups

BASE_OPTIONS = "base_options"  # a group's key for the base optimizer's options that are named as SAM's are

# Keys that torch's learning-rate schedulers write into groups.
_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")


class Base(Protocol):
    """What SAM asks of a base optimizer."""

    cls: type[Optimizer]
    defaults: dict[str, Any]
    rule: UpdateRule | None  # None if it is not fused
    keeps_dtypes: bool  # True if loaded state keeps the dtype that it was saved with, instead of the parameter's
    clashes: tuple[str, ...]  # its options that are named as SAM's own are; a group has them in BASE_OPTIONS
    without_decay: bool  # True if the method applies the weight decay itself; of fused ones

    def numbers(self, groups: Sequence[Group]) -> tuple[list[Any], tuple[tuple[str, ...], ...]]:
        """Return for each parameter group its hyper-parameters, and the names of the state that its update uses."""

    def step(
        self,
        update: UpdatePlan,
        snapshot: GradSnapshot,
        groups: Sequence[Any],
        status: Status,
        grad_scale: Tensor | None,
        max_norm: float,
    ) -> None:
        """Undo the perturbation and take one step, or only undo it if the status says to skip."""

    def upgrade(self, state: dict[Tensor, dict[str, Any]], groups: list[Group]) -> None:
        """Bring state and groups of an older version of the optimizer to today's form, as its own loading does."""


# ---- fused base optimizers, as data ---------------------------------------------------------------------------------


class Fused(NamedTuple):
    """A base optimizer that the backends fuse with the undo."""

    rule: UpdateRule
    classes: tuple[type[Optimizer], ...]  # matched exactly, because a subclass may have another step()
    numbers: Callable[[Group], Any]  # a parameter group's hyper-parameters as the primitive takes them
    state: Callable[[Any], tuple[str, ...]]  # the names of the state that such a group uses


def _lr(group: Group) -> float | Tensor:
    """Return the learning rate; a tensor on an accelerator stays there."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def _sgd(group: Group) -> SGDGroup:
    return SGDGroup(
        _lr(group),
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        bool(group["nesterov"]),
        bool(group["maximize"]),
    )


def _adam(group: Group) -> AdamGroup:
    beta1, beta2 = group["betas"]
    return AdamGroup(
        _lr(group),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        bool(group.get("decoupled_weight_decay", False)),
        bool(group["amsgrad"]),
        bool(group["maximize"]),
    )


def _adamw(group: Group) -> AdamGroup:
    return _adam(group)._replace(decoupled_weight_decay=True)


def _lion(group: Group) -> LionGroup:
    beta1, beta2 = group["betas"]
    return LionGroup(_lr(group), float(beta1), float(beta2), float(group["weight_decay"]), bool(group["maximize"]))


_WITH_MOMENTUM, _WITHOUT = ("momentum_buffer",), ()
_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
_AMSGRAD_STATE = (*_ADAM_STATE, "max_exp_avg_sq")


def _adam_state(group: AdamGroup) -> tuple[str, ...]:
    return _AMSGRAD_STATE if group.amsgrad else _ADAM_STATE


FUSED = (
    Fused(SGD, (torch.optim.SGD,), _sgd, lambda group: _WITH_MOMENTUM if group.momentum != 0 else _WITHOUT),
    Fused(ADAM, (torch.optim.Adam,), _adam, _adam_state),
    Fused(ADAM, (torch.optim.AdamW,), _adamw, _adam_state),
    Fused(LION, (Lion,), _lion, lambda group: ("exp_avg",)),
)


class FusedBase:
    """A base optimizer whose update is one primitive: it undoes the perturbation and takes the step."""

    keeps_dtypes = True
    clashes: tuple[str, ...] = ()
    without_decay = False

    def __init__(self, fused: Fused, inner: Optimizer) -> None:
        self._inner = inner
        self.cls = type(inner)
        self.rule: UpdateRule | None = fused.rule
        self.defaults = inner.defaults
        self._numbers = fused.numbers
        self._state = fused.state

    def numbers(self, groups: Sequence[Group]) -> tuple[list[Any], tuple[tuple[str, ...], ...]]:
        numbers = list(map(self._numbers, groups))
        if self.without_decay:
            numbers = [group._replace(weight_decay=0.0) for group in numbers]
        return numbers, tuple(map(self._state, numbers))

    def step(
        self,
        update: UpdatePlan,
        snapshot: GradSnapshot,
        groups: Sequence[Any],
        status: Status,
        grad_scale: Tensor | None,
        max_norm: float,
    ) -> None:
        for call in update.restore:
            call.backend.restore(call.table)
        if self.rule is SGD:
            for group in groups:
                if group.dampening != 0:
                    note_written_momentum(update)
                    break
        marks = status.marks  # of an earlier call that an exception has ended: what it has completed
        for k, call in enumerate(update.calls):
            if marks[UPDATED] <= k:
                call.backend.update(call.table, groups, status, grad_scale, max_norm)
                marks[UPDATED] = k + 1
        for step in update.empty_steps:
            step += status.skip == 0

    def upgrade(self, state: dict[Tensor, dict[str, Any]], groups: list[Group]) -> None:
        self._inner.__setstate__({"state": {}, "param_groups": groups})  # an update brings the state up to date


def note_written_momentum(update: UpdatePlan) -> None:
    """Turn -0.0 into 0.0 in momentum that somebody else has written, such as a mask that multiplies it by 0.

    The kernels take -0.0 for a momentum that was never written, which matters with dampening only. They do not raise
    the version counter of state, so that a new version is a user's write.
    """
    for call in update.calls:
        for momentum in call.table.state["momentum_buffer"]:
            if momentum is None:
                continue
            if getattr(momentum, _VERSION, momentum._version) != momentum._version:
                momentum.add_(0.0)
            setattr(momentum, _VERSION, momentum._version)


class WrappedBase:
    """Any other optimizer class, on the facade's own groups and state."""

    rule: UpdateRule | None = None
    without_decay = False

    def __init__(self, optimizer: Optimizer, inner: Optimizer, clashes: tuple[str, ...]) -> None:
        self._optimizer = optimizer
        self._inner = inner
        self.clashes = clashes
        self.cls = type(inner)
        self.defaults = inner.defaults
        # torch's own optimizers need state in the dtype of the parameter. Others may keep it in another one.
        torchs = [cls for cls in type(inner).__mro__ if cls.__module__.split(".")[:2] == ["torch", "optim"]]
        self.keeps_dtypes = torchs == [Optimizer]

    def numbers(self, groups: Sequence[Group]) -> tuple[list[Any], tuple[tuple[str, ...], ...]]:
        return [], tuple(() for _ in groups)

    @torch.no_grad()
    def step(
        self,
        update: UpdatePlan,
        snapshot: GradSnapshot,
        groups: Sequence[Any],
        status: Status,
        grad_scale: Tensor | None,
        max_norm: float,
    ) -> None:
        for call in update.perturbed:
            call.backend.restore(call.table)
        status.marks[UPDATED] = 1  # what follows is the base optimizer's own, and nothing is left to undo
        if status.skip:
            return
        present = snapshot.present()
        if present and (grad_scale is not None or max_norm < math.inf):
            torch._foreach_mul_(present, grad_factor(False, status, grad_scale, max_norm))
        step = type(self._inner).step
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # type: ignore[attr-defined]  # the facade's step runs the hooks
        with self._sharing(self._optimizer.state, self._optimizer.param_groups):
            step(self._inner)

    def upgrade(self, state: dict[Tensor, dict[str, Any]], groups: list[Group]) -> None:
        # A parameter may have state of a method alone, in which the optimizer would look for its step.
        # An optimizer's own numbers, such as MADGRAD's, are under names instead of parameters.
        counted = {p: entry for p, entry in state.items() if isinstance(p, Tensor) and "step" in entry} or state
        with self._sharing(counted, groups):
            self._inner.__setstate__({"state": counted, "param_groups": groups})

    def add_group(self, group: Group, sam: Group) -> None:
        """Add a group by the optimizer's own add_param_group(), which may split it.

        Args:
            sam: SAM's options of the group.
        """
        groups = self._optimizer.param_groups
        before = len(groups)
        self._inner.state, self._inner.param_groups = self._optimizer.state, groups
        own = {name: value for name, value in group.items() if name not in sam and name != BASE_OPTIONS}
        try:
            self._inner.add_param_group({**own, **group.get(BASE_OPTIONS, {})})
        except BaseException:
            del groups[before:]
            raise
        for added in groups[before:]:
            _give(added, sam, {}, self.clashes)

    def modes(self) -> list[str]:
        """Return which of train() and eval() the optimizer has. Schedule-free ones evaluate with other weights."""
        return [mode for mode in ("train", "eval") if callable(getattr(self._inner, mode, None))]

    def set_mode(self, mode: str) -> None:
        """Call the optimizer's train() or eval()."""
        with self._sharing(self._optimizer.state, self._optimizer.param_groups):
            getattr(self._inner, mode)()

    @contextmanager
    def _sharing(self, state: dict[Tensor, dict[str, Any]], groups: list[Group]) -> Iterator[None]:
        """Give the optimizer this state and these groups, with its own options where SAM has some of the same name."""
        self._inner.state, self._inner.param_groups = state, groups  # type: ignore[assignment]
        self._exchange(groups)
        try:
            yield
        finally:
            self._exchange(groups)

    def _exchange(self, groups: list[Group]) -> None:
        for group in groups if self.clashes else ():
            own = group[BASE_OPTIONS]
            for name in self.clashes:
                group[name], own[name] = own[name], group[name]


def make_base(
    base: Callable[..., Optimizer], optimizer: Optimizer, options: dict[str, Any], own: Sequence[str]
) -> Base:
    """Return the base optimizer `base(groups, **options)` over the groups and the state of `optimizer`.

    It gets the groups without SAM's options, whose names `own` lists, and with their BASE_OPTIONS. Where an option of
    the base optimizer has the name of one of SAM's, it stays in BASE_OPTIONS.

    Its groups become those of `optimizer`. They may be parts of the given ones: MuonWithAdamW splits them.

    Raises what `base` raises for options that it does not take, ValueError instead of an assert without a message, and
    TypeError if it does not make an optimizer of these parameters.
    """
    groups = optimizer.param_groups
    taken = [_take(group, own) for group in groups]
    params = [list(group["params"]) for group in groups]
    given = [group.keys() & set(own) for group in groups]
    try:
        inner = base(groups, **options)
        if not isinstance(inner, Optimizer):
            raise TypeError(f"base_optimizer {base!r} returned {type(inner).__name__}, not a torch.optim.Optimizer")
        cls = type(inner)
        check_base_class(cls)
        origins = _origins(inner.param_groups, groups, params, base)
        clashes = tuple(name for name in own if name in inner.defaults)
        for k, names in enumerate(given):
            check_base_options(names, clashes, cls.__name__, k)
    except BaseException as error:
        for group, (sam, hidden) in zip(groups, taken, strict=True):
            group.update({**sam, **hidden})  # a user's dict, which may be used again
        if isinstance(error, AssertionError) and not error.args:
            raise _without_words(base, groups, own) from error
        raise
    for group, k in zip(inner.param_groups, origins, strict=True):
        _give(group, *taken[k], clashes)
    optimizer.param_groups = inner.param_groups
    for p, entry in inner.state.items():  # Adagrad fills its state before the first step
        optimizer.state.setdefault(p, entry)
    if not any(group.get("differentiable") for group in inner.param_groups):
        for fused in FUSED:
            if cls in fused.classes:
                return FusedBase(fused, inner)
    return WrappedBase(optimizer, inner, clashes)


def _take(group: Group, own: Sequence[str]) -> tuple[Group, Group]:
    """Take SAM's options and a scheduler's out of a group, and put the base optimizer's BASE_OPTIONS in.

    Base optimizers that assert the keys of their groups would refuse a group that a scheduler has written to.
    """
    sam = {name: group.pop(name) for name in own}
    hidden = {name: group.pop(name) for name in _OF_SCHEDULERS if name in group}
    group.update(group.pop(BASE_OPTIONS, {}))
    return sam, hidden


def _give(group: Group, sam: Group, hidden: Group, clashes: Sequence[str]) -> None:
    """Give a group of the base optimizer what _take took out, and its options that are named as SAM's a place apart."""
    if clashes:
        group[BASE_OPTIONS] = {name: group[name] for name in clashes}
    group.update({**sam, **hidden})


def _origins(
    made: list[Group], groups: list[Group], params: list[list[Tensor]], base: Callable[..., Optimizer]
) -> list[int]:
    """Return for each group that the base optimizer made the place of the given group that it is a part of.

    A base optimizer may split groups and reorder parameters within them. Names of parameters follow.

    Raises:
        TypeError: the groups are of other parameters than the given ones, or mix those of several groups.
    """
    place = {id(p): (k, i) for k, of_group in enumerate(params) for i, p in enumerate(of_group)}
    names = [group.get("param_names") for group in groups]
    of_dict = {id(group): k for k, group in enumerate(groups)}
    found = [[place.get(id(p), (-1, 0)) for p in group["params"]] for group in made]
    if sorted(x for places in found for x in places) != sorted(place.values()):
        raise TypeError(f"base_optimizer {base!r} made an optimizer of other parameters than those it was given")
    origins = []
    for group, places in zip(made, found, strict=True):
        of = {k for k, _ in places} or {of_dict.get(id(group), 0)}
        if len(of) > 1:
            raise TypeError(f"base_optimizer {base!r} joined groups: pass their parameters as one group")
        k = of.pop()
        origins.append(k)
        given = names[k]
        if given is not None and places != [(k, i) for i in range(len(given))]:
            group["param_names"] = [given[i] for _, i in places]
    return origins


def _without_words(base: Callable[..., Optimizer], groups: list[Group], own: Sequence[str]) -> ValueError:
    """Return the error for a base optimizer that refuses its groups by an assert that says nothing."""
    title = getattr(base, "__name__", repr(base))
    listed = "; ".join(
        f"group {k}: {', '.join(name for name in group if name not in own)}" for k, group in enumerate(groups)
    )
    return ValueError(
        f"{title} refused its parameter groups by an assert without a message. They have these keys, besides SAM's: "
        f"{listed}. Give every group the keys that {title} asks for (Keller Jordan's Muon: use_muon and its options, "
        "parameters without names)"
    )


def check_base_options(names: Collection[str], clashes: Collection[str], base: str, k: int) -> None:
    """Raise ValueError if group k sets options, named as SAM's are, that the base optimizer does not have."""
    for name in sorted(set(names) - set(clashes)):
        raise ValueError(f"base_options of group {k} set {name!r}, which {base} does not have")


def fused_names() -> str:
    """Return the names of the fused base optimizers, for errors."""
    names = [cls.__name__ for fused in FUSED for cls in fused.classes]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def check_base(base: Any) -> None:
    """Raise TypeError for anything but an optimizer class, or a callable that may make an optimizer."""
    if isinstance(base, Optimizer):
        raise TypeError(
            f"base_optimizer is an instance of {type(base).__name__}; pass the class, and its options as keywords: "
            f"SAM(params, {type(base).__name__}, lr=..., ...)"
        )
    if isinstance(base, type) and issubclass(base, Optimizer):
        check_base_class(base)
    elif isinstance(base, type) or not callable(base):
        raise TypeError(
            "base_optimizer must be a torch.optim.Optimizer class such as torch.optim.SGD, or a callable that makes an "
            f"optimizer of parameter groups, such as functools.partial(torch.optim.SGD, lr=0.1), not {base!r}"
        )


def option_names(base: Callable[..., Optimizer]) -> Collection[str]:
    """Return the names of the options that a base optimizer takes, as far as its signature lists them."""
    try:
        return inspect.signature(base).parameters
    except (TypeError, ValueError):  # a callable of C
        return ()


def check_base_class(cls: type[Optimizer]) -> None:
    """Raise TypeError for an optimizer class that SAM cannot take as its base optimizer."""
    if hasattr(cls, "first_step") and hasattr(cls, "second_step"):
        raise TypeError(
            f"{cls.__name__} makes SAM's two passes itself and cannot be SAM's base optimizer: "
            "pass the optimizer that is to move the weights, such as torch.optim.SGD"
        )
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{cls.__name__}.step needs a closure of its own and cannot be SAM's base optimizer")
