"""Write the site folders of a scenario, each with its anchor pack, and a record of what was drawn."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from heterosync.data.anchor import inspect_anchor
from heterosync.data.collection import Collection
from heterosync.data.scenario_plan import plan_scenario
from heterosync.data.scenario_tables import UNSEEN, SiteRow
from heterosync.errors import ProblemList
from heterosync.files import new_folder, write_json

RECORD = "scenario.json"


def write_scenario(
    collection: Collection,
    table: Sequence[SiteRow],
    out: Path | str,
    anchor: Path | str | Mapping[str, Path] | None = None,
    seed: int = 0,
    unseen: bool = True,
    group: str = "patient",
    task: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write `<out>/<site>/` for every site of the table (and `unseen`), each with a copy of the anchor pack.

    anchor: one pack for all, or the pack of each site by name (the mix of different anchor tasks).
    about: what else the record `<out>/scenario.json` keeps, such as the scenario's name and level.
    All of `out` appears in one step or not at all. Returns the site folders. Errors as `plan_scenario`; `UserError`
    when `out` is in use; as `check_anchor`.
    """
    plan = plan_scenario(collection, table, seed, group, unseen)
    out = Path(out)
    packs = dict(anchor) if isinstance(anchor, Mapping) else {site: Path(anchor) for site in plan.rows if anchor}
    for pack in dict.fromkeys(packs.values()):
        check_anchor(pack, collection)
    with new_folder(out) as folder:
        for site, rows in plan.rows.items():
            write_site(
                folder / site,
                collection.subset(rows),
                task=task,
                anchor=packs.get(site),
                splits=["test"] * len(rows) if site == UNSEEN else plan.splits.get(site),
                grouped=group == "patient",
                split_seed=seed,
            )
        record = {**(about or {}), "source": collection.name, "classes": list(collection.classes)}
        record |= {"seed": seed, "group": group, "anchors_differ": len(set(map(str, packs.values()))) > 1}
        write_json(folder / RECORD, record | {"sites": list(plan.rows), "table": [asdict(row) for row in table]})
    return [out / site for site in plan.rows]


def check_anchor(anchor: Path | str, collection: Collection) -> None:
    """Raise `ProblemList` when the anchor pack is unusable or shares images with the collection (methods: disjoint)."""
    pack, problems = inspect_anchor(Path(anchor), None)
    shared = set(pack.content) & set(collection.digests or ()) if pack else set()
    if shared:
        problems = [
            f"{len(shared)} images of the anchor pack are in {collection.name} too: make an anchor of other images"
        ]
    if problems:
        raise ProblemList([f"{anchor}: {problem}" for problem in problems])


def write_site(
    folder: Path,
    collection: Collection,
    task: str | None = None,
    anchor: Path | str | None = None,
    splits: Sequence[str] | None = None,
    grouped: bool = True,
    split_seed: int = 0,
) -> Path:
    """Fill `folder` with site.yaml, manifest.csv, the images and, where given, a copy of the anchor pack.

    splits: the split of each image; None: the site draws them, from `split_seed`. grouped: a patient's images share a
    split; otherwise the patients stand in the column `source_patient`, which no split looks at.
    Arrays become one `images.npz`; files are copied under numbered names, since two folders may hold the same
    name; the manifest's column `source` tells where each came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict = {"task": task or collection.name, "labels": list(collection.classes)}
    if splits is None and split_seed:
        config["split_seed"] = split_seed
    (folder / "site.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    columns: dict[str, list[str]] = {"image": _store_images(folder, collection)}
    columns["label"] = [collection.classes[label] for label in collection.labels]
    if collection.patients is not None:
        columns["patient" if grouped else "source_patient"] = collection.patients
    if splits is not None:
        columns["split"] = list(splits)
    if any(collection.domains):
        columns["domain"] = collection.domains
    columns["source"] = collection.ids
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    (folder / "manifest.csv").write_text(text.getvalue(), encoding="utf-8")
    if anchor is not None:
        shutil.copytree(anchor, folder / "anchor")
    return folder


def _store_images(folder: Path, collection: Collection) -> list[str]:
    if collection.pixels is not None:
        np.savez(folder / "images.npz", images=collection.pixels, labels=collection.labels)
        return [f"images.npz#{row}" for row in range(len(collection))]
    assert collection.paths is not None
    (folder / "images").mkdir()
    names = []
    for row, path in enumerate(collection.paths):
        suffix = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
        names.append(f"images/{row:06d}{suffix}")
        shutil.copyfile(path, folder / names[-1])
    return names
