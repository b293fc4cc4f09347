"""The site's own outbound filters act whatever a job says."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.task_utils import apply_filters
from nvflare.fuel.utils.class_utils import instantiate_class

from flare_toys import fake_context
from heterosync.errors import HeteroSyncError, UserError
from heterosync.flare import messages
from heterosync.flare.dp_filter import RELEASES_FILE
from heterosync.flare.filters import SITE_AUDIT_FILE
from heterosync.flare.jobs import allowlist
from heterosync.flare.jobs.builder import client_config
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.kits.policy import SITE_FILTER
from heterosync.flare.site_filter import SiteOutboundFilter, SitePeerGate
from heterosync.methods import make_method, method_names
from heterosync.training.settings import TrainingSettings
from segment_toys import TINY, smoke
from toys import SMOKE


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return make_method("hsl", None, TrainingSettings.from_dict(SMOKE)).build_model().state_dict()


def config(method: str = "hsl", **options) -> dict:
    return client_config(method, JobOptions(training=smoke(method), **options))


def answer(tensors: dict, **metrics: float) -> Shareable:
    fields = {"method": "hsl", "round": 0, "samples": 12, "metrics": {"train_loss": 0.25, **metrics}}
    return messages.tensors_message(tensors, fields)


def passed(folder: Path, job: dict, task: str, message: Shareable, **policy) -> tuple[Shareable, dict]:
    """What the filter makes of an answer in a job with the client configuration `job`, and its audit line."""
    (folder / "config_fed_client.json").write_text(json.dumps(job))
    context = fake_context(folder, **{FLContextKey.TASK_NAME: task})
    context.get_engine().get_workspace().get_app_config_dir = lambda job_id: str(folder)
    reply = SiteOutboundFilter(**policy).process(message, context)
    return reply, json.loads((folder / SITE_AUDIT_FILE).read_text().splitlines()[-1])


def test_what_our_method_shares_may_leave(tmp_path: Path, state) -> None:
    reply, record = passed(tmp_path, config(), "train", answer(state))
    assert record["left"] and set(messages.open_message(reply)[0]) == set(state)
    assert {item["name"] for item in record["items"]} == {*state, "train_loss"}


@pytest.mark.parametrize("name", method_names())
def test_of_every_method_what_it_declares_may_leave_and_nothing_that_stays(tmp_path: Path, name: str) -> None:
    method = make_method(name, None, smoke(name))
    model = method.build_model("none")
    state, shared = model.state_dict(), method.returned_names(model)
    reply, record = passed(tmp_path, config(name), "train", answer({key: state[key] for key in shared}))
    if method.topology == "swarm":
        assert not record["left"] and "in a swarm the server gets no weights" in record["reason"]
        return
    assert record["left"] and set(messages.open_message(reply)[0]) == set(shared)
    for key in sorted(set(state) - set(shared))[:1]:
        reply, record = passed(tmp_path, config(name), "train", answer({key: state[key]}))
        assert not record["left"] and f"tensor '{key}'" in record["reason"] and "DXO" not in reply


def test_the_steps_of_a_cut_network_meet_the_sites_own_policy(tmp_path: Path) -> None:
    parcel = {"features": torch.zeros(4, 8, 8, 8, dtype=torch.float16), "labels": torch.zeros(4)}
    job = {**config("splitavg"), "task_result_filters": []}  # whatever the job says
    reply, record = passed(tmp_path, job, "exchange", messages.tensors_message(parcel))
    assert record["left"] and set(messages.open_message(reply)[0]) == {"features", "labels"}
    for policy, why in (
        ({"methods": ["hsl"]}, "takes no part in method splitavg"),
        ({"max_megabytes": 0.001}, "MiB are more than the 0.001"),
        ({"max_clip": 1.0}, "only clipped and noised updates leave this site"),
    ):
        reply, record = passed(tmp_path, job, "exchange", messages.tensors_message(parcel), **policy)
        assert not record["left"] and why in record["reason"] and "DXO" not in reply
    reply, record = passed(tmp_path, config("hsl"), "exchange", messages.tensors_message(parcel))
    assert not record["left"] and "is not one that the method sends" in record["reason"]


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


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"methods": ["hls"]}, "did you mean"),
        ({"withhold": ["n_positives"]}, "did you mean"),
        ({"min_noise": 1.0}, "min_noise without max_clip"),
        ({"max_clip": 0}, "max_clip 0 is no number above 0"),
        ({"max_clip": 1.0, "min_noise": "2"}, "min_noise '2'"),
        ({"max_rounds": float("nan")}, "max_rounds"),
        ({"max_megabytes": None}, "max_megabytes None is no number above 0"),
        ({"withhold": "n_positive"}, "'n_positive' as a list"),
        ({"withold": ["n_positive"]}, "'withold' is no key of this filter: did you mean 'withhold'"),
    ],
)
def test_a_policy_with_mistakes_does_not_load(policy: dict, why: str) -> None:
    with pytest.raises(UserError, match=why):
        SiteOutboundFilter(**policy)
    with pytest.raises(UserError, match=why):  # and the same words where FLARE builds it at the start of a job
        instantiate_class(SITE_FILTER, policy)


# -- clipped and noised updates, because the site says so --------------------------------------------------------------


def sent(folder: Path, job: dict, state: dict, round_: int = 0, **policy) -> tuple[Shareable, list[dict]]:
    """What leaves of an update by one in every element, after the filters of the site and then the job's, in the order
    of FLARE's own function; and the releases on record."""
    (folder / "config_fed_client.json").write_text(json.dumps(job))
    received = messages.tensors_message(state)
    props = {FLContextKey.TASK_NAME: "train", messages.TASK: received, messages.ROUND: round_}
    context = fake_context(folder / "job-1", **props)
    context.get_engine().get_workspace().get_app_config_dir = lambda job_id: str(folder)
    scope = SimpleNamespace(task_result_filters={FilterKey.OUT: [SiteOutboundFilter(**policy)]})
    context.set_prop(FLContextKey.SCOPE_OBJECT, scope, private=True, sticky=False)
    of_job = []
    for part in job["task_result_filters"][0]["filters"]:
        module, name = part["path"].rsplit(".", 1)
        of_job.append(getattr(import_module(module), name)(**part["args"]))
    message = answer({name: value + 1 for name, value in state.items()})
    chains = {f"train{FilterKey.DELIMITER}{FilterKey.OUT}": of_job}
    reply = apply_filters("task_result_filters", message, context, chains, "train", FilterKey.OUT)
    record = folder / "trainings" / "job-1" / RELEASES_FILE
    return reply, [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def update_norm(reply: Shareable, state: dict) -> float:
    tensors = messages.open_message(reply)[0]
    floats = [name for name, value in state.items() if value.is_floating_point()]
    return math.sqrt(sum(float((tensors[n].double() - state[n].double()).square().sum()) for n in floats))


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({}, 2.5),  # the job says nothing
        ({"dp_clip": 9.0}, 2.5),  # the job would clip less
        ({"dp_clip": 0.5}, 0.5),  # the job clips more
    ],
)
def test_the_site_clips_itself_whatever_the_job_says(tmp_path: Path, state, options: dict, clip: float) -> None:
    reply, releases = sent(tmp_path, config(**options), state, max_clip=2.5)
    assert update_norm(reply, state) == pytest.approx(clip, rel=1e-3)
    assert [release["clip"] for release in releases] == [clip]  # once, not by site and job both


