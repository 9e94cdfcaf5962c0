"""What the Triton backend passes to Triton's launcher, without a GPU: launches are recorded instead of run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.triton_tables import DTYPES, GROUPS, PERTURB_GROUPS, Case, draw_case, draw_pairs
from torch import Tensor

from fused_sam.backends.contract import Status
from fused_sam.backends.triton.backend import Triton

pytest.importorskip("triton", minversion="3.6")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: this process cannot compile", allow_module_level=True)

from support.triton_driver import Launch, RecordingDriver, recording_driver  # after the skip: imports triton

SIZES = [7, 600, 16]


@pytest.fixture
def driver() -> Iterator[RecordingDriver]:
    with recording_driver() as recording:
        yield recording


def status_of(values: Tensor) -> Status:
    """Return a status whose numbers are these, of fp32 as on a GPU."""
    status = Status(torch.device("cpu"))
    status.values, status.address = values, values.data_ptr()
    return status


def resolved(launch: Launch) -> tuple[str, int, list[Any]]:
    """Return a launch with addresses in place of tensors, as a driver takes them."""
    return launch.kernel, launch.programs, [a.data_ptr() if isinstance(a, Tensor) else a for a in launch.arguments]


def of_table(run: Callable[[Triton, Case], Any], rule: str = "sgd") -> Callable[[Triton], Callable[[], Any]]:
    def prepare(backend: Triton) -> Callable[[], Any]:
        case = draw_case(SIZES, DTYPES[1], GROUPS[rule])
        return lambda: run(backend, case)

    return prepare


def of_pair(run: Callable[[Triton, Any], Any]) -> Callable[[Triton], Callable[[], Any]]:
    def prepare(backend: Triton) -> Callable[[], Any]:
        pair, _ = draw_pairs(SIZES, torch.bfloat16, torch.float32)
        return lambda: run(backend, pair)

    return prepare


def updating(scale: Tensor | None, max_norm: float) -> Callable[[Triton, Case], Any]:
    def run(backend: Triton, case: Case) -> None:
        assert case.table.rule is not None
        backend.update(case.table, case.groups, STATUS, scale, max_norm)

    return run


NUMBERS = torch.zeros(8)
STATUS = status_of(NUMBERS)
HOW = {"keep_skip": False, "eps": 1e-12}
CALLS = {
    "norm, ascent": of_table(lambda b, c: b.norm([c.table], PERTURB_GROUPS, STATUS, **HOW)),
    "norm": of_table(lambda b, c: b.norm([c.table], None, STATUS, **HOW)),
    "accumulate_norm": of_table(lambda b, c: b.accumulate_norm(c.table, PERTURB_GROUPS, STATUS)),
    "finish_norm": of_table(lambda b, c: b.finish_norm(STATUS, ascent=True, keep_skip=True, eps=1e-12)),
    "perturb": of_table(lambda b, c: b.perturb(c.table, PERTURB_GROUPS, STATUS)),
    **{rule: of_table(updating(None, math.inf), rule) for rule in GROUPS},
    **{f"{rule}, scaled and clipped": of_table(updating(NUMBERS[1], 2.0), rule) for rule in GROUPS},
    "restore": of_table(lambda b, c: b.restore(c.table)),
    "dot": of_pair(lambda b, x: b.dot(x, NUMBERS, reset=True)),
    "axpby, device": of_pair(lambda b, x: b.axpby(x, x.y, NUMBERS)),
    "axpby, host": of_pair(lambda b, x: b.axpby(x, x.y, (2.0, 0.5))),
    "axpby, device, guarded": of_pair(lambda b, x: b.axpby(x, x.y, NUMBERS, STATUS)),
    "axpby, host, guarded": of_pair(lambda b, x: b.axpby(x, x.y, (2.0, 0.5), STATUS)),
    "ema": of_pair(lambda b, x: b.ema(x, 0.9)),
    "ema, guarded": of_pair(lambda b, x: b.ema(x, 0.9, STATUS)),
}


@pytest.mark.parametrize("call", CALLS)
def test_later_launches_repeat_the_first_one(call: str, driver: RecordingDriver) -> None:
    """Each primitive is one launch. Triton binds the first; the later ones pass the same arguments without it."""
    run = CALLS[call](Triton())
    run()
    (first,) = driver.launches
    assert any(isinstance(a, Tensor) for a in first.arguments)
    run()
    assert len(driver.launches) == 2
    assert not any(isinstance(a, Tensor) for a in driver.launches[1].arguments)
    assert resolved(driver.launches[1]) == resolved(first)


def test_a_kernel_fits_arguments_of_any_value_and_alignment(driver: RecordingDriver) -> None:
    """What Triton has compiled for one table serves all others of the same dtypes and block size."""
    from fused_sam.backends.triton.kernels import KERNELS

    names = ("norm", "perturb", *GROUPS)
    compiled = []
    for sizes in ([1], [16] * 16, [7, 600], [100] * 3):
        room = torch.zeros(9)
        for values in (room[:8], room[1:]):  # the second begins 4 bytes past a multiple of 16
            status = status_of(values)
            for groups in {**GROUPS, "adam": GROUPS["adam"][::2]}.values():  # Adam's without amsgrad
                backend, case = Triton(), draw_case(sizes, DTYPES[0], groups)
                backend.norm([case.table], PERTURB_GROUPS, status, keep_skip=False, eps=0.0)
                backend.perturb(case.table, PERTURB_GROUPS, status)
                backend.update(case.table, groups, status, values[0], 1.0)
        compiled.append([len(KERNELS[name].device_caches[0][0]) for name in names])
    assert compiled[0] == [1] * 5 and compiled[1:] == compiled[:1] * 3


def test_a_variant_for_each_use_and_no_more(driver: RecordingDriver) -> None:
    """Masks, masters and stochastic rounding compile where a table asks for them; the plain kernel has none of it."""
    from fused_sam.backends.triton.kernels import KERNELS

    masked = [g._replace(mask_prob=0.5) for g in PERTURB_GROUPS]
    for groups in (PERTURB_GROUPS, masked, PERTURB_GROUPS, masked):
        for options in ({}, {"stochastic": True}, {"masters": True}):
            case = draw_case(SIZES, DTYPES[1], **options)  # type: ignore[arg-type]
            Triton().perturb(case.table, groups, STATUS)
    assert len(KERNELS["perturb"].device_caches[0][0]) == 6


@pytest.mark.parametrize("weights", [False, True])
def test_squares_are_two_launches_for_any_number_of_tensors(weights: bool, driver: RecordingDriver) -> None:
    """The sums of the blocks, and of each row's blocks; later launches repeat the first ones."""
    for count in (3, 161):
        driver.launches.clear()
        case, backend = draw_case([40] * count, DTYPES[0]), Triton()
        case.table.rule, case.table.state = None, {}
        sums = torch.zeros(2, count)
        for _ in range(2):
            backend.squares(case.table, PERTURB_GROUPS, sums, weights=weights)
        assert [launch.kernel for launch in driver.launches] == ["squares", "row_sums"] * 2
        assert [launch.programs for launch in driver.launches] == [count] * 4


