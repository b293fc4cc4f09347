"""The filter of jobs with clipped and noised updates, in its place before the outbound filter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.shareable import Shareable

from flare_toys import fake_context
from heterosync.errors import UserError
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.flare import messages
from heterosync.flare.dp_filter import NoisyUpdateFilter
from heterosync.flare.filters import OutboundFilter
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running.simulator import simulate
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings
from toys import SMOKE, toy_alliance

RECORD = Path("trainings", "first-job", "privacy.jsonl")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return make_method("hsl", None, TrainingSettings.from_dict(SMOKE)).build_model().state_dict()


def moved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in state.items()}


def answer(state: dict[str, torch.Tensor], round_: int = 0) -> Shareable:
    fields = {"method": "hsl", "round": round_, "samples": 12, "metrics": {"train_loss": 0.25}}
    return messages.tensors_message(moved(state), fields)


def through(
    folder: Path, state: dict[str, torch.Tensor], clip: float, noise: float, task: str = "train", run: str = "job-1"
) -> Shareable:
    """A site's answer after both filters; `run` names the folder of the job."""
    received = messages.tensors_message(state)
    context = fake_context(folder / run, **{FLContextKey.TASK_NAME: task, messages.ROUND: 0, messages.TASK: received})
    message = answer(state) if task == "train" else messages.scalars_message({"auc": 0.5})
    noised = NoisyUpdateFilter(clip, noise, "hsl", {}, SMOKE, "first-job").process(message, context)
    return OutboundFilter("hsl", {}, SMOKE).process(noised, context)


@pytest.mark.parametrize("name", ["fedbn", "ditto", "fedadam"])
def test_of_what_a_method_shares_all_is_noised_and_nothing_else_added(tmp_path: Path, name: str) -> None:
    method = make_method(name, None, TrainingSettings.from_dict(SMOKE))
    model = method.build_model()
    shared = {key: model.state_dict()[key] for key in method.shared_names(model)}
    context = fake_context(tmp_path / "job-1", **{FLContextKey.TASK_NAME: "train", messages.ROUND: 0})
    context.set_prop(messages.TASK, messages.tensors_message(shared), private=True, sticky=False)
    noised = NoisyUpdateFilter(2.0, 0.5, name, {}, SMOKE).process(answer(shared), context)
    sent = messages.open_message(OutboundFilter(name, {}, SMOKE).process(noised, context))[0]
    assert list(sent) == list(shared)
    assert not [
        key for key, value in moved(shared).items() if value.is_floating_point() and torch.equal(sent[key], value)
    ]


def update_norm(reply: Shareable, state: dict[str, torch.Tensor]) -> float:
    sent = messages.open_message(reply)[0]
    floats = [name for name, value in state.items() if value.is_floating_point()]
    return math.sqrt(sum(float((sent[n].double() - state[n].double()).square().sum()) for n in floats))


def test_clipped_update_passes_the_outbound_filter_and_is_on_record(tmp_path: Path, state) -> None:
    reply = through(tmp_path, state, 2.5, 0.0)
    assert update_norm(reply, state) == pytest.approx(2.5, rel=1e-4)
    sent, fields = messages.open_message(reply)
    assert fields["metrics"] == {"train_loss": 0.25}
    counter = next(name for name in state if name.endswith("num_batches_tracked"))
    assert sent[counter] == state[counter] + 1
    (release,) = map(json.loads, (tmp_path / RECORD).read_text().splitlines())
    elements = sum(value.numel() for value in state.values() if value.is_floating_point())
    assert release["norm"] == pytest.approx(math.sqrt(elements), rel=1e-4) and release["clip"] == 2.5
    (line,) = map(json.loads, (tmp_path / "job-1" / "audit.jsonl").read_text().splitlines())
    assert line["left"] and len(line["items"]) == len(state) + 1


def test_noise_has_the_size_that_the_job_says(tmp_path: Path, state) -> None:
    reply = through(tmp_path, state, 0.001, 100.0)  # noise of 0.1, an update that is nothing beside it
    sent = messages.open_message(reply)[0]
    weights = [n for n, v in state.items() if v.is_floating_point() and not n.endswith("running_var")]
    added = torch.cat([(sent[name] - state[name]).flatten() for name in weights])
    assert float(added.std()) == pytest.approx(0.1, rel=5 / math.sqrt(2 * len(added)))
    assert min(float(v.min()) for n, v in sent.items() if n.endswith("running_var")) >= 0


