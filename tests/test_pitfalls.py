"""Defects of other SAM packages, numbered D1 to D31. Each test checks that fused_sam is free of one."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from support.backends import Variant
from support.bits import Snapshot, assert_same_bits, assert_same_optimizers, same_bits
from support.draws import values, weights
from support.nets import closure_for, loss_of, net, train, two_steps
from torch import Tensor, nn

from fused_sam import SAM


def sam(params: object, backend: str = "auto", **options: object) -> SAM:
    return SAM(params, torch.optim.SGD, backend=backend, **{"rho": 0.1, "lr": 0.1, "momentum": 0.9, **options})  # type: ignore[arg-type]


def test_d01_addresses_of_weights_never_change(backend: str) -> None:
    model = net()
    optimizer = sam(model.parameters(), backend)
    before = [(p.data_ptr(), p.untyped_storage().data_ptr()) for p in model.parameters()]
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.first_step(zero_grad=True)
        assert [(p.data_ptr(), p.untyped_storage().data_ptr()) for p in model.parameters()] == before
        loss_of(model, step).backward()
        optimizer.second_step(zero_grad=True)
        optimizer.step(closure_for(model, step))
    assert [(p.data_ptr(), p.untyped_storage().data_ptr()) for p in model.parameters()] == before


def test_d02_state_is_that_of_sgd_and_a_resume_is_bit_equal(backend: str) -> None:
    model = net()
    optimizer = sam(model.parameters(), backend)
    train(model, optimizer, range(3))
    assert all(entry.keys() == {"momentum_buffer"} for entry in optimizer.state.values())
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    file.seek(0)
    saved = torch.load(file)
    resumed = net(seed=7)
    resumed.load_state_dict(saved["model"])
    other = sam(resumed.parameters(), backend)
    other.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert_same_optimizers(optimizer, other)


def test_d03_a_gradient_only_in_the_first_pass_is_no_update(backend: str) -> None:
    p, q = weights([(5,), (7,)], torch.float32)
    optimizer = sam([p, q], backend)
    before = [w.detach().clone() for w in (p, q)]
    p.grad, q.grad = torch.ones(5), torch.ones(7)
    optimizer.first_step(zero_grad=True)
    assert not torch.equal(p, before[0])
    q.grad = torch.ones(7)
    optimizer.second_step()
    assert same_bits(p, before[0])  # restored, not updated
    assert p not in optimizer.state
    assert not torch.equal(q, before[1])


def test_d04_a_gradient_only_in_the_second_pass_is_an_update(backend: str) -> None:
    p, q = weights([(5,), (7,)], torch.float32)
    twin = copy.deepcopy(p)
    optimizer, base = sam([p, q], backend), torch.optim.SGD([twin], lr=0.1, momentum=0.9, foreach=False)
    q.grad = torch.ones(7)
    optimizer.first_step(zero_grad=True)
    p.grad, twin.grad = torch.ones(5), torch.ones(5)
    optimizer.second_step()
    base.step()
    torch.testing.assert_close(p, twin, rtol=0, atol=1e-6)  # one rounding near 1 may differ from SGD
    assert optimizer.state[p].keys() == {"momentum_buffer"}


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_d05_a_non_finite_gradient_changes_nothing(variant: Variant, bad: float, half: str, steps_before: int) -> None:
    model = net()
    optimizer = sam(model.parameters(), variant.name)
    train(model, optimizer, range(steps_before))
    before = Snapshot(optimizer)
    for this in ("first", "second"):
        loss_of(model, 9).backward()
        if this == half:
            list(model.parameters())[2].grad[0, 0] = bad  # type: ignore[index]
        getattr(optimizer, f"{this}_step")(zero_grad=True)
    assert optimizer.skipped
    before.assert_unchanged()
    two_steps(model, optimizer, 10)
    assert not optimizer.skipped
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_d06_a_step_without_gradients_changes_nothing(backend: str) -> None:
    model = net()
    optimizer = sam(model.parameters(), backend)
    before = Snapshot(optimizer)
    optimizer.first_step()
    assert optimizer.perturbed
    optimizer.second_step()
    optimizer.step()
    before.assert_unchanged()
    assert not optimizer.skipped and not optimizer.perturbed


def test_d06_a_non_finite_first_gradient_is_skipped_without_second_gradients(backend: str) -> None:
    model = net()
    optimizer = sam(model.parameters(), backend)
    before = Snapshot(optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    optimizer.first_step(zero_grad=True)
    optimizer.second_step()
    before.assert_unchanged()
    assert optimizer.step_was_skipped
    assert optimizer.grad_norm.isinf() and optimizer.update_norm == 0
    optimizer.step()
    assert not optimizer.step_was_skipped


def test_d07_fp16_weights_have_an_eps_and_a_norm(variant: Variant) -> None:
    """In fp16, 1e-12 rounds to 0 and the square of 300 is inf."""
    p = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    optimizer = sam([p], variant.name, rho=1.0)
    p.grad = torch.full((1000,), 300.0, dtype=torch.float16)
    optimizer.first_step()
    assert not optimizer.skipped
    torch.testing.assert_close(p.detach().float().norm(), torch.tensor(1.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(optimizer.grad_norm.double(), torch.tensor(300 * 1000**0.5, dtype=torch.float64))
    optimizer.restore()
    p.grad = torch.zeros(1000, dtype=torch.float16)
    optimizer.first_step()  # 0 / (0 + eps)
    assert torch.equal(p, torch.zeros(1000, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_d08_undo_is_exact(variant: Variant, dtype: torch.dtype) -> None:
    params = weights([(1025,), (7, 5), ()], dtype)
    with torch.no_grad():
        params[0][:4] = torch.tensor([-0.0, float("nan"), float("inf"), torch.finfo(dtype).tiny / 2]).to(dtype)
    optimizer = sam(params, variant.name, rho=3.0)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = values(p.shape, 5, dtype)
    optimizer.first_step()
    assert not same_bits(params[1], before[1])
    optimizer.restore()
    assert_same_bits(params, before)
    optimizer.first_step()
    optimizer.zero_grad()
    optimizer.second_step()
    assert_same_bits(params, before)


@pytest.mark.parametrize("found_inf", [1.0, 2.0])
def test_d13_first_step_skipped_by_found_inf(variant: Variant, found_inf: float) -> None:
    """found_inf is 2 if two devices found an inf. After a skipped first step, momentum does not exist or is zero."""
    p, twin = weights([(9,)], torch.float32) + weights([(9,)], torch.float32)
    optimizer = sam([p], variant.name, dampening=0.5)
    base = torch.optim.SGD([twin], lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    before = p.detach().clone()
    p.grad = torch.full((9,), float("inf"))
    optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.skipped and same_bits(p, before)
    assert not any(bool(b.any()) for b in optimizer.state.get(p, {}).values())
    for _ in range(2):
        p.grad, twin.grad = torch.full((9,), 4.0), torch.full((9,), 1.0)
        optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
        optimizer.step()
        base.step()
        torch.testing.assert_close(p, twin, rtol=0, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], base.state[twin]["momentum_buffer"])


def test_d13_found_inf_from_grad_scaler(variant: Variant) -> None:
    p = nn.Parameter(torch.ones(9))
    optimizer = sam([p], variant.name)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = Snapshot(optimizer)
    for bad in (True, False):
        scaler.scale(p.sum()).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale((p * (float("inf") if bad else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if bad:
            before.assert_unchanged()
            assert scaler.get_scale() == 4.0
    torch.testing.assert_close(p.detach(), torch.full((9,), 0.9))


def test_d13_one_step_may_start_and_continue_momentum(variant: Variant) -> None:
    """If a layer is unfrozen later, its momentum starts while other layers continue theirs."""
    ours, theirs = weights([(5,), (7,)], torch.float32), weights([(5,), (7,)], torch.float32)
    optimizer = sam(ours, variant.name, dampening=0.5)
    base = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad, q.grad = (values(p.shape, step, torch.float32) if step or i else None for _ in range(2))
        optimizer.step()
        base.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


EMPTY_ENDS = [[0, 5], [5, 0], [0], [0, 0, 5, 0, 0], [20000, 0, 3, 0], [5, 0, 0]]


@pytest.mark.parametrize("sizes", EMPTY_ENDS, ids=str)
def test_d14_empty_tensors_may_be_anywhere_in_the_table(variant: Variant, sizes: list[int]) -> None:
    params = [nn.Parameter(torch.ones(n)) for n in sizes]
    optimizer = sam(params, variant.name, rho=1.0, lr=0.5, momentum=0.0)
    total = sum(sizes)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1 + (total or 1) ** -0.5), rtol=1e-6, atol=0)
    optimizer.second_step()
    for p in params:
        assert torch.equal(p, torch.full_like(p, 0.5))


def test_d15_every_element_is_in_exactly_one_chunk(variant: Variant) -> None:
    """The tensors have one chunk, several chunks, and a last chunk of one element."""
    params = [nn.Parameter(torch.zeros(n)) for n in (1, 16384, 16385, 3 * 16384 + 1, 65537)]
    optimizer = sam(params, variant.name, rho=1.0, lr=1.0, momentum=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    total = sum(p.numel() for p in params)
    torch.testing.assert_close(float(optimizer.grad_norm), total**0.5, rtol=1e-6, atol=0)
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, total**-0.5), rtol=1e-6, atol=0)
    optimizer.second_step()
    for p in params:
        assert torch.equal(p, torch.full_like(p, -1.0))


def test_d16_norm_of_bf16_is_not_rounded_to_bf16(variant: Variant) -> None:
    params = weights([(4097,), (33, 7)], torch.bfloat16)
    optimizer = sam(params, variant.name)
    for i, p in enumerate(params):
        p.grad = values(p.shape, i, torch.bfloat16)
    expected = sum(float(p.grad.double().square().sum()) for p in params) ** 0.5  # type: ignore[union-attr]
    optimizer.first_step()
    assert optimizer.grad_norm.dtype in (torch.float32, torch.float64)
    assert abs(float(optimizer.grad_norm) / expected - 1) < 1e-6  # bf16 would be off by up to 4e-3


@pytest.mark.parametrize("adaptive", [False, True])
def test_d17_results_have_the_same_bits_for_any_number_of_threads(variant: Variant, adaptive: bool) -> None:
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        params = weights([(100003,), (257, 129), (5,)], torch.float32)
        optimizer = sam(params, variant.name, adaptive=adaptive)
        for step in range(2):
            for half in (optimizer.first_step, optimizer.second_step):
                for i, p in enumerate(params):
                    p.grad = values(p.shape, 10 * step + i, torch.float32)
                half()
        return [*params, optimizer.grad_norm]

    first = run(2)
    assert_same_bits(run(2), first)
    if variant.name == "cpu":  # other backends use torch's sums, which depend on the number of threads
        assert_same_bits(run(1), first)
        assert_same_bits(run(3), first)


def test_d18_fp32_weights_are_updated_in_fp32(variant: Variant) -> None:
    """The learning rate is rounded to fp32 before the update, as in a float kernel."""
    p = nn.Parameter(torch.full((64,), 1.0))
    optimizer = sam([p], variant.name, rho=0.0, lr=0.1, momentum=0.0)
    p.grad = torch.full((64,), 3.0)
    optimizer.step()
    # 1 - 3 * fl(0.1) in fp32; fp64 would give 0.7 - 1e-17. A fused multiply-add may differ by 2^-24, the ulp of 0.7.
    once = torch.tensor(1.0) - torch.tensor(0.1) * torch.tensor(3.0)
    assert float((p.detach() - once).abs().max()) <= 2**-24
    assert p.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_d19_loading_keeps_fp32_momentum(backend: str, dtype: torch.dtype) -> None:
    model = net(dtype=dtype)
    optimizer = sam(model.parameters(), backend)
    train(model, optimizer, range(3))
    resumed = net(seed=7, dtype=dtype)
    resumed.load_state_dict(model.state_dict())
    other = sam(resumed.parameters(), backend)
    other.load_state_dict(optimizer.state_dict())
    assert all(entry["momentum_buffer"].dtype is torch.float32 for entry in other.state.values())
    assert_same_optimizers(optimizer, other)


def test_d19_copies_and_pickles_keep_every_attribute(backend: str) -> None:
    model = net()
    optimizer = sam(model.parameters(), backend, eps=1e-3, adaptive=True, eta=0.2)
    train(model, optimizer, range(2))
    copies = [
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ]
    train(model, optimizer, range(2, 4))
    for other_model, other in copies:
        assert other.backend == optimizer.backend
        assert repr(other) == repr(optimizer)
        train(other_model, other, range(2, 4))
        assert_same_optimizers(optimizer, other)


def test_d20_a_step_of_zero_gradients_and_zero_lr_creates_state(backend: str) -> None:
    """torch.distributed.checkpoint calls step(closure=None) with zero gradients and lr 0 to create the state."""
    model = net()
    optimizer = sam(model.parameters(), backend)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], Tensor) else 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    optimizer.zero_grad(set_to_none=True)
    assert_same_bits(model.parameters(), before)
    assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters())
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    assert inspect.signature(optimizer.step).parameters["closure"].default is None


def test_d20_torch_distributed_checkpoint_state_dict(backend: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other_model = net(), net()
    optimizer, other = sam(model.parameters(), backend), sam(other_model.parameters(), backend)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))  # torch returns the tensors themselves
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, saved)
    assert other.param_groups[0]["lr"] == 0.1
    train(model, optimizer, range(2, 4))
    train(other_model, other, range(2, 4))
    assert_same_optimizers(optimizer, other)


@pytest.mark.parametrize("write", ["first_step", "second_step", "restore", "step"])
def test_d21_autograd_detects_that_weights_were_written(variant: Variant, write: str) -> None:
    p = nn.Parameter(torch.ones(5))
    optimizer = sam([p], variant.name)

    def gradient() -> None:
        p.grad = torch.ones(5)

    gradient()
    optimizer.step()  # so that there is momentum
    if write in ("second_step", "restore"):
        gradient()
        optimizer.first_step()
    loss = (p * p).sum()  # saves p
    gradient()
    getattr(optimizer, write)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_d22_every_kernel_runs_once_on_live_state(variant: Variant) -> None:
    """Every call is one step, the first one included. No kernel is tuned on the weights."""
    p = nn.Parameter(torch.zeros(300))
    optimizer = sam([p], variant.name, rho=0.0, lr=1.0, momentum=1.0)
    for expected in (-1.0, -3.0, -6.0):  # another run would change the weight and the momentum again
        p.grad = torch.ones(300)
        optimizer.step()
        assert torch.equal(p, torch.full((300,), expected))


def test_d24_one_optimizer_object_for_scheduler_and_hooks(backend: str) -> None:
    model = net()
    optimizer = sam(model.parameters(), backend)
    assert optimizer.base_optimizer is optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, step_size=1, gamma=0.5)
        for step in range(3):
            two_steps(model, optimizer, step)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3
    p = next(model.parameters())
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    two_steps(model, optimizer, 3)
    assert same_bits(p, before)  # the options in param_groups take effect


@pytest.mark.parametrize("written", ["zeros", "mask", "fill"])
def test_d31_momentum_that_a_user_has_set_to_zero_is_not_new(backend: str, written: str) -> None:
    """Pruning multiplies momentum by a mask, which may leave -0.0. The next gradient is dampened as usual."""
    ends = []
    for make in (
        lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, foreach=False),
        lambda p: SAM([p], torch.optim.SGD, rho=0.0, lr=0.1, momentum=0.9, dampening=0.5, backend=backend),
    ):
        p = nn.Parameter(torch.ones(4))
        optimizer = make(p)
        for _ in range(4):
            p.grad = torch.tensor([1.0, -1.0, 2.0, -2.0])
            optimizer.step()
            momentum = optimizer.state[p]["momentum_buffer"]
            if written == "zeros":
                momentum.mul_(torch.zeros(4))
            elif written == "mask":
                momentum.mul_(torch.tensor([0.0, 1.0, 1.0, 0.0]))
            else:
                momentum.fill_(-0.0)
        ends.append(p.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=0)
