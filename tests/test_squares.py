"""Sums of squares per row, factors per row and second moments: every backend and the CUDA source equal `reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import cuda_source
from support.backends import SUMS_IN_FP32, Variant
from support.draws import values
from support.groups import GROUPS
from support.tables import KINDS, PERTURB_GROUPS, SHAPES, SIZES, Kind, Pair, addressed, draw_table, primary, status_with
from torch import Tensor

from fused_sam.backends.contract import INVERSE_NORM, SKIP, PerturbGroup, Table, arithmetic_dtype
from fused_sam.backends.reference import Reference

# Of 16 chunks or more, so that a row's sum has several parts.
LONG = ((70_001,), (3,), (200_003,))
EPS = [
    PerturbGroup(0.5, eta=1e-3),
    PerturbGroup(0.8, eta=1e-2),
    PerturbGroup(0.3, eta=1e-3),
    PerturbGroup(0.0, eta=1.0),
]
# Sums of up to 2e5 squares, in fp32 where the backend sums in fp32; each term of T_w has a few roundings of fp32.
RTOL = {True: 1e-5, False: 1e-6}


def number_rows(table: Table, shapes: Sequence[Sequence[int]], *, moments: bool) -> None:
    """Give a table factors and, with `moments`, second moments."""
    n = len(shapes)
    table.factors = torch.linspace(0.25, 2.0, n, dtype=torch.float64)
    if moments:
        dtype = arithmetic_dtype(table.params[0].dtype)
        table.second_moments = [values(s, 500 + i, dtype).square() for i, s in enumerate(shapes)]
        table.unbias = torch.linspace(1.0, 3.0, n, dtype=torch.float64)
    table.rule, table.state = None, {}  # a table that perturbs has no state of the update


def drawn(variant: Variant, kind: Kind, shapes: Sequence[Sequence[int]], *, moments: bool) -> Pair:
    groups = EPS if moments else PERTURB_GROUPS
    pair = Pair(variant, kind, GROUPS["sgd"], shapes, perturb_groups=groups)
    for table in (pair.table, pair.twin):
        number_rows(table, shapes, moments=moments)
    return pair


def squares(backend: Any, table: Table, groups: Sequence[PerturbGroup], *, weights: bool) -> Tensor:
    sums = torch.full((2, len(table.params)), 7.0, dtype=torch.float64)
    backend.squares(table, groups, sums, weights=weights)
    return sums if weights else sums[:1]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("moments", [False, True], ids=["", "second moments"])
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
def test_squares(variant: Variant, kind: Kind, moments: bool, weights: bool) -> None:
    pair = drawn(variant, kind, SHAPES, moments=moments)
    found = squares(pair.backend, pair.table, pair.perturb_groups, weights=weights)
    wanted = squares(Reference(), pair.twin, pair.perturb_groups, weights=weights)
    torch.testing.assert_close(found, wanted, rtol=RTOL[variant.name in SUMS_IN_FP32], atol=0.0)
    pair.compare()  # nothing was written


@pytest.mark.parametrize("threads", [1, 3])
def test_squares_of_long_tensors(variant: Variant, threads: int) -> None:
    torch.set_num_threads(threads)
    pair = drawn(variant, KINDS[0], LONG, moments=False)
    found = squares(pair.backend, pair.table, pair.perturb_groups, weights=True)
    wanted = squares(Reference(), pair.twin, pair.perturb_groups, weights=True)
    torch.testing.assert_close(found, wanted, rtol=RTOL[variant.name in SUMS_IN_FP32], atol=0.0)
    assert torch.equal(found, squares(pair.backend, pair.table, pair.perturb_groups, weights=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("moments", [False, True], ids=["", "second moments"])
def test_perturb_with_a_factor_per_row(variant: Variant, kind: Kind, moments: bool) -> None:
    pair = drawn(variant, kind, SHAPES, moments=moments)
    before = [w.clone() for w in primary(pair.table)]
    pair.perturb()
    pair.compare()
    moved = [not torch.equal(p, w.to(p.dtype)) for p, w in zip(pair.table.params, before, strict=True)]
    assert moved == [k != 3 for k in pair.table.group_ids]  # rho is 0 in the last group


def test_rows_with_factor_0_do_not_move(variant: Variant) -> None:
    pair = drawn(variant, KINDS[0], SHAPES, moments=False)
    before = [w.clone() for w in pair.table.params]
    for table in (pair.table, pair.twin):
        table.factors = torch.zeros(len(SIZES), dtype=torch.float64)
    pair.perturb()
    assert all(map(torch.equal, pair.table.params, before))


@pytest.mark.parametrize("moments", [False, True], ids=["", "second moments"])
def test_a_skip_flag_keeps_the_params(variant: Variant, moments: bool) -> None:
    pair = drawn(variant, KINDS[0], SHAPES, moments=moments)
    before = [w.clone() for w in pair.table.params]
    pair.set_status({SKIP: 1.0})
    pair.perturb()
    pair.compare()
    assert all(map(torch.equal, pair.table.params, before))
    assert all(map(torch.equal, pair.table.backups, before))


def test_squares_that_are_not_finite_stay_in_their_row(variant: Variant) -> None:
    pair = drawn(variant, KINDS[0], SHAPES, moments=False)
    for table in (pair.table, pair.twin):
        table.grads[1][3] = torch.inf
        table.grads[2][0] = torch.nan
    found = squares(pair.backend, pair.table, pair.perturb_groups, weights=False)[0]
    assert found.isfinite().tolist() == [True, False, False, True, True]


# ---- the CUDA kernels' source alone ----------------------------------------------------------------------------------

on_cuda_source = pytest.mark.skipif(cuda_source.register() is not None, reason="the kernels' source was not built")


@on_cuda_source
def test_cuda_source_with_several_launches_per_table() -> None:
    """Each launch has its own tensors' numbers; a table takes several beyond 600 tensors."""
    shapes = [(1 + 7 * i % 40,) for i in range(1300)]
    found, wanted = (draw_table(KINDS[0], GROUPS["sgd"], shapes, perturbed=True) for _ in range(2))
    for table in (found, wanted):
        number_rows(table, shapes, moments=True)
    backend = cuda_source.CudaSource()
    shim = cuda_source.module()
    before = shim.launches()
    sums = [squares(b, t, EPS, weights=True) for b, t in ((backend, found), (Reference(), wanted))]
    assert shim.launches() - before > 1
    torch.testing.assert_close(*sums, rtol=1e-5, atol=0.0)
    statuses = [status_with({INVERSE_NORM: 0.125}) for _ in range(2)]
    backend.perturb(found, EPS, statuses[0])
    Reference().perturb(wanted, EPS, statuses[1])
    for p, q in zip(found.params, wanted.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@on_cuda_source
def test_cuda_source_refuses_what_is_missing() -> None:
    backend = cuda_source.CudaSource()
    table = draw_table(KINDS[0], GROUPS["sgd"], SHAPES, perturbed=True)
    number_rows(table, SHAPES, moments=True)
    table.second_moments = []
    table.grad_addresses = addressed(table.grads)
    with pytest.raises(ValueError, match="tensor 0 lacks Adam's second moment"):
        squares(backend, table, EPS, weights=False)
