"""MuonWithAdamW takes the steps of torch.optim.Muon and AdamW, bit for bit, alone and as the base of every method."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import family, nets
from support.bits import Snapshot, assert_same_bits, assert_same_optimizers, parameters
from torch import Tensor, nn
from torch.optim import Optimizer

from fused_sam import METHODS, SAM, MuonWithAdamW
from fused_sam.optimizers.muon import orthogonalised

needs_torchs = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon")

MUON: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rates": {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.8},
    "plain momentum": {"lr": 0.02, "nesterov": False},
    "AdamW's length": {"lr": 0.003, "adjust_lr_fn": "match_rms_adamw"},
    "original": {"lr": 0.02, "adjust_lr_fn": "original"},
    "polynomial": {"lr": 0.02, "ns_steps": 2, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
    "tensor": {"lr": torch.tensor([0.02])},
}
ADAMW: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rates": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
}
CASES = [*((name, "defaults") for name in MUON), ("rates", "rates")]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a net with a tall, a square and a wide matrix, vectors, and a parameter without a gradient."""
    model = nets.net(dtype=dtype)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, 2, dtype=dtype)))
    return model


def prefixed(options: dict[str, Any]) -> dict[str, Any]:
    return {f"adamw_{name}": value for name, value in options.items()}


class Two:
    """torch.optim.Muon for matrices and torch.optim.AdamW for the rest, which share nothing, and SAM in plain torch."""

    def __init__(self, model: nn.Module, muon: dict[str, Any], adamw: dict[str, Any]) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizers: list[Optimizer] = [
            torch.optim.Muon([p for p in self.params if p.ndim == 2], **muon),
            torch.optim.AdamW([p for p in self.params if p.ndim != 2], **adamw),
        ]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def sam_step(self, model: nn.Module, step: int, rho: float) -> None:
        """Perturb by one global norm, as the reference backend does, take the second gradient, and step with it."""
        model.zero_grad()
        nets.loss_of(model, step).backward()
        held = [p for p in self.params if p.grad is not None]
        clean = [p.detach().clone() for p in held]
        norm = sum(p.grad.double().square().sum() for p in held).sqrt()  # type: ignore[union-attr]
        with torch.no_grad():
            for p in held:
                p.add_(float(rho * (1 / (norm + 1e-12))) * p.grad)  # type: ignore[operator]
        model.zero_grad()
        nets.loss_of(model, step).backward()
        with torch.no_grad():
            for p, w in zip(held, clean, strict=True):
                p.copy_(w)
        self.step()

    def state(self, p: Tensor) -> dict[str, Any]:
        return self.optimizers[0 if p.ndim == 2 else 1].state.get(p, {})


def assert_same_state(model: nn.Module, optimizer: Optimizer, twin: nn.Module, two: Two) -> None:
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        found, expected = optimizer.state.get(p, {}), two.state(q)
        assert found.keys() == expected.keys()
        assert_same_bits(found.values(), expected.values())


