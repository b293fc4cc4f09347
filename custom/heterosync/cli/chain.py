"""`heterosync alliance run`: a long training as a chain of jobs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heterosync.cli.base import add_command, add_json, positive, show


def register_run(group: Any) -> None:
    """Add `run` to the commands of `heterosync alliance`."""
    parser = add_command(
        group,
        "run",
        "run a training as a chain of jobs; cut off or failed, the same command goes on with it",
        _run,
        "heterosync alliance run jobs/hsl --kit kits/lead@example.org --segments-of 5 --out runs/hsl",
    )
    parser.add_argument("job", type=Path, metavar="JOB", help="a job folder, for example jobs/hsl")
    parser.add_argument("--kit", required=True, type=Path, metavar="DIR", help="startup kit of an admin who may submit")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="results, and chain.json to go on from")
    parser.add_argument(
        "--segments-of",
        type=positive,
        default=5,
        metavar="N",
        help="rounds per job: how often sites can join or return (default: 5)",
    )
    parser.add_argument(
        "--attempts", type=positive, default=3, metavar="N", help="jobs in a row without a round (default: 3)"
    )
    parser.add_argument(
        "--wait",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="how long a job waits for the sites of the one before (default: 60)",
    )
    add_json(parser)


def _run(arguments: argparse.Namespace) -> None:
    from heterosync.flare.running.chain import Chain
    from heterosync.flare.running.session import admin_session
    from heterosync.study.pages.report import read_runs, report_text

    say = (lambda line: None) if arguments.json else print
    chain = Chain(arguments.job, arguments.out, arguments.segments_of, say, arguments.attempts, arguments.wait)
    with admin_session(arguments.kit) as session:
        results = chain.run(session)
    if arguments.json:
        show({"results": str(results), **chain.summary()})
        return
    print(report_text(read_runs([results])))
