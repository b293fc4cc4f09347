"""The executor with a real site in this process: what it answers, and what it never tells the server."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants

from flare_toys import fake_context
from heterosync.errors import TrainerDied, TrainerHung
from heterosync.federation.initial import initial_state
from heterosync.flare import bounds, messages
from heterosync.flare.executor import DATA_ROOT, HeteroSyncExecutor
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings
from toys import SMOKE, toy_site


def ask(executor: HeteroSyncExecutor, context, task: str, message: Shareable, round_: int = 0, **headers) -> Shareable:
    message.set_header(AppConstants.CURRENT_ROUND, round_)
    for name, value in headers.items():
        message.set_header(name, value)
    return executor.execute(task, message, context, Signal())


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return toy_site(tmp_path / "data" / "site-a")


def test_the_three_tasks(tmp_path: Path, site: Path) -> None:
    context = fake_context(tmp_path / "run", **{FLContextKey.SCOPE_PROPERTIES: {DATA_ROOT: str(site)}})
    executor = HeteroSyncExecutor("hsl", {}, SMOKE, in_process=True)
    report = messages.open_message(ask(executor, context, "check_in", messages.scalars_message({})))[1]
    assert report["site"] == "site-a" and len(report["anchor_digest"]) == 64
    state = initial_state(make_method("hsl", None, TrainingSettings.from_dict(SMOKE)))
    tensors, fields = messages.open_message(ask(executor, context, "train", messages.tensors_message(state), 1))
    assert list(tensors) == list(state) and fields["round"] == 1 and fields["samples"] == 24
    assert context.get_prop(messages.ROUND) == 1
    headers = {messages.SPLIT: "test", messages.MODEL: "best"}
    metrics = messages.open_message(ask(executor, context, "validate", messages.tensors_message(state), 2, **headers))[
        1
    ]
    assert metrics["n"] == 12 and 0 <= metrics["auc"] <= 1
    assert (tmp_path / "run" / "heterosync" / "results" / "predictions.csv").exists()
    # another executor on the same run folder, as when the simulator has few threads, goes on where this one stopped
    again = HeteroSyncExecutor("hsl", {}, SMOKE, in_process=True)
    repeated, _ = messages.open_message(ask(again, context, "train", messages.tensors_message(state), 1))
    assert all(torch.equal(repeated[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("props", "task", "settings", "reason", "logged"),
    [
        ({DATA_ROOT: "/data/patient-4711"}, "check_in", {}, "mend", "data_root of local/privacy.json"),
        ({}, "check_in", {"temprature": 3}, "mend", "temperature"),
        ({}, "submit_model", {}, "mend", "submit_model"),
        ({}, "train", {}, "defect", "no data exchange object"),
    ],
)
def test_failures_name_a_reason_and_nothing_else(
    tmp_path: Path, site: Path, caplog, props: dict, task: str, settings: dict, reason: str, logged: str
) -> None:
    context = fake_context(tmp_path / "run", **{FLContextKey.SCOPE_PROPERTIES: {DATA_ROOT: str(site), **props}})
    executor = HeteroSyncExecutor("hsl", settings, SMOKE, in_process=True)
    with caplog.at_level(logging.INFO):
        reply = ask(executor, context, task, Shareable())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert reply.get_header(messages.REASON) == reason
    assert set(reply["__headers__"]) == {"__rc__", messages.REASON} and set(reply) == {"__headers__"}
    assert logged in caplog.text and messages.PROBLEM in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]  # FLARE would stream these to the server


@pytest.mark.parametrize(("job_id", "answered"), [("job-1", False), (SimulatorConstants.JOB_NAME, True)])
def test_a_job_names_no_path_at_a_site_but_in_the_simulator(
    tmp_path: Path, site: Path, caplog, job_id: str, answered: bool
) -> None:
    (tmp_path / "start.pth").write_bytes(b"")  # all tensors come from the server: the file is not even read
    training = {**SMOKE, "weights": str(tmp_path / "start.pth"), "backbone": "resnet18"}
    context = fake_context(tmp_path / "run", **{FLContextKey.SCOPE_PROPERTIES: {DATA_ROOT: str(site)}})
    context.set_prop(FLContextKey.CURRENT_RUN, job_id, private=False, sticky=False)
    executor = HeteroSyncExecutor("hsl", {}, training, in_process=True)
    reply = ask(executor, context, "check_in", messages.scalars_message({}))
    assert (messages.failure_of(reply) is None) == answered
    assert ("a job may not name a path: give the name of a file" in caplog.text) != answered


def test_a_site_is_asked_about_models_as_often_as_its_rounds_allow(tmp_path: Path, site: Path, caplog) -> None:
    class Scores(Dying):
        def validate(self, *question) -> dict:
            self.calls += 1
            return {"auc": 0.5}

    trainer, limit = Scores(0), bounds.PER_ROUND * SMOKE["rounds"] + bounds.BESIDE
    replies = []
    for number in range(limit + 2):  # job after job of one training, a process each
        executor = HeteroSyncExecutor("hsl", {}, SMOKE, in_process=True, training_id="job-1")
        executor._trainer = trainer
        context = fake_context(tmp_path / f"run-{number}")
        message = messages.tensors_message({"w": torch.zeros(1)})
        replies.append(ask(executor, context, "validate", message, 1, **{messages.SPLIT: "test"}))
    failures = [messages.failure_of(reply) for reply in replies]
    assert failures == [None] * limit + [messages.REASONS["limit"]] * 2 and trainer.calls == limit == 16
    assert (
        "training 'job-1' has asked 16 times to train or score a model, which is all that its 2 rounds" in caplog.text
    )
    executor = HeteroSyncExecutor("hsl", {}, {**SMOKE, "rounds": 3}, in_process=True, training_id="job-1")
    executor._trainer = trainer  # the same training, longer
    message.set_header(messages.SPLIT, "test")
    assert messages.failure_of(ask(executor, context, "validate", message, 1)) is None


class Dying:
    """A trainer that dies a number of times."""

    def __init__(self, deaths: int):
        self.deaths, self.calls, self.closed = deaths, 0, 0
        self.error = TrainerDied("site site-a: trainer ended by SIGKILL")

    def check_in(self) -> dict:
        self.calls += 1
        if self.calls <= self.deaths:
            raise self.error
        return {"site": "site-a"}

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("deaths", "code"), [(0, ReturnCode.OK), (1, ReturnCode.OK), (2, ReturnCode.EXECUTION_EXCEPTION)]
)
def test_a_dead_trainer_gets_a_second_chance(tmp_path: Path, monkeypatch, deaths: int, code: str) -> None:
    trainer = Dying(deaths)
    executor = HeteroSyncExecutor("hsl", {}, SMOKE)
    monkeypatch.setattr(executor, "_make_trainer", lambda context: trainer)
    reply = ask(executor, fake_context(tmp_path), "check_in", messages.scalars_message({}))
    assert reply.get_return_code() == code and trainer.closed == min(deaths, 2)
    if deaths == 2:
        assert messages.failure_of(reply) == messages.REASONS["died"]


def test_a_trainer_that_hangs_twice_is_reported_as_hung(tmp_path: Path, monkeypatch, caplog) -> None:
    trainer = Dying(2)
    trainer.error = TrainerHung("site site-a: trainer killed: no sign of life for 9 s during check_in")
    executor = HeteroSyncExecutor("hsl", {}, SMOKE)
    monkeypatch.setattr(executor, "_make_trainer", lambda context: trainer)
    reply = ask(executor, fake_context(tmp_path), "check_in", messages.scalars_message({}))
    assert messages.failure_of(reply) == messages.REASONS["hung"] and trainer.calls == trainer.closed == 2
    assert "no sign of life for 9 s" in caplog.text
    assert "the trainer hung in task check_in, also when tried again" in caplog.text


def test_an_aborted_task_ends_quietly(tmp_path: Path, monkeypatch) -> None:
    executor, signal = HeteroSyncExecutor("hsl", {}, SMOKE), Signal()
    signal.trigger(True)
    monkeypatch.setattr(executor, "_make_trainer", lambda context: Dying(9))
    reply = executor.execute("check_in", messages.scalars_message({}), fake_context(tmp_path), signal)
    assert reply.get_return_code() == ReturnCode.TASK_ABORTED


def test_the_end_of_the_run_repeats_what_has_to_be_mended(tmp_path: Path, caplog) -> None:
    executor, context = HeteroSyncExecutor("hsl", {}, SMOKE, in_process=True), fake_context(tmp_path)
    for _ in range(2):
        ask(executor, context, "check_in", messages.scalars_message({}))  # no data folder is configured
    caplog.clear()
    executor.handle_event(EventType.END_RUN, context)
    (line,) = caplog.messages
    assert line.startswith(messages.PROBLEM) and "site-a" in line
