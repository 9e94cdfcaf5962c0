"""Builds the native modules with CMake while setuptools builds the package. One line says what is missing.

FUSED_SAM_CUDA (0, 1 or auto) chooses whether fused_sam._cuda is built, and FUSED_SAM_CUDA_ARCHS for which GPUs.
FUSED_SAM_NATIVE=0 compiles nothing: the package is Python alone, with the backends triton, foreach and reference.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_CUDA = 12


def stop(message: str) -> NoReturn:
    """End with the message alone: a missing compiler is no bug, and a traceback would hide the message."""
    raise SystemExit(f"fused_sam: {message}")


# An older version reports `license` in pyproject.toml as an error of sixty lines.
if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools {setuptools.__version__} is too old to build with: pip install --upgrade 'setuptools>=77.0.3'")


def find_nvcc() -> str | None:
    """Return the path of nvcc from CUDACXX, from PATH, from CUDA_HOME, or from where NVIDIA's installer puts it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(os.environ.get("CUDACXX") or "nvcc") or shutil.which(f"{home}/bin/nvcc")


def why_not_nvcc(nvcc: str | None) -> str | None:
    """Return why the CUDA module cannot be built with this nvcc; None if it can."""
    if nvcc is None:
        return "nvcc is missing: apt install nvidia-cuda-toolkit, or set CUDA_HOME"
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        return f"{nvcc} does not run ({error.strerror}): set CUDA_HOME to a CUDA toolkit of this machine"
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return f"{nvcc} --version names no release: set CUDA_HOME to a CUDA toolkit of this machine"
    if int(release[1]) < OLDEST_CUDA:
        return f"{nvcc} is of CUDA {release[1]}.{release[2]}, and {OLDEST_CUDA}.0 or newer is needed: set CUDA_HOME"
    return None


