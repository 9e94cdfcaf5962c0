"""`python -m fused_sam demo` compares SGD with SAM on real data with wrong labels.

cli.py is the command. It needs the extra packages of `pip install 'fused_sam[demo]'`; this file needs none.
"""


class DemoError(Exception):
    """Reports an error that the user can correct. Its one-line message says what is wrong and what to do."""
