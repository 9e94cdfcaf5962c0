"""Every backend's primitives against `reference`, table by table: master weights, random rounding, masks, clipping,
Adam, and what a skipped step leaves alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    PLAIN,
    STOCHASTIC,
    Kind,
    Pair,
    addressed,
    assert_near,
    assert_unchanged,
    backend_for,
)
from torch import Tensor

from fused_sam.backends.contract import (
    DRAWS,
    INVERSE,
    MASK,
    NORM,
    ROUND_PERTURBED,
    ROUND_UPDATED,
    SKIP,
    STATUS_SIZE,
    SUM,
    UPDATE_NORM,
    Group,
    Lists,
    Table,
    finish_norm,
    status_dtype,
)
from fused_sam.backends.rng import chosen, round_at_random, stream_key

SUBJECTS = [v for v in VARIANTS if v.name != "reference"]

SGD = [
    Group(0.5, False, 0.0, lr=0.1),
    Group(0.8, True, 0.1, lr=0.2, momentum=0.9, weight_decay=0.03),
    Group(0.3, False, 0.0, lr=0.05, momentum=0.8, dampening=0.3, maximize=True),
    Group(0.0, True, 0.0, lr=0.3, momentum=0.7, nesterov=True, weight_decay=0.01),
]
# An adam_eps far above rounding: at 1e-8 a gradient that cancels to nothing would decide its element's sign.
ADAM = [
    Group(0.5, False, 0.0, lr=0.1, beta1=0.8, beta2=0.95, adam_eps=1e-3, weight_decay=0.05),
    Group(0.5, False, 0.0, lr=0.2, beta1=0.9, beta2=0.99, adam_eps=1e-2, weight_decay=0.1, decoupled=True),
    Group(0.5, False, 0.0, lr=0.05, beta1=0.0, beta2=0.9, adam_eps=1e-3, maximize=True, amsgrad=True),
    Group(0.5, False, 0.0, lr=0.3, beta1=0.7, beta2=0.8, adam_eps=1e-1, decoupled=True, amsgrad=True),
]


@pytest.fixture(params=SUBJECTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Any:  # in place of conftest's, which has `reference` as well
    with request.param.active():
        yield request.param


def with_options(groups: Sequence[Group], **options: Any) -> list[Group]:
    return [g._replace(**options) for g in groups]


def kinds(of: Sequence[Kind]) -> Any:
    return pytest.mark.parametrize("kind", of, ids=str)


# ---- the passes of a step ---------------------------------------------------------------------------------


@kinds(KINDS)
def test_norm(variant: Variant, kind: Kind) -> None:
    pair = Pair(variant, kind, SGD)
    for scaled, carry in ((True, False), (False, True)):
        pair.run("norm", scaled=scaled, carry=carry, begin=True, finish=True, eps=0.25)
    # Sums in fp32 over 17,451 squares: 1e-5 is above their rounding and far below a lost tensor.
    for place in (NORM, INVERSE, UPDATE_NORM):
        assert float(pair.status[place]) == pytest.approx(float(pair.twin_status[place]), rel=1e-5)
    assert pair.status[SKIP] == 0
    assert pair.status[DRAWS] == 7


@kinds(KINDS)
def test_perturb(variant: Variant, kind: Kind) -> None:
    pair = Pair(variant, kind, SGD)
    before = pair.copies()
    pair.run("perturb")
    pair.compare()
    moved = pair.table.models or pair.table.weights
    assert not torch.equal(moved[4], before["weights"][4].to(moved[4].dtype))  # type: ignore[union-attr]
    if kind.model is not None:
        assert_unchanged(pair.table.weights, before["weights"], "masters")
    else:
        assert_unchanged(pair.table.backups, before["weights"], "backups")


@kinds(KINDS)
@pytest.mark.parametrize("scale", [None, 16.0])
def test_sgd(variant: Variant, kind: Kind, scale: float | None) -> None:
    pair = Pair(variant, kind, SGD)
    pair.run("perturb")
    pair.run("sgd", None if scale is None else torch.tensor(scale))
    pair.compare()


@kinds(KINDS)
def test_sgd_of_weights_that_were_not_perturbed(variant: Variant, kind: Kind) -> None:
    pair = Pair(variant, kind, SGD, perturbed=False)
    pair.run("sgd", None)
    pair.compare()


@kinds(KINDS)
@pytest.mark.parametrize("scale", [None, 16.0])
def test_adam(variant: Variant, kind: Kind, scale: float | None) -> None:
    pair = Pair(variant, kind, ADAM)
    pair.run("perturb")
    pair.run("adam", None if scale is None else torch.tensor(scale))
    pair.compare()
    assert [float(t) for t in pair.table.steps] == [3.0 * i + 1 for i in range(5)]


@kinds(KINDS)
def test_adam_of_weights_that_were_not_perturbed(variant: Variant, kind: Kind) -> None:
    pair = Pair(variant, kind, ADAM, perturbed=False)
    pair.run("adam", None)
    pair.run("adam", None)
    pair.compare()


@kinds(KINDS)
def test_restore(variant: Variant, kind: Kind) -> None:
    pair = Pair(variant, kind, SGD)
    before = pair.copies()["weights"]
    pair.run("perturb")
    pair.run("restore")
    assert_unchanged(pair.table.weights, before, "weights")
    if kind.model is not None:
        assert_same_bits(pair.table.models, [w.to(kind.model) for w in before if w is not None])


@pytest.mark.parametrize("primitive", ["sgd", "adam"])
@kinds([KINDS[0], MASTERS[0], STOCHASTIC[0]])
def test_learning_rate_in_a_tensor(variant: Variant, kind: Kind, primitive: str) -> None:
    groups = with_options(SGD if primitive == "sgd" else ADAM, lr=torch.tensor(0.15))
    pair = Pair(variant, kind, groups)
    pair.run("perturb")
    pair.run(primitive, None)
    pair.compare()


# ---- clipping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("primitive", ["sgd", "adam"])
@kinds([*PLAIN, MASTERS[0], STOCHASTIC[0]])
@pytest.mark.parametrize("scale", [None, 16.0])
def test_clipping(variant: Variant, kind: Kind, primitive: str, scale: float | None) -> None:
    """The update's norm is 160, of gradients that have the loss scale; 100 clips without one, 10.5 does not with 16."""
    groups = [
        g._replace(max_norm=limit)
        for g, limit in zip(SGD if primitive == "sgd" else ADAM, (100.0, 2.5, math.inf, 10.5), strict=True)
    ]
    pair = Pair(variant, kind, groups)
    pair.run("perturb")
    pair.run(primitive, None if scale is None else torch.tensor(scale))
    pair.compare()


