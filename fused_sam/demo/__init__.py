"""`python -m fused_sam demo`: SGD against SAM on real data with wrong labels.

cli.py is the command; it needs the extra packages of `pip install 'fused_sam[demo]'`, this file needs none.
"""


class DemoError(Exception):
    """What the user can put right; the message says in one line what is wrong and what to do."""
