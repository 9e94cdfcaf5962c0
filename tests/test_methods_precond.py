"""Precond-SAM takes the steps of its formula around Adam, and what it does before Adam has a second moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import nets
from support.family import GROUP_OF, STEPS, Problem, Vector, assert_weights, model_and_groups, sam_steps, train
from torch import Tensor, nn

from fused_sam import ESAM, SAM, PrecondSAM

BETAS, LR, EPS, DECAY = (0.8, 0.95), [0.01, 0.02, 0.03], 1e-3, 0.02


class AdamProblem(Problem):
    """The problem of support/family.py with AdamW's step and Precond-SAM's perturbation, written out."""

    def __init__(self, *, amsgrad: bool) -> None:
        super().__init__()
        self.amsgrad = amsgrad
        self.m, self.s, self.largest = ([torch.zeros_like(w) for w in self.w] for _ in range(3))
        self.t = 0

    def direction(self, g: Vector, norm: str) -> Vector:
        """Return w + rho T^2 g / ||T g||, T = (sqrt(v_hat) + eps)^(-1/2)."""
        second = self.largest if self.amsgrad else self.s
        t2 = [1 / ((v / (1 - BETAS[1] ** self.t)).sqrt() + EPS) for v in second]
        squares = [(a * x * x).sum() for a, x in zip(t2, g, strict=True)]
        moved = []
        for i, w in enumerate(self.w):
            rows = [i] if norm == "tensor" else [j for j, on in enumerate(self.perturbed) if on]
            length = torch.stack([squares[j] for j in rows]).sum().sqrt()
            moved.append(w + self.rho[i] * t2[i] * g[i] / length if self.perturbed[i] else w)
        return moved

    def update(self, g: Vector) -> None:
        self.t += 1
        for i, d in enumerate(g):
            lr = LR[GROUP_OF[i]]
            self.m[i] = BETAS[0] * self.m[i] + (1 - BETAS[0]) * d
            self.s[i] = BETAS[1] * self.s[i] + (1 - BETAS[1]) * d * d
            self.largest[i] = torch.maximum(self.largest[i], self.s[i])
            v = (self.largest if self.amsgrad else self.s)[i] / (1 - BETAS[1] ** self.t)
            self.w[i] = (1 - lr * DECAY) * self.w[i] - lr * self.m[i] / (1 - BETAS[0] ** self.t) / (v.sqrt() + EPS)


def built(dtype: torch.dtype, backend: str, **options: Any) -> tuple[nn.Module, PrecondSAM]:
    model, groups = model_and_groups(dtype)
    for group, lr in zip(groups, LR, strict=True):
        group.update(lr=lr, weight_decay=DECAY)
        group.pop("momentum", None), group.pop("nesterov", None)
    return model, PrecondSAM(groups, betas=BETAS, eps=EPS, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("norm", ["global", "tensor"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
def test_against_the_formula(backend: str, dtype: torch.dtype, norm: str, amsgrad: bool) -> None:
    """arXiv 2502.02407: the first step is AdamW's, all others take two passes."""
    model, optimizer = built(dtype, backend, norm=norm, amsgrad=amsgrad)
    passes: list[int] = []
    sam_steps(model, optimizer, count=passes)
    assert len(passes) == 2 * STEPS - 1
    p = AdamProblem(amsgrad=amsgrad)
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        p.update(g if step == 0 else p.gradient(p.direction(g, norm), step))
    assert_weights(model, p.w)


def test_the_first_step_by_hand_is_adams(backend: str) -> None:
    """first_step() perturbs nothing before there is a second moment, and second_step() is AdamW's step."""
    model, optimizer = built(torch.float32, backend)
    before = [p.detach().clone() for p in model.parameters()]
    nets.loss_of(model, 0).backward()
    assert not optimizer.needs_second_pass
    optimizer.first_step()
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.second_step(zero_grad=True)
    nets.loss_of(model, 1).backward()
    assert optimizer.needs_second_pass


