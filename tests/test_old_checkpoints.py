"""Checkpoints of earlier versions have other group keys. They load, and training continues bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import nets
from support.bits import assert_same_optimizers
from torch import nn

import fused_sam
from fused_sam.schedule import AdaptiveSchedule, Every

OLD_NAMES = {
    "looksam_step": "looks",
    "sam_step": "updates",
    "rng_offset": "draws",
    "mask_offset": "choices",
    "idle_params": "idle",
}
CASES: dict[str, tuple[type[fused_sam.SAM], dict[str, Any], set[str]]] = {
    "LookSAM": (fused_sam.LookSAM, {"k": 3}, {"looks"}),
    "SAM every second": (fused_sam.SAM, {"schedule": Every(2)}, {"updates"}),
    "AE-SAM": (fused_sam.SAM, {"schedule": AdaptiveSchedule(8)}, {"updates"}),
    "ESAM elements": (fused_sam.ESAM, {"gamma": 1.0, "seed": 4}, {"draws"}),
    "ESAM tensors": (fused_sam.ESAM, {"gamma": 1.0, "mask": "tensors", "seed": 4}, {"choices", "idle"}),
    "stochastic": (fused_sam.SAM, {"stochastic_rounding": True, "seed": 4}, {"draws"}),
    "masters": (fused_sam.SAM, {"master_weights": True}, set()),
    "FriendlySAM": (fused_sam.FriendlySAM, {}, set()),
    "AdamW": (fused_sam.SAM, {"base_optimizer": torch.optim.AdamW}, set()),
}


def as_an_earlier_version_wrote_it(state_dict: dict[str, Any]) -> dict[str, Any]:
    old = copy.deepcopy(state_dict)
    old["param_groups"] = [{OLD_NAMES.get(k, k): v for k, v in group.items()} for group in old["param_groups"]]
    return old


def made(case: str, backend: str) -> tuple[nn.Module, fused_sam.SAM]:
    method, options, _ = CASES[case]
    low = "master_weights" in options or "stochastic_rounding" in options
    model = nets.net(dtype=torch.bfloat16 if low else torch.float32)
    rate = {"lr": 0.01} if "base_optimizer" in options else {"lr": 0.1, "momentum": 0.9}
    return model, method(model.parameters(), rho=0.1, backend=backend, **rate, **options)


def train(model: nn.Module, optimizer: fused_sam.SAM, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        nets.loss_of(model, step).backward()
        if optimizer.needs_second_pass:
            optimizer.first_step(zero_grad=True)
            nets.loss_of(model, step).backward()
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_equal(backend: str, case: str) -> None:
    model, optimizer = made(case, backend)
    train(model, optimizer, range(4))
    old = as_an_earlier_version_wrote_it(optimizer.state_dict())
    assert CASES[case][2] <= old["param_groups"][0].keys()
    twin, other = made(case, backend)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(old)
    assert not OLD_NAMES.keys() & old["param_groups"][0].keys(), "what is passed in is not changed"
    assert not set(OLD_NAMES.values()) & other.param_groups[0].keys()
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, range(4, 8))
    assert_same_optimizers(optimizer, other)


def test_keys_of_a_base_optimizers_checkpoint_keep_their_names() -> None:
    """A group without rho is not one of SAM's groups, so that its keys keep their names."""
    _, optimizer = made("AdamW", "auto")
    plain = torch.optim.AdamW(nets.net().parameters(), lr=0.01)
    saved = plain.state_dict()
    saved["param_groups"][0]["updates"] = 17
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["updates"] == 17 and optimizer.param_groups[0]["rho"] == 0.1
