"""Trainings as chains of jobs: what the server and a site take up, and the command that drives the chain."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants

from flare_toys import FakeFederation, fake_context, plain_site, submitted_by
from heterosync.cli import main
from heterosync.errors import UserError
from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import load_model, save_model
from heterosync.federation.results import read_history
from heterosync.federation.trainings import SEGMENT_DONE
from heterosync.flare import messages
from heterosync.flare.controller import GONE
from heterosync.flare.executor import DATA_ROOT, HeteroSyncExecutor
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.folder import read_learning
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.jobs.segments import segment_job, training_id_of
from heterosync.flare.running.chain import LOST, STATE, Chain
from heterosync.flare.running.session import COMPLETED, JobEnd, Unreachable
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings
from toys import SMOKE, toy_site

SITES = ["site-a", "site-b", "site-c"]
AUCS = [0.5, 0.8, 0.6, 0.9, 0.7]  # of the model after r rounds: the best is model 3


def scripted(name: str, task: str, round_: int, message: Shareable) -> Shareable:
    """A site that moves every tensor by one a round, and scores the models as `AUCS` says."""
    if task == messages.VALIDATE:
        return plain_site(name, task, round_, message, auc=AUCS[round_])
    if task != messages.TRAIN:
        return plain_site(name, task, round_, message)
    tensors, _ = messages.open_message(message)
    fields = {"method": "hsl", "round": round_, "samples": 10, "metrics": {"val_auc_received": AUCS[round_]}}
    return messages.tensors_message({key: value + 1 for key, value in tensors.items()}, fields)


def play(
    folder: Path,
    job_id: str = "job-1",
    site: Callable = scripted,
    sites: list[str] = SITES,
    submitter: dict | None = None,
    **args,
) -> FakeFederation:
    run = FakeFederation(folder, sites, site, **args)
    for name, value in (submitter or {}).items():
        run.context.set_prop(name, value, private=True, sticky=False)
    run.context.set_prop(FLContextKey.CURRENT_RUN, job_id, private=False, sticky=False)
    return run.play()


def assert_same(one: Path, other: Path) -> None:
    assert read_history(one) == read_history(other)
    for name in ("last_model.pt", "best_model.pt"):
        mine, theirs = load_model(one / name), load_model(other / name)
        assert (mine.round, mine.versions) == (theirs.round, theirs.versions)
        assert all(torch.equal(mine.state[key], theirs.state[key]) for key in theirs.state)
    mine, theirs = (json.loads((folder / "run.json").read_text()) for folder in (one, other))
    for key in ("best_round", "plateau_round", "training", "status", "initial_weights"):
        assert mine[key] == theirs[key], key
    assert [r["contributors"] for r in mine["rounds"]] == [r["contributors"] for r in theirs["rounds"]]


@pytest.fixture
def straight(tmp_path: Path) -> Path:
    folder = tmp_path / "straight" / "run"
    assert play(folder, training={"rounds": 4}).reasons == []
    return folder


# -- the server --------------------------------------------------------------------------------------------------------


def test_segments_equal_one_job(tmp_path: Path, straight: Path) -> None:
    four = {"training": {"rounds": 4}}
    first = play(tmp_path / "one", "job-1", segment_rounds=3, **four)
    assert first.reasons == [] and first.read("run.json")["status"] == SEGMENT_DONE
    assert first.asked == [("check_in", 0), ("train", 0), ("train", 1), ("train", 2)]
    second = play(tmp_path / "two", "job-2", training_id="job-1", segment_rounds=3, **four)
    assert second.reasons == [] and [task for task in second.asked if task[0] == "train"] == [("train", 3)]
    assert_same(tmp_path / "two", straight)
    record = second.read("run.json")
    assert record["training_id"] == "job-1" and record["best_round"] == 3
    assert record["segments"] == [{"job_id": "job-1", "first_round": 0}, {"job_id": "job-2", "first_round": 3}]
    # a finished training, longer; and one of which only the tests are left to do
    longer = play(tmp_path / "three", "job-3", training_id="job-1", training={"rounds": 4})
    assert [task for task, _ in longer.asked] == ["check_in"] + ["validate"] * 3
    assert_same(tmp_path / "three", straight)


@pytest.mark.parametrize(("name", "own"), [("fedadam", True), ("scaffold", False), ("fedbn", False)])
def test_what_the_server_remembers_goes_along(tmp_path: Path, name: str, own: bool) -> None:
    def site(site: str, task: str, round_: int, message: Shareable) -> Shareable:
        reply = plain_site(site, task, round_, message, auc=AUCS[round_], method=name, anchor_digest=None)
        if task != messages.TRAIN:
            return reply
        tensors, fields = messages.open_message(reply)
        moved = {key: value + (1 + round_) * 0.25 for key, value in tensors.items() if value.is_floating_point()}
        return messages.tensors_message({**tensors, **moved}, fields)

    args = {"site": site, "method": name, "training": {"rounds": 4}}
    assert play(tmp_path / "straight" / "run", **args).reasons == []
    assert play(tmp_path / "one", segment_rounds=2, **args).reasons == []
    assert play(tmp_path / "two", "job-2", training_id="job-1", **args).reasons == []
    assert_same(tmp_path / "two", tmp_path / "straight" / "run")
    ours, theirs = (load_model(tmp_path / run / "last_model.pt").assets for run in ("two", "straight/run"))
    assert list(ours) == list(theirs) and bool(ours) == own
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_stored_model_without_what_the_server_remembered_ends_the_job(tmp_path: Path) -> None:
    def site(*task) -> Shareable:
        return plain_site(*task, method="fedadam", anchor_digest=None)

    args = {"site": site, "method": "fedadam", "training": {"rounds": 4}}
    play(tmp_path / "one", segment_rounds=2, **args)
    last = load_model(tmp_path / "trainings" / "job-1" / "last_model.pt")
    last.path.unlink()  # a link to the run's own file
    save_model(last.path, "fedadam", {}, last.training, last.state, last.labels, last.round)
    run = play(tmp_path / "two", "job-2", training_id="job-1", **args)
    assert len(run.reasons) == 1 and "what its server remembers of the rounds before is missing" in run.reasons[0]
    assert run.read("run.json")["status"].startswith("failed: method fedadam cannot go on")


def test_a_method_that_needs_all_goes_on_with_the_same_sites(tmp_path: Path) -> None:
    def site(*task) -> Shareable:
        return plain_site(*task, method="personalized", anchor_digest=None)

    args = {"site": site, "method": "personalized", "method_settings": {"use_sat": False}, "training": {"rounds": 4}}
    play(tmp_path / "one", sites=SITES[:2], segment_rounds=2, **args)
    run = play(tmp_path / "two", "job-2", training_id="job-1", **args)
    assert run.reasons[0].startswith("this training began with the sites site-a, site-b, and its method needs just")
    assert play(tmp_path / "three", "job-3", sites=SITES[:2], training_id="job-1", **args).reasons == []


def test_the_best_model_of_an_earlier_segment_stays_the_best(tmp_path: Path) -> None:
    """Model 2 was best when its segment ended; scored anew, on more images, it would not have been."""
    aucs = [0.6, 0.7, 0.8]

    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        return plain_site(name, task, round_, message, auc=aucs[round_])

    first = play(tmp_path / "one", site=site, training={"rounds": 2})
    assert first.read("run.json")["best_round"] == 2
    aucs[:] = [0.6, 0.7, 0.1, 0.05]
    second = play(tmp_path / "two", "job-2", site, training_id="job-1", training={"rounds": 3})
    assert second.reasons == []
    assert second.read("run.json")["best_round"] == load_model(tmp_path / "two" / "best_model.pt").round == 2


@pytest.mark.parametrize(
    ("change", "args", "reason"),
    [
        (None, {"training_id": "job-7"}, "^training 'job-7' is not stored at the server: check the id$"),
        (None, {"training_id": "../job-1"}, "training_id is no id"),
        (None, {"training": {"lr": 0.01}}, "training 'job-1' holds a run with another training 'lr'"),
        (None, {"method_settings": {"temperature": 9.0}}, "another method settings 'temperature'"),
        ("last_model.pt", {}, "last_model.pt is cut off or no model file"),
        ("best_model.pt", {}, "best_model.pt is cut off or no model file"),
        ("run.json", {}, "run.json is not readable JSON"),
    ],
)
def test_what_cannot_be_resumed_stops_before_any_site_is_asked(
    tmp_path: Path, change: str | None, args: dict, reason: str
) -> None:
    play(tmp_path / "one", segment_rounds=2, training={"rounds": 4})
    if change:
        file = tmp_path / "trainings" / "job-1" / change
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[: len(whole) // 2])
    args = {"training_id": "job-1", **args, "training": {"rounds": 4, **args.get("training", {})}}
    run = play(tmp_path / "two", "job-2", **args)
    assert len(run.reasons) == 1 and "\n" not in run.reasons[0] and run.asked == []
    assert re.search(reason, run.reasons[0])


def test_only_who_began_a_training_goes_on_with_it_and_the_project_admin(tmp_path: Path) -> None:
    four = {"training": {"rounds": 4}, "segment_rounds": 1}
    play(tmp_path / "one", submitter=submitted_by("lead@a.org"), **four)
    stolen = play(tmp_path / "two", "job-2", submitter=submitted_by("lead@b.org"), training_id="job-1", **four)
    assert len(stolen.reasons) == 1 and stolen.asked == []
    assert stolen.reasons[0].startswith("training 'job-1' was begun by another user: only they or a project admin")
    assert not (tmp_path / "two" / "last_model.pt").exists()
    for job, submitter in (("job-3", submitted_by("chief@x", "project_admin")), ("job-4", submitted_by("lead@a.org"))):
        run = play(tmp_path / job, job, submitter=submitter, training_id="job-1", **four)
        assert run.reasons == [] and "train" in [task for task, _ in run.asked]


def test_the_server_reads_no_file_by_its_path_in_a_job(tmp_path: Path) -> None:
    run = play(tmp_path / "one", training={"weights": "/etc/passwd", "backbone": "resnet18"})
    assert run.asked == [] and "'weights' is '/etc/passwd': a job may not name a path" in run.reasons[0]


def test_a_segment_keeps_to_the_labels_and_anchors_of_the_first(tmp_path: Path) -> None:
    play(tmp_path / "one", segment_rounds=2, training={"rounds": 4})

    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        other = {"labels": ["a", "b"], "anchor_digest": "f" * 64} if task == messages.CHECK_IN else {}
        return plain_site(name, task, round_, message, **other)

    run = play(tmp_path / "two", "job-2", site=site, training_id="job-1", training={"rounds": 4})
    for attempt in (run, play(tmp_path / "three", "job-3", site=site, training_id="job-1", training={"rounds": 4})):
        assert "began with the label names normal / abnormal" in attempt.reasons[0]
        assert "anchor digest" in attempt.reasons[0]


def test_sites_join_and_leave_between_segments(tmp_path: Path) -> None:
    four = {"training": {"rounds": 4}}
    received = []

    def joining(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        if (name, task) == ("site-c", messages.TRAIN):
            received.append((round_, messages.open_message(message)[0]))
        return scripted(name, task, round_, message)

    play(tmp_path / "one", sites=SITES[:2], segment_rounds=2, **four)
    run = play(tmp_path / "two", "job-2", joining, SITES[1:], training_id="job-1", **four)
    assert run.reasons == []
    assert [r["contributors"] for r in run.read("run.json")["rounds"]] == [SITES[:2]] * 2 + [SITES[1:]] * 2
    stored = load_model(tmp_path / "one" / "last_model.pt").state
    assert received[0][0] == 2 and all(torch.equal(received[0][1][key], stored[key]) for key in stored)


def test_a_site_that_stays_silent_is_not_waited_for_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable | None:
        if name == "site-b" and task != messages.CHECK_IN:
            asked.append(round_)
            return scripted(name, task, round_, message) if round_ == 1 else None
        return scripted(name, task, round_, message)

    run = play(tmp_path / "run", site=site, min_clients=2, training={"rounds": 4})
    assert run.reasons == [] and asked == [0, 1, 2, 3]  # round 1 was answered: only 2 and 3 are two running
    assert run.read("run.json")["rounds"][3]["refused"] == {"site-b": messages.NO_ANSWER}
    assert "site-b" not in run.read("cross_site_metrics.json")["last"]
    asked.clear()
    run = play(
        tmp_path / "again",
        "job-9",
        lambda *a: None if a[0] == "site-b" and a[1] == "train" else scripted(*a),
        min_clients=2,
        training={"rounds": 4},
    )
    assert run.read("run.json")["rounds"][3]["refused"] == {"site-b": GONE}


# -- a site ------------------------------------------------------------------------------------------------------------


def test_a_site_finds_its_state_by_the_training(tmp_path: Path) -> None:
    site = toy_site(tmp_path / "data" / "site-a")
    state = initial_state(make_method("hsl", None, TrainingSettings.from_dict(SMOKE)))

    def train(job: str, round_: int, **args) -> tuple[dict, Shareable]:
        props = {FLContextKey.SCOPE_PROPERTIES: {DATA_ROOT: str(site)}}
        context = fake_context(tmp_path / job, **props, **submitted_by(args.pop("lead", "lead@a.org")))
        context.set_prop(FLContextKey.CURRENT_RUN, job, private=False, sticky=False)
        executor = HeteroSyncExecutor("hsl", {}, {**SMOKE, **args.pop("training", {})}, in_process=True, **args)
        message = messages.tensors_message(state)
        message.set_header(AppConstants.CURRENT_ROUND, round_)
        reply = executor.execute("train", message, context, Signal())
        return (messages.open_message(reply)[0] if messages.failure_of(reply) is None else {}), reply

    train("job-1", 0)
    kept = tmp_path / "trainings" / "job-1"
    assert {path.name for path in kept.iterdir()} >= {"state.pt", "trainer.json", "precision.json"}
    train("job-2", 1, training_id="job-1")
    assert torch.load(kept / "state.pt", weights_only=True)["round"] == 1
    assert not (tmp_path / "trainings" / "job-2").exists()
    # a job of another training cannot take over this one's state, nor look elsewhere
    other_lead = {"training_id": "job-1", "lead": "lead@b.org"}
    for args in ({"training_id": "job-1", "training": {"lr": 0.5}}, {"training_id": "../../data"}, other_lead):
        assert messages.failure_of(train("job-3", 1, **args)[1]) == messages.REASONS["mend"]


# -- job folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return build_job("hsl", tmp_path / "job", JobOptions(training={**SMOKE, "rounds": 4}, min_clients=2))


def test_a_segment_is_the_same_job_but_for_where_it_begins_and_ends(tmp_path: Path, job: Path) -> None:
    made = segment_job(job, tmp_path / "next", "job-1", 3, rounds=9)
    assert training_id_of(made) == "job-1" and training_id_of(job) == ""
    assert read_learning(made)["training"] == {**SMOKE, "rounds": 9}
    text = (made / "app/config/config_fed_server.json").read_text()
    assert '"min_clients": 2' in text and '"segment_rounds": 3' in text and '"rounds": 4' not in text
    assert '"training_id": "job-1"' in (made / "app/config/config_fed_client.json").read_text()
    assert "job `job-1` began" in (made / "README.md").read_text()
    assert (made / "meta.json").read_text() == (job / "meta.json").read_text()
    with pytest.raises(UserError, match="no id of a training"):
        segment_job(job, tmp_path / "bad", "../x")
    with pytest.raises(UserError, match="not a heterosync job folder"):
        segment_job(tmp_path, tmp_path / "bad", "job-1")
    with pytest.raises(UserError, match="keeps none"):
        segment_job(build_job("hsl", tmp_path / "swarm", JobOptions(topology="swarm")), tmp_path / "bad", "job-1")
    assert not (tmp_path / "bad").exists()


def test_job_resume(tmp_path: Path, job: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "next"
    assert main(["job", "resume", "job-1", "--job", str(job), "--out", str(out), "--segment-rounds", "2"]) == 0
    assert training_id_of(out) == "job-1" and capsys.readouterr().out.strip() == str(out)
    assert main(["job", "resume", "job-1", "--out", str(tmp_path / "none")]) == 1
    assert "--job DIR" in capsys.readouterr().err
    download = tmp_path / "download"
    shutil.copytree(job, download / "job")
    play(download / "workspace", "job-5", segment_rounds=1, training={"rounds": 4})
    for folder in (download, download / "workspace"):
        shutil.rmtree(out)
        assert main(["job", "resume", str(folder), "--out", str(out)]) == 0
        assert training_id_of(out) == "job-5"
    assert main(["job", "resume", str(tmp_path), "--out", str(tmp_path / "none")]) == 1
    assert "is not a downloaded job" in capsys.readouterr().err and not (tmp_path / "none").exists()


# -- the chain ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Our own command, or the server, is killed."""


