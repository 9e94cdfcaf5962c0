"""The command `python -m fused_sam` has two subcommands, info and demo."""

from __future__ import annotations

import argparse
import sys

from .info import __version__, report


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_sam", description="Fused SAM for PyTorch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo}")
    commands.add_parser("info", help="print which backends can run here, which one is used, and why")
    commands.add_parser("demo", help="train on real data with SGD and SAM; see demo --help", add_help=False)
    command, rest = parser.parse_known_args(arguments)
    if command.command == "demo":
        return _demo(rest)
    if rest:
        parser.error("info takes no arguments")
    print(report())
    return 0


def _demo(arguments: list[str]) -> int:
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import sklearn  # noqa: F401
        import typer
    except ImportError as error:
        print(f"the demo needs {error.name}: pip install 'fused_sam[demo]'", file=sys.stderr)
        return 2
    from .demo.cli import demo

    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(demo)
    application(arguments, prog_name="python -m fused_sam demo")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