def test_perturb_with_numbers_per_row_is_a_variant_of_its_own(driver: RecordingDriver) -> None:
    from fused_sam.backends.triton.kernels import KERNELS

    for factors, moments in ((False, False), (True, False), (True, True)):
        case = draw_case(SIZES, DTYPES[0])
        case.table.rule, case.table.state = None, {}
        case.table.factors = torch.ones(3) if factors else None
        if moments:
            case.table.second_moments, case.table.unbias = [torch.ones(n) for n in SIZES], torch.ones(3)
        Triton().perturb(case.table, PERTURB_GROUPS, STATUS)
    assert len(KERNELS["perturb"].device_caches[0][0]) == 3
    assert [launch.kernel for launch in driver.launches] == ["perturb"] * 3


@pytest.mark.parametrize("rule", GROUPS)
def test_a_whole_step_of_many_tensors_is_four_launches(rule: str, driver: RecordingDriver) -> None:
    """Norm and perturbation, norm and update; three under a GradScaler, which has checked the second gradient."""
    case, backend = draw_case([40] * 161, DTYPES[0], GROUPS[rule]), Triton()
    backend.norm([case.table], PERTURB_GROUPS, STATUS, **HOW)  # type: ignore[arg-type]
    backend.perturb(case.table, PERTURB_GROUPS, STATUS)
    backend.norm([case.table], None, STATUS, **HOW)  # type: ignore[arg-type]
    updating(None, math.inf)(backend, case)
    assert [launch.kernel for launch in driver.launches] == ["norm", "perturb", "norm", rule]
    assert [launch.programs for launch in driver.launches] == [case.table.native.programs, 161] * 2


@pytest.mark.parametrize(("registers", "fitting"), [(32, 8), (33, 6), (39, 6), (48, 5), (64, 4), (255, 1)])
def test_a_reduction_has_as_many_programs_as_the_device_holds(
    registers: int, fitting: int, driver: RecordingDriver
) -> None:
    """One more would wait for the first to end. The limits are those of NVIDIA's occupancy calculator."""
    driver.registers = registers
    case, backend = draw_case([2048] * 100, DTYPES[0], GROUPS["sgd"]), Triton()
    pair, _ = draw_pairs([2048] * 100, torch.float32, torch.float32)
    for _ in range(2):
        backend.norm([case.table], PERTURB_GROUPS, STATUS, **HOW)  # type: ignore[arg-type]
        backend.dot(pair, NUMBERS, reset=True)
        backend.perturb(case.table, PERTURB_GROUPS, STATUS)
    processors = case.table.native.device.processors
    assert [launch.programs for launch in driver.launches] == [fitting * processors] * 2 + [100] + [
        fitting * processors
    ] * 2 + [100]


def test_the_norm_of_several_tables_is_one_launch_for_each(driver: RecordingDriver) -> None:
    """The first launch resets the sum, and the last one finishes the norm."""
    from fused_sam.backends.triton import layout

    cases, backend = [draw_case(SIZES, dtypes) for dtypes in DTYPES[:3]], Triton()
    backend.norm([case.table for case in cases], None, STATUS, keep_skip=True, eps=0.5)
    assert [launch.kernel for launch in driver.launches] == ["norm"] * 3
    flags = [launch.arguments[8] for launch in driver.launches]
    kept = layout.KEEP_SKIP
    assert flags == [kept | layout.RESET, kept, kept | layout.FINISH]
    assert all(launch.arguments[9] == 0.5 for launch in driver.launches)
