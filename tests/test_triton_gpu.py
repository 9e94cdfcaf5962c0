"""The Triton backend on a GPU: against the reference, in CUDA graphs, without waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.bits import assert_same_bits
from support.triton_tables import DTYPES, GROUPS, PERTURB_GROUPS, Case, columns, draw_case
from torch import Tensor, nn

from fused_sam import SAM
from fused_sam.backends.contract import RNG_OFFSET, SKIP, AdamGroup
from fused_sam.backends.triton.backend import Triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(
        Triton.unavailable_reason() is not None, reason=f"triton cannot run: {Triton.unavailable_reason()}"
    ),
]

SIZES = [1, 15, 16, 17, 511, 512, 513, 2047, 2048, 2049, 40_000, 1_000_003]
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}

rules = pytest.mark.parametrize("rule", GROUPS)


@rules
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:6], [3] * 700, [5_000_000]], ids=["large", "small", "many", "one"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_step(dtypes: tuple[torch.dtype, torch.dtype], shift: int, sizes: list[int], rule: str) -> None:
    case, backend = draw_case(sizes, dtypes, GROUPS[rule], shift=shift, device="cuda"), Triton()
    case.norm(backend, ascent=True)
    case.perturb(backend)
    case.compare("params")
    case.norm(backend, ascent=False, keep_skip=True)
    case.update(backend)
    case.compare()
    torch.testing.assert_close(case.status.values, case.twin_status.values, rtol=1e-5, atol=0)
    assert_same_bits(case.table.backups, case.twin.backups)


KINDS = {
    "plain": {},
    "fp16": {"dtypes": DTYPES[2]},
    "masters": {"dtypes": DTYPES[3], "masters": True},
    "masters, bf16 gradients": {"dtypes": DTYPES[1], "masters": True},
    "stochastic rounding": {"dtypes": DTYPES[1], "stochastic": True},
    "stochastic rounding, fp16": {"dtypes": DTYPES[2], "stochastic": True},
}


@rules
@pytest.mark.parametrize("mask_prob", [1.0, 0.3])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_step_of_every_kind(kind: str, shift: int, mask_prob: float, rule: str) -> None:
    """Perturb some elements, then update twice, with a loss scale and clipping; compare with the reference."""
    options = {"dtypes": DTYPES[0], **KINDS[kind]}
    groups = [g._replace(mask_prob=mask_prob) for g in PERTURB_GROUPS]
    case = draw_case(SIZES, groups=GROUPS[rule], perturb_groups=groups, shift=shift, device="cuda", **options)  # type: ignore[arg-type]
    backend = Triton()
    case.set_status(RNG_OFFSET, 11)
    case.norm(backend, ascent=True)
    case.perturb(backend)
    case.norm(backend, ascent=False)
    case.update(backend, torch.tensor(4.0, device="cuda"), 2.0)
    case.update(backend, None, 1e9)
    case.compare()
    assert_same_bits(case.table.backups, case.twin.backups)


@rules
@pytest.mark.parametrize("kind", ["masters", "masters, bf16 gradients", "stochastic rounding, fp16"])
def test_a_skipped_update_rounds_or_copies(kind: str, rule: str) -> None:
    options = {"dtypes": DTYPES[0], **KINDS[kind]}
    case, backend = draw_case(SIZES, groups=GROUPS[rule], device="cuda", **options), Triton()  # type: ignore[arg-type]
    case.set_status(SKIP, 1)
    case.perturb(backend)
    case.update(backend)
    found, wanted = columns(case.table), columns(case.twin)
    for name, column in found.items():
        pairs = [(a, b) for a, b in zip(column, wanted[name], strict=True) if a is not None and b is not None]
        assert_same_bits([a for a, _ in pairs], [b for _, b in pairs])


@rules
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_captured_update_counts_and_draws_at_every_replay(stochastic: bool, rule: str) -> None:
    def drawn() -> Case:
        return draw_case([3, 5000, 700_001], DTYPES[1], GROUPS[rule], device="cuda", stochastic=stochastic)

    def update(case: Case, backend: Triton) -> None:
        backend.update(case.table, case.groups, case.status, None, 2.0)

    ours, twin = drawn(), drawn()
    backend, eager = Triton(), Triton()
    for case, b in ((ours, backend), (twin, eager)):
        update(case, b)
    torch.cuda.synchronize()

    def run() -> None:
        ours.status.values[RNG_OFFSET] += 1
        update(ours, backend)

    graph = captured(run)
    for _ in range(4):
        graph.replay()
        twin.status.values[RNG_OFFSET] += 1
        update(twin, eager)
    for name, column in columns(ours.table).items():
        found = [t for t in column if t is not None]
        assert_same_bits(found, [t for t in columns(twin.table)[name] if t is not None])
    if rule == "adam":
        assert [float(t) for t in ours.table.state["step"] if t is not None] == [i + 5.0 for i in range(3)]


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999])
def test_bias_correction(beta: float) -> None:
    """With gradients of 1 and averages of 1 - beta^t, the step is lr, up to the errors of the corrections."""
    for t in (1, 10, 1000, 100_000):
        group = AdamGroup(1.0, beta, beta, eps=0.0)
        case = draw_case([64], DTYPES[0], [group], device="cuda")
        table, average = case.table, 1 - beta ** (t - 1)
        for name, value in (("exp_avg", average), ("exp_avg_sq", average), ("step", t - 1.0)):
            table.state[name][0].fill_(value)  # type: ignore[union-attr]
        table.grads[0].fill_(1.0)
        Triton().update(table, [group], case.status, None, float("inf"))
        # The root of a square's correction has half its error; the average's own rounding is added to each.
        torch.testing.assert_close(table.params[0], table.backups[0] - 1, rtol=0, atol=2e-6)


def test_norm_is_the_same_every_time() -> None:
    case = draw_case([30_000_000, 17, 5_000_001], DTYPES[0], device="cuda")
    backend, seen = Triton(), []
    for _ in range(20):
        backend.norm([case.table], PERTURB_GROUPS, case.status, keep_skip=False, eps=0.0)
        seen.append(case.status.values.clone())
    assert_same_bits(seen[1:], seen[:1] * 19)


class Bowl:
    """Parameters of several shapes, and a loss whose gradients are the same every time, bit for bit."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        shapes = [(300, 70), (5,), (64, 3, 3, 3), (20_000,)]
        self.params = [nn.Parameter(torch.randn(s, device="cuda").to(dtype)) for s in shapes]
        self.target = [torch.randn_like(p) for p in self.params]

    def backward(self) -> None:
        total = sum((((p - t) * 1.5).sin().square().sum() for p, t in zip(self.params, self.target, strict=True)))
        total.backward()  # type: ignore[union-attr]

    def optimizer(self, **options: object) -> SAM:
        return SAM(self.params, rho=0.3, backend="triton", **{**OPTIONS, **options})  # type: ignore[arg-type]

    def step(self, optimizer: SAM) -> None:
        optimizer.zero_grad()
        self.backward()
        optimizer.first_step(zero_grad=True)
        self.backward()
        optimizer.second_step(zero_grad=True)


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("warm", [1, 3])
def test_a_captured_step_is_the_eager_step(warm: int) -> None:
    """Bit for bit, also with a learning rate that changes, and with eager steps between the replays."""
    bowl = Bowl()
    twin = copy.deepcopy(bowl)
    lrs = [torch.tensor(0.1, device="cuda") for _ in range(2)]
    ours, other = bowl.optimizer(lr=lrs[0]), twin.optimizer(lr=lrs[1])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            bowl.step(ours)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(warm):
        twin.step(other)
    graph = captured(lambda: bowl.step(ours))
    for i in range(6):
        for lr in lrs:
            lr.fill_(0.1 / (1 + i))
        if i % 3 == 2:
            bowl.step(ours)
        else:
            graph.replay()
        twin.step(other)
        assert_same_bits(bowl.params, twin.params)
        assert torch.equal(ours.grad_norm, other.grad_norm)


