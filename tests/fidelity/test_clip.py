"""CLIP features with a federated head: what is sent, what is cached, whose file it is, and what it degenerates into."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core_toys import settings
from heterosync.data.dataset import load_site
from heterosync.errors import ProblemList, UserError
from heterosync.federation.checkin import compare
from heterosync.federation.contribution import Contribution
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.federation.server import Server
from heterosync.federation.site import SiteTrainer
from heterosync.federation.wire import payload_bytes
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.jobs.readme import readme
from heterosync.methods import make_method
from heterosync.methods.clip import Clip
from heterosync.models.clip import SHAPES, ImageTower, Shape
from heterosync.models.encoder import cached_file
from heterosync.study.export import export_model
from heterosync.study.predict import predict
from heterosync.training.checks import split_rows
from method_toys import last, own, same
from toys import SMOKE, toy_site

STAND_IN = {"clip_model": "stand-in"}
ONE_STEP = {
    **{"rounds": 1, "batch_size": 512, "optimizer": "sgd", "lr": 0.5, "weight_decay": 0.0},
    **{"schedule": "constant", "balanced_sampler": False},
}


@pytest.fixture
def tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny tower in the place of ViT-B/32, with its file where a site has it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setitem(SHAPES, "ViT-B/32", Shape(side=24, patch=8, width=64, layers=1, outputs=16))
    return put(cached_file("ViT-B-32.pt"))


def put(file: Path, seed: int = 0) -> Path:
    """A tower file of open_clip's layout with random values."""
    random = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(value.shape, generator=random) / 8
        for name, value in _open_clip(ImageTower(SHAPES["ViT-B/32"]))
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return file


def _open_clip(model: nn.Module):
    words = {"blocks.": "transformer.resblocks.", "self_attn": "attn", "norm": "ln_", "linear1": "mlp.c_fc"}
    for name, value in model.state_dict().items():
        for ours, theirs in {**words, "linear2": "mlp.c_proj"}.items():
            name = name.replace(ours, theirs)
        yield f"visual.{name}", value


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# -- what is sent, what is learnt --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "numbers"), [(0, [512, 1]), (8, [4096, 8, 8, 1])])
def test_only_the_head_is_sent(smoke_run, monkeypatch, hidden, numbers):
    seen: list[Contribution] = []
    accept = Server.accept
    monkeypatch.setattr(Server, "accept", lambda self, sent: [seen.append(sent), accept(self, sent)][1])
    smoke_run("clip", {**STAND_IN, "head_hidden": hidden}, rounds=1)
    assert len(seen) == 2
    for sent in seen:
        assert [value.numel() for value in sent.tensors.values()] == numbers
        assert all(name.startswith("head.") for name in sent.tensors)
        assert payload_bytes(sent.tensors) == 4 * sum(numbers)


def test_one_federated_step_is_one_central_step_on_the_pooled_features(two, tmp_path, smoke_run):
    run = smoke_run("clip", STAND_IN, **ONE_STEP)
    method = make_method("clip", STAND_IN, settings(**ONE_STEP))
    model = method.build_model()
    features, labels = [], []
    for folder in two.values():
        data = load_site(folder, 32)
        features.append(method.encode(data.primary.batch(data.splits["train"])))
        labels.append(torch.from_numpy(data.primary.labels[data.splits["train"]]).float())
    loss = nn.functional.binary_cross_entropy_with_logits(model(torch.cat(features)), torch.cat(labels))
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.5).step()
    for name, value in last(run).items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-6), name
    assert run.state_hash != smoke_run("clip", {**STAND_IN, "weighting": "equal"}, **ONE_STEP).state_hash


def test_one_site_is_local_learning_of_the_head(two, tmp_path, smoke_run):
    alone = {"site-a": two["site-a"]}
    with pytest.raises(ProblemList, match="at least 2 are needed"):
        smoke_run("clip", STAND_IN, sites=alone, rounds=1)
    run = run_inprocess("clip", alone, tmp_path / "run", STAND_IN, {**SMOKE, "rounds": 3}, min_sites=1)
    site = SiteTrainer("site-a", alone["site-a"], "clip", STAND_IN, {**SMOKE, "rounds": 3}, tmp_path / "site")
    state = make_method("clip", STAND_IN, settings()).build_model().state_dict()
    before = dict(state)
    for round_ in range(3):  # from its own weights, which nobody touched
        state = site.train(round_, state if round_ == 0 else None).tensors
    assert same(last(run), state, "head.") and not same(state, before, "head.")