class FakeEngine:
    """A server in this process that plays segment jobs. `faults`: number of the job (from 1) -> what befalls it.

    "lost": the server is killed in the job's second round. "unstored": the same before the job begins. "broken": the
    job ends without a round. `kill`: "before" or "after" and the call at which our command is killed, after as many
    calls of it as `spared` says. `offline`: call -> how often the server cannot be reached at it.
    """

    def __init__(self, root: Path, faults: dict[int, str] | None = None):
        self.root, self.faults = root, faults or {}
        self.jobs: dict[str, Path] = {}
        self.tokens: dict[str, str] = {}
        self.ends: dict[str, JobEnd] = {}
        self.kill, self.spared = "", 0
        self.offline: dict[str, int] = {}
        self.connected = list(SITES)

    def _act(self, name: str, what: Callable) -> object:
        if self.offline.get(name):
            self.offline[name] -= 1
            raise Unreachable("the server cannot be reached")
        before, after = f"before {name}" == self.kill, f"after {name}" == self.kill
        if (before or after) and self.spared:
            self.spared, before, after = self.spared - 1, False, False
        if before or after:
            self.kill = ""
        if before:
            raise Killed
        result = what()
        if after:
            raise Killed
        return result

    def submit(self, job: Path, token: str) -> str:
        def submit() -> str:
            if token not in self.tokens:
                self.tokens[token] = f"job-{len(self.tokens) + 1}"
                self.jobs[self.tokens[token]] = job
            return self.tokens[token]

        return self._act("submit", submit)

    def follow(self, job_id: str, say: Callable, *, while_waiting: Callable) -> JobEnd:
        return self._act("follow", lambda: self._follow(job_id, while_waiting))

    def _follow(self, job_id: str, while_waiting: Callable) -> JobEnd:
        if job_id not in self.ends:
            self._play(job_id)
        while self.ends[job_id].status == "RUNNING":
            while_waiting()
        return self.ends[job_id]

    def _play(self, job_id: str) -> None:
        fault = self.faults.get(int(job_id.removeprefix("job-")))
        config = json.loads((self.jobs[job_id] / "app/config/config_fed_server.json").read_text())
        args = config["workflows"][0]["args"]
        if fault in ("broken", "unstored"):
            status = "RUNNING" if fault == "unstored" else "FINISHED:EXECUTION_EXCEPTION"
            self.ends[job_id] = JobEnd(job_id, status, "a site's disk is full")
            return
        rounds: set[int] = set()

        def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
            if task == messages.TRAIN:
                rounds.add(round_)
            if fault == "lost" and len(rounds) == 2:
                raise Killed
            return scripted(name, task, round_, message)

        run = FakeFederation(self.root / job_id, SITES, site, **args)
        run.context.set_prop(FLContextKey.CURRENT_RUN, job_id, private=False, sticky=False)
        try:
            run.play()
            cause = "; ".join(run.reasons)
            self.ends[job_id] = JobEnd(job_id, COMPLETED if not cause else "FINISHED:EXECUTION_EXCEPTION", cause)
        except Killed:
            run.controller._store.release()  # as the end of its process does
            self.ends[job_id] = JobEnd(job_id, "RUNNING", "")

    def download(self, job_id: str, out: Path) -> Path:
        def download() -> Path:
            if not (self.root / job_id).exists():
                raise UserError(f"the result of job {job_id}: nothing there")
            return Path(shutil.copytree(self.root / job_id, out / job_id))

        return self._act("download", download)

    def sites(self) -> list[str]:
        return self._act("sites", lambda: self.connected)

    def lost(self, job_id: str) -> bool:
        return self.ends[job_id].status == "RUNNING"


