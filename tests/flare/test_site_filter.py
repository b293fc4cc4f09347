"""The site's own outbound filters act whatever a job says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.shareable import Shareable

from flare_toys import fake_context
from heterosync.errors import HeteroSyncError
from heterosync.flare import allowlist, messages
from heterosync.flare.job import JobOptions, client_config
from heterosync.flare.site_filter import AUDIT_FILE, SiteOutboundFilter, SitePeerGate
from heterosync.methods import make_method, method_names
from heterosync.training.settings import TrainingSettings
from toys import SMOKE


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return make_method("hsl", None, TrainingSettings.from_dict(SMOKE)).build_model().state_dict()


def config(method: str = "hsl") -> dict:
    return client_config(method, JobOptions(training=SMOKE))


def answer(tensors: dict, **metrics: float) -> Shareable:
    fields = {"method": "hsl", "round": 0, "samples": 12, "metrics": {"train_loss": 0.25, **metrics}}
    return messages.tensors_message(tensors, fields)


def passed(folder: Path, job: dict, task: str, message: Shareable, **policy) -> tuple[Shareable, dict]:
    """What the filter makes of an answer in a job with the client configuration `job`, and its audit line."""
    (folder / "config_fed_client.json").write_text(json.dumps(job))
    context = fake_context(folder, **{FLContextKey.TASK_NAME: task})
    context.get_engine().get_workspace().get_app_config_dir = lambda job_id: str(folder)
    reply = SiteOutboundFilter(**policy).process(message, context)
    return reply, json.loads((folder / AUDIT_FILE).read_text().splitlines()[-1])


def test_what_our_method_shares_may_leave(tmp_path: Path, state) -> None:
    reply, record = passed(tmp_path, config(), "train", answer(state))
    assert record["left"] and set(messages.open_message(reply)[0]) == set(state)
    assert {item["name"] for item in record["items"]} == {*state, "train_loss"}


@pytest.mark.parametrize("name", method_names())
def test_of_every_method_what_it_declares_may_leave_and_nothing_that_stays(tmp_path: Path, name: str) -> None:
    method = make_method(name, None, TrainingSettings.from_dict(SMOKE))
    model = method.build_model()
    state, shared = model.state_dict(), method.shared_names(model)
    reply, record = passed(tmp_path, config(name), "train", answer({key: state[key] for key in shared}))
    assert record["left"] and set(messages.open_message(reply)[0]) == set(shared)
    for key in sorted(set(state) - set(shared))[:1]:
        reply, record = passed(tmp_path, config(name), "train", answer({key: state[key]}))
        assert not record["left"] and f"tensor '{key}'" in record["reason"] and "DXO" not in reply


def test_a_job_that_leaves_its_filter_out_is_filtered_all_the_same(tmp_path: Path, state) -> None:
    job = {**config(), "task_result_filters": []}
    reply, record = passed(tmp_path, job, "train", answer({**state, "images": torch.zeros(4, 3, 32, 32)}))
    assert not record["left"] and "tensor 'images'" in record["reason"] and "DXO" not in reply


def test_a_job_cannot_widen_the_filter_by_what_it_gives_to_its_own(tmp_path: Path, state) -> None:
    job = config("local")
    job["task_result_filters"][0]["filters"][0]["args"]["method"] = "hsl"
    name, value = next(iter(state.items()))
    assert not passed(tmp_path, job, "train", answer({name: value}))[1]["left"]


@pytest.mark.parametrize("executors", [[], ["nvflare.app_common.np.np_trainer.NPTrainer"], [allowlist.EXECUTOR] * 2])
def test_a_job_of_other_executors_gets_no_answer(tmp_path: Path, state, executors: list[str]) -> None:
    entries = [{"tasks": ["train"], "executor": {"path": path, "args": {"method": "hsl"}}} for path in executors]
    reply, record = passed(tmp_path, {**config(), "executors": entries}, "train", answer(state))
    assert not record["left"] and "something else than the executor" in record["reason"] and "DXO" not in reply


def test_the_site_sets_its_own_limits(tmp_path: Path, state) -> None:
    reply, record = passed(tmp_path, config(), "train", answer(state), methods=["local"])
    assert not record["left"] and "takes no part in method hsl" in record["reason"]
    reply, record = passed(tmp_path, config(), "train", answer(state), max_megabytes=0.01)
    assert not record["left"] and "MiB are more than the 0.01" in record["reason"]
    scores = messages.scalars_message({"auc": 0.5, "n": 10, "n_positive": 4})
    reply, record = passed(tmp_path, config(), "validate", scores, withhold=["n_positive"])
    assert record["left"] and messages.open_message(reply)[1] == {"auc": 0.5, "n": 10}


@pytest.mark.parametrize("policy", [{"methods": ["hls"]}, {"withhold": ["n_positives"]}])
def test_a_misspelt_policy_does_not_load(policy: dict) -> None:
    with pytest.raises(HeteroSyncError, match="did you mean"):
        SiteOutboundFilter(**policy)


def swarm() -> dict:
    executors = [{"executor": {"path": allowlist.SWARM_EXECUTOR, "args": {"method": "hsl", "training": SMOKE}}}]
    executors += [{"executor": {"path": allowlist.SWARM_CLIENT, "args": {}}}]
    return {"format_version": 2, "executors": executors}


def test_in_a_swarm_the_server_gets_no_tensor(tmp_path: Path, state) -> None:
    assert not passed(tmp_path, swarm(), "train", answer(state))[1]["left"]
    assert passed(tmp_path, swarm(), "validate", messages.scalars_message({"auc": 0.5}))[1]["left"]


def test_to_other_sites_goes_what_a_swarm_shares_and_nothing_in_other_jobs(tmp_path: Path, state) -> None:
    def send(job: dict, message: Shareable) -> None:
        (tmp_path / "config_fed_client.json").write_text(json.dumps(job))
        context = fake_context(tmp_path, **{FLContextKey.FILTER_DIRECTION: FilterKey.OUT})
        context.get_engine().get_workspace().get_app_config_dir = lambda job_id: str(tmp_path)
        SitePeerGate().process(message, context)

    send(swarm(), answer(state))
    assert json.loads((tmp_path / AUDIT_FILE).read_text())["left"]
    with pytest.raises(HeteroSyncError, match="blocked"):
        send(swarm(), answer({**state, "images": torch.zeros(4, 3, 32, 32)}))
    with pytest.raises(HeteroSyncError, match="no swarm"):
        send(config(), answer(state))


def test_what_the_server_sends_comes_in(tmp_path: Path, state) -> None:
    context = fake_context(tmp_path, **{FLContextKey.FILTER_DIRECTION: FilterKey.IN})
    message = messages.tensors_message(state)
    assert SitePeerGate().process(message, context) is message
