"""Takes steps beside a second OpenMP runtime in the same process, as a program that may crash or hang.

Arguments: "none" or the path of the runtime's library, and whether it is loaded "before" torch or "after" it. It prints
a digest of the weights and the number of threads that ran in the second runtime.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading


class Runtime:
    """A second OpenMP runtime with GNU's interface, which LLVM's and Intel's have too."""

    def __init__(self, path: str) -> None:
        self.library = None if path == "none" else ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
        self.seen: set[int] = set()

    def region(self) -> None:
        """Run a parallel region of two threads in the second runtime."""
        if self.library is None:
            return
        body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: self.seen.add(threading.get_native_id()))
        self.library.GOMP_parallel(body, None, 2, 0)


def train(runtime: Runtime | None) -> str:
    """Take steps, with a region of the other runtime before each half. Return a digest of the weights."""
    import torch
    from torch import nn

    from fused_sam import SAM

    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.ones(s)) for s in [(300_001,), (70, 1000), (33,)]]
    optimizer = SAM(params, rho=0.1, lr=0.1, momentum=0.9, backend="cpu")
    for _ in range(3):
        for half in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            if runtime is not None:
                runtime.region()
            half()
    digest = hashlib.sha256()
    for p in params:
        digest.update(p.detach().numpy().tobytes())
    return digest.hexdigest()


def main(path: str, when: str) -> None:
    if when == "after":
        import torch  # noqa: F401
    runtime = Runtime(path)
    runtime.region()
    print(train(runtime), len(runtime.seen))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
