"""The `heterosync` command: it parses, calls and prints. `main(argv)` returns the exit code."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from heterosync import __version__
from heterosync.cli import alliance, data, job, models, poc, results, run, study
from heterosync.cli.base import Parser, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="heterosync",
        description="Federated learning on medical images with NVIDIA FLARE, for sites whose data differ.",
        epilog="Start with `heterosync demo --out build/demo`. Every command has --help with an example.",
    )
    parser.add_argument("--version", action="version", version=f"heterosync {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (data, job, run, alliance, poc, results, models, study):
        module.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), argv)
