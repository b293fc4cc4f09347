"""The slices that sites keep of their test cases, where they lie on this machine: in simulations and studies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from heterosync.training.views import View, read_views, views_file


def views_of_run(folder: Path, model: str) -> list[View]:
    """The test cases of all sites by `model` of a run, whose record is in `folder`; none where the sites are elsewhere.

    The in-process runner keeps them below the record; FLARE's simulator below its workspace, whose record is that of
    the server or its copy, results/.
    """
    name = views_file(model)
    found = {path.parts[-3]: path for path in folder.glob(f"sites/*/results/{name}")}
    workspace = {"server": folder.parent.parent, "results": folder.parent}
    for mark, place in workspace.items():
        if mark in (folder.name, folder.parent.name):
            found |= {path.parts[-5]: path for path in place.glob(f"*/*/heterosync/results/{name}")}
    return _read(found)


def views_of_study(folder: Path, model: str) -> list[View]:
    """The same of a folder with a folder for each site."""
    return _read({path.parent.name: path for path in folder.glob(f"*/{views_file(model)}")})


def _read(paths: Mapping[str, Path]) -> list[View]:
    """Ids begin with the site's name."""
    return [replace(view, id=f"{site}: {view.id}") for site, path in sorted(paths.items()) for view in read_views(path)]
