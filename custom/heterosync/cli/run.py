"""`heterosync simulate`, `demo` and `doctor`: running jobs on this machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterosync.cli.base import DONE, FAILED, add_command, add_json, names, positive, show
from heterosync.errors import UserError


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        "train HSL and local models on synthetic sites and compare them",
        _demo,
        "heterosync demo --out build/demo",
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="default: build/demo")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="sites that train at the same time (default: all)"
    )
    parser.add_argument("--timeout", type=positive, default=1800, metavar="SECONDS", help="per method (default: 1800)")
    add_json(parser)

    parser = add_command(
        commands,
        "simulate",
        "run a job folder under FLARE's simulator, with progress, a time limit and one readable cause of a failure",
        _simulate,
        "heterosync simulate jobs/hsl --data build/demo/data --workspace build/hsl\n"
        "heterosync simulate jobs/hsl --data build/demo/data --workspace build/hsl --resume build/hsl",
    )
    parser.add_argument("job", type=Path, metavar="JOB", help="a job folder, for example jobs/hsl")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the training of an earlier simulation, its workspace"
    )
    parser.add_argument(
        "--segment-rounds", type=positive, default=0, metavar="N", help="stop after N rounds (default: do all)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of site folders (default: HETEROSYNC_DATA)")
    parser.add_argument("--workspace", type=Path, metavar="DIR", help="default: runs/<name of the job>")
    parser.add_argument(
        "--sites",
        type=names,
        metavar="A,B,…",
        help="default: every site folder in the data but `unseen`, which is for tests",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="sites that train at the same time (default: all)"
    )
    parser.add_argument(
        "--timeout", type=positive, default=86400, metavar="SECONDS", help="time limit (default: a day)"
    )
    add_json(parser)

    parser = add_command(
        commands,
        "doctor",
        "say whether this machine is ready: versions, memory, disk, GPU, data, allow-list, port",
        _doctor,
        "heterosync doctor --data /data/site-a --server fl.example.org:8002\nheterosync doctor --kit sysu01",
    )
    parser.add_argument(
        "--kit",
        type=Path,
        metavar="DIR",
        help="a startup kit: its seal, certificates, policy, server, and the data that its local/privacy.json names",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="a site folder or a folder of them (default: HETEROSYNC_DATA)"
    )
    parser.add_argument(
        "--workspace", type=Path, default=Path("poc/simulator"), metavar="DIR", help="default: poc/simulator"
    )
    parser.add_argument(
        "--port", type=positive, default=8002, help="port of a FLARE server on this machine (default: 8002)"
    )
    parser.add_argument("--server", metavar="HOST:PORT", help="an alliance's server that must be reachable from here")
    add_json(parser)


def sites_in(data: Path) -> list[str]:
    """Names of the site folders in `data` that take part; `unseen` images are for testing only."""
    from heterosync.data.scenario import UNSEEN

    if not data.is_dir():
        raise UserError(f"--data {data} is not a folder: make one with `heterosync data scenario` or `heterosync demo`")
    found = sorted(path.parent.name for path in data.glob("*/site.yaml") if path.parent.name != UNSEEN)
    if not found:
        raise UserError(f"{data} holds no site folder (a folder with site.yaml): see `heterosync data --help`")
    return found


def _data_folder(given: Path | None) -> Path:
    if given is not None:
        return given
    if os.environ.get("HETEROSYNC_DATA"):
        return Path(os.environ["HETEROSYNC_DATA"])
    raise UserError("no data folder: give --data DIR or set HETEROSYNC_DATA")


def put_partners_in(results: Path, anchor: Path) -> None:
    """The server has no anchor pack; here, where the sites' folders are at hand, the chosen model gets its partner
    images."""
    from heterosync.federation.modelfile import load_model
    from heterosync.methods import get_method
    from heterosync.study.partners import embed_partners

    model = results / "best_model.pt"
    if model.exists() and get_method(load_model(model).method).uses_anchor:
        embed_partners(model, anchor)


def _simulate(arguments: argparse.Namespace) -> None:
    import tempfile

    from heterosync.flare.jobs.segments import segment_job
    from heterosync.flare.running.simulator import JOB_ID, simulate

    data = _data_folder(arguments.data)
    sites = list(arguments.sites or sites_in(data))
    workspace = arguments.workspace or Path("runs") / arguments.job.resolve().name
    with tempfile.TemporaryDirectory(prefix="heterosync-") as temporary:
        job = arguments.job
        if arguments.resume or arguments.segment_rounds:
            training = JOB_ID if arguments.resume else ""
            job = segment_job(job, Path(temporary) / job.resolve().name, training, arguments.segment_rounds)
        result = simulate(
            job,
            workspace=workspace,
            sites=sites,
            data=data,
            threads=arguments.threads,
            timeout=arguments.timeout,
            log=None if arguments.json else print,
            resume=arguments.resume,
        )
    put_partners_in(result.results, data / sites[0])
    if arguments.json:
        show({"results": str(result.results), "workspace": str(workspace), "sites": sites})
        return
    from heterosync.study.pages.report import read_runs, report_text

    print(report_text(read_runs([result.results])))


def _demo(arguments: argparse.Namespace) -> None:
    from heterosync.flare.jobs.builder import build_job
    from heterosync.flare.jobs.options import JobOptions
    from heterosync.flare.running.simulator import simulate
    from heterosync.study.demo import run_demo

    def run_job(
        method: str,
        method_settings: Mapping[str, Any],
        training: Mapping[str, Any],
        data: Path,
        sites: list[str],
        folder: Path,
    ) -> Path:
        options = JobOptions(training=dict(training), method_settings=dict(method_settings))
        job = build_job(method, folder / "job", options)
        result = simulate(
            job,
            workspace=folder / "workspace",
            sites=sites,
            data=data,
            threads=arguments.threads,
            timeout=arguments.timeout,
            log=None if arguments.json else print,
        )
        put_partners_in(result.results, data / sites[0])
        return result.results

    say = print if not arguments.json else (lambda line: None)
    summary = run_demo(arguments.out, run_job, say=say)
    if arguments.json:
        show(summary)


def _doctor(arguments: argparse.Namespace) -> int:
    from heterosync.flare.jobs.allowlist import class_allow_list
    from heterosync.study.doctor import PROBLEM, examine

    if arguments.kit is not None:
        checks = _examine_kit(arguments)
    else:
        checks = examine(arguments.data, arguments.workspace, class_allow_list(), arguments.port, arguments.server)
    problems = sum(check.state == PROBLEM for check in checks)
    if arguments.json:
        show({"ready": not problems, "checks": [check.as_dict() for check in checks]})
    else:
        for check in checks:
            print(check.line())
        print("this machine is ready" if not problems else f"{problems} problem(s) to mend")
    return FAILED if problems else DONE


def _examine_kit(arguments: argparse.Namespace) -> list[Any]:
    """What the doctor finds about a kit, and about this machine as far as the kit's owner needs it."""
    from heterosync.flare.jobs.allowlist import class_allow_list
    from heterosync.flare.kits import doctor as kit_doctor
    from heterosync.flare.kits.kit import Kit
    from heterosync.study.doctor import Check, examine

    kit = Kit(arguments.kit)
    checks = [Check(*finding) for finding in kit_doctor.examine_kit(kit.folder)]
    data, wrong = (arguments.data, []) if arguments.data or kit.kind != "client" else kit_doctor.site_folder(kit)
    port = kit_doctor.server_address(kit)[1] if kit.kind == "server" else None
    site = kit.kind == "client" and not wrong
    machine = examine(data, kit.folder, class_allow_list(), port, environ=os.environ if site else {})
    needless = {"client": () if site else ("data",), "server": ("data",), "admin": ("data", "allow-list")}[kit.kind]
    return [*checks, *(check for check in machine if check.name not in needless), *(Check(*each) for each in wrong)]
