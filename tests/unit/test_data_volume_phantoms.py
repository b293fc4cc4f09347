"""Synthetic prostate volumes: seeded, of four scanners that differ, and in order for the check."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from heterosync.cli import main
from heterosync.data.volume_check import inspect_volumes
from heterosync.data.volume_phantoms import make_phantom
from heterosync.data.volume_scanners import SCANNERS
from heterosync.errors import UserError


def test_a_phantom_depends_on_its_numbers_alone() -> None:
    first, again = make_phantom("west", 3, 5), make_phantom("west", 3, 5)
    assert (first.image == again.image).all() and (first.mask == again.mask).all()
    for other in (make_phantom("west", 4, 5), make_phantom("west", 3, 6)):
        assert not np.array_equal(first.mask, other.mask)


@pytest.mark.parametrize("scanner", sorted(SCANNERS))
def test_prostates_are_whole_and_of_human_size(scanner: str) -> None:
    for number in range(2):
        made = make_phantom(scanner, number)
        assert made.geometry.orientation == SCANNERS[scanner].orientation and made.geometry.plane == "axial"
        assert made.image.shape == made.mask.shape == made.geometry.shape
        assert 8 < made.mask.sum() * np.prod(made.geometry.spacing) / 1000 < 150  # ml
        places = np.argwhere(made.mask)
        edge = (places.min(0) == 0) | (places.max(0) == np.array(made.mask.shape) - 1)
        assert not edge.any(), "cut off by the field of view"
        canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(made.image, made.geometry.affine))
        np.testing.assert_allclose(np.sort(canonical.header.get_zooms()), np.sort(SCANNERS[scanner].spacing), rtol=1e-5)


def test_scanners_show_the_same_tissue_differently() -> None:
    """How bright the prostate is against its surroundings, in standard deviations of the image."""
    contrast = {}
    for scanner in SCANNERS:
        made = [make_phantom(scanner, number) for number in range(3)]
        contrast[scanner] = np.mean(
            [(one.image[one.mask == 1].mean() - one.image[one.mask == 0].mean()) / one.image.std() for one in made]
        )
    assert contrast["south"] > 1.0 > contrast["north"] + 0.5, contrast


def test_alliance_of_the_command_is_in_order(tmp_path: Path) -> None:
    assert main(["data", "phantoms", "--out", str(tmp_path), "--cases", "6", "--field-of-view", "64"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["north", "south", "unseen", "west"]
    for site in SCANNERS:
        found = inspect_volumes(tmp_path / site)
        assert found.problems == [] and len(found.rows) == 6
        assert set(found.places) == ({0} if site == "unseen" else set(range(6)))
    assert main(["data", "phantoms", "--out", str(tmp_path), "--cases", "6"]) == 1, "never over another"


def test_wrong_numbers_are_told() -> None:
    with pytest.raises(UserError, match="unknown scanner 'est'; did you mean 'west'"):
        make_phantom("est", 0)
    with pytest.raises(UserError, match="choose 64 to 256"):
        make_phantom("west", 0, field_of_view=10)
