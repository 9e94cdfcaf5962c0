"""The command `python -m fused_sam` has three subcommands: info, selftest and demo."""

from __future__ import annotations

import argparse
import sys

from .info import __version__, report


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_sam", description="Fused SAM for PyTorch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,selftest,demo}")
    commands.add_parser("info", help="print which backends can run here, which one is used, and why")
    test = commands.add_parser("selftest", help="check every backend of this machine against the reference")
    test.add_argument("--backend", help="check this one alone; an error if it cannot run here")
    test.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands.add_parser("demo", help="train on real data with SGD and SAM; see demo --help", add_help=False)
    command, rest = parser.parse_known_args(arguments)
    if command.command == "demo":
        return _demo(rest)
    if rest:
        parser.error(f"{command.command} does not take {' '.join(rest)}")
    if command.command == "selftest":
        return _selftest(command.backend, as_json=command.json)
    print(report())
    return 0


def _selftest(backend: str | None, *, as_json: bool) -> int:
    """Return 0 if all backends agree with the reference, 1 if one differs, 2 if the named one cannot be tested."""
    from .testing import selftest

    try:
        found = selftest(backend)
    except (ValueError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    if as_json:
        print(found.json())
    else:
        found.show()
    return 1 if found.differences else 0


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
