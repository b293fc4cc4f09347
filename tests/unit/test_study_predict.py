"""Scores of a model file: complete, deterministic, and the same alone or in company."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from heterosync.cli import main
from heterosync.data.dataset import load_site
from heterosync.errors import UserError
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.study.export import export_model
from heterosync.study.partners import embed_partners
from heterosync.study.predict import open_source, predict
from heterosync.training.evaluation import score
from study_toys import toy_model
from toys import SMOKE, toy_images

SETTINGS = {"n_partners": 4, "temperature": 0.1}  # at a low temperature the partner counts
PARTNERS = ("self", "sat_index", "sat_mean")


@pytest.fixture(scope="module")
def model(tmp_path_factory, alliance):
    """A model file with partner images."""
    path = toy_model(tmp_path_factory.mktemp("model") / "best_model.pt", settings=SETTINGS)
    assert embed_partners(path, alliance["site-a"]) == 4
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deeper").mkdir()
    (folder / ".hidden").mkdir()
    for i, image in enumerate(toy_images(np.array([0, 1] * 4), seed=5, size=40)):
        Image.fromarray(image).save(folder / ("deeper" if i % 2 else ".") / f"{i}.png")
    Image.fromarray(image).save(folder / ".hidden" / "x.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("partner", PARTNERS)
def test_scores_are_the_same_one_at_a_time_in_batches_and_in_any_company(model, pictures, partner):
    batches = predict(model, pictures, partner, batch_size=32)
    single = predict(model, pictures, partner, batch_size=1)
    assert batches.names == single.names == sorted(batches.names)
    assert np.array_equal(batches.probabilities, single.probabilities)
    assert np.array_equal(batches.probabilities, predict(model, pictures, partner).probabilities)
    for name, probability in zip(batches.names, batches.probabilities, strict=True):
        assert predict(model, pictures / name, partner).probabilities.tolist() == [probability]
    assert len(batches.names) == 8 and len(set(batches.probabilities)) > 4


def test_partner_changes_the_score(model, pictures):
    scores = [predict(model, pictures, partner).probabilities for partner in PARTNERS]
    assert not np.array_equal(scores[0], scores[1]) and not np.array_equal(scores[1], scores[2])


@pytest.mark.parametrize("partner", ["self", "sat_mean"])
def test_scores_equal_those_of_the_sites(model, alliance, partner):
    """What a site computes in training (batches, shared evaluation code) is what predict gives later."""
    file = load_model(model)
    method, network = type(file)(**{**vars(file), "method_settings": {**SETTINGS, "test_partner": partner}}).build()
    data = load_site(alliance["site-b"], SMOKE["image_size"])
    expected = score(method, network, data.primary, data.anchor)
    found = predict(model, alliance["site-b"], partner)
    assert found.names == data.primary.ids
    assert np.abs(found.probabilities - expected).max() < 1e-6


def test_a_site_folder_gives_metrics_too(model, alliance):
    found = predict(model, alliance["site-a"])
    assert found.metrics is not None and found.metrics["n"] == 40


def test_a_folder_of_sites_is_refused_and_an_anchor_is_never_scored(alliance, pictures, tmp_path):
    above = alliance["site-a"].parent
    with pytest.raises(UserError, match=f"{above} holds site folders: name one of them, for example {above}/site-a"):
        open_source(above)
    shutil.copytree(pictures, tmp_path / "pictures")
    shutil.copytree(alliance["site-a"] / "anchor", tmp_path / "pictures" / "anchor")
    assert open_source(tmp_path / "pictures").names == open_source(pictures).names
    assert open_source(alliance["site-a"] / "anchor").names  # unless it is asked for


def test_csv(model, pictures, tmp_path):
    out = tmp_path / "new" / "scores.csv"
    assert main(["predict", str(model), str(pictures), "--out", str(out)]) == 0
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    found = predict(model, pictures)
    assert [row["image"] for row in rows] == found.names
    for row, probability in zip(rows, found.probabilities, strict=True):
        assert float(row["probability"]) == pytest.approx(probability, abs=5e-9)
        assert row["label"] == ("abnormal" if probability >= 0.5 else "normal")


def test_packs_are_opened(model, alliance):
    pack = alliance["site-a"] / "images.npz"
    assert open_source(pack).names[:2] == ["images.npz#0", "images.npz#1"]
    whole = predict(model, alliance["site-a"])
    assert np.array_equal(predict(model, pack).probabilities, whole.probabilities)


def test_a_method_of_one_image_ignores_the_partner(tmp_path, pictures, monkeypatch):
    from heterosync.methods import Method
    from heterosync.methods.local import Local

    monkeypatch.setattr(Local, "weighting", "equal")  # so that its weights are in the file
    path = toy_model(tmp_path / "local.pt", "local")
    assert issubclass(Local, Method)
    assert np.array_equal(predict(path, pictures).probabilities, predict(path, pictures, "self").probabilities)
    with pytest.raises(UserError, match="needs no partner"):
        embed_partners(path, pictures)


@pytest.mark.parametrize("network", ["classifier", "mmoe"])
def test_a_sites_own_model_predicts_what_the_site_computed(alliance, tmp_path, network):
    run_inprocess("local", {"site-a": alliance["site-a"]}, tmp_path / "run", {"network": network}, SMOKE)
    work = tmp_path / "run" / "sites" / "site-a"
    words = [str(work / "own_best.pt"), str(alliance["site-a"]), "--out", str(tmp_path / "scores.csv")]
    assert main(["predict", *words, "--partner", "self"]) == 0
    with (tmp_path / "scores.csv").open(newline="") as file:
        scores = {row["image"]: float(row["probability"]) for row in csv.DictReader(file)}
    with (work / "results" / "predictions.csv").open(newline="") as file:
        tested = {row["id"]: float(row["probability"]) for row in csv.DictReader(file)}
    assert tested == {name: pytest.approx(scores[name], abs=1e-5) for name in tested}


def test_damaged_images_are_all_named_and_nothing_is_written(model, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / "a.png")
    (folder / "deeper").mkdir()
    for name in ("b.png", "deeper/a.png"):
        (folder / name).write_bytes((folder / "a.png").read_bytes()[:40])
    assert main(["predict", str(model), str(folder), "--out", str(tmp_path / "out.csv"), "--batch-size", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("heterosync: ").split(":")[0] for line in lines] == ["b.png", "deeper/a.png"]
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("partner", ["self", "sat_mean"])
def test_export_gives_the_same_scores_without_heterosync(model, pictures, tmp_path, partner):
    facts = export_model(model, tmp_path / "model.pt2", partner)
    assert facts["largest_difference"] <= 1e-5
    program = torch.export.load(tmp_path / "model.pt2").module()
    source = open_source(pictures)
    from heterosync.data.readers import to_size

    images = np.stack([to_size(source.reader.read(name), SMOKE["image_size"]) for name in source.names])
    scores = program(torch.from_numpy(images).float() / 255).detach().numpy()
    assert np.abs(scores - predict(model, pictures, partner).probabilities).max() < 1e-5


def test_a_program_that_differs_is_not_written(model, tmp_path, monkeypatch):
    from heterosync.study import export

    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differs from the model"):
        export_model(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
