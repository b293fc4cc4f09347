"""A site's data, checked and ready for the training loop."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heterosync.data.cache import cache_root
from heterosync.data.check import inspect_site
from heterosync.data.images import Images
from heterosync.data.site import SPLITS, SiteConfig
from heterosync.data.splits import write_splits
from heterosync.errors import ProblemList, UserError

__all__ = ["SPLITS", "SiteData", "load_site"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteData:
    """`labels` are the names of the negative and the positive class; `splits` gives ascending row numbers of `primary`
    (int64) for train, validation and test; `anchor` and its digest are None where the method needs none; `cache` is
    where what is made of the pictures may be kept, None where nothing can be."""

    labels: tuple[str, str]
    primary: Images
    splits: dict[str, np.ndarray]
    anchor: Images | None
    anchor_digest: str | None
    config: SiteConfig
    cache: Path | None = None


def load_site(
    folder: Path | str,
    image_size: int,
    channels: int = 3,
    need_anchor: bool = True,
    cache: Path | None = None,
    fit: str = "stretch",
) -> SiteData:
    """Check a site folder and load its pictures at `image_size`; `cache` overrides where decoded pictures are kept,
    `fit` is that of `to_size`.

    The splits are drawn at the first call and kept in `splits.csv`. Raises `ProblemList` with every problem found.
    """
    folder = Path(folder)
    found = inspect_site(folder, image_size, channels, need_anchor, cache, fit)
    if found.problems or found.config is None or found.pictures is None or found.pictures.pixels is None:
        raise ProblemList(found.problems)
    if not found.rows[0].split:
        keep_drawn(
            folder,
            cache_root(folder, cache),
            lambda place: write_splits(place, found.rows, found.splits, found.stored_splits),
        )
    labels = np.asarray([row.label for row in found.rows], dtype=np.int64)
    splits = np.asarray(found.splits)
    return SiteData(
        labels=found.config.labels,
        primary=Images(found.pictures.pixels, labels, [row.image for row in found.rows]),
        splits={split: np.flatnonzero(splits == split).astype(np.int64) for split in SPLITS},
        anchor=found.anchor.images if found.anchor else None,
        anchor_digest=found.anchor.digest if found.anchor else None,
        config=found.config,
        cache=cache_root(folder, cache),
    )


def keep_drawn(folder: Path, root: Path | None, write: Callable[[Path], None]) -> None:
    """`write` what was drawn into the site folder; where that is read-only, into the cache; where there is none, the
    same draw is made again."""
    for place in (folder, root):
        if place is None:
            continue
        try:
            write(place)
            return
        except UserError as error:
            if getattr(error.__cause__, "errno", None) not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    log.warning("%s is read-only: its splits are drawn at every start, alike while its manifest stays", folder.name)