@pytest.mark.parametrize(
    ("options", "noise"),
    [({}, 50.0), ({"dp_clip": 0.001, "dp_noise": 1.0}, 50.0), ({"dp_clip": 1.0, "dp_noise": 99.0}, 99.0)],
)
def test_the_site_noises_itself_whatever_the_job_says(tmp_path: Path, state, options: dict, noise: float) -> None:
    reply, releases = sent(tmp_path, config(**options), state, max_clip=0.001, min_noise=50.0)
    tensors = messages.open_message(reply)[0]
    weights = [n for n, v in state.items() if v.is_floating_point() and not n.endswith("running_var")]
    added = torch.cat([(tensors[name] - state[name]).flatten() for name in weights])
    assert float(added.std()) == pytest.approx(0.001 * noise, rel=0.05)
    assert [(release["clip"], release["noise"]) for release in releases] == [(0.001, noise)]


def test_without_a_demand_of_the_site_the_job_noises(tmp_path: Path, state) -> None:
    reply, releases = sent(tmp_path, config(dp_clip=1.5), state)
    assert update_norm(reply, state) == pytest.approx(1.5, rel=1e-3) and [r["clip"] for r in releases] == [1.5]


def test_a_site_that_noises_lets_no_more_releases_out_than_there_are_rounds(tmp_path: Path, state) -> None:
    replies = [sent(tmp_path, config(), state, max_clip=1.0, min_noise=1.0)[0] for _ in range(SMOKE["rounds"] + 1)]
    assert [reply.get_header(messages.REASON) for reply in replies] == [None] * SMOKE["rounds"] + ["blocked"]