def chain_of(tmp_path: Path, job: Path, lines: list[str] | None = None) -> Chain:
    say = lines.append if lines is not None else lambda line: None
    return Chain(job, tmp_path / "out", 2, say, wait=0.2, look=0.0)


def test_a_chain_equals_one_job(tmp_path: Path, job: Path, straight: Path) -> None:
    engine, lines = FakeEngine(tmp_path / "server"), []
    results = chain_of(tmp_path, job, lines).run(engine)
    assert_same(results, straight)
    assert list(engine.jobs) == ["job-1", "job-2"] and lines[-1].startswith("segment 2: FINISHED:COMPLETED, 4 of 4")
    assert chain_of(tmp_path, job).run(engine) == results and len(engine.jobs) == 2  # done is done


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("act", ["submit", "follow", "download"])
@pytest.mark.parametrize("segment", [1, 2])
def test_a_chain_killed_at_any_act_goes_on(
    tmp_path: Path, job: Path, straight: Path, act: str, moment: str, segment: int
) -> None:
    engine = FakeEngine(tmp_path / "server")
    engine.kill, engine.spared = f"{moment} {act}", segment - 1
    with pytest.raises(Killed):
        chain_of(tmp_path, job).run(engine)
    assert_same(chain_of(tmp_path, job).run(engine), straight)
    assert list(engine.jobs) == ["job-1", "job-2"]  # none was submitted twice


