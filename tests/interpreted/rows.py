"""Sums of squares per row, factors and second moments in Triton's interpreter, against the reference.

Runs only if TRITON_INTERPRET is set before Python starts, as tests/test_triton_interpret.py does.
"""

from __future__ import annotations

import pytest
import support.triton_rounding  # noqa: F401  # rounds as GPUs do
import torch
from support.draws import values
from support.triton_tables import DTYPES, PERTURB_GROUPS, SIZES, Case, draw_case, place
from torch import Tensor

from fused_sam.backends.contract import INVERSE_NORM, SKIP, PerturbGroup
from fused_sam.backends.triton.backend import Triton

EPS = [
    PerturbGroup(0.05, eta=1e-2),
    PerturbGroup(0.5, eta=0.1),
    PerturbGroup(0.3, eta=1e-3),
    PerturbGroup(0.2, eta=1.0),
]
LONG = [*SIZES, 150_000]  # of more blocks than `row_sums` adds up at a time

moments_or_not = pytest.mark.parametrize("moments", [False, True], ids=["", "second moments"])


def drawn(
    sizes: list[int], dtypes: tuple[torch.dtype, torch.dtype], *, moments: bool, shift: int = 0, **options: bool
) -> Case:
    case = draw_case(sizes, dtypes, perturb_groups=EPS if moments else PERTURB_GROUPS, shift=shift, **options)  # type: ignore[arg-type]
    n = len(sizes)
    for table in (case.table, case.twin):
        table.rule, table.state = None, {}
        table.factors = torch.linspace(0.25, 2.0, n, dtype=torch.float64)
        if moments:
            table.second_moments = [place(values((k,), 70 + i).float().square(), shift) for i, k in enumerate(sizes)]
            table.unbias = torch.linspace(1.0, 3.0, n, dtype=torch.float64)
    case.set_status(INVERSE_NORM, 0.125)
    return case


def squares(case: Case, *, weights: bool) -> list[Tensor]:
    found = []
    for backend, table, _ in case.sides(Triton()):
        sums = torch.full((2, len(table.params)), 7.0, dtype=torch.float64)
        backend.squares(table, case.perturb_groups, sums, weights=weights)
        found.append(sums if weights else sums[:1])
    return found


@moments_or_not
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_squares(dtypes: tuple[torch.dtype, torch.dtype], weights: bool, moments: bool) -> None:
    case = drawn(SIZES, dtypes, moments=moments, shift=int(weights))
    torch.testing.assert_close(*squares(case, weights=weights), rtol=1e-6, atol=0.0)
    case.compare()


def test_squares_of_many_blocks() -> None:
    torch.testing.assert_close(*squares(drawn(LONG, DTYPES[0], moments=False), weights=True), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_squares_of_masters(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for moments in (False, True):
        case = drawn(SIZES, dtypes, moments=moments, masters=True)
        torch.testing.assert_close(*squares(case, weights=True), rtol=1e-6, atol=0.0)


@moments_or_not
@pytest.mark.parametrize("options", [{}, {"masters": True}, {"stochastic": True}], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_perturb(dtypes: tuple[torch.dtype, torch.dtype], options: dict[str, bool], moments: bool) -> None:
    if dtypes[0] is torch.float32 and options:
        pytest.skip("for 16-bit params")
    case, backend = drawn(SIZES, dtypes, moments=moments, **options), Triton()
    case.perturb(backend)
    case.compare()


@moments_or_not
def test_skip_keeps_the_params(moments: bool) -> None:
    case = drawn(SIZES, DTYPES[0], moments=moments, shift=1)
    before = [p.clone() for p in case.table.params]
    case.set_status(SKIP, 1.0)
    case.perturb(Triton())
    case.compare()
    assert all(map(torch.equal, case.table.params, before))


def test_new_numbers_of_rows_are_read() -> None:
    """They are arguments of each launch, so that a table reads this step's."""
    case, backend = drawn(SIZES, DTYPES[0], moments=True), Triton()
    for factor in (1.0, 0.5):
        for table in (case.table, case.twin):
            table.factors = torch.full((len(SIZES),), factor, dtype=torch.float64)
        case.perturb(backend)
        case.compare()