@kinds([Kind(F64, F64), Kind(F32, F32)])
@pytest.mark.parametrize("limit", [3.0, 1e4])
def test_clipping_is_torchs(variant: Variant, kind: Kind, limit: float) -> None:
    pair = Pair(variant, kind, [Group(0.5, False, 0.0, lr=0.1, max_norm=limit)], perturbed=False)
    twins = [torch.nn.Parameter(w.double()) for w in pair.table.weights]
    for p, g in zip(twins, pair.table.gradients, strict=True):
        p.grad = g.double()
    torch.nn.utils.clip_grad_norm_(twins, limit)
    torch.optim.SGD(twins, lr=0.1).step()
    pair.run("norm", scaled=False, carry=False, begin=True, finish=True, eps=0.0)
    pair.run("sgd", None)
    for found, wanted in zip(pair.table.weights, twins, strict=True):
        assert_near(found, wanted.detach().to(kind.weight), "weights")


# ---- Adam is torch's --------------------------------------------------------------------------------------

ADAMS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
    "adamw-amsgrad-maximize": {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True, "maximize": True, "eps": 1e-4},
    "adam": {"lr": 0.03, "eps": 1e-4},
    "adam-l2-amsgrad": {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 0.1, "amsgrad": True},
    "adam-l2-maximize": {"lr": 0.03, "eps": 1e-4, "weight_decay": 0.05, "maximize": True},
}


