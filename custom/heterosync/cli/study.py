"""`heterosync study`: methods x scenarios x levels x repeats, from one plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heterosync.cli.base import DONE, FAILED, add_command, add_group, add_json, names, positive, show
from heterosync.errors import UserError

ENGINES = ("flare", "inprocess")


def register(commands: Any) -> None:
    group = add_group(
        commands, "study", "compare methods under skew: a plan of runs, done once each", "heterosync study run demo"
    )

    parser = add_command(
        group,
        "run",
        "carry out a plan, or what is left of it; print it first",
        _run,
        "heterosync study run demo --out runs/demo\n"
        "heterosync study run busi.yaml --out runs/busi --jobs 2 --engine inprocess\n"
        "heterosync study run paper --dry-run",
    )
    parser.add_argument(
        "plan",
        metavar="PLAN",
        help="a YAML file (docs/study.md), or a preset: paper, small, demo, prostate, prostate-small",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="study folder (default: runs/<name of the plan>)")
    parser.add_argument("--engine", choices=ENGINES, help="FLARE's simulator, or one process (default: the plan's)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at the same time (default: 1)")
    parser.add_argument("--cores", type=positive, metavar="N", help="processors for all of them (default: all)")
    parser.add_argument(
        "--gpus", type=names, default=(), metavar="0,1,…", help="GPUs to share out among the jobs (default: the first)"
    )
    parser.add_argument(
        "--data-only", action="store_true", help="write the images and stop; then `study one` for each run"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and write nothing")
    add_json(parser)

    parser = add_command(
        group,
        "one",
        "carry out one run of a study that `study run` has begun, as it does itself in a process of its own",
        _one,
        "heterosync study one runs/demo combined/all/r0/hsl",
    )
    _add_study(parser)
    parser.add_argument("path", metavar="RUN", help="scenario/level/repeat/label, as below the study's folder runs/")

    parser = add_command(
        group,
        "status",
        "say how far a study is, running or broken off",
        _status,
        "heterosync study status runs/demo",
    )
    _add_study(parser)
    add_json(parser)

    parser = add_command(
        group,
        "report",
        "compare the methods of a study: one page with its figures and tables, also of a study that is still going",
        _report,
        "heterosync study report runs/demo\nheterosync study report runs/demo --reference fedavg --out fedavg-report",
    )
    _add_study(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: STUDY/report)")
    parser.add_argument("--reference", metavar="LABEL", help="compare all others with this one (default: hsl)")
    parser.add_argument(
        "--resamples", type=positive, metavar="N", help="of every bootstrap (default: 1000, the paper's)"
    )
    parser.add_argument("--no-maps", action="store_true", help="leave out the t-SNE maps, which take the longest")
    add_json(parser)

    parser = add_command(
        group,
        "clean",
        "remove models and workspaces of finished runs; results stay",
        _clean,
        "heterosync study clean runs/demo\nheterosync study clean runs/demo --all --yes",
    )
    _add_study(parser)
    parser.add_argument("--all", action="store_true", help="remove the whole study: images, results and report too")
    parser.add_argument("--yes", action="store_true", help="with --all: yes, the results too")


def _add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, metavar="STUDY", help="the folder of the study")


def _run(arguments: argparse.Namespace) -> int:
    import sys

    from heterosync.study.running.plan_file import read_plan
    from heterosync.study.running.progress import display
    from heterosync.study.running.runner import Machine, lay_out, plan_facts, plan_text, run_study

    plan = read_plan(arguments.plan, arguments.engine)
    out = arguments.out or Path("runs") / plan.name
    start = [sys.executable, "-m", "heterosync.cli", "study", "one"]
    machine = Machine(start, arguments.jobs, arguments.cores, arguments.gpus)
    work = lay_out(plan, out)
    shown = display(arguments.json)
    shown.event("plan", plan_text(work, out, machine), **plan_facts(work, out))
    if arguments.dry_run:
        return DONE
    failed = run_study(work, out.absolute(), machine, shown, arguments.data_only)
    if arguments.data_only:
        shown.event("end", f"ready; next: heterosync study one {out} RUN", study=str(out), failed={})
        return DONE
    shown.event("end", _summary(failed, out), study=str(out), failed=failed)
    return FAILED if failed else DONE


def _summary(failed: dict[str, str], out: Path) -> str:
    if not failed:
        return f"all runs are done; next: heterosync study report {out}"
    lines = [f"{len(failed)} run{'s' if len(failed) > 1 else ''} failed:"]
    lines += [f"  {run}: {cause}" for run, cause in failed.items()]
    return "\n".join([*lines, "the same command tries them again; all others are done"])


def _one(arguments: argparse.Namespace) -> None:
    import logging
    import sys

    from heterosync.cli.study_engine import Simulator
    from heterosync.study.running.engines import InProcess
    from heterosync.study.running.one import play

    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    done = play(arguments.study, arguments.path, {"flare": Simulator(), "inprocess": InProcess()})
    print(f"done after {done.seconds:.0f} s; peak memory {done.peak_memory_bytes / 2**30:.2f} GiB")


def _status(arguments: argparse.Namespace) -> None:
    from heterosync.study.running.record import read_study
    from heterosync.study.running.status import as_dict, states_of, status_text

    record, states = read_study(arguments.study), states_of(arguments.study)
    if arguments.json:
        show({"name": record.plan.name, "digest": record.digest, "runs": [as_dict(state) for state in states]})
    else:
        print(status_text(arguments.study, record, states))


def _report(arguments: argparse.Namespace) -> None:
    wish = {"reference": arguments.reference, "resamples": arguments.resamples, "maps": not arguments.no_maps}
    report(arguments.study, arguments.out, arguments.json, **wish)


def report(study: Path, out: Path | None, as_json: bool, **wish: Any) -> None:
    """Write the report on a study and show it; wish: more fields of `pages.wish.Wish`."""
    import sys

    from heterosync.study.pages.reports import report_on
    from heterosync.study.pages.wish import Wish

    made = report_on(study, Wish(out, **wish), lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        show({**made.facts, "page": str(made.page)})
        return
    print(made.text)
    print(f"wrote {made.page}, with its figures and tables beside it")


def _clean(arguments: argparse.Namespace) -> None:
    from heterosync.study.running.status import everything, removable, remove, size_of

    study = arguments.study
    if arguments.yes and not arguments.all:
        raise UserError("--yes goes with --all: without it only models and workspaces of finished runs are removed")
    paths = everything(study) if arguments.all else list(removable(study))
    megabytes = size_of(paths) / 1e6
    if arguments.all and not arguments.yes:
        lost = f"{study}: --all removes images, results, models and report ({megabytes:.0f} MB)"
        raise UserError(f"{lost}: add --yes to do that, or leave out --all to keep all but models and workspaces")
    remove(study, paths)
    what = "the study" if arguments.all else f"models and workspaces of finished runs ({len(paths)} files and folders)"
    kept = "" if arguments.all else "; results and images stay, the report's feature plots need the models"
    print(f"removed {what}, {megabytes:.0f} MB{kept}")
