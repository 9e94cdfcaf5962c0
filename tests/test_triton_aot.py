"""The Triton kernels compiled for GPUs that this machine may lack, and the backend's errors where it cannot run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_sam
from fused_sam.backends import BACKENDS, choose
from fused_sam.backends.contract import RULES
from fused_sam.backends.triton.backend import Triton

triton = pytest.importorskip("triton", minversion="3.6")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: this process cannot compile", allow_module_level=True)

from support.triton_aot import (  # noqa: E402  # after the skip: it imports triton's compiler
    BLOCK,
    KERNELS,
    MASTERS,
    ROUNDING,
    THREADS,
    GPUTarget,
    Kernel,
    compiled,
    resources,
    tl,
    unmasked_loads,
    wide_accesses,
)  # fmt: skip

F32, BF16, F16 = tl.float32, tl.bfloat16, tl.float16
# Every kernel for sm_90 in fp32 and bf16, and in both 16-bit dtypes with masters or stochastic rounding; other cases in
# samples.
CASES = [
    *((kernel, t, t, 90) for kernel in KERNELS for t in (F32, BF16)),
    *((kernel, p, g, 90) for kernel in KERNELS if kernel.name in ("norm", "sgd") for p, g in ((BF16, F32), (F16, F16))),
    *((kernel, t, t, 90) for kernel in MASTERS for t in (BF16, F16)),
    *((kernel, BF16, F32, 90) for kernel in MASTERS if kernel.name in {rule.name for rule in RULES}),
    *((kernel, t, t, 90) for kernel in ROUNDING for t in (BF16, F16)),
    *((kernel, F32, F32, 80) for kernel in KERNELS),
]


@pytest.mark.parametrize(("kernel", "param", "grad", "capability"), CASES, ids=str)
def test_code_for_nvidia(kernel: Kernel, param: tl.dtype, grad: tl.dtype, capability: int, tmp_path: Path) -> None:
    """Both aligned paths of a block use 16-byte accesses, the main one without masks; nothing spills."""
    code = compiled(kernel, param, grad, GPUTarget("cuda", capability, 32))
    ptx = code.asm["ptx"]

    def accesses(columns: str) -> int:
        sizes = {"p": param.primitive_bitwidth, "g": grad.primitive_bitwidth, "f": 32}
        return sum(2 * BLOCK * sizes[c] // (128 * THREADS) for c in columns)

    found = wide_accesses(ptx)
    assert found["ld"] >= accesses(kernel.reads)
    assert found["st"] >= accesses(kernel.writes)
    if kernel.reads_always:
        assert unmasked_loads(ptx) > 0
    assert ".local" not in ptx
    used = resources(code.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0
    # Of a processor's 65,536: enough for three blocks of 256 threads, and for two of Adam, which has more columns.
    assert used["REG"] <= (128 if kernel.name == "adam" else 80)


@pytest.mark.parametrize(("kernel", "param", "grad"), [c[:3] for c in CASES if c[3] == 90][::2], ids=str)
def test_code_for_amd(kernel: Kernel, param: tl.dtype, grad: tl.dtype) -> None:
    code = compiled(kernel, param, grad, GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
    assert "load_dwordx4" in code
    assert not kernel.writes or "store_dwordx4" in code
    assert "scratch_" not in code


def test_sums_use_no_atomics_on_values() -> None:
    for kernel in KERNELS:
        ptx = compiled(kernel, F32, F32, GPUTarget("cuda", 90, 32)).asm["ptx"]
        atomics = re.findall(r"(?<![\w.])(?:atom|red)\.\S+", ptx)
        assert atomics in ([], ["atom.global.gpu.acq_rel.add.u32"])


def test_arithmetic_is_fp32() -> None:
    """No Python float of the source becomes an fp64 instruction."""
    for kernel in (*KERNELS, *ROUNDING):
        assert ".f64" not in compiled(kernel, BF16, BF16, GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_random_words_are_unsigned() -> None:
    """The shifts of random numbers, by 15 and 16, bring in zeros."""
    for kernel in ROUNDING:
        ptx = compiled(kernel, BF16, BF16, GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert {kind for kind, _ in re.findall(r"shr\.(\w+)\s+\S+ \S+ (15|16);", ptx)} == {"u32"}


def test_steps_are_counted_when_every_thread_has_read_them() -> None:
    """There is a barrier of the block between the last load and the ticket."""
    for kernel in (k for k in KERNELS if k.name == "adam"):
        ptx = compiled(kernel, F32, F32, GPUTarget("cuda", 90, 32)).asm["ptx"]
        before, after = ptx.split("atom.global.gpu.acq_rel", 1)
        assert "bar.sync" in before[max(before.rfind("ld.global"), before.rfind("st.global")) :]
        assert "bar.sync" in after


# ---- choosing and explaining ----------------------------------------------------------------------------------

NO_GPU = not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()))


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert fused_sam.backends.available()["triton"] == Triton.unavailable_reason()
    with pytest.raises(RuntimeError, match=r"torch finds no GPU; .* set TRITON_INTERPRET=1 before Python starts"):
        choose("triton", torch.device("cpu"))


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_sam.backends.triton.requirements.find_spec", lambda _: None)
    assert "triton is not installed" in (Triton.unavailable_reason() or "")
    assert "pip install triton" in (Triton.unavailable_reason() or "")


def test_with_an_old_triton_it_says_which_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "triton 3.5.1 is too old; 3.6 or newer is needed" in (Triton.unavailable_reason() or "")


def test_without_a_c_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "needs a C compiler" in (Triton.unavailable_reason() or "")


def test_it_supports_gpus_and_the_dtypes_of_its_kernels() -> None:
    backend = Triton()
    for device in ("cuda", "xpu"):
        where = torch.device(device)
        assert all(backend.supports(where, t, t) for t in (torch.float32, torch.bfloat16, torch.float16))
        assert backend.supports(where, torch.bfloat16, torch.float32)
        assert not backend.supports(where, torch.float64, torch.float64)
        assert not backend.supports(where, torch.float32, torch.bfloat16)
    assert not backend.supports(torch.device("cpu"), torch.float32, torch.float32)
    assert BACKENDS["triton"] is Triton


def test_importing_the_package_does_not_import_triton() -> None:
    command = "import sys, fused_sam; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
