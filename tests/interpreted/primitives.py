"""The Triton kernels in Triton's interpreter against the reference, primitive by primitive.

Runs only where TRITON_INTERPRET was set before Python started: tests/test_triton_interpret.py starts it so.
"""

from __future__ import annotations

import math

import pytest
import support.triton_rounding  # noqa: F401  # rounds as GPUs do
import torch
import triton
import triton.language as tl
from fused_sam.backends.triton.layout import SEED, STREAM
from support.bits import assert_same_bits, same_bits
from support.draws import values
from support.triton_draws import ADAM_GROUPS, DTYPES, GROUPS, SIZES, Case, assert_near, draw_case, draw_lists, place
from torch import Tensor

from fused_sam.backends.contract import (
    DRAWS,
    INVERSE,
    MASK,
    NORM,
    ROUND_PERTURBED,
    ROUND_UPDATED,
    SKIP,
    SUM,
    UPDATE_NORM,
    Group,
    Lists,
)
from fused_sam.backends.reference import Reference
from fused_sam.backends.rng import chosen, mix, round_at_random, stream_key, words
from fused_sam.backends.triton.backend import Triton
from fused_sam.backends.triton.memory import Memory
from fused_sam.backends.triton.rng import words as words_of_a_block
from fused_sam.backends.triton.tables import Native
from fused_sam.backends.triton.updates import bias_correction

INF, NAN = float("inf"), float("nan")
PLAIN = [Group(0.05, False, 0.0, lr=0.1, momentum=0.9)]


def norm(case: Case, backend: Triton, *, scaled: bool = True, carry: bool = False) -> None:
    how = {"scaled": scaled, "carry": carry, "begin": True, "finish": True, "eps": 1e-12}
    backend.norm(case.table, case.groups, case.status, **how)
    Reference().norm(case.twin, case.groups, case.twin_status, **how)


def step(case: Case, backend: Triton) -> None:
    """A whole step on both, with the same gradients in both passes."""
    norm(case, backend)
    for b, t, s in ((backend, case.table, case.status), (Reference(), case.twin, case.twin_status)):
        b.perturb(t, case.groups, s)
    assert_near(case.table.weights, case.twin.weights, "perturbed weight")
    norm(case, backend, scaled=False, carry=True)
    for b, t, s in ((backend, case.table, case.status), (Reference(), case.twin, case.twin_status)):
        b.sgd(t, case.groups, s, None)
    assert_near(case.table.weights, case.twin.weights, "weight")
    assert_near(case.table.momenta, case.twin.momenta, "momentum")


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_step_over_sizes_and_groups(dtypes: tuple[torch.dtype, torch.dtype], shift: int) -> None:
    case = draw_case(SIZES, dtypes, shift=shift)
    norm(case, Triton())
    assert_near([case.status], [case.twin_status.to(torch.float64)], "status")
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
    norm(case, Triton())
    assert case.table.native.blocks.count > case.table.native.programs
    torch.testing.assert_close(case.status, case.twin_status, rtol=1e-6, atol=0)


def test_norm_is_the_same_every_time_and_leaves_its_counter_at_zero() -> None:
    case, backend = draw_case([5000, 7, 600], DTYPES[0]), Triton()
    sums = []
    for _ in range(3):
        norm(case, backend)
        sums.append(case.status.clone())
    assert_same_bits(sums[1:], sums[:1] * 2)


