"""mSAM: every micro-batch has its own perturbation; the update takes the mean of the gradients found there.

    d = mean_i grad L_i(w + rho g_i / ||g_i||),  g_i = grad L_i(w);   w = BASE(w, d)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fused_sam.engine.layout import owned
from fused_sam.sam import SAM
from fused_sam.step import REQUIRED, Number, option


class MicrobatchSAM(SAM):
    """mSAM: Behdin et al., arXiv 2212.04343 and 2302.09693; m-sharpness of Foret et al., arXiv 2010.01412.

    Use it if gradients are accumulated anyway, or if a smaller m is wanted than the batch. Published: above SAM on image
    classification and language tasks.

    Args:
        num_microbatches: parts of a batch, all of one size (Behdin's m); 1 is SAM. fewer_microbatches() changes it for
            one step.
        Others: as SAM; a schedule decides once per step, with the first micro-batch.

        optimizer.step(closure)                       # closure(i): micro-batch i's mean loss, after backward()

        for i, part in enumerate(parts):              # or by hand
            loss_of(part).backward()
            optimizer.first_step()
            loss_of(part).backward()
            if i < len(parts) - 1:
                optimizer.next_microbatch()
        optimizer.second_step(zero_grad=True)

    step(closure) runs the closure twice for each i, or once if the step does not perturb, and returns the mean of the
    first runs' losses. Gradients computed before are not used, unless num_microbatches is 1; then the closure may do
    without its argument.

    By hand, p.grad holds the sum of the second gradients so far from first_step() on, and backward() adds to it. The
    optimizer's zero_grad() leaves it alone until the micro-batch is finished; do not clear it in another way, such as
    model.zero_grad(), which a closure may call. The update divides by num_microbatches. To clip the mean use max_norm,
    because clip_grad_norm_ before second_step() clips the sum, which is k times as long. If a step does not perturb,
    leave first_step() and its backward() out. A gradient that is not finite in any micro-batch skips the whole step.
    Under a GradScaler the sum is checked too. The scaler does not lower its scale for such a step.

    Raises:
        TypeError, ValueError: num_microbatches is no whole number of at least 1; as SAM.
        RuntimeError: step() after fewer micro-batches than that, or step(closure) within a step.

    | per parameter, fp32, k micro-batches | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 28 k + 16: k times norm 4, perturb 16, k - 1 times undo 8, then check 4, update 20 | 3 k + 1 | 2 k, of 1 / k each |

    Memory on top of SAM's: 4 bytes for the sum in step(closure); none by hand, but gradients live through the whole step.
    """  # noqa: E501

    OPTIONS = {"num_microbatches": option(REQUIRED, type=int, low=1, help="the number of parts of a batch")}
    num_microbatches: int
    combines_grads = True

    microbatches_done: int = 0
    """Micro-batches finished in this step."""

    grad_sums: dict[Tensor, Tensor] | None = None
    """The sum of their second gradients, by parameter."""

    sums_in_closure: bool = False
    """True if gradients are added to the sums here, in step(closure), and not by backward() in p.grad."""

    def first_step(self, zero_grad: bool = False, *, grad_scale: Number | None = None) -> None:
        """Perturb along this micro-batch's gradient and drop it: zero_grad changes nothing."""
        if self.perturbed:
            raise RuntimeError(
                "first_step() was called twice: p.grad holds the sum of this step's gradients, which cannot be "
                "separated from a new batch's. If a loop skips a batch after first_step(), call restore() there"
            )
        self.continues_step = self.microbatches_done > 0
        super().first_step(grad_scale=grad_scale)
        for p in self.parameters():
            p.grad = None if self.grad_sums is None or self.sums_in_closure else self.grad_sums.get(p)

    def next_microbatch(self) -> None:
        """Finish a micro-batch: back to the weights, ready for the next one's first backward().

        Raises:
            RuntimeError: there is no further micro-batch in this step.
        """
        if self.microbatches_done + 1 >= self.num_microbatches:
            raise RuntimeError(
                f"next_microbatch() was called after the last of {self.num_microbatches} micro-batches: "
                "finish the step with second_step() or step()"
            )
        if self.stepper.grads_unscaled:
            raise RuntimeError(
                "scaler.unscale_() was called between two micro-batches, so that the sum would have gradients of two "
                "scales: call restore(), and unscale_() after the last backward() alone"
            )
        self.microbatches_done += 1
        if not self.perturbed:  # one pass per micro-batch: backward() adds to the gradients
            return
        self.collect()
        self.stepper.undo()
        self.clear_grads()

    def run_step(self, closure: Callable[..., Any] | None) -> Any:
        if closure is None:
            missing = self.num_microbatches - self.microbatches_done - 1
            if missing and (self.microbatches_done or self.perturbed):
                raise RuntimeError(
                    f"the step ends with {missing} of {self.num_microbatches} micro-batches missing: call "
                    "next_microbatch() between them, use step(closure), or restore() to undo the step"
                )
            return self.update()
        if self.num_microbatches == 1:
            return super().run_step((lambda: closure(0)) if _takes_a_number(closure) else closure)
        self.refuse_scaled_closure()
        if not _takes_a_number(closure, optional=True):
            raise TypeError(
                f"MicrobatchSAM (num_microbatches={self.num_microbatches}) calls closure(i) for each micro-batch, and "
                "this closure takes no argument. A framework's own closure cannot cut its batch: use "
                "fused_sam.training.sam_step in a loop, or another method"
            )
        if self.perturbed or self.microbatches_done:
            raise RuntimeError("step(closure) was called within a step: finish it with step(), or restore() to undo it")
        self.sums_in_closure = True
        try:
            total = self.evaluate(self.evaluating(closure))
            self.update()
        finally:
            self.sums_in_closure = False
        return None if total is None else total / self.num_microbatches

    def evaluate(self, closure: Callable[[int], Any]) -> Any:
        """Run both passes of all micro-batches; return the sum of their losses."""
        total: Any = None
        try:
            self.clear_grads()
            for i in range(self.num_microbatches):
                if i:
                    self.next_microbatch()
                    self.collect()  # if the step does not perturb
                    self.clear_grads()
                loss = closure(i)
                loss = loss.detach() if isinstance(loss, Tensor) else loss
                total = loss if total is None else total + loss
                if self.needs_second_pass:
                    self.first_step()
                    closure(i)
        except BaseException:
            self.restore()
            raise
        return total

    def update(self) -> None:
        """Update with the mean of the gradients."""
        if self.grad_sums is not None:
            for p, g in self.collect().items():
                p.grad = g
        try:
            super().run_step(None)
        finally:
            if not self.perturbed:  # an exception has not kept the update from being completed, or undone
                self.grad_sums, self.microbatches_done, self.continues_step = None, 0, False

    @contextmanager
    def fewer_microbatches(self, count: int) -> Iterator[None]:
        """Take the steps inside `with` over `count` micro-batches: for the last, smaller batch of an epoch."""
        usual, self.num_microbatches = self.num_microbatches, count
        try:
            yield
        finally:
            self.num_microbatches = usual

    def grad_divisor(self) -> int:
        return self.microbatches_done + 1

    def restore(self) -> None:
        """Undo the whole step, the sum of gradients included."""
        if self.grad_sums is not None or self.microbatches_done:
            self.grad_sums, self.microbatches_done, self.continues_step = None, 0, False
            self.clear_grads()
        super().restore()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, except for the sum that they are from first_step() to the end of the micro-batch."""
        if not self.perturbed:
            super().zero_grad(set_to_none)

    def parameters(self) -> list[Tensor]:
        """Return the parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def clear_grads(self) -> None:
        """Drop all gradients."""
        for p in self.parameters():
            p.grad = None

    def collect(self) -> dict[Tensor, Tensor]:
        """Take the gradients into the sums. By hand p.grad is the sum, also if autograd made a new tensor of it."""
        if self.grad_sums is None:
            self.grad_sums = {}
        for p in self.parameters():
            if p.grad is None:
                continue
            total, g = self.grad_sums.get(p), p.grad.detach()
            if total is None or not self.sums_in_closure:
                self.grad_sums[p] = owned(g)
            else:
                total.add_(g)
        return self.grad_sums

    def refuse_perturbed(self, what: str) -> None:
        if self.microbatches_done and not self.perturbed:
            raise RuntimeError(f"{what} between two micro-batches: finish the step, or restore() to undo it, first")
        super().refuse_perturbed(what)


def _takes_a_number(closure: Callable[..., Any], optional: bool = False) -> bool:
    """Return True if the closure has an argument without a default; optional: or one that may be left out."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(closure).parameters.values()
    return any(
        (p.kind in positional and (optional or p.default is p.empty)) or (optional and p.kind is p.VAR_POSITIONAL)
        for p in given
    )
