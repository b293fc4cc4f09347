"""`heterosync data`: check a site folder, make site folders, anchor packs, scenarios and synthetic alliances."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterosync.cli.base import DONE, FAILED, add_command, add_group, add_json, positive, show
from heterosync.errors import UserError

if TYPE_CHECKING:
    from heterosync.data.collection import Collection


def register(commands: Any) -> None:
    group = add_group(
        commands, "data", "check, import, divide and make image data", "heterosync data check data/site-a"
    )

    parser = add_command(
        group,
        "check",
        "report every problem of a site folder at once",
        _check,
        "heterosync data check /data/site-a",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
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
    parser.add_argument("kind", choices=("folder", "csv", "npz"), help="how the images are kept")
    _add_source(parser)
    parser.add_argument("--anchor", type=Path, metavar="FOLDER", help="anchor pack to copy into the site folder")
    parser.add_argument("--out", required=True, type=Path, metavar="SITE_FOLDER")

    parser = add_command(
        group,
        "anchor",
        "make an anchor pack: the same labelled public images for every site",
        _anchor,
        "heterosync data anchor mednist.npz --negative Hand --positive HeadCT --per-class 500 --out anchor",
    )
    _add_source(parser)
    parser.add_argument("--per-class", type=positive, default=500, metavar="N", help="images per class (default: 500)")
    parser.add_argument("--name", help="name of the pack (default: made of the source and the classes)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the draw (default: 0)")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")

    parser = add_command(
        group,
        "scenario",
        "divide a collection into site folders by a table of counts",
        _scenario,
        "heterosync data scenario my.csv busi.npz --negative benign --positive malignant --anchor pack --out data\n"
        "heterosync data scenario combined mura.csv --negative 0 --positive 1 --scale .1 --out data",
    )
    parser.add_argument(
        "table", metavar="TABLE", help="combined, synthetic, or a CSV file: site,domain,negative,positive"
    )
    _add_source(parser)
    parser.add_argument("--anchor", type=Path, metavar="FOLDER", help="anchor pack that every site gets")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the draw: the repeat's number (default: 0)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="multiply all counts (default: 1.0)")
    parser.add_argument(
        "--group",
        choices=("patient", "image"),
        default="patient",
        help="patient: no patient in two sites, where patients are known (default); image: ignore patients",
    )
    parser.add_argument("--no-unseen", action="store_true", help="do not write the remaining images as site 'unseen'")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the site folders become DIR/SITE")

    parser = add_command(
        group,
        "synthetic",
        "make an alliance of synthetic radiograph-like images",
        _synthetic,
        "heterosync data synthetic --out data --image-size 64 --seed 1",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the site folders become DIR/SITE")
    parser.add_argument("--seed", type=_seed, default=0, help="default: 0")
    parser.add_argument("--image-size", type=positive, default=64, metavar="PIXELS", help="default: 64")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="multiply all counts (default: 1.0)")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="folder (CLASS/… or DOMAIN/CLASS/…), .csv or .npz file",
    )
    parser.add_argument("--negative", required=True, metavar="LABEL", help="label of the negative class")
    parser.add_argument("--positive", required=True, metavar="LABEL", help="label of the positive class")
    for name in ("image", "label", "patient", "domain"):
        parser.add_argument(
            f"--{name}-column", metavar="NAME", help=f"column (default: {name}) or npz key (default: {name}s)"
        )


def _seed(text: str) -> int:
    """An argparse type: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 0 or more")
    return int(text)


def _open(arguments: argparse.Namespace) -> Collection:
    from heterosync.data.importers import open_collection

    columns = {
        f"{name}_column": getattr(arguments, f"{name}_column") for name in ("image", "label", "patient", "domain")
    }
    collection = open_collection(arguments.source, arguments.negative, arguments.positive, **columns)
    print(collection.summary())
    for note in collection.notes:
        print(f"note: {note}")
    return collection


