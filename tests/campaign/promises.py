"""The promises of the package with the tests that keep them, and docs/promises.md, made from a campaign's figures.

    python -m campaign.promises > docs/promises.md
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "promises.md"
FIGURES = Path(__file__).with_name("figures.json")


@dataclass(frozen=True)
class Promise:
    """A sentence, and the tests that would fail if it were false, as file::name under tests/."""

    text: str
    tests: tuple[str, ...]


PROMISES: dict[str, list[Promise]] = {
    "The right value": [
        Promise(
            "Every method takes the steps of its program in plain torch, on every backend and around six base "
            "optimizers",
            ("campaign/test_lives.py::test_random_lives_equal_plain_torch",),
        ),
        Promise(
            "Any order of calls gives the same weights, state and errors on every backend, and for SAM those of a "
            "plain program around torch's optimizer",
            ("test_random_programs.py::test_random_programs_agree_on_every_backend",),
        ),
        Promise(
            "Any shapes, groups, options, dtypes and numbers of threads give what `reference` gives in float64",
            ("test_properties.py::test_backends_agree_with_reference",),
        ),
        Promise(
            "Weights, gradients and state in unusual or shared memory are used by their value, or refused by name",
            ("test_hostile_memory.py::test_hostile_memory",),
        ),
    ],
    "Nothing is lost": [
        Promise(
            "An exception before any bytecode of a step, of a load or of `unperturbed()` leaves clean weights and "
            "their state, or `restore()` does",
            (
                "test_interrupts.py::test_an_exception_at_any_bytecode_of_a_step_loses_nothing",
                "test_interrupts.py::test_an_exception_at_any_bytecode_of_unperturbed_loses_nothing",
                "test_interrupts.py::test_an_exception_at_any_bytecode_of_a_load_leaves_the_old_state_or_the_new",
            ),
        ),
        Promise(
            "So does a signal at a random moment, whose handler raises",
            ("test_interrupts.py::test_signals_at_random_moments_lose_nothing",),
        ),
        Promise(
            "A run that SIGKILL ends between any two operations, or at a random moment, resumes from its last "
            "checkpoint to the bit",
            (
                "test_killed.py::test_a_killed_run_resumes_bit_equal",
                "campaign/test_kills.py::test_a_run_killed_at_random_moments_resumes_bit_equal",
            ),
        ),
        Promise(
            "A disk that is full while a checkpoint is saved changes no weight, no state and no older checkpoint",
            ("campaign/test_disk.py::test_a_full_disk_loses_nothing",),
        ),
    ],
    "Processes and threads": [
        Promise(
            "A forked child takes the parent's steps to the bit; on `cpu` without `torch.set_num_threads(1)` too",
            ("campaign/test_processes.py::test_a_forked_child_takes_the_parents_steps",),
        ),
        Promise(
            "Optimizers in several threads do not disturb each other, and one optimizer may go from thread to thread",
            (
                "campaign/test_processes.py::test_optimizers_in_several_threads_do_not_disturb_each_other",
                "campaign/test_processes.py::test_an_optimizer_goes_from_thread_to_thread",
            ),
        ),
        Promise(
            "The number of threads may change at any moment, and no bit of what `cpu` computes depends on it",
            ("campaign/test_processes.py::test_the_number_of_threads_may_change_at_any_moment",),
        ),
        Promise(
            "A second OpenMP runtime in the process, or one in place of torch's, changes no bit",
            ("campaign/test_processes.py::test_a_second_openmp_runtime_changes_nothing",),
        ),
        Promise(
            "The compiled module may be built again while processes use it",
            (
                "campaign/test_rebuilt.py::test_a_module_is_replaced_while_a_process_uses_it",
                "campaign/test_rebuilt.py::test_a_real_build_replaces_the_module_of_a_process",
            ),
        ),
    ],
    "Sizes and durations": [
        Promise(
            "Ten thousand tensors take the steps of one long vector",
            ("campaign/test_sizes.py::test_ten_thousand_tensors",),
        ),
        Promise(
            "A tensor of more than 2^31 elements is perturbed, restored and updated in every element",
            ("campaign/test_sizes.py::test_a_tensor_of_more_than_two_to_the_31_elements",),
        ),
        Promise(
            "Many steps do not drift from plain torch, and memory stays flat",
            (
                "campaign/test_endurance.py::test_many_steps_do_not_drift_and_memory_stays_flat",
                "campaign/test_endurance.py::test_a_life_of_changes_keeps_memory_flat",
            ),
        ),
        Promise(
            "An undo loses no bit, however often",
            ("campaign/test_endurance.py::test_an_undo_loses_no_bit_however_often",),
        ),
        Promise(
            "Counters of steps and random draws are exact, and a checkpoint has them",
            ("campaign/test_endurance.py::test_counters_are_exact_after_many_steps",),
        ),
    ],
}


def all_tests() -> list[str]:
    """Return the tests of all promises, in the page's order."""
    return [test for promises in PROMISES.values() for promise in promises for test in promise.tests]


INTRODUCTION = """
Each row is a promise, with the tests that would fail if it were false. `make test` runs them with a few fixed cases.
`make campaign` runs them with new cases for as long as it is told to. This page is made from the figures of one such
run, and a test compares it with them.

A case is a life, a program, a problem, a run or a step that was compared with what it should be. A fault is what was
done to it: an exception, a signal, a full disk, a fork, a replaced file, a number that is not finite. Lost is a case
that did not end as promised.
"""

LIMITS = """
Triton's interpreter is too slow for lives and long runs. `tests/test_triton_interpret.py` runs its kernels. A GPU has
run none of this. A tensor of more than 2^31 elements needs 16 GB of free memory; where there is less, the figures say
that the test was skipped. An interrupt has the limits of [usage.md](usage.md#interrupts-and-errors).

In a forked child, torch's own parallel regions may hang, because the threads of GNU's OpenMP runtime stay in the
parent. The kernels of `cpu` start threads of their own there. What torch itself computes in such a child, and so the
backends `foreach` and `reference`, needs `torch.set_num_threads(1)`.
"""


def wrapped(text: str) -> str:
    return "\n\n".join(
        textwrap.fill(" ".join(part.split()), 100, break_long_words=False, break_on_hyphens=False)
        for part in text.strip().split("\n\n")
    )


def number(n: int) -> str:
    return f"{n:,}"


def row(promise: Promise, found: dict[str, Any]) -> str:
    names = ", ".join(f"`{test}`" for test in promise.tests)
    figures = [found[test] for test in promise.tests]
    lost = sum(len(f["lost"]) for f in figures)
    skipped = sum(f["skipped"] for f in figures)
    faults = sum(f["faults"] for f in figures)
    note = f" ({number(skipped)} skipped)" if skipped else ""
    cases = f"{number(sum(f['cases'] for f in figures))}{note}"
    return f"| {promise.text} | {names} | {cases} | {number(faults) if faults else ''} | {number(lost)} |"


def page(figures: dict[str, Any]) -> str:
    """Return docs/promises.md."""
    lines = ["# Promises and their tests", "", wrapped(INTRODUCTION), ""]
    lines += [wrapped(f"The figures are those of `{figures['command']}` on {figures['machine']}."), ""]
    for title, promises in PROMISES.items():
        lines += [f"## {title}", "", "| promise | test | cases | faults injected | lost |", "|---|---|---|---|---|"]
        lines += [*(row(promise, figures["tests"]) for promise in promises), ""]
    lines += ["## Limits", "", wrapped(LIMITS)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(json.loads(FIGURES.read_text())), end="")