def test_norm_over_two_tables() -> None:
    a, b = draw_case([100, 33], DTYPES[0], PLAIN), draw_case([7], DTYPES[1], PLAIN)
    for backend, first, second, status in (
        (Triton(), a.table, b.table, a.status),
        (Reference(), a.twin, b.twin, a.twin_status),
    ):
        status[SKIP] = 1  # an earlier step's, which nothing carries on
        status[SUM] = 123
        backend.norm(first, PLAIN, status, scaled=True, carry=False, begin=True, finish=False, eps=0.0)
        assert status[SKIP] == 1 and status[NORM] == 0
        backend.norm(second, PLAIN, status, scaled=True, carry=False, begin=False, finish=True, eps=0.0)
        assert status[SKIP] == 0
    torch.testing.assert_close(a.status, a.twin_status, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_non_finite_gradient_changes_nothing(where: str, bad: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sizes = [513, 40, 5]
    row, element = {"first": (0, 0), "middle": (0, 512), "last": (2, 4)}[where]
    case, backend = draw_case(sizes, dtypes), Triton()
    case.table.gradients[row][element] = bad
    case.table.weights[1][3] = NAN  # a weight may hold anything: it is copied, not computed with
    weights = [w.clone() for w in case.table.weights]
    momenta = [None if m is None else m.clone() for m in case.table.momenta]
    for scaled in (True, False):
        case.status[SKIP] = 0
        backend.norm(case.table, case.groups, case.status, scaled=scaled, carry=True, begin=True, finish=True, eps=0.0)
        assert case.status[SKIP] == 1
    assert case.status[INVERSE] == 0 and not case.status[NORM].isfinite() and not case.status[UPDATE_NORM].isfinite()
    backend.perturb(case.table, case.groups, case.status)
    assert_same_bits(case.table.weights, weights)
    assert_same_bits(case.table.backups, weights)
    for w in case.table.weights:
        w.fill_(3)  # what a perturbation by an earlier, good gradient may have left
    backend.sgd(case.table, case.groups, case.status, None)
    assert_same_bits(case.table.weights, weights)
    assert all((m is None and n is None) or same_bits(m, n) for m, n in zip(case.table.momenta, momenta, strict=True))


def test_skip_is_carried_only_where_asked() -> None:
    case, backend = draw_case([20], DTYPES[0], PLAIN), Triton()
    for carry in (True, False):
        case.status[SKIP] = 1
        backend.norm(case.table, PLAIN, case.status, scaled=False, carry=carry, begin=True, finish=True, eps=0.0)
        assert case.status[SKIP] == carry


def test_restore_copies_bits() -> None:
    case, backend = draw_case([513, 16, 7], DTYPES[1]), Triton()
    case.table.backups[1].view(torch.int16).fill_(0x7FA1)  # a signalling NaN with a payload
    backend.restore(case.table)
    assert_same_bits(case.table.weights, case.table.backups)


def test_weights_that_were_not_perturbed_are_their_own_backups() -> None:
    case, backend = draw_case(SIZES, DTYPES[0], perturbed=False), Triton()
    norm(case, backend, scaled=False)
    backend.sgd(case.table, case.groups, case.status, None)
    Reference().sgd(case.twin, case.groups, case.twin_status, None)
    assert_near(case.table.weights, case.twin.weights, "weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_scale(dtype: torch.dtype) -> None:
    case, backend = draw_case([600, 3], DTYPES[0]), Triton()
    scale = torch.tensor(1024.0, dtype=dtype)
    backend.sgd(case.table, case.groups, case.status, scale)
    Reference().sgd(case.twin, case.groups, case.twin_status, scale)
    assert_near(case.table.weights, case.twin.weights, "weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_learning_rate_on_the_device_acts_without_being_read(dtype: torch.dtype) -> None:
    case, backend = draw_case([600, 3], DTYPES[0]), Triton()
    rate = torch.tensor(0.5, dtype=dtype)
    case.groups = [g._replace(lr=rate) if k % 2 else g for k, g in enumerate(case.groups)]
    for value in (0.5, 0.125):
        rate.fill_(value)
        backend.sgd(case.table, case.groups, case.status, None)
        Reference().sgd(case.twin, case.groups, case.twin_status, None)
        assert_near(case.table.weights, case.twin.weights, "weight")


def test_dampened_momentum_is_never_minus_zero() -> None:
    groups = [Group(0.0, False, 0.0, lr=0.1, momentum=0.9, dampening=0.5)]
    case, backend = draw_case([40], DTYPES[0], groups), Triton()
    for g in case.table.gradients:
        g.fill_(-0.0)
    backend.sgd(case.table, groups, case.status, None)
    (m,) = case.table.momenta
    assert m is not None and not m.signbit().any() and not m.any()


# ---- Adam, masters, random numbers: beside tests/test_primitives.py, what is the kernels' own ----------------------


def adam(case: Case, backend: Triton) -> None:
    backend.adam(case.table, case.groups, case.status, None)
    Reference().adam(case.twin, case.groups, case.twin_status, None)
    for column in ("weights", "momenta", "squares", "largest", "models", "steps"):
        assert_near(getattr(case.table, column), getattr(case.twin, column), column)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_adam_over_sizes_and_groups(dtypes: tuple[torch.dtype, torch.dtype], shift: int) -> None:
    case, backend = draw_case(SIZES, dtypes, ADAM_GROUPS, shift=shift, adam=True), Triton()
    norm(case, backend, scaled=False)
    adam(case, backend)


def test_adam_of_masters_that_are_not_aligned() -> None:
    case, backend = draw_case(SIZES, DTYPES[0], ADAM_GROUPS, shift=1, adam=True, model=torch.bfloat16), Triton()
    adam(case, backend)


def test_adam_counts_the_steps_of_many_tensors_once_a_call() -> None:
    """128 at a time; and not where the step is skipped."""
    case, backend = draw_case([3] * 130, DTYPES[0], ADAM_GROUPS, adam=True), Triton()
    for skip in (0, 1):
        case.status[SKIP] = skip
        backend.adam(case.table, case.groups, case.status, None)
        assert [float(t) for t in case.table.steps] == [float(i + 1) for i in range(130)]
    assert not case.table.native._memory.tensor("counter").any()


@triton.jit
def _corrections(log_beta, out, first, BLOCK: tl.constexpr):
    t = first + tl.arange(0, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), bias_correction(tl.load(log_beta), t.to(tl.float32)))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_bias_correction(beta: float) -> None:
    """1 - beta^t to 4 half units of the last place of fp32; log(beta) and its product with t are rounded before."""
    log_beta = torch.tensor([math.log(beta) if beta else -math.inf], dtype=torch.float32)
    for first in (1, 5000, 500_000, 999_000):
        out = torch.empty(8192)
        _corrections[(1,)](log_beta, out, first, 8192)
        t = torch.arange(first, first + 8192, dtype=torch.float64)
        expected = -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)
        assert ((out.double() - expected).abs() / expected).max() < 4 * 2**-24


@triton.jit
def _words(group, entry, status, begin, out, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    word = words_of_a_block(group, entry, status, tl.load(begin), PURPOSE, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), word.to(tl.int64))


@pytest.mark.parametrize("begin", [0, 2048, 2**31, 2**32 - 512, 2**32, 5 * 2**32 + 1024, 2**40])
@pytest.mark.parametrize("purpose", [MASK, ROUND_PERTURBED, ROUND_UPDATED])
def test_words_at_any_place_of_a_tensor(purpose: int, begin: int) -> None:
    """Places from 2^31 on as well, which no test can fill with weights."""
    seed, draw, stream = 0xFEDCBA9876543210, 16_777_215, 2**31 - 1
    group, entry, status = torch.zeros(32), torch.zeros(16, dtype=torch.int64), torch.zeros(8)
    group[SEED : SEED + 2].view(torch.int64)[0] = seed - 2**64
    entry[STREAM] = stream
    status[DRAWS] = draw
    out = torch.zeros(512, dtype=torch.int64)
    _words[(1,)](group, entry, status, torch.tensor([begin]), out, purpose, 512)
    a, b = stream_key(seed, draw, stream, purpose)
    i = begin + torch.arange(512)
    mask = 0xFFFFFFFF
    assert torch.equal(out, mix(mix((i + a) & mask) ^ ((b + (i >> 32) * 0x9E3779B9) & mask)))
    if begin == 0:
        assert torch.equal(out, words((a, b), torch.empty(512)))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_masks_over_several_blocks(shift: int, stochastic: bool) -> None:
    groups = [g._replace(share=share) for g, share in zip(GROUPS, (0.5, 1.0, 0.1, 0.9), strict=True)]
    dtypes = DTYPES[1] if stochastic else DTYPES[0]
    case, backend = draw_case([1030, 600, 2000, 17, 1], dtypes, groups, shift=shift, stochastic=stochastic), Triton()
    for status in (case.status, case.twin_status):
        status[INVERSE], status[DRAWS] = 0.25, 3
    before = [w.clone() for w in case.table.weights]
    backend.perturb(case.table, groups, case.status)
    Reference().perturb(case.twin, groups, case.twin_status)
    assert_near(case.table.weights, case.twin.weights, "weight")
    for i, (now, w) in enumerate(zip(case.table.weights, before, strict=True)):
        key = stream_key(case.table.seed, 3, case.table.streams[i], MASK)
        still = ~chosen(key, w, groups[case.table.groups[i]].share)
        assert_same_bits([now[still]], [w[still]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adam_rounds_at_random(dtype: torch.dtype) -> None:
    """A step of Adam without a gradient's weight: what is rounded is known, so that the result is, to the bit."""
    groups = [Group(0.0, False, 0.0, lr=0.5, weight_decay=0.001, decoupled=True, beta1=0.0)]
    case, backend = draw_case([700, 33], (dtype, dtype), groups, adam=True, stochastic=True), Triton()
    for g in case.table.gradients:
        g.zero_()
    before = [b.clone() for b in case.table.backups]
    case.status[DRAWS] = 9
    backend.adam(case.table, groups, case.status, None)
    for i, (w, b) in enumerate(zip(case.table.weights, before, strict=True)):
        exact = b.float() * (1 - torch.tensor(0.5) * torch.tensor(0.001))
        key = stream_key(case.table.seed, 9, case.table.streams[i], ROUND_UPDATED)
        assert_same_bits([w], [round_at_random(exact, key, dtype)])


def test_a_new_seed_or_share_is_sent() -> None:
    case, backend = draw_case([600], DTYPES[0], PLAIN), Triton()
    case.status[INVERSE] = case.twin_status[INVERSE] = 0.25
    start, seen = case.table.weights[0].clone(), []
    for seed, share in ((1, 1.0), (1, 0.5), (2**63, 0.5), (1, 0.5)):
        case.table.seed = case.twin.seed = seed
        case.table.weights[0].copy_(start)
        case.twin.weights[0].copy_(start)
        groups = [PLAIN[0]._replace(share=share)]
        backend.perturb(case.table, groups, case.status)
        Reference().perturb(case.twin, groups, case.twin_status)
        assert_near(case.table.weights, case.twin.weights, "weight")
        seen.append(case.table.weights[0].clone())
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
    case, backend = draw_case([600, 3], DTYPES[0], PLAIN), Triton()
    step(case, backend)
    memory = case.table.native._memory
    assert sent[0] == memory.sent and set(sent[1:]) <= {memory.changing}
    sent.clear()
    step(case, backend)
    assert sent == []
    case.attach([g.clone() for g in case.table.gradients])  # the same numbers at other addresses
    step(case, backend)
    assert sent == [memory.changing]
    sent.clear()
    case.groups = [case.groups[0]._replace(lr=0.01)]
    norm(case, backend)
    assert sent == []  # the perturbation has no use for a learning rate
    step(case, backend)
    assert sent == [memory.changing]


class Recorded:
    """A capture, played by hand: what it would replay is the copy out of pinned memory, and its own device memory."""

    def __init__(self, backend: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Memory, Tensor]] = []
        monkeypatch.setattr("fused_sam.backends.triton.tables.Device.capturing", lambda _: True)
        send = Memory.send_in_graph

        def recording(memory: Memory, pinned: Tensor) -> None:
            send(memory, pinned)
            self.made.append((memory, pinned))

        monkeypatch.setattr(Memory, "send_in_graph", recording)
        backend._reserve._piece = torch.empty(1 << 14, dtype=torch.int64)


def test_a_capture_shares_nothing_with_steps_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    case, backend = draw_case([600, 3], DTYPES[0], PLAIN), Triton()
    step(case, backend)
    eager = case.table.native._memory
    before = eager.words.clone()
    with monkeypatch.context() as m:
        recorded = Recorded(backend, m)
        case.attach([g.clone() for g in case.table.gradients])
        step(case, backend)
    assert len(recorded.made) == 2, "one copy a table and pass: the norm's serves the primitive after it"
    assert torch.equal(eager.words[: eager.sent], before[: eager.sent])
    kept = [(memory.words.clone(), pinned.clone()) for memory, pinned in recorded.made]
    case.attach([g.clone() for g in case.table.gradients])
    case.groups = [case.groups[0]._replace(lr=0.01, rho=0.3)]
    step(case, backend)
    for (memory, pinned), (sent, copy) in zip(recorded.made, kept, strict=True):
        assert memory is not case.table.native._memory
        assert torch.equal(pinned, copy) and torch.equal(memory.words[: memory.sent], sent[: memory.sent])


def test_a_first_step_inside_a_capture_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_sam.backends.triton.tables.Device.capturing", lambda _: True)
    case = draw_case([3], DTYPES[0], PLAIN)
    with pytest.raises(RuntimeError, match="run one step with gradients for the same parameters first"):
        norm(case, Triton())


def test_owners_of_blocks() -> None:
    case = draw_case([1, 512, 513, 2000], DTYPES[0])
    native: Native = case.table.native or _native_of(case)
    assert native.blocks.first == [0, 1, 2, 4] and native.blocks.count == 8
    assert native.new_memory().tensor("owner").numel() == 8


def _native_of(case: Case) -> Native:
    norm(case, Triton())
    return case.table.native


# ---- P4 to P6 -------------------------------------------------------------------------------------------------

COLUMNS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),  # which the reference serves
]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("columns", COLUMNS, ids=str)
def test_dots(columns: tuple[torch.dtype, torch.dtype], shift: int) -> None:
    ours, twin = draw_lists([*SIZES, 5000], *columns, shift=shift)
    sums, expected = torch.full((2, 8), 5.0, dtype=torch.float64)
    backend = Triton()
    for begin in (True, False):
        backend.dots(ours, sums, begin=begin)
        Reference().dots(twin, expected, begin=begin)
        torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("third", [None, "x", "y", "x's dtype", "y's dtype"])
@pytest.mark.parametrize("columns", COLUMNS, ids=str)
def test_combine(columns: tuple[torch.dtype, torch.dtype], third: str | None) -> None:
    ours, twin = draw_lists(SIZES, *columns)
    coefficients = torch.tensor([0.75, -1.5, 9.0], dtype=torch.float64)

    def out(lists: Lists) -> list[Tensor]:
        if third in (None, "x"):
            return lists.x
        if third == "y":
            return lists.y
        dtype = columns[0] if third == "x's dtype" else columns[1]
        return [torch.full_like(t, 7.0, dtype=dtype) for t in lists.x]

    found, expected = out(ours), out(twin)
    Triton().combine(ours, found, coefficients)
    Reference().combine(twin, expected, coefficients)
    assert_near(found, expected, "combination")


@pytest.mark.parametrize("zero", [0, 1])
def test_combine_ignores_what_has_no_weight(zero: int) -> None:
    ours, _ = draw_lists([600, 7], torch.float32, torch.float32)
    kept = (ours.y, ours.x)[zero]
    for t in (ours.x, ours.y)[zero]:
        t.fill_(NAN)
    coefficients = torch.tensor([2.0, 2.0], dtype=torch.float64)
    coefficients[zero] = 0
    out = [torch.empty_like(t) for t in ours.x]
    Triton().combine(ours, out, coefficients)
    assert_same_bits(out, [2 * t for t in kept])


@pytest.mark.parametrize("columns", COLUMNS, ids=str)
def test_average_of_tensors_that_move(columns: tuple[torch.dtype, torch.dtype]) -> None:
    ours, twin = draw_lists(SIZES, *columns, shift=1)
    backend = Triton()
    for turn in range(2):
        backend.average(ours, 0.9)
        Reference().average(twin, 0.9)
        assert_near(ours.x, twin.x, "average")
        for a, b in zip(twin.x, ours.x, strict=True):
            a.copy_(b)  # the next turn is compared alone
        ours.y = [place(values(t.shape, 5 + turn).to(t.dtype), turn) for t in ours.y]
        twin.y = [t.clone() for t in ours.y]


def test_groups_that_the_table_does_not_have() -> None:
    case, backend = draw_case([20, 3], DTYPES[0], GROUPS[:2]), Triton()
    case.groups = [*GROUPS[:2], Group(0.1, False, 0.0, lr=torch.tensor(0.1, dtype=torch.float64)), GROUPS[3]]
    step(case, backend)
