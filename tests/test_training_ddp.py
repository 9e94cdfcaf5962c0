"""Tests of sam_step() and local_perturbation() under DistributedDataParallel: two gloo processes, and one alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bits import assert_same_bits, same_bits
from support.nets import batch, net
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fused_sam import SAM
from fused_sam.schedule import Every
from fused_sam.training import sam_step

OPTIONS: dict[str, Any] = {"rho": 0.3, "lr": 0.1, "momentum": 0.9}
STEPS = 3
RANKS = 2

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def part(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step, torch.float64)
    return x[rank::RANKS], y[rank::RANKS]


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        for local in (False, True):
            model = DistributedDataParallel(net(dtype=torch.float64))
            optimizer = SAM(model.parameters(), **OPTIONS)
            averages: list[int] = []
            model.register_comm_hook(averages, counting_all_reduce)
            for step in range(STEPS):
                sam_step(model, loss_fn, part(step, rank), optimizer, microbatches=2, local=local)
            save(folder, f"{local}{rank}", model, optimizer, averages=len(averages))

        model = DistributedDataParallel(net(dtype=torch.float64))
        optimizer = SAM(model.parameters(), schedule=Every(2), **OPTIONS)
        for step in range(STEPS):
            sam_step(model, loss_fn, part(step, rank), optimizer, local=True)
        save(folder, f"every-second{rank}", model, optimizer)

        def infinite_on_one(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss_fn(model, batch) * (torch.inf if rank == 1 and not optimizer.perturbed else 1)

        result = sam_step(model, infinite_on_one, part(STEPS + 1, rank), optimizer, local=True)
        save(folder, f"skipped{rank}", model, optimizer, skipped=bool(result.skipped))
    finally:
        distributed.destroy_process_group()


def save(folder: str, name: str, model: DistributedDataParallel, optimizer: SAM, **more: Any) -> None:
    weights = [p.detach().clone() for p in model.parameters()]
    local = optimizer.stepper.skip_process_group is model.process_group
    torch.save({"weights": weights, "local": local, **more}, f"{folder}/{name}")


def counting_all_reduce(averages, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
    averages.append(bucket.index())
    reduced = distributed.all_reduce(bucket.buffer(), async_op=True)
    assert reduced is not None
    return reduced.get_future().then(lambda done: done.value()[0] / RANKS)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, int], Any]:
    folder: Path = tmp_path_factory.mktemp("ddp")
    multiprocessing.spawn(run, args=(str(folder),), nprocs=RANKS)
    runs = (False, True, "every-second", "skipped")
    return {(run, rank): torch.load(folder / f"{run}{rank}") for run in runs for rank in range(RANKS)}


@pytest.mark.parametrize("local", [False, True])
def test_processes_stay_equal_and_average_once_per_pass(found: dict[tuple[Any, int], Any], local: bool) -> None:
    assert_same_bits(found[local, 0]["weights"], found[local, 1]["weights"])
    for rank in range(RANKS):
        # A pass has two micro-batches, and the net fits into one bucket. A local ascent pass averages nothing.
        assert found[local, rank]["averages"] == STEPS * (1 if local else 2)
        assert found[local, rank]["local"] == local


def test_two_processes_equal_one_with_the_whole_batch(found: dict[tuple[Any, int], Any]) -> None:
    model = net(dtype=torch.float64)
    optimizer = SAM(model.parameters(), **OPTIONS)
    for step in range(STEPS):
        sam_step(model, loss_fn, batch(step, torch.float64), optimizer)
    for p, q in zip(model.parameters(), found[False, 0]["weights"], strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-11, atol=1e-13)  # float64 sums in another order


def test_with_local_each_process_has_its_own_perturbation(found: dict[tuple[Any, int], Any]) -> None:
    model = net(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        gradients = []
        for rank in range(RANKS):
            perturbed = copy.deepcopy(model)
            g = torch.autograd.grad(loss_fn(perturbed, part(step, rank)), list(perturbed.parameters()))
            norm = torch.cat([t.flatten() for t in g]).norm()
            with torch.no_grad():
                for p, t in zip(perturbed.parameters(), g, strict=True):
                    p += 0.3 * t / norm
            gradients.append(torch.autograd.grad(loss_fn(perturbed, part(step, rank)), list(perturbed.parameters())))
        for p, *both in zip(model.parameters(), *gradients, strict=True):
            p.grad = sum(both) / RANKS  # type: ignore[assignment]
        optimizer.step()
    for p, q in zip(model.parameters(), found[True, 0]["weights"], strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=1e-12)
    assert not any(same_bits(p, q) for p, q in zip(found[True, 0]["weights"], found[False, 0]["weights"], strict=True))


def test_steps_between_perturbations_average_their_only_gradient(found: dict[tuple[Any, int], Any]) -> None:
    assert_same_bits(found["every-second", 0]["weights"], found["every-second", 1]["weights"])
    assert not any(
        same_bits(p, q) for p, q in zip(found["every-second", 0]["weights"], found[True, 0]["weights"], strict=True)
    )


def test_a_gradient_that_is_infinite_on_one_process_skips_the_step_on_all(found: dict[tuple[Any, int], Any]) -> None:
    for rank in range(RANKS):
        assert found["skipped", rank]["skipped"]
        assert_same_bits(found["skipped", rank]["weights"], found["every-second", rank]["weights"])
