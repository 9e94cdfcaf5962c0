"""MicrobatchSAM adds every gradient once, even if other code replaces, owns or clears p.grad."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import nets
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fused_sam import MicrobatchSAM
from fused_sam.schedule import LastSteps

PARTS = 3


def loss_of(model: nn.Module, step: int, i: int) -> Tensor:
    x, y = nets.batch(step, torch.float64)
    return nn.functional.cross_entropy(model(x[i::PARTS]), y[i::PARTS])


def optimizer_of(model: nn.Module, backend: str, **options: object) -> MicrobatchSAM:
    return MicrobatchSAM(
        model.parameters(), rho=0.2, lr=0.1, momentum=0.8, num_microbatches=PARTS, backend=backend, **options
    )


def expected(steps: int = 3, rho: float = 0.2) -> list[Tensor]:
    """Return the weights after mSAM with SGD and momentum, written out in float64."""
    model = nets.net(dtype=torch.float64)
    params = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        total = [torch.zeros_like(p) for p in params]
        for i in range(PARTS):
            g = torch.autograd.grad(loss_of(model, step, i), params)
            norm = torch.cat([v.flatten() for v in g]).norm()
            clean = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, v in zip(params, g, strict=True):
                    p.add_(rho / norm * v)
            up = torch.autograd.grad(loss_of(model, step, i), params)
            with torch.no_grad():
                for p, c, t, u in zip(params, clean, total, up, strict=True):
                    p.copy_(c)
                    t.add_(u)
        with torch.no_grad():
            for p, v, t in zip(params, velocity, total, strict=True):
                v.mul_(0.8).add_(t / PARTS)
                p.sub_(0.1 * v)
    return [p.detach() for p in params]


def assert_is(model: nn.Module, weights: list[Tensor]) -> None:
    for p, w in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-11)  # float64 sums in another order


def by_hand(model: nn.Module, backward: Callable[[Tensor], None], backend: str) -> None:
    optimizer = optimizer_of(model, backend)
    for step in range(3):
        for i in range(PARTS):
            backward(loss_of(model, step, i))
            optimizer.first_step()
            backward(loss_of(model, step, i))
            if i < PARTS - 1:
                optimizer.next_microbatch()
        optimizer.second_step(zero_grad=True)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("way", ["in place", "create_graph", "clone"])
def test_by_hand(backend: str, way: str) -> None:
    model = nets.net(dtype=torch.float64)

    def backward(loss: Tensor) -> None:
        loss.backward(create_graph=way == "create_graph")
        if way == "clone":
            for p in model.parameters():
                p.grad = None if p.grad is None else p.grad.clone()

    by_hand(model, backward, backend)
    assert_is(model, expected())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_gradients_that_ddp_buckets_own_are_added_once(backend: str, views: bool, closure: bool) -> None:
    model = DistributedDataParallel(nets.net(dtype=torch.float64), gradient_as_bucket_view=views)
    if closure:
        by_closure(model, backend, lambda: None)
    else:
        by_hand(model, Tensor.backward, backend)
    assert_is(model, expected())


def by_closure(model: nn.Module, backend: str, clear: Callable[[], object], **options: object) -> None:
    optimizer = optimizer_of(model, backend, **options)
    for step in range(3):

        def closure(i: int, step: int = step) -> Tensor:
            clear()
            loss = loss_of(model, step, i)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("perturbs", [True, False])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_closure_may_clear_the_model_s_gradients(backend: str, to_none: bool, perturbs: bool) -> None:
    model = nets.net(dtype=torch.float64)
    options = {} if perturbs else {"schedule": LastSteps(100)}
    by_closure(model, backend, lambda: model.zero_grad(set_to_none=to_none), **options)
    assert_is(model, expected(rho=0.2 if perturbs else 0.0))


def test_a_failed_closure_does_not_change_the_next_step(backend: str) -> None:
    model = nets.net(dtype=torch.float64)
    optimizer = optimizer_of(model, backend)

    def fails(i: int) -> Tensor:
        loss = loss_of(model, 5, i)
        loss.backward()
        if i == 1:
            raise KeyError
        return loss

    with pytest.raises(KeyError):
        optimizer.step(fails)
    for i in range(PARTS):
        loss_of(model, 0, i).backward()
        optimizer.first_step()
        loss_of(model, 0, i).backward()
        if i < PARTS - 1:
            optimizer.next_microbatch()
    optimizer.step()
    assert_is(model, expected(1))


def test_a_micro_batch_without_gradients_does_not_undo_an_earlier_skip(backend: str) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = MicrobatchSAM([p], rho=0.1, lr=0.1, num_microbatches=2, backend=backend)
    p.grad = torch.full((4,), float("inf"))
    optimizer.first_step()
    p.grad = torch.ones(4)
    optimizer.next_microbatch()
    optimizer.first_step()
    optimizer.second_step()
    assert optimizer.step_was_skipped and torch.equal(p, torch.ones(4))


def test_a_group_added_between_micro_batches(backend: str) -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))
    optimizer = MicrobatchSAM([p], rho=0.0, lr=0.5, num_microbatches=2, backend=backend)
    p.grad = torch.ones(4)
    optimizer.first_step()
    p.grad = torch.ones(4)
    optimizer.next_microbatch()
    optimizer.add_param_group({"params": [q]})
    p.grad, q.grad = torch.ones(4), torch.ones(3)
    optimizer.first_step()
    p.grad, q.grad = (None if p.grad is None else p.grad + 1.0), torch.ones(3)
    optimizer.second_step()
    assert torch.equal(p, torch.full((4,), 0.5)) and torch.equal(q, torch.full((3,), 0.75))
