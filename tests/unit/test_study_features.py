"""Features of trained encoders, and the numbers that say how far apart the sites lie in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heterosync.data.dataset import load_site
from heterosync.errors import UserError
from heterosync.federation.modelfile import load_model
from heterosync.study.evidence.features import mmd2, run_features, site_accuracy, site_mmd2, tsne
from study_toys import toy_model
from toys import toy_alliance

RNG = np.random.default_rng(0)


def test_mmd_is_gretton_s_unbiased_estimate():
    a, b = RNG.normal(size=(5, 3)), RNG.normal(1, 1, size=(7, 3))

    def kernel(x, y):
        return np.exp(-0.3 * ((x - y) ** 2).sum())

    def within(part):
        pairs = [kernel(x, y) for i, x in enumerate(part) for j, y in enumerate(part) if i != j]
        return sum(pairs) / len(pairs)

    across = np.mean([kernel(x, y) for x in a for y in b])
    assert mmd2(a, b, 0.3) == pytest.approx(within(a) + within(b) - 2 * across)


def test_numbers_tell_apart_sites_from_no_sites():
    sites = ["a"] * 60 + ["b"] * 60 + ["c"] * 60
    alike = RNG.normal(size=(180, 8))
    differing = alike + 4 * np.repeat(np.arange(3), 60)[:, None]
    assert site_accuracy(differing, sites) > 0.95 and site_accuracy(alike, sites) == pytest.approx(1 / 3, abs=0.12)
    assert site_mmd2(differing, sites) > 0.5 and abs(site_mmd2(alike, sites)) < 0.02
    assert site_mmd2(100 * differing, sites) == pytest.approx(site_mmd2(differing, sites))  # the scale does not count


def test_one_site_has_no_distance():
    points = RNG.normal(size=(4, 2))
    assert site_accuracy(points, ["a"] * 4) is None and site_mmd2(points, ["a"] * 4) is None
    assert site_accuracy(points, ["a", "a", "a", "b"]) is None and site_mmd2(points, ["a", "a", "a", "b"]) is None


def test_tsne_is_fixed_and_takes_few_points():
    points = RNG.normal(size=(9, 4))
    first = tsne(points)
    assert first.shape == (9, 2) and np.array_equal(first, tsne(points))


@pytest.mark.parametrize("method", ["hsl", "hsl_shared", "fedavg"])
def test_features_are_the_encoder_s_output_of_test_images(tmp_path, method):
    sites = toy_alliance(tmp_path / "data", 2, counts=(20, 20), anchor=False)
    model = toy_model(tmp_path / "best_model.pt", method)
    found = run_features(model, sites.values(), points=8)
    assert found.sites == ["site-a"] * 8 + ["site-b"] * 8 and found.before.shape == found.after.shape == (16, 64)
    assert not np.allclose(found.before, found.after)
    _, network = load_model(model).build()
    site = load_site(sites["site-b"], 32, need_anchor=False)
    images = site.primary.batch(site.splits["test"])
    with torch.inference_mode():
        if method == "fedavg":
            expected = torch.nn.Sequential(*list(network.net.children())[:-1])(images).flatten(1)
        else:
            expected = torch.relu((network.encoders[0] if method == "hsl" else network.encoder)(images))
    nearest = [np.abs(expected.numpy() - row).max(1).min() for row in found.after[8:]]
    assert max(nearest) < 1e-4  # each row is one of this site's test images
    again = run_features(model, sites.values(), points=8)
    assert np.array_equal(found.after, again.after) and np.array_equal(found.before, again.before)


def test_every_site_has_as_many_points_as_the_smallest(tmp_path):
    sites = toy_alliance(tmp_path, 1, counts=(20, 20), anchor=False)
    small = toy_alliance(tmp_path / "small", 1, counts=(7, 7), anchor=False)["site-a"].rename(tmp_path / "tiny")
    found = run_features(toy_model(tmp_path / "m.pt"), [*sites.values(), small])
    assert (
        found.sites.count("site-a")
        == found.sites.count("tiny")
        == len(load_site(small, 32, need_anchor=False).splits["test"])
    )


def test_models_without_one_global_encoder_are_refused(tmp_path):
    sites = toy_alliance(tmp_path / "data", 2, counts=(7, 7), anchor=False)
    with pytest.raises(UserError, match="does not exist"):
        run_features(tmp_path / "best_model.pt", sites.values())
    (tmp_path / "best_model.pt").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cut off or no model file"):
        run_features(tmp_path / "best_model.pt", sites.values())
    with pytest.raises(UserError, match="no t-SNE map"):
        run_features(toy_model(tmp_path / "m.pt"), [])
