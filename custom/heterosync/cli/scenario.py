"""`heterosync data scenario`: divide a collection among sites by a table, and check what was written."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterosync.cli.base import DONE, FAILED, add_command, positive, show
from heterosync.cli.source import add_kind, add_source, given_columns, named_paths, open_source, seed
from heterosync.errors import UserError

if TYPE_CHECKING:
    from heterosync.data.anchor_tables import AnchorRow
    from heterosync.data.collection import Collection
    from heterosync.data.scenario_tables import SiteRow

SYNTHETIC = "synthetic"


def register_scenario(group: Any) -> None:
    parser = add_command(
        group,
        "scenario",
        "divide a collection into site folders by a table of counts",
        _scenario,
        "heterosync data scenario my.csv busi.npz --negative benign --positive malignant --anchor pack --out data\n"
        "heterosync data scenario combined mura.csv --negative 0 --positive 1 --scale .1 --out data\n"
        "heterosync data scenario label-skew MURA-v1.1 --kind mura --level 20 --group image --plan\n"
        "heterosync data scenario combined synthetic --sat non-sat-mix --scale .02 --out data",
    )
    parser.add_argument(
        "table",
        metavar="TABLE",
        help="feature-skew, label-skew, quantity-skew, combined, hospitals, synthetic, or a CSV file: "
        "site,domain,negative,positive",
    )
    add_source(parser)
    add_kind(parser)
    parser.add_argument("--level", help="level of a table that has levels, for example 20 of label-skew (20:1)")
    parser.add_argument("--anchor", type=Path, metavar="FOLDER", help="anchor pack that every site gets")
    parser.add_argument(
        "--sat",
        metavar="TABLE",
        help="make the anchor packs: sat-rsna, sat-cifar10, sat-bus-bra, non-sat-mix, or a CSV",
    )
    parser.add_argument(
        "--sat-source", action="append", metavar="NAME=PATH", help="where a source of the --sat table is; repeatable"
    )
    parser.add_argument("--sat-size", type=positive, metavar="PIXELS", help="bring anchor images to this size")
    parser.add_argument("--seed", type=seed, default=0, help="seed of draw and splits: the repeat's number (0)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="multiply all counts (default: 1.0)")
    parser.add_argument(
        "--group",
        choices=("patient", "image"),
        default="patient",
        help="patient: no patient in two sites or splits, where patients are known (default); image: ignore patients",
    )
    parser.add_argument("--any-domain", action="store_true", help="ignore the table's domains: take images of any")
    parser.add_argument("--no-unseen", action="store_true", help="do not write the remaining images as site 'unseen'")
    parser.add_argument(
        "--image-size", type=positive, metavar="PIXELS", help="size of synthetic images, and of their anchors (64)"
    )
    parser.add_argument("--plan", action="store_true", help="print who would get what, and write nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the site folders become DIR/SITE")


def _scenario(arguments: argparse.Namespace) -> None:
    from heterosync.data.scenario import write_scenario
    from heterosync.data.scenario_plan import plan_scenario
    from heterosync.data.scenario_tables import on_any_domain, read_table, scaled, scaling_notes

    if arguments.out is None and not arguments.plan:
        raise UserError("give --out DIR for the site folders, or --plan to see who would get what")
    full = read_table(arguments.table, arguments.level)
    full = on_any_domain(full) if arguments.any_domain else full
    table = scaled(full, arguments.scale)
    synthetic = _is_synthetic(arguments)
    anchors = _anchor_rows(arguments, [row.site for row in table], synthetic)
    collection = _synthetic_images(arguments, table) if synthetic else open_source(arguments)
    options = {"seed": arguments.seed, "unseen": not arguments.no_unseen, "group": arguments.group}
    plan = plan_scenario(collection, table, **options)
    for line in (*plan.describe(collection), *(f"note: {note}" for note in scaling_notes(full, arguments.scale))):
        print(line)
    anchors = {site: anchors[site] for site in plan.rows} if anchors else {}
    for site, row in anchors.items():
        source = f"synthetic {row.synthetic} for {row.source}" if synthetic else row.source
        print(f"{site}, anchor task: {source}, {row.counts[0]} {row.labels[0]}, {row.counts[1]} {row.labels[1]}")
    if arguments.plan:
        return
    about = {"scenario": str(arguments.table), "level": arguments.level, "scale": arguments.scale}
    with tempfile.TemporaryDirectory() as temporary:
        packs = _write_anchors(arguments, anchors, Path(temporary))
        folders = write_scenario(
            collection,
            table,
            arguments.out,
            packs or arguments.anchor,
            about={**about, "sat": arguments.sat},
            **options,
        )
    print(f"{len(folders)} site folders written in {arguments.out}")
    if not (packs or arguments.anchor):
        hint_at_anchor(arguments.out / "SITE")


def hint_at_anchor(site: Path) -> None:
    """Say what a site folder without anchor pack needs."""
    print(f"no anchor pack yet, which HSL needs: make one with `heterosync data anchor`, then copy it to {site}/anchor")


def _is_synthetic(arguments: argparse.Namespace) -> bool:
    """Whether SOURCE is the word for the generator; options that it knows nothing of are refused."""
    kind, source = arguments.kind, arguments.source
    synthetic = kind == SYNTHETIC or (kind is None and str(source) == SYNTHETIC and not source.exists())
    if not synthetic and arguments.image_size is not None:
        raise UserError("--image-size is for synthetic images: leave it out")
    given = [f"--{name}" for name in ("negative", "positive") if getattr(arguments, name) is not None]
    given += [f"--{name.replace('_', '-')}" for name, value in given_columns(arguments).items() if value is not None]
    given += ["--sat-source"] if arguments.sat_source else []
    given += ["--any-domain"] if arguments.any_domain else []
    if synthetic and given:
        raise UserError(f"synthetic images have labels and domains of their own: leave out {', '.join(given)}")
    return synthetic


def _synthetic_images(arguments: argparse.Namespace, table: list[SiteRow]) -> Collection:
    from heterosync.data.synthetic import SyntheticSpec, synthetic_collection

    spec = SyntheticSpec(image_size=arguments.image_size or 64)
    collection = synthetic_collection(table, arguments.seed, spec, draw=not arguments.plan)
    print(collection.summary())
    return collection


def _anchor_rows(arguments: argparse.Namespace, sites: list[str], synthetic: bool) -> dict[str, AnchorRow]:
    """The anchor task of each site, `unseen` included; {} without --sat."""
    from heterosync.data.anchor_tables import anchors_of_sites, read_anchor_table, sources_from
    from heterosync.data.scenario_tables import UNSEEN

    if arguments.sat is None:
        for name in ("sat_source", "sat_size"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with --sat TABLE: add it or leave both out")
        return {}
    if arguments.anchor is not None:
        raise UserError("--anchor gives every site one pack and --sat makes packs: leave one out")
    rows = read_anchor_table(arguments.sat)
    found = anchors_of_sites(rows, list(dict.fromkeys([*sites, UNSEEN])), arguments.scale)
    if not synthetic and not arguments.plan:
        sources_from(found.values(), named_paths(arguments.sat_source))  # a missing path is told before any work
    return found


def _write_anchors(arguments: argparse.Namespace, rows: dict[str, AnchorRow], folder: Path) -> dict[str, Path]:
    from heterosync.data.anchor_tables import sources_from, synthetic_sources, write_anchors
    from heterosync.data.synthetic import SyntheticSpec

    if not rows:
        return {}
    if _is_synthetic(arguments):
        spec = SyntheticSpec(image_size=arguments.image_size or 64)
        opener = synthetic_sources(rows.values(), arguments.seed, spec)
    else:
        opener = sources_from(rows.values(), named_paths(arguments.sat_source))
    return write_anchors(rows, folder, opener, arguments.seed, arguments.sat_size)


def print_problems(folder: Path, problems: list[str], every: bool) -> None:
    """Print the problems of `folder`, five of a kind or `every` one, and how many there are."""
    from heterosync.data.check import summarised

    lines = problems if every else summarised(problems)
    print("\n".join(lines))
    more = " (--all prints each of them)" if len(lines) < len(problems) else ""
    print(f"{folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''}{more}")


def scenario_summary(folder: Path, need_anchor: bool, json: bool, every: bool) -> int:
    """Check all sites of a written scenario and print the result, of the problems five of a kind or `every` one;
    returns the exit code."""
    from heterosync.data.scenario_check import check_scenario

    found = check_scenario(folder, need_anchor)
    if json:
        show({"folder": str(folder), "problems": found.problems, "images": found.images, "digest": found.digest})
    elif found.problems:
        print_problems(folder, found.problems, every)
    else:
        print(f"{folder}: in order")
        for site, splits in found.images.items():
            counts = ", ".join(f"{split} {sum(both)} ({both[1]} positive)" for split, both in splits.items())
            print(f"{site}: {counts}")
        print(f"digest      {found.digest}")
    return FAILED if found.problems else DONE
