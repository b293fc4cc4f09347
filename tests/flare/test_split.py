"""SplitAVG over FLARE: the steps of a round, what leaves a site in them, and what happens when they break."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import psutil
import pytest
import torch
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReservedKey
from nvflare.apis.signal import Signal

from flare_toys import fake_context
from heterosync.errors import UserError
from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.federation.split import Tail
from heterosync.flare import messages
from heterosync.flare.filters import OutboundFilter
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.jobs.segments import segment_job
from heterosync.flare.running.simulator import JOB_ID, SimulationFailed, SimulationResult, simulate
from heterosync.flare.split import STEP, Desk, ask_server
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings
from toys import SMOKE, toy_site

TRAINING = {**SMOKE, "local_epochs": 2}
SITES = ["site-a", "site-b"]


# -- the gates, without a federation -----------------------------------------------------------------------------------


class Runner:
    """FLARE's client runner, as far as filters are concerned."""

    def __init__(self, *filters):
        self.task_result_filters = {messages.EXCHANGE + FilterKey.DELIMITER + FilterKey.OUT: list(filters)}


def parcel(images: int = 4) -> dict[str, torch.Tensor]:
    return {"features": torch.zeros(images, 8, 8, 8, dtype=torch.float16), "labels": torch.zeros(images)}


def asked(folder: Path, tensors: dict, method: str = "splitavg", settings: dict | None = None) -> list:
    """What leaves a site that asks with `tensors`."""
    context = fake_context(folder, **{FLContextKey.TASK_NAME: "train", messages.ROUND: 1})
    context.set_prop(ReservedKey.RUNNER, Runner(OutboundFilter(method, settings or {}, SMOKE)), True, False)
    sent: list = []

    def send(targets, topic, request, timeout, fl_ctx):
        sent.append((topic, request))
        return {"server": messages.tensors_message({"gradient": torch.ones(1)})}

    context.get_engine().send_aux_request = send
    answer = ask_server(context, Signal())(5, tensors)
    assert set(answer) == {"gradient"} and context.get_prop(FLContextKey.TASK_NAME) == "train"
    return sent


def test_a_step_passes_the_sites_filter_and_is_audited(tmp_path: Path) -> None:
    ((topic, request),) = asked(tmp_path, parcel())
    assert topic == messages.EXCHANGE and request.get_header(STEP) == 5
    assert set(messages.open_message(request)[0]) == {"features", "labels"}
    (record,) = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert (record["task"], record["round"], record["left"]) == ("exchange", 1, True)
    assert record["items"] == [
        {"name": "features", "shape": [4, 8, 8, 8], "dtype": "float16", "bytes": 4096},
        {"name": "labels", "shape": [4], "dtype": "float32", "bytes": 16},
    ]


@pytest.mark.parametrize(
    ("change", "settings", "why"),
    [
        ({"images": torch.zeros(4, 3, 32, 32)}, {}, "a step's message with 'features', 'images', 'labels'"),
        ({"features": torch.zeros(4, 3, 32, 32, dtype=torch.float16)}, {}, "tensor 'features' has shape"),
        ({"features": torch.zeros(4, 8, 8, 8)}, {}, "tensor 'features' has shape"),
        ({"features": torch.zeros(18, 8, 8, 8, dtype=torch.float16)}, {}, "tensor 'features' has shape"),
        ({}, {"v2": True}, "a step's message with 'features', 'labels' is not one that the method sends"),
    ],
)
def test_nothing_else_leaves_in_a_step(tmp_path: Path, change: dict, settings: dict, why: str) -> None:
    with pytest.raises(UserError, match="its outbound filter blocked the message"):
        asked(tmp_path, {**parcel(), **change}, settings=settings)
    record = json.loads((tmp_path / "audit.jsonl").read_text())
    assert not record["left"] and why in record["reason"]


def test_other_methods_have_no_steps(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="blocked"):
        asked(tmp_path, parcel(), method="fedavg")


def test_no_tensor_comes_back_after_a_round(tmp_path: Path) -> None:
    made = make_method("splitavg", None, TrainingSettings.from_dict(SMOKE))
    context = fake_context(tmp_path, **{FLContextKey.TASK_NAME: "train", messages.ROUND: 0})
    envelope = {"method": "splitavg", "round": 0, "samples": 4, "metrics": {}}
    for tensors, passes in (({}, True), (initial_state(made), False)):
        reply = OutboundFilter("splitavg", {}, SMOKE).process(messages.tensors_message(tensors, envelope), context)
        assert (messages.failure_of(reply) is None) == passes


