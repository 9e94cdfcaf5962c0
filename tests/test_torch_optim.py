"""SAM takes what torch.optim takes: the inputs of torch's own optimizer tests, for every optimizer class of torch.

DIFFERENCES lists what remains different, each with its reason.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.torch_optimizers import BASES, CLASSES, REFUSED, compare, database, parameters, sam
from torch import nn

DIFFERENCES = {
    ("LBFGS", "every input"): REFUSED["LBFGS"],
    ("SparseAdam", "steps"): REFUSED["SparseAdam"],
    ("every class", "complex weights"): "refused when SAM is built; torch's own classes take them or refuse at a step",
    ("every class", "weights on several devices"): "one norm over devices would wait for each of them",
    ("every class", "weights that are results of operations"): "SAM's perturbation is no part of an autograd graph",
    ("every class", "a weight twice in a group"): "warned of as in torch; updated once per step, in torch twice",
    ("Adam and AdamW", "every input"): "rounding: SAM's kernel and torch's loops order their operations differently",
    ("Adam and AdamW", "capturable=True on the CPU"): "SAM's kernels take it; torch raises an error at the first step",
}

# Weights are of size 1 to 4, so that one rounding is up to 2.4e-7. Ten roundings are five updates of an order of
# operations of their own; with rho, those of the perturbation reach the second gradient as well.
ROUNDING = 2.4e-6


@functools.cache
def infos() -> dict[str, Any]:
    module = database()
    if module is None:
        pytest.skip("this version of torch has no torch.testing._internal.common_optimizers to import")
    return {info.name: info for info in module.optim_db}


def test_the_database_has_every_class() -> None:
    assert infos().keys() == CLASSES.keys()


@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("name", BASES)
def test_inputs(name: str, rho: float) -> None:
    """With rho 0 every weight has plain torch's bits, except for the rounding of Adam and AdamW."""
    inputs = database()._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, infos()[name])
    assert len(inputs) >= 5
    for each in inputs:
        limit = ROUNDING if rho or name in ("Adam", "AdamW") else 0.0
        assert compare(CLASSES[name], each.kwargs, rho) <= limit, each.desc


def outcome(make: Callable[[], Any]) -> str:
    """Return the warnings and the error that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            make()
            error = "accepted"
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return " ".join([*(f"{w.category.__name__}: {w.message}" for w in caught), error])


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "LBFGS"])
def test_error_inputs(name: str) -> None:
    """SAM raises the errors and gives the warnings of the plain class, in their words."""
    cls = CLASSES[name]
    errors = infos()[name].optim_error_inputs_func("cpu", torch.float32)
    assert len(errors) >= 5
    for each in errors:
        case = each.optimizer_error_input

        def given(case: Any = case) -> Any:
            return parameters() if case.params is None else case.params

        theirs = outcome(lambda: cls(given(), **case.kwargs))  # noqa: B023
        ours = outcome(lambda: sam(given(), cls, **case.kwargs))  # noqa: B023
        if "complex" in case.desc and theirs == "accepted":
            assert ours.startswith("TypeError: parameter 0 of group 0") and "complex64" in ours
        else:
            assert ours == theirs, case.desc


def test_lbfgs_is_refused() -> None:
    for each in infos()["LBFGS"].optim_inputs_func("cpu"):
        with pytest.raises(TypeError, match=r"LBFGS\.step needs a closure of its own"):
            sam(parameters(), torch.optim.LBFGS, **each.kwargs)


@pytest.mark.parametrize("name", CLASSES)
def test_sparse_gradients_are_refused_and_nothing_moves(name: str) -> None:
    if name == "LBFGS":
        pytest.skip(REFUSED[name])
    layer = nn.Embedding(5, 3, sparse=True)
    before = layer.weight.detach().clone()
    optimizer = sam(layer.parameters(), CLASSES[name], 0.1)
    for call in (optimizer.first_step, optimizer.step):
        layer(torch.tensor([1, 1, 3])).sum().backward()
        with pytest.raises(RuntimeError, match="sparse gradient, which SAM does not support"):
            call()
        assert torch.equal(layer.weight, before) and not any(
            entry.get("step", 0) for entry in optimizer.state.values()
        )


@pytest.mark.parametrize("name", ["SparseAdam"])
def test_dense_gradients_of_sparse_adam_are_its_own_error(name: str) -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = sam(layer.parameters(), CLASSES[name], 0.1)
    layer(torch.ones(3)).sum().backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        optimizer.second_step()
    assert torch.equal(layer.weight, before) and not optimizer.perturbed


@pytest.mark.parametrize("name", BASES)
def test_complex_weights_are_refused_by_name(name: str) -> None:
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"'filter' \(shape \(2, 2\)\) is torch\.complex64, .*view_as_complex"):
        sam([("filter", p)], CLASSES[name])


def test_weights_on_several_devices_and_in_a_graph_are_refused() -> None:
    with pytest.raises(ValueError, match="use one optimizer per device"):
        sam([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))], torch.optim.RMSprop)
    product = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        sam([product], torch.optim.SGD, differentiable=True)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_capturable_on_the_cpu(name: str) -> None:
    params, others = parameters(), parameters()
    optimizer, plain = sam(params, CLASSES[name], lr=0.01, capturable=True), CLASSES[name](others, lr=0.01)  # type: ignore[call-arg]
    for each, opt in ((params, optimizer), (others, plain)):
        for p in each:
            p.grad = torch.full_like(p, 0.5)
        opt.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=ROUNDING)


def test_every_difference_has_a_reason() -> None:
    assert all(len(reason) > 20 for reason in DIFFERENCES.values())
    assert {name for name, _ in DIFFERENCES} <= {*CLASSES, "every class", "Adam and AdamW"}
