"""SAM keeps one backup copy of the weights, and no step makes a temporary tensor of a weight's size."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support.backends import VARIANTS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_sam import SAM

SIZE = 50_000
CPU = [v for v in VARIANTS if v.name == "cpu"]


class NewMemory(TorchDispatchMode):
    """A mode that records the sizes of tensors that operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.sizes.append(t.numel())
        return result


def problem(dtype: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], list[Tensor], SAM]:
    params = [nn.Parameter(torch.ones(SIZE, dtype=dtype)), nn.Parameter(torch.ones(7, SIZE // 10, dtype=dtype))]
    gradients = [torch.full_like(p, 0.5) for p in params]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    return params, gradients, SAM(params, rho=0.1, lr=0.1, backend="cpu", **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "maximize": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "adaptive": {"adaptive": True, "eta": 0.1},
}


@pytest.mark.skipif(not CPU, reason="the compiled CPU module is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_no_step_makes_a_temporary_of_a_weights_size(options: dict[str, Any], dtype: torch.dtype) -> None:
    _, _, optimizer = problem(dtype, **options)
    for _ in range(2):
        optimizer.first_step()
        optimizer.second_step()
    with NewMemory() as seen:
        for _ in range(2):
            optimizer.first_step()
            optimizer.second_step()
        optimizer.first_step()
        optimizer.restore()
        optimizer.step()
    assert max(seen.sizes, default=0) <= 16, seen.sizes


@pytest.mark.skipif(not CPU, reason="the compiled CPU module is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_one_backup_copy_and_the_momentum_are_kept(dtype: torch.dtype) -> None:
    params, _, optimizer = problem(dtype, momentum=0.9)
    total = sum(p.numel() for p in params)
    gc.collect()  # else optimizers of other tests may be freed, and counted, meanwhile
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(3):
            optimizer.first_step()
            optimizer.second_step()
    allocated = sum(e.self_cpu_memory_usage for e in profile.key_averages())
    kept = total * (params[0].element_size() + 4)  # the backup in the weights' dtype, the momentum in fp32
    assert kept <= allocated <= kept + 4096


@pytest.mark.skipif(not CPU, reason="the compiled CPU module is not there")
def test_without_a_perturbation_there_is_no_backup() -> None:
    params, _, optimizer = problem(torch.float32)
    with NewMemory() as seen:
        for _ in range(3):
            optimizer.step()
    assert max(seen.sizes, default=0) <= 16
    optimizer.param_groups[0]["perturb"] = False
    with NewMemory() as seen:
        optimizer.first_step()
        optimizer.second_step()
    assert max(seen.sizes, default=0) <= 16
    assert all(bool(p.isfinite().all()) for p in params)


def test_the_backup_is_the_same_memory_every_step(backend: str) -> None:
    """If layers are frozen and unfrozen, there is one backup per weight and not one per pattern."""
    params = [nn.Parameter(torch.ones(SIZE)) for _ in range(2)]
    optimizer = SAM(params, rho=0.1, lr=0.1, backend=backend)
    places = set()
    for step in range(6):
        for i, p in enumerate(params):
            p.grad = torch.ones(SIZE) if step % 3 != i else None
        optimizer.first_step()
        assert optimizer.stepper.perturbed is not None
        places |= {b.data_ptr() for call in optimizer.stepper.perturbed for b in call.table.backups}
        optimizer.second_step()
    assert len(places) == 2
