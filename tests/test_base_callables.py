"""Base optimizers that a callable makes: partials, functions and lambdas, as the public SAM package takes them."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import nets
from support.bits import assert_same_optimizers
from torch.optim import Optimizer

from fused_sam import SAM, MomentumSAM


def adamw_of(groups: Any) -> Optimizer:
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


CASES: dict[str, tuple[Callable[..., Optimizer], dict[str, Any], type[Optimizer], dict[str, Any]]] = {
    "partial": (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), {}, torch.optim.SGD,
                {"lr": 0.1, "momentum": 0.9}),
    "partial and options": (functools.partial(torch.optim.SGD, momentum=0.9), {"lr": 0.1}, torch.optim.SGD,
                            {"lr": 0.1, "momentum": 0.9}),
    "function": (adamw_of, {}, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "wrapped class": (functools.partial(torch.optim.RMSprop, lr=0.01), {}, torch.optim.RMSprop, {"lr": 0.01}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_class_with_its_options(backend: str, case: str) -> None:
    base, options, cls, whole = CASES[case]
    model, twin = nets.net(), nets.net()
    optimizer = SAM(model.parameters(), base, rho=0.1, backend=backend, **options)
    other = SAM(twin.parameters(), cls, rho=0.1, backend=backend, **whole)
    assert optimizer.param_groups[0]["lr"] == whole["lr"]
    nets.train(model, optimizer, range(3))
    nets.train(twin, other, range(3))
    assert_same_optimizers(optimizer, other)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.param_groups[0]["lr"] == whole["lr"] and copied.stepper.base.cls is cls
    optimizer.load_state_dict(other.state_dict())


def test_the_fused_update_serves_it() -> None:
    optimizer = SAM(nets.net().parameters(), lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    assert optimizer.stepper.base.rule is not None
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[1]["momentum"] == 0.9
    assert MomentumSAM(nets.net().parameters(), functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)).training


def test_an_eps_of_any_form_is_the_base_optimizers() -> None:
    """Adafactor's is a pair."""
    model = nets.net()
    optimizer = SAM(model.parameters(), torch.optim.Adafactor, eps=(None, 1e-3), lr=0.01)
    nets.train(model, optimizer, range(2))
    assert optimizer.param_groups[0]["eps"] == (None, 1e-3)
    with pytest.raises(ValueError, match="eps must be a finite number"):
        SAM(nets.net().parameters(), torch.optim.SGD, eps=(None, 1e-3), lr=0.01)  # type: ignore[arg-type]
