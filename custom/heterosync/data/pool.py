"""Several sites' data as one: for central learning, where all images lie in one place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from heterosync.data.dataset import SiteData, load_site
from heterosync.data.images import Images
from heterosync.data.scenario_tables import UNSEEN
from heterosync.data.site import CONFIG, SPLITS
from heterosync.errors import ProblemList, UserError


def load_pool(
    folders: Path | str | Mapping[str, Path | str],
    image_size: int,
    channels: int = 3,
    need_anchor: bool = False,
    fit: str = "stretch",
) -> SiteData:
    """The union of sites, split by split, all pictures in memory; ids are `<site>/<id of that site>`.

    folders: by name, or a folder that holds site folders (images of `unseen` populations are left out); a plain site
    folder is loaded as it is. Device and batch size are those of the first site.

    Raises `ProblemList` with every problem of every site, and when the sites' label names differ.
    """
    if not isinstance(folders, Mapping):
        base = Path(folders)
        if (base / CONFIG).is_file():
            return load_site(base, image_size, channels, need_anchor, fit=fit)
        folders = {path.parent.name: path.parent for path in sorted(base.glob(f"*/{CONFIG}"))}
        folders.pop(UNSEEN, None)
        if not folders:
            raise UserError(f"{base} is no site folder and holds none (a folder with {CONFIG}): name one that does")
    sites: dict[str, SiteData] = {}
    problems: list[str] = []
    for name in sorted(folders):
        try:
            sites[name] = load_site(folders[name], image_size, channels, need_anchor, fit=fit)
        except UserError as error:
            problems += [f"{name}: {line}" for line in str(error).splitlines()]
    first = next(iter(sites.values()), None)
    for name, site in sites.items():
        if first is not None and site.labels != first.labels:
            here, there = " / ".join(site.labels), " / ".join(first.labels)
            problems.append(f"{name}: its labels are {here}, not {there}: write the same into every {CONFIG}")
    if problems or first is None:
        raise ProblemList(problems)
    starts = np.cumsum([0, *(len(site.primary) for site in sites.values())])
    primary = Images(
        np.concatenate([site.primary.pixels for site in sites.values()]),
        np.concatenate([site.primary.labels for site in sites.values()]),
        [f"{name}/{id_}" for name, site in sites.items() for id_ in site.primary.ids],
    )
    splits = {
        split: np.concatenate([start + site.splits[split] for start, site in zip(starts, sites.values(), strict=False)])
        for split in SPLITS
    }
    return SiteData(first.labels, primary, splits, first.anchor, first.anchor_digest, first.config)
