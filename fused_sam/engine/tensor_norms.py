"""Norms of the ascent gradient per tensor or per group, and T_w from Adam's second moments.

One launch per table takes all tensors' sums of squares. What follows is a few operations on one number per tensor, on
the device. The lengths go to the tables as a factor per row, which `perturb` reads.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import SKIP, SUM, Backend, PerturbGroup, Status, status_dtype

from .calls import GradSnapshot, KernelCall
from .layout import match_scalar
from .plan import ABSENT, Plan
from .sharding import local

NORMS = ("global", "group", "tensor")  # what a norm is taken over


def check_norm(norm: Any) -> str:
    """Return the option `norm`; ValueError if it is none of NORMS."""
    if norm not in NORMS:
        raise ValueError(f"norm must be {' or '.join(map(repr, NORMS))}, not {norm!r}")
    return str(norm)


@dataclass(eq=False)
class Places:
    """Where the rows of a pass's tables are among all parameters, as numbers on the device."""

    plan: Plan
    calls: list[KernelCall]
    rows: list[Tensor]  # the parameters' numbers of each call
    group_ids: Tensor  # of every parameter; a twin's is that of its group
    members: Tensor  # (groups, parameters): True where the parameter belongs to the group

    @staticmethod
    def of(plan: Plan, calls: list[KernelCall], groups: int, device: torch.device) -> Places:
        ids = torch.tensor([k % groups for k in plan.group_ids], device=device)
        return Places(
            plan,
            calls,
            [torch.tensor(call.rows, device=device) for call in calls],
            ids,
            ids == torch.arange(groups, device=device).unsqueeze(1),
        )


class TensorNorms:
    """Takes the norm of T_w g per tensor or per group, and sets the factors of the tables.

    Args:
        over: one of NORMS.
        weights: True takes the norms of the weights too.

    Attributes:
        norms, weight_norms: of the last pass, one number per parameter, 0 where it has no gradient or is not
            perturbed. With "group" and "global" all parameters of a group, or all, have one number.
    """

    def __init__(self, over: str, *, weights: bool) -> None:
        self.over = over
        self._weights = weights
        self.norms: Tensor | None = None
        self.weight_norms: Tensor | None = None
        self._places: Places | None = None

    def take(
        self,
        backend: Backend,
        plan: Plan,
        calls: list[KernelCall],
        snapshot: GradSnapshot,
        groups: list[PerturbGroup],
        status: Status,
        *,
        keep_skip: bool,
        eps: float,
    ) -> None:
        """Take the norms over all tables and all processes, and set the tables' factors to 1 / (norm + eps).

        `status` gets the global norm and the skip flag. Its inverse norm is 1, unless the norm is the global one.
        """
        count = len(groups) // 2 if plan.has_twins else len(groups)
        places = self._places
        if places is None or places.plan is not plan or places.calls is not calls:
            self._places = places = Places.of(plan, calls, count, status.device)
        sums = self._squares(places, groups, status)
        status.values[SUM] = sums[0].sum()
        if plan.sharding is not None:
            if not keep_skip:
                status.values[SKIP] = 0
            plan.sharding.reduce_norm(status.values, snapshot.pattern())
            plan.sharding.all_reduce(sums)
            keep_skip = True
        backend.finish_norm(status, ascent=True, keep_skip=keep_skip, eps=eps)
        self.norms, self.weight_norms = self._joined(places, sums).sqrt()
        for call in calls:
            unbias = call.table.unbias
            call.table.factors = None if unbias is None else (unbias > 0).to(unbias.dtype)
        if self.over != "global":
            inverse = 1 / (self.norms + eps)
            # As in the backends: a gradient of zero gives no direction.
            self.multiply(torch.where(inverse <= 1e30, inverse, torch.zeros_like(inverse)))
            status.inverse_norm.fill_(1)

    def multiply(self, lengths: Tensor) -> None:
        """Multiply the factors of the last pass by one number per parameter."""
        assert self._places is not None
        for call, rows in zip(self._places.calls, self._places.rows, strict=True):
            own, table = lengths.to(status_dtype(lengths.device))[rows], call.table
            table.factors = own if table.factors is None else table.factors * own

    def _squares(self, places: Places, groups: list[PerturbGroup], status: Status) -> Tensor:
        """Return the sums of squares of T_w g and of the weights on this process, one column per parameter."""
        sums = status.values.new_zeros(2, len(places.plan.params))
        for call, rows in zip(places.calls, places.rows, strict=True):
            own = sums.new_zeros(2, len(call.rows))
            call.backend.squares(call.table, groups, own, weights=self._weights)
            if call.table.unbias is not None:  # where Adam has not taken a step
                own[0] = torch.where(call.table.unbias > 0, own[0], 0.0)
            sums[:, rows] = own * call.fraction
        return sums

    def _joined(self, places: Places, sums: Tensor) -> Tensor:
        """Return for each parameter the sums over what the norm is taken over."""
        if self.over == "tensor":
            return sums
        if self.over == "global":
            return sums.sum(1, keepdim=True).expand_as(sums)
        of_groups = torch.where(places.members, sums.unsqueeze(1), 0.0).sum(2)  # in a fixed order, unlike index_add
        return of_groups[:, places.group_ids]


