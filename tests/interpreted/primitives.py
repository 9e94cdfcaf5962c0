"""The Triton kernels in Triton's interpreter against the reference, primitive by primitive.

Runs only if TRITON_INTERPRET is set before Python starts, as tests/test_triton_interpret.py does.
"""

from __future__ import annotations

import math

import pytest
import support.triton_rounding  # noqa: F401  # rounds as GPUs do
import torch
import triton
import triton.language as tl
from support.bits import assert_same_bits, same_bits
from support.draws import values
from support.triton_tables import (
    DTYPES,
    GROUPS,
    PERTURB_GROUPS,
    SIZES,
    Case,
    assert_near,
    columns,
    draw_case,
    draw_pairs,
    place,
)
from torch import Tensor

from fused_sam.backends.contract import (
    INVERSE_NORM,
    MASK,
    RNG_OFFSET,
    ROUND_PERTURBED,
    ROUND_UPDATED,
    SKIP,
    SUM,
    AdamGroup,
    LionGroup,
    PerturbGroup,
    SGDGroup,
    VectorPair,
)
from fused_sam.backends.reference import Reference
from fused_sam.backends.rng import mask_of, mix, random_words, round_stochastically, stream_key
from fused_sam.backends.triton.adam import bias_correction
from fused_sam.backends.triton.backend import Triton
from fused_sam.backends.triton.blocks import Block
from fused_sam.backends.triton.layout import RNG_STREAM, SEED
from fused_sam.backends.triton.memory import Memory
from fused_sam.backends.triton.rng import random_words as words_of_a_block

INF, NAN = float("inf"), float("nan")
PLAIN = [SGDGroup(0.1, momentum=0.9)]
PLAIN_PERTURB = [PerturbGroup(0.05)]

rules = pytest.mark.parametrize("rule", GROUPS)


def step(case: Case, backend: Triton) -> None:
    """Run a whole step on both sides, with the same gradients in both passes."""
    case.norm(backend, ascent=True)
    case.perturb(backend)
    case.compare("params")
    case.norm(backend, ascent=False, keep_skip=True)
    case.update(backend)
    case.compare()


def plain_case(sizes: list[int], dtypes: tuple[torch.dtype, torch.dtype] = DTYPES[0]) -> Case:
    return draw_case(sizes, dtypes, PLAIN, perturb_groups=PLAIN_PERTURB)


# ---- steps and norms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("rule", "dtypes"), [(rule, d) for rule in GROUPS for d in (DTYPES if rule == "sgd" else DTYPES[:2])], ids=str
)
def test_step_over_sizes_and_groups(rule: str, dtypes: tuple[torch.dtype, torch.dtype], shift: int) -> None:
    case = draw_case(SIZES, dtypes, GROUPS[rule], shift=shift)
    case.norm(Triton(), ascent=True)
    assert_near([case.status.values], [case.twin_status.values], "status")
    step(case, Triton())
    assert_same_bits(case.table.backups, case.twin.backups)


@pytest.mark.parametrize("sizes", [[20480], [2048] * 3 + [10240, 2047, 4112, 1]], ids=["one", "several"])
def test_step_in_large_blocks(sizes: list[int]) -> None:
    case = draw_case(sizes, DTYPES[0])
    step(case, Triton())
    assert case.table.native.blocks.size == 2048


def test_step_over_many_small_tensors() -> None:
    step(draw_case([3] * 60, DTYPES[0]), Triton())


def test_norm_with_more_blocks_than_programs() -> None:
    case = draw_case([2048 * 33 + 5, 512], DTYPES[0])
    case.norm(Triton(), ascent=True)
    assert case.table.native.blocks.count > case.table.native.programs
    torch.testing.assert_close(case.status.values, case.twin_status.values, rtol=1e-6, atol=0)


def test_norm_is_the_same_every_time_and_leaves_its_ticket_at_zero() -> None:
    case, backend = draw_case([5000, 7, 600], DTYPES[0]), Triton()
    seen = []
    for _ in range(3):
        case.norm(backend, ascent=True)
        seen.append(case.status.values.clone())
    assert_same_bits(seen[1:], seen[:1] * 2)
    assert not case.table.native._memory.tensor("ticket").any()