@pytest.mark.parametrize("act", ["sites", "submit", "follow", "download"])
def test_a_server_out_of_reach_is_waited_for_and_costs_the_training_nothing(
    tmp_path: Path, job: Path, straight: Path, act: str
) -> None:
    engine, lines = FakeEngine(tmp_path / "server"), []
    engine.offline = {act: 2}
    assert_same(chain_of(tmp_path, job, lines).run(engine), straight)
    segments = json.loads((tmp_path / "out" / STATE).read_text())["segments"]
    assert [segment["status"] for segment in segments] == [COMPLETED] * 2 and len(engine.jobs) == 2
    assert "waiting for the server: the server cannot be reached" in lines and "the server answers again" in lines


def test_a_lost_server_is_explained_and_its_job_replaced(tmp_path: Path, job: Path, straight: Path) -> None:
    engine, lines = FakeEngine(tmp_path / "server", {2: "lost"}), []
    assert_same(chain_of(tmp_path, job, lines).run(engine), straight)
    assert [line for line in lines if "FLARE calls job job-2 running for ever" in line]
    state = json.loads((tmp_path / "out" / STATE).read_text())
    assert [segment["status"] for segment in state["segments"]] == [COMPLETED, LOST, COMPLETED]
    # it was killed in round 3; round 2 was stored
    run = json.loads((tmp_path / "out" / "results" / "run.json").read_text())
    assert [segment["first_round"] for segment in run["segments"]] == [0, 2, 3]


