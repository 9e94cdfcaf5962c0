"""Tests of the CUDA backend on a GPU: results, waits, CUDA graphs, streams and memory.

FUSED_SAM_SANITIZER=1 leaves out the tests that compute-sanitizer does not support (graphs, the profiler) and makes the
other ones small.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.draws import doubled, draw_passes, set_gradients, weights
from support.tables import (
    F64,
    KINDS,
    MASTERS,
    PERTURB_GROUPS,
    STOCHASTIC,
    Group,
    Kind,
    addressed,
    assert_near,
    assert_unchanged,
    columns,
    draw_table,
    status_with,
)
from support.tolerance import assert_close
from torch import Tensor, nn

import fused_sam
from fused_sam import SAM, backends
from fused_sam.backends.contract import (
    ASCENT_NORM,
    INVERSE_NORM,
    RNG_OFFSET,
    SKIP,
    SUM,
    UPDATE_NORM,
    AdamGroup,
    LionGroup,
    PerturbGroup,
    SGDGroup,
    Status,
    Table,
    VectorPair,
    finish_norm,
)
from fused_sam.backends.reference import Reference

WHY_NOT = backends.available()["cuda"]
SANITIZER = os.environ.get("FUSED_SAM_SANITIZER") == "1"
CUDA = torch.device("cuda")
unsanitized = pytest.mark.skipif(SANITIZER, reason="not under compute-sanitizer")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not True, reason=f"the cuda backend: {WHY_NOT}")]

SHAPES = [(1,), (7,), (0,), (33, 3), (), (4096,), (4097,), (5, 3, 2, 2)]
if not SANITIZER:
    SHAPES += [(7777, 77), (555, 555), (2048 * 32 + 1,), (33333,)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "maximize": True},
    "adaptive": {"momentum": 0.9, "adaptive": True, "eta": 0.1},
}


def on_gpu(params: list[nn.Parameter], device: str = "cuda") -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(device)) for p in params]


def give(params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    set_gradients(params, [g.to(p.device) for p, g in zip(params, gradients, strict=True)])


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).cuda()


def train_step(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    for half in (optimizer.first_step, optimizer.second_step):
        nn.functional.mse_loss(model(x), y).backward()
        half(zero_grad=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference_in_float64(dtype: torch.dtype, options: dict[str, Any]) -> None:
    start = weights(SHAPES, dtype)
    ours, twin = on_gpu(start), doubled(start)
    split = [slice(0, 3), slice(3, None)]
    made = [
        SAM([{"params": p[s], "rho": 0.1 * (1 + k)} for k, s in enumerate(split)], lr=0.1, backend=name, **options)
        for p, name in ((ours, "cuda"), (twin, "reference"))
    ]
    for first, second in draw_passes(start, 3):
        for params, optimizer in zip((ours, twin), made, strict=True):
            give(params, first)
            optimizer.first_step()
            give(params, second)
            optimizer.second_step()
    assert made[0].backend == "cuda"
    assert_close([p.cpu() for p in ours], twin, dtype, steps=3)
    for p, q in zip(ours, twin, strict=True):
        for name, buffer in made[0].state[p].items():
            assert_close([buffer.cpu()], [made[1].state[q][name]], dtype, steps=3)
    torch.testing.assert_close(made[0].grad_norm.double().cpu(), made[1].grad_norm, rtol=1e-2, atol=0)


PERTURBATIONS = [
    PerturbGroup(0.5),
    PerturbGroup(0.8, True, 0.1, mask_prob=0.5),
    PerturbGroup(0.3),
    PerturbGroup(0.2, True, mask_prob=0.1),
]
UPDATES: dict[str, list[Group]] = {
    "sgd": [
        SGDGroup(0.1),
        SGDGroup(0.2, momentum=0.9, weight_decay=0.03),
        SGDGroup(0.05, momentum=0.8, dampening=0.3, maximize=True),
        SGDGroup(0.3, momentum=0.7, nesterov=True, weight_decay=0.01),
    ],
    "adam": [
        AdamGroup(0.1, 0.8, 0.95, eps=1e-3, weight_decay=0.05),
        AdamGroup(0.2, 0.9, 0.99, eps=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
        AdamGroup(0.05, 0.0, 0.9, eps=1e-3, maximize=True, amsgrad=True),
        AdamGroup(0.3, 0.7, 0.8, eps=1e-1, decoupled_weight_decay=True, amsgrad=True),
    ],
    "lion": [
        LionGroup(0.1, weight_decay=0.05),
        LionGroup(0.2, 0.7, 0.3),
        LionGroup(0.05, 0.0, 0.6, maximize=True),
        LionGroup(0.3, 0.3, 0.0, weight_decay=0.2),
    ],
}


def table_on_gpu(table: Table) -> Table:
    """Move a table to the GPU. A param that is its own backup stays its own backup."""
    own = bool(table.backups) and table.backups[0] is table.params[0]
    for name in ("params", "backups", "masters", "grads"):
        setattr(table, name, [t.cuda() for t in getattr(table, name)])
    table.state = {name: [None if t is None else t.cuda() for t in column] for name, column in table.state.items()}
    if own:
        table.backups = [*table.params]
    table.grad_addresses = addressed(table.grads)
    return table


def status_on_gpu(wanted: Status) -> Status:
    """Return a copy of the status on the GPU."""
    status = Status(CUDA)
    status.values.copy_(wanted.values)
    return status


def compare(ours: Table, twin: Table, *, signs: bool = False) -> None:
    """Compare every column, within the rounding of fp32.

    Args:
        signs: True if Lion moved the params. Rounding may change the sign of a number near 0, so that up to 1 of
            1,000 elements may differ.
    """
    wanted = columns(twin)
    for name, column in columns(ours).items():
        for i, (a, b) in enumerate(zip(column, wanted[name], strict=True)):
            if a is None or b is None:
                continue
            found = a.cpu()
            if signs and name in ("params", "masters"):
                far = (found.float() - b.float()).abs() > 1e-2
                assert int(far.sum()) <= found.numel() / 1000, f"{name}[{i}]: {int(far.sum())} elements differ"
                found = torch.where(far, b, found)
            assert_near(found, b, f"{name}[{i}]")


@pytest.mark.parametrize("max_norm", [math.inf, 2.5])
@pytest.mark.parametrize("scale", [16.0] if SANITIZER else [None, 16.0])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", [k for k in KINDS if k.param is not F64], ids=str)
def test_a_step_equals_the_reference(kind: Kind, update: str, scale: float | None, max_norm: float) -> None:
    """The steps have masks, clipping, masters, stochastic rounding and every update. The limit is fp32's rounding."""
    groups, sizes = UPDATES[update], [(n,) for n in (1, 7, 33, 4097, 5000 if SANITIZER else 16 * 4096 * 3 + 5)]
    ours, twin = (draw_table(kind, groups, sizes, perturbed=True) for _ in range(2))
    ours = table_on_gpu(ours)
    wanted = status_with({ASCENT_NORM: 8.0, INVERSE_NORM: 0.125, UPDATE_NORM: 160.0, RNG_OFFSET: 7.0})
    status = status_on_gpu(wanted)
    scales = (None, None) if scale is None else (torch.tensor(scale, device="cuda"), torch.tensor(scale))
    backend = backends.choose("cuda", CUDA)
    with no_waiting():
        backend.perturb(ours, PERTURBATIONS, status)
    Reference().perturb(twin, PERTURBATIONS, wanted)
    compare(ours, twin)
    for _ in range(1 if update == "lion" else 2):  # after a different sign, the next step starts from other numbers
        with no_waiting():
            backend.update(ours, groups, status, scales[0], max_norm)
        Reference().update(twin, groups, wanted, scales[1], max_norm)
        compare(ours, twin, signs=update == "lion")
    before = {name: [None if t is None else t.clone() for t in column] for name, column in columns(ours).items()}
    status.values[SKIP] = 1
    backend.update(ours, groups, status, scales[0], max_norm)
    for name, column in columns(ours).items():
        if name != "params":
            assert_unchanged(column, before[name], name)
    for now, clean in zip(ours.params, ours.masters or ours.backups, strict=True):
        assert torch.equal(now, clean.to(now.dtype))