@pytest.mark.parametrize("in_one_call", [True, False])
def test_norm_over_two_tables(in_one_call: bool) -> None:
    a, b = plain_case([100, 33]), plain_case([7], DTYPES[1])
    for backend, tables, status in (
        (Triton(), [a.table, b.table], a.status),
        (Reference(), [a.twin, b.twin], a.twin_status),
    ):
        status.values[SKIP] = 1  # of an earlier step, which this norm does not keep
        status.values[SUM] = 123
        if in_one_call:
            backend.norm(tables, PLAIN_PERTURB, status, keep_skip=False, eps=0.0)
        else:
            status.values[SUM] = 0
            for table in tables:
                backend.accumulate_norm(table, PLAIN_PERTURB, status)
                assert status.skip == 1 and status.ascent_norm == 0
            backend.finish_norm(status, ascent=True, keep_skip=False, eps=0.0)
        assert status.skip == 0
    torch.testing.assert_close(a.status.values, a.twin_status.values, rtol=1e-6, atol=0)


@rules
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_non_finite_gradient_changes_nothing(
    where: str, bad: float, dtypes: tuple[torch.dtype, torch.dtype], rule: str
) -> None:
    sizes = [513, 40, 5]
    row, element = {"first": (0, 0), "middle": (0, 512), "last": (2, 4)}[where]
    case, backend = draw_case(sizes, dtypes, GROUPS[rule]), Triton()
    table, status = case.table, case.status
    table.grads[row][element] = bad
    table.params[1][3] = NAN  # a parameter may hold anything: it is copied, not computed with
    params = [w.clone() for w in table.params]
    state = {name: [None if t is None else t.clone() for t in column] for name, column in table.state.items()}
    for groups in (PERTURB_GROUPS, None):
        status.values[SKIP] = 0
        backend.norm([table], groups, status, keep_skip=True, eps=0.0)
        assert status.skip == 1
    assert status.inverse_norm == 0 and not status.ascent_norm.isfinite() and not status.update_norm.isfinite()
    backend.perturb(table, PERTURB_GROUPS, status)
    assert_same_bits(table.params, params)
    assert_same_bits(table.backups, params)
    for w in table.params:
        w.fill_(3)  # as the perturbation of an earlier, finite gradient may have left them
    backend.update(table, case.groups, status, None, INF)
    assert_same_bits(table.params, params)
    for name, column in table.state.items():
        pairs = zip(column, state[name], strict=True)
        assert all((m is None and n is None) or same_bits(m, n) for m, n in pairs), name  # type: ignore[arg-type]


def test_skip_is_kept_only_if_asked() -> None:
    case, backend = plain_case([20]), Triton()
    for keep_skip in (True, False):
        case.status.values[SKIP] = 1
        backend.norm([case.table], None, case.status, keep_skip=keep_skip, eps=0.0)
        assert case.status.skip == keep_skip


def test_restore_copies_bits() -> None:
    case, backend = draw_case([513, 16, 7], DTYPES[1]), Triton()
    case.table.backups[1].view(torch.int16).fill_(0x7FA1)  # a signalling NaN with a payload
    backend.restore(case.table)
    assert_same_bits(case.table.params, case.table.backups)


# ---- updates: besides tests/test_primitives.py, what belongs to these kernels -----------------------------------


@rules
def test_params_that_were_not_perturbed_are_their_own_backups(rule: str) -> None:
    case, backend = draw_case(SIZES, DTYPES[0], GROUPS[rule], perturbed=False), Triton()
    case.norm(backend, ascent=False)
    case.update(backend)
    case.compare()


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_grad_scale(dtype: torch.dtype, rule: str) -> None:
    case, backend = draw_case([600, 3], DTYPES[0], GROUPS[rule]), Triton()
    case.update(backend, torch.tensor(1024.0, dtype=dtype))
    case.compare()