def test_a_server_lost_before_anything_was_stored_costs_only_time(tmp_path: Path, job: Path, straight: Path) -> None:
    engine = FakeEngine(tmp_path / "server", {1: "unstored"})
    assert_same(chain_of(tmp_path, job).run(engine), straight)
    state = json.loads((tmp_path / "out" / STATE).read_text())
    assert [segment["rounds"] for segment in state["segments"]] == [0, 0, 2, 4] and state["training_id"] == "job-3"


def test_segments_that_fail_stop_the_chain_and_it_can_be_started_again(
    tmp_path: Path, job: Path, straight: Path
) -> None:
    engine = FakeEngine(tmp_path / "server", dict.fromkeys((2, 3, 4), "broken"))
    with pytest.raises(UserError, match="3 segments in a row .* the last one: a site's disk is full; mend that"):
        chain_of(tmp_path, job).run(engine)
    assert len(engine.jobs) == 4
    assert_same(chain_of(tmp_path, job).run(engine), straight)
    assert len(engine.jobs) == 5


def test_a_server_that_is_lost_again_and_again_is_no_failure_of_the_segments(
    tmp_path: Path, job: Path, straight: Path
) -> None:
    engine = FakeEngine(tmp_path / "server", {1: "unstored", 4: "unstored", 5: "unstored", 6: "unstored"})
    assert_same(
        Chain(job, tmp_path / "out", 2, lambda line: None, attempts=1, wait=0.2, look=0.0).run(engine), straight
    )


