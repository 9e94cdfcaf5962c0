"""Weights, gradients and state in memory that kernels cannot read, or that is shared, give the right value or an error.

Each case runs in a process of its own, because a wrong address ends the process.
"""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from support import hostile
from support.campaign import Campaign
from support.hostile import BAD_GRADS, GRADS, SHARED, STATE, WEIGHTS
from torch import nn

from fused_sam import SAM

# Each process is a copy of one that has imported torch, which takes a hundredth of the time of a new one.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch._subclasses.fake_tensor", "torch.testing._internal.two_tensor"])

CASES = [
    ("weight", "sgd", list(WEIGHTS)),
    ("weight", "adamw", list(WEIGHTS)),
    ("weight", "wrapped", list(WEIGHTS)),
    ("grad", "max_norm", list(GRADS)),
    ("grad", "wrapped", list(GRADS)),
    ("state", "sgd", list(STATE)),
    ("state", "adamw", list(STATE)),
    ("shared", "max_norm", SHARED),
    ("shared", "wrapped", SHARED),
    ("refused", "sgd", list(BAD_GRADS)),
    ("refused", "wrapped", list(BAD_GRADS)),
]


@pytest.mark.parametrize(("case", "settings", "kinds"), CASES, ids=[f"{c}-{s}" for c, s, _ in CASES])
def test_hostile_memory(campaign: Campaign, backend: str, case: str, settings: str, kinds: list[str]) -> None:
    campaign.count(cases=len(kinds), faults=len(kinds))
    results, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=hostile.run, args=(sender, backend, case, settings, kinds))
    process.start()
    sender.close()
    found = []
    try:
        while results.poll(120):
            found.append(results.recv())
    except EOFError:  # it has ended
        pass
    process.join(10)
    assert found == [(kind, "right") for kind in kinds]
    assert process.exitcode == 0


def test_separate_gradients_are_left_where_they_are(backend: str) -> None:
    """Columns of one buffer, and rows of one, as in the buckets of DistributedDataParallel."""
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizer = SAM(params, lr=0.1, backend=backend)
    columns, rows = torch.ones(4, 3), torch.ones(3, 4)
    for grads in (columns.unbind(1), rows.unbind(0)):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.first_step()
        optimizer.step()
        assert [p.grad.data_ptr() for p in params if p.grad is not None] == [g.data_ptr() for g in grads]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda: [torch.ones(3).expand(4, 3)], "parameter 0 of group 0 .* several elements at one address"),
        (lambda: [torch.ones(6).unfold(0, 3, 1)], "parameter 0 of group 0 .* several elements at one address"),
        (lambda: (lambda m: [m[:, 0], m])(torch.ones(4, 3)), "parameter 0 .* parameter 1 .* share memory"),
        (lambda: (lambda m: [m, torch.ones(2), m.view(-1)[7:9]])(torch.ones(4, 3)), "parameter 0 .* parameter 2"),
    ],
)
def test_weights_that_overlap(weights: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAM([nn.Parameter(t) for t in weights()], lr=0.1)  # type: ignore[operator]


def test_columns_of_one_matrix_are_weights(backend: str) -> None:
    SAM([nn.Parameter(c) for c in torch.ones(4, 3).unbind(1)], lr=0.1, backend=backend)


@pytest.mark.parametrize("change", ["freed", "smaller", "turned", "negated"])
def test_a_weight_whose_memory_changes_between_the_passes(backend: str, change: str) -> None:
    params = [nn.Parameter(torch.arange(9.0).view(3, 3)), nn.Parameter(torch.ones(2))]
    optimizer = SAM(params, lr=0.1, rho=0.1, backend=backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.first_step()
        optimizer.step()
    optimizer.first_step()
    w = params[0]
    if change in ("freed", "smaller"):
        w.untyped_storage().resize_(0 if change == "freed" else 8)
        with pytest.raises((RuntimeError, ValueError), match="parameter 0 of group 0"):
            optimizer.step()
        return
    w.data = w.data.t() if change == "turned" else torch._neg_view(w.data)
    clean = [torch.arange(9.0).view(3, 3) - 0.2, torch.full((2,), 0.8)]
    optimizer.step()  # the undo gives every element its clean value, wherever it lies
    for p, c in zip(params, clean, strict=True):
        torch.testing.assert_close(p.detach(), c - 0.1)