@kinds([Kind(F64, F64), Kind(F32, F32)])
@pytest.mark.parametrize("name", ADAMS)
def test_adam_is_torchs(variant: Variant, kind: Kind, name: str) -> None:
    """Seven steps from nothing against torch.optim in float64."""
    options = ADAMS[name]
    cls = torch.optim.AdamW if name.startswith("adamw") else torch.optim.Adam
    shapes = [(1,), (33,), (5, 205)]
    twins = [torch.nn.Parameter(values(s, i, kind.weight).double()) for i, s in enumerate(shapes)]
    theirs = cls(twins, foreach=False, **options)
    group = Group(
        0.1,
        False,
        0.0,
        lr=options["lr"],
        weight_decay=options.get("weight_decay", 0.0),
        maximize=options.get("maximize", False),
        beta1=options.get("betas", (0.9, 0.999))[0],
        beta2=options.get("betas", (0.9, 0.999))[1],
        adam_eps=options["eps"],
        decoupled=cls is torch.optim.AdamW,
        amsgrad=options.get("amsgrad", False),
    )
    backend = backend_for(variant, kind)
    weights = [values(s, i, kind.weight) for i, s in enumerate(shapes)]
    table = Table(
        weights,
        [0] * len(weights),
        kind.gradient,
        backups=weights,
        momenta=[torch.zeros_like(w) for w in weights],
        squares=[torch.zeros_like(w) for w in weights],
        largest=[torch.zeros_like(w) if group.amsgrad else None for w in weights],
        steps=[torch.zeros(()) for _ in weights],
    )
    status = torch.zeros(STATUS_SIZE, dtype=status_dtype(weights[0].device))
    for step in range(7):
        table.gradients = [values(s, 100 * step + 50 + i, kind.gradient) for i, s in enumerate(shapes)]
        table.gradient_addresses = addressed(table.gradients)
        for p, g in zip(twins, table.gradients, strict=True):
            p.grad = g.double()
        theirs.step()
        backend.adam(table, [group], status, None)
    for i, (w, p) in enumerate(zip(weights, twins, strict=True)):
        state = theirs.state[p]
        assert_near(w, p.detach().to(kind.weight), "weights")
        assert_near(table.momenta[i], state["exp_avg"].to(kind.weight), "exp_avg")  # type: ignore[arg-type]
        assert_near(table.squares[i], state["exp_avg_sq"].to(kind.weight), "exp_avg_sq")
        if group.amsgrad:
            assert_near(table.largest[i], state["max_exp_avg_sq"].to(kind.weight), "max")  # type: ignore[arg-type]
        assert float(table.steps[i]) == float(state["step"]) == 7


# ---- skipped steps ----------------------------------------------------------------------------------------


@kinds(KINDS)
def test_a_skipped_step_changes_no_bit(variant: Variant, kind: Kind) -> None:
    for update, groups in (("sgd", SGD), ("adam", ADAM)):
        pair = Pair(variant, kind, with_options(groups, max_norm=1.0, share=0.5))
        odd = [w.index_fill(0, torch.tensor([0]), -0.0) for w in pair.table.weights]  # a copy keeps its sign
        odd[2][5] = math.inf
        pair.replace("weights", odd)
        before = pair.copies()
        pair.set_status({SKIP: 1.0, INVERSE: 0.0, UPDATE_NORM: math.inf})
        pair.run("perturb")
        assert_unchanged(pair.table.weights, before["weights"], "weights")
        if kind.model is None:
            assert_unchanged(pair.table.backups, before["weights"], "backups")
            for w in pair.table.weights:
                w.fill_(3.0)
        assert_unchanged(pair.table.models, before["models"], "models")
        pair.run(update, None)
        for name, column in pair.columns(pair.table).items():
            if name not in ("models", "backups"):
                assert_unchanged(column, before[name], f"{update}: {name}")
        if kind.model is not None:
            assert_same_bits(pair.table.models, [w.to(kind.model) for w in odd])


