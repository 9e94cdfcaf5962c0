"""Random lives of an optimizer: every backend, and a plain program around torch's optimizer, through one script.

FUSED_SAM_LIVES=1000 python -m pytest tests/test_life.py lives so many of them, drawn anew each time.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import family
from support.backends import NAMES
from support.bits import Snapshot, assert_same_bits, parameters, same_bits
from support.life import ADDED, Life, OnPurposeError, laid_out
from support.plain import PlainSAM
from support.tolerance import bound
from torch import Tensor
from torch.optim import Optimizer

import fused_sam
from fused_sam.schedule import Every, Random

SGD, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd without momentum": (SGD, {"lr": 0.1}),
    "sgd with dampening": (SGD, {"lr": 0.1, "momentum": 0.5, "dampening": 0.4, "maximize": True}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (ADAMW, {"lr": 0.01}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "rmsprop": (RMSPROP, {"lr": 0.01}),
}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    **family.CASES,
    "SAM": {"SAM": {}, "SAM every second step": {"schedule": Every(2)}},
    "ASAM": {"ASAM": {}},
    "LookSAM": {"LookSAM": {"k": 2}, "LookSAM at random": {"k": 2, "schedule": Random(0.7)}},
    "MicrobatchSAM": {
        "MicrobatchSAM": {"num_microbatches": 1},
        "MicrobatchSAM of two": {"num_microbatches": 2},
    },
}
METHODS = family.cases({**fused_sam.METHODS, **family.EXAMPLES}, CASES)
DTYPES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp64": (torch.float64, {}),
    "fp32": (torch.float32, {}),
    "masters": (torch.bfloat16, {"master_weights": True}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
}
# Methods whose steps all perturb, by a closure that runs twice.
SIMPLE = ("SAM", "ASAM", "GSAM", "GCSAM", "WSAM", "WSAM coupled", "FriendlySAM", "ESAM elements")
BACKENDS = ["reference", *(name for name in NAMES if name not in ("reference", "triton"))]  # its interpreter is slow

seeds = st.integers(0, 2**16).map(lambda n: 100 * n)
absences: st.SearchStrategy[frozenset[int]] = st.one_of(
    st.just(frozenset()), st.frozensets(st.integers(1, 12), max_size=5)
)
bads = st.sampled_from([math.inf, -math.inf, math.nan])
numbers = st.integers(0, 8)


def make_optimizer(method: str, cls: type[Optimizer], options: dict[str, Any], groups: list[dict[str, Any]]) -> Any:
    return METHODS[method](groups, cls, **options)


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


class Lives(RuleBasedStateMachine):
    """Several optimizers and one script. The first one may be the plain program."""

    method: str

    @initialize(
        base=st.sampled_from(list(BASES)),
        precision=st.sampled_from(list(DTYPES)),
        max_norm=st.sampled_from([None, None, 1.0]),
        rho=st.sampled_from([0.1, 0.1, 0.0]),
    )
    def begin(self, base: str, precision: str, max_norm: float | None, rho: float) -> None:
        method = self.method
        cls, options = BASES[base]
        dtype, more = DTYPES[precision]
        if precision in ("masters", "stochastic") and base == "rmsprop":
            cls, options = BASES["sgd"]
        self.one_pass = method == "MomentumSAM"
        if self.one_pass and base in ("rmsprop", "sgd without momentum"):
            cls, options = BASES["sgd"]
        if precision == "stochastic" and method == "WSAM":
            method = "WSAM coupled"
        self.method, self.cls, self.dtype = method, cls, dtype
        self.recombines = dtype is torch.bfloat16 and method not in ("SAM", "ASAM", "MicrobatchSAM")
        sams = {"rho": rho, "max_norm": max_norm}
        self.lives: list[Life] = []
        if method == "SAM" and precision != "stochastic":
            wide = torch.float32 if precision == "masters" else dtype
            self.lives.append(Life(lambda p: PlainSAM(p, cls, **sams, **options), wide, dtype))
        for name in BACKENDS:
            common = {"backend": name, **sams, **options, **more}
            self.lives.append(Life(partial(make_optimizer, method, cls, common), dtype))
        self.ours = [life for life in self.lives if not life.plain]
        self.steps = 1  # writes so far, each with its rounding
        self.pending = "none"  # gradients: none, fresh, used, zeros, unclear
        self.grown = 0
        self.written: set[int] = set()  # since the last update, whose masters are still to follow

    # ---- what is known about it -----------------------------------------------------------------------------

    @property
    def perturbed(self) -> bool:
        return self.ours[0].optimizer.perturbed

    def any_gradient(self) -> bool:
        return any(g is not None for g in self.ours[0].gradients())

    def note_gradients(self, state: str) -> None:
        self.pending = state if self.any_gradient() else "none"

    # ---- gradients ------------------------------------------------------------------------------------------

    @rule(seed=seeds, absent=absences)
    def backward(self, seed: int, absent: frozenset[int]) -> None:
        for life in self.lives:
            life.backward(seed, absent)
        self.note_gradients("fresh" if self.pending in ("none", "fresh", "zeros") else "unclear")

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        for life in self.lives:
            life.optimizer.zero_grad(set_to_none)
        if "Microbatch" in self.method and self.perturbed:
            return
        self.note_gradients("zeros")

    @rule(i=numbers, bad=bads)
    def spoil(self, i: int, bad: float) -> None:
        for life in self.lives:
            life.spoil(i, bad)
        if self.pending == "used":
            self.note_gradients("unclear")

    @rule(i=numbers)
    def drop(self, i: int) -> None:
        for life in self.lives:
            life.params[i].grad = None
        self.note_gradients("unclear" if self.pending == "used" else self.pending)

    @rule(layout=st.sampled_from(["contiguous", "channels_last", "transposed", "gaps"]))
    def relay(self, layout: str) -> None:
        for life in self.lives:
            life.relay(layout)
        self.note_gradients("unclear" if self.pending in ("used", "zeros") else self.pending)

    @rule(i=numbers, on=st.booleans())
    def freeze(self, i: int, on: bool) -> None:
        for life in self.lives:
            life.params[i].requires_grad_(on)

    # ---- the two steps ----------------------------------------------------------------------------------------

    def climb(self, zero_grad: bool) -> None:
        for life in self.lives:
            life.perturb()
            life.optimizer.first_step(zero_grad)
        self.steps += 1

    def update(self, take: Callable[[Any], None]) -> None:
        befores = [Snapshot(life.optimizer) for life in self.ours]
        addresses = [life.addresses for life in self.lives]
        if self.method == "MicrobatchSAM of two" and self.perturbed:
            for life in self.lives:
                life.optimizer.next_microbatch()
                life.backward(3)
            self.climb(False)
            for life in self.lives:
                life.backward(4)
        for life in self.lives:
            take(life)
        used = self.any_gradient()
        for life, before in zip(self.ours, befores, strict=True):
            if life.optimizer.step_was_skipped:
                life.assert_clean()
                before.weights = [p.detach().clone() for p in parameters(life.optimizer)]
                self.assert_unchanged(life, before)
        for life, old in zip(self.lives, addresses, strict=True):
            life.saved = {}
            assert [p.data_ptr() for p in life.params] == old
        plain = [life.optimizer.step_was_skipped for life in self.lives]
        assert len(set(plain)) == 1, plain
        self.steps += 2
        self.pending = "used" if used else "none"
        self.written.clear()

    def assert_unchanged(self, life: Life, before: Snapshot, *, counters: bool = False) -> None:
        """But for masters, which follow weights that the script has written, and counters, which count skipped steps.

        counters: they as well.
        """
        if not counters:
            before.options = [options_of(group) for group in life.optimizer.param_groups]
        for p, entry in zip(parameters(life.optimizer), before.state, strict=True):
            if "master_weight" in entry:
                entry["master_weight"] = life.optimizer.state[p]["master_weight"]
        if self.one_pass:  # displaced anew, by the rho of now
            before.weights = [p.detach().clone() for p in parameters(life.optimizer)]
        before.assert_unchanged()

    @precondition(lambda self: not self.perturbed and not self.one_pass)
    @rule(zero_grad=st.booleans())
    def first_step(self, zero_grad: bool) -> None:
        self.climb(zero_grad)
        if not self.any_gradient() or (zero_grad and "Microbatch" not in self.method):
            self.pending = "none"

    @precondition(lambda self: self.perturbed)
    @rule(zero_grad=st.booleans())
    def second_step(self, zero_grad: bool) -> None:
        self.update(lambda life: life.optimizer.second_step(zero_grad))
        if zero_grad:
            self.pending = "none"

    @rule()
    def step(self) -> None:
        self.update(lambda life: life.optimizer.step())

    @rule(seed=seeds, absent=absences, bad=st.sampled_from([0, 0, 0, 1, 2]), zero_grad=st.booleans())
    def whole_step(self, seed: int, absent: frozenset[int], bad: int, zero_grad: bool) -> None:
        """The usual loop, which random rules seldom make."""
        if self.perturbed:
            self.update(lambda life: life.optimizer.second_step(zero_grad=True))
        self.zero_grad(True)
        self.backward(seed, frozenset())
        if bad == 1:
            self.spoil(0, math.inf)
        if self.ours[0].optimizer.needs_second_pass:
            self.climb(True)
            for life in self.lives:
                life.backward(seed + 50, absent)
        if bad == 2:
            self.spoil(0, math.nan)
        self.update(lambda life: life.optimizer.step())
        if zero_grad:
            self.zero_grad(True)

    @precondition(lambda self: not self.perturbed)
    @rule(
        seed=seeds,
        absent=absences,
        clear=st.sampled_from([None, True, False]),
        bad=st.sampled_from([0, 0, 1, 2]),
        fails=st.sampled_from([0, 0, 1, 2]),
        late=st.booleans(),
    )
    def closure_step(
        self, seed: int, absent: frozenset[int], clear: bool | None, bad: int, fails: int, late: bool
    ) -> None:
        runs: dict[int, int] = {}
        failed: set[int] = set()
        addresses = [life.addresses for life in self.lives]

        def take(life: Life) -> None:
            count = 0

            def closure(i: int = 0) -> float:
                nonlocal count
                count += 1
                runs[id(life)] = count
                if clear is not None:
                    life.optimizer.zero_grad(clear)
                if fails == count and not late:
                    raise OnPurposeError
                life.backward(seed + 50 * (count - 1), absent)
                if bad == count:
                    life.spoil(0, math.inf)
                if fails == count:
                    raise OnPurposeError
                return float(count)

            try:
                extra: dict[str, Any] = {}
                if life.plain:
                    extra = {"fresh": runs[id(self.ours[0])] == 1 and life.optimizer.needs_second_pass}
                result = life.optimizer.step(closure, **extra)
                assert result == 1.0 or self.method == "MicrobatchSAM of two"
            except OnPurposeError:
                failed.add(id(life))

        befores = [Snapshot(life.optimizer) for life in self.ours]
        perturbs = self.pending_perturbs()
        for life in [*self.ours, *(life for life in self.lives if life.plain)]:
            take(life)
        assert len(set(runs.values())) == 1 and len(failed) in (0, len(self.lives)), (runs, failed)
        if perturbs is not None and not failed:
            expected = {"none": 2, "zeros": 2, "used": 2, "fresh": 1}.get(self.pending) if perturbs else 1
            assert expected is None or runs[id(self.ours[0])] == expected
        for life, before in zip(self.ours, befores, strict=True):
            assert not life.optimizer.perturbed
            if failed:
                self.assert_unchanged(life, before, counters=True)
            elif life.optimizer.step_was_skipped:
                self.assert_unchanged(life, before)
        for life, old in zip(self.lives, addresses, strict=True):
            assert [p.data_ptr() for p in life.params] == old
        self.steps += 3
        self.written.clear()
        if failed:
            self.note_gradients("unclear")
        else:
            self.note_gradients("used")

    def pending_perturbs(self) -> bool | None:
        """Whether a step now perturbs, where that does not take asking; None else."""
        if self.method not in SIMPLE:
            return None
        return any(g["rho"] > 0 and g["perturb"] for g in self.ours[0].optimizer.param_groups)

    @rule()
    def restore(self) -> None:
        for life in self.lives:
            life.optimizer.restore()
            life.assert_clean()
            life.saved = {}
            assert not life.optimizer.perturbed
        self.note_gradients(self.pending)

    @precondition(lambda self: self.method != "MicrobatchSAM of two")
    @rule(seed=seeds, bad=st.sampled_from([0, 0, 1, 2]), unscale=st.booleans())
    def scaled_step(self, seed: int, bad: int, unscale: bool) -> None:
        """Under a GradScaler. The plain program has the numbers without the scale, which is a power of two."""
        for life in self.lives:
            life.optimizer.restore()
            life.optimizer.zero_grad()

        def one(life: Life) -> None:
            scale = 1.0 if life.plain else life.scaler.get_scale()
            life.scaler.scale(torch.zeros(()))  # begins it
            if not life.plain and (life.optimizer.needs_grad_scale or unscale):
                life.optimizer.ascent_grad_scale = scale
            life.backward(seed, factor=scale)
            if bad == 1:
                life.spoil(0, math.inf)
            if life.optimizer.needs_second_pass:
                life.perturb()
                life.optimizer.first_step(zero_grad=True)
                life.backward(seed + 50, factor=scale)
            if bad == 2:
                life.spoil(0, math.nan)
            if life.plain:
                life.optimizer.step()
            elif any(g is not None for g in life.gradients()):
                if unscale:
                    life.scaler.unscale_(life.optimizer)
                life.scaler.step(life.optimizer)
                life.scaler.update()
            life.optimizer.restore()
            life.optimizer.zero_grad()

        self.update(one)
        self.pending = "none"

    # ---- options and weights ----------------------------------------------------------------------------------

    @rule(
        k=st.integers(0, 2),
        change=st.sampled_from(
            [("lr", 0.05), ("lr", 0.0), ("rho", 0.0), ("rho", 0.2), ("momentum", 0.0), ("momentum", 0.7),
             ("weight_decay", 0.0), ("weight_decay", 0.05), ("perturb", False), ("perturb", True),
             ("adaptive", True), ("adaptive", False)]
        ),
    )  # fmt: skip
    def set_option(self, k: int, change: tuple[str, Any]) -> None:
        name, value = change
        if name == "momentum" and (self.cls is not SGD or (self.one_pass and value == 0)):
            return
        for life in self.lives:
            life.optimizer.param_groups[k][name] = value

    @rule()
    def scheduler_step(self) -> None:
        for life in self.lives:
            life.schedule()

    @rule(seed=seeds, i=numbers)
    def write(self, seed: int, i: int) -> None:
        self.written.add(i)
        for life in self.lives:
            life.write(i, seed)

    @rule(layout=st.sampled_from(["contiguous", "channels_last", "transposed", "gaps"]))
    def replace(self, layout: str) -> None:
        for life in self.lives:
            life.replace(layout)

    @precondition(lambda self: not self.one_pass)
    @rule(j=st.integers(0, 2), k=st.integers(0, 2))
    def swap(self, j: int, k: int) -> None:
        for life in self.lives:
            life.swap(j, k)

    @precondition(lambda self: self.grown < len(ADDED))
    @rule()
    def grow(self) -> None:
        for life in self.lives:
            life.grow(self.grown)
        self.grown += 1

    # ---- saving, loading, copying -------------------------------------------------------------------------------

    @rule(inside=st.sampled_from(["nothing", "replace", "fail"]))
    def unperturbed(self, inside: str) -> None:
        for life in self.lives:
            climbed = [p.detach().clone() for p in life.params]
            with suppress(OnPurposeError), life.optimizer.unperturbed():
                life.assert_clean()
                life.optimizer.state_dict()
                assert not life.optimizer.perturbed
                if inside == "replace":
                    life.replace("contiguous")
                elif inside == "fail" and not life.plain:
                    raise OnPurposeError
            assert_same_bits(life.params, climbed)

    @precondition(lambda self: not self.perturbed)
    @rule()
    def reload(self) -> None:
        for life in self.lives:
            with life.clean():
                saved = copy.deepcopy(life.optimizer.state_dict())
                before = Snapshot(life.optimizer)
                life.optimizer.load_state_dict(saved)
                if not life.plain:
                    before.assert_unchanged()

    @precondition(lambda self: not self.perturbed)
    @rule(by=st.integers(1, 4))
    def exchange(self, by: int) -> None:
        """Everyone goes on from another one's state."""
        lives = self.ours if self.dtype is torch.bfloat16 else self.lives
        saved = []
        for life in lives:
            with life.clean():
                saved.append(copy.deepcopy(life.optimizer.state_dict()))
        for i, life in enumerate(lives):
            with life.clean():
                life.optimizer.load_state_dict(saved[(i + by) % len(saved)])

    @precondition(lambda self: not self.perturbed)
    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def copied(self, way: str) -> None:
        for life in self.lives:
            with life.clean():
                life.optimizer.state_dict()  # which notes in the groups how often was drawn
                old, before = life.params, Snapshot(life.optimizer)
                life.copied(way)
                assert not any(p is q for p, q in zip(life.params, old, strict=True))
                assert_same_bits(life.params, old)
                if not life.plain:
                    before.optimizer = life.optimizer
                    before.assert_unchanged()
        self.note_gradients("unclear")

    @precondition(lambda self: not self.perturbed)
    @rule(i=numbers, how=st.sampled_from(["all", "entry", "key", "clone", "transposed"]))
    def change_state(self, i: int, how: str) -> None:
        for life in self.lives:
            p, state = life.params[i], life.optimizer.state
            masters = {q: entry["master_weight"] for q, entry in state.items() if "master_weight" in entry}
            if how == "all":
                state.clear()
            elif how == "entry" or (self.cls is not SGD and how == "key"):
                state.pop(p, None)
            elif how == "key":
                state.get(p, {}).pop("momentum_buffer", None)
            for q, master in masters.items():
                state[q]["master_weight"] = master
            if how in ("clone", "transposed"):
                for name, value in state.get(p, {}).items():
                    if isinstance(value, Tensor):
                        state[p][name] = laid_out(value.clone(), how)

    @rule(what=st.sampled_from(["first_step", "second_step", "closure", "save", "copy", "pickle", "load"]))
    def misuse(self, what: str) -> None:
        """What is refused changes nothing."""
        wrong = {"second_step": not self.perturbed}.get(what, self.perturbed)
        if not wrong or self.one_pass:
            return
        for life in self.ours:
            o, before = life.optimizer, Snapshot(life.optimizer)
            calls: dict[str, Callable[[], Any]] = {
                "first_step": o.first_step,
                "second_step": o.second_step,
                "closure": partial(o.step, float),
                "save": o.state_dict,
                "copy": partial(copy.deepcopy, o),
                "pickle": partial(pickle.dumps, o),
                "load": partial(o.load_state_dict, {"state": {}, "param_groups": []}),
            }
            with pytest.raises(RuntimeError):
                calls[what]()
            before.assert_unchanged()

    # ---- what holds at any time ---------------------------------------------------------------------------------

    @invariant()
    def everyone_agrees(self) -> None:
        first, *others = self.lives
        hidden = {"master_weight"} if first.plain else set()
        for life in others:
            self.assert_close(life.params, first.params, "weight")
            for i, (p, q) in enumerate(zip(life.params, first.params, strict=True)):
                mine, theirs = life.optimizer.state.get(p, {}), first.optimizer.state.get(q, {})
                assert mine.keys() - hidden == theirs.keys(), (i, mine.keys(), theirs.keys())
                master = mine.get("master_weight")
                if master is not None and not self.perturbed and not self.one_pass and i not in self.written:
                    assert same_bits(master.bfloat16(), p.detach())
                for name, value in theirs.items():
                    self.assert_close([torch.as_tensor(mine[name])], [torch.as_tensor(value)], f"{name} of {i}")
            assert life.optimizer.perturbed == first.optimizer.perturbed
        for life in self.ours[1:]:
            a, b = life.optimizer, self.ours[0].optimizer
            assert bool(a.skipped) == bool(b.skipped) == a.step_was_skipped
            for x, y in ((a.grad_norm, b.grad_norm), (a.update_norm, b.update_norm)):
                rtol = {torch.float64: 1e-11, torch.float32: 1e-5}.get(self.dtype, 2e-2)
                torch.testing.assert_close(x, y, rtol=rtol, atol=1e-11, equal_nan=True)
            for g, h in zip(a.param_groups, b.param_groups, strict=True):
                assert options_of(g) == options_of(h)
        for life in self.lives:
            assert [p.data_ptr() for p in life.params] == life.addresses

    def assert_close(self, found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.shape == b.shape, (what, i)
            if a.numel():
                error = float((a.detach().double() - b.detach().double()).abs().max())
                rough = (
                    self.dtype if self.recombines and a.dtype is not torch.float64 else a.dtype
                )  # gradients that a method combines are rounded
                limit = bound(b.detach(), rough, self.steps)
                assert error <= limit, f"{what} {i} is off by {error:.3g}, allowed {limit:.3g}"


@pytest.mark.parametrize("method", METHODS)
def test_lives(method: str) -> None:
    more = os.environ.get("FUSED_SAM_LIVES")
    run_state_machine_as_test(
        type("Lives", (Lives,), {"method": method}),
        settings=settings(
            max_examples=int(more or (24 if method == "SAM" else 4)),
            stateful_step_count=50,
            deadline=None,
            derandomize=more is None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
