"""`heterosync data import-volumes` and `data phantoms`: site folders of volumes and masks for segmentation."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from heterosync.cli.base import add_command, names, positive
from heterosync.cli.source import seed
from heterosync.errors import UserError

#: For help texts alone: what is known is decided by `heterosync.data.volume_importers.VOLUME_SOURCES`.
VOLUME_KINDS = "volumes, prostatex, promise12, msd-prostate, prostate158"


def register_volumes(group: Any) -> None:
    parser = add_command(
        group,
        "import-volumes",
        "make one or several site folders from volumes and masks",
        _import,
        "heterosync data import-volumes volumes scans --out data/site-a\n"
        "heterosync data import-volumes promise12 TrainingData --out data/promise12\n"
        "heterosync data import-volumes prostatex PROSTATEx --masks PROSTATEx_masks/Files/prostate/mask_prostate "
        "--out data/challenge --test-only\n"
        "heterosync data import-volumes prostate158 prostate158_train --sites north,south --out data",
    )
    parser.add_argument("kind", help=f"how the volumes are kept: {VOLUME_KINDS}")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the folder of the set")
    parser.add_argument(
        "--masks", type=Path, metavar="FOLDER", help="where masks lie apart from the images (prostatex)"
    )
    parser.add_argument(
        "--foreground",
        type=_numbers,
        metavar="N,…",
        help="mask values that together are the organ (default: those of the set; 1 for volumes)",
    )
    parser.add_argument("--sites", type=names, metavar="A,B,…", help="deal the patients among these sites: OUT/A, …")
    parser.add_argument("--seed", type=seed, default=0, help="seed of that deal (default: 0)")
    parser.add_argument("--test-only", action="store_true", help="an outside test set: nothing is trained on it")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="the site folder, or of --sites the top"
    )

    parser = add_command(
        group,
        "phantoms",
        "make an alliance of synthetic T2-like prostate volumes",
        _phantoms,
        "heterosync data phantoms --out data --cases 10 --seed 1\n"
        "heterosync data phantoms --out data --cases 100 --field-of-view 160",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the site folders become DIR/SITE")
    parser.add_argument("--cases", type=positive, default=10, metavar="N", help="volumes per site (default: 10)")
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    parser.add_argument(
        "--field-of-view", type=float, default=96.0, metavar="MM", help="side of a slice in mm (default: 96)"
    )


def _numbers(text: str) -> tuple[int, ...]:
    parts = names(text)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}': write whole numbers above 0, as 1,2")
    return tuple(map(int, parts))


def _import(arguments: argparse.Namespace) -> None:
    from heterosync.data.volume_collection import deal, write_volume_site
    from heterosync.data.volume_importers import open_cases
    from heterosync.files import new_folder

    if arguments.seed and not arguments.sites:
        raise UserError("--seed is the seed of --sites: name the sites, or leave it out")
    found = open_cases(arguments.source, arguments.kind, arguments.masks, arguments.foreground)
    for note in found.notes:
        print(f"note: {note}")
    parts = deal(found, arguments.sites, arguments.seed) if arguments.sites else {"": found}
    with ExitStack() as stack:  # all sites or none
        folders = {site: stack.enter_context(new_folder(arguments.out / site)) for site in parts}
        for site, part in parts.items():
            write_volume_site(folders[site], part, arguments.test_only)
    for site, part in parts.items():
        folder = arguments.out / site
        print(f"{folder} written: {len(part.cases)} cases; next: `heterosync data check {folder}`")


def _phantoms(arguments: argparse.Namespace) -> None:
    from heterosync.data.volume_phantoms import make_phantom_alliance

    sites = make_phantom_alliance(arguments.out, arguments.seed, arguments.cases, arguments.field_of_view)
    print(f"{arguments.out}: synthetic volumes for {', '.join(sites)}; test-only site: unseen")
    print(f"next: `heterosync data check {arguments.out / sites[0]}`")
