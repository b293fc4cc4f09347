"""What may pass in a swarm: scalars to the server, shared tensors to sites of the job, and nothing else to anybody."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from nvflare.apis.client import Client
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.ccwf.common import Constant
from nvflare.app_common.ccwf.swarm_client_ctl import SwarmClientController

from flare_toys import answer, fake_context, toy_state
from heterosync.errors import HeteroSyncError, UserError
from heterosync.federation.checkin import compare
from heterosync.federation.wire import WirePolicy
from heterosync.flare import messages
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.folder import is_swarm
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running.simulator import simulate
from heterosync.flare.swarm import SwarmController
from heterosync.flare.swarm_site import PeerGate, ServerGate, SwarmAggregator, SwarmExecutor
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings
from toys import SMOKE, toy_alliance

SITES = ["site-a", "site-b", "site-c"]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return make_method("hsl", None, TrainingSettings.from_dict(SMOKE)).build_model().state_dict()


def context(folder: Path, direction: str = FilterKey.OUT, **props) -> FLContext:
    made = fake_context(folder, **{FLContextKey.FILTER_DIRECTION: direction, **props})
    made.get_engine().all_clients = [Client(name, "token") for name in SITES]
    return made


def contribution(state: dict, **changes) -> Shareable:
    fields = {"method": "hsl", "round": 1, "samples": 12, "metrics": {"train_loss": 0.5}, **changes}
    message = messages.tensors_message(state, fields)
    message.set_header(AppConstants.CURRENT_ROUND, 1)
    return message


def learn(state: dict, aggregator: str = "site-b") -> Shareable:
    message = messages.tensors_message(state)
    message.set_header(AppConstants.CURRENT_ROUND, 1)
    message.set_header(AppConstants.NUM_ROUNDS, 3)
    message.set_header(Constant.AGGREGATOR, aggregator)
    return message


def final(state: dict) -> Shareable:
    message = Shareable()
    message[Constant.RESULT] = make_model_learnable(state, {"note": "P-0042"})
    message.set_header(Constant.RESULT_TYPE, "last")
    message.set_header(Constant.ROUND, 2)
    return message


@pytest.mark.parametrize("make", [contribution, learn, final])
def test_what_goes_from_site_to_site_is_made_anew_in_place_and_audited(tmp_path: Path, state, make) -> None:
    message = make(state)
    message["pixels"] = b"secret"
    message.set_header("patient", "P-0042")
    message.set_header(ReservedHeaderKey.PASS_THROUGH, True)
    assert PeerGate("hsl", {}, SMOKE).process(message, context(tmp_path)) is message
    assert "P-0042" not in str(dict(message)) and "pixels" not in message
    # tensors that are fetched later, by reference, would cross the server without encryption from site to site
    assert not message.get_header(ReservedHeaderKey.PASS_THROUGH)
    (record,) = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert record["to"] == "sites" and record["left"] and record["task"].startswith("swarm_")
    assert [item["name"] for item in record["items"]][: len(state)] == list(state)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda s: contribution({**s, "images": torch.zeros(4, 3, 32, 32)}), "tensor 'images'"),
        (lambda s: contribution(s, note="P-0042"), "field 'note'"),
        (lambda s: contribution(s, metrics={"patient": 1.0}), "metric 'patient'"),
        (lambda s: learn({**s, "images": torch.zeros(1)}), "tensor 'images'"),
        (lambda s: learn(s, "server"), "no site of this job"),
        (lambda s: final({**s, "images": torch.zeros(1)}), "tensor 'images'"),
        (lambda s: Shareable({"pixels": b"secret"}), "no data exchange object"),
    ],
)
def test_everything_else_stays_and_is_on_record(tmp_path: Path, state, make, why: str) -> None:
    with pytest.raises(HeteroSyncError) as raised:
        PeerGate("hsl", {}, SMOKE).process(make(state), context(tmp_path))
    assert "P-0042" not in str(raised.value) and "images" not in str(raised.value)
    (record,) = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert not record["left"] and record["items"] == [] and why in record["reason"]


def test_a_site_does_not_send_its_weights_where_the_server_wants_them(tmp_path: Path, state) -> None:
    gate = PeerGate("hsl", {}, SMOKE)
    coming_in = context(tmp_path, FilterKey.IN)
    assert gate.process(learn(state, "site-c"), coming_in).get_header(Constant.AGGREGATOR) == "site-c"
    for elsewhere in ("server", "site-z", "../x"):
        with pytest.raises(HeteroSyncError):
            gate.process(learn(state, elsewhere), coming_in)


def test_the_server_cannot_ask_for_weights(tmp_path: Path, state) -> None:
    gate = ServerGate("hsl", {}, SMOKE)

    def passed(task: str, message: Shareable) -> Shareable:
        return gate.process(message, context(tmp_path, **{FLContextKey.TASK_NAME: task}))

    for task in ("train", "validate", "report", "check_in"):
        reply = passed(task, contribution(state))
        assert reply.get_header(messages.REASON) == "blocked" and "DXO" not in reply
    for task in ("swarm_config", "swarm_start", "swarm_learn"):  # these answer with a code and nothing else
        reply = passed(task, messages.tensors_message(state))
        assert reply.get_return_code() == ReturnCode.OK and "DXO" not in reply
    assert messages.open_message(passed("report", messages.scalars_message({"train_loss": 0.5})))[1]


def started(folder: Path) -> tuple[SwarmAggregator, FLContext]:
    aggregator = SwarmAggregator("hsl")
    props = {AppConstants.GLOBAL_MODEL: make_model_learnable(toy_state(), {}), AppConstants.CURRENT_ROUND: 0}
    made = context(folder, **props)
    aggregator.handle_event(AppEventType.ROUND_STARTED, made)
    return aggregator, made


def test_the_swarm_fuses_with_equal_weights_its_own_contribution_included(tmp_path: Path) -> None:
    aggregator, made = started(tmp_path)
    own = answer("", toy_state(6.0), samples=1)
    own.set_peer_props({})
    made.set_peer_context(fake_context(tmp_path, "site-a"))
    assert aggregator.accept(own, made)
    assert aggregator.accept(answer("site-b", toy_state(0.0), samples=1000), made)
    assert aggregator.accept(answer("site-c", toy_state(3.0)), made)
    fused = messages.open_message(aggregator.aggregate(made))[0]
    assert torch.equal(fused["w"], torch.full((2, 3), 3.0))


def test_a_round_without_a_site_ends_the_job_and_says_why(tmp_path: Path) -> None:
    aggregator, made = started(tmp_path)
    assert aggregator.accept(answer("site-a", toy_state(1.0)), made)
    assert not aggregator.accept(answer("site-b", {**toy_state(), "w": torch.full((2, 3), float("nan"))}), made)
    with pytest.raises(HeteroSyncError, match="site-b: tensor 'w' holds values that are not finite; site site-c: no"):
        aggregator.aggregate(made)


def test_the_fusion_goes_round_among_the_sites(tmp_path: Path) -> None:
    """FLARE's draw, with what our jobs give it: over 2 K rounds more than one site fuses."""
    config = json.loads((build_job("swarm", tmp_path / "job") / "app/config/config_fed_client.json").read_text())
    (args,) = [part["executor"]["args"] for part in config["executors"] if part["tasks"] == ["swarm_*"]]
    client = SwarmClientController(**args)
    client.me, client.trainers = "site-a", ["site-a", "site-b", "site-c"]
    client.aggrs = client.trainers
    seen: list[str] = []
    client.set_learn_task = lambda task_data, fl_ctx: True
    client.send_learn_task = lambda targets, request, fl_ctx: not seen.append(request.get_header(Constant.AGGREGATOR))
    random.seed(0)
    for round_ in range(6):
        assert client._scatter(Shareable(), round_, FLContext())
    assert len(seen) == 6 and set(seen) == {"site-a", "site-b", "site-c"}


