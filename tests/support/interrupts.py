"""Raises an exception between two bytecodes of the package, wherever a test wants it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import fused_sam

PACKAGE = str(Path(fused_sam.__file__).parent)


class Interrupt(KeyboardInterrupt):
    """The exception that is raised."""


def run(action: Callable[[], Any], at: int = -1, again: int = 0) -> int:
    """Run an action, and raise Interrupt before bytecode number `at` of the package that it runs.

    Args:
        again: raise it once more, so many bytecodes later; 0: do not.

    Returns:
        How many bytecodes ran. `at` itself if the exception was raised: it ends here.
    """
    ran = 0
    raised_at = ""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal ran, raised_at
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            if ran == at or (again and ran == at + again):
                if not again or ran > at:
                    sys.settrace(None)
                ran += 1
                raised_at = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                raise Interrupt(raised_at)
            ran += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Interrupt:
        run.place = raised_at  # type: ignore[attr-defined]
    finally:
        sys.settrace(before)
        # CPython delivers a signal after calls only, and so never where this would leave the mode changed.
        torch.set_grad_enabled(True)
    return ran
