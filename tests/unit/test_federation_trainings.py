"""Trainings that outlive a run: resumed elsewhere, sites that join and leave, new images, damaged files."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from heterosync.data.splits import read_splits
from heterosync.errors import ProblemList, UserError
from heterosync.federation.initial import state_hash
from heterosync.federation.modelfile import load_model, save_model
from heterosync.federation.results import read_history
from heterosync.federation.runner import RunSummary, run_inprocess
from heterosync.federation.scoreboard import Scoreboard
from heterosync.federation.site import SiteTrainer
from heterosync.federation.trainings import (
    OWNER,
    TRAININGS,
    Submitter,
    TrainingStore,
    claim,
    standing,
    training_folder,
)
from heterosync.training.settings import TrainingSettings
from toys import SMOKE, toy_alliance, toy_images

TRAINING = {**SMOKE, "rounds": 4, "schedule_period": 3}
LEAD = Submitter("lead@a.org", "a", "lead")


def shorter(rounds: int) -> dict:
    return {**TRAINING, "rounds": rounds}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, alliance: dict[str, Path]) -> RunSummary:
    """Four rounds in one go."""
    return run_inprocess("hsl", alliance, tmp_path_factory.mktemp("straight"), {}, TRAINING)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, alliance: dict[str, Path]) -> RunSummary:
    """The first two rounds alone, tested and finished."""
    return run_inprocess("hsl", alliance, tmp_path_factory.mktemp("half"), {}, shorter(2))


def history(folder: Path) -> list:
    return [row for row in read_history(folder) if row[2] != "seconds"]


def assert_same(one: Path, other: Path) -> None:
    assert history(one) == history(other)
    for name in ("last_model.pt", "best_model.pt"):
        mine, theirs = load_model(one / name), load_model(other / name)
        assert (mine.round, mine.versions, mine.labels) == (theirs.round, theirs.versions, theirs.labels)
        assert all(torch.equal(mine.state[key], theirs.state[key]) for key in theirs.state)
    mine, theirs = (json.loads((folder / "run.json").read_text()) for folder in (one, other))
    for key in ("best_round", "plateau_round", "training", "status"):
        assert mine[key] == theirs[key]
    assert [r["contributors"] for r in mine["rounds"]] == [r["contributors"] for r in theirs["rounds"]]


def test_two_segments_equal_one_run(straight, half, alliance, tmp_path: Path) -> None:
    before = state_hash(load_model(half.folder / "last_model.pt").state)
    chained = run_inprocess("hsl", alliance, tmp_path / "out", {}, TRAINING, resume=half.folder)
    assert_same(chained.folder, straight.folder)
    assert (chained.best_round, chained.validation, chained.metrics) == (
        straight.best_round,
        straight.validation,
        straight.metrics,
    )
    assert load_model(half.folder / "last_model.pt").round == 2  # the earlier run stays as it is
    assert state_hash(load_model(half.folder / "last_model.pt").state) == before
    # the resumed run cut off and started again with the same command
    assert run_inprocess("hsl", alliance, tmp_path / "out", {}, TRAINING, resume=half.folder).rounds == 4


def test_personal_state_goes_along(alliance, tmp_path: Path) -> None:
    two = {name: alliance[name] for name in ("site-a", "site-b")}
    whole = run_inprocess("local", two, tmp_path / "whole", {}, TRAINING)
    run_inprocess("local", two, tmp_path / "half", {}, shorter(2))
    chained = run_inprocess("local", two, tmp_path / "out", {}, TRAINING, resume=tmp_path / "half")
    assert chained.metrics == whole.metrics and history(chained.folder) == history(whole.folder)


@pytest.mark.parametrize("method", ["fedadam", "scaffold", "fedbn"])
def test_what_server_and_sites_remember_goes_along(alliance, tmp_path: Path, method: str) -> None:
    two = {name: alliance[name] for name in ("site-a", "site-b")}
    whole = run_inprocess(method, two, tmp_path / "whole", {}, TRAINING)
    run_inprocess(method, two, tmp_path / "half", {}, shorter(2))
    chained = run_inprocess(method, two, tmp_path / "out", {}, TRAINING, resume=tmp_path / "half")
    assert_same(chained.folder, whole.folder)
    assert chained.metrics == whole.metrics
    ours, theirs = (load_model(run.folder / "last_model.pt").assets for run in (chained, whole))
    assert list(ours) == list(theirs) and bool(ours) == (method == "fedadam")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    if method == "fedadam":  # a model file from which the server's part was taken away
        last = load_model(tmp_path / "half" / "last_model.pt")
        save_model(last.path, method, last.method_settings, last.training, last.state, last.labels, last.round)
        with pytest.raises(UserError, match="fedadam cannot go on from the stored model: what its server remembers"):
            run_inprocess(method, two, tmp_path / "bare", {}, TRAINING, resume=tmp_path / "half")


def test_a_method_that_needs_all_goes_on_with_the_same_sites(alliance, tmp_path: Path) -> None:
    two = {name: alliance[name] for name in ("site-a", "site-b")}
    settings = {"use_sat": False}
    run_inprocess("personalized", two, tmp_path / "half", settings, shorter(1))
    with pytest.raises(UserError, match="began with the sites site-a, site-b, and its method needs just these"):
        run_inprocess("personalized", alliance, tmp_path / "out", settings, shorter(2), resume=tmp_path / "half")
    assert not (tmp_path / "out").exists()
    done = run_inprocess("personalized", two, tmp_path / "out", settings, shorter(2), resume=tmp_path / "half")
    assert done.rounds == 2


def test_a_site_joins_from_the_global_model_and_another_leaves(half, alliance, tmp_path: Path) -> None:
    two = {name: alliance[name] for name in ("site-a", "site-b")}
    run_inprocess("hsl", two, tmp_path / "pair", {}, shorter(2))
    received: list[str] = []
    original = SiteTrainer.train

    def spy(self, round_: int, shared):
        if self.site == "site-c":
            received.append(f"{round_} {state_hash(shared)}")
        return original(self, round_, shared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteTrainer, "train", spy)
        joined = run_inprocess("hsl", alliance, tmp_path / "joined", {}, shorter(3), resume=tmp_path / "pair")
    stored = load_model(tmp_path / "pair" / "last_model.pt")
    assert received == [f"2 {state_hash(stored.state)}"]
    rounds = json.loads((joined.folder / "run.json").read_text())["rounds"]
    assert [r["contributors"] for r in rounds] == [["site-a", "site-b"]] * 2 + [["site-a", "site-b", "site-c"]]
    left = run_inprocess("hsl", two, tmp_path / "left", {}, shorter(3), resume=half.folder)
    rounds = json.loads((left.folder / "run.json").read_text())["rounds"]
    assert [len(r["contributors"]) for r in rounds] == [3, 3, 2]
    assert set(left.metrics["last"]) == set(two) and set(joined.metrics["last"]) == set(alliance)


def test_what_does_not_fit_is_refused_before_anything_is_written(half, alliance, tmp_path: Path) -> None:
    def resume(folder: Path, method: str = "hsl", **changes) -> None:
        run_inprocess(method, alliance, tmp_path / "out", {}, {**TRAINING, **changes}, resume=folder)

    with pytest.raises(UserError, match=r"another training 'lr' \(0.001, now 0.01\)"):
        resume(half.folder, lr=0.01)
    with pytest.raises(UserError, match="another method "):
        resume(half.folder, "local")
    with pytest.raises(UserError, match="run.json does not exist"):
        resume(tmp_path / "nowhere")
    copy = shutil.copytree(half.folder, tmp_path / "copy")
    for name in ("last_model.pt", "best_model.pt"):
        whole = (copy / name).read_bytes()
        (copy / name).unlink()
        (copy / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"{name} is cut off or no model file"):
            resume(copy)
        (copy / name).write_bytes(whole)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_going_on_is_neither_resumed_nor_run_twice(alliance, tmp_path: Path) -> None:
    two = {name: alliance[name] for name in ("site-a", "site-b")}
    refused: list[str] = []

    def meanwhile(event: dict) -> None:
        for out, options in ((tmp_path / "next", {"resume": tmp_path / "out"}), (tmp_path / "out", {})):
            with pytest.raises(UserError) as caught:
                run_inprocess("hsl", two, out, {}, shorter(2), **options)
            refused.append(str(caught.value))

    done = run_inprocess("hsl", two, tmp_path / "out", {}, shorter(1), progress=meanwhile)
    busy = f"{tmp_path / 'out'}: another process runs the training in it: wait for its end"
    assert set(refused) == {busy} and not (tmp_path / "next").exists() and done.status == "completed"
    assert run_inprocess("hsl", two, tmp_path / "next", {}, shorter(2), resume=tmp_path / "out").rounds == 2


def test_a_training_keeps_to_its_anchor_pack(half, tmp_path: Path) -> None:
    others = toy_alliance(tmp_path / "data", 3, anchor_seed=5)
    with pytest.raises(ProblemList, match="began with the anchor digest"):
        run_inprocess("hsl", others, tmp_path / "out", {}, TRAINING, resume=half.folder)


# -- new images --------------------------------------------------------------------------------------------------------


def add_images(folder: Path, count: int = 10, label: str = "abnormal") -> None:
    labels = np.full(count, int(label == "abnormal"))
    np.savez(folder / "more.npz", images=toy_images(labels, seed=77))
    rows = "".join(f"more.npz#{i},{label}\n" for i in range(count))
    (folder / "manifest.csv").write_text((folder / "manifest.csv").read_text() + rows)


def test_new_images_are_used_from_the_next_round_and_old_ones_keep_their_split(tmp_path: Path) -> None:
    sites = toy_alliance(tmp_path / "data", 2)
    seen: dict[int, float] = {}
    old: dict[str, str] = {}

    def after(event: dict) -> None:
        if event["event"] == "site" and event["site"] == "site-b":
            seen[event["round"]] = event["metrics"]["n_train"]
        if event["event"] == "round" and event["round"] == 0:
            old.update(read_splits(sites["site-b"]))
            add_images(sites["site-b"])

    run_inprocess("hsl", sites, tmp_path / "out", {}, shorter(2), progress=after)
    new = read_splits(sites["site-b"])
    assert len(old) == 40 and len(new) == 50 and {name: new[name] for name in old} == old
    added = [split for name, split in new.items() if name.startswith("more")]
    assert (added.count("train"), added.count("validation"), added.count("test")) == (6, 1, 3)
    assert seen == {0: 24.0, 1: 30.0}


def test_a_manifest_in_the_middle_of_an_edit_costs_no_round(tmp_path: Path) -> None:
    folder, lines = toy_alliance(tmp_path / "data", 1)["site-a"], []
    trainer = SiteTrainer("site-a", folder, "local", {}, SMOKE, tmp_path / "work", log=lines.append)
    trainer.train(0, None)
    whole = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(whole + "absent.png,normal\n")
    assert trainer.train(1, None).samples == 24
    assert [line for line in lines if "absent.png" in line and "goes on with the images as they were" in line]
    (folder / "manifest.csv").write_text(whole)
    add_images(folder)
    assert trainer.train(2, None).samples == 30


# -- the store ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../other", "", "a/b", "/etc", ".", "x" * 80])
def test_an_id_of_a_training_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="training_id is no id"):
        training_folder(tmp_path, "server", name, {})


def test_where_trainings_lie(tmp_path: Path) -> None:
    assert training_folder(tmp_path, "site-a", "job-1", {}) == tmp_path / "trainings" / "job-1"
    elsewhere = {TRAININGS: str(tmp_path / "disk")}
    assert training_folder(tmp_path, "site-a", "job-1", elsewhere) == tmp_path / "disk" / "site-a" / "job-1"


def test_a_store_is_held_by_one_job_and_must_be_there(half, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training 'job-1' is not stored at the server: check the id"):
        TrainingStore(tmp_path / "job-1").hold(False, LEAD)
    first, second = TrainingStore(tmp_path / "job-1"), TrainingStore(tmp_path / "job-1")
    first.hold(True, LEAD)
    first.keep(half.folder)
    with pytest.raises(UserError, match="in use by another job"):
        second.hold(False, LEAD)
    first.release()
    second.hold(False, LEAD)
    with pytest.raises(UserError) as refused:
        TrainingStore(tmp_path / "job-2").hold(False, LEAD)
    assert "job-1" not in str(refused.value)
    second.fetch(tmp_path / "run")
    assert_same(tmp_path / "run", half.folder)
    for name in (path.relative_to(half.folder) for path in half.folder.glob("tensorboard/*")):
        events = [folder / name for folder in (half.folder, tmp_path / "job-1", tmp_path / "run")]
        assert len({path.stat().st_ino for path in events}) == len(events)  # the writer appends to its own only
        assert len({path.read_bytes() for path in events}) == 1
    second.release()
    first.hold(True, LEAD)  # a new training of that name: nothing of the old one stays
    assert {path.name for path in (tmp_path / "job-1").iterdir()} == {".lock", OWNER}


def test_a_training_belongs_to_who_began_it(half, tmp_path: Path) -> None:
    folder = tmp_path / "job-1"
    begun = TrainingStore(folder)
    begun.hold(True, LEAD)
    begun.keep(half.folder)
    for stranger in (Submitter("other@b.org", "b", "lead"), Submitter(LEAD.name, "b", "lead"), Submitter()):
        with pytest.raises(UserError) as refused:
            TrainingStore(folder).hold(False, stranger)
        line = str(refused.value)
        assert line.startswith("training 'job-1' was begun by another user") and LEAD.name not in line
    begun.release()
    admin = Submitter("chief@x.org", "x", "project_admin")
    for user in (LEAD, admin, LEAD):  # a project admin goes on with it and does not take it away
        store = TrainingStore(folder)
        store.hold(False, user)
        store.release()
    # where nobody owns it yet, as at a site that joins, a project admin who goes on with it leaves it unowned
    assert not (claim(tmp_path / "joined", admin, begins=False) / OWNER).exists()
    assert (claim(tmp_path / "joined", LEAD, begins=False) / OWNER).exists()
    with pytest.raises(UserError, match="another user"):  # what the admin began is his
        claim(claim(tmp_path / "own", admin, begins=True), LEAD, begins=False)


def _hold_and_wait(folder: Path, held) -> None:
    store = TrainingStore(folder)
    store.hold(True, LEAD)
    held.set()
    multiprocessing.Event().wait(60)


def test_a_killed_job_lets_go_of_its_training(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    job = context.Process(target=_hold_and_wait, args=(tmp_path / "job-1", held))
    job.start()
    assert held.wait(60)
    with pytest.raises(UserError, match="in use"):
        TrainingStore(tmp_path / "job-1").hold(True, LEAD)
    job.kill()
    job.join()
    TrainingStore(tmp_path / "job-1").hold(True, LEAD)


def test_a_store_cut_off_at_any_file_is_at_most_one_round_behind(
    alliance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from heterosync.federation import trainings

    class Cut(Exception):
        pass

    source, ways = tmp_path / "source", {name: getattr(trainings, name) for name in ("link_file", "copy_file")}
    two = {name: alliance[name] for name in ("site-a", "site-b")}
    run_inprocess("hsl", two, source, {}, shorter(1))
    earlier = shutil.copytree(source, tmp_path / "earlier")
    run_inprocess("hsl", two, source, {}, shorter(2))
    mine = {"method": "hsl"}
    for files in range(8):
        store, left = TrainingStore(tmp_path / f"store-{files}"), files
        store.keep(earlier)

        def cut(real, path, target):
            nonlocal left
            if left == 0:
                raise Cut
            left -= 1
            return real(path, target)

        with monkeypatch.context() as patch:
            for name, real in ways.items():
                patch.setattr(trainings, name, partial(cut, real))
            try:
                store.keep(source)
                whole = True
            except Cut:
                whole = False
        board = Scoreboard(TrainingSettings.from_dict(shorter(2)))
        stood = standing(store.folder, mine, True, board)
        assert stood.rounds == (2 if whole else 1) and (board.best or 0) <= stood.rounds
    assert whole
