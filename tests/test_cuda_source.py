"""Tests of the CUDA backend without a GPU: its Python code, and kernels on the host (support/cuda_source.py)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from support import cuda_source
from support.tables import CPU, PERTURB_GROUPS, Kind, assert_near, columns, draw_table, status_with
from torch import Tensor, nn

import fused_sam
from fused_sam import SAM, backends
from fused_sam.backends import cuda
from fused_sam.backends.contract import (
    ADAM,
    ASCENT_NORM,
    LION,
    SGD,
    SUM,
    UPDATE_NORM,
    XX,
    XY,
    YY,
    AdamGroup,
    LionGroup,
    PerturbGroup,
    SGDGroup,
    Status,
    Table,
    VectorPair,
)
from fused_sam.backends.cuda import Cuda
from fused_sam.backends.reference import Reference

REASON = cuda_source.register()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the kernels' source was not built: {REASON}")

FP32 = Kind(torch.float32, torch.float32)
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "Lion": (fused_sam.Lion, {"lr": 0.1}),
}
bases = pytest.mark.parametrize("base", BASES)


@pytest.fixture
def shim() -> Iterator[ModuleType]:
    module = cuda_source.module()
    module.pretend()
    yield module
    module.pretend()


def step_launches(shim: ModuleType, base: str, count: int, groups: int, **options: Any) -> int:
    """Return the launches of a step over `count` tensors. Set `options` as attributes before the update."""
    params = [nn.Parameter(torch.randn(20)) for _ in range(count)]
    size = -(-count // groups)
    split = [{"params": params[i : i + size], "rho": 0.01 * (1 + i)} for i in range(0, count, size)]
    cls, own = BASES[base]
    optimizer = SAM(split, cls, backend=cuda_source.NAME, **own)
    before = 0
    for _ in range(2):
        before = shim.launches()
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.first_step()
        for name, value in options.items():
            setattr(optimizer, name, value)
        optimizer.step()
    return int(shim.launches() - before)


@bases
@pytest.mark.parametrize("groups", [1, 2, 50])
def test_161_tensors_take_one_launch_per_primitive(shim: ModuleType, base: str, groups: int) -> None:
    # norm, perturb, norm (the check that the second gradient is finite), update
    assert step_launches(shim, base, 161, groups) == 4


@bases
def test_three_launches_where_gradscaler_has_checked_the_gradients(shim: ModuleType, base: str) -> None:
    assert step_launches(shim, base, 161, 2, found_inf=torch.zeros(1), grad_scale=torch.ones(1)) == 3


def test_norm_takes_one_launch_per_table_and_none_to_reset_or_finish(shim: ModuleType) -> None:
    backend, groups = cuda_source.CudaSource(), [SGDGroup(0.1)]
    tables = [draw_table(FP32, groups, [(20 + i,) for i in range(n)], perturbed=True) for n in (161, 3, 9)]
    wanted = Reference()
    for perturb_groups, place in ((PERTURB_GROUPS, ASCENT_NORM), (None, UPDATE_NORM)):
        status, twin = status_with({SUM: 1e6}), status_with({})
        before = shim.launches()
        backend.norm(tables, perturb_groups, status, keep_skip=False, eps=1e-12)
        assert shim.launches() - before == len(tables)
        wanted.norm(tables, perturb_groups, twin, keep_skip=False, eps=1e-12)
        assert float(status.values[place]) == pytest.approx(float(twin.values[place]), rel=1e-5)


def test_a_table_built_in_a_capture_is_not_used_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph zeroes the reductions' counters only when it is replayed. Until then their values are undefined.

    One step before the capture does not build every table, because that step starts the momentum.
    """
    capturing, made, workspace = False, [], cuda._workspace
    monkeypatch.setattr(cuda, "_workspace", lambda *args: made.append(workspace(*args)) or made[-1])
    monkeypatch.setattr(cuda, "_capturing", lambda device: capturing)
    start = [torch.randn(5000), torch.randn(7)]
    ours, twin = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizers = [SAM(params, lr=0.1, momentum=0.9, backend=cuda_source.NAME) for params in (ours, twin)]

    def step(params: list[nn.Parameter], optimizer: SAM) -> None:
        for half in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = p.detach().sin()
            half()

    step(ours, optimizers[0])
    capturing, before = True, len(made)
    step(ours, optimizers[0])
    capturing = False
    assert len(made) > before, "the update's table was built in the capture"
    for numbers in made[before:]:
        numbers.fill_(77)
    for _ in range(2):
        step(ours, optimizers[0])
    for _ in range(4):
        step(twin, optimizers[1])
    assert all(map(torch.equal, ours, twin))
    assert torch.equal(optimizers[0].update_norm, optimizers[1].update_norm)


