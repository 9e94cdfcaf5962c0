"""Tests of the CUDA kernels' machine code: registers, spills, the width of loads and stores, and no FP64 arithmetic.

The tests need nvcc and NVIDIA's disassembler (cuobjdump and nvdisasm, of the toolkit or of the triton package), but no
GPU. The cubins take some minutes of one core and are kept under build/ until the sources change.
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

from fused_sam.backends.contract import ADAM, RULES, SGD

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin")
# Kernels for small and for large tables share a template. Only one architecture compiles both, to halve the time.
WITH_LARGE_TABLES = "sm_90"
SIZES = {"f": 4, "4bf16": 2, "3f16": 2}  # mangled names of storage types, and their bytes

FILES = ("norm", "vectors", "perturb", "element", "sgd", "adam")  # of csrc/cuda; table.cu and device.cu have no kernels

ELEMENT_RULES = {rule.name for rule in RULES if rule not in (SGD, ADAM)}  # of core/rules.h: one buffer each

# The most registers that a kernel may use. With up to 128, an SM runs two blocks of 256 threads, and by docs/gpu.md
# that is enough bytes in flight. With up to 80, it runs three. Adam needs more than 96 for its divisions and roots.
MOST_REGISTERS = {"adam": 128, "lion": 80}
MOST_REGISTERS_OF_OTHERS = 96


@dataclass
class Kernel:
    """A compiled kernel with its primitive, the bytes per element of each type, and its instructions.

    The types are those of param, gradient, and master or backup, if the primitive uses them.
    """

    architecture: str
    primitive: str
    types: tuple[int, ...]
    random: bool
    tensors: int
    usage: dict[str, int] = field(default_factory=dict)
    instructions: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        what = "random " if self.random else ""
        return f"{self.architecture} {what}{self.primitive} of {self.types} bytes, {self.tensors} tensors"

    @property
    def masters(self) -> bool:
        return self.types[-1] > self.types[0]

    @property
    def elements(self) -> int:
        """Return the elements of each array that a thread has in flight (kElements in csrc/cuda)."""
        fewer = self.random or self.primitive == "adam" or (self.primitive in {"sgd", *ELEMENT_RULES} and self.masters)
        fewer = fewer or (self.primitive in ELEMENT_RULES and self.types[0] < self.types[1])
        return 8 if fewer else 16


def tool(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        homes.append(str(Path(triton.origin).parent / "backends" / "nvidia"))
    return shutil.which(name) or next(filter(None, (shutil.which(f"{home}/bin/{name}") for home in homes)), None)


def compiled(nvcc: str) -> list[Path]:
    """Compile a cubin for each architecture and file of kernels."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    state = hashlib.sha256(repr((version, FLAGS)).encode())
    for folder in ("core", "cuda"):
        for file in sorted((ROOT / "csrc" / folder).iterdir()):
            state.update(file.read_bytes())
    folder = ROOT / "build" / "machine-code" / state.hexdigest()[:16]
    if not folder.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
    # The files that compile longest come first.
    cubins = [folder / f"{name}.{arch}.cubin" for name in reversed(FILES) for arch in ARCHITECTURES]

    def compile_for(cubin: Path) -> None:
        if cubin.exists():
            return
        unfinished = cubin.with_suffix(f".{os.getpid()}")
        name, architecture = cubin.stem.split(".")
        source = ROOT / "csrc" / "cuda" / f"{name}.cu"
        tables = [] if architecture == WITH_LARGE_TABLES else ["-DFUSED_SAM_SMALL_TABLES"]
        places = [f"-I{ROOT / 'csrc'}", f"-arch={architecture}", str(source), "-o", str(unfinished)]
        command = [nvcc, *FLAGS, *tables, *places]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        unfinished.replace(cubin)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_for, cubins))
    return cubins


def kernel_of(mangled: str, architecture: str) -> Kernel:
    """Read the mangled name of a kernel."""
    if "finish_norm_kernel" in mangled:
        return Kernel(architecture, "finish_norm", (), False, 0)
    table = r"NS_11LaunchTableILi\d+ENS_(?:8AnyGroup|11AdamGroupOfIfE)ELi(\d+)E"
    found = re.search(r"\d+([a-z]+)_kernelI(.*)" + table, mangled)
    assert found is not None, mangled
    types, rest, random, narrow = [], found[2], False, 0
    primitive = found[1]
    if primitive == "element":  # the rule is its first type
        rule = re.match(r"NS_\d+([A-Z]\w*?)E", rest)
        assert rule is not None, mangled
        primitive, rest = rule[1].lower(), rest[rule.end() :]
    while rest:  # f, NS_4bf16E, NS_3f16E, or S<number>_ for an earlier narrow type; Lb1E is stochastic rounding
        word = re.match(r"NS_(\w+?)E|(f)|Lb([01])E|S\d*_", rest)
        assert word is not None, mangled
        if word[3]:
            random = word[3] == "1"
        else:
            narrow = SIZES[word[1]] if word[1] else narrow
            types.append(SIZES["f"] if word[2] else narrow)
        rest = rest[word.end() :]
    return Kernel(architecture, primitive, tuple(types), random, int(found[3]))


def disassembled(cubin: Path, cuobjdump: str) -> list[Kernel]:
    def output(option: str) -> str:
        return subprocess.run([cuobjdump, option, str(cubin)], capture_output=True, text=True, check=True).stdout

    kernels: dict[str, Kernel] = {}
    for name, numbers in re.findall(r"Function (\S+):\n\s*(REG:.*)", output("-res-usage")):
        kernels[name] = kernel_of(name, cubin.stem.split(".")[1])
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
    known = subprocess.run([nvdisasm, "--help"], capture_output=True, text=True, check=True).stdout
    if f"'{ARCHITECTURES[-1].replace('_', '').upper()}'" not in known:
        pytest.skip(f"{nvdisasm} does not know {ARCHITECTURES[-1]}")
    found = [kernel for cubin in compiled(nvcc) for kernel in disassembled(cubin, cuobjdump)]
    assert all(kernel.instructions and kernel.usage for kernel in found)
    return found


def matching(instructions: list[str], pattern: str) -> list[str]:
    return [i for i in instructions if re.match(pattern, i)]


def vectors(instruction: str) -> int:
    """Return how many 16-byte vectors a load or store moves."""
    return 2 if ".256" in instruction else 1 if ".128" in instruction else 0


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
        for tensors, adam_tensors in ((64, 44), (600, 400)) if architecture == WITH_LARGE_TABLES else ((64, 44),):
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
        # Bytes per element, without amsgrad's max_exp_avg_sq.
        read = {
            "norm": lambda k: k.types[1],
            "squares": lambda k: k.types[1],
            "perturb": lambda k: k.types[2] + k.types[1],
            "sgd": lambda k: k.types[2] + k.types[1] + 4,
            **{name: lambda k: k.types[2] + k.types[1] + 4 for name in ELEMENT_RULES},
            "adam": lambda k: k.types[2] + k.types[1] + 8,
            "restore": lambda k: k.types[1],
            "dot": lambda k: sum(k.types),
            "axpby": lambda k: k.types[0] + k.types[1],
            "finish_norm": lambda k: 0,
        }[kernel.primitive](kernel)
        expected = read * kernel.elements // 16
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
