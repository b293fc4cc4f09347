"""The allow-list: what is not named does not leave."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from heterosync.federation.checkin import versions
from heterosync.federation.wire import (
    CHECK_IN,
    COUPLING,
    METRICS,
    Blocked,
    WirePolicy,
    audit_lines,
    is_site_name,
    payload_bytes,
    reportable,
)
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings

REPORT = {
    "site": "site-a",
    "method": "hsl",
    "anchor_digest": "0" * 64,
    "labels": ["normal", "abnormal"],
    "model_hash": "f" * 64,
    "initial_weights": "file sha256:" + "0123456789abcdef" * 4,
    "precision": "float32",
    "versions": {"heterosync": "0.1.0", "torch": "2.15.0+cu128", "nvflare": "2.9.0rc1", "torchvision": "0.29.2"},
    "counts": {"train": 24, "validation": 4, "test": 12},
}


@pytest.fixture
def policy() -> WirePolicy:
    return WirePolicy("hsl", {"w": torch.zeros(2, 3), "n": ((), "int64")})


def test_the_declared_message_passes_as_torch_and_as_numpy(policy: WirePolicy) -> None:
    policy.check(
        {"w": torch.ones(2, 3), "n": torch.tensor(3)}, {"auc": 0.5, "n": np.int64(4), "train_loss": np.float32(1)}
    )
    policy.check({"w": np.ones((2, 3), np.float32), "n": np.int64(3)})
    policy.check({}, {})


@pytest.mark.parametrize(
    ("tensors", "metrics", "word"),
    [
        ({"images": torch.zeros(2, 3)}, {}, "images"),
        ({"w": torch.zeros(3, 2)}, {}, "shape"),
        ({"w": torch.zeros(2, 3, dtype=torch.float64)}, {}, "float64"),
        ({"w": "text"}, {}, "str"),
        ({}, {"patient": 17.0}, "patient"),
        ({}, {"auc": float("nan")}, "auc"),
        ({}, {"auc": float("inf")}, "auc"),
        ({}, {"auc": "0.5"}, "auc"),
        ({}, {"auc": [0.5]}, "auc"),
        ({}, {"auc": torch.tensor(0.5)}, "auc"),
        ({}, {"auc": True}, "auc"),
    ],
)
def test_everything_else_is_blocked_by_name(policy: WirePolicy, tensors, metrics, word: str) -> None:
    with pytest.raises(Blocked, match=word):
        policy.check(tensors, metrics)


def test_scalars_of_single_methods_leave_under_those_alone() -> None:
    told = {"label_entropy": 0.6, "n_epochs": 5, "train_accuracy": 0.9, "val_accuracy": 0.8}
    WirePolicy("adafedprox", {}).check({}, told)
    WirePolicy("feddys", {}).check({}, {"label_balance": 1.0})
    for method, name in (("feddys", "label_entropy"), ("adafedprox", "label_balance"), ("fedavg", "val_accuracy")):
        with pytest.raises(Blocked, match=f"method {method}: .*metric '{name}' is not one that this method reports"):
            WirePolicy(method, {}).check({}, {"train_loss": 0.1, name: 0.5})


def test_scores_leave_under_their_task_and_the_coupling_where_two_tasks_may_be() -> None:
    coupling = dict.fromkeys(COUPLING, 0.5)
    pictures = {"val_auc_best": 0.9, "auc": 0.9, "n_positive": 3, "ci_low": 0.8, "n": 9}
    volumes = {"val_dice_best": 0.9, "dice": 0.9, "hd95": 3.0, "n_missed": 0, "ci_low": 0.8, "n": 9}
    for method in ("hsl", "hsl_norm", "hsl_shared", "hsl_distill", "personalized", "local"):
        WirePolicy(method, {}).check({}, {**pictures, **coupling})
    WirePolicy("fedavg", {}).check({}, pictures)
    WirePolicy("prostate_ahnet", {}).check({}, volumes)
    refused = {"fedavg": coupling.keys() | volumes.keys() - pictures.keys(), "no_sat": coupling.keys()}
    refused["prostate_ahnet"] = coupling.keys() | pictures.keys() - volumes.keys()
    for method, names in refused.items():
        for name in names:
            with pytest.raises(Blocked, match=f"metric '{name}' is not one that this method reports"):
                WirePolicy(method, {}).check({}, {"train_loss": 0.1, name: 0.5})


def test_local_learning_may_send_no_tensor() -> None:
    with pytest.raises(Blocked, match="not one of the 0 shared tensors"):
        WirePolicy("local", {}).check({"w": torch.zeros(1)})


def test_check_in_fields_pass_in_their_form(policy: WirePolicy) -> None:
    policy.check_report(REPORT)
    policy.check_report({**REPORT, "anchor_digest": None, "labels": ["Gut", "Bösartig (BI-RADS 4)"]})
    policy.check_report({**REPORT, "versions": dict(versions())})
    for value in (None, "none", "imagenet"):
        policy.check_report({**REPORT, "initial_weights": value})
    assert set(REPORT) == set(CHECK_IN)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("site", "a/b"),
        ("site", ""),
        ("site", "x" * 64),
        ("anchor_digest", "0" * 63),
        ("anchor_digest", "/data/anchor"),
        ("labels", ["normal"]),
        ("labels", ["normal", "/data/images/p1.png"]),
        ("labels", ["normal", "patient1.png"]),
        ("labels", ["normal", "MRN 00412387"]),
        ("labels", ["normal", "x" * 41]),
        ("labels", ["normal", "two\nlines"]),
        ("labels", "normal"),
        ("versions", {"torch": "2.15; Jane Doe"}),
        ("versions", {"scanner": "1.0"}),
        ("counts", {"train": 1.5}),
        ("counts", {"patients": 3}),
        ("initial_weights", "/models/Jane Doe/resnet18.pth"),
        ("initial_weights", "file sha256:0123456789ab"),
        ("initial_weights", "file sha256:" + "0123456789abcdef" * 4 + " Jane"),
        ("initial_weights", 3),
        ("precision", "float64"),
        ("model_hash", "F" * 64),
        ("path", "/data"),
    ],
)
def test_check_in_fields_in_another_form_are_blocked_and_not_quoted(policy: WirePolicy, field: str, value) -> None:
    with pytest.raises(Blocked, match=f"'{field}'") as blocked:
        policy.check_report({**REPORT, field: value})
    assert not isinstance(value, str) or len(value) < 4 or value not in str(blocked.value)


def test_reportable_keeps_defined_scalars_of_the_list() -> None:
    kept = reportable({"auc": None, "accuracy": np.float64(0.5), "n": np.int64(3), "ci_low": math.nan, "secret": 1.0})
    assert kept == {"accuracy": 0.5, "n": 3} and type(kept["n"]) is int and type(kept["accuracy"]) is float
    assert "secret" not in METRICS


def test_audit_lines_say_name_shape_type_and_bytes_and_no_value() -> None:
    lines = audit_lines({"w": torch.full((2, 3), 123.0), "n": np.int64(5)}, {"auc": 0.987654})
    assert lines[0] == {"name": "w", "shape": [2, 3], "dtype": "float32", "bytes": 24}
    assert lines[1] == {"name": "n", "shape": [], "dtype": "int64", "bytes": 8}
    assert lines[2]["name"] == "auc" and "987654" not in str(lines) and "123" not in str(lines)
    assert payload_bytes({"w": torch.zeros(2, 3), "h": torch.zeros(2, dtype=torch.bfloat16)}) == 28


def test_hsl_sends_every_tensor_of_its_model_and_nothing_else(smoke: dict) -> None:
    """The audit of a full message equals the wire line of the method, key by key."""
    method = make_method("hsl", {}, TrainingSettings.from_dict(smoke))
    model = method.build_model()
    state = model.state_dict()
    shared = {name: state[name] for name in method.shared_names(model)}
    WirePolicy("hsl", shared).check(shared)
    lines = audit_lines(shared)
    assert [line["name"] for line in lines] == list(state)
    assert all(line["shape"] == list(state[line["name"]].shape) for line in lines)
    with pytest.raises(Blocked):
        WirePolicy("hsl", shared).check({**shared, "features": torch.zeros(1)})


def test_site_names() -> None:
    assert all(map(is_site_name, ["site-a", "hospital_1", "St.Mary", "A"]))
    assert not any(map(is_site_name, ["", ".", "..", "a..b", "a/b", "a b", "-a", "a.", "../x", "é"]))
