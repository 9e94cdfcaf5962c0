"""Hooks and the profiler get one optimizer and one step per update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.nets import closure_for, loss_of, net, two_steps
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fused_sam import SAM

LOOPS: dict[str, Any] = {
    "two steps": two_steps,
    "closure": lambda model, optimizer, step: optimizer.step(closure_for(model, step)),
    "plain": lambda model, optimizer, step: (loss_of(model, step).backward(), optimizer.step()),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_step_hooks_run_once_per_update(backend: str, loop: Any) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    seen: list[str] = []

    def note(name: str) -> Any:
        def hook(o: Any, args: Any, kwargs: Any) -> None:
            assert o is optimizer
            seen.append(name)

        return hook

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        for step in range(2):
            loop(model, optimizer, step)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre", "post", "global post"] * 2


def test_pre_hook_may_change_gradients_and_options(backend: str) -> None:
    """A hook that clips changes the second gradient, which is taken at the perturbed weights."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = SAM([p], rho=1.0, lr=1.0, backend=backend)
    at: list[float] = []

    def hook(o: Any, args: Any, kwargs: Any) -> None:
        at.append(float(p.detach()[0]))
        torch.nn.utils.clip_grad_norm_([p], 1.0)

    optimizer.register_step_pre_hook(hook)
    p.grad = torch.full((4,), 3.0)
    optimizer.first_step()
    optimizer.second_step()
    torch.testing.assert_close(at[0], 1.5)
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.5), rtol=1e-5, atol=0)


def test_a_step_can_be_undone_after_a_pre_hook_that_raises(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = SAM([p], rho=1.0, lr=1.0, backend=backend)

    def hook(o: Any, args: Any, kwargs: Any) -> None:
        raise ValueError("no luck")

    handle = optimizer.register_step_pre_hook(hook)
    p.grad = torch.ones(4)
    optimizer.first_step()
    with pytest.raises(ValueError, match="no luck"):
        optimizer.second_step()
    handle.remove()
    optimizer.restore()
    assert torch.equal(p, torch.ones(4))


def test_state_dict_hooks(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    two_steps(model, optimizer, 0)
    seen: list[str] = []

    def tagged(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "tag": "kept"}

    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(tagged)
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(state["tag"]))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    saved = optimizer.state_dict()
    assert saved["tag"] == "kept"
    optimizer.load_state_dict(saved)
    assert seen == ["save", "kept", "loaded"]


def test_load_pre_hook_may_adapt_a_checkpoint(backend: str) -> None:
    """torch documents this use: a hook changes another package's checkpoint before it is checked."""
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    two_steps(model, optimizer, 0)
    saved = optimizer.state_dict()
    wrapped_up = {"inner": saved}
    optimizer.register_load_state_dict_pre_hook(lambda o, state: state["inner"])
    optimizer.load_state_dict(wrapped_up)
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]


def test_the_profiler_names_the_step_as_for_torchs_optimizers(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    with torch.profiler.profile() as profile:
        two_steps(model, optimizer, 0)
        optimizer.step(closure_for(model, 1))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#SAM.step"] == 2
    assert "Optimizer.zero_grad#SAM.zero_grad" in counts
