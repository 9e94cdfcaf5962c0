"""The substance of torch's test_optim.py for SAM around every class of torch.optim: checkpoints, hooks, schedulers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.torch_optimizers import BASES, CLASSES, backward, database, distance, parameters, sam, train
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR, AveragedModel

from fused_sam import SAM
from fused_sam.schedule import RhoWarmup

# One rounding of weights of size 1 to 4 per step and order of operations; Adam's kernels have an order of their own.
ROUNDING = 2.4e-6


def limit(name: str) -> float:
    return ROUNDING if name in ("Adam", "AdamW") else 0.0


def trained(name: str, length: float = 0.0, /, **options: Any) -> tuple[list[Any], SAM]:
    params = parameters()
    optimizer = sam(params, CLASSES[name], length, lr=0.01, **options)
    train(params, optimizer, range(3), length)
    return params, optimizer


def plainly_trained(name: str, **options: Any) -> tuple[list[Any], Optimizer]:
    params = parameters()
    optimizer = CLASSES[name](params, lr=0.01, **options)  # type: ignore[call-arg]
    train(params, optimizer, range(3))
    return params, optimizer


def put(params: list[Any], values: list[Any]) -> list[Any]:
    for p, value in zip(params, values, strict=True):
        p.data.copy_(value.detach())
    return params


# ---- checkpoints and copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_resume_is_bit_equal(name: str, tensor_lr: bool) -> None:
    params, optimizer = trained(name, 0.05)
    if tensor_lr:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    twin = put(parameters(), params)
    other = sam(twin, CLASSES[name], 0.3, lr=0.5)
    other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert isinstance(other.param_groups[0]["lr"], torch.Tensor) == tensor_lr
    assert other.param_groups[0]["rho"] == 0.05
    for each, opt in ((params, optimizer), (twin, other)):
        train(each, opt, range(3, 6), 0.05)
    assert distance(params, twin) == 0


@pytest.mark.parametrize("name", BASES)
def test_the_bare_optimizers_checkpoint_loads_and_back(name: str) -> None:
    params, plain = plainly_trained(name)
    twin = put(parameters(), params)
    optimizer = sam(twin, CLASSES[name], 0.0, lr=0.5)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.param_groups[0]["rho"] == 0 and optimizer.param_groups[0]["lr"] == 0.01
    for each, opt in ((params, plain), (twin, optimizer)):
        train(each, opt, range(3, 6))
    assert distance(params, twin) <= limit(name)
    back = put(parameters(), twin)
    resumed = CLASSES[name](back)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in resumed.param_groups:
        group.update(optimizer.param_groups[0].get("base_options", {}))  # Adadelta's rho, see docs/usage.md
    for each, opt in ((params, plain), (back, resumed)):
        train(each, opt, range(6, 8))
    assert distance(params, back) <= 2 * limit(name)


@pytest.mark.parametrize("name", BASES)
def test_steps_saved_as_plain_numbers_load(name: str) -> None:
    """torch before 1.12 saved them so."""
    params, plain = plainly_trained(name)
    saved = copy.deepcopy(plain.state_dict())
    for entry in saved["state"].values():
        if "step" in entry:
            entry["step"] = float(entry["step"])
    twin = put(parameters(), params)
    optimizer = sam(twin, CLASSES[name], 0.0, lr=0.01)
    optimizer.load_state_dict(saved)
    for each, opt in ((params, plain), (twin, optimizer)):
        train(each, opt, range(3, 6))
    assert distance(params, twin) <= limit(name)


@pytest.mark.parametrize("name", BASES)
def test_options_that_an_old_checkpoint_lacks_get_torchs_values(name: str) -> None:
    """These are the ones that the class had then, not those that the optimizer is built with now."""
    old = {"maximize", "foreach", "differentiable", "capturable", "fused", "amsgrad", "decoupled_weight_decay"}
    _, plain = plainly_trained(name)
    saved = plain.state_dict()
    saved["param_groups"] = [{k: v for k, v in g.items() if k not in old} for g in saved["param_groups"]]
    now = {"maximize": True} if "maximize" in plain.defaults else {}
    bare, optimizer = CLASSES[name](parameters(), **now), sam(parameters(), CLASSES[name], **now)
    bare.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    expected = {k: v for k, v in bare.param_groups[0].items() if k not in ("params", "rho")}
    assert expected.items() <= optimizer.param_groups[0].items()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.filterwarnings("ignore::fused_sam.RoundingWarning")
def test_a_checkpoint_loads_into_weights_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    saved = plainly_trained(name)[1].state_dict()
    params, others = parameters(dtype), parameters(dtype)
    optimizer, plain = sam(params, CLASSES[name], lr=0.01), CLASSES[name](others)
    for each, opt in ((params, optimizer), (others, plain)):
        opt.load_state_dict(copy.deepcopy(saved))
        train(each, opt, range(3))
    # bf16 state of fused optimizers is fp32, which moves a bf16 weight of size 4 by at most a rounding per step.
    low = {torch.float64: 1e-14, torch.bfloat16: 3 * 2**-6}[dtype]
    assert distance(params, others) <= (low if name in ("SGD", "Adam", "AdamW") else 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", BASES)
def test_copies_are_complete(name: str, copied: Callable[[Any], Any]) -> None:
    params, optimizer = trained(name, 0.05, **({"rho": 0.8} if name == "Adadelta" else {}))
    optimizer.grad_scale = optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]  # as GradScaler does
    other = copied(optimizer)
    assert not {"grad_scale", "found_inf", "loss_scale"} & vars(other).keys()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    assert other.defaults == {"differentiable": False, **optimizer.defaults}  # which torch adds
    assert repr(other) == repr(optimizer)
    twin = other.param_groups[0]["params"]
    for each, opt in ((params, optimizer), (twin, other)):
        train(each, opt, range(3, 6), 0.05)
    assert distance(params, twin) == 0


@pytest.mark.parametrize("name", BASES)
def test_parameter_names_and_hooks_of_checkpoints(name: str) -> None:
    named = [(f"w{i}", p) for i, p in enumerate(parameters())]
    optimizer = sam(named, CLASSES[name], 0.05, lr=0.01)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "more": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda opt, saved: {**saved, "param_groups": [{**g, "lr": 0.7} for g in saved["param_groups"]]}
    )
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("loaded"))
    saved = optimizer.state_dict()
    assert saved["more"] == 1 and saved["param_groups"][0]["param_names"] == ["w0", "w1", "w2"]
    optimizer.load_state_dict(saved)
    assert calls == ["save", "loaded"] and optimizer.param_groups[0]["lr"] == 0.7


# ---- groups and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_add_param_group_and_defaults(name: str) -> None:
    params, others = parameters(), parameters()
    optimizer, plain = sam(params[:1], CLASSES[name], lr=0.01), CLASSES[name](others[:1], lr=0.01)  # type: ignore[call-arg]
    for each, opt in ((params, optimizer), (others, plain)):
        opt.add_param_group({"params": each[1]})
        opt.add_param_group({"params": iter(each[2:]), "lr": 0.05})
        train(each, opt, range(4))
    assert distance(params, others) <= limit(name)
    clashes = optimizer.defaults.get("base_options", {})
    assert {**optimizer.defaults, **clashes}.items() >= plain.defaults.items()


@pytest.mark.parametrize("name", BASES)
def test_groups_without_a_rate_weights_from_generators_and_by_name(name: str) -> None:
    model = nn.ModuleList([nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)])
    for params in (
        model.parameters(),
        model.named_parameters(),
        (p for p in model.parameters()),
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": list(model[1].parameters())}],
        [{"params": model[0].named_parameters()}, {"params": model[1].named_parameters()}],
    ):
        optimizer = sam(params, CLASSES[name], lr=0.2)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
        assert optimizer.param_groups[-1]["lr"] == 0.2
    for make in (lambda groups: sam(groups, CLASSES[name]), CLASSES[name]):
        with pytest.raises(KeyError, match="params"):
            make([{"lr": 0.1}])


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_empty_groups_empty_weights_and_scalars(name: str, rho: float) -> None:
    if name in ("Muon", "Adafactor"):
        pytest.skip("Muon takes matrices only, Adafactor no empty weights")

    def go(make: Callable[[list[Any]], Optimizer]) -> list[Any]:
        params = [nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(2))]
        optimizer = make([{"params": []}, {"params": params}])
        for _ in range(3):
            for both in range(1 + bool(rho)):
                for p in params:
                    p.grad = p.detach() * 0.5  # of the same direction as the weights, so that e = rho w / ||w||
                if rho and not both and isinstance(optimizer, SAM):
                    optimizer.first_step()
                elif rho and not both:
                    length = torch.stack([p.detach().norm() for p in params]).norm()
                    factor = float(1 + rho / length)
                elif rho and not isinstance(optimizer, SAM):
                    for p in params:
                        p.grad.mul_(factor)
            optimizer.step()
        return params

    ours = go(lambda groups: sam(groups, CLASSES[name], rho, lr=0.01))
    theirs = go(lambda groups: CLASSES[name](groups, lr=0.01))  # type: ignore[call-arg]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=ROUNDING if rho else limit(name))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", BASES)
def test_zero_grad(name: str, set_to_none: bool) -> None:
    params, optimizer = trained(name)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in params:
        assert p.grad is None if set_to_none else not p.grad.any()


# ---- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_hooks_run_once_per_update(name: str) -> None:
    params, optimizer = trained(name)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append("before"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("after"))
    for group in optimizer.param_groups:
        group["rho"] = 0.05
    train(params, optimizer, range(2), 0.05)
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("name", BASES)
def test_a_closure_is_evaluated_at_both_points(name: str) -> None:
    params, others = parameters(), parameters()
    optimizer, twin = sam(params, CLASSES[name], 0.05, lr=0.01), sam(others, CLASSES[name], 0.05, lr=0.01)
    runs = 0
    for step in range(3):

        def closure(step: int = step) -> float:
            nonlocal runs
            runs += 1
            backward(params, step)
            return float(step)

        assert optimizer.step(closure) == step
        train(others, twin, range(step, step + 1), 0.05)
    assert runs == 6 and distance(params, others) == 0


@pytest.mark.parametrize("name", BASES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_learning_rate_schedulers(name: str) -> None:
    """All that torch's database has for the class, chained as it has them, with ReduceLROnPlateau and SWALR."""
    module = database()
    if module is None:
        pytest.skip("this version of torch has no torch.testing._internal.common_optimizers to import")
    info = next(info for info in module.optim_db if info.name == name)
    programs = [*info.scheduler_inputs, [lambda opt: SWALR(opt, swa_lr=0.003, anneal_epochs=2)]]
    assert len(programs) >= 2

    def go(make: Callable[[list[Any]], Optimizer], schedulers: Any) -> tuple[list[Any], list[float]]:
        params = parameters()
        optimizer = make(params)
        chain = [scheduler(optimizer) for scheduler in schedulers]
        rates = []
        for step in range(12):
            train(params, optimizer, range(step, step + 1))
            for scheduler in chain:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([1.0] if plateau else []))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return params, rates

    for schedulers in programs:
        ours, our_rates = go(lambda params: sam(params, CLASSES[name], lr=0.01), schedulers)
        theirs, rates = go(lambda params: CLASSES[name](params, lr=0.01), schedulers)  # type: ignore[call-arg]
        assert our_rates == rates
        assert distance(ours, theirs) <= 2 * limit(name)


