"""A Triton driver that needs no GPU: kernels compile for sm_90, and launches are recorded instead of run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from fused_sam.backends.contract import RULES
from fused_sam.backends.triton import blocks, kernels, norm, perturb, rng, update, vectors

RULE_MODULES = [import_module(f"fused_sam.backends.triton.{rule.name}") for rule in RULES]
MODULES = (blocks, kernels, norm, perturb, rng, update, vectors, *RULE_MODULES)


@dataclass
class Launch:
    kernel: str
    programs: int
    arguments: tuple[Any, ...]  # of the kernel; a tensor where the driver would take its address


@dataclass
class RecordingDriver:
    launches: list[Launch] = field(default_factory=list)
    registers: int = 32  # per thread, of every kernel

    def __post_init__(self) -> None:
        properties = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 1, self.registers, 0, 1024),
            get_device_properties=lambda _: properties,
            unload_module=lambda _: None,
        )

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _: int) -> None:
        pass

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, _: Any) -> Any:
        count, name = len(source.fn.arg_names), source.fn.__name__

        def launch(programs: int, *rest: Any) -> None:
            self.launches.append(Launch(name, programs, rest[-count:]))

        return launch


@contextmanager
def recording_driver() -> Iterator[RecordingDriver]:
    driver = RecordingDriver()
    with running_on(driver):
        yield driver


@contextmanager
def running_on(driver: RecordingDriver) -> Iterator[None]:
    """Let Triton use a driver."""
    config = triton.runtime.driver
    before = getattr(config, "_active", None)
    _forget_compiled()
    config.set_active(driver)
    try:
        yield
    finally:
        _forget_compiled()
        config._active = before


def _forget_compiled() -> None:
    """Drop compiled kernels: each keeps using the driver of its first launch."""
    for module in MODULES:
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()
    gc.collect()  # a kernel that is freed asks the driver of that moment to unload it
