"""Model files, check-in, scoreboard and the record of a run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torchvision.models import resnet18

from heterosync.errors import UserError
from heterosync.federation.checkin import compare, model_hash, versions
from heterosync.federation.initial import initial_state, state_hash
from heterosync.federation.modelfile import keep_as_best, load_model, save_model
from heterosync.federation.results import RunRecorder, read_history
from heterosync.federation.scoreboard import Scoreboard
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings

# -- model files -------------------------------------------------------------------------------------------------------


def saved(path: Path, smoke: dict, **changes) -> dict[str, torch.Tensor]:
    method = make_method("hsl", {"temperature": 2.0}, TrainingSettings.from_dict(smoke))
    state = initial_state(method)
    options = {"labels": ("normal", "abnormal"), "round_": 7, "extra": {"partners": torch.zeros(2, 3, 32, 32).byte()}}
    save_model(path, "hsl", method.settings, method.training, {**state, **changes}, **options)
    return state


@pytest.mark.parametrize("links", [True, False])
def test_the_best_model_is_the_last_one_of_its_time(tmp_path: Path, monkeypatch, links: bool) -> None:
    def no_links(*_: object) -> None:
        raise OSError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    last, best = tmp_path / "last_model.pt", tmp_path / "best_model.pt"
    for round_ in (1, 2):
        save_model(last, "local", {}, {}, {"w": torch.tensor([float(round_)])}, round_=round_)
        keep_as_best(tmp_path)
        assert load_model(best).round == round_ and last.samefile(best) == links
    save_model(last, "local", {}, {}, {}, round_=3)
    assert load_model(best).round == 2 and sorted(tmp_path.iterdir()) == [best, last]


def test_a_model_file_gives_back_what_was_saved(tmp_path: Path, smoke: dict) -> None:
    state = saved(tmp_path / "m.pt", smoke)
    loaded = load_model(tmp_path / "m.pt", "hsl")
    assert (loaded.method, loaded.labels, loaded.round) == ("hsl", ("normal", "abnormal"), 7)
    assert loaded.method_settings["temperature"] == 2.0 and loaded.training["image_size"] == 32
    assert loaded.assets["partners"].dtype == torch.uint8 and "torch" in loaded.versions
    assert state_hash(loaded.state) == state_hash(state)
    method, model = loaded.build()
    assert method.settings.temperature == 2.0 and not model.training
    assert state_hash(model.state_dict()) == state_hash(state)
    assert json.dumps([loaded.method_settings, loaded.training, loaded.versions])  # plain values only


def test_a_model_file_opens_where_its_first_weights_are_not(tmp_path: Path, smoke: dict, monkeypatch) -> None:
    full = {**smoke, "backbone": "resnet18", "weights": str(tmp_path / "start.pth")}
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "start.pth")
    method = make_method("local", {}, TrainingSettings.from_dict(full))
    state = method.build_model().state_dict()
    digest = hashlib.sha256((tmp_path / "start.pth").read_bytes()).hexdigest()
    source = f"file sha256:{digest}"
    save_model(tmp_path / "m.pt", "local", {}, method.training, {})
    assert load_model(tmp_path / "m.pt").versions["initial_weights"] == source
    (tmp_path / "start.pth").unlink()
    save_model(tmp_path / "n.pt", "local", {}, full, {}, versions=load_model(tmp_path / "m.pt").versions)
    assert load_model(tmp_path / "n.pt").versions["initial_weights"] == source  # written again elsewhere
    save_model(tmp_path / "o.pt", "local", {}, full, {})
    assert load_model(tmp_path / "o.pt").versions["initial_weights"] == "unknown"
    monkeypatch.setattr(type(method), "weighting", "equal")
    save_model(tmp_path / "m.pt", "local", {}, full, state)
    _, model = load_model(tmp_path / "m.pt").build()
    assert state_hash(model.state_dict()) == state_hash(state)


def test_unusable_model_files_are_named(tmp_path: Path, smoke: dict) -> None:
    path = tmp_path / "m.pt"
    with pytest.raises(UserError, match="does not exist"):
        load_model(path)
    saved(path, smoke)
    with pytest.raises(UserError, match="holds a model of method 'hsl', not 'local'"):
        load_model(path, "local")
    whole = path.read_bytes()
    for part in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        with pytest.raises(UserError, match="cut off"):
            load_model(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a model file of heterosync"):
        load_model(path)
    torch.save({"format": "heterosync model 1", "method": "hsl"}, path)
    with pytest.raises(UserError, match="damaged"):
        load_model(path)


def test_a_model_file_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"format": "heterosync model 1", "state": Evil()}, tmp_path / "m.pt")
    with pytest.raises(UserError):
        load_model(tmp_path / "m.pt")
    assert not (tmp_path / "touched").exists()


def test_tensors_that_misfit_are_named(tmp_path: Path, smoke: dict) -> None:
    state = saved(tmp_path / "m.pt", smoke)
    name = next(iter(state))
    for tensors, words in (
        ({k: v for k, v in state.items() if k != name}, f"lacks tensor '{name}'"),
        ({**state, "more": torch.zeros(1)}, "has unknown tensor 'more'"),
        ({**state, name: torch.zeros(1)}, f"tensor '{name}' has shape"),
    ):
        save_model(tmp_path / "m.pt", "hsl", {}, smoke, tensors)
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / "m.pt").build()


# -- initial state -----------------------------------------------------------------------------------------------------


def test_the_initial_state_depends_on_the_seed_alone(smoke: dict) -> None:
    def made(seed: int) -> str:
        torch.manual_seed(seed + 100)
        return state_hash(initial_state(make_method("hsl", {}, TrainingSettings.from_dict({**smoke, "seed": seed}))))

    assert made(0) == made(0) != made(1)
    assert initial_state(make_method("local", {}, TrainingSettings.from_dict(smoke))) == {}


# -- check-in ----------------------------------------------------------------------------------------------------------


def reports(*sites: str) -> dict[str, dict]:
    return {
        site: {
            "site": site,
            "method": "hsl",
            "anchor_digest": "a" * 64,
            "labels": ["normal", "abnormal"],
            "model_hash": "b" * 64,
            "initial_weights": "imagenet",
            "versions": dict(versions()),
        }
        for site in sites
    }


def test_sites_that_fit_have_no_problems() -> None:
    assert compare(reports("a", "b", "c")) == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("anchor_digest", "c" * 64, "anchor digest is cccccccccccc…, 2 of 3 sites have aaaaaaaaaaaa…"),
        ("anchor_digest", None, "anchor digest is none"),
        ("labels", ["abnormal", "normal"], "label names is abnormal / normal"),
        ("model_hash", "d" * 64, "model is dddd"),
        ("versions", {"heterosync": "9.9"}, "version of heterosync is 9.9"),
        ("method", "local", "method is local"),
        ("initial_weights", "none", "start is none, 2 of 3 sites have imagenet"),
    ],
)
def test_the_site_that_differs_from_the_majority_is_named(field: str, value, words: str) -> None:
    said = reports("site-a", "site-b", "site-c")
    said["site-b"][field] = value
    problems = compare(said)
    assert len(problems) == 1 and problems[0].startswith("site site-b: its ") and words in problems[0]
    assert len(problems[0].splitlines()) == 1


def test_without_a_majority_both_are_named() -> None:
    said = reports("site-a", "site-b")
    said["site-b"]["anchor_digest"] = "c" * 64
    (problem,) = compare(said)
    assert "site-a has aaaa" in problem and "site-b has cccc" in problem
    assert compare(said, anchors_may_differ=True) == []


def test_too_few_sites() -> None:
    assert compare(reports("a")) == ["1 site(s) checked in (a), at least 2 are needed"]
    assert compare(reports("a"), min_sites=1) == []
    assert "at least 2" in compare({})[0]


def test_torch_versions_may_differ() -> None:
    said = reports("a", "b", "c")
    said["a"]["versions"]["torch"] = "2.6.0"
    assert compare(said) == []


def test_the_model_hash_follows_names_and_shapes() -> None:
    one, same, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    assert model_hash(one) == model_hash(same) != model_hash(other)


# -- scoreboard --------------------------------------------------------------------------------------------------------


def board(**changes) -> Scoreboard:
    return Scoreboard(TrainingSettings.from_dict({"plateau_gain": 0.01, "plateau_count": 2, **changes}))


def test_the_best_model_has_the_highest_mean_ties_to_the_later_and_is_never_the_initial_one() -> None:
    scores = board()
    added = [scores.add(i, {"a": v, "b": v + 0.1}) for i, v in enumerate([0.9, 0.5, 0.7, 0.6, 0.7])]
    assert added == [False, True, True, False, True] and scores.best == 4
    assert scores.mean(0) == pytest.approx(0.95)


def test_models_are_compared_over_the_sites_that_scored_both() -> None:
    scores = board()
    scores.add(1, {"easy": 0.9, "hard": 0.5})
    assert not scores.add(2, {"easy": 0.85, "hard": None})  # its mean is higher only because the hard site was away
    assert scores.add(3, {"hard": 0.6})
    assert scores.best == 3


def test_the_plateau_rule() -> None:
    values = [0.5, 0.6, 0.605, 0.61, 0.7]
    watching, stopping = board(), board(early_stop=True)
    for model, value in enumerate(values, start=1):
        watching.add(model, {"a": value})
        stopping.add(model, {"a": value})
        assert stopping.should_stop == (model >= 4) and not watching.should_stop
    assert watching.plateau == stopping.plateau == 4


# -- records -----------------------------------------------------------------------------------------------------------


def recorder(folder: Path, start_round: int = 0) -> RunRecorder:
    return RunRecorder(folder, {"method": "hsl", "training": {"rounds": 3}, "sites": ["a", "b"]}, start_round)


def play(record: RunRecorder, round_: int, shift: float = 0.0) -> None:
    metrics = {site: {"val_auc_received": value + shift, "n_train": 4} for site, value in (("a", 0.5), ("b", 0.7))}
    record.round_done(round_, ["b", "a"], metrics, {"c": "it is late"}, 2.0, {"a": 10, "b": 10})


def test_every_file_is_whole_after_every_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "heterosync")
    record = recorder(tmp_path)
    for round_ in range(2):
        record.site_done(round_, "a", {"val_auc_received": 0.5, "train_loss": 0.25})
        play(record, round_, round_ / 10)
        run = json.loads((tmp_path / "run.json").read_text())
        assert run["status"] == "running" and len(run["rounds"]) == round_ + 1
        assert len(read_history(tmp_path)) == 4 * (round_ + 1)
    assert run["rounds"][1] == {
        "round": 1,
        "contributors": ["a", "b"],
        "refused": {"c": "it is late"},
        "seconds": 2.0,
        "bytes": {"a": 10, "b": 10},
    }
    assert (1, "b", "val_auc_received", pytest.approx(0.8)) in read_history(tmp_path)
    assert "round 1/3, site a: validation AUC received 0.500, loss 0.2500" in caplog.messages
    assert "round 1/3 done in 2.0 s by a, b, mean validation AUC before it 0.600, about 4.0 s left" in caplog.messages
    record.validation(2, {"a": 0.9, "b": None})
    record.tested("best", "b", {"auc": 0.8, "n": 4, "accuracy": 0.5})
    record.tested("best", "a", {"auc": 0.6, "n": 6})
    record.note(best_round=2)
    record.finish("completed")
    cross = json.loads((tmp_path / "cross_site_metrics.json").read_text())
    assert list(cross["best"]) == ["a", "b", "mean"]
    assert cross["best"]["a"] == {"auc": 0.6, "n": 6}
    assert cross["best"]["mean"] == {
        "auc": pytest.approx(0.7),
        "accuracy": 0.5,
        "recall": None,
        "precision": None,
        "sites": 2,
    }
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "completed" and run["best_round"] == 2 and run["ended"] and run["versions"]["heterosync"]
    assert read_history(tmp_path)[-1] == (2, "a", "val_auc_received", 0.9)


def test_a_round_of_the_record_costs_little(tmp_path: Path) -> None:
    record = RunRecorder(tmp_path, {"method": "hsl", "training": {"rounds": 20}})
    metrics = {site: {f"metric{i}": i / 7 for i in range(12)} for site in "abcde"}
    began = time.thread_time()
    for round_ in range(20):
        record.round_done(round_, list(metrics), metrics, {}, 1.0)
    assert (time.thread_time() - began) / 20 < 0.005  # processor time, measured 1 to 2 ms
    record.finish("completed")


def test_a_resumed_record_goes_on_and_replaces_the_unfinished(tmp_path: Path) -> None:
    first = recorder(tmp_path)
    for round_ in range(3):
        play(first, round_)
    again = recorder(tmp_path, start_round=2)
    assert [record["round"] for record in again.rounds] == [0, 1]
    assert {row[0] for row in read_history(tmp_path)} == {0, 1}
    play(again, 2, 0.2)
    again.finish("completed")
    assert (2, "a", "val_auc_received", 0.7) in read_history(tmp_path)
    assert len(read_history(tmp_path)) == 12
    fresh = recorder(tmp_path)
    assert fresh.rounds == () and read_history(tmp_path) == []


def test_the_first_weights_are_recorded_once(tmp_path: Path, smoke: dict, monkeypatch) -> None:
    def recorded(method: str, folder: str, rounds_done: int = 0, **more: str) -> str | None:
        info = {"method": method, "training": {**smoke, "backbone": "resnet18", "weights": "auto"}, **more}
        RunRecorder(tmp_path / folder, info, rounds_done).finish("completed")
        return json.loads((tmp_path / folder / "run.json").read_text())["initial_weights"]

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert recorded("hsl", "random") == "none"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/resnet18-f37072fd.pth").write_bytes(b"")
    assert recorded("hsl", "pretrained") == "imagenet"
    assert recorded("hsl", "random", 1) == "none"  # the run goes on with what it began with
    assert recorded("local", "own") is None  # the check-in says it, site by site
    assert recorded("hsl", "swarm", topology="swarm") is None  # nor does the server of a swarm look for any


def test_tensorboard_holds_every_round_and_site_once(tmp_path: Path, monkeypatch) -> None:
    # within one second files are told apart by this counter, as text: "9" would come after "10"
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    record = recorder(tmp_path)
    for round_ in range(3):
        play(record, round_, round_ / 10)
    record = recorder(tmp_path, start_round=2)
    play(record, 2, 0.25)
    record.finish("completed")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(point.step, round(point.value, 6)) for point in events.Scalars("val_auc_received/b")]
    assert scalars == [(0, 0.7), (1, 0.8), (2, 0.95)]
    assert [round(point.value, 6) for point in events.Scalars("val_auc_received/mean")] == [0.6, 0.7, 0.85]