def test_a_skipped_first_step_leaves_the_next_one_to_adam(backend: str) -> None:
    model, optimizer = built(torch.float32, backend)
    nets.loss_of(model, 0).backward()
    next(model.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.skipped and not optimizer.needs_second_pass
    optimizer.zero_grad()
    train(model, optimizer, range(1, 3))
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_count_of_0_is_no_second_moment(backend: str) -> None:
    """On an accelerator, a first step that was skipped leaves zeros in the state, because the host does not know."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))]
    optimizer = PrecondSAM(params, rho=0.5, lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[params[0]].update(step=torch.tensor(0.0), exp_avg_sq=torch.zeros(3))
    before = [p.detach().clone() for p in params]
    optimizer.first_step()
    assert torch.equal(params[0], before[0])
    t2 = 1 / (1 + 1e-8)
    torch.testing.assert_close(params[1].detach(), before[1] + 0.5 * t2 / (5 * t2) ** 0.5)
    optimizer.second_step()
    assert not optimizer.skipped and all(p.isfinite().all() for p in params)


def test_a_weight_without_a_second_moment_is_not_perturbed(backend: str) -> None:
    first, later = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = PrecondSAM([first, later], rho=0.5, lr=0.1, backend=backend)
    first.grad = torch.ones(4)
    optimizer.step()
    before = first.detach().clone()
    first.grad, later.grad = torch.ones(4), torch.ones(4)
    optimizer.first_step()
    assert torch.equal(later, torch.ones(4)) and not torch.equal(first, before)
    optimizer.second_step()
    first.grad, later.grad = torch.ones(4), torch.ones(4)
    before = later.detach().clone()
    optimizer.first_step()
    assert not torch.equal(later, before)


def test_state_that_is_replaced_counts(backend: str) -> None:
    """The second moment is read from the state of this step, also after a tensor was replaced there."""
    p, w = nn.Parameter(torch.tensor([1.0, 1.0])), torch.ones(2)
    optimizer = PrecondSAM([p], rho=1.0, lr=0.0, weight_decay=0.0, eps=1e-12, backend=backend)
    for second in ([1.0, 4.0], [16.0, 1.0]):
        p.grad = torch.ones(2)
        if not optimizer.state:
            optimizer.step()
        optimizer.state[p]["exp_avg_sq"] = torch.tensor(second) * (1 - 0.999 ** float(optimizer.state[p]["step"]))
        optimizer.first_step()
        t2 = 1 / torch.tensor(second).sqrt()
        torch.testing.assert_close(p.detach() - w, t2 / t2.sum().sqrt(), rtol=1e-4, atol=1e-6)
        optimizer.second_step()


def test_a_checkpoint_of_adamw_brings_the_second_moments(backend: str) -> None:
    """And a wide one is read for bf16 weights, whose T_w is computed in fp32."""
    params = [nn.Parameter(torch.randn(33).to(torch.bfloat16)), nn.Parameter(torch.randn(7, 3).to(torch.bfloat16))]
    plain = torch.optim.AdamW(params, lr=0.01)
    grads = [torch.randn_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    plain.step()
    optimizer = PrecondSAM(params, rho=0.5, lr=0.01, backend=backend)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.needs_second_pass
    before = [p.detach().clone() for p in params]
    optimizer.first_step()
    t2 = [1 / ((plain.state[p]["exp_avg_sq"].double() / 1e-3).sqrt() + 1e-8) for p in params]
    norm = torch.stack([(t * g.double() ** 2).sum() for t, g in zip(t2, grads, strict=True)]).sum().sqrt()
    for p, w, t, g in zip(params, before, t2, grads, strict=True):
        expected = w.double() + 0.5 * t * g.double() / norm
        torch.testing.assert_close(p.detach().double(), expected, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize("extra", [{"master_weights": True}, {"stochastic_rounding": True, "seed": 3}], ids=str)
def test_low_precision_weights_follow_reference(backend: str, extra: dict[str, Any]) -> None:
    def run(name: str) -> list[Tensor]:
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(s).to(torch.bfloat16)) for s in ((1025,), (3, 5))]
        optimizer = PrecondSAM(params, rho=0.5, lr=0.01, backend=name, **extra)
        for _ in range(3):
            for half in (optimizer.first_step, optimizer.second_step):
                for p in params:
                    p.grad = torch.randn_like(p)
                half()
        optimizer.first_step()
        return [p.detach().float() for p in params]

    for found, wanted in zip(run(backend), run("reference"), strict=True):
        # Sums differ in the last bits, so that single elements may round to the other neighbour.
        assert ((found - wanted).abs() > 2**-6 * wanted.abs() + 1e-3).float().mean() < 0.01


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_a_base_without_adams_second_moment_is_refused(base: Any) -> None:
    with pytest.raises(TypeError, match=f"PrecondSAM needs torch.optim.AdamW or Adam, .* not {base.__name__}"):
        PrecondSAM([nn.Parameter(torch.ones(2))], base, lr=0.1)


def test_adaptive_groups_are_refused() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))], "adaptive": True}]
    with pytest.raises(ValueError, match="group 1 has adaptive=True, and its T_w is made of Adam's second moment"):
        PrecondSAM(groups, lr=0.1)


def test_an_eps_of_0_is_refused_and_nothing_changes() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="group 0 has eps=0, and T_w divides by sqrt"):
        PrecondSAM([p], lr=0.1, eps=0.0)
    optimizer = PrecondSAM([p], lr=0.1)
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["eps"], before = 0.0, p.detach().clone()
    with pytest.raises(ValueError, match="group 0 has eps=0"):
        optimizer.first_step()
    assert torch.equal(p, before) and not optimizer.perturbed and torch.equal(p.grad, torch.ones(2))


def test_a_mask_is_refused() -> None:
    class Masked(PrecondSAM):
        mask_prob = 0.5

    with pytest.raises(ValueError, match=r"mask_prob=0\.5 perturbs a part of each tensor"):
        Masked([nn.Parameter(torch.ones(2))], lr=0.1)


def test_other_methods_take_no_norms_per_tensor() -> None:
    """SAM's own step has no pass over norms per tensor."""
    for method in (SAM, ESAM):
        assert method([nn.Parameter(torch.ones(2))], lr=0.1).stepper.tensor_norms is None