def test_two_graphs_of_one_optimizer() -> None:
    bowl = Bowl()
    twin = copy.deepcopy(bowl)
    ours, other = bowl.optimizer(), twin.optimizer()
    for _ in range(2):
        bowl.step(ours)
        twin.step(other)
    graphs = [captured(lambda: bowl.step(ours)) for _ in range(2)]
    for graph in graphs * 2:
        graph.replay()
        twin.step(other)
        assert_same_bits(bowl.params, twin.params)


@pytest.mark.parametrize("with_scaler", [False, True])
def test_launches_of_a_step(with_scaler: bool) -> None:
    bowl = Bowl()
    optimizer = bowl.optimizer()
    bowl.step(optimizer)
    bowl.backward()
    if with_scaler:
        optimizer.found_inf = torch.zeros((), device="cuda")  # type: ignore[attr-defined]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.first_step()
        optimizer.second_step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.name in ("norm", "perturb", "sgd", "restore")]
    assert sorted(names) == (["norm", "perturb", "sgd"] if with_scaler else ["norm", "norm", "perturb", "sgd"])


def test_a_step_never_waits_for_the_device() -> None:
    bowl = Bowl(torch.bfloat16)
    optimizer = bowl.optimizer(lr=torch.tensor(0.1, device="cuda", dtype=torch.float64))
    for _ in range(2):
        bowl.step(optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(3):
            optimizer.param_groups[0]["rho"] = 0.1 * (i + 1)
            spare = torch.empty(10_000 * (i + 1), device="cuda")  # so that gradients move
            bowl.step(optimizer)
            del spare
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_non_finite_gradient_changes_nothing() -> None:
    bowl = Bowl()
    optimizer = bowl.optimizer()
    bowl.step(optimizer)
    for half in range(2):
        weights = [p.detach().clone() for p in bowl.params]
        momenta: list[Tensor] = [optimizer.state[p]["momentum_buffer"].clone() for p in bowl.params]
        for now, run in enumerate((optimizer.first_step, optimizer.second_step)):
            bowl.backward()
            if now == half:
                bowl.params[2].grad[-1, -1, -1, -1] = float("nan")  # type: ignore[index]
            run(zero_grad=True)
        assert optimizer.skipped and optimizer.stepper.status.skip == 1
        assert_same_bits(bowl.params, weights)
        assert_same_bits([optimizer.state[p]["momentum_buffer"] for p in bowl.params], momenta)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_params_on_another_device_than_the_current_one() -> None:
    case = draw_case(SIZES, DTYPES[0], device="cuda:1")
    assert torch.cuda.current_device() == 0
    Triton().perturb(case.table, PERTURB_GROUPS, case.status)
    assert_same_bits(case.table.backups, case.twin.params)