@needs_torchs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("muon", "adamw"), CASES)
def test_alone_it_is_torchs_two_bit_for_bit(muon: str, adamw: str, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not MUON[muon].get("nesterov", True):
        pytest.skip("torch.optim.Muon divides the momentum of bf16 weights by its norm in place")
    model, twin = net(dtype), net(dtype)
    optimizer = MuonWithAdamW(model.parameters(), **MUON[muon], **prefixed(ADAMW[adamw]))
    two = Two(twin, MUON[muon], ADAMW[adamw])
    for step in range(4):
        for each, opt in ((model, optimizer), (twin, two)):
            each.zero_grad()
            nets.loss_of(each, step).backward()
            opt.step()  # type: ignore[attr-defined]
    assert_same_bits(model.parameters(), twin.parameters())
    assert_same_state(model, optimizer, twin, two)


@needs_torchs
@pytest.mark.parametrize(("muon", "adamw"), CASES)
def test_with_rho_zero_it_is_torchs_two_bit_for_bit(backend: str, muon: str, adamw: str) -> None:
    model, twin = net(), net()
    options = {**MUON[muon], **prefixed(ADAMW[adamw])}
    optimizer = SAM(model.parameters(), MuonWithAdamW, rho=0.0, backend=backend, **options)
    two = Two(twin, MUON[muon], ADAMW[adamw])
    for step in range(4):
        optimizer.step(nets.closure_for(model, step))
        twin.zero_grad()
        nets.loss_of(twin, step).backward()
        two.step()
    assert_same_bits(model.parameters(), twin.parameters())
    assert_same_state(model, optimizer, twin, two)


@needs_torchs
@pytest.mark.parametrize(("muon", "adamw"), [("rates", "rates"), ("AdamW's length", "defaults")])
def test_sam_around_it_has_one_norm_and_equals_a_loop_by_hand(muon: str, adamw: str) -> None:
    model, twin = net(), net()
    optimizer = SAM(
        model.parameters(), MuonWithAdamW, rho=0.1, backend="reference", **MUON[muon], **prefixed(ADAMW[adamw])
    )
    two = Two(twin, MUON[muon], ADAMW[adamw])
    for step in range(5):
        nets.two_steps(model, optimizer, step)
        two.sam_step(twin, step, 0.1)
    assert_same_bits(model.parameters(), twin.parameters())
    assert_same_state(model, optimizer, twin, two)


def test_newton_schulz_makes_singular_values_near_one() -> None:
    """Its authors give 0.7 to 1.2 for these coefficients. bf16 has 8 bits, so that five steps err by a few percent."""
    for rows, columns in ((8, 8), (5, 20), (20, 5)):
        u = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).mul(100)
        before = u.clone()
        found = orthogonalised(u, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert torch.equal(u, before) and found.shape == u.shape
        left, values, right = torch.linalg.svd(u.double(), full_matrices=False)
        x = values / values.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        torch.testing.assert_close(found.double(), left * x @ right, rtol=0, atol=0.05)
    bits = torch.ones(2, 2, dtype=torch.bfloat16)
    orthogonalised(bits, (2.0, -1.5, 0.5), 1, 1e-7)
    assert torch.equal(bits, torch.ones_like(bits)), "a bf16 matrix is not changed"
    assert torch.equal(orthogonalised(torch.zeros(2, 3), (2.0, -1.5, 0.5), 3, 1e-7), torch.zeros(2, 3))


# ---- groups ---------------------------------------------------------------------------------------------------------

AS: dict[str, Callable[..., Optimizer]] = {
    "alone": MuonWithAdamW,
    "with SAM": lambda params, **options: SAM(params, MuonWithAdamW, rho=0.1, **options),
}
both = pytest.mark.parametrize("make", AS.values(), ids=AS)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))


@both
def test_a_mixed_group_becomes_two_with_their_own_options(make: Callable[..., Optimizer]) -> None:
    a, b, c, d = weight(3, 2), weight(2), weight(2, 4, 3, 3), weight(2, 2)
    optimizer = make([("a", a), ("b", b), ("c", c), ("d", d)], lr=0.02, adamw_lr=0.003, adamw_betas=(0.5, 0.6))
    muon, adamw = optimizer.param_groups
    assert [id(p) for p in muon["params"]] == [id(a), id(d)] and muon["param_names"] == ["a", "d"]
    assert [id(p) for p in adamw["params"]] == [id(b), id(c)] and adamw["param_names"] == ["b", "c"]
    sams = {"rho", "adaptive", "eta", "perturb"} & muon.keys()
    assert {*muon} - sams == {
        "params", "param_names", "use_muon", "lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps",
        "ns_steps", "adjust_lr_fn",
    }  # fmt: skip
    assert {*adamw} - sams == {"params", "param_names", "use_muon", "lr", "betas", "eps", "weight_decay"}
    assert muon["use_muon"] is True and adamw["use_muon"] is False
    assert (muon["lr"], muon["eps"], adamw["lr"], adamw["eps"]) == (0.02, 1e-7, 0.003, 1e-8)
    assert adamw["betas"] == (0.5, 0.6) and (muon["weight_decay"], adamw["weight_decay"]) == (0.1, 0.01)