@pytest.mark.parametrize("secure", [True, False])
def test_what_goes_from_site_to_site_is_encrypted_in_secure_mode(tmp_path: Path, secure: bool) -> None:
    """Whatever FLARE's own default: the sites take it from the configuration that the server hands out."""
    server = SwarmController("hsl", training=SMOKE)
    client = SwarmClientController(**{"learn_task_name": "train", "min_responses_required": 2})
    client.config = {Constant.PRIVATE_P2P: server.private_p2p}
    assert server.private_p2p is True
    assert client.is_task_secure(fake_context(tmp_path, **{FLContextKey.SECURE_MODE: secure})) is secure
    client.config = {Constant.PRIVATE_P2P: False}
    assert not client.is_task_secure(fake_context(tmp_path, **{FLContextKey.SECURE_MODE: secure}))


def test_a_swarm_is_not_simulated_with_fewer_threads_than_sites(tmp_path: Path) -> None:
    toy_alliance(tmp_path / "data", 2)
    job = build_job("hsl", tmp_path / "job", JobOptions(topology="swarm"))
    assert is_swarm(job) and not is_swarm(tmp_path) and not is_swarm(build_job("hsl", tmp_path / "star"))
    with pytest.raises(UserError, match="this job needs one for each of its 2 sites"):
        simulate(job, tmp_path / "ws", ["site-a", "site-b"], tmp_path / "data", threads=1)


def test_the_first_weights_of_a_swarm_are_those_of_its_sites(tmp_path: Path, monkeypatch) -> None:
    """The server has no file of weights and needs none; sites whose files differ are named."""
    training = {**SMOKE, "backbone": "resnet18", "weights": "start.pth"}
    folders = toy_alliance(tmp_path / "data", 3)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    (tmp_path / "cache/checkpoints").mkdir(parents=True)
    reports = {}
    for number, (site, folder) in enumerate(folders.items()):
        monkeypatch.setenv("HETEROSYNC_DATA", str(folder.parent))
        file = tmp_path / "cache/checkpoints/start.pth"
        torch.save({"n": torch.tensor(number // 2)}, file)
        executor = SwarmExecutor("fedavg", training=training, in_process=True)
        asked = fake_context(tmp_path / site / "run", site)
        reply = executor.execute(messages.CHECK_IN, messages.scalars_message({}), asked, Signal())
        reports[site] = messages.open_message(reply)[1]
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert reports[site]["initial_weights"] == f"file sha256:{digest}"
        WirePolicy("fedavg", {}).check_report(reports[site])
    (problem,) = compare(reports)
    assert problem.startswith("site site-c: its start is file sha256:") and "put the same weights file" in problem
    file.unlink()
    gone = SwarmExecutor("fedavg", training=training, in_process=True)
    reply = gone.execute(
        messages.CHECK_IN, messages.scalars_message({}), fake_context(tmp_path / "d" / "run", "site-a"), Signal()
    )
    assert messages.failure_of(reply) == messages.REASONS["mend"]

    server = SwarmController("fedavg", training=training)
    server._prepare(fake_context(tmp_path / "server" / "run", "server"))
    server._checked_in({"site-b": reports["site-b"], "site-a": reports["site-a"]})
    server._recorder.finish("completed")
    (record,) = (json.loads(file.read_text()) for file in (tmp_path / "server/run").rglob("run.json"))
    assert record["topology"] == "swarm" and record["initial_weights"] == reports["site-a"]["initial_weights"]
