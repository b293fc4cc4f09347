"""To 1 mm and back: everything stays at its place in the patient, on oblique grids in any array order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heterosync.data.volume_geometry import Geometry
from heterosync.data.volume_preprocess import Preprocessing, to_geometry
from heterosync.errors import UserError
from volume_toys import oblique, world

SHAPE = (48, 44, 16)
GRIDS = [
    ("RAS", (0.7, 0.7, 3.0), (0, 0, 0)),
    ("LPS", (0.7, 0.8, 3.0), (14, -9, 25)),
    ("PSR", (0.9, 0.8, 1.75), (-20, 12, 5)),
    ("IAL", (1.0, 1.0, 1.0), (3, 30, -8)),
]


def field(places: np.ndarray) -> np.ndarray:
    """A smooth function of the place in mm, so that a shift of a tenth of a millimetre shows."""
    x, y, z = places
    return 100 + 2 * x - 3 * y + 1.5 * z + 4 * np.sin(x / 12) + 3 * np.cos((y + z) / 15)


def grid(axes: str, spacing: tuple, angles: tuple) -> Geometry:
    return Geometry(SHAPE, oblique(spacing, angles, axes, SHAPE))


def inside(values: np.ndarray) -> np.ndarray:
    """The middle third along each axis: a spline needs some slices around."""
    return values[tuple(slice(length // 3, -(length // 3)) for length in values.shape)]


@pytest.mark.parametrize("interpolation", ["linear", "spline"])
@pytest.mark.parametrize("given", GRIDS, ids=lambda given: given[0])
def test_values_stay_at_their_places(given: tuple, interpolation: str) -> None:
    here = grid(*given)
    values = field(world(here.affine, here.shape)).astype(np.float32)
    image = Preprocessing(interpolation=interpolation).image(values, here)
    there = Geometry(tuple(image.shape[1:]), image.affine.numpy())
    assert there.orientation == "RAS" and there.shape == here.resampled_shape(1.0)
    np.testing.assert_allclose(there.spacing, 1.0, atol=1e-6)
    assert abs(float(image.mean())) < 1e-4 and abs(float(image.std(correction=0)) - 1) < 1e-4

    shown, true = inside(image[0].numpy()), inside(field(world(there.affine, there.shape)))
    slope, offset = np.polyfit(shown.ravel(), true.ravel(), 1)  # zero mean and unit variance, undone
    assert np.abs(slope * shown + offset - true).max() < 0.06  # 0.02 mm of the field's slope

    back = to_geometry(image.as_tensor(), image.affine, here)[0]
    assert back.shape == SHAPE
    wrong = np.abs(slope * back + offset - values)
    assert wrong[2:-2, 2:-2, 2:-2].max() < 0.15 and wrong.max() < 4, "margins go on from the outermost voxel"


@pytest.mark.parametrize("given", GRIDS, ids=lambda given: given[0])
def test_a_mask_comes_back_voxel_for_voxel(given: tuple) -> None:
    here = grid(*given)
    places = world(here.affine, here.shape)
    middle = places.reshape(3, -1).mean(1)[:, None, None, None]
    x, y, z = places - middle - np.array([2.0, -1.0, 1.0])[:, None, None, None]
    organ = (x / 11) ** 2 + (y / 8) ** 2 + (z / 9) ** 2 < 1  # unsymmetrical about the volume's middle
    image = Preprocessing().image(field(places), here)
    mask = Preprocessing().mask(organ, here, image)
    assert mask.shape == image.shape and set(np.unique(mask)) == {0, 1}
    voxel = float(np.prod(here.spacing))
    assert abs(int(mask.sum()) - organ.sum() * voxel) < 0.05 * organ.sum() * voxel
    centre = (
        torch.nonzero(mask[0]).double().mean(0).numpy() @ image.affine.numpy()[:3, :3].T + image.affine.numpy()[:3, 3]
    )
    np.testing.assert_allclose(centre, places[:, organ].mean(1), atol=0.2)
    for mode in ("nearest", "bilinear"):
        back = to_geometry(mask.float(), image.affine, here, mode)[0] > 0.5
        assert 2 * (back & organ).sum() / (back.sum() + organ.sum()) > 0.96, mode


def test_a_single_voxel_comes_back_to_itself() -> None:
    here = Geometry(SHAPE, oblique((2.0, 2.0, 4.0), (14, -9, 25), "LPS", SHAPE))
    for index in ((5, 7, 3), (30, 2, 12), (47, 43, 15), (0, 0, 0)):
        point = np.zeros(SHAPE, bool)
        point[index] = True
        image = Preprocessing().image(field(world(here.affine, SHAPE)), here)
        mask = Preprocessing().mask(point, here, image)
        assert mask.any()
        back = to_geometry(mask.float(), image.affine, here, "nearest")[0]
        assert np.argwhere(back > 0).tolist() == [list(index)]


@pytest.mark.parametrize("given", GRIDS, ids=lambda given: given[0])
def test_the_noise_of_a_header_moves_nothing(given: tuple) -> None:
    exact = grid(*given)
    noisy = Geometry(SHAPE, exact.affine.astype(np.float32).astype(np.float64))  # as NIfTI stores it
    values = field(world(exact.affine, SHAPE)).astype(np.float32)
    first, other = (Preprocessing().image(values, place) for place in (exact, noisy))
    assert first.shape == other.shape and (first.affine - other.affine).abs().max() < 1e-4
    outermost = first.affine.numpy() @ [0, 0, 0, 1] - exact.canonical().affine @ [0, 0, 0, 1]
    np.testing.assert_allclose(outermost, 0, atol=1e-4)  # the first voxel keeps its place
    skewed = exact.affine.copy()
    skewed[:3, 2] += 0.1 * skewed[:3, 0]
    np.testing.assert_array_equal(Geometry(SHAPE, skewed).without_noise(), skewed)


def test_a_mask_in_another_array_order_lands_on_the_image() -> None:
    import nibabel

    here = grid(*GRIDS[1])
    organ = np.zeros(SHAPE, bool)
    organ[8:20, 9:30, 4:9] = True
    order = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(here.affine), nibabel.orientations.axcodes2ornt("SRA")
    )
    turned = nibabel.apply_orientation(organ, order)
    there = Geometry(turned.shape, here.affine @ nibabel.orientations.inv_ornt_aff(order, SHAPE))
    image = Preprocessing().image(field(world(here.affine, SHAPE)), here)
    straight, other = (Preprocessing().mask(values, place, image) for values, place in ((organ, here), (turned, there)))
    assert straight.sum() > 1000 and (straight == other).float().mean() > 0.999


@pytest.mark.parametrize("wrong", [{"spacing": 0.0}, {"spacing": 50}, {"interpolation": "cubic"}])
def test_settings_are_judged(wrong: dict) -> None:
    with pytest.raises(UserError):
        Preprocessing(**wrong)