@rules
@pytest.mark.parametrize("max_norm", [2.0, 1e9, 1e300, INF])
def test_clipping(max_norm: float, rule: str) -> None:
    case, backend = draw_case(SIZES, DTYPES[0], GROUPS[rule]), Triton()
    case.norm(backend, ascent=False)
    case.update(backend, torch.tensor(0.5), max_norm)
    case.compare()


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_learning_rate_on_the_device_is_not_read_by_the_host(dtype: torch.dtype, rule: str) -> None:
    case, backend = draw_case([600, 3], DTYPES[0], GROUPS[rule]), Triton()
    lr = torch.tensor(0.5, dtype=dtype)
    case.groups = [g._replace(lr=lr) if k % 2 else g for k, g in enumerate(case.groups)]
    for value in (0.5, 0.125):
        lr.fill_(value)
        case.update(backend)
        case.compare()


@rules
def test_masters_that_are_not_aligned(rule: str) -> None:
    case, backend = draw_case(SIZES, DTYPES[1], GROUPS[rule], shift=1, masters=True), Triton()
    step(case, backend)


def test_dampened_momentum_is_never_minus_zero() -> None:
    case, backend = draw_case([40], DTYPES[0], [SGDGroup(0.1, momentum=0.9, dampening=0.5)]), Triton()
    for g in case.table.grads:
        g.fill_(-0.0)
    backend.update(case.table, case.groups, case.status, None, INF)  # type: ignore[arg-type]
    (m,) = case.table.state["momentum_buffer"]
    assert m is not None and not m.signbit().any() and not m.any()


def test_adam_counts_the_steps_of_many_tensors_once_per_call() -> None:
    """128 at a time; and not if the step is skipped."""
    case, backend = draw_case([3] * 130, DTYPES[0], GROUPS["adam"]), Triton()
    for skip in (0, 1):
        case.status.values[SKIP] = skip
        backend.update(case.table, case.groups, case.status, None, INF)  # type: ignore[arg-type]
        assert [float(t) for t in case.table.state["step"] if t is not None] == [float(i + 1) for i in range(130)]
    assert not case.table.native._memory.tensor("ticket").any()


def test_the_sign_of_zero_is_zero_and_that_of_nan_is_nan() -> None:
    """A group of Lion with a new average; subnormal gradients have signs."""
    group = LionGroup(0.25)
    case, backend = draw_case([512], DTYPES[0], [group]), Triton()
    gradient = torch.tensor([0.0, -0.0, NAN, 1e-38, -1e-38, INF, -INF, 2.0]).repeat(64)
    case.attach([gradient])
    case.table.state["exp_avg"][0].zero_()  # type: ignore[union-attr]
    case.table.backups[0].fill_(1.0)
    backend.update(case.table, [group], case.status, None, INF)
    wanted = torch.tensor([1.0, 1.0, NAN, 0.75, 1.25, 0.75, 1.25, 0.75]).repeat(64)
    torch.testing.assert_close(case.table.params[0], wanted, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _corrections(log_beta_ptr, out_ptr, first, BLOCK: tl.constexpr):
    t = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), bias_correction(tl.load(log_beta_ptr), t.to(tl.float32)))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_bias_correction(beta: float) -> None:
    """1 - beta^t is right to 4 half units of the last place of fp32; log(beta) and its product with t are rounded."""
    log_beta = torch.tensor([math.log(beta) if beta else -math.inf], dtype=torch.float32)
    for first in (1, 5000, 500_000, 999_000):
        out = torch.empty(8192)
        _corrections[(1,)](log_beta, out, first, 8192)
        t = torch.arange(first, first + 8192, dtype=torch.float64)
        expected = -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)
        assert ((out.double() - expected).abs() / expected).max() < 4 * 2**-24


# ---- random numbers -------------------------------------------------------------------------------------------


@triton.jit
def _words(group_ptr, row_ptr, status_ptr, begin_ptr, out_ptr, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    block = Block(0, row_ptr, tl.load(begin_ptr), BLOCK)
    word = words_of_a_block(block, group_ptr, status_ptr, PURPOSE, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), word.to(tl.int64))


