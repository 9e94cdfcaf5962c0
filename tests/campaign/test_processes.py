"""Forked processes, threads, a second OpenMP runtime, and another number of threads in the middle of a run."""

from __future__ import annotations

import os
import random
import site
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import NAMES, VARIANTS, Variant
from support.bits import assert_same_bits
from support.campaign import Campaign
from support.draws import values
from support.family import WITH_SAM as METHODS
from support.tolerance import assert_close
from torch import Tensor, nn

from campaign import openmp, programs

BACKENDS = [name for name in NAMES if name != "triton"]  # whose interpreter is too slow for large tensors
CPU = [v for v in VARIANTS if v.name == "cpu"]
LARGE = [(100_003,), (257, 129), (5,)]  # several threads share these

# ---- fork -----------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_takes_the_parents_steps(campaign: Campaign) -> None:
    """Parent and child take the same steps, bit for bit, although threads do not survive a fork.

    In the first case the child is the first process that loads the module, after parallel regions of torch alone.
    """
    done = programs.run("campaign.forked", *BACKENDS, timeout=300)
    lines = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    campaign.count(cases=len(lines), faults=len(lines))
    for case, child, parent in lines:
        if child != parent:
            campaign.lose(f"{case}: the child {child}, the parent {parent}")
    assert done.returncode == 0 and len(lines) > len(BACKENDS), done.stdout + done.stderr


# ---- threads --------------------------------------------------------------------------------------------------------


def run_of(method: str, backend: str, seed: int, steps: int) -> Callable[[], list[Tensor]]:
    """Return a function that trains an optimizer of its own, and returns its weights."""

    def train() -> list[Tensor]:
        torch.set_num_threads(2)  # a setting of this thread
        params = [nn.Parameter(values(s, seed + i, torch.float32)) for i, s in enumerate(LARGE)]
        optimizer: Any = METHODS[method](params, rho=0.1, lr=0.01, momentum=0.9, backend=backend)
        for step in range(steps):
            for half in range(2):
                for i, p in enumerate(params):
                    p.grad = values(p.shape, seed + 100 * step + 10 * half + i, torch.float32)
                if half == 0 and optimizer.needs_second_pass:
                    optimizer.first_step()
                elif half or not optimizer.needs_second_pass:
                    optimizer.step()
        return [p.detach() for p in params]

    return train


def test_optimizers_in_several_threads_do_not_disturb_each_other(campaign: Campaign) -> None:
    for seed in campaign.rounds(short=1, share=0.04):
        draw = random.Random(seed)
        backends = [draw.choice(BACKENDS) for _ in range(3)]
        methods = [draw.choice(["SAM", "ASAM", "GSAM", "GCSAM", "FriendlySAM", "LookSAM"]) for _ in backends]
        runs = [run_of(m, b, 1000 * k, 2) for k, (m, b) in enumerate(zip(methods, backends, strict=True))]
        expected = [run() for run in runs]
        found: dict[int, list[Tensor]] = {}
        ready = threading.Barrier(len(runs))

        def work(k: int, found: dict[int, list[Tensor]] = found, ready: Any = ready, runs: Any = runs) -> None:
            ready.wait()
            found[k] = runs[k]()

        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(runs))]
        for t in threads:
            t.start()
        for t in threads:
            t.join(120)
        for k, weights in enumerate(expected):
            what = f"{methods[k]} on {backends[k]}, seed {seed}"
            if k not in found:
                campaign.lose(f"{what}: the thread ended without weights")
            elif not all(torch.equal(a, b) for a, b in zip(found[k], weights, strict=True)):
                campaign.lose(f"{what}: other weights than alone")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_goes_from_thread_to_thread(campaign: Campaign, backend: str) -> None:
    """Each half of a step runs in a new thread. The gradient mode is a setting of each thread, and stays as it was."""
    params, twins = ([nn.Parameter(values(s, 1, torch.float32)) for s in LARGE] for _ in range(2))
    ours, alone = (METHODS["GSAM"](w, rho=0.1, lr=0.01, momentum=0.9, backend=backend) for w in (params, twins))
    modes = []
    campaign.count(cases=1)
    for step in range(3):
        for half in ("first_step", "second_step"):
            for i, (p, q) in enumerate(zip(params, twins, strict=True)):
                p.grad = values(p.shape, 10 * step + i, torch.float32)
                q.grad = p.grad.clone()

            def work(half: str = half) -> None:
                torch.set_num_threads(1)
                getattr(ours, half)()
                modes.append(torch.is_grad_enabled())

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            getattr(alone, half)()
    assert modes == [True] * 6
    assert_same_bits(params, twins)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name != "triton"], ids=str)