@both
@pytest.mark.parametrize("later", [False, True])
def test_groups_override_the_choice_and_options(make: Callable[..., Optimizer], later: bool) -> None:
    first, rest = {"params": [weight(2, 2), weight(2)], "lr": 0.5, "adamw_eps": 1e-4}, [
        {"params": [weight(4, 2), weight(3, 3)], "use_muon": False, "lr": 0.25},
        {"params": [weight(5, 2)], "use_muon": True, "momentum": 0.5},
        {"params": [weight(3)], "use_muon": False, "adamw_lr": 0.125},
        {"params": [weight(7)], "adamw_betas": (0.1, 0.2), "adamw_lr": 0.0625, "lr": 9.0},
    ]  # fmt: skip
    params = [p for group in (first, *rest) for p in group["params"]]  # type: ignore[attr-defined]
    optimizer = make([first] if later else [first, *rest], lr=1.0, adamw_lr=2.0)
    for group in rest if later else []:
        optimizer.add_param_group(group)
    groups = optimizer.param_groups
    assert [group["use_muon"] for group in groups] == [True, False, False, True, False, False]
    assert [group["lr"] for group in groups] == [0.5, 2.0, 0.25, 1.0, 0.125, 0.0625]
    assert [group["eps"] for group in groups] == [1e-7, 1e-4, 1e-8, 1e-7, 1e-8, 1e-8]
    assert groups[3]["momentum"] == 0.5 and groups[5]["betas"] == (0.1, 0.2)
    assert [id(p) for p in parameters(optimizer)] == [id(p) for p in params]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_sams_options_go_to_both_parts() -> None:
    optimizer = SAM([{"params": [weight(2, 2), weight(2)], "rho": 0.3}, {"params": [weight(3, 3)]}], MuonWithAdamW)
    optimizer.add_param_group({"params": [weight(4, 4), weight(4)], "perturb": False})
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.3, 0.05, 0.05, 0.05]
    assert [group["perturb"] for group in optimizer.param_groups] == [True, True, True, False, False]


def test_a_users_group_stays_whole_and_can_be_used_again() -> None:
    group = {"params": [weight(2, 2), weight(2)], "lr": 0.3}
    for _ in range(2):
        optimizer = SAM([group], MuonWithAdamW, rho=0.1)
        assert len(group["params"]) == 2 and [g["lr"] for g in optimizer.param_groups] == [0.3, 1e-3]  # type: ignore[arg-type]


@both
def test_a_scheduler_scales_both_rates(make: Callable[..., Optimizer]) -> None:
    optimizer = make([weight(2, 2), weight(2)], lr=0.5, adamw_lr=0.25)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for p in parameters(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [group["initial_lr"] for group in copied.param_groups] == [0.5, 0.25]
        copied.add_param_group({"params": [weight(3, 3), weight(3)]})
        assert [group["lr"] for group in copied.param_groups] == [0.25, 0.125, 0.5, 0.25]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_one_checkpoint_resumes_to_the_bit_and_is_that_of_the_bare_class(backend: str) -> None:
    def made(seed: int) -> tuple[nn.Module, SAM]:
        model = nets.net(seed)
        return model, SAM(model.parameters(), MuonWithAdamW, rho=0.1, lr=0.02, adamw_lr=0.01, backend=backend)

    model, optimizer = made(0)
    nets.train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    bare = MuonWithAdamW(nets.net(1).parameters())
    bare.load_state_dict(saved)
    twin, other = made(2)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(bare.state_dict())
    assert [{*group} for group in other.param_groups] == [{*group} for group in optimizer.param_groups]
    nets.train(model, optimizer, range(3, 6))
    nets.train(twin, other, range(3, 6))
    assert_same_optimizers(optimizer, other)


def test_a_checkpoint_of_other_groups_is_refused() -> None:
    optimizer = SAM(nets.net().parameters(), MuonWithAdamW)
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match="has 1 parameter groups, the optimizer 2"):
        optimizer.load_state_dict(torch.optim.AdamW(nets.net().parameters()).state_dict())
    before.assert_unchanged()


# ---- as the base of every method ------------------------------------------------------------------------------------


class AdamWStepAlone(torch.optim.AdamW):
    """AdamW that SAM does not fuse, because it is a subclass."""