def test_a_job_that_was_changed_since_is_not_taken_for_the_one_that_was_submitted(tmp_path: Path, job: Path) -> None:
    engine = FakeEngine(tmp_path / "server")
    engine.kill = "after submit"
    with pytest.raises(Killed):
        chain_of(tmp_path, job).run(engine)
    build_job("hsl", job, JobOptions(training={**SMOKE, "rounds": 4}, min_clients=3))
    chain_of(tmp_path, job).run(engine)
    assert list(engine.jobs) == ["job-1", "job-2", "job-3"] and list(engine.ends) == ["job-2", "job-3"]


def test_a_swarm_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    swarm = build_job("hsl", tmp_path / "swarm", JobOptions(training=SMOKE, topology="swarm"))
    with pytest.raises(UserError, match="a swarm's server keeps no model to go on from: submit it as one job"):
        chain_of(tmp_path, swarm)
    assert not (tmp_path / "out").exists()


def test_downloads_of_earlier_segments_are_not_kept_for_ever(tmp_path: Path, job: Path) -> None:
    results = Chain(job, tmp_path / "out", 1, lambda line: None, wait=0.2, look=0.0).run(
        FakeEngine(tmp_path / "server")
    )
    assert sorted(folder.name for folder in (tmp_path / "out" / "segments").iterdir()) == ["003", "004"]
    assert load_model(results / "last_model.pt").round == 4