def _check(arguments: argparse.Namespace) -> int:
    from heterosync.data.check import inspect_site, summarised
    from heterosync.data.site import SPLITS
    from heterosync.training.checks import device_problem

    found = inspect_site(arguments.folder, None, need_anchor=not arguments.no_anchor)
    device = device_problem(found.config.device) if found.config else None
    if device:
        found.problems.append(f"site.yaml: {device}")
    summary: dict[str, Any] = {"folder": str(arguments.folder), "problems": found.problems}
    if not found.problems and found.config is not None:
        labels = [found.config.labels[row.label] for row in found.rows]
        counts = Counter(zip(found.splits, labels, strict=True))
        summary["images"] = {split: {name: counts[split, name] for name in found.config.labels} for split in SPLITS}
        summary["anchor_digest"] = found.anchor.digest if found.anchor else None
    if arguments.json:
        show(summary)
    elif found.problems:
        lines = found.problems if arguments.all else summarised(found.problems)
        print("\n".join(lines))
        more = " (--all prints each of them)" if len(lines) < len(found.problems) else ""
        print(f"{arguments.folder}: {len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}{more}")
    else:
        print(f"{arguments.folder}: in order")
        for split, by_label in summary["images"].items():
            print(f"{split:10}  " + ", ".join(f"{count} {name}" for name, count in by_label.items()))
        print(f"anchor      {summary['anchor_digest'] or 'none'}")
    return FAILED if found.problems else DONE


def _import(arguments: argparse.Namespace) -> None:
    from heterosync.data.scenario import check_anchor, write_site
    from heterosync.files import new_folder

    given = "folder" if arguments.source.is_dir() else arguments.source.suffix.lower().lstrip(".")
    if arguments.source.exists() and given != arguments.kind:
        raise UserError(
            f"{arguments.source} is not of the kind '{arguments.kind}': write `heterosync data import {given}`"
        )
    collection = _open(arguments)
    if arguments.anchor:
        check_anchor(arguments.anchor, collection)
    with new_folder(arguments.out) as folder:
        write_site(folder, collection, anchor=arguments.anchor)
    print(f"{arguments.out} written; next: `heterosync data check {arguments.out}`")
    if not arguments.anchor:
        _hint_at_anchor(arguments.out)


def _anchor(arguments: argparse.Namespace) -> None:
    from heterosync.data.anchor import write_anchor
    from heterosync.data.scenario import draw_balanced

    collection = draw_balanced(_open(arguments), arguments.per_class, arguments.seed)
    name = arguments.name or f"{collection.name}: {arguments.negative} or {arguments.positive}"
    images = [collection.image(row) for row in range(len(collection))]
    digest = write_anchor(arguments.out, images, collection.labels, name, arguments.negative, arguments.positive)
    print(f"{arguments.out} written: {len(images)} images, 1:1, digest {digest}")


def _scenario(arguments: argparse.Namespace) -> None:
    from heterosync.data.scenario import plan_scenario, read_table, scaled, write_scenario

    table = scaled(read_table(arguments.table), arguments.scale)
    collection = _open(arguments)
    options = {"seed": arguments.seed, "unseen": not arguments.no_unseen, "group": arguments.group}
    for line in plan_scenario(collection, table, **options).describe(collection):
        print(line)
    folders = write_scenario(collection, table, arguments.out, arguments.anchor, **options)
    print(f"{len(folders)} site folders written in {arguments.out}")
    if not arguments.anchor:
        _hint_at_anchor(arguments.out / "SITE")


def _hint_at_anchor(site: Path) -> None:
    print(f"no anchor pack yet, which HSL needs: make one with `heterosync data anchor`, then copy it to {site}/anchor")


def _synthetic(arguments: argparse.Namespace) -> None:
    from heterosync.data.synthetic import make_alliance

    sites = make_alliance(arguments.out, arguments.seed, arguments.image_size, arguments.scale)
    print(f"{arguments.out}: synthetic images for {', '.join(sites)}; test-only site: unseen")
    print(f"next: `HETEROSYNC_DATA={arguments.out} heterosync simulate jobs/hsl`")
