"""The CUDA backend on a GPU: against the reference, without a wait, in a CUDA graph, on streams, in memory.

FUSED_SAM_SANITIZER=1 leaves out what compute-sanitizer cannot watch (graphs, the profiler) and makes the rest small.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.draws import doubled, draw_passes, set_gradients, weights
from support.tables import F64, KINDS, MASTERS, STOCHASTIC, Kind, addressed, assert_near, assert_unchanged, draw_table
from support.tolerance import assert_close
from torch import Tensor, nn

from fused_sam import SAM, backends
from fused_sam.backends.contract import (
    DRAWS,
    INVERSE,
    NORM,
    SKIP,
    STATUS_SIZE,
    SUM,
    UPDATE_NORM,
    Group,
    Lists,
    Table,
    finish_norm,
)
from fused_sam.backends.reference import Reference

WHY_NOT = backends.available()["cuda"]
SANITIZER = os.environ.get("FUSED_SAM_SANITIZER") == "1"
watched = pytest.mark.skipif(SANITIZER, reason="not under compute-sanitizer")
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


COLUMNS = ("weights", "backups", "models", "momenta", "squares", "largest", "steps")
UPDATES = {
    "sgd": [
        Group(0.5, False, 0.0, lr=0.1, max_norm=100.0),
        Group(0.8, True, 0.1, lr=0.2, momentum=0.9, weight_decay=0.03, share=0.5),
        Group(0.3, False, 0.0, lr=0.05, momentum=0.8, dampening=0.3, maximize=True, max_norm=2.5),
        Group(0.2, True, 0.0, lr=0.3, momentum=0.7, nesterov=True, weight_decay=0.01, share=0.1),
    ],
    "adam": [
        Group(0.5, False, 0.0, 0.1, weight_decay=0.05, share=0.5, beta1=0.8, beta2=0.95, adam_eps=1e-3),
        Group(0.5, True, 0.1, 0.2, weight_decay=0.1, max_norm=2.5, beta2=0.99, adam_eps=1e-2, decoupled=True),
        Group(0.5, False, 0.0, 0.05, maximize=True, beta1=0.0, beta2=0.9, adam_eps=1e-3, amsgrad=True),
        Group(0.5, True, 0.0, 0.3, share=0.1, beta1=0.7, beta2=0.8, adam_eps=1e-1, decoupled=True, amsgrad=True),
    ],
}  # fmt: skip


def table_on_gpu(table: Table) -> Table:
    """The same numbers; a weight that is its own backup stays so."""
    own = bool(table.backups) and table.backups[0] is table.weights[0]
    for name in (*COLUMNS, "gradients"):
        setattr(table, name, [None if t is None else t.cuda() for t in getattr(table, name)])
    if own:
        table.backups = list(table.weights)
    table.gradient_addresses = addressed(table.gradients)
    return table


@pytest.mark.parametrize("scale", [16.0] if SANITIZER else [None, 16.0])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", [k for k in KINDS if k.weight is not F64], ids=str)
def test_a_step_equals_the_reference(kind: Kind, update: str, scale: float | None) -> None:
    """Masks, clipping, master weights, random rounding and Adam, to the rounding of fp32."""
    groups, sizes = UPDATES[update], [(n,) for n in (1, 7, 33, 4097, 5000 if SANITIZER else 16 * 4096 * 3 + 5)]
    ours, twin = (draw_table(kind, groups, sizes, perturbed=True) for _ in range(2))
    ours = table_on_gpu(ours)
    wanted = torch.zeros(STATUS_SIZE, dtype=torch.float64)
    for place, number in {NORM: 8.0, INVERSE: 0.125, UPDATE_NORM: 160.0, DRAWS: 7.0}.items():
        wanted[place] = number
    status = wanted.float().cuda()
    scales = (None, None) if scale is None else (torch.tensor(scale, device="cuda"), torch.tensor(scale))
    backend = backends.choose("cuda", torch.device("cuda"))

    def compare() -> None:
        for name in COLUMNS:
            for i, (a, b) in enumerate(zip(getattr(ours, name), getattr(twin, name), strict=True)):
                if b is not None:
                    assert_near(a.cpu(), b, f"{name}[{i}]")

    with no_waiting():
        backend.perturb(ours, groups, status)
    Reference().perturb(twin, groups, wanted)
    compare()
    for _ in range(2):
        with no_waiting():
            getattr(backend, update)(ours, groups, status, scales[0])
        getattr(Reference(), update)(twin, groups, wanted, scales[1])
        compare()
    before = {name: [None if t is None else t.clone() for t in getattr(ours, name)] for name in COLUMNS}
    status[SKIP] = 1
    getattr(backend, update)(ours, groups, status, scales[0])
    for name in set(COLUMNS) - {"weights", "models"} | ({"weights"} if kind.model else set()):
        assert_unchanged(getattr(ours, name), before[name], name)
    put_back = (
        zip(ours.models, ours.weights, strict=True) if kind.model else zip(ours.weights, ours.backups, strict=True)
    )
    for now, kept in put_back:
        assert torch.equal(now, kept.to(now.dtype))


@pytest.mark.parametrize("kind", [KINDS[0], *MASTERS[:1], *STOCHASTIC[:1]], ids=str)
def test_equal_draws_give_equal_bits(kind: Kind) -> None:
    backend = backends.choose("cuda", torch.device("cuda"))
    group, seen = Group(1.0, False, 0.0, share=0.5), []
    for draw in (3, 4, 3):
        table = table_on_gpu(draw_table(kind, [group], [(33333,)], perturbed=True))
        status = torch.zeros(STATUS_SIZE, device="cuda")
        status[INVERSE], status[DRAWS] = 0.125, draw
        backend.perturb(table, [group], status)
        seen.append((table.models or table.weights)[0])
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("total", [0.0, 6.25, torch.inf])
def test_finish(total: float) -> None:
    backend = backends.choose("cuda", torch.device("cuda"))
    found, wanted = (torch.zeros(STATUS_SIZE, device=device) for device in ("cuda", "cpu"))
    found[SUM] = wanted[SUM] = total
    with no_waiting():
        backend.finish(found, scaled=True, carry=False, eps=0.5)
    finish_norm(wanted, scaled=True, carry=False, eps=0.5)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("place", [0, 2500, -1])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, second: bool, place: int) -> None:
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
        optimizer.found_inf = torch.zeros(1, device="cuda")  # as GradScaler sets them
        optimizer.grad_scale = torch.full((1,), 2.0, device="cuda")
        train_step(model, optimizer, x, y)
        assert optimizer.skipped.device.type == "cuda"


@watched
@pytest.mark.parametrize("warm", [1, 3])
def test_a_whole_step_in_a_cuda_graph_equals_the_eager_one(warm: int) -> None:
    """Also with eager steps between the replays, and where the capture has to make a table."""
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
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    "AdamW, clipped": (torch.optim.AdamW, {"max_norm": 0.05}),
    "AdamW, random rounding": (torch.optim.AdamW, {"stochastic_rounding": True, "seed": 5}),
    "AdamW, masters": (torch.optim.AdamW, {"master_weights": True}),
}


@watched
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scale"])
@pytest.mark.parametrize(("cls", "options"), IN_A_GRAPH.values(), ids=IN_A_GRAPH.keys())
def test_a_step_in_a_cuda_graph(cls: type[torch.optim.Optimizer], options: dict[str, Any], scaled: bool) -> None:
    """Steps, draws, learning rate, loss scale and the flag of a gradient that is not finite are all on the device."""
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
        if scaled:  # as GradScaler.step does
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
    """A step on a stream of its own comes after what that stream did before, and its result is what later work sees."""
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


@watched
@pytest.mark.parametrize("groups", [2, 50])
@pytest.mark.parametrize("checked", [False, True], ids=["own check", "GradScaler's check"])
def test_launches_of_a_step(groups: int, checked: bool) -> None:
    """161 tensors: norm, perturb, sgd, and one norm more where nobody has looked at the second gradient."""
    params = [nn.Parameter(torch.randn(300, device="cuda")) for _ in range(161)]
    size = -(-161 // groups)
    split = [{"params": params[i : i + size], "rho": 0.01 * (i + 1)} for i in range(0, 161, size)]
    optimizer = SAM(split, lr=0.1, momentum=0.9, backend="cuda")
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
    """Launches of this package's kernels."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum("fused_sam" in e.name and e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


