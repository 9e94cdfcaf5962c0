"""What nvcc makes of the CUDA kernels: registers, spills, the width of their loads and stores, and no FP64 arithmetic.

Needs nvcc and NVIDIA's disassembler (cuobjdump and nvdisasm, of the toolkit or of the triton package), but no GPU. The
cubins are kept under build/ until the sources change.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin")
SIZES = {"f": 4, "4bf16": 2, "3f16": 2}  # mangled storage types and their bytes

# Most that a kernel may take: with 96 registers two blocks of 256 threads share an SM, and by docs/gpu.md that is
# enough bytes in flight; above 128 it would be one.
MOST_REGISTERS = 96


@dataclass
class Kernel:
    """One compiled kernel: its primitive, the bytes of an element of each type it is made for, and its instructions."""

    architecture: str
    primitive: str
    types: tuple[int, ...]
    tensors: int
    usage: dict[str, int] = field(default_factory=dict)
    instructions: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.architecture} {self.primitive} of {self.types} bytes, {self.tensors} tensors"


def tool(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        homes.append(str(Path(triton.origin).parent / "backends" / "nvidia"))
    return shutil.which(name) or next(filter(None, (shutil.which(f"{home}/bin/{name}") for home in homes)), None)


def compiled(nvcc: str) -> list[Path]:
    """A cubin for each architecture."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    state = hashlib.sha256(repr((version, FLAGS)).encode())
    for folder in ("core", "cuda"):
        for file in sorted((ROOT / "csrc" / folder).iterdir()):
            state.update(file.read_bytes())
    folder = ROOT / "build" / "machine-code" / state.hexdigest()[:16]
    if not folder.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
    cubins = [folder / f"{architecture}.cubin" for architecture in ARCHITECTURES]

    def compile_for(cubin: Path) -> None:
        if cubin.exists():
            return
        unfinished = cubin.with_suffix(f".{os.getpid()}")
        source = ROOT / "csrc" / "cuda" / "kernels.cu"
        command = [nvcc, *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch={cubin.stem}", str(source), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        unfinished.replace(cubin)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_for, cubins))
    return cubins


def kernel_of(mangled: str, architecture: str) -> Kernel:
    found = re.search(r"\d+([a-z]+)_kernelI(.*)NS_11LaunchTableILi(\d+)E", mangled)
    assert found is not None, mangled
    types, rest = [], found[2]
    while rest:  # each type is f, NS_4bf16E, NS_3f16E, or S<number>_ for one that was named before
        word = re.match(r"NS_(\w+?)E|(f)|S\d*_", rest)
        assert word is not None, mangled
        types.append(SIZES[word[1] or word[2]] if word[1] or word[2] else types[-1])
        rest = rest[word.end() :]
    return Kernel(architecture, found[1], tuple(types), int(found[3]))


def disassembled(cubin: Path, cuobjdump: str) -> list[Kernel]:
    def output(option: str) -> str:
        return subprocess.run([cuobjdump, option, str(cubin)], capture_output=True, text=True, check=True).stdout

    kernels: dict[str, Kernel] = {}
    for name, numbers in re.findall(r"Function (\S+):\n\s*(REG:.*)", output("-res-usage")):
        kernels[name] = kernel_of(name, cubin.stem)
        kernels[name].usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
    current: list[str] = []
    for line in output("-sass").splitlines():
        if title := re.search(r"Function : (\S+)", line):
            current = kernels[title[1]].instructions
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            current.append(re.sub(r"^@!?U?P\d+\s+", "", found[1]))
    return list(kernels.values())


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    nvcc, cuobjdump, nvdisasm = tool("nvcc"), tool("cuobjdump"), tool("nvdisasm")
    if nvcc is None:
        pytest.skip("nvcc is missing (NVIDIA's CUDA toolkit)")
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("cuobjdump and nvdisasm are missing (NVIDIA's CUDA toolkit, or pip install triton)")
    os.environ["PATH"] = f"{os.environ['PATH']}:{Path(nvdisasm).parent}"
    found = [kernel for cubin in compiled(nvcc) for kernel in disassembled(cubin, cuobjdump)]
    assert all(kernel.instructions and kernel.usage for kernel in found)
    return found


def matching(instructions: list[str], pattern: str) -> list[str]:
    return [i for i in instructions if re.match(pattern, i)]


def vectors(instruction: str) -> int:
    """How many 16-byte vectors a load or store moves."""
    return 2 if ".256" in instruction else 1 if ".128" in instruction else 0


def in_flight(kernel: Kernel) -> int:
    """Most 16-byte loads that are issued before anything waits for one: with no store or branch between them."""
    most = count = 0
    for instruction in kernel.instructions:
        if re.match(r"(STG|BRA|BAR|BSYNC|WARPSYNC|EXIT)\b", instruction):
            count = 0
        elif instruction.startswith("LDG"):
            count += vectors(instruction)
            most = max(most, count)
    return most


def test_every_kernel_is_there(kernels: list[Kernel]) -> None:
    pairs = {(4, 4), (2, 2), (2, 4)}
    for architecture in ARCHITECTURES:
        for tensors in (64, 600):
            here = [k for k in kernels if k.architecture == architecture and k.tensors == tensors]
            for primitive in ("norm", "perturb", "sgd"):
                assert {k.types for k in here if k.primitive == primitive} == pairs
            assert {k.types for k in here if k.primitive == "restore"} == {(4,), (2,)}
            assert {k.types for k in here if k.primitive == "dots"} == pairs | {(4, 2)}
            assert len([k for k in here if k.primitive == "combine"]) == 11


def test_registers_and_no_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.usage["REG"] <= MOST_REGISTERS, f"{kernel}: {kernel.usage}"
        assert kernel.usage["STACK"] == kernel.usage["LOCAL"] == 0, f"{kernel}: {kernel.usage}"
        assert not matching(kernel.instructions, r"(STL|LDL)\b"), kernel


def test_no_fp64_arithmetic(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert not matching(kernel.instructions, r"(DADD|DMUL|DFMA|DSETP|DMNMX|DMMA)\b"), kernel


def test_the_space_of_every_address_is_known(kernels: list[Kernel]) -> None:
    """The table is read as constants and the tensors as global memory: a generic access would be slower."""
    for kernel in kernels:
        assert not matching(kernel.instructions, r"(LD|ST)(\.|\s)"), kernel


def test_loads_are_16_bytes_wide_and_several_in_flight(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        # A thread has 16 elements of each array under way, so as many vectors as the elements' bytes add up to.
        expected = {
            "norm": kernel.types[-1],
            "perturb": sum(kernel.types),
            "sgd": sum(kernel.types) + 4,
            "restore": kernel.types[0],
            "dots": sum(kernel.types[:2]),
            "combine": sum(kernel.types[:2]),
        }[kernel.primitive]
        assert in_flight(kernel) >= expected, f"{kernel}: {in_flight(kernel)} loads in flight, not {expected}"


def test_stores_are_16_bytes_wide(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        wide = sum(map(vectors, matching(kernel.instructions, r"STG\b")))
        arrays = {"norm": 0, "dots": 0, "perturb": 2, "sgd": 2, "restore": 1, "combine": 1}[kernel.primitive]
        assert wide >= 2 * arrays, f"{kernel}: {wide} wide stores"
