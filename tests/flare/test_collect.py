"""The record of a job at a place of its own: whole at any moment, and apart from what is still written."""

from __future__ import annotations

from pathlib import Path

import pytest

from heterosync.flare.running import collect
from heterosync.flare.running.collect import collect_results


@pytest.fixture
def server(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    (folder / "tensorboard").mkdir(parents=True)
    for name in ("run.json", "history.csv", "last_model.pt", "log.txt", "tensorboard/events"):
        (folder / name).write_text("old")
    return folder


def everything(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_whole_files_are_linked_and_growing_ones_copied(server: Path, tmp_path: Path) -> None:
    results = collect_results(server, tmp_path / "results")
    assert set(everything(results)) == {"run.json", "history.csv", "last_model.pt", "tensorboard/events"}
    assert (results / "last_model.pt").samefile(server / "last_model.pt")
    with (server / "tensorboard" / "events").open("a") as file:
        file.write(" and new")
    assert (results / "tensorboard" / "events").read_text() == "old"


def test_earlier_results_stay_until_the_new_ones_are_whole(server: Path, tmp_path: Path, monkeypatch) -> None:
    results = collect_results(server, tmp_path / "results")
    before = everything(results)
    for path in server.rglob("*"):
        if path.is_file():
            path.unlink()
            path.write_text("new")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(collect, "copy_file", full)
        with pytest.raises(Exception, match="the disk is full"):
            collect_results(server, results)
    assert everything(results) == before
    (server / "history.csv").unlink()
    collect_results(server, results)
    assert everything(results) == {name: "new" for name in before if name != "history.csv"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "server"]
