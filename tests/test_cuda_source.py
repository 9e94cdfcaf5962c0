"""The CUDA backend without a GPU: its Python half, and the kernels' source run on the host (support/cuda_source.py)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support import cuda_source
from support.tables import Kind, assert_near, draw_table
from torch import nn

from fused_sam import SAM, backends
from fused_sam.backends.contract import XX, XY, YY, Group, Lists, Table
from fused_sam.backends.cuda import Cuda
from fused_sam.backends.reference import Reference

REASON = cuda_source.register()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the kernels' source was not built: {REASON}")


@pytest.fixture
def shim() -> Iterator[ModuleType]:
    module = cuda_source.module()
    module.pretend()
    yield module
    module.pretend()


def step_launches(shim: ModuleType, count: int, groups: int, **options: Any) -> int:
    params = [nn.Parameter(torch.randn(20)) for _ in range(count)]
    size = -(-count // groups)
    split = [{"params": params[i : i + size], "rho": 0.01 * (1 + i)} for i in range(0, count, size)]
    optimizer = SAM(split, lr=0.1, momentum=0.9, backend=cuda_source.NAME)
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


@pytest.mark.parametrize("groups", [1, 2, 50])
def test_161_tensors_take_one_launch_a_primitive(shim: ModuleType, groups: int) -> None:
    # norm, perturb, norm (is the second gradient finite?), sgd
    assert step_launches(shim, 161, groups) == 4


def test_three_launches_where_gradscaler_has_checked_the_gradients(shim: ModuleType) -> None:
    assert step_launches(shim, 161, 2, found_inf=torch.zeros(1), grad_scale=torch.ones(1)) == 3


def test_what_a_capture_makes_serves_no_step_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph zeroes the reductions' counters when it is replayed: until then they hold anything. One step before the
    capture is not enough to have every table, for that step begins the momentum."""
    from fused_sam.backends import cuda

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
    assert len(made) > before, "the update's table was made in the capture"
    for numbers in made[before:]:
        numbers.fill_(77)
    for _ in range(2):
        step(ours, optimizers[0])
    for _ in range(4):
        step(twin, optimizers[1])
    assert all(map(torch.equal, ours, twin))
    assert torch.equal(optimizers[0].update_norm, optimizers[1].update_norm)


def test_an_old_driver_takes_small_tables(shim: ModuleType) -> None:
    shim.pretend(driver=12000)
    assert step_launches(shim, 161, 1) == 4 * 3  # 64 tensors a launch


@pytest.mark.parametrize(("driver", "launches"), [(13000, 1), (12000, 4)])  # of 400 tensors, or of 44
def test_161_tensors_of_adam(shim: ModuleType, driver: int, launches: int) -> None:
    shim.pretend(driver=driver)
    groups = [Group(0.1, False, 0.0, lr=0.1), Group(0.2, False, 0.0, lr=0.2, decoupled=True)]
    kind = Kind(torch.float32, torch.float32)
    ours, twin = (draw_table(kind, groups, [(20 + i,) for i in range(161)], perturbed=True) for _ in range(2))
    backend, status = cuda_source.CudaSource(), torch.zeros(8, dtype=torch.float64)
    for step in range(2):
        before = shim.launches()
        backend.adam(ours, groups, status, None)
        assert shim.launches() - before == launches
        Reference().adam(twin, groups, status, None)
        assert [float(t) for t in ours.steps] == [3.0 * i + step + 1 for i in range(161)]
    for a, b in zip(ours.weights, twin.weights, strict=True):
        assert_near(a, b, "weights")


def test_adam_of_another_device_is_refused() -> None:
    w = torch.ones(4)
    table = Table([w], [0], torch.float32, backups=[w], momenta=[w.clone()], squares=[w.clone()])
    table.steps, table.gradients = [torch.zeros((), device="meta")], [w.clone()]
    with pytest.raises(ValueError, match="in one table: use one optimizer a device"):
        Cuda.adam(cuda_source.CudaSource(), table, [Group(0.1, False, 0.0)], torch.zeros(8), None)