@pytest.mark.parametrize("begin", [0, 2048, 2**31, 2**32 - 512, 2**32, 5 * 2**32 + 1024, 2**40])
@pytest.mark.parametrize("purpose", [MASK, ROUND_PERTURBED, ROUND_UPDATED])
def test_words_at_any_place_of_a_tensor(purpose: int, begin: int) -> None:
    """Includes places from 2^31 on, which no test can fill with parameters."""
    seed, draw, stream = 0xFEDCBA9876543210, 16_777_215, 2**31 - 1
    group, row, status = torch.zeros(32), torch.zeros(16, dtype=torch.int64), torch.zeros(8)
    group[SEED : SEED + 2].view(torch.int64)[0] = seed - 2**64
    row[RNG_STREAM] = stream
    status[RNG_OFFSET] = draw
    out = torch.zeros(512, dtype=torch.int64)
    _words[(1,)](group, row, status, torch.tensor([begin]), out, purpose, 512)
    a, b = stream_key(seed, draw, stream, purpose)
    i = begin + torch.arange(512)
    mask = 0xFFFFFFFF
    assert torch.equal(out, mix(mix((i + a) & mask) ^ ((b + (i >> 32) * 0x9E3779B9) & mask)))
    if begin == 0:
        assert torch.equal(out, random_words((a, b), torch.empty(512)))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_masks_over_several_blocks(shift: int, stochastic: bool) -> None:
    groups = [g._replace(mask_prob=prob) for g, prob in zip(PERTURB_GROUPS, (0.5, 1.0, 0.1, 0.9), strict=True)]
    dtypes, sizes = DTYPES[1] if stochastic else DTYPES[0], [1030, 600, 2000, 17, 1]
    case, backend = draw_case(sizes, dtypes, perturb_groups=groups, shift=shift, stochastic=stochastic), Triton()
    case.set_status(INVERSE_NORM, 0.25)
    case.set_status(RNG_OFFSET, 3)
    before = [w.clone() for w in case.table.params]
    case.perturb(backend)
    case.compare("params")
    for i, (now, w) in enumerate(zip(case.table.params, before, strict=True)):
        key = stream_key(case.table.seed, 3, case.table.rng_streams[i], MASK)
        still = ~mask_of(key, w, groups[case.table.group_ids[i]].mask_prob)
        assert_same_bits([now[still]], [w[still]])