METHODS_WITH_ANY_BASE = [
    case for case in family.METHODS if not case.startswith("MomentumSAM") and case not in family.NEED_ADAM
]


@pytest.mark.parametrize("kind", [pytest.param("muon", marks=needs_torchs), "adamw"])
@pytest.mark.parametrize("case", METHODS_WITH_ANY_BASE)
def test_every_method_runs_around_it(case: str, kind: str) -> None:
    """A method around MuonWithAdamW takes the steps of the same method around one of torch's two, bit for bit."""
    models = nets.net(), nets.net()
    made = []
    for model, bare in zip(models, (False, True), strict=True):
        params = [p for p in model.parameters() if (p.ndim == 2) == (kind == "muon")]
        base: Any = MuonWithAdamW
        options: dict[str, Any] = {"lr": 0.02} if kind == "muon" else {"adamw_lr": 0.02}
        if bare:
            base, options = (torch.optim.Muon if kind == "muon" else AdamWStepAlone), {"lr": 0.02}
        made.append(family.METHODS[case](params, base, **options))
    for model, optimizer in zip(models, made, strict=True):
        family.train(model, optimizer, range(4))
    assert_same_bits(parameters(made[0]), parameters(made[1]))


def test_momentum_sam_refuses_it() -> None:
    with pytest.raises(TypeError, match=r"MomentumSAM needs SGD, .* not MuonWithAdamW"):
        METHODS["MomentumSAM"](nets.net().parameters(), MuonWithAdamW)


# ---- skipped steps, scales, clipping --------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["first", "second"])
def test_a_gradient_that_is_not_finite_changes_nothing(backend: str, half: str) -> None:
    model = nets.net()
    optimizer = SAM(model.parameters(), MuonWithAdamW, rho=0.1, lr=0.02, backend=backend)
    nets.train(model, optimizer, range(2))
    before = Snapshot(optimizer)
    for this in ("first", "second"):
        nets.loss_of(model, 9).backward()
        if this == half:
            model[0].bias.grad[3] = float("nan")  # type: ignore[index,union-attr,operator]
        getattr(optimizer, f"{this}_step")(zero_grad=True)
    before.assert_unchanged()
    assert optimizer.skipped


@needs_torchs
def test_clipping_and_a_grad_scaler_reach_both(backend: str) -> None:
    model, twin = nets.net(dtype=torch.float64), nets.net(dtype=torch.float64)
    optimizer = SAM(model.parameters(), MuonWithAdamW, rho=0.0, lr=0.02, max_norm=0.1, backend=backend)
    two = Two(twin, {"lr": 0.02}, {})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        model.zero_grad()
        scaler.scale(nets.loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        twin.zero_grad()
        nets.loss_of(twin, step).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        two.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # Muon rounds to bf16: a gradient that differs in the last bit may give a direction that differs by 2^-8.
        torch.testing.assert_close(p, q, rtol=0, atol=3 * 0.02 * 2**-8)


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "vector": ({"params": [("w", weight(3, 3)), ("scale", weight(5))], "use_muon": True}, {},
               r"parameter 'scale' \(shape \(5,\)\) has 1 dimension, and Muon takes matrices: leave use_muon out"),
    "filter": ({"params": [weight(2, 3, 3, 3)], "use_muon": True}, {},
               r"parameter 0 of group 0 \(shape \(2, 3, 3, 3\)\) has 4 dimensions"),
    "choice": ({"params": [weight(3, 3)], "use_muon": "yes"}, {}, "use_muon of group 0 must be True, False or None"),
    "lr of vectors": ({"params": [weight(3)], "lr": 0.1}, {},
                      "group 0 sets lr, which is Muon's, but none of its parameters is a matrix: set adamw_lr, or"),
    "momentum of vectors": ({"params": [weight(3)], "momentum": 0.1}, {}, "group 0 sets momentum.*: leave it out"),
    "momentum of AdamW": ({"params": [weight(3, 3)], "use_muon": False, "momentum": 0.1}, {},
                          "group 0 sets momentum, which is Muon's, but its parameters go to AdamW"),
    "betas of Muon": ({"params": [weight(3, 3)], "use_muon": True, "betas": (0.9, 0.9)}, {},
                      "group 0 sets betas, which is AdamW's, but its parameters go to Muon"),
    "lazy": ({"params": [("w", nn.LazyLinear(3).weight)]}, {}, r"'w' has no shape yet.*run the model once"),
    "group's lr": ({"params": [weight(3, 3)], "lr": -1.0}, {}, "lr of group 0 must be a finite number of 0 or more"),
    "group's rate": ({"params": [weight(3)], "adamw_lr": -1.0}, {}, "adamw_lr of group 0 must be a finite number"),
    "lr": ({"params": [weight(3, 3)]}, {"lr": float("nan")}, "lr must be a finite number of 0 or more, not nan"),
    "lr tensor": ({"params": [weight(3, 3)]}, {"lr": torch.ones(2)}, "lr as a tensor must have one element"),
    "decay": ({"params": [weight(3)]}, {"adamw_weight_decay": -1}, "adamw_weight_decay must be a finite number"),
    "momentum": ({"params": [weight(3, 3)]}, {"momentum": 1.0}, "momentum must be from 0 to below 1"),
    "steps": ({"params": [weight(3, 3)]}, {"ns_steps": 100}, "ns_steps must be a whole number from 0 to 99"),
    "coefficients": ({"params": [weight(3, 3)]}, {"ns_coefficients": (1, 2)}, "ns_coefficients must be three numbers"),
    "length": ({"params": [weight(3, 3)]}, {"adjust_lr_fn": "rms"}, "adjust_lr_fn must be .*, not 'rms'"),
    "betas": ({"params": [weight(3)]}, {"adamw_betas": (0.9, 1.0)}, r"adamw_betas\[1\] must be from 0 to below 1"),
}  # fmt: skip


