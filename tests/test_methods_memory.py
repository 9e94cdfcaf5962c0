"""State of methods between steps: weights without a gradient in some steps, loss scales, options changed later."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import nets
from support.bits import assert_same_optimizers
from torch import Tensor, nn

import fused_sam
from fused_sam import ESAM, FriendlySAM


@pytest.mark.parametrize("base", [torch.optim.RMSprop, torch.optim.Adam, torch.optim.SGD])
def test_friendly_sam_starts_its_average_with_a_weight_s_first_update(backend: str, base: type[Any]) -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = FriendlySAM([p, q], base, rho=0.1, lr=0.01, lmbda=0.6, sigma=0.5, backend=backend)
    p.grad, q.grad = torch.full((3,), 5.0), torch.ones(2)
    optimizer.first_step()
    q.grad = torch.ones(2)  # the second pass does not reach p
    optimizer.step()
    assert "gradient_average" not in optimizer.state[p] and "gradient_average" in optimizer.state[q]
    optimizer.zero_grad()
    p.grad, q.grad = torch.full((3,), 2.0), torch.full((2,), 3.0)
    optimizer.first_step()
    p.grad, q.grad = torch.ones(3), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["gradient_average"], torch.full((3,), 2.0))
    torch.testing.assert_close(optimizer.state[q]["gradient_average"], torch.full((2,), 0.6 * 1 + 0.4 * 3))


def test_a_loss_scale_holds_for_one_step(backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = FriendlySAM([p], rho=0.1, lr=0.1, lmbda=0.6, backend=backend)
    for g, scale in ((1.0, 1024.0), (2.0, None)):
        p.grad = torch.full((3,), g * (scale or 1))
        optimizer.first_step(grad_scale=scale)
        p.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.ascent_grad_scale is None
        optimizer.zero_grad()
    torch.testing.assert_close(optimizer.state[p]["gradient_average"], torch.full((3,), 0.6 * 1 + 0.4 * 2))


def test_looksam_checks_a_k_that_is_set_later(backend: str) -> None:
    model = nets.net()
    optimizer = fused_sam.LookSAM(model.parameters(), lr=0.1, backend=backend)
    with pytest.raises(ValueError, match="LookSAM's option k must be at least 1"):
        optimizer.k = 0
    optimizer.step(nets.closure_for(model, 0))
    assert optimizer.k == 5


# ---- ESAM, whole tensors ------------------------------------------------------------------------------------


class PartlyUsed(nn.Module):
    """A model of which the loss does not use all weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.ParameterList(nn.Parameter(torch.ones(4)) for _ in range(3))
        self.used = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def tensors(model: nn.Module, seed: int, backend: str) -> ESAM:
    return ESAM(model.parameters(), rho=0.1, lr=0.1, gamma=1.0, beta=0.3, mask="tensors", seed=seed, backend=backend)


def test_esam_chooses_among_weights_that_the_loss_uses(backend: str) -> None:
    counts = []
    for seed in range(8):
        model = PartlyUsed()
        optimizer = tensors(model, seed, backend)
        for step in range(4):
            with optimizer.first_pass():
                nets.loss_of(model, step).backward()
                counts.append(sum(p.grad is not None for p in model.parameters()))
            chosen = optimizer.choose()
            assert chosen is not None and chosen <= {id(p) for p in model.used.parameters()}
            optimizer.first_step(zero_grad=True)
            nets.loss_of(model, step).backward()
            optimizer.second_step(zero_grad=True)
    assert counts[::4] == [2] * 8 and 1 in counts  # the first step computes all, later steps the chosen ones


def test_esam_resumes_with_its_list_of_unused_weights(backend: str) -> None:
    model = PartlyUsed()
    optimizer = tensors(model, 2, backend)
    for step in range(2):
        optimizer.step(nets.closure_for(model, step))
    other = copy.deepcopy(model)
    resumed = tensors(other, 2, backend)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 6):
        computed: list[list[bool]] = []
        for m, o in ((model, optimizer), (other, resumed)):
            o.zero_grad()
            with o.first_pass():
                computed.append([p.requires_grad for p in m.parameters()])
            o.step(nets.closure_for(m, step))
        assert computed[0] == computed[1]
    assert_same_optimizers(optimizer, resumed)


def test_esam_raises_an_error_if_the_loss_uses_no_chosen_weight(backend: str) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = ESAM([a, b], rho=0.1, lr=0.1, gamma=1.0, beta=1e-9, mask="tensors", backend=backend)
    for p in (a, b):
        p.grad = torch.ones(2)
    optimizer.first_step(zero_grad=True)
    for p in (a, b):
        p.grad = torch.ones(2)
    optimizer.second_step(zero_grad=True)
    other = b if optimizer.choose() == {id(a)} else a
    with pytest.raises(RuntimeError, match="uses none of the weights"), optimizer.first_pass():
        other.sum().backward()
    assert a.requires_grad and b.requires_grad