@pytest.mark.parametrize(
    "group",
    [
        SGDGroup(0.5, weight_decay=0.001),
        AdamGroup(0.5, 0.0, weight_decay=0.001, decoupled_weight_decay=True),
        LionGroup(0.5, 0.0, weight_decay=0.001),
    ],
    ids=["sgd", "adam", "lion"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_round_stochastically(dtype: torch.dtype, group: SGDGroup | AdamGroup | LionGroup) -> None:
    """With gradients of 0 only the decay is left: what is rounded is known, and so the result, to the bit."""
    case, backend = draw_case([700, 33], (dtype, dtype), [group], stochastic=True), Triton()
    for g in case.table.grads:
        g.zero_()
    before = [b.clone() for b in case.table.backups]
    case.set_status(RNG_OFFSET, 9)
    assert case.table.rule is not None
    backend.update(case.table, [group], case.status, None, INF)
    for i, (w, b) in enumerate(zip(case.table.params, before, strict=True)):
        lr, decay = torch.tensor(0.5), torch.tensor(0.001)
        exact = b.float() - lr * (decay * b.float()) if isinstance(group, SGDGroup) else b.float() * (1 - lr * decay)
        key = stream_key(case.table.seed, 9, case.table.rng_streams[i], ROUND_UPDATED)
        assert_same_bits([w], [round_stochastically(exact, key, dtype)])


def test_a_new_seed_or_mask_prob_is_sent() -> None:
    case, backend = plain_case([600]), Triton()
    case.set_status(INVERSE_NORM, 0.25)
    start, seen = case.table.params[0].clone(), []
    for seed, prob in ((1, 1.0), (1, 0.5), (2**63, 0.5), (1, 0.5)):
        case.table.seed = case.twin.seed = seed
        case.table.params[0].copy_(start)
        case.twin.params[0].copy_(start)
        case.perturb_groups = [PLAIN_PERTURB[0]._replace(mask_prob=prob)]
        case.perturb(backend)
        case.compare("params")
        seen.append(case.table.params[0].clone())
    assert_same_bits(seen[1:2], seen[3:])
    assert not torch.equal(seen[1], seen[2])


# ---- what is sent to the device, and when ---------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The words of every copy to the device."""
    copies: list[int] = []
    send = Memory.send

    def counting(memory: Memory, words: int) -> None:
        copies.append(words)
        send(memory, words)

    monkeypatch.setattr(Memory, "send", counting)
    return copies


def test_only_what_changed_is_sent_and_only_when_it_changed(sent: list[int]) -> None:
    case, backend = plain_case([600, 3]), Triton()
    step(case, backend)
    memory = case.table.native._memory
    assert sent[0] == memory.sent and set(sent[1:]) <= {memory.changing}
    sent.clear()
    step(case, backend)
    assert sent == []
    case.attach([g.clone() for g in case.table.grads])  # the same numbers at other addresses
    step(case, backend)
    assert sent == [memory.changing]
    sent.clear()
    case.groups = [PLAIN[0]._replace(lr=0.01)]
    case.norm(backend, ascent=True)
    assert sent == []  # the perturbation reads no learning rate
    step(case, backend)
    assert sent == [memory.changing]
    sent.clear()
    case.perturb_groups = [PerturbGroup(0.3)]
    case.norm(backend, ascent=True)
    step(case, backend)
    assert sent == [memory.changing]


@pytest.mark.parametrize("call", range(4))
def test_an_interrupted_copy_is_made_at_the_next_call(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a new table, of new groups of the update, of new gradients, and of new groups of the perturbation."""
    case, backend, send, calls = plain_case([600, 3]), Triton(), Memory.send, iter(range(10))

    def interrupted(memory: Memory, words: int) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt
        send(memory, words)

    def run() -> None:
        step(case, backend)
        case.attach([g * 2 for g in case.table.grads])
        step(case, backend)
        case.perturb_groups = [PerturbGroup(0.3)]
        step(case, backend)

    monkeypatch.setattr(Memory, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    for ours, twin in zip(columns(case.table).values(), columns(case.twin).values(), strict=True):
        for a, b in zip(ours, twin, strict=True):
            if a is not None and b is not None:
                b.copy_(a)  # the reference has not run what was interrupted
    run()


class Recorded:
    """A capture, played by hand: a replay copies the pinned memory into device memory that the capture owns."""

    def __init__(self, backend: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Memory, Tensor]] = []
        monkeypatch.setattr("fused_sam.backends.triton.device.Device.capturing", lambda _: True)
        capture_send, update_capture = Memory.capture_send, Memory.update_capture

        def recording(memory: Memory, pinned: Tensor) -> None:
            capture_send(memory, pinned)
            self.made.append((memory, pinned))

        def replaying(memory: Memory) -> None:
            update_capture(memory)
            assert memory._pinned is not None
            memory.words[: memory.sent].copy_(memory._pinned)

        monkeypatch.setattr(Memory, "capture_send", recording)
        monkeypatch.setattr(Memory, "update_capture", replaying)
        backend._reserve._piece = torch.empty(1 << 14, dtype=torch.int64)


@rules
def test_a_capture_shares_nothing_with_steps_outside(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw_case([600, 3], DTYPES[0], GROUPS[rule][:1], perturb_groups=PLAIN_PERTURB)
    backend = Triton()
    step(case, backend)
    eager = case.table.native._memory
    before = eager.words.clone()
    with monkeypatch.context() as m:
        recorded = Recorded(backend, m)
        case.attach([g.clone() for g in case.table.grads])
        step(case, backend)
    assert len(recorded.made) == 2, "one copy per table and pass: that of the norm serves the primitive after it"
    assert torch.equal(eager.words[: eager.sent], before[: eager.sent])
    kept = [(memory.words.clone(), pinned.clone()) for memory, pinned in recorded.made]
    case.attach([g.clone() for g in case.table.grads])
    case.groups = [case.groups[0]._replace(lr=0.01)]
    case.perturb_groups = [PerturbGroup(0.3)]
    step(case, backend)
    for (memory, pinned), (words, copy) in zip(recorded.made, kept, strict=True):
        assert memory is not case.table.native._memory
        assert torch.equal(pinned, copy) and torch.equal(memory.words[: memory.sent], words[: memory.sent])


@rules
def test_a_captured_update_without_a_norm_has_a_copy_of_its_own(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a GradScaler; also after an earlier capture of a norm that no primitive followed."""
    case, backend = draw_case([600, 3], DTYPES[0], GROUPS[rule]), Triton()
    for _ in range(2):
        step(case, backend)
        with monkeypatch.context() as m:
            recorded = Recorded(backend, m)
            case.update(backend)
            case.compare()
            assert len(recorded.made) == 1
            case.norm(backend, ascent=True)


def test_a_first_step_inside_a_capture_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_sam.backends.triton.device.Device.capturing", lambda _: True)
    case = plain_case([3])
    with pytest.raises(RuntimeError, match="run one step with gradients for the same parameters first"):
        case.norm(Triton(), ascent=True)


def test_rows_of_blocks() -> None:
    case = draw_case([1, 512, 513, 2000], DTYPES[0])
    case.norm(Triton(), ascent=True)
    native = case.table.native
    assert native.blocks.first == [0, 1, 2, 4] and native.blocks.count == 8
    assert native._memory.tensor("block_row").tolist() == [0, 1, 2, 2, 3, 3, 3, 3]


@rules
def test_groups_that_the_table_does_not_have(rule: str) -> None:
    case, backend = draw_case([20, 3], DTYPES[0], GROUPS[rule][:2]), Triton()
    elsewhere = GROUPS[rule][2]._replace(lr=torch.tensor(0.1, dtype=torch.float64))
    case.groups = [*GROUPS[rule][:2], elsewhere, GROUPS[rule][3]]
    step(case, backend)


# ---- vectors --------------------------------------------------------------------------------------------------

VECTORS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),  # which the reference computes
]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", VECTORS, ids=str)
def test_dot(dtypes: tuple[torch.dtype, torch.dtype], shift: int) -> None:
    ours, twin = draw_pairs([*SIZES, 5000], *dtypes, shift=shift)
    sums, expected = torch.full((2, 8), 5.0, dtype=torch.float64)
    backend = Triton()
    for reset in (True, False):
        backend.dot(ours, sums, reset=reset)
        Reference().dot(twin, expected, reset=reset)
        torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-9)