@both
@pytest.mark.parametrize("case", BAD)
def test_bad_input(make: Callable[..., Optimizer], case: str) -> None:
    group, options, message = BAD[case]
    before = {name: value for name, value in group.items() if name != "params"}
    with pytest.raises(ValueError, match=message):
        make([dict(group)], **options)
    assert {name: value for name, value in group.items() if name != "params"} == before


@both
def test_bad_input_of_a_group_that_is_added_leaves_the_optimizer_as_it_was(make: Callable[..., Optimizer]) -> None:
    optimizer = make([("w", weight(2, 2)), ("b", weight(2))])
    before = Snapshot(optimizer)
    for bad in (
        {"params": [("x", weight(3, 3)), ("y", weight(3))], "use_muon": True},
        {"params": [("x", weight(3, 3)), ("y", weight(3))], "adamw_lr": -1.0},
        {"params": [weight(3, 3)]},
        {"params": [("x", weight(3, 3)), ("w", optimizer.param_groups[0]["params"][0])]},
    ):
        with pytest.raises(ValueError, match=r"has 1 dimension|adamw_lr|without names|more than one parameter group"):
            optimizer.add_param_group(bad)
    before.assert_unchanged()
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([weight(3)])  # type: ignore[arg-type]


def test_bad_gradients_leave_every_weight() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    vector = weight(3)
    optimizer = MuonWithAdamW([vector, *embedding.parameters()])
    vector.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 \(shape \(4, 3\)\) has a sparse gradient"):
        optimizer.step()
    before.assert_unchanged()
    number = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    number.grad = torch.ones_like(number)
    with pytest.raises(RuntimeError, match="has a complex gradient"):
        MuonWithAdamW([number]).step()


def test_a_lazy_layer_with_a_chosen_optimizer_is_taken() -> None:
    layer = nn.LazyLinear(3, bias=False)
    optimizer = SAM([{"params": layer.parameters(), "use_muon": True}], MuonWithAdamW, rho=0.1, lr=0.1)
    layer(torch.ones(2, 4)).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_a_closure_of_the_bare_class_runs_once() -> None:
    model = nets.net()
    count: list[int] = []
    loss = MuonWithAdamW(model.parameters()).step(nets.closure_for(model, 0, count))
    assert count == [0] and loss.ndim == 0
