"""A site without training data takes part to receive: it tests the final models and keeps them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from heterosync.errors import ProblemList, UserError
from heterosync.federation.checkin import compare, receivers
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from segment_toys import TINY, receiving, toy_volume_alliance, toy_volume_site

TRAINING = {**TINY, "rounds": 2, "crops": 2}


def test_an_outside_site_receives_and_changes_nothing(tmp_path: Path) -> None:
    sites = toy_volume_alliance(tmp_path / "data", 2)
    outside = {**sites, "outside": receiving(tmp_path / "data" / "outside")}
    alone = run_inprocess("prostate_ahnet", sites, tmp_path / "alone", training=TRAINING)
    done = run_inprocess("prostate_ahnet", outside, tmp_path / "run", training=TRAINING)
    assert done.state_hash == alone.state_hash and done.validation == alone.validation
    record = json.loads((done.folder / "run.json").read_text())
    assert record["receivers"] == ["outside"] and record["check_in"]["outside"]["counts"]["train"] == 0
    assert all(part["contributors"] == ["site-a", "site-b"] for part in record["rounds"])
    cross = json.loads((done.folder / "cross_site_metrics.json").read_text())
    assert set(cross["best"]) == {"site-a", "site-b", "outside", "mean"}
    before = json.loads((alone.folder / "cross_site_metrics.json").read_text())
    assert cross["best"]["mean"] == before["best"]["mean"]  # the challenge set stands apart, as in the paper
    results = done.folder / "sites" / "outside" / "results"
    for name in ("best", "last"):
        mine, theirs = (load_model(folder / f"{name}_model.pt") for folder in (results, done.folder))
        assert (mine.round, mine.labels, mine.training) == (theirs.round, theirs.labels, theirs.training)
        assert all(torch.equal(mine.state[key], value) for key, value in theirs.state.items())
        assert not (done.folder / "sites" / "site-a" / "results" / f"{name}_model.pt").exists()
    with (results / "predictions.csv").open() as file:
        assert {row["split"] for row in csv.DictReader(file)} == {"test"}


def test_receivers_do_not_count_as_sites_that_train(tmp_path: Path) -> None:
    sites = {**toy_volume_alliance(tmp_path / "data", 1), "outside": receiving(tmp_path / "data" / "outside")}
    with pytest.raises(ProblemList, match=r"1 site\(s\) with training data checked in \(site-a\), at least 2 are"):
        run_inprocess("prostate_ahnet", sites, tmp_path / "run", training=TRAINING)
    said = {"a": {"counts": {"train": 3}}, "b": {"counts": {"train": 0}}, "c": {"counts": {"train": 1}}}
    assert receivers(said) == ["b"]
    assert compare(said, min_sites=2, receiving=["b"]) == []


def test_where_every_site_has_its_own_model_there_is_nothing_to_receive(tmp_path: Path) -> None:
    sites = {**toy_volume_alliance(tmp_path / "data", 1), "outside": receiving(tmp_path / "data" / "outside")}
    with pytest.raises(UserError, match="site outside: the train split has fewer than 1 volumes"):
        run_inprocess("prostate_private", sites, tmp_path / "run", training=TRAINING)


def test_a_site_with_a_single_held_out_case_is_no_receiver(tmp_path: Path) -> None:
    folder = toy_volume_site(tmp_path / "a", count=3, seed=1)
    from heterosync.federation.site import SiteTrainer

    told: list[str] = []
    report = SiteTrainer("a", folder, "prostate_ahnet", None, TRAINING, tmp_path / "w", told.append).check_in()
    assert receivers({"a": report}) == [] and "monai" in report["versions"]
    few = "site a: {} has 1 volume: its score, which leaves the site, is that of single patients: use 3 or more"
    assert told[1:] == [few.format("validation"), few.format("test")]
    told.clear()
    SiteTrainer("a", folder, "prostate_ahnet", None, TRAINING, tmp_path / "w", told.append).check_in()
    assert len(told) == 1  # once a training, whenever its trainer starts again
    told.clear()
    SiteTrainer(
        "b", receiving(tmp_path / "b", 3), "prostate_ahnet", None, TRAINING, tmp_path / "v", told.append
    ).check_in()
    assert len(told) == 1  # three test cases, and no validation