def coefficients(a: float, b: float, *, on_host: bool) -> Tensor | tuple[float, float]:
    return (a, b) if on_host else torch.tensor([a, b, 9.0], dtype=torch.float64)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("to", ["x", "y", "x's dtype", "y's dtype"])
@pytest.mark.parametrize("dtypes", VECTORS, ids=str)
def test_axpby(dtypes: tuple[torch.dtype, torch.dtype], to: str, on_host: bool) -> None:
    ours, twin = draw_pairs(SIZES, *dtypes)

    def out(pair: VectorPair) -> list[Tensor]:
        if to in ("x", "y"):
            return pair.x if to == "x" else pair.y
        dtype = dtypes[0] if to == "x's dtype" else dtypes[1]
        return [torch.full_like(t, 7.0, dtype=dtype) for t in pair.x]

    found, expected = out(ours), out(twin)
    Triton().axpby(ours, found, coefficients(0.75, -1.5, on_host=on_host))
    Reference().axpby(twin, expected, coefficients(0.75, -1.5, on_host=on_host))
    assert_near(found, expected, "out")


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("zero", [0, 1])
def test_axpby_ignores_a_column_with_coefficient_zero(zero: int, on_host: bool) -> None:
    ours, _ = draw_pairs([600, 7], torch.float32, torch.float32)
    kept = (ours.y, ours.x)[zero]
    for t in (ours.x, ours.y)[zero]:
        t.fill_(NAN)
    out = [torch.empty_like(t) for t in ours.x]
    Triton().axpby(ours, out, coefficients(*((0.0, 2.0), (2.0, 0.0))[zero], on_host=on_host))
    assert_same_bits(out, [2 * t for t in kept])


@pytest.mark.parametrize("dtypes", VECTORS, ids=str)
def test_ema_of_tensors_at_other_addresses(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    ours, twin = draw_pairs(SIZES, *dtypes, shift=1)
    backend = Triton()
    for call in range(2):
        backend.ema(ours, 0.9)
        Reference().ema(twin, 0.9)
        assert_near(ours.x, twin.x, "ema")
        for a, b in zip(twin.x, ours.x, strict=True):
            a.copy_(b)  # so that each call is compared alone
        ours.y = [place(values(t.shape, 5 + call).to(t.dtype), call) for t in ours.y]
        twin.y = [t.clone() for t in ours.y]
