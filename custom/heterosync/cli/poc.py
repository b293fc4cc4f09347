"""`heterosync poc`: one job in FLARE's POC mode, from preparation to results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heterosync.cli.base import add_command, add_json, parse_settings, positive, show
from heterosync.cli.job import job_options
from heterosync.cli.run import put_partners_in, sites_in
from heterosync.errors import UserError

MARK = ".heterosync-poc"


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "poc",
        "run a job in FLARE's POC mode: server and sites as separate processes with mutual TLS on this machine",
        _poc,
        "heterosync poc hsl --sites 3 --out build/poc\n"
        "heterosync poc jobs/hsl --data /data/alliance --sites 5 --out build/poc",
    )
    parser.add_argument("job", metavar="METHOD_OR_JOB", help="a method, for example hsl, or a job folder")
    parser.add_argument("--sites", type=positive, default=2, metavar="N", help="number of sites (default: 2)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of site folders; the first N take part (default: synthetic)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, logs and the plain commands")
    parser.add_argument("--rounds", type=positive, metavar="R", help="the same as --set rounds=R; only for a method")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting; only for a method")
    parser.add_argument(
        "--timeout", type=positive, default=86400, metavar="SECONDS", help="time limit of the job (default: a day)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the POC workspace in DIR/poc for a look")
    add_json(parser)


def _poc(arguments: argparse.Namespace) -> None:
    from heterosync.data.synthetic import make_alliance
    from heterosync.files import own_folder
    from heterosync.flare.jobs.builder import build_job
    from heterosync.flare.running.poc import run_poc
    from heterosync.study.demo import TRAINING

    job, data, out = Path(arguments.job), arguments.data, arguments.out
    for folder in (job, data):
        if folder is not None and out.absolute() in (folder.absolute(), *folder.absolute().parents):
            raise UserError(f"{folder} lies in --out {out}, which is emptied: choose another --out")
    settings = parse_settings(arguments.set)
    if arguments.rounds is not None:
        settings["rounds"] = arguments.rounds
    options = None
    if not (job / "meta.json").is_file():
        # On synthetic images the settings of the demo, which take minutes.
        options = job_options(arguments.job, settings if data is not None else {**TRAINING, **settings})
    elif settings:
        raise UserError(f"{job} is a finished job: settings go into `heterosync job export --set …`")
    if data is not None:
        sites = _chosen(data, sites_in(data), arguments.sites)
    own_folder(out, MARK, "heterosync poc")
    if data is None:
        data = out / "data"
        sites = _chosen(data, make_alliance(data), arguments.sites)
    if options is not None:
        job = build_job(arguments.job, out / "job", options)
    result = run_poc(
        job,
        {site: data / site for site in sites},
        out,
        timeout=arguments.timeout,
        say=(lambda line: None) if arguments.json else print,
        keep=arguments.keep,
    )
    put_partners_in(result.results, data / sites[0])
    if arguments.json:
        places = {site: str(folder) for site, folder in result.sites.items()}
        seconds = {"ready_seconds": result.ready_seconds, "job_seconds": result.job_seconds}
        show({"results": str(result.results), "sites": places, **seconds})
        return
    from heterosync.study.pages.report import read_runs, report_text

    print(report_text(read_runs([result.results])))


def _chosen(data: Path, found: list[str], count: int) -> list[str]:
    if count > len(found):
        raise UserError(f"--sites {count}, but {data} holds {len(found)} sites: {', '.join(found)}")
    return found[:count]
