"""Muon for matrices and AdamW for all other parameters, in one optimizer.

    optimizer = fused_sam.SAM(model.parameters(), fused_sam.MuonWithAdamW, rho=0.05, lr=0.02, adamw_lr=3e-4)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

_MUON = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
_ADAMW = ("lr", "betas", "eps", "weight_decay")
_PREFIX = "adamw_"  # of AdamW's options in the constructor, and in groups that leave the choice to the dimensions
_ADJUSTMENTS = (None, "original", "match_rms_adamw")


class MuonWithAdamW(Optimizer):
    r"""Muon for matrices, AdamW for the rest: one optimizer, so that SAM takes one global norm over both.

        m = lerp(m, g, 1 - momentum);  u = lerp(g, m, momentum), or m without nesterov
        w = w * (1 - lr * weight_decay) - lr * c * O(u),  c = sqrt(max(1, rows / columns))

    Use it for transformers and MLPs. O makes the singular values of u about 1, by Newton-Schulz steps in bf16. Muon is
    Keller Jordan's (https://kellerjordan.github.io/posts/muon/). The arithmetic is that of torch.optim.Muon and
    torch.optim.AdamW, bit for bit, also where torch has no Muon yet.

    A parameter of two dimensions goes to Muon and every other one to AdamW. A group that has both kinds becomes two
    groups. A group's own `use_muon` overrides the choice: True for Muon, False for AdamW. Muon's authors leave
    embeddings and the output layer to AdamW:

        [{"params": blocks}, {"params": [embedding, head], "use_muon": False, "lr": 3e-4}]

    Args:
        params: parameters, named parameters, or parameter groups.
        lr: Muon's learning rate.
        weight_decay: Muon's, decoupled.
        momentum: from 0 to below 1.
        nesterov: use Nesterov's form.
        ns_coefficients: three numbers of the Newton-Schulz polynomial.
        eps: the least norm that u is divided by.
        ns_steps: the number of Newton-Schulz steps, 0 to 99.
        adjust_lr_fn: c above; "original" is the same. "match_rms_adamw" makes it 0.2 * sqrt(max(rows, columns)), for
            learning rates and weight decays that were tuned for AdamW (arXiv 2502.16982).
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: AdamW's. All defaults are torch's.

    A group with `use_muon` takes the options of its optimizer under their own names. Any other group takes the names
    above. param_groups has every group with `use_muon` and its optimizer's own names, so that a learning-rate scheduler
    scales both rates.

    State: "momentum_buffer" of matrices; "step", "exp_avg" and "exp_avg_sq" of the rest.

    Raises:
        ValueError: an option is out of range or of the other optimizer, or `use_muon` is True for a parameter that is
            no matrix.
        RuntimeError: a sparse or complex gradient.
    """

    GROUP_OPTIONS = (*_MUON, *_ADAMW, "use_muon")
    """The options that its groups have."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw_lr: float | Tensor = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 1e-2,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }
        _check_muon({name: defaults[name] for name in _MUON}, "")
        _check_adamw({name: defaults[_PREFIX + name] for name in _ADAMW}, _PREFIX)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or two if its parameters go to both optimizers."""
        given = set(param_group) if isinstance(param_group, dict) else set()
        super().add_param_group(param_group)
        whole, k = self.param_groups.pop(), len(self.param_groups)
        chosen = _choices(whole, k)
        _refuse_ignored(given, whole.get("use_muon"), set(chosen), k)
        if len(set(chosen)) < 2:
            muon = all(chosen)
            part = _part(whole, muon, given, list(range(len(chosen))), k)
            whole.clear()
            whole.update(part)
            self.param_groups.append(whole)
            return
        places = {muon: [i for i, each in enumerate(chosen) if each is muon] for muon in (True, False)}
        self.param_groups += [_part(whole, muon, given, at, k) for muon, at in places.items()]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` evaluates the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for k, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    _check_gradient(p, group, i, k)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["use_muon"]:
                self._step_muon(params, group)
            elif params:
                self._step_adamw(params, group)
        return loss

    def _step_muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        lr = lr.squeeze() if isinstance(lr, Tensor) else lr
        for p in params:
            g, state = p.grad, self.state[p]
            assert g is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(g, memory_format=torch.preserve_format)
            m = state["momentum_buffer"].lerp_(g, 1 - momentum)
            u = g.lerp(m, momentum) if group["nesterov"] else m
            direction = orthogonalised(u, group["ns_coefficients"], group["ns_steps"], group["eps"])
            p.mul_(1 - lr * group["weight_decay"])
            rate: Any = lr * _adjustment(p, group["adjust_lr_fn"])
            p.add_(direction, alpha=-rate)

    def _step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        columns: dict[str, list[Tensor]] = {"step": [], "exp_avg": [], "exp_avg_sq": []}
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.tensor(0.0)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            for name, column in columns.items():
                column.append(state[name])
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            columns["exp_avg"],
            columns["exp_avg_sq"],
            [],
            columns["step"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


# ---- Muon's arithmetic ----------------------------------------------------------------------------------------------


def orthogonalised(u: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Return a matrix with the singular vectors of u and singular values of about 1, in bf16.

    A Newton-Schulz step is x = a x + (b s + c s s) x with s = x x^T. It converges for a spectral norm of at most 1,
    and the Frobenius norm, by which u is divided first, is not smaller than that.
    """
    a, b, c = coefficients
    tall = u.size(0) > u.size(1)
    x = u.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        s = x @ x.T
        polynomial = torch.addmm(s, s, s, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if tall else x


def _adjustment(p: Tensor, name: str | None) -> float:
    """Return what the learning rate of a matrix is multiplied by."""
    rows, columns = p.shape
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


# ---- groups ---------------------------------------------------------------------------------------------------------


def _choices(group: dict[str, Any], k: int) -> list[bool]:
    """Return for each parameter of group k True if it goes to Muon, False if it goes to AdamW."""
    use = group.get("use_muon")
    if use not in (None, True, False) or isinstance(use, Tensor):
        raise ValueError(f"use_muon of group {k} must be True, False or None (by the dimensions), not {use!r}")
    if use is not None:
        for i, p in enumerate(group["params"]):
            if use and not is_lazy(p):
                _check_matrix(p, group, i, k)
        return [bool(use)] * len(group["params"])
    for i, p in enumerate(group["params"]):
        if is_lazy(p):
            raise ValueError(
                f"{_title(p, group, i, k)} has no shape yet, so that MuonWithAdamW cannot choose by it: run "
                "the model once before building the optimizer, or set use_muon=True or False in its group"
            )
    return [p.ndim == 2 for p in group["params"]]


def _refuse_ignored(given: set[str], use: bool | None, chosen: set[bool], k: int) -> None:
    """Raise ValueError if group k sets options that none of its parameters would use."""
    if use is True:
        ignored = given & {"betas", *(_PREFIX + name for name in _ADAMW)}
        other = "AdamW's, but its parameters go to Muon"
    elif use is False:
        ignored = given & (set(_MUON) - set(_ADAMW))
        other = "Muon's, but its parameters go to AdamW"
    elif chosen == {False}:
        ignored = {name for name in given & set(_MUON) if _PREFIX + name not in given}
        other = "Muon's, but none of its parameters is a matrix"
    else:
        return
    for name in sorted(ignored):
        advice = "leave it out"
        if name in _ADAMW:
            advice = f"set {_PREFIX}{name}, or use_muon=False with AdamW's own {name}"
        raise ValueError(f"group {k} sets {name}, which is {other}: {advice}")


def _part(group: dict[str, Any], muon: bool, given: set[str], places: list[int], k: int) -> dict[str, Any]:
    """Return a group of those parameters of `group`, with the options of their optimizer alone."""
    options = {*_MUON, *(_PREFIX + name for name in _ADAMW), "betas"}
    part = {name: value for name, value in group.items() if name not in options}
    for name in ("params", "param_names"):
        if name in group:
            part[name] = [group[name][i] for i in places]
    part["use_muon"] = muon
    if muon:
        part.update({name: group[name] for name in _MUON})
        _check_muon(part, f" of group {k}")
        return part
    own = group.get("use_muon") is False
    for name in _ADAMW:
        part[name] = group[name if own and name in given else _PREFIX + name]
    _check_adamw(part, "" if own else _PREFIX, f" of group {k}")
    return part


def _title(p: Tensor, group: dict[str, Any], i: int, k: int) -> str:
    names = group.get("param_names")
    title = f"parameter {names[i]!r}" if names else f"parameter {i} of group {k}"
    return title if is_lazy(p) else f"{title} (shape {tuple(p.shape)})"


def _check_matrix(p: Tensor, group: dict[str, Any], i: int, k: int) -> None:
    if p.ndim != 2:
        raise ValueError(
            f"{_title(p, group, i, k)} has {p.ndim} dimension{'s' if p.ndim != 1 else ''}, and Muon takes matrices: "
            "leave use_muon out, so that only matrices go to Muon, or set use_muon=False in its group"
        )


def _check_gradient(p: Tensor, group: dict[str, Any], i: int, k: int) -> None:
    """Raise an error for a gradient that this optimizer cannot take, before a weight has changed."""
    assert p.grad is not None
    if p.grad.is_sparse or p.is_complex():
        kind = "sparse gradient" if p.grad.is_sparse else "complex gradient"
        raise RuntimeError(f"{_title(p, group, i, k)} has a {kind}, which MuonWithAdamW does not support")
    if group["use_muon"]:
        _check_matrix(p, group, i, k)


def _check_rate(options: dict[str, Any], prefix: str, where: str) -> None:
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{prefix}lr{where} as a tensor must have one element")
    for name in ("lr", "weight_decay", "eps"):
        if not 0 <= options[name] < math.inf:
            raise ValueError(f"{prefix}{name}{where} must be a finite number of 0 or more, not {options[name]!r}")


def _check_muon(options: dict[str, Any], where: str) -> None:
    """Raise ValueError for an option of Muon that is out of range."""
    _check_rate(options, "", where)
    if not 0 <= options["momentum"] < 1:
        raise ValueError(f"momentum{where} must be from 0 to below 1, not {options['momentum']!r}")
    if not (isinstance(options["ns_steps"], int) and 0 <= options["ns_steps"] < 100):
        raise ValueError(f"ns_steps{where} must be a whole number from 0 to 99, not {options['ns_steps']!r}")
    if len(options["ns_coefficients"]) != 3:
        raise ValueError(f"ns_coefficients{where} must be three numbers, not {options['ns_coefficients']!r}")
    if options["adjust_lr_fn"] not in _ADJUSTMENTS:
        names = '"original", "match_rms_adamw" or None'
        raise ValueError(f"adjust_lr_fn{where} must be {names}, not {options['adjust_lr_fn']!r}")


def _check_adamw(options: dict[str, Any], prefix: str, where: str = "") -> None:
    """Raise ValueError for an option of AdamW that is out of range."""
    _check_rate(options, prefix, where)
    for i, beta in enumerate(options["betas"]):
        if not 0 <= beta < 1:
            raise ValueError(f"{prefix}betas[{i}]{where} must be from 0 to below 1, not {beta!r}")