def test_two_runs_are_equal_and_sites_begin_where_the_server_says(smoke_run, two, tmp_path):
    run = smoke_run("clip", STAND_IN)
    again = run_inprocess("clip", two, tmp_path / "again", STAND_IN, SMOKE)
    assert run.state_hash == again.state_hash and run.metrics == again.metrics
    assert set(own(run)) == {"head.weight", "head.bias"}


# -- the encoder and its file ------------------------------------------------------------------------------------------


def test_the_file_stays_as_it_is_and_its_hash_is_in_the_check_in(two, tower, tmp_path):
    before = sha256(tower)
    run = run_inprocess("clip", two, tmp_path / "run", None, {**SMOKE, "rounds": 1})
    assert sha256(tower) == before
    record = json.loads((run.folder / "run.json").read_text())
    found = {site: report["initial_weights"] for site, report in record["check_in"].items()}
    assert found == dict.fromkeys(two, f"file sha256:{before}") and record["initial_weights"] == "none"
    assert record["training"]["image_size"] == 24 and record["training"]["fit"] == "crop"
    predicted = predict(run.folder / "last_model.pt", two["site-a"])
    rows = [line.split(",") for line in (run.folder / "sites/site-a/results/predictions.csv").read_text().splitlines()]
    scored = {row[0]: float(row[3]) for row in rows[1:] if row[-1] == "last"}
    given = dict(zip(predicted.names, predicted.probabilities.tolist(), strict=True))
    assert scored and all(abs(given[name] - value) < 1e-5 for name, value in scored.items())


def test_models_and_trainings_keep_to_their_tower(two, tower, tmp_path):
    """Without any `sha256` in the job."""
    run = run_inprocess("clip", two, tmp_path / "run", None, {**SMOKE, "rounds": 1})
    mark = f"file sha256:{sha256(tower)}"
    assert json.loads((run.folder / "run.json").read_text())["provisioned"] == mark
    for file in ("last_model.pt", "best_model.pt"):
        assert load_model(run.folder / file).versions["provisioned"] == mark
    put(tower, seed=1)
    other = f"file sha256:{sha256(tower)}"
    with pytest.raises(UserError, match=f"goes with the frozen network {mark}, here is {other}: get that file"):
        predict(run.folder / "last_model.pt", two["site-a"])
    with pytest.raises(UserError, match=f"began with the frozen network {mark}: put that file back at every site"):
        run_inprocess("clip", two, tmp_path / "run", None, {**SMOKE, "rounds": 2})
    put(tower)
    again = run_inprocess("clip", two, tmp_path / "run", None, {**SMOKE, "rounds": 2})
    assert again.rounds == 2 and load_model(run.folder / "last_model.pt").versions["provisioned"] == mark


def test_sites_with_other_files_are_refused(two, tower, tmp_path, monkeypatch):
    provisioned = Clip.provisioned
    answers = iter([provisioned(make_method("clip")), "file sha256:" + "0" * 64])
    sites = {name: SiteTrainer(name, two[name], "clip", None, SMOKE, tmp_path / name) for name in two}
    reports = {}
    for name, site in sites.items():
        site.check_in()  # opens the site, with the file that it has
        answer = next(answers)
        monkeypatch.setattr(Clip, "provisioned", lambda self, answer=answer: answer)
        reports[name] = site.check_in()
    (problem,) = compare(reports)
    assert "start differs between sites" in problem and "has file sha256:000000000000…" in problem


def test_without_the_file_there_is_one_line_with_the_remedy(two, tower, tmp_path):
    tower.unlink()
    with pytest.raises(UserError, match="site site-a: method clip needs the file of CLIP's ViT-B/32") as refused:
        run_inprocess("clip", two, tmp_path / "run", None, SMOKE)
    assert "ViT-B-32.pt" in str(refused.value) and "stand-in" in str(refused.value) and "\n" not in str(refused.value)
    server = make_method("clip", None, SMOKE)  # the server needs no file
    assert Server(server, server.build_model("none").state_dict()).memory == {}


def test_a_job_may_pin_the_file(tower):
    pinned = make_method("clip", {"sha256": sha256(tower)}, SMOKE)
    assert pinned.encode(torch.rand(2, 3, 24, 24)).shape == (2, 16)
    almost = pinned.settings.sha256[:-1] + ("0" if pinned.settings.sha256[-1] != "0" else "1")
    with pytest.raises(UserError, match=f"the job's models go with sha256:{almost}: get that file"):
        make_method("clip", {"sha256": almost}, SMOKE).provisioned()  # the whole digest counts
    put(tower, seed=1)
    with pytest.raises(UserError, match="the job's models go with sha256:"):
        make_method("clip", {"sha256": pinned.settings.sha256}, SMOKE).encode(torch.rand(2, 3, 24, 24))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"clip_model": "ViT-B/16"}, "known: ViT-B/32, ViT-L/14, stand-in"),
        ({"file": "models/ViT-B-32.pt"}, "give a name in torch's cache, not a path"),
        ({"sha256": "ABC"}, "12 to 64 hexadecimal digits"),
        ({**STAND_IN, "activation": "gelu"}, "counts only with a clip_model of CLIP"),
        ({**STAND_IN, "file": "a.pt"}, "counts only with a clip_model of CLIP"),
        ({"head_hidden": -1}, "the smallest possible value is 0"),
    ],
)
def test_settings_are_checked(change, cause):
    with pytest.raises(UserError, match=cause):
        make_method("clip", change)


