"""Tests of the CUDA kernels' machine code (tools/machine_code.py): registers, spills, instructions, wide accesses.

The tests need nvcc and NVIDIA's disassembler (cuobjdump and nvdisasm, of the toolkit or of the triton package), but no
GPU. The cubins take some minutes of one core and are kept under build/ until the sources change.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fused_sam.backends.contract import RULES

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from machine_code import (  # after its folder is known
    ARCHITECTURES,
    ELEMENT_RULES,
    WITH_LARGE_TABLES,
    Kernel,
    all_kernels,
    bytes_read,
    figures,
    instructions_per_element,
    missing_tools,
    nvcc_release,
    page_with,
    vectors,
)  # fmt: skip

# The most registers that a kernel may use. With up to 128, an SM runs two blocks of 256 threads, and by docs/gpu.md
# that is enough bytes in flight. With up to 80, it runs three. Adam needs more than 96 for its divisions and roots.
MOST_REGISTERS = {"adam": 128, "lion": 80}
MOST_REGISTERS_OF_OTHERS = 96


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if reason := missing_tools():
        pytest.skip(reason)
    found = all_kernels()
    assert all(kernel.instructions and kernel.usage for kernel in found)
    return found


def matching(instructions: list[str], pattern: str) -> list[str]:
    return [i for i in instructions if re.match(pattern, i)]


def in_flight(kernel: Kernel) -> int:
    """Return the most 16-byte loads that follow each other with no store or branch between them."""
    most = count = 0
    for instruction in kernel.instructions:
        if re.match(r"(STG|BRA|BAR|BSYNC|WARPSYNC|EXIT)\b", instruction):
            count = 0
        elif instruction.startswith("LDG"):
            count += vectors(instruction)
            most = max(most, count)
    return most


def test_every_kernel_is_compiled(kernels: list[Kernel]) -> None:
    pairs, masters = {(4, 4), (2, 2), (2, 4)}, {(2, 2, 4), (2, 4, 4)}
    plain = {(p, g, p) for p, g in pairs}
    # With fp32 params or masters, an update rounds to nearest.
    updates = {False: plain | masters, True: plain - {(4, 4, 4)}}
    for architecture in ARCHITECTURES:
        assert len([k for k in kernels if k.architecture == architecture and k.primitive == "finish_norm"]) == 1
        sizes = [(64, 44), (224, 176), (600, 400)]
        for tensors, adam_tensors in sizes if architecture == WITH_LARGE_TABLES else sizes[:1]:
            here = [k for k in kernels if k.architecture == architecture and k.tensors in (tensors, adam_tensors)]

            def types(primitive: str, random: bool = False, here: list[Kernel] = here) -> set[tuple[int, ...]]:
                return {k.types for k in here if k.primitive == primitive and k.random is random}

            assert types("norm") == types("squares") == pairs | {(4, 2)}
            assert types("perturb") == types("perturb", True) == plain | masters
            for primitive in (rule.name for rule in RULES):
                assert [types(primitive, r) for r in (False, True)] == [updates[r] for r in (False, True)]
            assert types("restore") == {(4, 4), (2, 2), (2, 4)}
            assert types("dot") == pairs | {(4, 2)}
            assert len([k for k in here if k.primitive == "axpby"]) == 11


def test_registers_and_no_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        most = MOST_REGISTERS.get(kernel.primitive, MOST_REGISTERS_OF_OTHERS)
        assert kernel.usage["REG"] <= most, f"{kernel}: {kernel.usage}"
        assert kernel.usage["STACK"] == kernel.usage["LOCAL"] == 0, f"{kernel}: {kernel.usage}"
        assert not matching(kernel.instructions, r"(STL|LDL)\b"), kernel


def test_no_fp64_arithmetic(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert not matching(kernel.instructions, r"(DADD|DMUL|DFMA|DSETP|DMNMX|DMMA)\b"), kernel


def test_the_address_space_of_every_access_is_static(kernels: list[Kernel]) -> None:
    """Kernels read the table as constants and the tensors as global memory. A generic access would be slower."""
    for kernel in kernels:
        assert not matching(kernel.instructions, r"(LD|ST)(\.|\s)"), kernel


def test_loads_are_16_bytes_wide_and_several_in_flight(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        expected = bytes_read(kernel) * kernel.elements // 16
        assert in_flight(kernel) >= expected, f"{kernel}: {in_flight(kernel)} loads in flight, not {expected}"


def test_stores_are_16_bytes_wide(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if kernel.primitive in ("norm", "squares", "dot", "finish_norm"):
            continue
        # Bytes per element of the params (axpby: the result), the state, and perturb's backup or an update's master.
        written = kernel.types[-1 if kernel.primitive == "axpby" else 0]
        written += {"sgd": 4, "adam": 12, **dict.fromkeys(ELEMENT_RULES, 4)}.get(kernel.primitive, 0)
        if kernel.primitive not in ("restore", "axpby") and kernel.masters != (kernel.primitive == "perturb"):
            written += kernel.types[2]
        expected = written * kernel.elements // 16
        wide = sum(map(vectors, matching(kernel.instructions, r"STG\b")))
        assert wide >= expected, f"{kernel}: {wide} wide stores, not {expected}"


# The most instructions per element, loads, stores and the loop included: of SAM with SGD and momentum, and of any
# options (ASAM, dampening). An SM issues 128 per cycle: in the time that an H100's memory takes, 20 for the 2 bytes of
# a 16-bit norm, 81 for the 8 of perturb, and 143 for the 14 of sgd.
MOST_INSTRUCTIONS = {
    ("norm", "f"): (3, 3), ("norm", "4bf16"): (5, 5), ("norm", "3f16"): (5, 5),
    ("perturb", "f"): (8, 8), ("perturb", "4bf16"): (8, 10), ("perturb", "3f16"): (8, 10),
    ("sgd", "f"): (12, 14), ("sgd", "4bf16"): (12, 14), ("sgd", "3f16"): (12, 14),
}  # fmt: skip
MOST_AT_RANDOM = {"4bf16": 55, "3f16": 72, "f": 32}  # perturb with masks and stochastic rounding


@pytest.mark.parametrize(("primitive", "dtype"), MOST_INSTRUCTIONS)
def test_instructions_per_element(kernels: list[Kernel], primitive: str, dtype: str) -> None:
    """16-bit numbers are converted by the hardware: integer code took 13 to 52 instructions."""
    mine = [k for k in kernels if k.primitive == primitive and set(k.names) == {dtype} and not k.random]
    assert {k.architecture for k in mine} == set(ARCHITECTURES)
    for kernel in mine:
        found, most = instructions_per_element(kernel), MOST_INSTRUCTIONS[primitive, dtype]
        assert found[0] <= most[0] and found[1] <= most[1], f"{kernel}: {found}"


@pytest.mark.parametrize("dtype", MOST_AT_RANDOM)
def test_instructions_of_random_perturbations(kernels: list[Kernel], dtype: str) -> None:
    for kernel in kernels:
        if kernel.primitive == "perturb" and kernel.random and set(kernel.names) == {dtype}:
            _, count = instructions_per_element(kernel)
            assert count <= MOST_AT_RANDOM[dtype], f"{kernel}: {count:.1f}"


def test_16_bit_numbers_are_rounded_in_pairs(kernels: list[Kernel]) -> None:
    """One instruction rounds two numbers, and none sorts out NaNs or subnormal numbers."""
    rounding = {"perturb", "sgd", "adam", *ELEMENT_RULES}
    for kernel in kernels:
        if kernel.primitive in rounding and kernel.types[0] == 2 and not kernel.random:
            pairs = matching(kernel.instructions, r"F2FP(\.\w+)*\.PACK_AB(_MERGE_C)? R\d+, R\d+, R\d+")
            assert len(pairs) >= kernel.elements // 2, f"{kernel}: {len(pairs)}"


def test_the_figures_of_the_page_are_those_of_the_machine_code(kernels: list[Kernel]) -> None:
    """They depend on the compiler; `python tools/machine_code.py` writes them."""
    if nvcc_release() != "13.0":
        pytest.skip(f"docs/gpu.md has the figures of nvcc 13.0, and this is {nvcc_release()}")
    _, text, wanted = page_with(figures(kernels))
    assert text == wanted
