"""The controller with played sites: order of the tasks, choice of the best model, and how it stops."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from nvflare.apis.shareable import Shareable

from flare_toys import FakeFederation, plain_site
from heterosync.errors import UserError
from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import load_model
from heterosync.federation.server import memory_of
from heterosync.flare import messages
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings
from toys import SMOKE

SITES = ["site-a", "site-b", "site-c"]


def scripted(aucs: list[float]):
    """Sites whose AUC of the model after r rounds is aucs[r], and whose weights after training are all r + 1."""

    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        if task == messages.VALIDATE and message.get_header(messages.SPLIT) == "validation":
            return plain_site(name, task, round_, message, auc=aucs[-1])
        if task != messages.TRAIN:
            return plain_site(name, task, round_, message)
        tensors, _ = messages.open_message(message)
        moved = {key: torch.full_like(value, round_ + 1) for key, value in tensors.items()}
        fields = {"method": "hsl", "round": round_, "samples": 10}
        return messages.tensors_message(moved, {**fields, "metrics": {"val_auc_received": aucs[round_]}})

    return site


def value_of(path: Path) -> float:
    return (
        float(load_model(path).state["gates.0.weight"].mean())
        if "gates.0.weight" in load_model(path).state
        else float(next(iter(load_model(path).state.values())).float().mean())
    )


@pytest.mark.parametrize(
    ("aucs", "best"),
    [
        ([0.9, 0.6, 0.8, 0.7], 2),  # model 0, the initial one, is never best
        ([0.5, 0.6, 0.7, 0.8], 3),  # the last fusion counts
        ([0.5, 0.8, 0.7, 0.8], 3),  # ties go to the later
        ([0.5, 0.8, 0.7, 0.6], 1),
    ],
)
def test_the_best_model_is_chosen_over_all_rounds_and_the_last_fusion(
    tmp_path: Path, aucs: list[float], best: int
) -> None:
    run = FakeFederation(tmp_path, SITES, scripted(aucs), training={"rounds": 3}).play()
    assert run.reasons == []
    assert run.asked == [("check_in", 0), ("train", 0), ("train", 1), ("train", 2)] + [("validate", 3)] * 3
    assert run.read("run.json")["best_round"] == best
    assert value_of(tmp_path / "best_model.pt") == best and load_model(tmp_path / "best_model.pt").round == best
    assert value_of(tmp_path / "last_model.pt") == 3
    assert sorted(run.read("cross_site_metrics.json")) == ["best", "last"]
    assert load_model(tmp_path / "last_model.pt").labels == ("normal", "abnormal")


def test_early_stop_ends_the_rounds_and_the_job_is_completed(tmp_path: Path) -> None:
    training = {"rounds": 9, "early_stop": True, "plateau_count": 2, "plateau_gain": 0.01}
    run = FakeFederation(tmp_path, SITES, scripted([0.5, 0.7] + [0.7] * 9), training=training).play()
    rounds = [round_ for task, round_ in run.asked if task == "train"]
    assert run.reasons == [] and rounds == [0, 1, 2, 3]  # models 2 and 3 gained nothing over the one before
    assert run.read("run.json")["status"] == "completed" and run.read("run.json")["plateau_round"] == 3


def test_equal_fusion_over_the_sites(tmp_path: Path) -> None:
    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        reply = plain_site(name, task, round_, message)
        if task != messages.TRAIN:
            return reply
        tensors, fields = messages.open_message(reply)
        moved = {key: torch.full_like(value, SITES.index(name)) for key, value in tensors.items()}
        return messages.tensors_message(moved, {**fields, "samples": 10 ** SITES.index(name)})

    run = FakeFederation(tmp_path, SITES, site, training={"rounds": 1}).play()
    assert run.reasons == [] and value_of(tmp_path / "last_model.pt") == 1.0


def one_fails(which: str, reply) -> object:
    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable | None:
        if name == which and task == messages.TRAIN and round_ == 1:
            return reply() if callable(reply) else reply
        return plain_site(name, task, round_, message)

    return site


@pytest.mark.parametrize("reply", [lambda: messages.refusal("died"), None, lambda: messages.tensors_message({})])
def test_a_missing_contribution_stops_a_job_that_needs_all(tmp_path: Path, reply) -> None:
    run = FakeFederation(tmp_path, SITES, one_fails("site-b", reply), training={"rounds": 3}).play()
    (reason,) = run.reasons
    assert reason.startswith("round 1: fewer than the 3 sites") and "site site-b: " in reason and "\n" not in reason
    assert [task for task, _ in run.asked] == ["check_in", "train", "train"]
    record = run.read("run.json")
    assert record["status"] == f"failed: {reason}" and len(record["rounds"]) == 1
    assert load_model(tmp_path / "last_model.pt").round == 1  # the last good model is kept


@pytest.mark.parametrize("reply", [lambda: messages.refusal("mend"), None, lambda: messages.tensors_message({})])
def test_a_job_that_needs_two_goes_on_and_says_who_was_missing(tmp_path: Path, reply) -> None:
    run = FakeFederation(tmp_path, SITES, one_fails("site-b", reply), min_clients=2, training={"rounds": 3}).play()
    assert run.reasons == []
    rounds = run.read("run.json")["rounds"]
    assert [r["contributors"] for r in rounds] == [SITES, ["site-a", "site-c"], SITES]
    assert list(rounds[1]["refused"]) == ["site-b"] and rounds[1]["refused"]["site-b"]
    assert rounds[0]["refused"] == {} == rounds[2]["refused"]


def test_anchors_that_differ_stop_the_job_before_round_0(tmp_path: Path) -> None:
    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        digest = ("f" if name == "site-b" else "0") * 64
        return plain_site(name, task, round_, message, **({"anchor_digest": digest} if task == "check_in" else {}))

    run = FakeFederation(tmp_path / "a", SITES, site).play()
    assert [task for task, _ in run.asked] == ["check_in"]
    assert "site-b" in run.reasons[0] and "anchor" in run.reasons[0] and "site-c" not in run.reasons[0]
    assert FakeFederation(tmp_path / "b", SITES, site, anchors_may_differ=True).play().reasons == []


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"method_settings": {"temprature": 3}}, "did you mean 'temperature'"),
        ({"training": {"rounds": "many"}}, "rounds"),
        ({"training": {"speed": 2}}, "speed"),
        ({"method": "hls"}, "did you mean 'hsl'"),
        ({"min_clients": 4}, "min_clients is 4"),
    ],
)
def test_wrong_settings_stop_the_job_with_one_line(tmp_path: Path, args: dict, text: str) -> None:
    run = FakeFederation(tmp_path, SITES, **args).play()
    assert text in run.reasons[0] and "\n" not in run.reasons[0] and run.asked == []


def test_a_single_site_is_no_federation(tmp_path: Path) -> None:
    assert "at least 2" in FakeFederation(tmp_path, ["site-a"]).play().reasons[0]


def test_local_learning_needs_no_model_at_the_server(tmp_path: Path) -> None:
    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        assert messages.open_message(message)[0] == {}
        return plain_site(name, task, round_, message, method="local")

    run = FakeFederation(tmp_path, SITES, site, method="local").play()
    assert run.reasons == [] and [task for task, _ in run.asked] == ["check_in", "train", "train", "validate"]
    assert list(run.read("cross_site_metrics.json")) == ["local"] and not list(tmp_path.glob("*.pt"))


def test_the_model_is_not_copied_for_the_broadcast(tmp_path: Path) -> None:
    seen = set()

    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        if task == messages.TRAIN and round_ == 0:
            seen.add(next(iter(messages.open_message(message)[0].values())).data_ptr())
        return plain_site(name, task, round_, message)

    run = FakeFederation(tmp_path, SITES, site)
    run.play()
    assert len(seen) == 1


def test_what_a_transfer_leaves_behind_is_gone_after_its_task(tmp_path: Path) -> None:
    class Transfer:  # as FLARE's: a task and its future hold each other, and the bytes
        def __init__(self) -> None:
            self.me = self

    left: list[weakref.ref] = []

    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        assert round_ == 0 or task != messages.TRAIN or left[0]() is None
        left.append(weakref.ref(Transfer()))
        return plain_site(name, task, round_, message)

    gc.disable()
    try:
        assert FakeFederation(tmp_path, SITES, site).play().reasons == []
    finally:
        gc.enable()
    assert len(left) > 3 and not any(reference() for reference in left)


def test_an_abort_is_recorded(tmp_path: Path) -> None:
    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        if task == messages.TRAIN and round_ == 1:
            run.abort_signal.trigger(True)
        return plain_site(name, task, round_, message)

    run = FakeFederation(tmp_path, SITES, site, training={"rounds": 3})
    run.play()
    assert run.reasons == [] and run.read("run.json")["status"].startswith("stopped")


def test_a_site_that_did_not_check_in_takes_no_part(tmp_path: Path) -> None:
    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        if name == "site-b":
            assert task == messages.CHECK_IN  # nothing else is ever asked of it
            return messages.refusal("blocked")
        if task == messages.TRAIN:  # it sends a model all the same
            stray = plain_site("site-b", task, round_, message)
            run.controller._accept_train_result("site-b", stray, run.context)
        return plain_site(name, task, round_, message)

    run = FakeFederation(tmp_path, SITES, site, min_clients=2)
    run.play()
    record = run.read("run.json")
    assert run.reasons == [] and record["status"] == "completed" and record["sites"] == ["site-a", "site-c"]
    assert list(record["not_checked_in"]) == ["site-b"]
    for round_ in record["rounds"]:
        assert round_["contributors"] == ["site-a", "site-c"]
        assert round_["refused"] == {"site-b": "it did not pass the check-in"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": ["normal", "/data/P-0042"]}, "check-in field 'labels'"),
        ({"folder": "x"}, "check-in field 'folder'"),
        ({"site": "site-c"}, "in the name of another site"),
        ({"model_hash": None}, "check-in field 'model_hash'"),
    ],
)
def test_the_server_trusts_no_check_in(tmp_path: Path, changes: dict, reason: str) -> None:
    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        spoilt = changes if (name, task) == ("site-b", messages.CHECK_IN) else {}
        return plain_site(name, task, round_, message, **spoilt)

    run = FakeFederation(tmp_path, SITES, site).play()
    assert run.asked == [("check_in", 0)] and reason in run.reasons[0] and "site site-b: " in run.reasons[0]
    assert "P-0042" not in run.reasons[0]


def test_a_check_in_with_a_field_missing_is_refused(tmp_path: Path) -> None:
    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        return messages.scalars_message({"site": name}) if name == "site-b" else plain_site(name, task, round_, message)

    assert "it lacks method, anchor_digest, labels" in FakeFederation(tmp_path, SITES, site).play().reasons[0]


@pytest.mark.parametrize("bad", [float("nan"), "0.5", True])
def test_the_server_trusts_no_score(tmp_path: Path, bad: object) -> None:
    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        spoilt = name == "site-b" and task != messages.CHECK_IN
        return plain_site(name, task, round_, message, **({"auc": bad} if spoilt else {}))

    run = FakeFederation(tmp_path, SITES, site, min_clients=2, training={"rounds": 1}).play()
    (round_,) = run.read("run.json")["rounds"]
    assert run.reasons == [] and "not a finite number" in round_["refused"]["site-b"]
    assert sorted(run.read("cross_site_metrics.json")["best"]) == ["mean", "site-a", "site-c"]


@pytest.mark.parametrize("handler", ["controller.keep_as_best", "supervised.RunRecorder.round_done"])
def test_an_error_in_an_event_handler_stops_the_job(tmp_path: Path, monkeypatch, handler: str) -> None:
    def full(*args, **options) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"heterosync.flare.{handler}", full)
    run = FakeFederation(tmp_path, SITES, training={"rounds": 3}).play()
    assert run.reasons == ["OSError: [Errno 28] No space left on device"]
    assert run.read("run.json")["status"] == f"failed: {run.reasons[0]}"
    assert [task for task, _ in run.asked].count("validate") == 0


@pytest.mark.parametrize("broken", ["Server", "Server.start"])
def test_an_error_in_the_aggregators_event_handler_stops_the_job(tmp_path: Path, monkeypatch, broken: str) -> None:
    def full(*args, **options) -> None:
        raise UserError("cannot write contributions: the disk is full")

    monkeypatch.setattr(f"heterosync.flare.aggregator.{broken}", full)
    run = FakeFederation(tmp_path, SITES).play()
    assert run.reasons == ["cannot write contributions: the disk is full"]
    assert run.read("run.json")["status"] == f"failed: {run.reasons[0]}"
    assert "train" not in [task for task, _ in run.asked]


def test_an_error_while_an_answer_is_taken_stops_the_job(tmp_path: Path, monkeypatch) -> None:
    def broken(*args, **options) -> None:
        raise RuntimeError("no such site")

    monkeypatch.setattr("heterosync.flare.supervised.RunRecorder.site_done", broken)
    run = FakeFederation(tmp_path, SITES).play()
    assert run.read("run.json")["status"] == "failed: RuntimeError: no such site"
    assert [task for task, _ in run.asked] == ["check_in", "train"]


def test_a_full_disk_at_the_server_is_named_as_the_cause(tmp_path: Path, monkeypatch) -> None:
    def full(*args, **options) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("heterosync.flare.persistor.save_model", full)
    run = FakeFederation(tmp_path, SITES).play()
    status = run.read("run.json")["status"]
    assert status.startswith("failed: ") and "No space left on device" in status
    assert [task for task, _ in run.asked] == ["check_in", "train"]


def test_an_unforeseen_error_after_the_rounds_fails_the_job_with_its_cause(tmp_path: Path, monkeypatch) -> None:
    def broken(*args) -> None:
        raise RuntimeError("no such model")

    monkeypatch.setattr("heterosync.flare.controller.load_model", broken)
    run = FakeFederation(tmp_path, SITES).play()
    assert run.read("run.json")["status"] == "failed: RuntimeError: no such model"


@pytest.mark.parametrize(("rounds", "best"), [(2, 1), (1, None)])
def test_a_last_fusion_that_too_few_can_score_is_not_best_but_is_tested(
    tmp_path: Path, rounds: int, best: int | None
) -> None:
    play = scripted([0.5, 0.6, 0.9][: rounds + 1])

    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable | None:
        if name == "site-b" and message.get_header(messages.SPLIT) == "validation":
            return None
        return play(name, task, round_, message)

    run = FakeFederation(tmp_path, SITES, site, training={"rounds": rounds}).play()
    record = run.read("run.json")
    assert record["status"] == f"failed: {run.reasons[0]}" and "\n" not in run.reasons[0]
    assert run.reasons[0].startswith("the validation of model 'last': fewer than the 3 sites")
    assert f"site site-b: {messages.NO_ANSWER}" in run.reasons[0] and "site-c" not in run.reasons[0]
    assert record["not_validated"] == {"site-b": messages.NO_ANSWER} and record["best_round"] == best
    tests = run.read("cross_site_metrics.json")
    assert sorted(tests) == ([] if best is None else ["best"]) + ["last"]
    assert all({*SITES} <= set(sites) for sites in tests.values())
    assert (tmp_path / "best_model.pt").exists() == (best is not None)
    assert best is None or value_of(tmp_path / "best_model.pt") == best
    assert value_of(tmp_path / "last_model.pt") == rounds


def test_a_last_fusion_that_enough_sites_score_is_judged_by_them(tmp_path: Path) -> None:
    play = scripted([0.5, 0.6, 0.9])

    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        if name == "site-b" and message.get_header(messages.SPLIT) == "validation":
            return messages.refusal("died")
        return play(name, task, round_, message)

    run = FakeFederation(tmp_path, SITES, site, min_clients=2).play()
    record = run.read("run.json")
    assert record["status"] == "completed" and record["best_round"] == 2
    assert record["not_validated"] == {"site-b": messages.REASONS["died"]}


def test_a_site_that_fails_a_test_costs_no_other_result(tmp_path: Path) -> None:
    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        if name == "site-b" and message.get_header(messages.SPLIT) == "test":
            return messages.refusal("died")
        return plain_site(name, task, round_, message)

    for folder, least, status in ((tmp_path / "a", 2, "completed"), (tmp_path / "b", 0, "failed: the test of model")):
        run = FakeFederation(folder, SITES, site, min_clients=least).play()
        record, tests = run.read("run.json"), run.read("cross_site_metrics.json")
        assert record["status"].startswith(status)
        assert record["not_tested"] == {m: {"site-b": messages.REASONS["died"]} for m in ("best", "last")}
        assert {m: sorted(tests[m]) for m in tests} == {m: ["mean", "site-a", "site-c"] for m in ("best", "last")}


# -- methods that need more than a mean --------------------------------------------------------------------------------


def of_method(name: str):
    """Sites that send back what they got, in the name of a method without anchor task."""
    return lambda *task, **more: plain_site(*task, method=name, anchor_digest=None, **more)


def test_a_personal_method_is_tested_with_the_sites_own_models(tmp_path: Path) -> None:
    run = FakeFederation(tmp_path, ["site-a", "site-b"], of_method("fedbn"), method="fedbn").play()
    assert run.reasons == [] and set(run.read("cross_site_metrics.json")) == {"local", "last"}


def test_what_the_server_remembers_is_in_the_model_file(tmp_path: Path) -> None:
    def site(name: str, task: str, round_: int, message):
        reply = of_method("fedadam")(name, task, round_, message)
        if task == messages.TRAIN:
            tensors, fields = messages.open_message(reply)
            moved = {key: value + 0.5 if value.is_floating_point() else value for key, value in tensors.items()}
            return messages.tensors_message(moved, fields)
        return reply

    settings = {"server_lr": 0.25, "tau": 0.01}
    args = {"method": "fedadam", "method_settings": settings}
    run = FakeFederation(tmp_path, ["site-a", "site-b"], site, **args).play()
    assert run.reasons == []
    file = load_model(tmp_path / "last_model.pt")
    method = make_method("fedadam", settings, TrainingSettings.from_dict(SMOKE))
    state, memory = initial_state(method), method.server_memory(())
    for _ in range(2):
        mean = {key: value + 0.5 if value.is_floating_point() else value for key, value in state.items()}
        state = method.combine(state, mean, memory, 2)
    assert all(torch.equal(file.state[key], value) for key, value in state.items())
    assert {key: float(value.sum()) for key, value in memory_of(file.assets).items()} == {
        key: float(value.sum()) for key, value in memory.items()
    }


def test_where_all_are_needed_one_missing_site_ends_the_job(tmp_path: Path) -> None:
    def site(name: str, task: str, round_: int, message):
        if name == "site-c" and task == messages.TRAIN and round_ == 1:
            return messages.refusal("died")
        return of_method("personalized")(name, task, round_, message)

    args = {"method": "personalized", "method_settings": {"use_sat": False}, "min_clients": 2}
    run = FakeFederation(tmp_path, ["site-a", "site-b", "site-c"], site, **args).play()
    assert len(run.reasons) == 1 and "fewer than the 3 sites" in run.reasons[0] and "site-c" in run.reasons[0]
    assert int(load_model(tmp_path / "last_model.pt").state["sites"]) == 3


def test_central_learning_is_refused_as_a_federation(tmp_path: Path) -> None:
    run = FakeFederation(tmp_path / "two", ["site-a", "site-b"], of_method("central"), method="central").play()
    assert run.reasons == ["method 'central' is no federation: run it with one site that holds all images"]
    one = FakeFederation(tmp_path / "one", ["alliance"], of_method("central"), method="central").play()
    assert one.reasons == [] and set(one.read("cross_site_metrics.json")) == {"best", "last"}


def test_a_site_without_training_data_receives_and_the_server_remembers_nothing_of_it(tmp_path: Path) -> None:
    """Of a method that sends sites different scalars, but makes one model."""
    asked: list[tuple[str, str, object]] = []

    def site(name: str, task: str, round_: int, message: Shareable) -> Shareable:
        asked.append((name, task, message.get_header(messages.SPLIT)))
        train = {"counts": {"train": 0 if name == "outside" else 10}}
        reply = plain_site(name, task, round_, message, method="feddps", **(train if task == messages.CHECK_IN else {}))
        if task == messages.TRAIN:
            tensors, fields = messages.open_message(reply)
            del tensors["rate"]
            told = {"joined": torch.tensor(8), "profile": torch.full((64,), 1.0 + ord(name[-1]))}
            reply = messages.tensors_message({**tensors, **told}, fields)
        elif task == messages.VALIDATE:
            rate = float(messages.open_message(message)[0]["rate"])
            assert rate == 1.0 if name == "outside" else rate in (0.0, 1.0)
        return reply

    run = FakeFederation(tmp_path, [*SITES, "outside"], site, method="feddps", method_settings={"m_select": 1}).play()
    assert run.reasons == []
    record = run.read("run.json")
    assert record["status"] == "completed" and record["receivers"] == ["outside"]
    assert set(run.aggregator.reports) == set(SITES) and {name for name, *_ in asked} == {*SITES, "outside"}
    assert {entry for entry in asked if entry[0] == "outside"} == {
        ("outside", messages.CHECK_IN, None),
        ("outside", messages.VALIDATE, "test"),
    }
    memory = memory_of(load_model(tmp_path / "last_model.pt").assets)
    assert {name for name in memory if name.startswith("told.")} == {f"told.{name}" for name in SITES}
    assert all("outside" in sites for sites in run.read("cross_site_metrics.json").values())