def test_no_noise_and_a_wide_clip_send_the_plain_answer(tmp_path: Path, state) -> None:
    sent = messages.open_message(through(tmp_path, state, 1e9, 0.0))[0]
    assert all(torch.equal(value, sent[name]) for name, value in moved(state).items())


def test_who_asks_again_and_again_gets_no_more_noise_to_average(tmp_path: Path, state) -> None:
    runs = [f"job-{i}" for i in range(SMOKE["rounds"] + 2)]  # each a job that takes up the same training
    replies = [through(tmp_path, state, 1.0, 1.0, run=run) for run in runs]
    blocked = [reply.get_header(messages.REASON) for reply in replies]
    assert blocked == [None] * SMOKE["rounds"] + ["blocked"] * 2


def test_without_the_received_model_nothing_leaves(tmp_path: Path, state) -> None:
    context = fake_context(tmp_path / "job-1", **{FLContextKey.TASK_NAME: "train"})
    reply = NoisyUpdateFilter(1.0, 1.0, "hsl", {}, SMOKE).process(answer(state), context)
    assert reply.get_header(messages.REASON) == "blocked" and "DXO" not in reply


def test_other_answers_pass_as_they_are(tmp_path: Path, state) -> None:
    assert messages.open_message(through(tmp_path, state, 1.0, 1.0, "validate"))[1] == {"auc": 0.5}
    assert not (tmp_path / RECORD).exists()


def test_the_builder_puts_it_before_the_outbound_filter_and_says_what_it_gives(tmp_path: Path) -> None:
    job = build_job("hsl", tmp_path / "job", JobOptions(dp_clip=1.5, dp_noise=4.0, training=SMOKE))
    filters = json.loads((job / "app/config/config_fed_client.json").read_text())["task_result_filters"][0]["filters"]
    assert [f["path"].rsplit(".")[-1] for f in filters] == ["NoisyUpdateFilter", "OutboundFilter"]
    assert filters[0]["args"]["clip"] == 1.5 and filters[0]["args"]["noise"] == 4.0
    readme = (job / "README.md").read_text()
    assert "--dp-clip 1.5 --dp-noise 4" in readme and "(1.36, 1e-5)-differentially private" in readme
    assert json.loads((job / "meta.json").read_text())["name"] == "hsl_dp"


@pytest.mark.flare
@pytest.mark.slow
def test_a_job_without_noise_and_with_a_wide_clip_ends_with_the_plain_model(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = toy_alliance(tmp_path / "data", 2)
    job = build_job("hsl", tmp_path / "job", JobOptions(dp_clip=1e9, training=SMOKE, in_process=True))
    result = simulate(job, tmp_path / "ws", list(data), tmp_path / "data", timeout=300, log=None)
    run_inprocess("hsl", data, tmp_path / "oracle", training=SMOKE)
    ours, theirs = (load_model(folder / "last_model.pt").state for folder in (result.results, tmp_path / "oracle"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    for folder in result.sites.values():
        releases = [
            json.loads(line) for line in next(folder.parent.glob("trainings/*/privacy.jsonl")).read_text().splitlines()
        ]
        assert [release["round"] for release in releases] == [0, 1] and all(r["norm"] > 0 for r in releases)


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("hsl", {"dp_noise": 1.0}, "set dp_clip too"),
        ("hsl", {"dp_clip": 0}, "dp_clip: 0 is not a number above 0"),
        ("hsl", {"dp_clip": 1.0, "dp_noise": -1}, "dp_noise: -1"),
        ("hsl", {"dp_clip": float("nan")}, "dp_clip"),
        ("hsl", {"dp_clip": 1.0, "topology": "swarm"}, "not in a swarm"),
        ("hsl", {"topology": "ring"}, "'ring' is not one of star, swarm"),
        ("hsl", {"topology": "swarm", "min_clients": 2}, "every site in every round"),
        ("hsl", {"topology": "swarm", "training": {"early_stop": True}}, "all its rounds"),
        ("local", {"topology": "swarm"}, "keeps its weights at the sites"),
        ("local", {"dp_clip": 1.0}, "keeps its weights at the sites"),
    ],
)
def test_options_without_sense_are_refused_before_anything_is_written(
    tmp_path: Path, method: str, options: dict, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        build_job(method, tmp_path / "job", JobOptions(**options))
    assert not (tmp_path / "job").exists()