@pytest.mark.parametrize("skip", [False, True])
def test_sums_of_columns_heed_a_skip(variant: Variant, skip: bool) -> None:
    backend = backend_for(variant, Kind(F32, F32))
    status = torch.zeros(STATUS_SIZE, dtype=status_dtype(torch.device("cpu")))
    status[SKIP] = float(skip)
    for dx, dy in ((F32, F32), (F32, BF16), (BF16, BF16)):
        x, y = ([values((n,), 10 * c + i, d) for i, n in enumerate((7, 1025, 16385))] for c, d in enumerate((dx, dy)))
        lists = Lists([t.clone() for t in x], y)
        out = [torch.full_like(t, 7.0) for t in y]
        backend.combine(lists, out, torch.tensor([2.0, -0.5], dtype=status.dtype), status)
        backend.average(lists, 0.75, status)
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            if skip:
                assert_same_bits([out[i], lists.x[i]], [torch.full_like(b, 7.0), a])
            else:
                assert_near(out[i], (2.0 * a.float() - 0.5 * b.float()).to(dy), "combine")
                assert_near(lists.x[i], (0.75 * a.float() + 0.25 * b.float()).to(dx), "average")


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("skip", [0.0, 1.0])
@pytest.mark.parametrize("total", [0.0, 6.25, math.inf, math.nan])
def test_finish(variant: Variant, total: float, skip: float, carry: bool, scaled: bool) -> None:
    """As the norm ends, for a sum that came from elsewhere."""
    backend = backend_for(variant, Kind(F32, F32))
    found = torch.zeros(STATUS_SIZE, dtype=status_dtype(torch.device("cpu")))
    found[SUM], found[NORM], found[UPDATE_NORM], found[SKIP], found[DRAWS] = total, 3.0, 4.0, skip, 5.0
    wanted = found.clone()
    backend.finish(found, scaled=scaled, carry=carry, eps=0.5)
    finish_norm(wanted, scaled=scaled, carry=carry, eps=0.5)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, equal_nan=True)


# ---- random numbers ---------------------------------------------------------------------------------------

# Numbers around all that rounding treats apart: subnormals, fp16's largest, what is beyond it, what is not finite.
EDGES = [
    0.0, 1e-45, 2.0**-26, 2.0**-24, 1.5 * 2.0**-24, 2.0**-14 - 2.0**-26, 2.0**-14, 1.0, 65503.9, 65504.0, 65519.9,
    65520.0, 1e6, 3.3e38, 3.4028234e38, math.inf, math.nan,
]  # fmt: skip


def every_magnitude(n: int, seed: int) -> Tensor:
    """fp32 numbers of all magnitudes that bf16 and fp16 have, and the edges."""
    x = values((n,), seed, F32) * 2.0 ** (values((n,), seed + 1, F32).mul(8).clamp(-27, 17)).round()
    edges = torch.tensor(EDGES + [-e for e in EDGES])
    x[: len(edges)] = edges
    return x


@pytest.mark.parametrize("purpose", [ROUND_PERTURBED, ROUND_UPDATED])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("draw", [0, 1, 16777215])
def test_random_rounding_to_the_bit(variant: Variant, dtype: torch.dtype, purpose: int, draw: int) -> None:
    """From weights of 0 the result is the gradient exactly, so that nothing but the rounding is left to differ."""
    group = Group(1.0, False, 0.0, lr=1.0, maximize=True)
    pair = Pair(variant, Kind(dtype, F32, stochastic=True), [group], [(3000,), (1,)])
    pair.set_status({INVERSE: 1.0, DRAWS: draw})
    gradients = [every_magnitude(3000, 5), torch.tensor([1.0 + 2**-12])]
    pair.replace("gradients", gradients)
    pair.replace("weights", [torch.zeros(3000), torch.zeros(1)])
    pair.replace("backups", [torch.zeros(3000), torch.zeros(1)])
    pair.run("perturb" if purpose == ROUND_PERTURBED else "sgd", *([] if purpose == ROUND_PERTURBED else [None]))
    for table in (pair.table, pair.twin):
        for i, (w, g) in enumerate(zip(table.weights, gradients, strict=True)):
            key = stream_key(table.seed, draw, table.streams[i], purpose)
            wanted = round_at_random(g, key, dtype)
            torch.testing.assert_close(w, wanted, rtol=0, atol=0, equal_nan=True)
            assert g.isfinite().logical_and(g.abs() < 65504).logical_and(~w.isfinite()).sum() == 0


