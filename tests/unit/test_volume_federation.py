"""Three tiny sites segment volumes together: fused after every epoch by validation Dice."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from heterosync.cli import main
from heterosync.errors import UserError
from heterosync.federation.modelfile import load_model
from heterosync.federation.results import read_history
from heterosync.federation.runner import RunSummary, run_inprocess
from heterosync.federation.site import SiteTrainer
from heterosync.study.evidence.cross_site import cross_site_table, paired_tests, score_ensemble
from heterosync.study.evidence.views import views_of_run
from heterosync.study.export import export_model
from heterosync.study.pages.report import read_runs, write_report
from heterosync.study.predict import predict
from heterosync.training import SEGMENTATION
from segment_toys import TINY, toy_volume_alliance

ROUNDS = 3


@pytest.fixture(scope="module")
def alliance(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return toy_volume_alliance(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def run(alliance: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    out = tmp_path_factory.mktemp("runs") / "federated"
    return run_inprocess("prostate_ahnet", alliance, out, training={**TINY, "rounds": ROUNDS})


def test_the_run_is_told_in_dice(run: RunSummary) -> None:
    assert run.status == "completed" and run.rounds == ROUNDS and len(run.validation) == ROUNDS + 1
    assert run.validation[-1] > run.validation[0] + 0.1
    cross = json.loads((run.folder / "cross_site_metrics.json").read_text())
    assert set(cross) == {"best", "last"} and set(cross["best"]) == {"site-a", "site-b", "site-c", "mean"}
    assert set(cross["best"]["mean"]) == {"dice", "hd95", "volume_error", "sites"}
    dice = [cross["best"][site]["dice"] for site in sorted(run.metrics["best"])]
    assert cross["best"]["mean"]["dice"] == pytest.approx(np.mean(dice))
    info = json.loads((run.folder / "run.json").read_text())
    assert info["training"]["patch"] == [16, 16, 16] and "image_size" not in info["training"]
    assert info["initial_weights"] == "none" and info["labels"] == ["background", "organ"]
    received = {row[0] for row in read_history(run.folder) if row[2] == "val_dice_received"}
    assert received == set(range(ROUNDS + 1))


def test_cases_are_listed_at_the_site_and_nowhere_else(run: RunSummary) -> None:
    with (run.folder / "sites" / "site-a" / "results" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(SEGMENTATION.columns) and {row["id"] for row in rows} == {"images/4.nii.gz"}
    best = next(row for row in rows if row["model"] == "best")
    assert float(best["dice"]) == run.metrics["best"]["site-a"]["dice"]  # one test case
    for name in ("run.json", "history.csv", "cross_site_metrics.json"):
        assert "nii.gz" not in (run.folder / name).read_text()


def test_slices_of_the_test_cases_stay_at_their_sites_and_a_report_here_shows_them(
    run: RunSummary, tmp_path: Path, capsys
):
    views = views_of_run(run.folder, "best")
    assert [view.id for view in views] == [f"site-{letter}: images/4.nii.gz" for letter in "abc"]
    assert [view.dice for view in views] == [run.metrics["best"][f"site-{letter}"]["dice"] for letter in "abc"]
    assert sorted(path.relative_to(run.folder).parts[0] for path in run.folder.rglob("*.npz")) == ["sites"] * 6
    files = {path.name for path in write_report(read_runs([run.folder]), tmp_path / "report")}
    assert {"overlays.svg", "overlays.png"} <= files
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64") == 3 * 5 and "worst: Dice" in page and "xlink:href" not in page
    assert page.count("Page and figures stay where these images may be") == 1
    assert main(["report", str(run.folder), "--out", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out.endswith("stay where these images may be.\n")
    shutil.copytree(run.folder, tmp_path / "sent", ignore=shutil.ignore_patterns("sites"))
    files = {path.name for path in write_report(read_runs([tmp_path / "sent"]), tmp_path / "other")}
    assert not any("overlays" in name for name in files)


def test_the_fusion_is_the_mean_weighted_by_validation_dice(alliance, run: RunSummary, tmp_path: Path) -> None:
    training = {**TINY, "rounds": ROUNDS}
    run_inprocess("prostate_ahnet", alliance, tmp_path / "one", training=training, stop=lambda done: done == 1)
    fused = load_model(tmp_path / "one" / "last_model.pt").state
    sites = {
        name: SiteTrainer(name, folder, "prostate_ahnet", None, training, tmp_path / name)
        for name, folder in alliance.items()
    }
    start = next(iter(sites.values())).method.build_model().state_dict()
    sent = {name: site.train(0, start) for name, site in sites.items()}
    scores = {name: answer.metrics["val_dice_best"] for name, answer in sent.items()}
    recorded = {row[1]: row[3] for row in read_history(run.folder) if row[0] == 0 and row[2] == "val_dice_best"}
    assert scores == recorded and len(set(scores.values())) == 3
    for name, value in fused.items():
        mean = sum(scores[site] * sent[site].tensors[name].double() for site in scores) / sum(scores.values())
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, mean.round().to(value.dtype))


def test_a_run_cut_off_goes_on_to_the_same_end(alliance, run: RunSummary, tmp_path: Path) -> None:
    training = {**TINY, "rounds": ROUNDS}
    run_inprocess("prostate_ahnet", alliance, tmp_path / "run", training=training, stop=lambda done: done == 2)
    resumed = run_inprocess("prostate_ahnet", alliance, tmp_path / "run", training=training)
    assert resumed.state_hash == run.state_hash and resumed.validation == run.validation
    assert resumed.metrics == run.metrics


def test_private_models_stay_at_home_and_an_ensemble_is_scored_everywhere(alliance, run, tmp_path: Path) -> None:
    private = {**TINY, "rounds": 2}
    alone = run_inprocess("prostate_private", alliance, tmp_path / "private", training=private)
    assert (
        set(alone.metrics) == {"local"} and alone.state_hash is None and not (alone.folder / "best_model.pt").exists()
    )
    own = {site: load_model(alone.folder / "sites" / site / "own_best.pt") for site in alliance}
    best = load_model(run.folder / "best_model.pt")
    models = {**{site: [file] for site, file in own.items()}, "federated": [best]}
    scores = [row for name, files in models.items() for row in score_ensemble(name, files, alliance)]
    for site in alliance:  # the same model at the same place has the same score, however it was asked for
        for name, expected in ((site, alone.metrics["local"]), ("federated", run.metrics["best"])):
            found = [row.dice for row in scores if (row.model, row.site) == (name, site)]
            assert np.mean(found) == pytest.approx(expected[site]["dice"], abs=1e-6)
    assert set(paired_tests(scores, "federated")) == set(alliance)
    assert "Overall (n=3)" in cross_site_table(scores, "federated")
    pair = [load_model(run.folder / name) for name in ("best_model.pt", "last_model.pt")]
    assert len(score_ensemble("pair", pair, alliance)) == 3


def test_an_ensemble_of_unlike_models_is_refused(alliance, run: RunSummary) -> None:
    with pytest.raises(UserError, match="model x: an ensemble needs at least one model file"):
        score_ensemble("x", [], alliance)


def test_folds_are_alike_for_every_experiment(alliance) -> None:
    from heterosync.methods import make_method

    for folder in alliance.values():
        splits = [
            SEGMENTATION.load(folder, make_method(name, None, {**TINY, "seed": seed}).training, False, False).splits
            for name, seed in (("prostate_ahnet", 0), ("prostate_private", 7))
        ]
        for split in ("train", "validation", "test"):
            assert np.array_equal(splits[0][split], splits[1][split])
        other = SEGMENTATION.load(
            folder, make_method("prostate_ahnet", None, {**TINY, "fold": 2}).training, False, False
        )
        assert np.array_equal(other.splits["validation"], splits[0]["train"])
        assert np.array_equal(other.splits["test"], splits[0]["test"])
    with pytest.raises(UserError, match="site site-a: fold 3: this site has folds 1 to 2"):
        SiteTrainer("site-a", alliance["site-a"], "prostate_ahnet", None, {**TINY, "fold": 3}, folder / "w").check_in()


def test_commands_for_pictures_say_what_they_are_for(run: RunSummary, tmp_path: Path) -> None:
    model = str(run.folder / "best_model.pt")
    for work in (lambda: predict(model, tmp_path), lambda: export_model(model, tmp_path / "model.pt2")):
        (tmp_path / "x.png").touch()
        with pytest.raises(UserError, match="method 'prostate_ahnet' segments volumes"):
            work()