@watched
def test_memory_is_the_backup_and_nothing_else() -> None:
    params = [nn.Parameter(torch.randn(1 << 20, device="cuda")) for _ in range(8)]
    optimizer = SAM(params, lr=0.1, momentum=0.9, backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # momentum
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.first_step()
        optimizer.second_step()
    extra = torch.cuda.max_memory_allocated() - before
    backup = sum(p.numel() * 4 for p in params)
    # The workspaces of the tables: a number for each of some thousand blocks.
    assert backup <= extra <= backup + (1 << 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lists(dtype: torch.dtype) -> None:
    backend = backends.choose("cuda", torch.device("cuda"))
    x, y = ([torch.randn(n, device="cuda").to(d) for n in (5, 4097)] for d in (dtype, torch.float32))
    lists, plain = Lists([t.clone() for t in x], y), Lists([t.clone() for t in x], y)
    sums, wanted = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    coefficients = torch.tensor([2.0, -0.5], device="cuda")
    out, expected = ([torch.empty_like(t) for t in y] for _ in range(2))
    with no_waiting():
        backend.dots(lists, sums, begin=True)
        backend.average(lists, 0.75)
        backend.combine(lists, out, coefficients)
    Reference().dots(plain, wanted, begin=True)
    Reference().average(plain, 0.75)
    Reference().combine(plain, expected, coefficients)
    torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=1e-2)
    for found, right in zip(lists.x + out, plain.x + expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


def test_addresses_of_the_host_are_refused() -> None:
    from fused_sam import _cuda  # type: ignore[attr-defined]

    table = _cuda.Table(0, 0, 0, 0, [10], [0])
    with pytest.raises(ValueError, match="not in GPU memory"):
        table.set_weights([torch.ones(10).data_ptr()])
    with pytest.raises(ValueError, match="not a multiple of its element size"):
        table.set_weights([torch.ones(10, device="cuda").data_ptr() + 2])


REFUSED_LAUNCH = """
import ctypes, torch
from fused_sam import _cuda
w, b = torch.ones(10, device="cuda"), torch.zeros(10, device="cuda")
table = _cuda.Table(0, 0, 0, 0, [10], [0])
table.set_weights([w.data_ptr()]), table.set_backups([b.data_ptr()])
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


@watched
def test_a_refused_launch_is_an_exception() -> None:
    """The legacy stream waits for one that is being captured, which CUDA refuses; later launches work."""
    done = subprocess.run([sys.executable, "-c", REFUSED_LAUNCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "refused" in done.stdout, done.stdout + done.stderr
