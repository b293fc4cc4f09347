"""The outbound filter: an allow-list with an audit line for every message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from flare_toys import fake_context
from heterosync.flare import messages
from heterosync.flare.filters import OutboundFilter
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings
from toys import SMOKE


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return make_method("hsl", None, TrainingSettings.from_dict(SMOKE)).build_model().state_dict()


def passed(folder: Path, task: str, message: Shareable, method: str = "hsl") -> tuple[Shareable, dict]:
    context = fake_context(folder, **{FLContextKey.TASK_NAME: task, messages.ROUND: 7})
    reply = OutboundFilter(method, {}, SMOKE).process(message, context)
    return reply, json.loads((folder / "audit.jsonl").read_text().splitlines()[-1])


def training(tensors: dict, **changes) -> Shareable:
    fields = {"method": "hsl", "round": 7, "samples": 12, "metrics": {"train_loss": 0.25, "n_train": 12}, **changes}
    return messages.tensors_message(tensors, fields)


def test_a_training_answer_passes_and_is_audited_item_by_item(tmp_path: Path, state) -> None:
    message = training(state)
    reply, record = passed(tmp_path, "train", message)
    assert reply is not message and reply.get_return_code() == ReturnCode.OK
    tensors_out, fields = messages.open_message(reply)
    assert all(tensors_out[name] is state[name] for name in state)
    metrics = {"train_loss": 0.25, "n_train": 12}
    assert fields == {"method": "hsl", "round": 7, "samples": 12, "metrics": metrics}
    assert record["task"] == "train" and record["round"] == 7 and record["left"]
    tensors = [item for item in record["items"] if item["name"] in state]
    assert [item["name"] for item in tensors] == list(state)
    assert tensors[0] == {
        "name": "encoders.0.conv1.weight",
        "shape": [8, 3, 7, 7],
        "dtype": "float32",
        "bytes": 8 * 3 * 7 * 7 * 4,
    }
    assert {item["name"] for item in record["items"]} - set(state) == {"train_loss", "n_train"}


@pytest.mark.parametrize(
    ("task", "make", "why"),
    [
        ("train", lambda s: training({**s, "images": torch.zeros(4, 3, 32, 32)}), "tensor 'images'"),
        ("train", lambda s: training({**s, "encoders.0.conv1.weight": torch.zeros(1)}), "has shape and type"),
        ("train", lambda s: training(s, metrics={"patient": 1.0}), "metric 'patient'"),
        ("train", lambda s: training(s, metrics={"train_loss": float("nan")}), "not a finite number"),
        ("train", lambda s: training(s, note="P-0042"), "field 'note'"),
        ("train", lambda s: training(s, method="P-0042"), "method that does not exist"),
        ("train", lambda s: training(s, samples="P-0042"), "field 'samples'"),
        ("validate", lambda s: messages.tensors_message({"probabilities": torch.rand(5)}), "scalars only"),
        ("validate", lambda s: messages.scalars_message({"auc": [0.1, 0.2]}), "not a finite number"),
        ("check_in", lambda s: messages.scalars_message({"site": "site-a", "folder": "/data/x"}), "field 'folder'"),
        ("check_in", lambda s: messages.scalars_message({"labels": ["a", "/data/patient/1"]}), "field 'labels'"),
        ("submit_model", lambda s: training(s), "not foreseen"),
        ("train", lambda s: Shareable(), "no data exchange object"),
    ],
)
def test_everything_else_stays(tmp_path: Path, state, task: str, make, why: str) -> None:
    reply, record = passed(tmp_path, task, make(state))
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert reply.get_header(messages.REASON) == "blocked"
    assert not record["left"] and record["items"] == [] and why in record["reason"]
    assert "P-0042" not in str(dict(reply)) and "/data" not in json.dumps(record)


def test_what_hides_beside_the_payload_stays_too(tmp_path: Path, state) -> None:
    beside = training(state)
    beside["pixels"] = b"secret"
    header = training(state)
    header.set_header("patient", "P-0042")
    for message in (beside, header):
        reply, record = passed(tmp_path, "train", message)
        assert "DXO" not in reply and not record["left"]


def test_an_error_reply_leaves_without_its_luggage(tmp_path: Path) -> None:
    full = make_reply(ReturnCode.EXECUTION_EXCEPTION, {messages.REASON: "mend", "path": "/data/P-0042.png"})
    full["trace"] = "/data/P-0042.png"
    reply, record = passed(tmp_path, "train", full)
    assert reply.get_header(messages.REASON) == "mend" and "P-0042" not in str(dict(reply))
    assert record["left"] and record["failure"] == ReturnCode.EXECUTION_EXCEPTION
    odd = make_reply(ReturnCode.EXECUTION_EXCEPTION, {messages.REASON: "/data/P-0042.png"})
    assert "P-0042" not in str(dict(passed(tmp_path, "train", odd)[0]))


def test_local_learning_lets_no_tensor_out(tmp_path: Path, state) -> None:
    assert passed(tmp_path, "train", training({}, method="local"), "local")[1]["left"]
    name, value = next(iter(state.items()))
    assert not passed(tmp_path, "train", training({name: value}, method="local"), "local")[1]["left"]


def test_without_an_audit_line_nothing_leaves(tmp_path: Path, state) -> None:
    context = fake_context(tmp_path / "run", **{FLContextKey.TASK_NAME: "train"})
    (tmp_path / "run" / "audit.jsonl").mkdir()
    reply = OutboundFilter("hsl", {}, SMOKE).process(training(state), context)
    assert reply.get_header(messages.REASON) == "blocked"


def test_wrong_settings_block_instead_of_raising(tmp_path: Path, state) -> None:
    context = fake_context(tmp_path, **{FLContextKey.TASK_NAME: "train"})
    reply = OutboundFilter("hsl", {"temprature": 1.0}, SMOKE).process(training(state), context)
    assert reply.get_header(messages.REASON) == "blocked"


@pytest.mark.parametrize("corner", ["meta", "extra"])
@pytest.mark.parametrize("task", ["validate", "check_in", "train"])
def test_nothing_hides_in_the_corners_of_the_data_exchange_object(
    tmp_path: Path, state, task: str, corner: str
) -> None:
    values = {"auc": 0.5} if task == "validate" else {"site": "site-a"}
    message = training(state) if task == "train" else messages.scalars_message(values)
    if corner == "meta" and task != "train":  # the meta of a training answer is its envelope, checked field by field
        message["DXO"]["meta"] = {"note": "P-0042"}
    else:
        message["DXO"]["pixels"] = "P-0042"
    reply, record = passed(tmp_path, task, message)
    assert record["left"] and "P-0042" not in str(dict(reply))
    assert reply.get_return_code() == ReturnCode.OK and messages.open_message(reply)[1]
