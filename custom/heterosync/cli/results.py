"""`heterosync report`: what runs have found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heterosync.cli.base import add_command, add_json, show
from heterosync.cli.study import report as report_study
from heterosync.errors import UserError


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        "make tables and figures from the result files of finished, running or broken-off runs",
        _report,
        "heterosync report build/demo/hsl build/demo/local --out build/report\nheterosync report runs/demo",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder, a folder that holds one somewhere, or one study",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the page, tables and figures there")
    add_json(parser)


def _report(arguments: argparse.Namespace) -> None:
    from heterosync.study.figures.overlay import PATIENTS
    from heterosync.study.layout import STUDY
    from heterosync.study.pages.report import read_runs, report_dict, report_text, write_report

    studies = [path for path in arguments.runs if (path / STUDY).is_file()]
    if studies and len(arguments.runs) > 1:
        raise UserError(f"{studies[0]} is a study: report on it by itself, `heterosync study report {studies[0]}`")
    if studies:
        report_study(studies[0], arguments.out, arguments.json)
        return
    runs = read_runs(arguments.runs)
    files = write_report(runs, arguments.out) if arguments.out else []
    if arguments.json:
        show(report_dict(runs))
        return
    print(report_text(runs))
    for file in files:
        print(f"wrote {file}")
    if any(file.name.startswith("overlays") for file in files):
        print(PATIENTS)