def test_lists_equal_the_reference(shim: ModuleType) -> None:
    for dx, dy in [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        x, y = ([torch.randn(n).to(d) for n in (5, 4097)] for d in (dx, dy))
        results = []
        for backend in (cuda_source.CudaSource(), Reference()):
            lists = Lists([t.clone() for t in x], y)
            sums = torch.zeros(3, dtype=torch.float64)
            backend.dots(lists, sums, begin=True)
            backend.average(lists, 0.75)
            out = [torch.empty_like(t) for t in y]
            version = out[0]._version
            backend.combine(lists, out, torch.tensor([2.0, -0.5], dtype=torch.float64))
            assert out[0]._version > version
            results.append((sums, lists.x, out))
        (sums, averaged, out), (wanted_sums, wanted_averaged, wanted_out) = results
        scale = float((wanted_sums[XX] * wanted_sums[YY]).sqrt())
        assert abs(float(sums[XY] - wanted_sums[XY])) <= 1e-5 * scale
        rtol = 1e-2 if dx is torch.bfloat16 else 1e-6
        for found, wanted in zip(averaged + out, wanted_averaged + wanted_out, strict=True):
            torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-6)


def test_weights_on_another_device_are_refused_before_a_write(shim: ModuleType) -> None:
    for device, words in [(1, "on cuda:1, the table on cuda:0"), (-1, "not in GPU memory")]:
        shim.pretend()
        p = nn.Parameter(torch.randn(20))
        before = p.detach().clone()
        optimizer = SAM([p], lr=0.1, backend=cuda_source.NAME)
        p.grad = torch.ones_like(p)
        shim.pretend_memory(p.data_ptr(), device)
        with pytest.raises(ValueError, match=words):
            optimizer.first_step()
        assert torch.equal(p, before)


def test_a_launch_that_fails_names_the_kernel_and_leaves_the_weights(shim: ModuleType) -> None:
    p = nn.Parameter(torch.randn(20))
    optimizer = SAM([p], lr=0.1, backend=cuda_source.NAME)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    shim.pretend(launch_fails=True)
    with pytest.raises(
        RuntimeError, match=r"CUDA kernel norm \(fp32 weights, fp32 gradients, 1 blocks\) was not launched"
    ):
        optimizer.first_step()
    assert torch.equal(p, before)
    optimizer.first_step()
    optimizer.second_step()
    assert not optimizer.skipped


def test_numbers_of_another_device_or_dtype_are_refused() -> None:
    backend = cuda_source.CudaSource()
    w = torch.ones(4)
    table = Table([w], [0], torch.float32, backups=[torch.empty(4)], momenta=[None], gradients=[torch.ones(4)])
    group = Group(0.1, False, 0.0, lr=torch.tensor(0.1, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"lr of group 0 is a torch.float16 tensor"):
        Cuda.sgd(backend, table, [group], torch.zeros(8), None)
    with pytest.raises(ValueError, match=r"the status must be torch.float32 on cpu, not torch.float64"):
        Cuda.perturb(backend, table, [group], torch.zeros(8, dtype=torch.float64))
    mixed = Table([w, torch.ones(4, device="meta")], [0, 0], torch.float32)
    with pytest.raises(ValueError, match="in one table: use one optimizer a device"):
        Cuda.restore(backend, mixed)
    assert torch.equal(w, torch.ones(4))


def test_learning_rate_in_a_tensor_is_read_by_the_kernel() -> None:
    backend = cuda_source.CudaSource()
    for dtype in (torch.float32, torch.float64):
        w, g = torch.ones(100), torch.ones(100)
        table = Table([w], [0], torch.float32, backups=[w.clone()], momenta=[None], gradients=[g])
        table.gradient_addresses = array("q", [g.data_ptr()])
        rate = torch.tensor(0.25, dtype=dtype)
        groups = [Group(0.1, False, 0.0, lr=rate)]
        for value in (0.25, 0.5):
            rate.fill_(value)
            backend.sgd(table, groups, torch.zeros(8), None)
            assert torch.equal(w, torch.full((100,), 1 - value))


def test_what_is_missing_is_said_in_words(shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutModule(Cuda):
        module = None

    class WithModule(Cuda):
        module = shim

    monkeypatch.setattr("fused_sam.backends.cuda._reason", "not built; build it with `FUSED_SAM_CUDA=1 pip install .`")
    assert "FUSED_SAM_CUDA=1 pip install ." in (WithoutModule.missing() or "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in (WithModule.missing() or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert WithModule.missing() is None
    for state, words in [
        ({"driver": 0}, "no NVIDIA driver is installed"),
        ({"driver": 12020, "device_count_error": "insufficient driver"}, "driver knows CUDA 12.2"),
        ({"device_count_error": "no device"}, "no NVIDIA GPU is visible"),
    ]:
        shim.pretend(**state)
        assert words in (WithModule.missing() or "")
    shim.pretend(kernel_image=False)
    assert "compute capability is 9.0" in shim.device_problem(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so() -> None:
    reason = backends.available()["cuda"]
    assert isinstance(reason, str)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here"):
        SAM([nn.Parameter(torch.ones(1))], lr=0.1, backend="cuda")
