"""A training loop that never perturbs gets one warning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.nets import closure_for, loss_of, net, two_steps

from fused_sam import SAM, MomentumSAM
from fused_sam.engine.user_warnings import PlainStepWarning
from fused_sam.schedule import Every

pytestmark = pytest.mark.filterwarnings("error::fused_sam.engine.user_warnings.PlainStepWarning")


def plain_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int = 0) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"schedule": Every(2)}, {"adaptive": True}], ids=["SAM", "schedule", "ASAM"])
def test_a_loop_without_a_second_pass_gets_one_warning_at_its_own_line(options: dict[str, Any]) -> None:
    model = net()
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1, **options)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # the scheduler wraps step() again
    with pytest.warns(PlainStepWarning, match="plain SGD step: this loop trains without SAM") as caught:
        plain_step(model, optimizer)
    assert [w.filename for w in caught] == [__file__]
    plain_step(model, optimizer)


def test_a_loop_with_a_second_pass_or_without_need_of_one_gets_no_warning() -> None:
    def fresh(**options: Any) -> tuple[torch.nn.Module, SAM]:
        model = net()
        return model, SAM(model.parameters(), lr=0.1, **options)

    model, optimizer = fresh()
    two_steps(model, optimizer, 0)
    plain_step(model, optimizer)
    model, optimizer = fresh(schedule=Every(2))
    loss_of(model, 0).backward()
    assert optimizer.needs_second_pass
    optimizer.step()
    model, optimizer = fresh(rho=0.0)
    plain_step(model, optimizer)
    model, optimizer = fresh()
    optimizer.step(closure_for(model, 0))
    plain_step(model, optimizer)
    model = net()
    plain_step(model, MomentumSAM(model.parameters(), lr=0.1, momentum=0.9))


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_step_of_rate_zero_only_creates_state(rate: Any) -> None:
    # torch.distributed.checkpoint creates an optimizer's state with such a step.
    model = net()
    optimizer = SAM(model.parameters(), lr=rate, momentum=0.9)
    plain_step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.warns(PlainStepWarning):
        plain_step(model, optimizer)