@pytest.mark.parametrize("base", ["SGD", "Lion"])
def test_an_old_driver_takes_small_tables(shim: ModuleType, base: str) -> None:
    shim.pretend(driver=12000)
    assert step_launches(shim, base, 161, 1) == 4 * 3  # 64 tensors per launch


UPDATES: dict[str, Sequence[Any]] = {
    "sgd": [SGDGroup(0.1, 0.9), SGDGroup(0.2, 0.9, dampening=0.3, weight_decay=0.1)],
    "adam": [AdamGroup(0.1), AdamGroup(0.2, decoupled_weight_decay=True)],
    "lion": [LionGroup(0.1), LionGroup(0.2, 0.7, 0.3, weight_decay=0.1)],
}


@pytest.mark.parametrize(
    ("update", "driver", "launches"),
    [
        ("sgd", 13000, 1),  # a large table holds 600 tensors, a small one 64
        ("sgd", 12000, 3),
        ("lion", 13000, 1),
        ("lion", 12000, 3),
        ("adam", 13000, 1),  # a large table holds 400 tensors, a small one 44
        ("adam", 12000, 4),
    ],
)
def test_updates_of_161_tensors(shim: ModuleType, update: str, driver: int, launches: int) -> None:
    shim.pretend(driver=driver)
    groups = UPDATES[update]
    ours, twin = (draw_table(FP32, groups, [(20 + i,) for i in range(161)], perturbed=True) for _ in range(2))
    backend, status = cuda_source.CudaSource(), Status(CPU)
    for step in range(2):
        before = shim.launches()
        backend.update(ours, groups, status, None, math.inf)
        assert shim.launches() - before == launches
        Reference().update(twin, groups, status, None, math.inf)
        assert [float(t) for t in ours.state.get("step", ()) if t is not None] == (
            [3.0 * i + step + 1 for i in range(161)] if update == "adam" else []
        )
    wanted = columns(twin)
    for name, column in columns(ours).items():
        for i, (a, b) in enumerate(zip(column, wanted[name], strict=True)):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert_near(a, b, f"{name}[{i}]")


@pytest.mark.parametrize(("rule", "name"), [(SGD, "momentum_buffer"), (ADAM, "step"), (LION, "exp_avg")])
def test_state_on_another_device_is_an_error(rule: Any, name: str) -> None:
    w = torch.ones(4)
    state: dict[str, list[Tensor | None]] = {column.name: [w.clone()] for column in rule.columns}
    state[name] = [torch.zeros(4, device="meta")]
    table = Table([w], [0], torch.float32, backups=[w], rule=rule, state=state, grads=[w.clone()])
    with pytest.raises(ValueError, match="in one table: use one optimizer per device"):
        cuda_source.CudaSource().restore(table)


def test_vectors_equal_the_reference(shim: ModuleType) -> None:
    for dx, dy in [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        x, y = ([torch.randn(n).to(d) for n in (5, 4097)] for d in (dx, dy))
        results = []
        for backend in (cuda_source.CudaSource(), Reference()):
            pair = VectorPair([t.clone() for t in x], y)
            sums = torch.zeros(3, dtype=torch.float64)
            backend.dot(pair, sums, reset=True)
            backend.ema(pair, 0.75)
            outs = []
            for coefficients in (torch.tensor([2.0, -0.5], dtype=torch.float64), (2.0, -0.5)):
                out = [torch.empty_like(t) for t in y]
                version = out[0]._version
                backend.axpby(pair, out, coefficients)
                assert out[0]._version > version
                outs += out
            assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
            results.append((sums, pair.x, outs))
        (sums, averaged, out), (wanted_sums, wanted_averaged, wanted_out) = results
        scale = float((wanted_sums[XX] * wanted_sums[YY]).sqrt())
        assert abs(float(sums[XY] - wanted_sums[XY])) <= 1e-5 * scale
        rtol = 1e-2 if dx is torch.bfloat16 else 1e-6
        for found, wanted in zip(averaged + out, wanted_averaged + wanted_out, strict=True):
            torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-6)


def test_weights_on_another_device_are_an_error_before_any_write(shim: ModuleType) -> None:
    other = "on cuda:1, the table on cuda:0: use one optimizer per device"
    for device, words in [(1, other), (-1, "not in GPU memory")]:
        shim.pretend()
        p = nn.Parameter(torch.randn(20))
        before = p.detach().clone()
        optimizer = SAM([p], lr=0.1, backend=cuda_source.NAME)
        p.grad = torch.ones_like(p)
        shim.pretend_memory(p.data_ptr(), device)
        with pytest.raises(ValueError, match=words):
            optimizer.first_step()
        assert torch.equal(p, before)


