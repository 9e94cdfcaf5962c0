"""Backends of other packages: how to register one, backends with some primitives, and errors that name the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import nets
from support.bits import assert_same_optimizers
from torch import Tensor

from fused_sam import GSAM, SAM, backends
from fused_sam.backends.contract import PerturbGroup, Status, Table


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))


class CountingBackend(backends.Foreach):
    """A backend with perturb of its own; foreach has the other primitives."""

    name = "noting"
    calls: list[int] = []  # noqa: RUF012

    def perturb(self, table: Table, groups: Sequence[PerturbGroup], status: Status) -> None:
        self.calls.append(len(table.params))
        super().perturb(table, groups, status)


@pytest.mark.parametrize("cls", [SAM, GSAM])
def test_a_backend_may_implement_one_primitive(cls: type[SAM], monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.register(CountingBackend) is CountingBackend
    CountingBackend.calls.clear()
    model, twin = nets.net(), nets.net()
    monkeypatch.setenv("FUSED_SAM_BACKEND", "noting")
    optimizer = cls(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
    monkeypatch.delenv("FUSED_SAM_BACKEND")
    other = cls(twin.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend="foreach")
    nets.train(model, optimizer, range(4))
    nets.train(twin, other, range(4))
    assert optimizer.backend == "noting" and CountingBackend.calls == [6] * 4
    assert backends.available()["noting"] is True
    assert_same_optimizers(optimizer, other)


def test_a_backend_may_be_registered_twice_but_its_name_not_taken() -> None:
    backends.register(CountingBackend)
    backends.register(CountingBackend)
    other = type("Other", (backends.Reference,), {"name": "noting"})
    with pytest.raises(ValueError, match=r"named 'noting' is registered already: choose another name for Other"):
        backends.register(other)
    with pytest.raises(ValueError, match="named 'cpu' is registered already"):
        backends.register(type("Other", (backends.Reference,), {"name": "cpu"}))


def test_a_backend_without_a_needed_primitive_is_an_error() -> None:
    class Half(backends.Backend):
        name = "half"

        @classmethod
        def unavailable_reason(cls) -> str | None:
            return None

        def supports(self, device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype) -> bool:
            return True

        def restore(self, table: Table) -> None:
            pass

    lacks = r"Half lacks accumulate_norm, .*perturb, squares, update: .*derive it from .*Reference or Foreach"
    with pytest.raises(TypeError, match=lacks):
        backends.register(Half)
    assert "half" not in backends.available()


@pytest.mark.parametrize("wrong", [Tensor, "cpu", None])
def test_a_class_that_is_no_backend_is_an_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"takes a subclass of fused_sam\.backends\.Backend"):
        backends.register(wrong)


@pytest.mark.parametrize("name", [None, "", "auto", 3])
def test_a_backend_needs_a_name_of_its_own(name: Any) -> None:
    members = {} if name is None else {"name": name}
    with pytest.raises(TypeError, match="needs a name of its own"):
        backends.register(type("Nameless", (backends.Reference,), members))


def test_a_backend_that_does_not_run_here_says_why() -> None:
    class Elsewhere(backends.Reference):
        name = "elsewhere"

        @classmethod
        def unavailable_reason(cls) -> str | None:
            return "it needs a machine of another kind; use backend='auto'"

    backends.register(Elsewhere)
    with pytest.raises(RuntimeError, match="'elsewhere' cannot run here: it needs a machine of another kind"):
        SAM(nets.net().parameters(), lr=0.1, backend="elsewhere")
