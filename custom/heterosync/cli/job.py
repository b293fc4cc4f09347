"""`heterosync job`: the methods, and their FLARE job folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heterosync.cli.base import add_command, add_group, add_json, names, parse_settings, positive, show
from heterosync.errors import UserError, nearest


def register(commands: Any) -> None:
    group = add_group(
        commands, "job", "list the methods, write and describe their FLARE job folders", "heterosync job list"
    )

    parser = add_command(group, "list", "list the methods", _list, "heterosync job list\nheterosync job list --json")
    add_json(parser)

    parser = add_command(
        group,
        "table",
        "write docs/methods.md: what every method does, sends, keeps and costs",
        _table,
        "heterosync job table --out docs/methods.md",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: print it")

    parser = add_command(
        group,
        "describe",
        "tell what one method does, what leaves a site and what can be set",
        _describe,
        "heterosync job describe hsl",
    )
    parser.add_argument("method", metavar="METHOD")
    add_json(parser)

    parser = add_command(
        group,
        "export",
        "write FLARE job folders, ready for the simulator, POC and production",
        _export,
        "heterosync job export hsl --out myjobs --set rounds=8 --set image_size=64 --min-clients 5\n"
        "heterosync job export --all --out jobs",
    )
    parser.add_argument("method", metavar="METHOD", nargs="?", help="a name from `heterosync job list`")
    parser.add_argument("--all", action="store_true", help="every method")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the job folder becomes DIR/METHOD, with its variant"
    )
    parser.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="a setting that `heterosync job describe` lists"
    )
    parser.add_argument("--rounds", type=positive, metavar="N", help="the same as --set rounds=N")
    parser.add_argument("--min-clients", type=positive, metavar="N", help="sites that a round needs (default: all)")
    parser.add_argument(
        "--sites", type=names, metavar="A,B,…", help="sites that must take part (default: those connected)"
    )
    parser.add_argument(
        "--topology", choices=("star", "swarm"), help="who fuses: the server, or the sites among themselves (_swarm)"
    )
    parser.add_argument(
        "--dp-clip", type=float, metavar="C", help="shorten every update of a site to this L2 norm (_dp)"
    )
    parser.add_argument(
        "--dp-noise", type=float, metavar="Z", help="add Gaussian noise of Z times C to every element of an update"
    )
    parser.add_argument(
        "--byoc", action="store_true", help="pack heterosync itself into the job, for alliances that allow it"
    )

    parser = add_command(
        group,
        "resume",
        "write the job that goes on with the training of another one, from the model and round that the server stored",
        _resume,
        "heterosync job resume 6a8d04d1-4f33-4b3e-8c2d-0b8d6f7f0a11 --job myjobs/hsl --out myjobs/hsl_2\n"
        "heterosync job resume downloads/6a8d04d1-4f33-4b3e-8c2d-0b8d6f7f0a11 --out myjobs/hsl_2 --rounds 30",
    )
    parser.add_argument("training", metavar="JOB_ID|FOLDER", help="id of the training's first job, or a downloaded job")
    parser.add_argument("--job", type=Path, metavar="DIR", help="its job folder; needed with an id")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new job folder")
    parser.add_argument(
        "--segment-rounds", type=positive, default=0, metavar="N", help="rounds of the new job (default: all left)"
    )
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help="rounds of the training in all (default: as before)"
    )


def _list(arguments: argparse.Namespace) -> None:
    from heterosync.methods import method_names
    from heterosync.study.method_table import method_facts, sent
    from heterosync.study.table import text_table

    facts = [dict(method_facts(name)) for name in method_names()]
    if arguments.json:
        show(facts)
        return
    rows = [[f["name"], f["title"], f["status"], sent(f), f["group"]] for f in facts]
    print(text_table(["name", "method", "status", "sent per site and round", "group"], rows))
    print("\nmore of one: heterosync job describe NAME; of all: docs/methods.md")


def _table(arguments: argparse.Namespace) -> None:
    from heterosync.files import write_text
    from heterosync.study.method_table import methods_page

    if arguments.out is None:
        print(methods_page(), end="")
    else:
        print(write_text(arguments.out, methods_page()))


def _settings_of(name: str) -> dict[str, dict[str, Any]]:
    """Defaults of everything that `--set` knows: kind -> name -> value; the list of `describe` and of error lines."""
    from dataclasses import asdict

    from heterosync.flare.jobs.options import JobOptions
    from heterosync.methods import make_method

    method = make_method(name)
    options = asdict(JobOptions())
    for elsewhere in ("rounds", "training", "method_settings"):
        options.pop(elsewhere)
    return {"method": method.settings.to_dict(), "training": method.training.to_dict(), "job": options}


def _idle_settings(name: str) -> dict[str, str]:
    """Settings that are refused while the others have their defaults, or say nothing: name -> when they count."""
    from heterosync.methods import make_method

    method = make_method(name)
    idle = {**method.settings.idle(), **method.training.idle(), **dict.fromkeys(method.unheeded, "other methods")}
    return idle if method.uses_anchor else {**idle, "anchors_may_differ": "an anchor task"}


def _choices(name: str) -> dict[str, list[str]]:
    """Settings that take one of a few words: name -> the words."""
    from dataclasses import fields

    from heterosync.flare.jobs.options import TOPOLOGIES
    from heterosync.methods import make_method

    method = make_method(name)
    known = [item for settings in (method.settings, method.training) for item in fields(settings)]
    found = {item.name: list(item.metadata["choices"]) for item in known if item.metadata.get("choices")}
    return {**found, "topology": list(TOPOLOGIES)}


def _describe(arguments: argparse.Namespace) -> None:
    from heterosync.methods.base import STATUS
    from heterosync.methods.traffic import amount
    from heterosync.study.method_table import method_facts, sent

    facts = dict(method_facts(arguments.method))
    facts["settings"] = _settings_of(arguments.method)
    facts["settings_that_count_only_with"] = idle = _idle_settings(arguments.method)
    facts["settings_with_choices"] = choices = _choices(arguments.method)
    if arguments.json:
        show(facts)
        return
    print(f"{facts['title']} ({facts['name']})\n{facts['does']}")
    print(f"status: {facts['status']}: {STATUS[facts['status']]}\nsource: {facts['citation']}")
    print(f"\nnetwork: {facts['network']}")
    print(f"model: {facts['parameters']:,} parameters; anchor task: {'yes' if facts['uses_anchor'] else 'no'}")
    print(f"weights of the sites are combined: {facts['weighting']}")
    if facts["bytes_per_image"]:
        print(f"one site sends: {sent(facts)}, as activations (privacy class W3), and gets as much back as gradients")
    else:
        print(f"one site sends per round: {sent(facts)} in {facts['tensors_per_round']} tensors")
    site, server = (amount(facts[name]) for name in ("bytes_kept", "server_bytes"))
    print(f"kept from round to round beside what travels: {site} at a site; {server} at the server (of five sites)")
    print("\nwhat leaves a site:")
    for line in facts["leaves_a_site"]:
        print(f"  - {line}")
    for kind, values in facts["settings"].items():
        print(f"\nsettings of the {kind} (defaults; change with --set name=value):")
        for key, value in values.items():
            notes = [f"one of {', '.join(choices[key])}"] if key in choices else []
            notes += [f"counts only with {idle[key]}"] if key in idle else []
            print(f"  {key} = {value}" + (f"  ({'; '.join(notes)})" if notes else ""))


def job_options(name: str, settings: dict[str, Any]) -> Any:
    """Sort `--set` pairs into settings of the method, of the training and of the job. Raises `UserError` for an
    unknown name."""
    from heterosync.flare.jobs.options import JobOptions

    known = _settings_of(name)
    sorted_: dict[str, dict[str, Any]] = {kind: {} for kind in known}
    for key, value in settings.items():
        kinds = [kind for kind in known if key in known[kind]]
        if not kinds:
            raise UserError(
                f"unknown setting '{key}' of {name}: {nearest(key, [n for group in known.values() for n in group])}"
            )
        sorted_[kinds[0]][key] = value
    return JobOptions(method_settings=sorted_["method"], training=sorted_["training"], **sorted_["job"])


def _export(arguments: argparse.Namespace) -> None:
    from heterosync.flare.jobs.builder import all_jobs, build_job, check_job, job_name
    from heterosync.flare.jobs.folder import replaces_job
    from heterosync.methods import method_names

    if bool(arguments.method) == arguments.all:
        raise UserError("name one METHOD or give --all: see `heterosync job list`")
    settings = parse_settings(arguments.set)
    for key in ("rounds", "min_clients", "sites", "topology", "dp_clip", "dp_noise"):
        if getattr(arguments, key) is not None:
            if key in settings:
                raise UserError(f"--{key.replace('_', '-')} and --set {key}=… say the same: give one of them")
            settings[key] = getattr(arguments, key)
    methods = method_names() if arguments.all else [arguments.method]
    options = {method: job_options(method, settings) for method in methods}
    jobs = all_jobs(options) if arguments.all else list(options.items())
    for method, chosen in jobs:  # all are checked before the first is written
        check_job(method, chosen)
    folders = [arguments.out / job_name(method, chosen) for method, chosen in jobs]
    replaced = [replaces_job(folder) for folder in folders]
    for (method, chosen), folder, there in zip(jobs, folders, replaced, strict=True):
        written = build_job(method, folder, chosen, arguments.byoc)
        print(f"{written}{' (in place of the job that was there)' if there else ''}")


def _resume(arguments: argparse.Namespace) -> None:
    from heterosync.flare.jobs.segments import job_of, segment_job

    training, job = arguments.training, arguments.job
    if Path(training).is_dir():
        training, found = job_of(training)
        job = job or found
    elif job is None:
        raise UserError(f"'{training}' is no folder; with the id of a job, give its job folder too: --job DIR")
    print(segment_job(job, arguments.out, training, arguments.segment_rounds, arguments.rounds))