def test_a_chain_keeps_to_its_training(tmp_path: Path, job: Path) -> None:
    engine = FakeEngine(tmp_path / "server")
    chain_of(tmp_path, job).run(engine)
    other = build_job("hsl", tmp_path / "other", JobOptions(training={**SMOKE, "rounds": 4, "seed": 1}))
    with pytest.raises(UserError, match="another training 'seed'"):
        chain_of(tmp_path, other)
    with pytest.raises(UserError, match="other files than a chain's"):
        Chain(job, tmp_path / "server", 2)
    longer = build_job("hsl", tmp_path / "longer", JobOptions(training={**SMOKE, "rounds": 3}))
    assert chain_of(tmp_path, longer).run(engine)  # as many rounds as it has, or fewer: nothing to do
    assert len(engine.jobs) == 2


def test_a_site_that_left_is_waited_for_only_so_long(tmp_path: Path, job: Path) -> None:
    engine, lines = FakeEngine(tmp_path / "server"), []

    def leaves(line: str) -> None:
        lines.append(line)
        if line.startswith("segment 1: FINISHED"):
            engine.connected.remove("site-c")

    Chain(job, tmp_path / "out", 2, leaves, wait=0.2, look=0.0).run(engine)
    assert "no longer waiting for site-c: they may return in a later segment" in lines and len(engine.jobs) == 2
