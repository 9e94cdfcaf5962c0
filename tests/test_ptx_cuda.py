"""The CUDA backend with the PTX of its kernels, run by the interpreter in support/ptx: table.cu and bindings too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import ptx_cuda
from support.triton_tables import DTYPES, GROUPS, PERTURB_GROUPS, draw_case

REASON = ptx_cuda.register()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the kernels' PTX cannot be made: {REASON}")

KINDS: dict[str, dict[str, Any]] = {
    **{f"{p}, {g}": {"dtypes": (p, g)} for p, g in DTYPES},
    **{f"{p}, {g}, masters": {"dtypes": (p, g), "masters": True} for p, g in DTYPES[1:]},
    **{f"{p}, {g}, stochastic": {"dtypes": (p, g), "stochastic": True} for p, g in DTYPES[1:]},
}
# Large tables hold more tensors than small ones: 64, and 44 of Adam.
SIZES = {"small": [1, 15, 33, 4097, 5000], "large": [3 + i % 5 for i in range(70)]}


@pytest.mark.parametrize("rule", GROUPS)
@pytest.mark.parametrize(("sizes", "shift"), [("small", 0), ("small", 1), ("large", 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_equals_the_reference(kind: str, sizes: str, shift: int, rule: str) -> None:
    """Norm, perturbation with masks, norm, update with clipping."""
    groups = [g._replace(mask_prob=p) for g, p in zip(PERTURB_GROUPS, (1.0, 0.5, 1.0, 0.3), strict=True)]
    case = draw_case(SIZES[sizes], groups=GROUPS[rule], perturb_groups=groups, shift=shift, **KINDS[kind])
    backend = ptx_cuda.CudaPtx()
    case.norm(backend, ascent=True)
    case.perturb(backend)
    case.compare()
    case.norm(backend, ascent=False, keep_skip=True)
    case.update(backend, torch.tensor(4.0), 2.0)
    case.compare()
    torch.testing.assert_close(case.status.values[:6], case.twin_status.values[:6], rtol=1e-5, atol=0)