@pytest.mark.parametrize("ascent", [True, False])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], MASTERS[0]], ids=str)
def test_norm_equals_the_reference_over_several_tables(kind: Kind, ascent: bool) -> None:
    groups, shapes = UPDATES["sgd"], ([(4097,), (7,)], [(33333,)], [(1,)])
    ours, twins = ([draw_table(kind, groups, s, perturbed=True) for s in shapes] for _ in range(2))
    ours = [table_on_gpu(table) for table in ours]
    wanted = status_with({SUM: 1e6, RNG_OFFSET: 7.0})
    status = status_on_gpu(wanted)
    perturb_groups = PERTURB_GROUPS if ascent else None
    with no_waiting():
        backends.choose("cuda", CUDA).norm(ours, perturb_groups, status, keep_skip=False, eps=0.25)
    Reference().norm(twins, perturb_groups, wanted, keep_skip=False, eps=0.25)
    torch.testing.assert_close(status.values.double().cpu(), wanted.values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [KINDS[0], *MASTERS[:1], *STOCHASTIC[:1]], ids=str)
def test_equal_draws_give_equal_bits(kind: Kind) -> None:
    backend = backends.choose("cuda", CUDA)
    groups, seen = [PerturbGroup(1.0, mask_prob=0.5)], []
    for offset in (3, 4, 3):
        table = table_on_gpu(draw_table(kind, [SGDGroup(0.1)], [(33333,)], perturbed=True))
        status = status_on_gpu(status_with({INVERSE_NORM: 0.125, RNG_OFFSET: offset}))
        backend.perturb(table, groups, status)
        seen.append(table.params[0])
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("total", [0.0, 6.25, torch.inf])
def test_finish_norm(total: float) -> None:
    backend, wanted = backends.choose("cuda", CUDA), status_with({SUM: total})
    status = status_on_gpu(wanted)
    with no_waiting():
        backend.finish_norm(status, ascent=True, keep_skip=False, eps=0.5)
    finish_norm(wanted, ascent=True, keep_skip=False, eps=0.5)
    torch.testing.assert_close(status.values.double().cpu(), wanted.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("place", [0, 2500, -1])
def test_a_non_finite_gradient_changes_nothing(bad: float, second: bool, place: int) -> None:
    params = on_gpu(weights([(5000,), (33,)], torch.float32))
    optimizer = SAM(params, lr=0.1, momentum=0.9, dampening=0.1, backend="cuda")
    for spoilt in (False, True):
        before = [p.detach().clone() for p in params]
        momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in params] if spoilt else []
        for half in (0, 1):
            for p in params:
                p.grad = torch.ones_like(p)
            if spoilt and half == second:
                params[0].grad[place] = bad  # type: ignore[index]
            (optimizer.second_step if half else optimizer.first_step)()
    assert bool(optimizer.skipped)
    assert all(map(torch.equal, params, before))
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in zip(params, momenta, strict=True))