class SecondMoments:
    """Gives the tables of a perturbation Adam's second moments, of which Precond-SAM makes T_w (arXiv 2502.02407)."""

    def __init__(self) -> None:
        self._betas: tuple[Any, Tensor] | None = None  # groups and rows, and log(beta2) of each row

    @staticmethod
    def groups(groups: list[PerturbGroup], adam: list[Any]) -> list[PerturbGroup]:
        """Return the groups with Adam's eps in the place of eta.

        Raises:
            ValueError: a group is adaptive, or Adam's eps is 0.
        """
        for k, (group, h) in enumerate(zip(groups, adam, strict=True)):
            if group.adaptive:
                raise ValueError(
                    f"group {k} has adaptive=True, and its T_w is made of Adam's second moment: set adaptive=False"
                )
            if not h.eps > 1e-20:  # 1 / eps must be a number that fp32 holds
                raise ValueError(
                    f"group {k} has eps={h.eps:g}, and T_w divides by sqrt(v) + eps: set Adam's eps, such as 1e-8"
                )
        return [g._replace(eta=h.eps) for g, h in zip(groups, adam, strict=True)]

    @staticmethod
    def name(h: Any) -> str:
        """Return the name of the second moment in the state: what Adam divides by."""
        return "max_exp_avg_sq" if h.amsgrad else "exp_avg_sq"

    def calls(
        self, plan: Plan, snapshot: GradSnapshot, flags: tuple[bool, ...], adam: list[Any], state: Any
    ) -> list[KernelCall]:
        """Return the calls of a perturbation over all parameters that have a second moment, with these attached.

        Args:
            flags: for each group, True if it is perturbed.
            adam: the AdamGroup of each group.
        """
        names = [self.name(adam[k % len(adam)]) for k in plan.group_ids]
        moments = [plan.state_part(state, i, name, init=False) for i, name in enumerate(names)]
        codes = bytes(
            ABSENT if v is None or "step" not in state[p] else code  # not perturbed
            for code, v, p in zip(snapshot.codes, moments, plan.params, strict=True)
        )
        masked = GradSnapshot(snapshot.grads, codes, snapshot.addresses)
        calls = plan.perturb_calls(masked, flags, state)
        for call in calls:
            table, own = call.table, [moments[i] for i in call.rows]
            if len(own) != len(table.second_moments) or not all(map(operator.is_, own, table.second_moments)):
                table.second_moments = own  # type: ignore[assignment]
                table.native = None  # its form has the addresses of those that were replaced
            table.unbias = self._unbias(plan, call, adam, state)
        return calls

    def _unbias(self, plan: Plan, call: KernelCall, adam: list[Any], state: Any) -> Tensor:
        """Return 1 / sqrt(1 - beta2^step) of each row; 0 where Adam has not taken a step."""
        steps = torch.stack(
            [match_scalar(local(state[plan.params[i]]["step"]), call.table.params[0]) for i in call.rows]
        )
        steps = steps.to(status_dtype(steps.device))
        betas = [float(adam[plan.group_ids[i] % len(adam)].beta2) for i in call.rows]
        key = (plan, call, betas)
        if self._betas is None or self._betas[0] != key:
            self._betas = key, torch.tensor(betas, dtype=torch.float64).log().to(steps)
        bias = -torch.expm1(steps * self._betas[1])
        return torch.where(bias > 0, bias.rsqrt(), torch.zeros_like(bias))
