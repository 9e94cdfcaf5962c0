"""Both state readers detect whether an optimizer's state is still that of its tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_sam.engine.grad_reader import PythonReader, Reader, make_reader

KEYS = ("exp_avg", "max_exp_avg_sq", "step")


@pytest.fixture(params=[make_reader, PythonReader])
def reader(request: pytest.FixtureRequest) -> Reader:
    return request.param([torch.nn.Parameter(torch.ones(3))])


def test_every_key_of_every_entry_counts(reader: Reader) -> None:
    weights = [torch.ones(2), torch.ones(3), torch.ones(4)]
    state: dict[torch.Tensor, dict[str, Any]] = {w: {key: torch.zeros(1) for key in KEYS} for w in weights}
    del state[weights[1]]["max_exp_avg_sq"]
    entries = list(state.values())
    columns = [[entry.get(key) for entry in entries] for key in KEYS]

    def unchanged() -> bool:
        return reader.unchanged(state, entries, entries, KEYS, columns)

    assert unchanged()
    assert reader.unchanged(state, entries, entries[1:], KEYS, [column[1:] for column in columns])
    assert reader.unchanged(state, entries, [], KEYS, [[], [], []])
    for i, key in [(0, "exp_avg"), (2, "step"), (1, "exp_avg")]:
        kept, entries[i][key] = entries[i][key], torch.zeros(1)
        assert not unchanged()
        del entries[i][key]
        assert not unchanged()
        entries[i][key] = kept
    assert unchanged()
    entries[1]["max_exp_avg_sq"] = torch.zeros(1)  # the entry had no such tensor
    assert not unchanged()
    del entries[1]["max_exp_avg_sq"]
    entries[1]["of_the_user"] = 1  # no table points to it
    assert unchanged()


def test_entries_come_and_go(reader: Reader) -> None:
    weights = [torch.ones(2), torch.ones(3)]
    state: dict[torch.Tensor, dict[str, Any]] = {w: {"step": torch.zeros(1)} for w in weights}
    entries = list(state.values())
    steps = [entry["step"] for entry in entries]
    assert reader.unchanged(state, entries, entries, ("step",), [steps])
    state[torch.ones(4)] = {}
    assert not reader.unchanged(state, entries, entries, ("step",), [steps])
    state.popitem()
    state[weights[1]] = dict(entries[1])  # an equal entry in a new dict, as after load_state_dict()
    assert not reader.unchanged(state, entries, entries, ("step",), [steps])