def test_equal_gradients_give_equal_norms() -> None:
    params = on_gpu(weights(SHAPES, torch.float32))
    norms = set()
    for _ in range(5):
        optimizer = SAM(params, lr=0.0, rho=0.01, adaptive=True, backend="cuda")
        for p in params:
            p.grad = p.detach().sin()
        optimizer.first_step()
        optimizer.restore()
        norms.add(float(optimizer.grad_norm))
    assert len(norms) == 1


@pytest.mark.parametrize("rate", [0.1, "tensor"])
def test_no_step_waits_for_the_gpu(rate: Any) -> None:
    model = net()
    lr = torch.tensor(0.1, device="cuda") if rate == "tensor" else rate
    optimizer = SAM(model.parameters(), lr=lr, momentum=0.9, backend="cuda")
    x, y = torch.randn(8, 16, device="cuda"), torch.randn(8, 4, device="cuda")
    with no_waiting():
        for _ in range(3):
            train_step(model, optimizer, x, y)
        optimizer.found_inf = torch.zeros(1, device="cuda")  # GradScaler sets these attributes
        optimizer.grad_scale = torch.full((1,), 2.0, device="cuda")
        train_step(model, optimizer, x, y)
        assert optimizer.skipped.device.type == "cuda"


@unsanitized
@pytest.mark.parametrize("warm", [1, 3])
def test_a_whole_step_in_a_cuda_graph_equals_the_eager_one(warm: int) -> None:
    """The results are equal with eager steps between replays, and if the capture has to build a table."""
    model = net()
    twin = copy.deepcopy(model)
    rates = [torch.tensor(0.05, device="cuda") for _ in range(2)]
    optimizer, eager = (
        SAM(m.parameters(), lr=lr, momentum=0.9, dampening=0.1, weight_decay=1e-3, backend="cuda")
        for m, lr in zip((model, twin), rates, strict=True)
    )
    x, y = torch.randn(32, 16, device="cuda"), torch.randn(32, 4, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            train_step(model, optimizer, x, y)
            train_step(twin, eager, x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(model, optimizer, x, y)
    for step in range(10):
        for lr in rates:
            lr.fill_(0.05 / (1 + step))
        x.normal_()
        if step % 4:
            graph.replay()
        else:
            train_step(model, optimizer, x, y)
        train_step(twin, eager, x, y)
        assert all(map(torch.equal, model.parameters(), twin.parameters())), f"replay {step}"
    assert torch.equal(optimizer.grad_norm, eager.grad_norm)


Bases = dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]]
IN_A_GRAPH: Bases = {
    "SGD, clipped": (torch.optim.SGD, {"momentum": 0.9, "max_norm": 0.05}),
    "Lion": (fused_sam.Lion, {"weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    "AdamW, clipped": (torch.optim.AdamW, {"max_norm": 0.05}),
    "AdamW, stochastic rounding": (torch.optim.AdamW, {"stochastic_rounding": True, "seed": 5}),
    "AdamW, masters": (torch.optim.AdamW, {"master_weights": True}),
}


@unsanitized
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scale"])
@pytest.mark.parametrize(("cls", "options"), IN_A_GRAPH.values(), ids=IN_A_GRAPH.keys())
def test_a_step_in_a_cuda_graph(cls: type[torch.optim.Optimizer], options: dict[str, Any], scaled: bool) -> None:
    """Step counts, random numbers, learning rate, loss scale and the skip flag are all on the device."""
    dtype = torch.bfloat16 if {"stochastic_rounding", "master_weights"} & options.keys() else torch.float32
    model = net().to(dtype)
    twin = copy.deepcopy(model)
    x, y = torch.randn(32, 16, device="cuda", dtype=dtype), torch.randn(32, 4, device="cuda", dtype=dtype)
    scale, found_inf = torch.full((1,), 4.0, device="cuda"), torch.zeros(1, device="cuda")
    rates = [torch.tensor(0.05, device="cuda") for _ in range(2)]
    optimizer, eager = (
        SAM(m.parameters(), cls, lr=lr, rho=0.1, backend="cuda", **options)
        for m, lr in zip((model, twin), rates, strict=True)
    )

    def step(model: nn.Module, optimizer: SAM) -> None:
        loss = nn.functional.mse_loss(model(x), y)
        (loss * scale if scaled else loss).backward()
        optimizer.first_step(zero_grad=True)
        loss = nn.functional.mse_loss(model(x), y)
        (loss * scale if scaled else loss).backward()
        if scaled:  # GradScaler.step does this too
            optimizer.found_inf, optimizer.grad_scale = found_inf, scale
        optimizer.second_step(zero_grad=True)
        if scaled:
            del optimizer.found_inf, optimizer.grad_scale

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizer)
            step(twin, eager)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer)
    for replay in range(6):
        for lr in rates:
            lr.fill_(0.05 / (1 + replay))
        scale.fill_(2.0 ** (replay + 1))
        found_inf.fill_(float(scaled and replay == 3))
        x.normal_()
        before = [p.detach().clone() for p in model.parameters()]
        graph.replay()
        step(twin, eager)
        assert all(map(torch.equal, model.parameters(), twin.parameters())), f"replay {replay}"
        assert all(map(torch.equal, model.parameters(), before)) == (scaled and replay == 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, eager.state[q][name]), name


