"""A training outlives the jobs that carry it: an id, the rounds done so far, and the stored global model.

FLARE does not resume a job, nor let a site into a running one. A long training is therefore a chain of jobs, its
segments: each takes up what the one before stored and goes on with the next round; sites join, return or leave in
between. The id of a training is the id of its first job. Server and sites each keep what they must remember of it in a
folder of their own, `trainings/<id>/` beside their job folders; at the server that is a copy of the run folder's files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterosync.errors import ProblemList, UserError
from heterosync.federation.modelfile import BEST_MODEL, LAST_MODEL, PROVISIONED, ModelFile, load_model
from heterosync.federation.results import CROSS_SITE, HISTORY, RUN, TENSORBOARD, read_history
from heterosync.federation.scoreboard import Scoreboard
from heterosync.federation.wire import is_site_name
from heterosync.files import copy_file, explained, held, link_file, make_folder, new_folder, read_json, write_json
from heterosync.methods import get_method, make_method
from heterosync.training.settings import LoopSettings

#: Environment variable with another place for trainings, as `<it>/<participant>/<id>/`.
TRAININGS = "HETEROSYNC_TRAININGS"
#: The folder beside the job folders that keeps them.
STORE = "trainings"
#: What the server is called among the participants, whatever its host name.
SERVER = "server"
#: What an error says of a training that is not where a job looked for it.
NOT_STORED = "is not stored"
#: In the folder of a training: the user who began it.
OWNER = "owner.json"
#: FLARE's role that may go on with everybody's trainings.
PROJECT_ADMIN = "project_admin"
#: `status` in run.json of a segment that ended as planned while rounds remain.
SEGMENT_DONE = "stopped: end of the segment"


def training_folder(root: Path, participant: str, training_id: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the server or a site keeps a training; `root` is its workspace, which holds its job folders.

    Raises `UserError` for an id that is no plain name: it comes from a job and must not lead anywhere else.
    """
    if not is_site_name(training_id):
        raise UserError("the job's training_id is no id of a job: give the id of the training's first job")
    place = environ.get(TRAININGS)
    return (Path(place) / participant if place else root / STORE) / training_id


@dataclass(frozen=True)
class Submitter:
    """Who submitted a job, as FLARE's server authenticated them; empty where nobody does, as in the simulator."""

    name: str = ""
    org: str = ""
    role: str = ""


def claim(folder: Path, submitter: Submitter, begins: bool) -> Path:
    """Let a job of `submitter` use the training in `folder`; who was there first owns it. Returns the folder.

    begins: the job begins the training; a project admin who goes on with one does not become its owner. Raises
    `UserError`, which does not say whose training it is, for anybody else.
    """
    file, mine = folder / OWNER, {"name": submitter.name, "org": submitter.org}
    admin = submitter.role == PROJECT_ADMIN
    if file.exists():
        if not admin and read_json(file) != mine:
            line = f"training '{folder.name}' was begun by another user"
            raise UserError(f"{line}: only they or a project admin may submit a job that goes on with it")
    elif begins or not admin:
        write_json(file, mine)
    return folder


