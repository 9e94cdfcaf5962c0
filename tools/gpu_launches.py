"""Launches each kernel of a SAM step once for NVIDIA's profiler, which records nothing else.

    ncu --profile-from-start off ... python tools/gpu_launches.py [--backend cuda] [--shape "134M in 128"] [--kind fp32]

--kind may be repeated; without it, fp32, bf16 and fp16 are launched. The first launch of each kernel is not recorded.
"""

from __future__ import annotations

import argparse

import torch
from gpu_tables import CUDA, KINDS, LARGE, SHAPES, passes, require_gpu, tables_of

from fused_sam.backends import choose
from fused_sam.backends.contract import Status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default=LARGE)
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], action="append")
    arguments = parser.parse_args()
    require_gpu(parser)
    backend, wanted = choose(arguments.backend, CUDA), arguments.kind or ["fp32", "bf16", "fp16"]
    for kind in (k for k in KINDS if k.name in wanted):
        runs = passes(backend, tables_of(SHAPES[arguments.shape], kind), kind, Status(CUDA))
        for run in runs.values():
            run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for run in runs.values():
            run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(f"{arguments.shape}, {kind.name}: {', '.join(runs)}")
        del runs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
