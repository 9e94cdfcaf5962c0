"""Every backend's primitives equal those of `reference`, table by table.

The tests cover dtypes, masters, stochastic rounding, masks, clipping, update rules and skipped steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.backends import VARIANTS, Variant
from support.bits import assert_same_bits
from support.draws import values
from support.tables import (
    BF16,
    F16,
    F32,
    F64,
    KINDS,
    MASTERS,
    PERTURB_GROUPS,
    PLAIN,
    STOCHASTIC,
    Group,
    Kind,
    Pair,
    addressed,
    assert_near,
    assert_unchanged,
    backend_for,
    columns,
    draw_table,
    primary,
    status_with,
)
from torch import Tensor

from fused_sam.backends.contract import (
    ADAM,
    ASCENT_NORM,
    INVERSE_NORM,
    LION,
    MASK,
    RNG_OFFSET,
    ROUND_PERTURBED,
    ROUND_UPDATED,
    SKIP,
    SUM,
    UPDATE_NORM,
    AdamGroup,
    LionGroup,
    PerturbGroup,
    SGDGroup,
    Table,
    UpdateRule,
    VectorPair,
    finish_norm,
)
from fused_sam.backends.rng import mask_of, round_stochastically, stream_key

SUBJECTS = [v for v in VARIANTS if v.name != "reference"]

# Groups of each update rule, which cover all of its options.
GROUPS: dict[str, Sequence[Group]] = {
    "sgd": [
        SGDGroup(0.1),
        SGDGroup(0.2, momentum=0.9, weight_decay=0.03),
        SGDGroup(0.05, momentum=0.8, dampening=0.3, maximize=True),
        SGDGroup(0.3, momentum=0.7, nesterov=True, weight_decay=0.01),
    ],
    # The eps is far above rounding. With 1e-8, rounding of a gradient near 0 would decide the sign of an element.
    "adam": [
        AdamGroup(0.1, 0.8, 0.95, eps=1e-3, weight_decay=0.05),
        AdamGroup(0.2, 0.9, 0.99, eps=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
        AdamGroup(0.05, 0.0, 0.9, eps=1e-3, maximize=True, amsgrad=True),
        AdamGroup(0.3, 0.7, 0.8, eps=1e-1, decoupled_weight_decay=True, amsgrad=True),
    ],
    # The betas are 0 and on both sides of 0.5, where the moving average changes its formula.
    "lion": [
        LionGroup(0.1, weight_decay=0.05),
        LionGroup(0.2, 0.7, 0.3),
        LionGroup(0.05, 0.0, 0.6, maximize=True),
        LionGroup(0.3, 0.3, 0.0, weight_decay=0.2),
    ],
}
SGD_GROUPS = GROUPS["sgd"]

rules = pytest.mark.parametrize("rule", GROUPS)


@pytest.fixture(params=SUBJECTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Any:  # replaces conftest's fixture, which includes `reference`
    with request.param.active():
        yield request.param


def kinds(of: Sequence[Kind]) -> Any:
    return pytest.mark.parametrize("kind", of, ids=str)


# ---- the passes of a step ---------------------------------------------------------------------------------


def assert_same_norms(pair: Pair) -> None:
    # The sums add 17,451 squares in fp32. 1e-5 is above their rounding, and far below the error of a lost tensor.
    for place in (ASCENT_NORM, INVERSE_NORM, UPDATE_NORM):
        wanted = float(pair.twin_status.values[place])
        assert float(pair.status.values[place]) == pytest.approx(wanted, rel=1e-5)
    assert pair.status.skip == 0
    assert pair.status.rng_offset == 7


@kinds(KINDS)
def test_norm(variant: Variant, kind: Kind) -> None:
    pair = Pair(variant, kind, SGD_GROUPS)
    pair.set_status({SUM: 1e6})  # from an earlier norm
    pair.norm(ascent=True, eps=0.25)
    pair.norm(ascent=False, keep_skip=True, eps=0.25)
    assert_same_norms(pair)


@kinds([*PLAIN[:3], MASTERS[0]])
@pytest.mark.parametrize("ascent", [True, False])
def test_norm_over_several_tables(variant: Variant, kind: Kind, ascent: bool) -> None:
    """norm() equals accumulate_norm() of all tables, from zero, and finish_norm()."""
    pair = Pair(variant, kind, SGD_GROUPS)
    more = draw_table(kind, SGD_GROUPS, [(3,), (70001,)], perturbed=True, seed=50)
    twin = draw_table(kind, SGD_GROUPS, [(3,), (70001,)], perturbed=True, seed=50)
    groups = PERTURB_GROUPS if ascent else None
    single = status_with({RNG_OFFSET: 7.0, SUM: 0.0})
    pair.set_status({SUM: 1e6, SKIP: 1.0})
    pair.backend.norm([pair.table, more], groups, pair.status, keep_skip=False, eps=0.25)
    pair.reference.norm([pair.twin, twin], groups, pair.twin_status, keep_skip=False, eps=0.25)
    assert_same_norms(pair)
    for table in (pair.table, more):
        pair.backend.accumulate_norm(table, groups, single)
    pair.backend.finish_norm(single, ascent=ascent, keep_skip=False, eps=0.25)
    places = (SUM, *([ASCENT_NORM, INVERSE_NORM] if ascent else [UPDATE_NORM]))
    for place in places:
        assert float(single.values[place]) == pytest.approx(float(pair.status.values[place]), rel=1e-6)


@pytest.mark.parametrize("keep_skip", [True, False])
def test_norm_over_no_table(variant: Variant, keep_skip: bool) -> None:
    status = status_with({SUM: 9.0, ASCENT_NORM: 3.0, SKIP: 1.0})
    backend_for(variant, Kind(F32, F32)).norm([], PERTURB_GROUPS, status, keep_skip=keep_skip, eps=0.5)
    assert status.ascent_norm == 0 and status.inverse_norm == 2 and status.skip == float(keep_skip)


@kinds(KINDS)
def test_perturb(variant: Variant, kind: Kind) -> None:
    pair = Pair(variant, kind, SGD_GROUPS)
    before = [t.clone() for t in primary(pair.table)]
    pair.perturb()
    pair.compare()
    assert not torch.equal(pair.table.params[4], before[4].to(kind.param))
    if kind.masters:
        assert_unchanged(pair.table.masters, before, "masters")
    else:
        assert_unchanged(pair.table.backups, before, "backups")


@rules
@kinds(KINDS)
@pytest.mark.parametrize("scale", [None, 16.0])
def test_update(variant: Variant, kind: Kind, rule: str, scale: float | None) -> None:
    pair = Pair(variant, kind, GROUPS[rule])
    pair.perturb()
    pair.update(scale)
    pair.compare()
    if rule == "adam":
        assert [float(t) for t in pair.table.state["step"] if t is not None] == [3.0 * i + 1 for i in range(5)]


@rules
@kinds(KINDS)
def test_update_of_params_that_were_not_perturbed(variant: Variant, kind: Kind, rule: str) -> None:
    pair = Pair(variant, kind, GROUPS[rule], perturbed=False)
    pair.update()
    pair.compare()
    if rule == "adam" or kind.param in (F32, F64):  # otherwise params near 0 may differ by ulps of larger ones
        pair.update()
        pair.compare()


@kinds(KINDS)
def test_restore(variant: Variant, kind: Kind) -> None:
    pair = Pair(variant, kind, SGD_GROUPS)
    before = [t.clone() for t in primary(pair.table)]
    pair.perturb()
    pair.restore()
    assert_unchanged(primary(pair.table), before, "params")
    assert_same_bits(pair.table.params, [w.to(kind.param) for w in before])


@rules
@kinds([KINDS[0], MASTERS[0], STOCHASTIC[0]])
def test_learning_rate_in_a_tensor(variant: Variant, kind: Kind, rule: str) -> None:
    pair = Pair(variant, kind, [g._replace(lr=torch.tensor(0.15)) for g in GROUPS[rule]])
    pair.perturb()
    pair.update()
    pair.compare()


# ---- clipping ---------------------------------------------------------------------------------------------


@rules
@kinds([*PLAIN, MASTERS[0], STOCHASTIC[0]])
@pytest.mark.parametrize("scale", [None, 16.0])
@pytest.mark.parametrize("limit", [100.0, 2.5, math.inf, 10.5])
def test_clipping(variant: Variant, kind: Kind, rule: str, scale: float | None, limit: float) -> None:
    """The norm is 160 with the loss scale. 100 clips without a scale, and 10.5 does not clip with a scale of 16."""
    pair = Pair(variant, kind, GROUPS[rule])
    pair.perturb()
    pair.update(scale, limit)
    pair.compare()


@kinds([Kind(F64, F64), Kind(F32, F32)])
@pytest.mark.parametrize("limit", [3.0, 1e4])
def test_clipping_equals_torchs(variant: Variant, kind: Kind, limit: float) -> None:
    pair = Pair(variant, kind, [SGDGroup(0.1)], perturbed=False)
    twins = [torch.nn.Parameter(w.double()) for w in pair.table.params]
    for p, g in zip(twins, pair.table.grads, strict=True):
        p.grad = g.double()
    torch.nn.utils.clip_grad_norm_(twins, limit)
    torch.optim.SGD(twins, lr=0.1).step()
    pair.norm(ascent=False)
    pair.update(max_norm=limit)
    for found, wanted in zip(pair.table.params, twins, strict=True):
        assert_near(found, wanted.detach().to(kind.param), "params")


# ---- Adam equals torch, Lion the paper --------------------------------------------------------------------

SHAPES = [(1,), (33,), (5, 205)]


def train(
    variant: Variant, kind: Kind, rule: UpdateRule, group: Group, follow: Callable[[list[Tensor]], None]
) -> Table:
    """Take seven steps from initial state. `follow` gets the float64 gradients of each step before the backend."""
    backend = backend_for(variant, kind)
    params = [values(s, i, kind.param) for i, s in enumerate(SHAPES)]
    state: dict[str, list[Tensor | None]] = {
        c.name: [torch.zeros(()) if c.scalar else torch.full_like(p, c.init) for p in params] for c in rule.columns
    }
    table = Table(params, [0] * len(params), kind.grad, backups=params, rule=rule, state=state)
    status = status_with({})
    for step in range(7):
        table.grads = [values(s, 100 * step + 50 + i, kind.grad) for i, s in enumerate(SHAPES)]
        table.grad_addresses = addressed(table.grads)
        follow([g.double() for g in table.grads])
        backend.update(table, [group], status, None, math.inf)
    return table


ADAMS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
    "adamw-amsgrad-maximize": {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True, "maximize": True, "eps": 1e-4},
    "adam": {"lr": 0.03, "eps": 1e-4},
    "adam-l2-amsgrad": {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 0.1, "amsgrad": True},
    "adam-l2-maximize": {"lr": 0.03, "eps": 1e-4, "weight_decay": 0.05, "maximize": True},
}


@kinds([Kind(F64, F64), Kind(F32, F32)])
@pytest.mark.parametrize("name", ADAMS)
def test_adam_equals_torchs(variant: Variant, kind: Kind, name: str) -> None:
    """Seven steps from initial state equal those of torch.optim in float64."""
    options = ADAMS[name]
    cls = torch.optim.AdamW if name.startswith("adamw") else torch.optim.Adam
    twins = [torch.nn.Parameter(values(s, i, kind.param).double()) for i, s in enumerate(SHAPES)]
    theirs = cls(twins, foreach=False, **options)
    group = AdamGroup(
        options["lr"],
        *options.get("betas", (0.9, 0.999)),
        eps=options["eps"],
        weight_decay=options.get("weight_decay", 0.0),
        decoupled_weight_decay=cls is torch.optim.AdamW,
        amsgrad=options.get("amsgrad", False),
        maximize=options.get("maximize", False),
    )

    def follow(grads: list[Tensor]) -> None:
        for p, g in zip(twins, grads, strict=True):
            p.grad = g
        theirs.step()

    table = train(variant, kind, ADAM, group, follow)
    for i, p in enumerate(twins):
        assert_near(table.params[i], p.detach().to(kind.param), "params")
        for column, wanted in theirs.state[p].items():
            found = table.state[column][i]
            assert found is not None
            assert_near(found, wanted.to(found.dtype), column)
        assert theirs.state[p]["step"] == 7


@kinds([Kind(F64, F64), Kind(F32, F32)])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.75, 0.6), (0.4, 0.95)])
def test_lion_equals_the_papers(
    variant: Variant, kind: Kind, betas: tuple[float, float], decay: float, maximize: bool
) -> None:
    """Seven steps from initial state equal algorithm 2 of arXiv 2302.06675, written out in float64."""
    (b1, b2), lr = betas, 0.05
    twins = [values(s, i, kind.param).double() for i, s in enumerate(SHAPES)]
    means = [torch.zeros_like(w) for w in twins]

    def follow(grads: list[Tensor]) -> None:
        for w, m, gradient in zip(twins, means, grads, strict=True):
            g = -gradient if maximize else gradient
            c = b1 * m + (1 - b1) * g
            assert (c.abs() > 1e-6).all()  # rounding must not decide a sign
            w.sub_(lr * (torch.sign(c) + decay * w))
            m.copy_(b2 * m + (1 - b2) * g)

    table = train(variant, kind, LION, LionGroup(lr, b1, b2, decay, maximize), follow)
    for i, (w, m) in enumerate(zip(twins, means, strict=True)):
        found = table.state["exp_avg"][i]
        assert found is not None
        assert_near(table.params[i], w.to(kind.param), "params")
        assert_near(found, m.to(kind.param), "exp_avg")


@kinds(PLAIN)
def test_lion_at_zero_and_nan(variant: Variant, kind: Kind) -> None:
    """Where sign() is 0, only weight decay acts. A NaN in the state reaches the params."""
    pair = Pair(variant, kind, [LionGroup(0.5, weight_decay=0.25)], [(70,)], perturbed=False)
    pair.replace("params", [torch.ones(70)])
    pair.replace("grads", [torch.zeros(70)])
    means = pair.table.state["exp_avg"][0]
    assert means is not None
    means.zero_()[5] = math.nan
    means[6], means[7], means[8] = -0.0, 1.0, -1.0
    pair.backend.update(pair.table, [LionGroup(0.5, weight_decay=0.25)], pair.status, None, math.inf)
    wanted = torch.full((70,), 0.875, dtype=kind.param)
    wanted[5], wanted[7], wanted[8] = math.nan, 0.375, 1.375
    torch.testing.assert_close(pair.table.params[0], wanted, rtol=0, atol=0, equal_nan=True)


# ---- skipped steps ----------------------------------------------------------------------------------------


@rules
@kinds(KINDS)
def test_a_skipped_step_changes_no_bit(variant: Variant, kind: Kind, rule: str) -> None:
    masked = [g._replace(mask_prob=0.5) for g in PERTURB_GROUPS]
    pair = Pair(variant, kind, GROUPS[rule], perturb_groups=masked)
    odd = [w.index_fill(0, torch.tensor([0]), -0.0) for w in primary(pair.table)]  # a copy keeps the sign of -0.0
    odd[2][5] = math.inf
    pair.replace_primary(odd)
    before = pair.copies()
    pair.set_status({SKIP: 1.0, INVERSE_NORM: 0.0, UPDATE_NORM: math.inf})
    pair.perturb()
    assert_unchanged(pair.table.params, before["params"], "params")
    if not kind.masters:
        assert_unchanged(pair.table.backups, before["params"], "backups")
        for p in pair.table.params:
            p.fill_(3.0)
    pair.update(max_norm=1.0)
    for name, column in columns(pair.table).items():
        if name not in ("params", "backups"):
            assert_unchanged(column, before[name], name)
    assert_same_bits(pair.table.params, [w.to(kind.param) for w in odd])


# ---- vectors ----------------------------------------------------------------------------------------------


def draw_vectors(dx: torch.dtype, dy: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    x, y = ([values((n,), 10 * c + i, d) for i, n in enumerate((7, 1025, 16385))] for c, d in enumerate((dx, dy)))
    return x, y


VECTOR_DTYPES = [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F32), (F64, F64)]


@pytest.mark.parametrize("skip", [False, True])
def test_axpby_and_ema_respect_skip(variant: Variant, skip: bool) -> None:
    backend = backend_for(variant, Kind(F32, F32))
    status = status_with({SKIP: float(skip)})
    for dx, dy in VECTOR_DTYPES[:3]:
        x, y = draw_vectors(dx, dy)
        pair = VectorPair([t.clone() for t in x], y)
        out = [torch.full_like(t, 7.0) for t in y]
        backend.axpby(pair, out, torch.tensor([2.0, -0.5], dtype=status.values.dtype), status)
        backend.ema(pair, 0.75, status)
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            if skip:
                assert_same_bits([out[i], pair.x[i]], [torch.full_like(b, 7.0), a])
            else:
                assert_near(out[i], (2.0 * a.float() - 0.5 * b.float()).to(dy), "axpby")
                assert_near(pair.x[i], (0.75 * a.float() + 0.25 * b.float()).to(dx), "ema")


@pytest.mark.parametrize(("dx", "dy"), VECTOR_DTYPES)
@pytest.mark.parametrize("on_host", [True, False])
def test_axpby_into_each_column(variant: Variant, dx: torch.dtype, dy: torch.dtype, on_host: bool) -> None:
    """The coefficients are numbers or a tensor. A column with coefficient 0 has no effect."""
    backend = backend_for(variant, Kind(F32, F32))
    for a, b in ((2.0, -0.5), (0.0, 1.5), (0.25, 0.0), (0.0, 0.0)):
        coefficients = (a, b) if on_host else torch.tensor([a, b], dtype=torch.float64)
        for target in ("x", "y", "third"):
            x, y = draw_vectors(dx, dy)
            for column, c in ((x, a), (y, b)):
                if c == 0:
                    column[1][3] = math.nan
            wide = F64 if dx is F64 else F32
            wanted = [
                torch.nan_to_num(p.to(wide)) * a + torch.nan_to_num(q.to(wide)) * b for p, q in zip(x, y, strict=True)
            ]
            out = {"x": x, "y": y, "third": [torch.full_like(t, 7.0) for t in x]}[target]
            backend.axpby(VectorPair(x, y), out, coefficients)
            for o, w in zip(out, wanted, strict=True):
                assert_near(o, w.to(o.dtype), f"{a} x + {b} y in {target}")


@pytest.mark.parametrize(("dx", "dy"), VECTOR_DTYPES)
def test_dot(variant: Variant, dx: torch.dtype, dy: torch.dtype) -> None:
    backend = backend_for(variant, Kind(F32, F32))
    x, y = draw_vectors(dx, dy)
    wanted = torch.zeros(3, dtype=torch.float64)
    for p, q in zip(x, y, strict=True):
        u, v = p.double(), q.double()
        wanted += torch.stack([(u * v).sum(), (u * u).sum(), (v * v).sum()])
    sums, pair = torch.full((3,), 1e6, dtype=torch.float64), VectorPair(x, y)
    backend.dot(pair, sums, reset=True)
    # The terms of <x, y> cancel, so that its limit is relative to the norms.
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=1e-5 * float(wanted[1]))
    backend.dot(pair, sums, reset=False)
    torch.testing.assert_close(sums, 2 * wanted, rtol=1e-5, atol=1e-5 * float(wanted[1]))


# ---- the end of a norm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ascent", [True, False])
@pytest.mark.parametrize("keep_skip", [True, False])
@pytest.mark.parametrize("skip", [0.0, 1.0])
@pytest.mark.parametrize("total", [0.0, 6.25, math.inf, math.nan])
def test_finish_norm(variant: Variant, total: float, skip: float, keep_skip: bool, ascent: bool) -> None:
    """finish_norm() works on a sum from another source."""
    backend = backend_for(variant, Kind(F32, F32))
    numbers = {SUM: total, ASCENT_NORM: 3.0, UPDATE_NORM: 4.0, SKIP: skip, RNG_OFFSET: 5.0}
    found, wanted = status_with(numbers), status_with(numbers)
    backend.finish_norm(found, ascent=ascent, keep_skip=keep_skip, eps=0.5)
    finish_norm(wanted, ascent=ascent, keep_skip=keep_skip, eps=0.5)
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-6, atol=0, equal_nan=True)


# ---- random numbers ---------------------------------------------------------------------------------------

# Numbers around every case of rounding: subnormals, fp16's largest number, larger numbers, inf and NaN.
EDGES = [
    0.0, 1e-45, 2.0**-26, 2.0**-24, 1.5 * 2.0**-24, 2.0**-14 - 2.0**-26, 2.0**-14, 1.0, 65503.9, 65504.0, 65519.9,
    65520.0, 1e6, 3.3e38, 3.4028234e38, math.inf, math.nan,
]  # fmt: skip


def every_magnitude(n: int, seed: int) -> Tensor:
    """Return fp32 numbers of all magnitudes of bf16 and fp16, and the edges."""
    x = values((n,), seed, F32) * 2.0 ** (values((n,), seed + 1, F32).mul(8).clamp(-27, 17)).round()
    edges = torch.tensor(EDGES + [-e for e in EDGES])
    x[: len(edges)] = edges
    return x


@pytest.mark.parametrize("purpose", [ROUND_PERTURBED, ROUND_UPDATED])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 16777215])
def test_stochastic_rounding_is_bit_equal(variant: Variant, dtype: torch.dtype, purpose: int, offset: int) -> None:
    """With params of 0 the result before rounding is the gradient exactly, so that only rounding may differ."""
    groups, perturb_groups = [SGDGroup(1.0, maximize=True)], [PerturbGroup(1.0)]
    pair = Pair(variant, Kind(dtype, F32, stochastic=True), groups, [(3000,), (1,)], perturb_groups=perturb_groups)
    pair.set_status({INVERSE_NORM: 1.0, RNG_OFFSET: offset})
    grads = [every_magnitude(3000, 5), torch.tensor([1.0 + 2**-12])]
    pair.replace("grads", grads)
    pair.replace("params", [torch.zeros(3000), torch.zeros(1)])
    pair.replace("backups", [torch.zeros(3000), torch.zeros(1)])
    if purpose == ROUND_PERTURBED:
        pair.perturb()
    else:
        pair.update()
    for table in (pair.table, pair.twin):
        for i, (w, g) in enumerate(zip(table.params, grads, strict=True)):
            key = stream_key(table.seed, offset, table.rng_streams[i], purpose)
            wanted = round_stochastically(g, key, dtype)
            torch.testing.assert_close(w, wanted, rtol=0, atol=0, equal_nan=True)
            assert g.isfinite().logical_and(g.abs() < 65504).logical_and(~w.isfinite()).sum() == 0


@kinds([k for k in KINDS if not k.stochastic] + STOCHASTIC[:1])
@pytest.mark.parametrize("prob", [0.5, 0.1])
def test_mask(variant: Variant, kind: Kind, prob: float) -> None:
    """Only the elements of a random mask are perturbed, by rho / mask_prob. The others keep every bit."""
    groups = [g._replace(mask_prob=prob) for g in PERTURB_GROUPS]
    pair = Pair(variant, kind, SGD_GROUPS, perturb_groups=groups)
    pair.replace_primary([w.index_fill(0, torch.arange(0, w.numel(), 7), -0.0) for w in primary(pair.table)])
    before = [w.clone() for w in primary(pair.table)]
    pair.perturb()
    pair.compare()
    for i, (now, w) in enumerate(zip(pair.table.params, before, strict=True)):
        mask = mask_of(stream_key(pair.table.seed, 7, pair.table.rng_streams[i], MASK), w, prob)
        assert_same_bits([now[~mask]], [w.to(now.dtype)[~mask]])
        if kind.param in (F32, F64) and groups[pair.table.group_ids[i]].rho and w.numel() > 1000:
            assert torch.equal(now != w, mask)  # no gradient in the mask is lost to rounding


@kinds([Kind(F32, F32), Kind(F64, F64), Kind(BF16, BF16), Kind(BF16, BF16, masters=True)])
def test_groups_with_and_without_a_mask(variant: Variant, kind: Kind) -> None:
    probs = (1.0, 0.25, 0.75, 1.0)
    groups = [g._replace(mask_prob=prob) for g, prob in zip(PERTURB_GROUPS, probs, strict=True)]
    pair = Pair(variant, kind, SGD_GROUPS, perturb_groups=groups)
    pair.perturb()
    pair.compare()


@pytest.mark.parametrize("kind", [Kind(F32, F32), *STOCHASTIC[::2]], ids=str)
def test_random_numbers_depend_on_the_offset_in_the_status(variant: Variant, kind: Kind) -> None:
    seen = []
    for offset in (3, 4, 3):
        pair = Pair(variant, kind, [SGDGroup(0.1)], [(1025,)], perturb_groups=[PerturbGroup(1.0, mask_prob=0.5)])
        pair.set_status({RNG_OFFSET: offset})
        pair.perturb()
        pair.compare()
        seen.append(pair.table.params[0])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def _in_other_layouts(column: list[Any]) -> None:
    """Return the column with its first two tensors in other memory layouts."""
    if column and column[0] is not None:
        column[0] = column[0].contiguous(memory_format=torch.channels_last)
    if column and column[1] is not None:
        column[1] = column[1].t().contiguous().t()


@rules
@kinds([Kind(F32, F32), *STOCHASTIC[:1], *MASTERS[:1]])
def test_random_numbers_depend_on_the_place_in_memory(variant: Variant, kind: Kind, rule: str) -> None:
    shapes = [(4, 6, 5, 3), (7, 5), ()]
    groups = [g._replace(mask_prob=0.5) for g in PERTURB_GROUPS]
    pair = Pair(variant, kind, GROUPS[rule], shapes, perturb_groups=groups)
    for table in (pair.table, pair.twin):
        for name in ("params", "grads", "backups", "masters"):
            _in_other_layouts(getattr(table, name))
        assert table.rule is not None
        for name in table.rule.buffers():
            _in_other_layouts(table.state[name])
        table.grad_addresses = addressed(table.grads)
    pair.perturb()
    pair.update()
    pair.compare()


# ---- gradient addresses -----------------------------------------------------------------------------------


def test_addresses_as_bytes(variant: Variant) -> None:
    """The gradient reader returns addresses as bytes. Those of other gradients replace them at the next primitive."""
    if variant.name != "cpu":
        pytest.skip("for the tables of the CPU backend")
    pair = Pair(variant, Kind(F32, F32), SGD_GROUPS)
    pair.table.grad_addresses = pair.table.grad_addresses.tobytes()  # type: ignore[assignment]
    pair.perturb()
    for table in (pair.table, pair.twin):
        table.grads = [g + 1 for g in table.grads]
    pair.table.grad_addresses = addressed(pair.table.grads).tobytes()  # type: ignore[assignment]
    pair.update()
    pair.compare()
    for wrong in (b"1234567", addressed(pair.table.grads)[:-1], memoryview(b"1234").cast("i")):
        pair.table.grad_addresses = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"64-bit integers|one address per tensor"):
            pair.perturb()


# ---- autograd's version counters --------------------------------------------------------------------------


@rules
@kinds([Kind(F32, F32), *MASTERS[:1]])
def test_every_write_raises_the_version(variant: Variant, kind: Kind, rule: str) -> None:
    for primitive in ("perturb", "update", "restore"):
        pair = Pair(variant, kind, GROUPS[rule])
        written = pair.table.params + (pair.table.masters if primitive == "update" else [])
        before = [t._version for t in written]
        getattr(pair, primitive)()
        assert all(t._version > v for t, v in zip(written, before, strict=True)), primitive


def test_axpby_and_ema_raise_the_version(variant: Variant) -> None:
    backend = backend_for(variant, Kind(F32, F32))
    x, y = draw_vectors(F32, F32)
    out = [torch.zeros_like(t) for t in x]
    versions = [t._version for t in (*out, *x)]
    backend.axpby(VectorPair(x, y), out, (1.0, 1.0))
    backend.ema(VectorPair(x, y), 0.5)
    assert all(t._version > v for t, v in zip((*out, *x), versions, strict=True))
