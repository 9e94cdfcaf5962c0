"""Tests of the gradient readers: the gradients that they accept as the usual case, and the returned addresses."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_sam.engine.grad_reader import PythonReader, make_reader


class Subclass(torch.Tensor):
    pass


@pytest.fixture(params=[make_reader, PythonReader])
def reader_of(request: pytest.FixtureRequest) -> Callable[[list[Tensor]], Any]:
    return request.param


def params_of(*shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(tuple(shape), dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def assert_read(reader: Any, groups: list[list[Any]]) -> None:
    grads, packed, some_absent = reader.read(groups)
    assert not some_absent
    params = [p for group in groups for p in group]
    assert len(grads) == len(params) and all(g is p.grad for g, p in zip(grads, params, strict=True))
    assert array("q", packed).tolist() == [p.grad.data_ptr() for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_usual_case(reader_of: Any, dtype: torch.dtype) -> None:
    params = params_of((3,), (4, 5), (), (2, 3, 4, 5), (1, 1), (2,) * 7, dtype=dtype)
    reader = reader_of(params)
    assert_read(reader, [params])
    assert_read(reader, [params[:2], [], params[2:]])
    for p in params:
        p.grad = torch.ones_like(p)  # every step has new gradients
    assert_read(reader, [params])


def test_other_parameters(reader_of: Any) -> None:
    params = params_of((3,), (4, 5))
    reader = reader_of(params)
    others = params_of((3,), (4, 5))
    for groups in ([params[::-1]], [params[:1]], [params + others[:1]], [others], []):
        assert reader.read(groups) is None


GRADS: dict[str, Callable[[], Tensor | None]] = {
    "transposed": lambda: torch.ones(5, 4).t(),
    "gaps": lambda: torch.ones(4, 10)[:, ::2],
    "expanded": lambda: torch.ones(5).expand(4, 5),
}


@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS.keys())
def test_unusual_gradients(reader_of: Any, grad: Callable[[], Tensor | None]) -> None:
    params = params_of((3,), (4, 5))
    reader = reader_of(params)
    params[1].grad = grad()
    assert reader.read([params]) is None


def test_absent_gradients(reader_of: Any) -> None:
    params = params_of((3,), (4, 5), (2,))
    reader = reader_of(params)
    params[1].grad = None
    grads, packed, some_absent = reader.read([params])
    assert [g is p.grad for g, p in zip(grads, params, strict=True)] == [True, True, True]
    addresses = array("q", packed).tolist()
    assert some_absent and addresses == [params[0].grad.data_ptr(), 0, params[2].grad.data_ptr()]
    params[1].data = torch._neg_view(params[1].data)  # an undo would write the wrong sign
    assert reader.read([params]) is None
    params[1].data = torch.ones(4, 5)
    assert reader.read([params]) is None


def test_usual_gradients_of_other_kinds(reader_of: Any) -> None:
    params = params_of((3,), (4, 5), (1, 5), (3,))
    reader = reader_of(params)
    params[0].grad = torch.ones(9)[4:7]  # a part of a larger storage
    params[1].grad = torch.ones(4, 5).as_subclass(Subclass)
    params[2].grad = torch.ones(5, 1).t()  # the stride of a dimension of size 1 has no meaning
    params[3].grad = nn.Parameter(torch.ones(3))
    assert_read(reader, [params])


def test_wider_gradients(reader_of: Any) -> None:
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype, so a gradient has its parameter's dtype")
    params = params_of((3,), dtype=torch.bfloat16)
    reader = reader_of(params)
    params[0].grad = None
    params[0].grad_dtype = torch.float32
    params[0].grad = torch.ones(3)
    assert reader.read([params]) is None


def test_sparse_gradients_are_not_read(reader_of: Any) -> None:
    params = params_of((3,), (4, 5))
    reader = reader_of(params)
    params[1].grad = torch.ones(4, 5).to_sparse()
    with suppress(RuntimeError):  # the protocol allows this error
        assert reader.read([params]) is None


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "address": lambda x: x.clone(),
    "shape": lambda x: x.view(5, 4),
    "size": lambda x: x[:2],
    "dtype": lambda x: x.view(torch.int32).view(torch.bfloat16)[:, :5],
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_changed_parameters(reader_of: Any, move: Callable[[Tensor], Tensor]) -> None:
    params = params_of((3,), (4, 5))
    reader = reader_of(params)
    params[1].grad = None
    params[1].data = move(params[1].data)
    params[1].grad = torch.ones_like(params[1])
    assert reader.read([params]) is None


def test_swapped_parameters(reader_of: Any) -> None:
    """The Python object stays, but its tensor is another one."""
    params = params_of((3,), (4, 5))
    reader = reader_of(params)
    torch.utils.swap_tensors(params[0], *params_of((3,)))
    assert params[0].grad is not None
    assert reader.read([params]) is None
    assert_read(reader_of(params), [params])


def test_parameters_of_a_subclass(reader_of: Any) -> None:
    params = params_of((3,))
    params.append(nn.Parameter(torch.ones(3).as_subclass(Subclass)))
    params[1].grad = torch.ones(3)
    assert_read(reader_of(params), [params])
    assert_read(reader_of(params[1:]), [params[1:]])


def test_dense_layouts_that_are_not_contiguous() -> None:
    params = params_of((3,), (4, 5))
    params[1].data = torch.ones(5, 4).t()
    reader = make_reader(params)
    if isinstance(reader, PythonReader):
        pytest.skip("it recognises contiguous layouts only")
    params[1].grad = torch.ones(5, 4).t()
    assert_read(reader, [params])


def test_gradients_with_the_opposite_sign_in_memory() -> None:
    """Complex arithmetic may return a gradient whose memory holds the negative of its value."""
    p = nn.Parameter(torch.ones(()))
    reader = make_reader([p])
    if isinstance(reader, PythonReader):
        pytest.skip("for the compiled reader")
    (torch.complex(torch.zeros(()), p).conj() * torch.tensor(2j)).real.backward()
    assert p.grad is not None and p.grad.is_neg()
    assert reader.read([[p]]) is None


def test_addresses_are_one_object_until_they_change() -> None:
    """A table does not need to take unchanged addresses again."""
    params = params_of((3,), (4, 5))
    reader = make_reader(params)
    if isinstance(reader, PythonReader):
        pytest.skip("for the compiled reader")
    first = reader.read([params])
    assert first is not None
    kept, params[0].grad = params[0].grad, torch.ones(3)
    second = reader.read([params])
    third = reader.read([params])
    assert second is not None and third is not None
    assert second[1] is third[1] and second[1] != first[1]
    params[0].grad = kept
    assert_read(reader, [params])
