"""Every problem of a site folder at once, one line each: what is wrong where, and how to mend it.

The lines name files and rows of patients' images: they are for the site's own screen and log, never for the server.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heterosync.data.anchor import AnchorPack, inspect_anchor
from heterosync.data.cache import cache_root, load_pictures
from heterosync.data.decoding import Decoded
from heterosync.data.site import CONFIG, MANIFEST, SPLITS, Row, SiteConfig, parse_manifest, parse_site_config
from heterosync.data.site_yaml import KINDS, open_kind, read_task
from heterosync.data.splits import FILE as SPLITS_FILE
from heterosync.data.splits import assign_splits, read_splits
from heterosync.errors import ProblemList


@dataclass
class Inspection:
    """What was read of a site folder, and its problems; the other fields are complete only when there are none."""

    problems: list[str] = field(default_factory=list)
    config: SiteConfig | None = None
    rows: list[Row] = field(default_factory=list)
    pictures: Decoded | None = None
    stored_splits: dict[str, str] = field(default_factory=dict)
    splits: list[str] = field(default_factory=list)  # by row
    anchor: AnchorPack | None = None


def check_site(
    folder: Path | str,
    image_size: int | None = None,
    channels: int | None = None,
    need_anchor: bool = True,
    cache: Path | None = None,
) -> list[str]:
    """All problems of a site folder, [] when it is fine.

    Reads every image. With `image_size` the decoded images are kept in the cache, so that the training starts at once,
    and images that are in the cache already and have not changed are not decoded again.
    """
    return inspect_site(folder, image_size, channels or 3, need_anchor, cache).problems


def inspect_site(
    folder: Path | str,
    image_size: int | None,
    channels: int = 3,
    need_anchor: bool = True,
    cache: Path | None = None,
    fit: str = "stretch",
) -> Inspection:
    """Read and check everything of a site folder that training needs; writes only to the cache."""
    folder = Path(folder)
    found = Inspection()
    wrong = no_site_folder(folder) or _other_kind(folder)
    if wrong:
        found.problems.append(wrong)
        return found
    if image_size is not None and image_size < 1:
        found.problems.append(f"image_size {image_size}: choose at least 1 (the paper has 224)")
    if channels not in (1, 3):
        found.problems.append(f"channels {channels}: choose 1 (grey) or 3 (colour)")
    if found.problems:
        return found
    found.config, found.problems = parse_site_config(folder)
    root = cache_root(folder, cache) if image_size is not None else None
    _inspect_primary(folder, found, found.config, image_size, channels, root, fit)
    if need_anchor:
        found.anchor, problems = inspect_anchor(folder / "anchor", image_size, channels, root, fit)
        found.problems += problems
    if found.anchor is not None:
        public = dict(zip(found.anchor.content, range(len(found.anchor.content)), strict=True))
        found.problems += [
            f"{MANIFEST} row {row.line}: {row.image} is also in the anchor pack, which must be disjoint: delete the row"
            for row, content in zip(found.rows, found.pictures.content if found.pictures else [], strict=True)
            if content in public
        ]
    return found


def no_site_folder(folder: Path) -> str | None:
    """One line when `folder` cannot be a site folder, or does not say of what kind: what to give or write instead."""
    name = folder.absolute().name
    if folder.is_file():
        return f"{name}: a file, not a site folder: give the folder that holds {CONFIG} and {MANIFEST}"
    if not folder.is_dir():
        return f"{name}: the site folder does not exist: create it or correct the path"
    sites = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if sites and not (folder / CONFIG).exists() and not (folder / MANIFEST).exists():
        return f"{name}: no site folder itself, but it holds some: give one of {', '.join(sites)}"
    return open_kind(folder)


def _other_kind(folder: Path) -> str | None:
    task = read_task(folder)
    if task not in KINDS:
        return None
    return f"{CONFIG}: task: {task}: this method needs images with labels: submit a {task} job, or use another folder"


def summarised(problems: Sequence[str], shown: int = 5) -> list[str]:
    """The same problems by kind, of each kind the first `shown` lines and then how many more there are, with their
    rows.

    Lines are of one kind when they differ only in quoted text, numbers and names of files.
    """
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        words = re.sub("'[^']*'", "'", problem).split()
        kinds.setdefault(" ".join(word for word in words if not re.search(r"[\d/#]|\.\w", word)), []).append(problem)
    lines = []
    for same in kinds.values():
        lines += same[:shown]
        if rest := same[shown:]:
            rows = [int(row[1]) for line in rest if (row := re.search(r" row (\d+): ", line))]
            lines.append(f"… and {len(rest)} more of this kind" + (f", rows {_ranges(rows)}" if rows else ""))
    return lines


def _ranges(rows: Sequence[int]) -> str:
    """Ascending numbers in short: 2, 5 to 9."""
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and row <= ranges[-1][-1] + 1:
            ranges[-1][1:] = [row]
        else:
            ranges.append([row])
    return ", ".join(" to ".join(map(str, ends)) for ends in ranges)


def _inspect_primary(
    folder: Path,
    found: Inspection,
    config: SiteConfig,
    image_size: int | None,
    channels: int,
    root: Path | None,
    fit: str,
) -> None:
    parsed, problems = parse_manifest(folder, config)
    first: dict[str, Row] = {}
    by_row = []
    for row in parsed:
        if row.image in first:
            text = f"{row.image} stands in row {first[row.image].line} already: delete one of the rows"
            by_row.append((row.line, text))
        else:
            first[row.image] = row
    found.rows = list(first.values())
    names = [row.image for row in found.rows]
    found.pictures = load_pictures(
        folder, names, image_size, channels, config.window, root, threads=config.threads, fit=fit
    )
    by_row += [(found.rows[row].line, text) for row, text in found.pictures.errors.items()]
    labelled = any(config.labels)  # without, no class can be told from the other
    if not problems and not by_row and labelled:
        try:
            found.stored_splits = stored_splits(folder, root)
            found.splits = assign_splits(found.rows, _content(found), found.stored_splits, config.split_seed)
        except ProblemList as error:
            problems += error.problems
    by_row += _leaks(found)
    problems += [f"{MANIFEST} row {line}: {text}" for line, text in sorted(by_row)]
    if not problems and labelled:
        problems += _class_problems(found, config)
    found.problems += problems


def stored_splits(folder: Path, root: Path | None) -> dict[str, str]:
    """The splits drawn earlier: in the site folder, or in the cache of a site folder that is read-only."""
    return read_splits(folder) or (read_splits(root) if root is not None else {})


def _content(found: Inspection) -> list[str]:
    return [str(content) for content in found.pictures.content] if found.pictures else []


def _leaks(found: Inspection) -> list[tuple[int, str]]:
    """One picture with two labels, and one picture or one patient in two splits."""
    rows = found.rows
    drawn = not all(row.split for row in rows)
    splits: Sequence[str | None] = found.splits or [row.split for row in rows]
    mend = f"delete {SPLITS_FILE} to draw the splits again" if drawn else "correct the split"
    problems = []
    pictures: dict[str, int] = {}
    patients: dict[str, int] = {}
    for i, (row, content) in enumerate(zip(rows, found.pictures.content if found.pictures else [], strict=True)):
        if content is not None:
            j = pictures.setdefault(content, i)
            same = f"{row.image} is the same picture as row {rows[j].line}"
            if rows[j].label != row.label:
                problems.append((row.line, f"{same} with the other label: correct one of the labels"))
            elif splits[j] != splits[i]:
                problems.append((row.line, f"{same} in split {splits[j]}: delete one row, or {mend}"))
        if row.patient is not None:
            j = patients.setdefault(row.patient, i)
            if splits[j] != splits[i]:
                other = f"in row {rows[j].line} in split {splits[j]}"
                problems.append((row.line, f"patient {row.patient} is in split {splits[i]} but {other}: {mend}"))
    return problems


def _class_problems(found: Inspection, config: SiteConfig) -> list[str]:
    absent = [name for label, name in enumerate(config.labels) if all(row.label != label for row in found.rows)]
    if absent:
        mend = f"add some, or correct labels in {CONFIG}"
        return [f"{MANIFEST}: no image has the label '{name}': {mend}" for name in absent]
    # a folder whose manifest gives every image to the test split is an outside test set: it trains nothing
    wanted: Sequence[str] = ("test",) if all(row.split == "test" for row in found.rows) else SPLITS
    mend = "give it one in the split column" if found.rows[0].split else "add images of it, at least three in all"
    held = {(split, row.label) for split, row in zip(found.splits, found.rows, strict=True)}
    return [
        f"{MANIFEST}: the {split} split has no image with the label '{name}': {mend}"
        for split in wanted
        for label, name in enumerate(config.labels)
        if (split, label) not in held
    ]