@pytest.mark.parametrize("clip", [-1000.0, float("inf"), 0])
def test_numbers_of_a_job_that_are_none_let_nothing_out(tmp_path: Path, state, clip: float) -> None:
    job = config(dp_clip=1.0)
    job["task_result_filters"][0]["filters"][0]["args"]["clip"] = clip
    reply, record = passed(tmp_path, job, "check_in", messages.scalars_message({}), max_clip=2.0)
    assert (not record["left"] and "no numbers that can be used" in record["reason"]) == (clip <= 0)


@pytest.mark.parametrize(
    ("job", "policy", "why"),
    [
        ("scaffold", {"max_clip": 1.0}, "method scaffold sends more than an update of what a site received"),
        ("swarm", {"max_clip": 1.0}, "method hsl goes from site to site in a swarm"),
        ("hsl", {"max_rounds": SMOKE["rounds"] - 1}, "the training has 2 rounds, local/privacy.json allows 1"),
        ("hsl", {"max_rounds": SMOKE["rounds"], "max_clip": 1.0, "min_noise": 2.0}, ""),
        (
            "prostate_ahnet",
            {"max_rounds": TINY["rounds"] - 1},
            "3 rounds, local/privacy.json allows 2",
        ),
        ("prostate_ahnet", {"max_rounds": TINY["rounds"]}, ""),
        ("local", {"max_clip": 1.0}, ""),  # no weight leaves
    ],
)
def test_what_cannot_keep_to_the_policy_gets_no_answer_before_round_0(
    tmp_path: Path, job: str, policy: dict, why: str
) -> None:
    report = messages.scalars_message({"site": "site-a", "labels": ["a", "b"]})
    reply, record = passed(tmp_path, swarm() if job == "swarm" else config(job), "check_in", report, **policy)
    assert record["left"] == (why == "") and why in record.get("reason", "")


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
    assert json.loads((tmp_path / SITE_AUDIT_FILE).read_text())["left"]
    with pytest.raises(HeteroSyncError, match="blocked"):
        send(swarm(), answer({**state, "images": torch.zeros(4, 3, 32, 32)}))
    with pytest.raises(HeteroSyncError, match="no swarm"):
        send(config(), answer(state))


def test_what_the_server_sends_comes_in(tmp_path: Path, state) -> None:
    context = fake_context(tmp_path, **{FLContextKey.FILTER_DIRECTION: FilterKey.IN})
    message = messages.tensors_message(state)
    assert SitePeerGate().process(message, context) is message
