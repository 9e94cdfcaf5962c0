"""`with optimizer.unperturbed()` restores the clean weights between the passes, and perturbs them again afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bits import assert_same_bits
from support.nets import loss_of, net, two_steps

from fused_sam import SAM

MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "adaptive": (torch.float32, {"adaptive": True}),
    "masters": (torch.bfloat16, {"master_weights": True}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
}


@pytest.mark.parametrize(("dtype", "options"), MODES.values(), ids=MODES.keys())
def test_weights_are_clean_inside_and_perturbed_after(
    backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model, twin = net(dtype=dtype), net(dtype=dtype)
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, momentum=0.9, backend=backend, **options)
    other = SAM(twin.parameters(), rho=0.5, lr=0.1, momentum=0.9, backend=backend, **options)
    for step in range(3):
        clean = [p.detach().clone() for p in model.parameters()]
        loss_of(model, step).backward()
        optimizer.first_step(zero_grad=True)
        perturbed = [p.detach().clone() for p in model.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(clean, perturbed, strict=True))
        with optimizer.unperturbed():
            assert not optimizer.perturbed
            assert_same_bits(model.parameters(), clean)
            optimizer.state_dict()  # saving is allowed inside
            loss_of(model, 9)
        assert optimizer.perturbed
        assert_same_bits(model.parameters(), perturbed)
        loss_of(model, step).backward()
        optimizer.second_step(zero_grad=True)
        two_steps(twin, other, step)
    assert_same_bits(model.parameters(), twin.parameters())


def test_the_error_of_saving_while_perturbed_names_unperturbed() -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1)
    loss_of(model, 0).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"unperturbed\(\)"):
        optimizer.state_dict()


def test_the_weights_are_perturbed_again_after_an_exception_inside() -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1)
    loss_of(model, 0).backward()
    optimizer.first_step()
    perturbed = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError), optimizer.unperturbed():
        raise KeyError
    assert_same_bits(model.parameters(), perturbed)


def test_steps_inside_are_allowed_if_the_weights_are_clean() -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1)
    with optimizer.unperturbed():
        two_steps(model, optimizer, 0)
    two_steps(model, optimizer, 1)


def test_steps_inside_raise_an_error_if_the_weights_are_perturbed() -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1)
    loss_of(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    with optimizer.unperturbed():
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="inside `with optimizer"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="inside `with optimizer"):
            optimizer.first_step()
    optimizer.restore()
