"""Takes steps with the compiled kernels until its input ends, as a program whose module is replaced meanwhile.

Argument: the folder of the package. It prints "ready" once the module is in use, and at the end the number of steps and
whether all of them gave the same weights.
"""

from __future__ import annotations

import select
import sys


def main(folder: str) -> None:
    sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]  # of an installed package
    sys.path.insert(0, folder)
    import torch

    import fused_sam

    assert fused_sam.__file__.startswith(folder), fused_sam.__file__

    def weights() -> torch.Tensor:
        params = [torch.nn.Parameter(torch.ones(n)) for n in (1000, 17)]
        optimizer = fused_sam.GSAM(params, torch.optim.AdamW, rho=0.1, lr=0.1, backend="cpu")
        for half in (optimizer.first_step, optimizer.second_step, optimizer.first_step, optimizer.restore):
            for p in params:
                p.grad = torch.linspace(-1, 1, p.numel())
            half()
        return torch.cat([p.detach() for p in params])

    expected, count, same = weights(), 0, True
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        same &= torch.equal(weights(), expected)
        count += 1
    print(count, same)


if __name__ == "__main__":
    main(sys.argv[1])
