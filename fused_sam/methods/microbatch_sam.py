"""mSAM: every micro-batch climbs along its own gradient; the update takes the mean of the gradients found up there.

    d = mean_i grad L_i(w + rho g_i / ||g_i||),  g_i = grad L_i(w);   w = BASE(w, d)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.backends.contract import status_dtype
from fused_sam.engine.options import check_count
from fused_sam.engine.stepper import standalone
from fused_sam.sam import SAM


class MicrobatchSAM(SAM):
    """mSAM: Behdin et al., arXiv 2212.04343 and 2302.09693; m-sharpness of Foret et al., arXiv 2010.01412.

    Args:
        num_microbatches: parts of a batch, all of one size (Behdin's m); 1 is SAM.
        Others: as SAM; a schedule decides once a step, with the first micro-batch.

        optimizer.step(closure)                       # closure(i): micro-batch i's mean loss, after backward()

        for i, part in enumerate(parts):              # or by hand
            loss_of(part).backward()
            optimizer.first_step()
            loss_of(part).backward()
            if i < len(parts) - 1:
                optimizer.next_microbatch()
        optimizer.second_step(zero_grad=True)

    step(closure) runs the closure twice for each i in turn, or once where the step does not perturb, and returns the
    mean of the first runs' losses. Gradients computed before are not used, unless num_microbatches is 1; then the
    closure may do without its argument.

    By hand, from first_step() on p.grad holds the sum of the second gradients so far, to which backward() adds. The
    optimizer's zero_grad() leaves it alone until the micro-batch is finished; clear it in no other way, such as
    model.zero_grad(), which a closure may call. The update divides by num_microbatches: to clip the mean use max_norm,
    because clip_grad_norm_ before second_step() clips the sum, k times as long. Where a step does not perturb,
    leave first_step() and its backward() out. A gradient that is not finite in any micro-batch skips the whole step.

    Use it where gradients are accumulated anyway, or a smaller m is wanted than the batch. Published: above SAM on
    image classification and language tasks.

    | per parameter, fp32, k micro-batches | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 28 k + 16: k times P1 4, P2 16, k - 1 times undo 8, then P1 4, P3 20 | 3 k + 1 | 2 k, of 1 / k each |

    Under a GradScaler too the sum is judged, by the same P1; the scaler does not learn of a step so skipped.

    Memory beside SAM's: 4 bytes for the sum in step(closure); by hand none, but gradients live through the whole step.

    Raises:
        TypeError, ValueError: num_microbatches is no whole number of at least 1; as SAM.
        RuntimeError: step() after fewer micro-batches than that, or step(closure) within a step.
    """

    _copied = (*SAM._copied, "num_microbatches")
    _recombines = True
    _done = 0  # micro-batches finished in this step
    _sums: dict[Tensor, Tensor] | None = None  # of their second gradients, by parameter
    _adds = False  # whether gradients are added to the sums here, in step(closure), and not by backward() in p.grad

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        num_microbatches: int,
        **options: Any,
    ) -> None:
        self.num_microbatches = check_count("num_microbatches", num_microbatches)
        super().__init__(params, base_optimizer, rho, adaptive, **options)

    def first_step(self, zero_grad: bool = False) -> None:
        """Climb along this micro-batch's gradient, which is let go of: zero_grad changes nothing."""
        self._climbs_on = self._done > 0
        super().first_step()
        for p in self._parameters():
            p.grad = None if self._sums is None or self._adds else self._sums.get(p)

    def next_microbatch(self) -> None:
        """Finish a micro-batch: back to the weights, ready for the next one's first backward().

        Raises:
            RuntimeError: there is no further micro-batch in this step.
        """
        if self._done + 1 >= self.num_microbatches:
            raise RuntimeError(
                f"next_microbatch() was called after the last of {self.num_microbatches} micro-batches: "
                "finish the step with second_step() or step()"
            )
        self._done += 1
        if self._perturbed is None:  # one pass a micro-batch: backward() adds to what is there
            return
        self._collect()
        decision = self._decision
        super().restore()
        self._decision = decision
        self._clear()

    def _whole_step(self, closure: Callable[..., Any] | None) -> Any:
        if closure is None:
            missing = self.num_microbatches - self._done - 1
            if missing and (self._done or self._perturbed is not None):
                raise RuntimeError(
                    f"the step ends with {missing} of {self.num_microbatches} micro-batches missing: call "
                    "next_microbatch() between them, use step(closure), or restore() to undo the step"
                )
            return super()._whole_step(None)
        if self.num_microbatches == 1:
            return super()._whole_step((lambda: closure(0)) if _takes_a_number(closure) else closure)
        if self._perturbed is not None or self._done:
            raise RuntimeError("step(closure) was called within a step: finish it with step(), or restore() to undo it")
        self._adds = True
        try:
            total = self._evaluate(torch.enable_grad()(closure))
            self._step()
        finally:
            self._adds = False
        return total / self.num_microbatches

    def _evaluate(self, closure: Callable[[int], Any]) -> Any:
        """All micro-batches; the sum of their losses."""
        total: Any = None
        try:
            self._clear()
            for i in range(self.num_microbatches):
                if i:
                    self.next_microbatch()
                    self._collect()  # where the step does not perturb
                    self._clear()
                loss = closure(i)
                loss = loss.detach() if isinstance(loss, Tensor) else loss
                total = loss if total is None else total + loss
                if self.perturbs:
                    self.first_step()
                    closure(i)
        except BaseException:
            self.restore()
            raise
        return total

    def restore(self) -> None:
        """Undo the whole step, the sum of gradients included."""
        if self._sums is not None or self._done:
            self._sums, self._done = None, 0
            self._clear()
        self._decision = None
        super().restore()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, but between first_step() and the end of the micro-batch gradients are a sum, and stay."""
        if self._perturbed is None:
            super().zero_grad(set_to_none)

    def _clear(self) -> None:
        for p in self._parameters():
            p.grad = None

    def _collect(self) -> dict[Tensor, Tensor]:
        """Take the gradients into the sums. By hand p.grad is the sum, also where autograd made a new tensor of it."""
        if self._sums is None:
            self._sums = {}
        for p in self._parameters():
            if p.grad is None:
                continue
            total, g = self._sums.get(p), p.grad.detach()
            if total is None or not self._adds:
                self._sums[p] = standalone(g)
            else:
                total.add_(g)
        return self._sums

    def _step(self) -> None:
        if self._sums is not None:
            for p, g in self._collect().items():
                p.grad = g
        super()._step()
        self._sums, self._done, self._climbs_on = None, 0, False

    def _divisor(self) -> Tensor | None:
        scale = super()._divisor()
        if not self._done:
            return scale
        device = self._device()
        count = torch.full((), float(self._done + 1), dtype=status_dtype(device), device=device)
        return count if scale is None else count * scale.to(count)

    def _forget(self) -> None:
        super()._forget()
        self._sums, self._done, self._climbs_on = None, 0, False

    def _refuse_perturbed(self, what: str) -> None:
        if self._done and self._perturbed is None:
            raise RuntimeError(f"{what} between two micro-batches: finish the step, or restore() to undo it, first")
        super()._refuse_perturbed(what)


def _takes_a_number(closure: Callable[..., Any]) -> bool:
    """Whether it has an argument without a default."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in positional and p.default is p.empty for p in inspect.signature(closure).parameters.values())
