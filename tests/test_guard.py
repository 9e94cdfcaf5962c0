"""guard(model): evaluating, saving or averaging perturbed weights is an error, for every method."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from support.bits import assert_same_bits
from support.family import METHODS, built, clean, train
from support.nets import batch, loss_of
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fused_sam
from fused_sam.methods.displaced import DisplacedSAM


def perturbed(method: str, backend: str = "reference") -> tuple[nn.Module, Any]:
    model, optimizer = built(method, backend)
    train(model, optimizer, range(3))  # LookSAM perturbs in every third step
    if not isinstance(optimizer, DisplacedSAM):
        optimizer.zero_grad()
        loss_of(model, 3).backward()
        optimizer.first_step(zero_grad=True)
    return model, optimizer


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_guarded_model_is_neither_evaluated_nor_saved_nor_averaged(method: str) -> None:
    model, optimizer = perturbed(method)
    averaged = AveragedModel(model)
    guards = [optimizer.guard(model), optimizer.guard(averaged)]
    stored = [p.detach().clone() for p in model.parameters()]
    attempts = [lambda: model.eval()(batch(0)[0]), model.state_dict, lambda: averaged.update_parameters(model)]
    held = "displaced" if isinstance(optimizer, DisplacedSAM) else "perturbed"
    for attempt in attempts:
        with pytest.raises(RuntimeError, match=f"weights are {held}"):
            attempt()
        assert_same_bits(model.parameters(), stored)
        with optimizer.unperturbed():
            attempt()
    model.train()
    model(batch(0)[0])  # a second pass
    averaged.eval()(batch(0)[0])  # the average has weights of its own
    averaged.state_dict()
    copied = copy.deepcopy(model).eval()
    copied(batch(0)[0])
    copied.state_dict()
    for guard in guards:
        guard.remove()
    for attempt in attempts[:2]:
        attempt()
    with pytest.raises(RuntimeError, match=f"weights are {held}"):  # known without a guard
        attempts[2]()


def test_averages_of_other_models_and_of_clean_weights_are_no_error() -> None:
    model, optimizer = perturbed("ASAM")
    other = built("ASAM", "reference")[0]
    AveragedModel(other).update_parameters(other)
    copied = copy.deepcopy(model)
    AveragedModel(model).update_parameters(copied)
    averaged = AveragedModel(model)
    optimizer.restore()
    averaged.update_parameters(model)
    assert_same_bits(averaged.module.parameters(), model.parameters())


def test_a_guarded_model_is_used_as_usual_with_clean_weights() -> None:
    model, optimizer = built("ASAM", "reference")
    optimizer.guard(model)
    train(model, optimizer, range(2))
    model.eval()(batch(0)[0])
    model.state_dict()
    for group in optimizer.param_groups:
        group["rho"] = 0.0
    model.train()
    loss_of(model, 0).backward()
    optimizer.first_step()  # does not perturb
    model.state_dict()


def test_clean_between_steps_gives_the_same_weights(backend: str) -> None:
    (model, optimizer), (twin, other) = built("MomentumSAM", backend), built("MomentumSAM", backend)
    optimizer.clean_between_steps = True
    averaged, cleaned = AveragedModel(model), AveragedModel(twin)
    for step in range(4):
        optimizer.train()
        train(model, optimizer, range(step, step + 1))
        assert not optimizer.displaced
        averaged.update_parameters(model)
        pickle.loads(pickle.dumps(optimizer.state_dict()))
        train(twin, other, range(step, step + 1))
        with other.unperturbed():
            cleaned.update_parameters(twin)
    clean(other)
    assert_same_bits(model.parameters(), twin.parameters())
    assert_same_bits(averaged.parameters(), cleaned.parameters())
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        optimizer.step()


def test_every_method_has_a_guard() -> None:
    assert all(hasattr(method, "guard") for method in fused_sam.METHODS.values())