@pytest.mark.parametrize("name", BASES)
def test_averaged_models_take_the_clean_weights(name: str) -> None:
    model = nn.Linear(3, 2, bias=False)
    averaged = AveragedModel(model)
    optimizer = sam(model.parameters(), CLASSES[name], 0.5, lr=0.01)
    seen = []
    for step in range(3):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.full((3,), 1.0 + step)).pow(2).sum().backward()
            if not optimizer.perturbed and _ == 0:
                optimizer.first_step()
        optimizer.second_step()
        averaged.update_parameters(model)
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(averaged.module.weight, torch.stack(seen).mean(0))


@pytest.mark.parametrize("name", BASES)
def test_gradients_of_gradients_in_the_closure(name: str) -> None:
    p = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 1.5]]))
    before = p.detach().clone()
    optimizer = sam([p], CLASSES[name], 0.05, lr=0.01)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.pow(3).sum()
        (g,) = torch.autograd.grad(loss, p, create_graph=True)
        penalty = loss + g.pow(2).sum()
        penalty.backward()
        return penalty

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    assert not torch.equal(p, before) and p.isfinite().all()


def test_rho_schedules_and_the_bases_rho_are_apart() -> None:
    optimizer = sam(parameters(), torch.optim.Adadelta, 0.4, rho=0.8)
    schedule = RhoWarmup(optimizer, steps=2)
    assert optimizer.param_groups[0]["rho"] == 0
    for _ in range(2):
        schedule.step()
    assert optimizer.param_groups[0]["rho"] == 0.4
    assert optimizer.param_groups[0]["base_options"] == {"rho": 0.8}
