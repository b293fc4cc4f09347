"""`heterosync data`: check a site folder, make site folders, anchor packs, scenarios and synthetic alliances."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heterosync.cli.base import DONE, FAILED, add_command, add_group, add_json, positive, show
from heterosync.cli.scenario import hint_at_anchor, print_problems, register_scenario, scenario_summary
from heterosync.cli.source import SOURCE_KINDS, add_kind, add_source, open_source, seed
from heterosync.cli.volumes import register_volumes
from heterosync.errors import UserError


def register(commands: Any) -> None:
    group = add_group(
        commands, "data", "check, import, divide and make image data", "heterosync data check data/site-a"
    )

    parser = add_command(
        group,
        "check",
        "report every problem of a site folder, or of all sites of a scenario, at once",
        _check,
        "heterosync data check /data/site-a",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="a site folder, or the folder that `data scenario` wrote"
    )
    parser.add_argument(
        "--no-anchor", action="store_true", help="for methods without an anchor task: do not ask for one"
    )
    parser.add_argument("--all", action="store_true", help="print every problem, not five of a kind")
    add_json(parser)

    parser = add_command(
        group,
        "import",
        "make one site folder from labelled images",
        _import,
        "heterosync data import folder scans --negative normal --positive abnormal --anchor anchor --out data/site-a\n"
        "heterosync data import csv cases.csv --negative 0 --positive 1 --label-column malignant --out data/site-b",
    )
    parser.add_argument("kind", help=f"how the images are kept: {SOURCE_KINDS}")
    add_source(parser)
    parser.add_argument("--anchor", type=Path, metavar="FOLDER", help="anchor pack to copy into the site folder")
    parser.add_argument("--out", required=True, type=Path, metavar="SITE_FOLDER")

    parser = add_command(
        group,
        "anchor",
        "make an anchor pack: the same labelled public images for every site",
        _anchor,
        "heterosync data anchor mednist.npz --negative Hand --positive HeadCT --per-class 500 --out anchor",
    )
    add_source(parser)
    add_kind(parser)
    parser.add_argument("--per-class", type=positive, default=500, metavar="N", help="images per class (default: 500)")
    parser.add_argument("--name", help="name of the pack (default: made of the source and the classes)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the draw (default: 0)")
    parser.add_argument(
        "--control",
        choices=("shuffled_labels", "noise_pixels"),
        help="take away what generalises, to see what an anchor task is worth (docs/anchor.md)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")

    register_scenario(group)

    parser = add_command(
        group,
        "synthetic",
        "make an alliance of synthetic radiograph-like images",
        _synthetic,
        "heterosync data synthetic --out data --image-size 64 --seed 1",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the site folders become DIR/SITE")
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    parser.add_argument("--image-size", type=positive, default=64, metavar="PIXELS", help="default: 64")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="multiply all counts (default: 1.0)")

    register_volumes(group)


def _check(arguments: argparse.Namespace) -> int:
    from heterosync.data.task_kinds import check_folder
    from heterosync.training.checks import device_problem

    if (arguments.folder / "scenario.json").is_file():
        return scenario_summary(arguments.folder, not arguments.no_anchor, arguments.json, arguments.all)
    found = check_folder(arguments.folder, need_anchor=not arguments.no_anchor)
    device = device_problem(found.device) if found.device else None
    problems = [*found.problems, *([f"site.yaml: {device}"] if device else [])]
    if arguments.json:
        show({"folder": str(arguments.folder), "problems": problems, **({} if problems else found.summary)})
    elif problems:
        print_problems(arguments.folder, problems, arguments.all)
    else:
        print(f"{arguments.folder}: in order", *found.lines, sep="\n")
    return FAILED if problems else DONE


def _import(arguments: argparse.Namespace) -> None:
    from heterosync.data.scenario import check_anchor, write_site
    from heterosync.files import new_folder

    given = "folder" if arguments.source.is_dir() else arguments.source.suffix.lower().lstrip(".")
    if arguments.source.exists() and arguments.kind in ("folder", "csv", "npz") and given != arguments.kind:
        raise UserError(
            f"{arguments.source} is not of the kind '{arguments.kind}': write `heterosync data import {given}`"
        )
    collection = open_source(arguments)
    if arguments.anchor:
        check_anchor(arguments.anchor, collection)
    with new_folder(arguments.out) as folder:
        write_site(folder, collection, anchor=arguments.anchor)
    print(f"{arguments.out} written; next: `heterosync data check {arguments.out}`")
    if not arguments.anchor:
        hint_at_anchor(arguments.out)


def _anchor(arguments: argparse.Namespace) -> None:
    from heterosync.data.anchor import write_anchor
    from heterosync.data.anchor_controls import controlled
    from heterosync.data.scenario_plan import draw_balanced

    collection = draw_balanced(open_source(arguments), arguments.per_class, arguments.seed)
    negative, positive = collection.classes
    name = arguments.name or f"{collection.name}: {negative} or {positive}"
    pictures = [collection.image(row) for row in range(len(collection))]
    images, labels, name = controlled(pictures, collection.labels, name, arguments.control, arguments.seed)
    digest = write_anchor(arguments.out, images, labels, name, negative, positive)
    print(f"{arguments.out} written: {len(images)} images, 1:1, digest {digest}")


def _synthetic(arguments: argparse.Namespace) -> None:
    from heterosync.data.synthetic import make_alliance

    sites = make_alliance(arguments.out, arguments.seed, arguments.image_size, arguments.scale)
    print(f"{arguments.out}: synthetic images for {', '.join(sites)}; test-only site: unseen")
    print(f"next: `HETEROSYNC_DATA={arguments.out} heterosync simulate jobs/hsl`")