def gpu_visible() -> bool:
    """Return True if nvidia-smi lists a GPU."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and b"GPU" in subprocess.run([smi, "-L"], capture_output=True, check=False).stdout


def wants_native() -> bool:
    """Return True unless FUSED_SAM_NATIVE is 0."""
    choice = os.environ.get("FUSED_SAM_NATIVE") or "1"
    if choice not in ("0", "1"):
        stop(f"FUSED_SAM_NATIVE is {choice!r}; it takes 0 (compile nothing, Python alone) or 1")
    if choice == "0" and os.environ.get("FUSED_SAM_CUDA") == "1":
        stop("FUSED_SAM_NATIVE=0 compiles nothing, but FUSED_SAM_CUDA=1 needs the CUDA module: leave one of them out")
    return choice == "1"


def wants_cuda() -> bool:
    """Return True if the CUDA module is to be built, as FUSED_SAM_CUDA says."""
    choice = os.environ.get("FUSED_SAM_CUDA") or "auto"
    if choice not in ("0", "1", "auto"):
        stop(f"FUSED_SAM_CUDA is {choice!r}; it takes 0 (no CUDA module), 1 (build it) or auto (1 if there is a GPU)")
    if choice == "0":
        return False
    missing = None
    if not any(ROOT.glob("csrc/cuda/*.cu")):
        missing = "this source tree has no csrc/cuda/*.cu"
    else:
        missing = why_not_nvcc(find_nvcc())
    if choice == "1" and missing:
        stop(f"FUSED_SAM_CUDA=1, but {missing}")
    return choice == "1" or (missing is None and gpu_visible())


def cuda_archs() -> str:
    """Return FUSED_SAM_CUDA_ARCHS as a CMake list; empty means all architectures of the kernels."""
    value = os.environ.get("FUSED_SAM_CUDA_ARCHS", "")
    archs = [arch for arch in re.split(r"[;,\s]+", value) if arch]
    if archs != ["native"] and not all(re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", a) for a in archs):
        stop(f"FUSED_SAM_CUDA_ARCHS is {value!r}; it takes numbers such as 90 or 80;90, or native")
    return ";".join(archs)


def check_compiler() -> None:
    """End with a message if there is no C++ compiler or no Python.h."""
    wanted = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in wanted):
        stop(
            f"no C++ compiler found (looked for {', '.join(wanted)}): apt install g++, "
            "or set FUSED_SAM_NATIVE=0 to build without it (slower on a CPU; a GPU's triton backend does not need it)"
        )
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        stop(f"no Python.h in {include}: apt install python3-dev")


def build_tool(name: str) -> str:
    """Return the path of cmake or ninja: from its Python package, else from the system."""
    folder = None
    try:
        module = importlib.import_module(name)
        folder = getattr(module, f"{name.upper()}_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
    except ImportError:
        pass
    found = (shutil.which(name, path=folder) if folder else None) or shutil.which(name)
    return found or stop(f"{name} is missing: pip install {name}, or build without --no-build-isolation")


def run(command: list[str], log: Path) -> None:
    """Run one command with output to the log; if it fails, end with its first error alone."""
    with log.open("ab") as out:
        start = out.tell()
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    if code != 0:
        sign = re.compile(r"error:|CMake Error|undefined reference|cannot find|fatal", re.IGNORECASE)
        first = next((n for n, line in enumerate(lines) if sign.search(line)), max(0, len(lines) - 12))
        rest = lines[first : first + 12]
        end = next((n for n, line in enumerate(rest) if n and re.match(r"\[\d+/|FAILED:", line)), len(rest))
        excerpt = "\n  ".join(line for line in rest[:end] if line.strip())
        stop(f"the native build failed, and its first error is this:\n  {excerpt}\nThe whole log: {log}")
    for line in lines:
        if "warning" in line.lower():
            print(line, file=sys.stderr)


class CMakeBuild(build_ext):
    """One CMake build for both modules; setuptools then copies them to their place."""

    def run(self) -> None:
        self.with_cuda = wants_cuda()
        check_compiler()
        if not self.with_cuda:
            self.extensions = [ext for ext in self.extensions if ext.name != "fused_sam._cuda"]
            if self.inplace:
                remove_cuda_modules(ROOT / "fused_sam")
        super().run()

    def copy_file(self, infile: Any, outfile: Any, *args: Any, **options: Any) -> Any:
        """Copy to another name, then rename. A process that has loaded the old module keeps it, and goes on."""
        scratch = f"{outfile}.{os.getpid()}"
        done = super().copy_file(infile, scratch, *args, **options)
        if os.path.exists(scratch):
            os.replace(scratch, outfile)
        return outfile, done[1]

    def build_extensions(self) -> None:
        try:
            import pybind11
        except ImportError:
            stop("pybind11 is missing: pip install pybind11, or build without --no-build-isolation")
        target = Path(self.get_ext_fullpath("fused_sam._cpu")).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        if not self.with_cuda:
            remove_cuda_modules(target)
        cmake = build_tool("cmake")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        linked = build / "linked"  # a linker may write over a module, which ends the processes that use it
        build.mkdir(parents=True, exist_ok=True)
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": linked,
            "CMAKE_MAKE_PROGRAM": build_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FUSED_SAM_CUDA": "ON" if self.with_cuda else "OFF",
        }
        if self.with_cuda:
            settings |= {"CMAKE_CUDA_COMPILER": find_nvcc(), "FUSED_SAM_CUDA_ARCHS": cuda_archs()}
        # CMake's cache is discarded if the folder, the compiler or (in pip's isolated builds) pybind11 has changed.
        made_by = repr([ROOT, settings["pybind11_DIR"], find_nvcc(), *map(os.environ.get, ("CXX", "CXXFLAGS"))])
        used = build / "made-by.txt"
        fresh = [] if used.exists() and used.read_text() == made_by else ["--fresh"]
        used.unlink(missing_ok=True)
        log = build / "build.log"
        log.write_bytes(b"")
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        run([cmake, *fresh, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines], log)
        used.write_text(made_by)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        run([cmake, "--build", str(build), "--parallel", jobs], log)
        for ext in self.extensions:
            name = Path(self.get_ext_filename(ext.name)).name
            self.copy_file(str(linked / name), str(target / name))


def remove_cuda_modules(folder: Path) -> None:
    """Remove modules of an earlier build, which do not match the sources."""
    for stale in folder.glob("_cuda.*.so"):
        stale.unlink()


setup(
    ext_modules=[Extension(f"fused_sam.{name}", sources=[]) for name in ("_cpu", "_cuda") if wants_native()],
    cmdclass={"build_ext": CMakeBuild},
)
