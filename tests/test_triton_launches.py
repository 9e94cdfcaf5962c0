"""What the Triton backend hands to Triton's launcher, without a GPU: launches are noted down instead of run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.triton_draws import DTYPES, GROUPS, Case, draw_case, draw_lists
from torch import Tensor

from fused_sam.backends.triton.backend import Triton

pytest.importorskip("triton", minversion="3.6")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: this process cannot compile", allow_module_level=True)

from support.triton_driver import Launch, NotingDriver, noting_driver  # after the skip: imports triton

SIZES = [7, 600, 16]


@pytest.fixture
def driver() -> Iterator[NotingDriver]:
    with noting_driver() as noting:
        yield noting


def resolved(launch: Launch) -> tuple[int, list[Any]]:
    """Programs and arguments, tensors as the addresses that a driver takes of them."""
    return launch.programs, [a.data_ptr() if isinstance(a, Tensor) else a for a in launch.arguments]


def of_table(run: Callable[[Triton, Case], Any]) -> Callable[[Triton], Callable[[], Any]]:
    def prepare(backend: Triton) -> Callable[[], Any]:
        case = draw_case(SIZES, DTYPES[1], adam=True)
        return lambda: run(backend, case)

    return prepare


def of_lists(run: Callable[[Triton, Any], Any]) -> Callable[[Triton], Callable[[], Any]]:
    def prepare(backend: Triton) -> Callable[[], Any]:
        lists, _ = draw_lists(SIZES, torch.bfloat16, torch.float32)
        return lambda: run(backend, lists)

    return prepare


NUMBERS = torch.zeros(8)
HOW = {"carry": False, "begin": True, "finish": True, "eps": 1e-12}
CALLS = {
    "norm, scaled": of_table(lambda b, c: b.norm(c.table, GROUPS, NUMBERS, scaled=True, **HOW)),
    "norm": of_table(lambda b, c: b.norm(c.table, GROUPS, NUMBERS, scaled=False, **HOW)),
    "perturb": of_table(lambda b, c: b.perturb(c.table, GROUPS, NUMBERS)),
    "sgd": of_table(lambda b, c: b.sgd(c.table, GROUPS, NUMBERS, None)),
    "sgd, scaled": of_table(lambda b, c: b.sgd(c.table, GROUPS, NUMBERS, NUMBERS[1])),
    "adam": of_table(lambda b, c: b.adam(c.table, GROUPS, NUMBERS, None)),
    "adam, scaled": of_table(lambda b, c: b.adam(c.table, GROUPS, NUMBERS, NUMBERS[1])),
    "finish": of_table(lambda b, c: b.finish(NUMBERS, scaled=True, carry=True, eps=1e-12)),
    "restore": of_table(lambda b, c: b.restore(c.table)),
    "dots": of_lists(lambda b, x: b.dots(x, NUMBERS, begin=True)),
    "combine": of_lists(lambda b, x: b.combine(x, x.y, NUMBERS)),
    "average": of_lists(lambda b, x: b.average(x, 0.9)),
    "combine, guarded": of_lists(lambda b, x: b.combine(x, x.y, NUMBERS, NUMBERS)),
    "average, guarded": of_lists(lambda b, x: b.average(x, 0.9, NUMBERS)),
}


@pytest.mark.parametrize("call", CALLS)
def test_later_launches_are_the_first_one_again(call: str, driver: NotingDriver) -> None:
    """One launch a primitive; Triton binds the first, the later ones pass it by with the same arguments."""
    run = CALLS[call](Triton())
    run()
    (first,) = driver.launches
    assert any(isinstance(a, Tensor) for a in first.arguments)
    run()
    assert len(driver.launches) == 2
    assert not any(isinstance(a, Tensor) for a in driver.launches[1].arguments)
    assert resolved(driver.launches[1]) == resolved(first)


def test_a_kernel_fits_arguments_of_any_value_and_alignment(driver: NotingDriver) -> None:
    """What Triton compiled for one table is taken again for any other of the same dtypes and block size."""
    from fused_sam.backends.triton import passes, updates

    kernels = (passes.norm, passes.perturb, updates.sgd, updates.adam)
    made = []
    for sizes in ([1], [16] * 16, [7, 600], [100] * 3):
        case = draw_case(sizes, DTYPES[0], adam=True)
        room = torch.zeros(9)
        for status in (room[:8], room[1:]):  # the second lies 4 bytes past a multiple of 16
            backend = Triton()
            case.table.native = None
            backend.norm(case.table, GROUPS, status, scaled=True, carry=False, begin=True, finish=False, eps=0.0)
            backend.perturb(case.table, GROUPS, status)
            backend.sgd(case.table, GROUPS, status, status[0])
            backend.adam(case.table, GROUPS, status, status[0])
        made.append([len(kernel.device_caches[0][0]) for kernel in kernels])
    assert made[1:] == made[:1] * 3


def test_a_variant_for_each_use_and_no_more(driver: NotingDriver) -> None:
    """Masks, models and random rounding are compiled where a table asks for them, and leave the plain kernel alone."""
    from fused_sam.backends.triton import passes

    masked = [g._replace(share=0.5) for g in GROUPS]
    for groups in (GROUPS, masked, GROUPS, masked):
        for options in ({}, {"stochastic": True}, {"model": torch.bfloat16}):
            dtypes = DTYPES[0] if "model" in options else DTYPES[1]
            case = draw_case(SIZES, dtypes, **options)  # type: ignore[arg-type]
            Triton().perturb(case.table, groups, NUMBERS)
    assert len(passes.perturb.device_caches[0][0]) == 6


def test_a_whole_step_of_many_tensors_is_four_launches(driver: NotingDriver) -> None:
    """Norm and perturbation, norm and update; three under a GradScaler, which has looked at the second gradient."""
    case, backend = draw_case([40] * 161, DTYPES[0]), Triton()
    backend.norm(case.table, GROUPS, NUMBERS, scaled=True, **HOW)
    backend.perturb(case.table, GROUPS, NUMBERS)
    backend.norm(case.table, GROUPS, NUMBERS, scaled=False, **HOW)
    backend.sgd(case.table, GROUPS, NUMBERS, None)
    assert [launch.programs for launch in driver.launches] == [case.table.native.programs, 161] * 2
