"""The Triton backend with the PTX of its kernels, compiled for sm_90 and run by the interpreter in support/ptx."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
from support.ptx import PtxError
from support.triton_tables import DTYPES, GROUPS, SIZES, draw_case

pytest.importorskip("triton", minversion="3.6")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: this process cannot compile", allow_module_level=True)

from support.ptx_triton import LaunchingDriver, TritonPtx, ptx_driver  # after the skip: imports triton


@pytest.fixture
def driver() -> Iterator[LaunchingDriver]:
    with ptx_driver() as launching:
        yield launching


@pytest.mark.parametrize("rule", GROUPS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_a_step_equals_the_reference(dtypes: tuple, shift: int, rule: str, driver: LaunchingDriver) -> None:
    sizes = [*SIZES, 2048] if shift else [2048] * 3 + [10240, 2047, 4112, 1]
    case, backend = draw_case(sizes, dtypes, GROUPS[rule], shift=shift), TritonPtx()
    case.norm(backend, ascent=True)
    case.perturb(backend)
    case.compare("params")
    case.norm(backend, ascent=False, keep_skip=True)
    case.update(backend)
    case.compare()


def test_a_ticket_that_does_not_release_is_a_race(driver: LaunchingDriver) -> None:
    text = re.compile(r"atom\.global\.gpu\.acq_rel")

    def changed(kernel):  # type: ignore[no-untyped-def]
        assert text.search(kernel.text)
        return kernel.with_text(text.sub("atom.global.gpu.relaxed", kernel.text))

    driver.change = changed
    case = draw_case(SIZES, DTYPES[0])
    with pytest.raises(PtxError, match="a race"):
        case.norm(TritonPtx(), ascent=True)
