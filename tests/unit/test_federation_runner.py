"""The in-process federation against an independent plain loop, and the acceptance rules of HSL."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from heterosync.data.anchor import write_anchor
from heterosync.data.dataset import load_site
from heterosync.errors import ProblemList, UserError
from heterosync.federation import runner, site
from heterosync.federation.initial import state_hash
from heterosync.federation.modelfile import load_model
from heterosync.federation.results import read_history
from heterosync.federation.runner import run_inprocess
from heterosync.methods import make_method
from heterosync.training import precision
from heterosync.training.batches import batch_bounds, plan_epoch
from heterosync.training.seeds import seed_of
from heterosync.training.settings import TrainingSettings
from toys import toy_alliance, toy_images, toy_site


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, alliance: dict[str, Path]) -> runner.RunSummary:
    """HSL over three toy sites, three rounds of two epochs, uninterrupted."""
    return run_inprocess("hsl", alliance, tmp_path_factory.mktemp("finished"), {}, LONGER)


SMOKE = {
    "image_size": 32,
    "backbone": "resnet_tiny",
    "weights": "none",
    "batch_size": 16,
    "augment": False,
    "precision": "float32",
}
LONGER = {**SMOKE, "rounds": 3, "local_epochs": 2}


def history_without_seconds(folder: Path) -> list:
    return [row for row in read_history(folder) if row[2] != "seconds"]


def same_outcome(one: runner.RunSummary, other: runner.RunSummary) -> None:
    assert one.state_hash == other.state_hash and one.metrics == other.metrics
    assert (one.best_round, one.rounds, one.validation) == (other.best_round, other.rounds, other.validation)
    assert history_without_seconds(one.folder) == history_without_seconds(other.folder)
    for name in ("best_model.pt", "last_model.pt"):
        mine, theirs = load_model(one.folder / name), load_model(other.folder / name)
        assert mine.round == theirs.round and state_hash(mine.state) == state_hash(theirs.state)


# -- against a loop that shares nothing with the runner ----------------------------------------------------------------


def plain_hsl(sites: dict[str, Path], training: dict) -> list[dict[str, torch.Tensor]]:
    """Global states after 0, 1, … rounds, by a loop written from the paper (Model development, eq. 1)."""
    settings = TrainingSettings.from_dict(training)
    data = {name: load_site(sites[name], 32, 3) for name in sorted(sites)}
    model = make_method("hsl", {}, settings).build_model().to(memory_format=torch.channels_last)
    states = [{name: value.clone() for name, value in model.state_dict().items()}]

    def pictures(images, rows) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(images.pixels[rows])).float() / 255
        return pixels.contiguous(memory_format=torch.channels_last)

    def validation_auc(own) -> float:
        rows = own.splits["validation"]
        model.eval()
        with torch.no_grad():
            x = pictures(own.primary, rows)
            scores = torch.sigmoid(model(x, x)[0])
        return roc_auc_score(own.primary.labels[rows], scores.double().numpy())

    for round_ in range(settings.rounds):
        uploads = []
        for name, own in data.items():
            model.load_state_dict(states[-1])
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
            best, best_auc = None, -1.0
            rows = own.splits["train"]
            for epoch in range(settings.local_epochs):
                e = round_ * settings.local_epochs + epoch
                optimizer.param_groups[0]["lr"] = 1e-4 + 4.5e-4 * (1 + np.cos(np.pi * e / 10))
                plan = plan_epoch(own.primary.labels[rows], len(own.anchor), settings, name, round_, epoch)
                torch.manual_seed(seed_of(settings.seed, name, round_, epoch, "dropout"))
                model.train()
                for begin, end in batch_bounds(len(plan), settings.batch_size):
                    ours, shared = rows[plan.primary[begin:end]], plan.anchor[begin:end]
                    logits = model(pictures(own.primary, ours), pictures(own.anchor, shared))
                    labels = own.primary.labels[ours], own.anchor.labels[shared]
                    losses = [
                        torch.nn.functional.binary_cross_entropy_with_logits(logit, torch.from_numpy(label).float())
                        for logit, label in zip(logits, labels, strict=True)
                    ]
                    optimizer.zero_grad()
                    (0.5 * losses[0] + 0.5 * losses[1]).backward()
                    optimizer.step()
                auc = validation_auc(own)
                if auc >= best_auc:
                    best, best_auc = {n: v.clone() for n, v in model.state_dict().items()}, auc
            uploads.append(best)
        mean = {n: sum(upload[n].double() for upload in uploads) / len(uploads) for n in states[0]}
        states.append(
            {n: (v if states[0][n].is_floating_point() else v.round()).to(states[0][n].dtype) for n, v in mean.items()}
        )
    return states


def test_the_runner_equals_a_plain_loop_tensor_by_tensor(finished: runner.RunSummary, alliance) -> None:
    states = plain_hsl(alliance, LONGER)
    last = load_model(finished.folder / "last_model.pt").state
    assert list(last) == list(states[-1])
    for name, value in states[-1].items():
        assert torch.equal(last[name], value), name
    best = load_model(finished.folder / "best_model.pt")
    assert best.round == finished.best_round
    assert state_hash(best.state) == state_hash(states[finished.best_round])


# -- acceptance rules --------------------------------------------------------------------------------------------------


def test_ac_0_1_two_runs_with_one_seed_agree_and_another_seed_does_not(finished, alliance, tmp_path: Path) -> None:
    same_outcome(run_inprocess("hsl", alliance, tmp_path / "again", {}, LONGER), finished)
    other = run_inprocess("hsl", alliance, tmp_path / "other", {}, {**SMOKE, "rounds": 1, "local_epochs": 1, "seed": 1})
    assert other.state_hash != finished.state_hash


def test_ac_h2_fusion_is_the_mean_and_ac_h6_rounds_start_from_it(
    alliance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[int, set[str]] = {}
    sent: dict[int, list] = {}
    original = site.SiteTrainer.train

    def spy(self, round_: int, shared):
        received.setdefault(round_, set()).add(state_hash(shared))
        contribution = original(self, round_, shared)
        sent.setdefault(round_, []).append({name: value.clone() for name, value in contribution.tensors.items()})
        return contribution

    monkeypatch.setattr(site.SiteTrainer, "train", spy)
    summary = run_inprocess("hsl", alliance, tmp_path, {}, {**SMOKE, "rounds": 3, "local_epochs": 1})
    means = {}
    for round_, states in sent.items():
        assert len(states) == 3
        means[round_] = {
            name: np.mean([state[name].double().numpy() for state in states], axis=0) for name in states[0]
        }
    last = load_model(tmp_path / "last_model.pt").state
    for name, value in means[2].items():
        np.testing.assert_allclose(
            last[name].double().numpy(), value, atol=1e-6 if last[name].is_floating_point() else 0.5
        )
    for round_ in (0, 1):
        rounded = {
            name: torch.as_tensor(value if last[name].is_floating_point() else np.rint(value)).to(last[name].dtype)
            for name, value in means[round_].items()
        }
        assert received[round_ + 1] == {state_hash(rounded)}
    assert summary.state_hash == state_hash(last)


def swap_two(folder: Path) -> None:
    labels = np.repeat([0, 1], 10)
    images = toy_images(labels, 99)[:, ::-1].copy()
    labels[0], labels[-1] = 1, 0
    shutil.rmtree(folder / "anchor")
    write_anchor(folder / "anchor", images, labels, name="toy anchor", negative="off", positive="on")


def flip_one(folder: Path) -> None:
    table = folder / "anchor/anchor.npz"
    if not table.exists():
        rows = (folder / "anchor/anchor.csv").read_text().splitlines()
        rows[1] = rows[1].rsplit(",", 1)[0] + "," + rows[-1].rsplit(",", 1)[1]
        (folder / "anchor/anchor.csv").write_text("\n".join(rows) + "\n")
        return
    with np.load(table) as pack:
        content = dict(pack)
    content["labels"] = content["labels"].copy()
    content["labels"][0] = content["labels"][-1]
    np.savez(table, **content)


@pytest.mark.parametrize("damage", [swap_two, flip_one])
def test_ac_h5_a_flipped_anchor_label_stops_everything_before_round_0(tmp_path: Path, damage: Callable) -> None:
    sites = toy_alliance(tmp_path / "data", 3)
    damage(sites["site-b"])
    with pytest.raises(ProblemList, match="site-b") as error:
        run_inprocess("hsl", sites, tmp_path / "out", {}, SMOKE)
    assert "anchor" in str(error.value) and "site-a:" not in str(error.value)
    assert not list((tmp_path / "out").rglob("*.pt")) and not (tmp_path / "out/run.json").exists()


def test_anchors_may_differ_where_the_ablation_says_so(tmp_path: Path) -> None:
    sites = toy_alliance(tmp_path / "data", 2)
    swap_two(sites["site-b"])
    training = {**SMOKE, "rounds": 1, "local_epochs": 1}
    assert run_inprocess("hsl", sites, tmp_path / "out", {}, training, anchors_may_differ=True).status == "completed"


def test_ac_h7_every_test_image_is_scored_once_by_each_model(finished: runner.RunSummary, alliance) -> None:
    for name, folder in alliance.items():
        rows = (finished.folder / "sites" / name / "results/predictions.csv").read_text().splitlines()
        assert rows[0] == "id,split,label,probability,model"
        ids = [row.split(",")[0] for row in rows[1:] if row.endswith(",best")]
        data = load_site(folder, 32)
        assert ids == [data.primary.ids[row] for row in data.splits["test"]]
        assert len(rows) == 1 + 2 * len(ids)
        stored = json.loads((finished.folder / "sites" / name / "results/metrics.json").read_text())
        assert stored["best"]["auc"] == finished.metrics["best"][name]["auc"]


def test_the_best_round_counts_the_last_fusion_but_not_the_initial_model(finished: runner.RunSummary) -> None:
    scores = finished.validation
    assert len(scores) == 4
    expected = max(range(1, 4), key=lambda model: (scores[model], model))
    assert finished.best_round == expected
    run = json.loads((finished.folder / "run.json").read_text())
    assert run["best_round"] == expected and run["status"] == "completed" and len(run["rounds"]) == 3
    assert all(record["contributors"] == ["site-a", "site-b", "site-c"] for record in run["rounds"])
    assert set(json.loads((finished.folder / "cross_site_metrics.json").read_text())) == {"best", "last"}


# -- interruptions -----------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


def test_a_run_cut_off_in_a_round_goes_on_to_the_same_end(finished, alliance, tmp_path: Path) -> None:
    def crash(event: dict) -> None:
        if event["event"] == "site" and (event["round"], event["site"]) == (1, "site-b"):
            raise Crash

    with pytest.raises(Crash):
        run_inprocess("hsl", alliance, tmp_path, {}, LONGER, progress=crash)
    assert json.loads((tmp_path / "run.json").read_text())["status"].startswith("failed")
    same_outcome(run_inprocess("hsl", alliance, tmp_path, {}, LONGER), finished)


def test_a_run_cut_off_between_record_and_model_repeats_the_round(
    finished, alliance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = runner._Run._save

    def crash(self, state, round_: int) -> None:
        if round_ == 2:
            raise Crash
        original(self, state, round_)

    with monkeypatch.context() as patch:
        patch.setattr(runner._Run, "_save", crash)
        with pytest.raises(Crash):
            run_inprocess("hsl", alliance, tmp_path, {}, LONGER)
    same_outcome(run_inprocess("hsl", alliance, tmp_path, {}, LONGER), finished)


def test_a_stopped_run_and_a_shorter_one_go_on(finished, alliance, tmp_path: Path) -> None:
    stopped = run_inprocess("hsl", alliance, tmp_path, {}, {**LONGER, "rounds": 2}, stop=lambda done: done == 1)
    assert stopped.status == "stopped: on request" and stopped.rounds == 1 and stopped.metrics == {}
    assert run_inprocess("hsl", alliance, tmp_path, {}, {**LONGER, "rounds": 2}).rounds == 2
    same_outcome(run_inprocess("hsl", alliance, tmp_path, {}, LONGER), finished)


def test_another_run_may_not_go_on_in_the_same_folder(finished, alliance) -> None:
    with pytest.raises(UserError, match=r"training 'lr' \(0.001, now 0.01\)"):
        run_inprocess("hsl", alliance, finished.folder, {}, {**LONGER, "lr": 0.01})
    with pytest.raises(UserError, match="another method "):
        run_inprocess("local", alliance, finished.folder, {}, LONGER)
    with pytest.raises(UserError, match="another sites"):
        run_inprocess("hsl", {"site-a": alliance["site-a"]}, finished.folder, {}, LONGER)


def test_early_stopping_ends_at_the_plateau(alliance, tmp_path: Path) -> None:
    training = {**SMOKE, "rounds": 9, "local_epochs": 1, "plateau_gain": 1.0, "plateau_count": 1}
    stopped = run_inprocess("hsl", alliance, tmp_path, {}, {**training, "early_stop": True})
    # the gain from model 1 to model 2 is known in round 2; that round is finished and its fusion validated
    assert (stopped.plateau_round, stopped.rounds, len(stopped.validation)) == (2, 3, 4)


# -- local learning ----------------------------------------------------------------------------------------------------


def test_local_learning_sends_nothing_and_sites_do_not_touch_each_other(tmp_path: Path) -> None:
    training = {**SMOKE, "rounds": 2, "local_epochs": 2}
    sites = {"site-a": toy_site(tmp_path / "a", seed=0), "site-b": toy_site(tmp_path / "b", seed=1)}
    first = run_inprocess("local", sites, tmp_path / "one", {}, training)
    sites["site-b"] = toy_site(tmp_path / "b2", seed=7, counts=(30, 12), anchor=False)
    second = run_inprocess("local", sites, tmp_path / "two", {}, training)
    for file in ("state.pt", "own_best.pt"):
        one, two = (
            torch.load(tmp_path / run / "sites/site-a" / file, weights_only=True)["state"] for run in ("one", "two")
        )
        assert state_hash(one) == state_hash(two)
    assert first.metrics["local"]["site-a"] == second.metrics["local"]["site-a"]
    assert first.metrics["local"]["site-b"] != second.metrics["local"]["site-b"]
    run = json.loads((tmp_path / "one/run.json").read_text())
    assert all(record["bytes"] == {"site-a": 0, "site-b": 0} for record in run["rounds"])
    assert not (tmp_path / "one/last_model.pt").exists()


def test_local_learning_resumes_and_tests_each_sites_best_round(tmp_path: Path) -> None:
    training = {**SMOKE, "rounds": 3, "local_epochs": 1}
    sites = {"site-a": toy_site(tmp_path / "a", anchor=False)}
    whole = run_inprocess("local", sites, tmp_path / "one", {}, training)

    def crash(event: dict) -> None:
        if event["event"] == "site" and event["round"] == 1:
            raise Crash

    with pytest.raises(Crash):
        run_inprocess("local", sites, tmp_path / "two", {}, training, progress=crash)
    again = run_inprocess("local", sites, tmp_path / "two", {}, training)
    assert again.metrics == whole.metrics
    assert history_without_seconds(tmp_path / "two") == history_without_seconds(tmp_path / "one")
    scores = {row[0]: row[3] for row in read_history(tmp_path / "one") if row[2] == "val_auc_best"}
    own = load_model(tmp_path / "one/sites/site-a/own_best.pt", "local")
    assert own.labels == ("normal", "abnormal") and own.training["rounds"] == 3
    assert own.round == 1 + max(scores, key=lambda round_: (scores[round_], round_))


# -- sites -------------------------------------------------------------------------------------------------------------


def test_a_site_trainer_keeps_to_its_own_run(alliance, tmp_path: Path) -> None:
    site.SiteTrainer("site-a", alliance["site-a"], "hsl", {}, SMOKE, tmp_path)
    site.SiteTrainer("site-a", alliance["site-a"], "hsl", {}, {**SMOKE, "rounds": 30}, tmp_path)
    for name, settings, training, words in (
        ("site-b", {}, SMOKE, "another site"),
        ("site-a", {"temperature": 1.0}, SMOKE, "method settings 'temperature'"),
        ("site-a", {}, {**SMOKE, "seed": 3}, "training 'seed'"),
    ):
        with pytest.raises(UserError, match=words):
            site.SiteTrainer(name, alliance["site-a"], "hsl", settings, training, tmp_path)
    with pytest.raises(UserError, match="site name"):
        site.SiteTrainer("../x", alliance["site-a"], "hsl", {}, SMOKE, tmp_path / "new")


def test_threads_of_a_trainer(tmp_path: Path, smoke: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = toy_site(tmp_path / "site"), []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)

    def check_in(work: str) -> None:
        site.SiteTrainer("site-a", folder, "local", {}, smoke, tmp_path / work).check_in()

    monkeypatch.delenv("HETEROSYNC_THREADS", raising=False)
    check_in("free")
    assert asked == []  # torch reads OMP_NUM_THREADS itself, and takes all cores without it
    monkeypatch.setenv("HETEROSYNC_THREADS", "3")
    check_in("environment")
    with (folder / "site.yaml").open("a") as file:
        file.write("threads: 2\n")
    check_in("configured")
    assert asked == [3, 2]
    for bad in ("0", "-1", "many"):
        with pytest.raises(UserError, match=f"HETEROSYNC_THREADS is '{bad}'"):
            site.thread_count(None, {"HETEROSYNC_THREADS": bad})


def test_a_device_that_is_not_there_is_named_before_anything_is_measured(
    tmp_path: Path, smoke: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: True)
    folder = toy_site(tmp_path / "site")
    (folder / "site.yaml").write_text("task: toy\nlabels: [normal, abnormal]\ndevice: cuda:99\n")
    with pytest.raises(UserError, match="site site-a: device 'cuda:99' is not there"):
        site.SiteTrainer("site-a", folder, "local", {}, {**smoke, "precision": "auto"}, tmp_path / "w").check_in()


def test_what_a_run_started_from_is_recorded_and_must_be_the_same_at_local_sites(
    alliance, tmp_path: Path, smoke: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {name: alliance[name] for name in ("site-a", "site-b")}
    smoke.update(rounds=1)
    for method in ("hsl", "local"):
        run_inprocess(method, two, tmp_path / method, training=smoke)
    shared, own = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("hsl", "local"))
    assert shared["initial_weights"] == "none" and own["initial_weights"] is None
    assert {name: report["initial_weights"] for name, report in shared["check_in"].items()} == dict.fromkeys(two)
    assert {name: report["initial_weights"] for name, report in own["check_in"].items()} == dict.fromkeys(two, "none")
    assert load_model(tmp_path / "hsl/last_model.pt").versions["initial_weights"] == "none"
    answers = iter(["imagenet", "none"])
    monkeypatch.setattr(site, "own_weights", lambda method, model: next(answers))
    with pytest.raises(ProblemList, match="start differs between sites: site-a has imagenet; site-b has none"):
        run_inprocess("local", two, tmp_path / "differs", training=smoke)


def test_the_sites_own_batch_size_and_all_its_problems_count(tmp_path: Path) -> None:
    folder = toy_site(tmp_path / "a", anchor=False)
    with (folder / "site.yaml").open("a") as file:
        file.write("batch_size: 5\n")
    trainer = site.SiteTrainer("site-a", folder, "local", {}, {**SMOKE, "rounds": 1, "local_epochs": 1}, tmp_path / "w")
    assert trainer.train(0, None).metrics["steps"] == 5  # 24 images in batches of 5
    with (folder / "manifest.csv").open("a") as file:
        file.write("missing.png,normal\nimages.npz#1,wrong\n")
    with pytest.raises(ProblemList) as problems:
        site.SiteTrainer("site-a", folder, "local", {}, SMOKE, tmp_path / "v").check_in()
    assert len(problems.value.problems) >= 2
    assert all(line.startswith("site site-a: ") for line in problems.value.problems)