def learning_info(
    method: str, method_settings: Mapping[str, Any] | None, training: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What run.json says of what is learned, all defaults included. Raises `UserError` for unknown settings."""
    made = make_method(method, dict(method_settings or {}), training)
    values = {"method": made.name, "method_settings": made.settings.to_dict(), "training": made.training.to_dict()}
    return {**values, "seed": made.training.seed}


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], free: Collection[str] = ("rounds",)) -> str | None:
    """In words, the first setting that keeps one run from going on with the other's files; None if there is none.

    free: names of settings that may differ; a training may go on for more rounds.
    """
    for key, value in mine.items():
        other = theirs.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            for name in sorted({*value, *other} - set(free)):
                if value.get(name) != other.get(name):
                    return f"{key.replace('_', ' ')} '{name}' ({other.get(name)!r}, now {value.get(name)!r})"
        elif value != other:
            return f"{key.replace('_', ' ')} ({other!r}, now {value!r})"
    return None


@dataclass(frozen=True)
class Standing:
    """How far a training has come: rounds done, and the global model that they made (None: the weights stay home)."""

    rounds: int = 0
    model: ModelFile | None = None


def standing(
    folder: Path, mine: Mapping[str, Any], shares: bool, board: Scoreboard, where: str | None = None
) -> Standing:
    """What the record in `folder` is worth: the model file says how many rounds count, and `board` gets their scores.

    mine: what must be as in the record's run.json. shares: whether the method's weights leave the sites. where: what an
    error calls the folder. Raises `UserError` when the record is of another run or a file is damaged.
    """
    run = read_json(folder / RUN)
    other = difference(mine, {name: run.get(name) for name in mine})
    if other:
        raise UserError(f"{where or folder} holds a run with another {other}: keep its settings, or begin a new run")
    if not shares:
        return Standing(len(run.get("rounds", [])))
    if not (folder / LAST_MODEL).exists():
        return Standing()
    method = str(mine["method"])
    last = load_model(folder / LAST_MODEL, method)
    score, received = get_method(method).task.received, dict[int, dict[str, float]]()
    for round_, site, metric, value in read_history(folder):
        if metric == score and round_ < last.round:
            received.setdefault(round_, {})[site] = value
    best = folder / BEST_MODEL
    board.take_up(received, load_model(best, method).round if best.exists() else None)
    return Standing(last.round, last)


#: What run.json says of the sites that a training began with, and the jobs that go on with it compare.
BEGUN_WITH = ("sites", "labels", "anchor_digest", PROVISIONED)


def changed_ground(earlier: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Problems, one line each, when labels, anchor pack or frozen network in a check-in's `report` are not those of the
    earlier rounds' run.json."""
    problems = []
    labels, anchor_digest = report["labels"], report["anchor_digest"]
    if earlier.get("labels") and list(earlier["labels"]) != list(labels):
        before = " / ".join(map(str, earlier["labels"]))
        problems.append(f"this training began with the label names {before}: write the same into every site.yaml")
    if earlier.get("anchor_digest") and earlier["anchor_digest"] != anchor_digest:
        before = str(earlier["anchor_digest"])[:12]
        problems.append(f"this training began with the anchor digest {before}…: give every site that anchor pack")
    if earlier.get(PROVISIONED) and earlier[PROVISIONED] != report["initial_weights"]:
        before = earlier[PROVISIONED]
        problems.append(f"this training began with the frozen network {before}: put that file back at every site")
    return problems


def changed_sites(earlier: Mapping[str, Any], sites: Sequence[str]) -> list[str]:
    """The problem, as one line, when other sites go on with a training than began it; for methods that need the same
    ones in every round."""
    before = earlier.get("sites")
    if not before or sorted(before) == sorted(sites):
        return []
    names = ", ".join(sorted(before))
    return [f"this training began with the sites {names}, and its method needs just these: let them all take part"]


class TrainingStore:
    """The server's folder of one training; one job at a time may hold it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._held = ExitStack()

    def hold(self, begin: bool, submitter: Submitter) -> None:
        """Take hold of the training until `release` or the end of this process, however it ends.

        begin: a new training, nothing may be left of another one. Raises `UserError` when the training to go on with is
        not here or somebody else's, or when another job holds it.
        """
        if not begin:
            if not (self.folder / RUN).is_file():
                raise UserError(f"training '{self.folder.name}' {NOT_STORED} at the server: check the id")
            claim(self.folder, submitter, begins=False)
        lock = make_folder(self.folder) / ".lock"
        busy = f"training '{self.folder.name}' is in use by another job: wait for its end, or abort it"
        self._held.enter_context(held(lock, f"{busy}, and submit this one again"))
        if begin:
            with explained(self.folder):
                for path in self.folder.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path != lock:
                        path.unlink()
            claim(self.folder, submitter, begins=True)

    def release(self) -> None:
        self._held.close()

    def fetch(self, run: Path) -> None:
        """Put the files of the training into the run folder of the job that goes on with it."""
        _copy_record(self.folder, run)

    def keep(self, run: Path) -> None:
        """Store the run folder's files. The last model comes last: it says how many rounds count, so that a store cut
        off in between is one round behind and never wrong."""
        _copy_record(run, self.folder)


def hold_run(folder: Path) -> AbstractContextManager[None]:
    """Hold a run folder of the in-process runner. Raises `UserError` when another process does."""
    return held(folder / ".lock", f"{folder}: another process runs the training in it: wait for its end")


def begin_from(earlier: Path, out: Path, mine: Mapping[str, Any], sites: Sequence[str]) -> None:
    """Make `out` a run of `sites` by the in-process runner that stands where its run in `earlier` does.

    Raises `UserError` before anything is written.
    """
    method = get_method(str(mine["method"]))
    if not (earlier / RUN).exists():
        raise UserError(f"{earlier / RUN} does not exist: give the folder of an earlier run")
    with hold_run(earlier):
        standing(earlier, mine, method.weighting != "none", Scoreboard(LoopSettings()))
        record = read_json(earlier / RUN)
        problems = changed_sites(record, sites) if method.needs_all else []
        if problems:
            raise ProblemList(problems)
        with new_folder(out) as folder:
            _copy_record(earlier, folder)
            for path in sorted((earlier / "sites").rglob("*")):
                if path.is_file():
                    link_file(path, folder / path.relative_to(earlier))
            write_json(folder / RUN, {**record, "sites": list(sites)})


def _copy_record(source: Path, target: Path) -> None:
    """Events grow in place and are copied; the other files are replaced as a whole, and get a second name."""
    for path in sorted((source / TENSORBOARD).glob("*")):
        copy_file(path, target / TENSORBOARD / path.name)
    for name in (BEST_MODEL, HISTORY, CROSS_SITE, RUN, LAST_MODEL):
        if (source / name).exists():
            link_file(source / name, target / name)