@kinds([k for k in KINDS if not k.stochastic] + STOCHASTIC[:1])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_mask(variant: Variant, kind: Kind, share: float) -> None:
    """A random choice of elements moves, by rho / share; the others keep every bit."""
    pair = Pair(variant, kind, with_options(SGD, share=share))
    pair.replace("weights", [w.index_fill(0, torch.arange(0, w.numel(), 7), -0.0) for w in pair.table.weights])
    before = pair.copies()["weights"]
    pair.run("perturb")
    pair.compare()
    moved = pair.table.models or pair.table.weights
    for i, (now, w) in enumerate(zip(moved, before, strict=True)):
        assert w is not None
        mask = chosen(stream_key(pair.table.seed, 7, pair.table.streams[i], MASK), w, share)
        assert_same_bits([now[~mask]], [w.to(now.dtype)[~mask]])
        if kind.computes in (F32, F64) and pair.groups[pair.table.groups[i]].rho and w.numel() > 1000:
            assert torch.equal(now != w, mask)  # what was chosen moved: its gradient is not small enough to round away


@kinds([Kind(F32, F32), Kind(F64, F64), Kind(BF16, BF16), Kind(F32, BF16, BF16)])
def test_groups_with_and_without_a_mask(variant: Variant, kind: Kind) -> None:
    groups = [g._replace(share=share) for g, share in zip(SGD, (1.0, 0.25, 0.75, 1.0), strict=True)]
    pair = Pair(variant, kind, groups)
    pair.run("perturb")
    pair.compare()


@pytest.mark.parametrize("kind", [Kind(F32, F32), *STOCHASTIC[::2]], ids=str)
def test_draws_follow_the_count_in_the_status(variant: Variant, kind: Kind) -> None:
    group = Group(1.0, False, 0.0, share=0.5)
    seen = []
    for draw in (3, 4, 3):
        pair = Pair(variant, kind, [group], [(1025,)])
        pair.set_status({DRAWS: draw})
        pair.run("perturb")
        pair.compare()
        seen.append(pair.table.weights[0])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


@kinds([Kind(F32, F32), *STOCHASTIC[:1], *MASTERS[:1]])
def test_random_numbers_go_by_place_in_memory(variant: Variant, kind: Kind) -> None:
    pair = Pair(variant, kind, with_options(SGD, share=0.5), [(4, 6, 5, 3), (7, 5), ()])
    for table in (pair.table, pair.twin):
        for name in ("weights", "gradients", "momenta", "squares", "backups", "models"):
            column = getattr(table, name)
            if column:
                column[0] = column[0].contiguous(memory_format=torch.channels_last)
                column[1] = column[1].t().contiguous().t()
        table.gradient_addresses = addressed(table.gradients)
    pair.run("perturb")
    pair.run("sgd", None)
    pair.compare()


# ---- what autograd is told --------------------------------------------------------------------------------


@kinds([Kind(F32, F32), *MASTERS[:1]])
def test_autograd_hears_of_every_write(variant: Variant, kind: Kind) -> None:
    for primitive, groups in (("perturb", SGD), ("sgd", SGD), ("adam", ADAM), ("restore", SGD)):
        pair = Pair(variant, kind, groups)
        written = pair.table.models or pair.table.weights
        before = [t._version for t in written]
        pair.run(primitive, *([None] if primitive in ("sgd", "adam") else []))
        assert all(t._version > v for t, v in zip(written, before, strict=True)), primitive