def test_a_failed_launch_names_the_kernel_and_changes_no_weight(shim: ModuleType) -> None:
    p = nn.Parameter(torch.randn(20))
    optimizer = SAM([p], lr=0.1, backend=cuda_source.NAME)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    shim.pretend(launch_fails=True)
    with pytest.raises(RuntimeError, match=r"CUDA kernel norm \(fp32 params, fp32 grads, 1 blocks\) was not launched"):
        optimizer.first_step()
    assert torch.equal(p, before)
    optimizer.first_step()
    optimizer.second_step()
    assert not optimizer.skipped


@pytest.mark.parametrize(
    ("update", "group"),
    [
        ("sgd", SGDGroup(torch.tensor(0.1, dtype=torch.float16))),
        ("adam", AdamGroup(torch.tensor(0.1, dtype=torch.float16))),
        ("lion", LionGroup(torch.tensor(0.1, dtype=torch.float16))),
    ],
)
def test_scalars_of_another_device_or_dtype_are_errors(update: str, group: Any) -> None:
    backend = cuda_source.CudaSource()
    w = torch.ones(4)
    table = draw_table(FP32, [group], [(4,)], perturbed=True)
    table.params[0].copy_(w)
    with pytest.raises(ValueError, match=r"lr of group 0 is a torch.float16 tensor"):
        backend.update(table, [group], Status(CPU), None, math.inf)
    with pytest.raises(ValueError, match=r"the status must be torch.float32 on cpu, not torch.float64"):
        Cuda.perturb(backend, table, [PerturbGroup(0.1)], Status(CPU))
    scale = torch.ones((), device="meta")
    with pytest.raises(ValueError, match=r"the gradient scale must be torch.float32 on cpu, not torch.float32 on meta"):
        backend.update(table, [group._replace(lr=0.1)], Status(CPU), scale, math.inf)
    with pytest.raises(ValueError, match=r"the coefficients must be torch.float32 on cpu, not torch.float64"):
        Cuda.axpby(backend, VectorPair([w], [w]), [w], torch.ones(2, dtype=torch.float64))
    mixed = Table([w, torch.ones(4, device="meta")], [0, 0], torch.float32)
    with pytest.raises(ValueError, match="in one table: use one optimizer per device"):
        backend.restore(mixed)
    assert torch.equal(w, torch.ones(4)) and torch.equal(table.params[0], w)


@pytest.mark.parametrize(("update", "group"), [("sgd", SGDGroup), ("lion", LionGroup)])
def test_learning_rate_in_a_tensor_is_read_by_the_kernel(update: str, group: Any) -> None:
    backend = cuda_source.CudaSource()
    for dtype in (torch.float32, torch.float64):
        w, g = torch.ones(100), torch.ones(100)
        rule = SGD if update == "sgd" else LION
        state: dict[str, list[Tensor | None]] = {column.name: [torch.zeros(100)] for column in rule.columns}
        table = Table([w], [0], torch.float32, backups=[w.clone()], rule=rule, state=state, grads=[g])
        table.grad_addresses = array("q", [g.data_ptr()])
        rate = torch.tensor(0.25, dtype=dtype)
        for value in (0.25, 0.5):
            rate.fill_(value)
            backend.update(table, [group(rate)], Status(CPU), None, math.inf)
            assert torch.equal(w, torch.full((100,), 1 - value))


def test_the_reason_for_an_unavailable_backend(shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutModule(Cuda):
        module = None

    class WithModule(Cuda):
        module = shim

    monkeypatch.setattr(cuda, "_reason", "not built; build it with `FUSED_SAM_CUDA=1 pip install .`")
    assert "FUSED_SAM_CUDA=1 pip install ." in (WithoutModule.unavailable_reason() or "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in (WithModule.unavailable_reason() or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert WithModule.unavailable_reason() is None
    for state, words in [
        ({"driver": 0}, "no NVIDIA driver is installed"),
        ({"driver": 12020, "device_count_error": "insufficient driver"}, "driver runs CUDA 12.2 at most"),
        ({"device_count_error": "no device"}, "no NVIDIA GPU is visible"),
    ]:
        shim.pretend(**state)
        assert words in (WithModule.unavailable_reason() or "")
    shim.pretend(kernel_image=False)
    assert "compute capability is 9.0" in shim.device_unavailable_reason(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_reason_on_a_machine_without_a_gpu() -> None:
    reason = backends.available()["cuda"]
    assert isinstance(reason, str)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here"):
        SAM([nn.Parameter(torch.ones(1))], lr=0.1, backend="cuda")