def test_streams() -> None:
    """A step on another stream runs after the earlier work of that stream, and before its later work."""
    params = on_gpu(weights([(1 << 20,)], torch.float32))
    optimizer = SAM(params, lr=1.0, rho=0.0, backend="cuda")
    side = torch.cuda.Stream()
    params[0].grad = torch.zeros_like(params[0])
    torch.cuda.synchronize()
    before = params[0].detach().clone()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        params[0].grad.add_(1.0)
        optimizer.step()
        after = params[0].detach().clone()
    side.synchronize()
    assert torch.equal(after, before - 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_one_process() -> None:
    start = weights([(1000,)], torch.float32)
    for index in (1, 0):
        (p,) = on_gpu(start, f"cuda:{index}")
        optimizer = SAM([p], lr=0.5, rho=0.0, backend="cuda")
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(p.cpu(), start[0].detach() - 0.5) and torch.cuda.current_device() == 0


@unsanitized
@pytest.mark.parametrize("base", ["SGD", "Lion"])
@pytest.mark.parametrize("groups", [2, 50])
@pytest.mark.parametrize("checked", [False, True], ids=["own check", "GradScaler's check"])
def test_launches_of_a_step(groups: int, checked: bool, base: str) -> None:
    """A step over 161 tensors launches norm, perturb, update, and a second norm if SAM checks the second gradient."""
    params = [nn.Parameter(torch.randn(300, device="cuda")) for _ in range(161)]
    size = -(-161 // groups)
    split = [{"params": params[i : i + size], "rho": 0.01 * (i + 1)} for i in range(0, 161, size)]
    cls, options = {"SGD": (torch.optim.SGD, {"momentum": 0.9}), "Lion": (fused_sam.Lion, {})}[base]
    optimizer = SAM(split, cls, lr=0.1, backend="cuda", **options)  # type: ignore[arg-type]
    if checked:
        optimizer.found_inf = torch.zeros(1, device="cuda")

    def step() -> None:
        optimizer.first_step()
        optimizer.step()

    for p in params:
        p.grad = torch.ones_like(p)
    step()
    assert kernels_of(step) == (3 if checked else 4)


def kernels_of(run: Callable[[], None]) -> int:
    """Return the number of launches of this package's kernels."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum("fused_sam" in e.name and e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


@unsanitized
def test_only_the_backup_takes_memory() -> None:
    params = [nn.Parameter(torch.randn(1 << 20, device="cuda")) for _ in range(8)]
    optimizer = SAM(params, lr=0.1, momentum=0.9, backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # this creates the momentum
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.first_step()
        optimizer.second_step()
    extra = torch.cuda.max_memory_allocated() - before
    backup = sum(p.numel() * 4 for p in params)
    # The workspaces of the tables hold one number per block, for some thousand blocks.
    assert backup <= extra <= backup + (1 << 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors(dtype: torch.dtype) -> None:
    backend = backends.choose("cuda", CUDA)
    x, y = ([torch.randn(n, device="cuda").to(d) for n in (5, 4097)] for d in (dtype, torch.float32))
    pair, plain = VectorPair([t.clone() for t in x], y), VectorPair([t.clone() for t in x], y)
    sums, wanted = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    on_device = torch.tensor([2.0, -0.5], device="cuda")
    out, on_host, expected = ([torch.empty_like(t) for t in y] for _ in range(3))
    with no_waiting():
        backend.dot(pair, sums, reset=True)
        backend.ema(pair, 0.75)
        backend.axpby(pair, out, on_device)
        backend.axpby(pair, on_host, (2.0, -0.5))
    Reference().dot(plain, wanted, reset=True)
    Reference().ema(plain, 0.75)
    Reference().axpby(plain, expected, on_device)
    torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=1e-2)
    assert all(map(torch.equal, out, on_host))
    for found, right in zip(pair.x + out, plain.x + expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


def test_addresses_of_the_host_are_errors() -> None:
    from fused_sam import _cuda  # type: ignore[attr-defined]

    table = _cuda.Table(0, 0, 0, 0, [10], [0])
    with pytest.raises(ValueError, match="not in GPU memory"):
        table.set_params([torch.ones(10).data_ptr()])
    with pytest.raises(ValueError, match="not a multiple of its element size"):
        table.set_params([torch.ones(10, device="cuda").data_ptr() + 2])


REFUSED_LAUNCH = """
import ctypes, torch
from fused_sam import _cuda
w, b = torch.ones(10, device="cuda"), torch.zeros(10, device="cuda")
table = _cuda.Table(0, 0, 0, 0, [10], [0])
table.set_params([w.data_ptr()]), table.set_backups([b.data_ptr()])
driver, stream, graph = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
assert driver.cuStreamCreate(ctypes.byref(stream), 0) == 0
table.restore(stream.value)
torch.cuda.synchronize()
assert torch.equal(w, b)
w.fill_(2)
torch.cuda.synchronize()
assert driver.cuStreamBeginCapture_v2(stream, 0) == 0
try:
    table.restore(0)
except RuntimeError as error:
    assert "CUDA kernel restore" in str(error) and "cudaErrorStreamCaptureImplicit" in str(error), error
    print("refused")
print("end of capture:", driver.cuStreamEndCapture(stream, ctypes.byref(graph)))
torch.cuda.synchronize()
assert torch.equal(w, torch.full_like(w, 2))
table.restore(stream.value)
torch.cuda.synchronize()
assert torch.equal(w, b)
"""


@unsanitized
def test_a_refused_launch_is_an_exception() -> None:
    """CUDA allows no launch on the legacy stream during a capture. Later launches work."""
    done = subprocess.run([sys.executable, "-c", REFUSED_LAUNCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "refused" in done.stdout, done.stdout + done.stderr