def test_the_encoder_says_what_images_it_sees(tower):
    job = {**SMOKE, "image_size": 64, "channels": 1, "augment": True, "precision": "bfloat16"}
    seen = make_method("clip", None, job).training
    assert (seen.image_size, seen.channels, seen.fit, seen.augment, seen.precision) == (24, 3, "crop", False, "float32")
    stand_in = make_method("clip", STAND_IN, job).training
    assert (stand_in.image_size, stand_in.channels, stand_in.fit) == (64, 1, "stretch")
    assert not stand_in.augment and stand_in.precision == "float32"


def test_a_stand_in_is_called_one_wherever_it_shows(smoke_run):
    record = json.loads((smoke_run("clip", STAND_IN).folder / "run.json").read_text())
    assert {report["initial_weights"] for report in record["check_in"].values()} == {"stand-in"}
    assert record["method_settings"]["clip_model"] == "stand-in"
    text = readme(make_method("clip", STAND_IN), JobOptions(method_settings=STAND_IN))
    assert "a stand-in for CLIP's encoder (not CLIP)" in text
    real = readme(make_method("clip"), JobOptions())
    assert "CLIP's frozen ViT-B/32" in real and "(not CLIP)" not in real


def test_a_model_is_exported_with_its_encoder(smoke_run, tmp_path):
    told = export_model(smoke_run("clip", STAND_IN).folder / "best_model.pt", tmp_path / "model.pt2")
    assert told["largest_difference"] < 1e-5


# -- the cache ---------------------------------------------------------------------------------------------------------


def feed_of(folder: Path, method: Clip):
    data = load_site(folder, 32, need_anchor=False)
    return data, method.feed(data.primary, torch.device("cpu"), data.cache)


def test_cached_features_are_those_computed_on_the_fly(two):
    method = make_method("clip", STAND_IN, SMOKE)
    data, feed = feed_of(two["site-a"], method)
    assert list(data.cache.glob("features-*.npz"))
    rows = split_rows("site-a", data, "test")
    fresh = method.encode(data.primary.batch(rows))
    assert torch.allclose(feed.batch(rows), fresh, atol=1e-5)
    model = method.build_model()
    direct = method.predict(model, data.primary.batch(rows), "self")
    assert torch.allclose(method.predict(model, feed.batch(rows), "self"), direct, atol=1e-5)


def test_the_encoder_looks_at_a_picture_once(tmp_path, monkeypatch):
    folder = toy_site(tmp_path / "site", (10, 10), anchor=False)
    looked: list[int] = []
    encode = Clip.encode
    monkeypatch.setattr(Clip, "encode", lambda self, images: [looked.append(len(images)), encode(self, images)][1])

    def again() -> np.ndarray:
        looked.clear()
        data, feed = feed_of(folder, make_method("clip", STAND_IN, SMOKE))
        return feed.batch(np.arange(len(data.primary))).numpy()

    first = again()
    assert sum(looked) == 20
    assert np.array_equal(again(), first) and not looked  # a new start
    with np.load(folder / "images.npz") as pack:
        pictures = pack["images"].copy()
    pictures[3] = 255 - pictures[3]
    np.savez(folder / "images.npz", images=pictures)
    changed = again()
    assert sum(looked) == 1 and not np.allclose(changed[3], first[3]) and np.array_equal(changed[4:], first[4:])
    (file,) = (folder / ".heterosync" / "cache").glob("features-*.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert np.allclose(again(), changed, atol=1e-6) and sum(looked) == 20  # damaged: all anew


def test_each_encoder_has_its_own_cache(tower, tmp_path):
    folder = toy_site(tmp_path / "site", (6, 6), anchor=False)
    for method_settings in (STAND_IN, None, {"activation": "gelu"}):
        method = make_method("clip", method_settings, SMOKE)
        data = load_site(folder, method.training.image_size, 3, False, fit=method.training.fit)
        method.feed(data.primary, torch.device("cpu"), data.cache)
    assert len(list((folder / ".heterosync" / "cache").glob("features-*.npz"))) == 3
