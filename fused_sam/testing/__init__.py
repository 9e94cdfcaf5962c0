"""Check the backends of an installation against the reference: `python -m fused_sam selftest`.

    report = fused_sam.testing.selftest()          # every backend that can run here
    assert report.ok, report.text()

It needs no test folder and takes seconds. A backend of your own is checked by its name, once it is registered.
"""

from .report import Report
from .run import selftest

__all__ = ["Report", "selftest"]
