"""The synthetic generator: seeded, different between regions and scanners, with a finding that is local."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from heterosync.data import synthetic
from heterosync.data.check import check_site
from heterosync.data.scenario_tables import read_table
from heterosync.data.synthetic import REGIONS, SCANNERS, SyntheticSpec, make_alliance, synthetic_images
from heterosync.errors import UserError


def test_images_depend_on_seed_domain_label_and_index_alone() -> None:
    spec = SyntheticSpec(image_size=32)
    one = synthetic_images("elbow/A", [0, 0, 1, 1], 5, spec)
    assert one.shape == (4, 32, 32) and one.dtype == np.uint8
    assert (synthetic_images("elbow/A", [0, 0, 1], 5, spec) == one[:3]).all()
    assert len({image.tobytes() for image in one}) == 4
    for other in (synthetic_images("elbow/A", [0], 6, spec), synthetic_images("elbow/B", [0], 5, spec)):
        assert (other[0] != one[0]).mean() > 0.5


@pytest.mark.parametrize("region", sorted(REGIONS))
def test_a_finding_is_a_local_change(region: str) -> None:
    spec = SyntheticSpec()
    for seed in range(5):
        negative, positive = (
            synthetic._draw(region, finding, spec, np.random.default_rng(seed)) for finding in (False, True)
        )
        change = np.abs(positive - negative)
        assert change.max() > 0.05
        assert (change > 0.2 * change.max()).mean() < 0.12
        assert change[0].max() < 0.5 * change.max(), "within the field of view"


def test_visibility_scales_the_finding_and_nothing_else() -> None:
    faint, plain, none = (
        synthetic._draw("wrist", True, SyntheticSpec(visibility=v), np.random.default_rng(1)) for v in (0.5, 1.0, 0.0)
    )
    assert np.allclose(plain - none, 2 * (faint - none), atol=1e-5)
    assert np.allclose(none, synthetic._draw("wrist", False, SyntheticSpec(), np.random.default_rng(1)), atol=1e-5)


def test_scanners_differ_in_grey_level_and_grain() -> None:
    means = [synthetic_images(f"forearm/{name}", [0] * 8, 0, SyntheticSpec()).mean() for name in sorted(SCANNERS)]
    assert max(means) - min(means) > 20


def test_alliance_follows_its_table_and_passes_the_check(tmp_path: Path) -> None:
    sites = make_alliance(tmp_path / "data", seed=2, image_size=32, scale=0.25)
    assert sites == ["site-a", "site-b", "site-c", "site-d", "site-e"]
    assert [check_site(tmp_path / "data" / site) for site in ("site-e", "unseen")] == [[], []]
    manifest = (tmp_path / "data" / "site-a" / "manifest.csv").read_text()
    assert (manifest.count(",intact,"), manifest.count(",fracture,")) == (24, 3)
    assert "task: synthetic" in (tmp_path / "data" / "site-a" / "site.yaml").read_text()
    assert "synthetic" in (tmp_path / "data" / "site-a" / "anchor" / "anchor.json").read_text()
    again = make_alliance(tmp_path / "again", seed=2, image_size=32, scale=0.25)
    for site in again:
        first, second = (np.load(tmp_path / place / site / "images.npz")["images"] for place in ("data", "again"))
        assert (first == second).all()


def test_table_has_every_skew() -> None:
    rows = [row for row in read_table("synthetic") if row.site != "unseen"]
    assert len({row.domain for row in rows}) == len({row.site for row in rows}) == 5
    shares = [row.positive / (row.positive + row.negative) for row in rows]
    sizes = [row.positive + row.negative for row in rows]
    assert min(shares) < 0.06 and max(shares) > 0.8 and max(sizes) > 2 * min(sizes)
    unseen = [row for row in read_table("synthetic") if row.site == "unseen"]
    assert sum(row.negative for row in unseen) == sum(row.positive for row in unseen) == 60


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ("elbo/A", "unknown region 'elbo'; did you mean 'elbow'"),
        ("elbow/Z", "unknown scanner 'Z'"),
        ("", "unknown reg"),
    ],
)
def test_unknown_domain(domain: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthetic_images(domain, [0], 0, SyntheticSpec())


def test_bad_spec_and_used_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image size must be 16 to 1024"):
        SyntheticSpec(image_size=8)
    with pytest.raises(UserError, match="visibility"):
        SyntheticSpec(visibility=-1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "kept").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        make_alliance(tmp_path / "data", image_size=32, scale=0.1)
    assert (tmp_path / "data" / "kept").read_text() == "mine"