def test_the_number_of_threads_may_change_at_any_moment(campaign: Campaign, variant: Variant) -> None:
    """The sums of "cpu" do not depend on it, and so not one bit of its weights does."""
    for seed in campaign.rounds(short=1, share=0.005):
        draw = random.Random(seed)

        def train(counts: Callable[[], int], seed: int = seed) -> list[nn.Parameter]:
            params = [nn.Parameter(values(s, seed % 1000 + i, torch.float32)) for i, s in enumerate(LARGE)]
            optimizer = METHODS["SAM"](params, rho=0.1, lr=0.1, momentum=0.9, backend=variant.name)
            for step in range(3):
                for half in (optimizer.first_step, optimizer.second_step):
                    for i, p in enumerate(params):
                        p.grad = values(p.shape, seed % 1000 + 10 * step + i, torch.float32)
                    torch.set_num_threads(counts())
                    half()
            return params

        with variant.active():
            expected, found = train(lambda: 1), train(lambda draw=draw: draw.randint(1, 5))
        if variant.name == "cpu":
            assert_same_bits(found, expected)
        else:
            assert_close(found, [p.double() for p in expected], torch.float32, steps=6)


# ---- a second OpenMP runtime ----------------------------------------------------------------------------------------


def runtimes() -> dict[str, str]:
    """Return the OpenMP libraries of this machine other than torch's, by the name of what has them."""
    places = [Path(p) for p in site.getsitepackages()]
    found: dict[str, Path] = {}
    for folder in places:
        for pattern in ("*.libs/libgomp*.so*", "cmeel.prefix/lib/libomp.so", "*/lib/libiomp5.so", "*/.dylibs/libomp*"):
            for path in folder.glob(pattern):
                found.setdefault(path.relative_to(folder).parts[0], path)
    for system in (
        *Path("/usr/lib").glob("llvm-*/lib/libomp.so*"),
        Path("/usr/lib/x86_64-linux-gnu/libgomp.so.1"),
        Path("/usr/lib/aarch64-linux-gnu/libgomp.so.1"),
    ):
        if system.exists():
            found.setdefault(system.name, system)
    if given := os.environ.get("FUSED_SAM_OPENMP"):  # the path of a further one
        found["given"] = Path(given)
    return {name: str(path) for name, path in found.items()}


RUNTIMES = runtimes()


@pytest.mark.skipif(not CPU, reason="the compiled CPU module is not there")
@pytest.mark.parametrize("when", ["before", "after", "instead"])
@pytest.mark.parametrize("name", RUNTIMES or ["none"])
def test_a_second_openmp_runtime_changes_nothing(
    campaign: Campaign, name: str, when: str, alone: str
) -> None:
    """It is loaded before torch, after torch, or in place of torch's by LD_PRELOAD."""
    if not RUNTIMES:
        pytest.skip("there is no OpenMP runtime but torch's: scikit-learn's wheel has one")
    if not campaign.long and (name != next(iter(RUNTIMES)) or when == "before"):
        pytest.skip("a process of its own for each library and order: make campaign runs all of them")
    campaign.count(cases=1)
    path = RUNTIMES[name]
    if when == "instead":
        done = programs.run("campaign.openmp", "none", "before", LD_PRELOAD=path)
    else:
        done = programs.run("campaign.openmp", path, when)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    digest, threads = done.stdout.split()
    assert digest == alone
    assert int(threads) == (0 if when == "instead" else 2)


@pytest.fixture(scope="module")
def alone() -> str:
    """Return the digest of the weights with torch's OpenMP runtime alone."""
    return openmp.train(None)