def test_the_server_refuses_what_does_not_fit_and_ends_the_job(tmp_path: Path) -> None:
    made = make_method("splitavg", None, TrainingSettings.from_dict(SMOKE))
    cases = [
        (0, parcel(), {STEP: 0}, "sent a step of another round than 1"),
        (1, {"features": parcel()["features"]}, {STEP: 0}, "it holds what no site may send: a step's message"),
        (1, parcel(), {STEP: 4}, "site site-a sent message 4 of the round, 0 is due"),
        (1, parcel(), {STEP: 0}, "nothing came from site-b"),
    ]
    for round_, tensors, headers, cause in cases:
        failures: list[str] = []
        desk = Desk("splitavg", lambda why, fl_ctx, to=failures: to.append(why), 0.3)
        tail = Tail(made, initial_state(made), {})
        tail.checked_in({site: {"counts": {"train": 4}, "precision": "float32"} for site in SITES})
        tail.start(1, initial_state(made))
        assert desk.open(1, SITES, tail) == 4
        request = messages.tensors_message(tensors)
        request.set_header("current_round", round_)
        for name, value in headers.items():
            request.set_header(name, value)
        request.set_peer_props({ReservedKey.IDENTITY_NAME: "site-a"})
        reply = desk.answer(messages.EXCHANGE, request, fake_context(tmp_path, "server"))
        assert messages.failure_of(reply) is not None
        assert len(failures) == 1 and cause in failures[0], failures


# -- whole jobs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    toy_site(folder / "data" / "site-a", (30, 30), seed=0)
    toy_site(folder / "data" / "site-b", (15, 15), seed=1)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def play(root: Path, name: str, options: JobOptions, log=None) -> SimulationResult:
    job = build_job("splitavg", root / name / "job", options)
    return simulate(job, root / name / "ws", SITES, root / "data", timeout=300, log=log or (lambda line: None))


def history(folder: Path) -> list[list[str]]:
    with (folder / "history.csv").open(newline="") as file:
        return sorted(row for row in csv.reader(file) if row[2] != "seconds")


@pytest.mark.flare
@pytest.mark.slow
@pytest.mark.parametrize(("v2", "in_process"), [(False, False), (True, True)], ids=["v1 in a process", "v2"])
def test_a_job_equals_the_in_process_run(root: Path, v2: bool, in_process: bool) -> None:
    settings = {"v2": v2}
    options = JobOptions(training=TRAINING, method_settings=settings, in_process=in_process)
    name = f"job-{v2}"
    began = time.monotonic()
    result = play(root, name, options)
    print(f"{time.monotonic() - began:.1f} s")
    sites = {site: root / "data" / site for site in SITES}
    done = run_inprocess("splitavg", sites, root / name / "oracle", settings, TRAINING)
    assert result.status == "completed"
    for model in ("last_model.pt", "best_model.pt"):
        ours, theirs = (load_model(folder / model).state for folder in (result.results, done.folder))
        assert list(ours) == list(theirs) and all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert history(result.results) == history(done.folder)
    ours, theirs = (json.loads((f / "cross_site_metrics.json").read_text()) for f in (result.results, done.folder))
    assert ours == theirs
    ours, theirs = (json.loads((f / "run.json").read_text())["rounds"] for f in (result.results, done.folder))
    assert [record["bytes"] for record in ours] == [record["bytes"] for record in theirs]
    print([record["seconds"] for record in ours], [record["seconds"] for record in theirs])
    kinds = {"features", "logit_gradient"} if v2 else {"features", "labels"}
    for folder in result.sites.values():
        records = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
        steps = [record for record in records if record["task"] == "exchange"]
        assert len(steps) == (2 if v2 else 1) * 12 and all(record["left"] for record in steps)  # 3 x 2 x 2 rounds
        assert {item["name"] for record in steps for item in record["items"]} == kinds
        shapes = [item["shape"] for record in records if record["task"] != "exchange" for item in record["items"]]
        assert not any(shapes)


@pytest.mark.flare
@pytest.mark.slow
def test_a_trainer_killed_within_a_round_ends_the_job_and_the_next_one_goes_on(root: Path) -> None:
    """Its half of the steps is lost with it; the model of the round before stays, and the sites' halves too."""
    training = {**TRAINING, "local_epochs": 12}
    killed: list[int] = []

    def kill_once(line: str) -> None:
        if not killed and "site site-b: round 2/2, epoch 1/" in line:
            for process in psutil.Process().children(recursive=True):
                if "heterosync.federation.child" in process.cmdline() and "site-b" in process.parent().cmdline():
                    killed.append(process.pid)
                    process.kill()

    with pytest.raises(SimulationFailed, match="a trainer that died cannot come back within a round") as caught:
        play(root, "killed", JobOptions(training=training), kill_once)
    assert killed
    assert load_model(caught.value.result.results / "last_model.pt").round == 1
    again = segment_job(root / "killed" / "job", root / "killed" / "next", JOB_ID)
    workspace, sites = root / "killed" / "ws", {site: root / "data" / site for site in SITES}
    result = simulate(again, workspace, SITES, root / "data", timeout=300, log=None, resume=workspace)
    done = run_inprocess("splitavg", sites, root / "killed" / "oracle", None, training)
    ours, theirs = (load_model(folder / "last_model.pt") for folder in (result.results, done.folder))
    assert ours.round == theirs.round == 2
    assert all(torch.equal(ours.state[key], value) for key, value in theirs.state.items())
    assert history(result.results) == history(done.folder)
