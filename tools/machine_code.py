"""Reads the CUDA kernels' machine code, and writes the figures of docs/gpu.md that follow from it.

    python tools/machine_code.py        rewrites the tables between the marks in docs/gpu.md

It needs nvcc and NVIDIA's disassembler (cuobjdump and nvdisasm, of the toolkit or of the triton package), but no GPU.
The cubins take some minutes of one core and are kept under build/ until the sources change.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a call by the file's name

from fused_sam.backends.contract import ADAM, RULES, SGD  # after its place is known

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin")
# Kernels for small and for large tables share a template. Only one architecture compiles both, to halve the time.
WITH_LARGE_TABLES = "sm_90"
SIZES = {"f": 4, "4bf16": 2, "3f16": 2}  # mangled names of storage types, and their bytes

FILES = ("norm", "vectors", "perturb", "element", "sgd", "adam")  # of csrc/cuda; table.cu and device.cu have no kernels

ELEMENT_RULES = {rule.name for rule in RULES if rule not in (SGD, ADAM)}  # of core/rules.h: one buffer each


@dataclass
class Kernel:
    """A compiled kernel with its primitive, the bytes per element of each type, and its instructions.

    The types are those of param, gradient, and master or backup, if the primitive uses them.
    """

    architecture: str
    primitive: str
    names: tuple[str, ...]  # of the types: keys of SIZES
    random: bool
    tensors: int
    usage: dict[str, int] = field(default_factory=dict)
    instructions: list[str] = field(default_factory=list)  # without their predicates
    code: list[tuple[int, str]] = field(default_factory=list)  # their addresses, and they as written

    @property
    def types(self) -> tuple[int, ...]:
        return tuple(SIZES[name] for name in self.names)

    def __str__(self) -> str:
        what = "random " if self.random else ""
        return f"{self.architecture} {what}{self.primitive} of {', '.join(self.names)}, {self.tensors} tensors"

    @property
    def masters(self) -> bool:
        return self.types[-1] > self.types[0]

    @property
    def elements(self) -> int:
        """Return the elements of each array that a thread has in flight (kElements in csrc/cuda)."""
        fewer = self.random or self.primitive == "adam" or (self.primitive in {"sgd", *ELEMENT_RULES} and self.masters)
        fewer = fewer or (self.primitive in ELEMENT_RULES and self.types[1] == 4)
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
    names, rest, random, narrow = [], found[2], False, ""
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
            narrow = word[1] or narrow
            names.append("f" if word[2] else narrow)
        rest = rest[word.end() :]
    return Kernel(architecture, primitive, tuple(names), random, int(found[3]))


def disassembled(cubin: Path, cuobjdump: str) -> list[Kernel]:
    def output(option: str) -> str:
        return subprocess.run([cuobjdump, option, str(cubin)], capture_output=True, text=True, check=True).stdout

    kernels: dict[str, Kernel] = {}
    for name, numbers in re.findall(r"Function (\S+):\n\s*(REG:.*)", output("-res-usage")):
        kernels[name] = kernel_of(name, cubin.stem.split(".")[1])
        kernels[name].usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
    current = Kernel("", "", (), False, 0)
    for line in output("-sass").splitlines():
        if title := re.search(r"Function : (\S+)", line):
            current = kernels[title[1]]
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            current.code.append((int(found[1], 16), found[2]))
            current.instructions.append(re.sub(r"^@!?U?P\d+\s+", "", found[2]))
    return list(kernels.values())


def nvcc_release() -> str:
    """Return nvcc's release, such as 13.0."""
    said = subprocess.run([str(tool("nvcc")), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+),", said)
    return found[1] if found else said


def missing_tools() -> str | None:
    """Return what this machine lacks to read machine code; None if nothing."""
    nvcc, cuobjdump, nvdisasm = tool("nvcc"), tool("cuobjdump"), tool("nvdisasm")
    if nvcc is None:
        return "nvcc is missing (NVIDIA's CUDA toolkit)"
    if cuobjdump is None or nvdisasm is None:
        return "cuobjdump and nvdisasm are missing (NVIDIA's CUDA toolkit, or pip install triton)"
    os.environ["PATH"] = f"{os.environ['PATH']}:{Path(nvdisasm).parent}"
    for program, option in ((nvcc, "--list-gpu-arch"), (nvdisasm, "--help")):
        known = subprocess.run([program, option], capture_output=True, text=True, check=False).stdout.lower()
        newest = ARCHITECTURES[-1].removeprefix("sm_")
        if not re.search(rf"(sm_?|compute_){newest}\b", known):
            return f"{program} is too old: it does not know sm_{newest}, which needs CUDA 12.8 or newer"
    return None


def all_kernels() -> list[Kernel]:
    """Compile and disassemble every kernel; only where `missing_tools` returns None."""
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    assert nvcc is not None and cuobjdump is not None
    with ThreadPoolExecutor(2) as pool:
        return [k for found in pool.map(lambda c: disassembled(c, cuobjdump), compiled(nvcc)) for k in found]


# ---- loops ----------------------------------------------------------------------------------------------------


def vectors(instruction: str) -> int:
    """Return how many 16-byte vectors a load or store moves."""
    return 2 if ".256" in instruction else 1 if ".128" in instruction else 0


@dataclass
class Loop:
    """The longest path through an innermost loop of those that make the most 16-byte accesses."""

    instructions: int
    loads: int  # of 16 bytes
    stores: int


def loops(kernel: Kernel) -> list[Loop]:
    """Return the innermost loops with 16-byte accesses. Tails of packs and misaligned arrays take other paths."""
    places = {address: n for n, (address, _) in enumerate(kernel.code)}
    jumps = {}
    for n, (_, text) in enumerate(kernel.code):
        if found := re.search(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?(0x[0-9a-f]+)", text):
            jumps[n] = places[int(found[1], 16)]
    back = sorted((n, to) for n, to in jumps.items() if to < n)
    inner = [(to, n) for n, to in back if not any(to <= other_to and other < n for other, other_to in back)]
    return [loop for first, last in inner if (loop := _path(kernel, jumps, first, last)).loads]


def _path(kernel: Kernel, jumps: dict[int, int], first: int, last: int) -> Loop:
    best: dict[int, tuple[int, int, int, int]] = {}  # by place: accesses, instructions, loads, stores until `last`
    for n in range(last, first - 1, -1):
        text, plain = kernel.code[n][1], kernel.instructions[n]
        wide = vectors(plain)
        load, store = wide * plain.startswith("LDG"), wide * plain.startswith("STG")
        ways = []
        if n == last:
            ways.append((0, 0, 0, 0))
        else:
            ends = re.match(r"(BRA|EXIT|RET)\b", plain) and not text.startswith("@")
            if not ends and n + 1 in best:
                ways.append(best[n + 1])
            if n in jumps and n < jumps[n] <= last and jumps[n] in best:
                ways.append(best[jumps[n]])
        if ways:
            after = max(ways)
            best[n] = (after[0] + load + store, after[1] + 1, after[2] + load, after[3] + store)
    _, count, loaded, stored = best.get(first, (0, 0, 0, 0))
    return Loop(count, loaded, stored)


def bytes_read(kernel: Kernel) -> int:
    """Return the bytes per element that a kernel reads, without amsgrad's max_exp_avg_sq."""
    types = kernel.types
    return {
        "norm": lambda: types[1],
        "squares": lambda: types[1],
        "perturb": lambda: types[2] + types[1],
        "sgd": lambda: types[2] + types[1] + 4,
        **{name: lambda: types[2] + types[1] + 4 for name in ELEMENT_RULES},
        "adam": lambda: types[2] + types[1] + 8,
        "restore": lambda: types[1],
        "dot": lambda: sum(types),
        "axpby": lambda: types[0] + types[1],
        "finish_norm": lambda: 0,
    }[kernel.primitive]()


def instructions_per_element(kernel: Kernel) -> tuple[float, float]:
    """Return the least and the most instructions per element of the loops that read what the primitive reads.

    They are those of groups with different options, such as SAM's and ASAM's perturbation. Copies, which a skipped step
    makes, are left out by their length.
    """
    wanted = bytes_read(kernel) * kernel.elements // 16
    found = [loop.instructions for loop in loops(kernel) if loop.loads == wanted]
    assert found, f"{kernel}: no loop has {wanted} loads, only {loops(kernel)}"
    kept = [count for count in found if 3 * count >= max(found)]
    return min(kept) / kernel.elements, max(kept) / kernel.elements


# ---- figures of docs/gpu.md -------------------------------------------------------------------------------------

THREADS = 256
MARKS = ("<!-- figures of tools/machine_code.py -->", "<!-- end of figures -->")
# An H100 SXM: processors, each of four parts that issue an instruction per cycle; the copy rate that is expected.
PROCESSORS, CLOCK, COPY_RATE = 132, 1.755e9, 2.9e12
TITLES = {"f": "fp32", "4bf16": "bf16", "3f16": "fp16"}


def blocks_per_processor(registers: int) -> int:
    """Return how many blocks a processor holds, by NVIDIA's rule: whole warps, in units of 8 registers."""
    warps_of_part = (1 << 14) // (32 * (-(-registers // 8) * 8))
    return min(8, 4 * warps_of_part * 32 // THREADS)


def moved(kernel: Kernel) -> int:
    """Return the bytes per element that a kernel reads and writes."""
    types, masters = kernel.types, kernel.masters
    if kernel.primitive == "norm":
        return types[1]
    if kernel.primitive == "perturb":
        return types[2] + types[1] + types[0] + (0 if masters else types[0])
    state = {"sgd": 4, "adam": 8, **dict.fromkeys(ELEMENT_RULES, 4)}[kernel.primitive]
    return types[2] + types[1] + types[0] + 2 * state + (4 if masters else 0)


def figures(kernels: list[Kernel]) -> str:
    """Return the table of docs/gpu.md, of the kernels for sm_90 and small tables."""
    lines = [
        "| kernel | registers | blocks per SM | KB in flight per SM | bytes per element | instructions per element |"
        " issue time over memory time |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for kernel in kernels:
        if kernel.architecture != "sm_90" or kernel.tensors not in (64, 44) or kernel.primitive not in SHOWN:
            continue
        first, grad = kernel.names[0], kernel.names[1]
        if first != grad:  # bf16 or fp16 params with fp32 gradients lie between
            continue
        blocks, (least, count) = blocks_per_processor(kernel.usage["REG"]), instructions_per_element(kernel)
        flight = blocks * THREADS * kernel.elements * bytes_read(kernel) // 1024
        share = count / (PROCESSORS * 4 * 32 * CLOCK) / (moved(kernel) / COPY_RATE)
        title = f"{kernel.primitive}, {TITLES[first]}" + (", fp32 masters" if kernel.masters else "")
        title += ", random" if kernel.random else ""
        order = (SHOWN.index(kernel.primitive), list(TITLES).index(first), kernel.masters, kernel.random)
        counts = f"{least:.1f} to {count:.1f}"
        numbers = (title, kernel.usage["REG"], blocks, flight, moved(kernel), counts, f"{share:.0%}")
        rows.append((order, f"| {' | '.join(map(str, numbers))} |"))
    return "\n".join([*lines, *(row for _, row in sorted(rows))])


SHOWN = ("norm", "perturb", "sgd", "lion", "adam")


def page_with(figures: str) -> tuple[Path, str, str]:
    """Return the page, its text, and its text with these figures."""
    page = ROOT / "docs" / "gpu.md"
    text = page.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return page, text, f"{before}{MARKS[0]}\n{figures}\n{MARKS[1]}{after}"


def main() -> int:
    if reason := missing_tools():
        print(reason, file=sys.stderr)
        return 1
    table = figures(all_kernels())
    page, _, text = page_with(table)
    page.write_text(text)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
