"""Synthetic T2-like prostate volumes: a seeded generator, so that segmentation runs without any medical data.

A volume is a pelvis of a varying patient (prostate with peripheral and transition zone, seminal vesicles, bladder,
rectum, muscles, fat) seen by a scanner with its own grid, contrast, shading, coil and noise. Nothing here is medical
data, and no result on it says anything about patients.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from heterosync.data.scenario_tables import UNSEEN
from heterosync.data.volume_collection import write_manifest
from heterosync.data.volume_geometry import Geometry
from heterosync.data.volume_scanners import SCANNERS, Scanner
from heterosync.data.volumes import write_nifti
from heterosync.errors import UserError, nearest
from heterosync.files import make_folder, new_folder

HEIGHT = 72.0  # mm, of the stack of slices
FIELD_OF_VIEW = (64.0, 256.0)  # mm; below, the prostate is cut off


@dataclass(frozen=True)
class Phantom:
    """`image` int16 and `mask` uint8 (0 and 1), both (x, y, z) in the array order of the scanner."""

    image: np.ndarray
    mask: np.ndarray
    geometry: Geometry


def make_phantom(scanner: str, number: int, seed: int = 0, field_of_view: float = 96.0) -> Phantom:
    """Patient `number` on a scanner; depends on these four values alone. `field_of_view`: side of a slice in mm.

    Raises `UserError` for an unknown scanner and for a field of view outside of `FIELD_OF_VIEW`.
    """
    if scanner not in SCANNERS:
        raise UserError(f"unknown scanner '{scanner}'; {nearest(scanner, SCANNERS)}")
    if not FIELD_OF_VIEW[0] <= field_of_view <= FIELD_OF_VIEW[1]:
        raise UserError("field of view {:g} mm: choose {:g} to {:g}".format(field_of_view, *FIELD_OF_VIEW))
    machine = SCANNERS[scanner]
    rng = np.random.default_rng([seed, zlib.crc32(scanner.encode()), number])
    shape = tuple(
        round(side / step) for side, step in zip((field_of_view,) * 2 + (HEIGHT,), machine.spacing, strict=True)
    )
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", machine.tilt * rng.normal(0, 1, 3), degrees=True).as_matrix()
    affine[:3, :3] = turn * machine.spacing
    affine[:3, 3] = rng.normal(0, 3, 3) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    indices = np.indices(shape, dtype=np.float32)
    world = np.tensordot(affine[:3, :3].astype(np.float32), indices, 1) + affine[:3, 3, None, None, None].astype(
        np.float32
    )
    tissue, mask, rectum = _anatomy(world, machine, rng)
    image = _acquire(tissue, world, rectum, machine, rng)

    ras = nibabel.io_orientation(np.eye(4))
    order = nibabel.orientations.ornt_transform(ras, nibabel.orientations.axcodes2ornt(machine.orientation))
    stored = [
        np.ascontiguousarray(nibabel.apply_orientation(values, order)) for values in (image, mask.astype(np.uint8))
    ]
    affine = affine @ nibabel.orientations.inv_ornt_aff(order, shape)
    return Phantom(stored[0], stored[1], Geometry(stored[0].shape, affine))


def make_phantom_alliance(out: Path | str, seed: int = 0, cases: int = 10, field_of_view: float = 96.0) -> list[str]:
    """Write a site folder `out`/NAME with `cases` volumes for each scanner; returns the names of those that train.

    The scanner `unseen` becomes an outside test set. Raises `UserError` when one of the folders is in use.
    """
    out = make_folder(out)
    for site in SCANNERS:
        with new_folder(out / site) as folder:
            rows = []
            for number in range(cases):
                made = make_phantom(site, number, seed, field_of_view)
                names = [f"{part}/{number + 1:04}.nii.gz" for part in ("images", "masks")]
                for name, values in zip(names, (made.image, made.mask), strict=True):
                    write_nifti(folder / name, values, made.geometry.affine)
                rows.append((*names, f"{site}-{number + 1}", "synthetic"))
            write_manifest(folder, rows, test_only=site == UNSEEN)
    return [site for site in SCANNERS if site != UNSEEN]


def _anatomy(
    world: np.ndarray, machine: Scanner, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Brightness of the tissue, the prostate as bool, and the middle of the rectum (x, y in mm).

    `world` (3, x, y, z) is in mm to the right, front and top of the prostate's usual place.
    """
    x, y, z = world - rng.normal(0, 2, (3, 1, 1, 1)).astype(np.float32)
    size = np.exp(rng.normal(0, 0.15))  # prostates of 20 to 100 ml are common
    half = size * np.array([24.0, 17.0, 21.0]) * np.exp(rng.normal(0, 0.07, 3))
    balloon = 17.0 if machine.coil > 1 else 0.0
    wall = max(balloon, rng.uniform(9, 14))  # radius of the rectum
    rectum = np.array([rng.normal(0, 3), -half[1] - wall + 1.0])

    tissue = machine.fat * (1 + 0.12 * _texture(x.shape, machine, 6.0, rng))
    for side in (-1, 1):  # obturator muscles
        tissue = _over(tissue, 0.2, _ellipsoid(x - side * 46, y - 5, z, (11, 34, 60)), 1.5)
    tissue = _over(tissue, 0.3, _ellipsoid(x, y - half[1] - 22, z + 8, (22, 12, 22)), 1.5)  # pubic bone
    tissue = _over(tissue, 1.0, _ellipsoid(x, y - 8, z - half[2] - 15, (26, 18, 19)), 1.0)  # bladder
    for side in (-1, 1):  # seminal vesicles: bright as the peripheral zone, but no part of the prostate
        tissue = _over(
            tissue, machine.peripheral, _ellipsoid(x - side * 13, y + half[1] * 0.7, z - half[2] - 3, (12, 5, 5)), 0.8
        )
    tube = wall - np.hypot(x - rectum[0], y - rectum[1] - 0.1 * z)
    tissue = _over(tissue, 0.28, tube, 0.8)
    tissue = _over(tissue, 0.03 if balloon or rng.random() < 0.5 else 0.45, tube - 3, 0.8)  # gas or balloon, or stool

    polar, around = np.arctan2(np.hypot(x, y), z), np.arctan2(y, x)
    bumps = sum(rng.normal(0, 0.05) * np.cos(k * around + rng.uniform(0, 6.3)) * np.sin(polar) ** k for k in (1, 2, 3))
    depth = _ellipsoid(x, y, z, half) + 17 * bumps
    depth = np.minimum(depth, -(tube - 1.0))  # the rectum dents the prostate, it never lies in it
    tissue = _over(tissue, 0.15, depth + 1.2, 0.5)  # capsule
    tissue = _over(tissue, machine.peripheral * (1 + 0.08 * _texture(x.shape, machine, 2.5, rng)), depth, 0.5)
    inner = _ellipsoid(x, y - 0.22 * half[1], z - 0.15 * half[2], half * np.array([0.68, 0.7, 0.78]))
    nodules = machine.transition * (1 + 0.3 * _texture(x.shape, machine, 3.0, rng))
    tissue = _over(tissue, nodules, np.minimum(inner, depth - 1), 0.8)
    return tissue, depth > 0, rectum


def _acquire(
    tissue: np.ndarray, world: np.ndarray, rectum: np.ndarray, machine: Scanner, rng: np.random.Generator
) -> np.ndarray:
    """What the scanner makes of it: int16 (x, y, z)."""
    blur = [machine.blur / step for step in machine.spacing[:2]]
    signal = gaussian_filter(np.clip(tissue, 0, None), (*blur, 0)) ** machine.gamma
    direction = rng.normal(0, 1, 3)
    along = np.tensordot(direction / np.linalg.norm(direction), world, 1) / 50
    shading = np.exp(machine.bias * (along + 0.5 * along**2 * rng.choice([-1, 1])))
    if machine.coil:  # sensitivity falls with the distance to the coil; near it the image is washed out
        distance = np.hypot(world[0] - rectum[0], world[1] - rectum[1])
        shading = shading * (1 + machine.coil * np.exp(-(np.clip(distance - 8, 0, None)) / 14))
    noise = rng.normal(0, machine.noise, (2, *tissue.shape))
    magnitude = np.hypot(signal * shading + noise[0], noise[1])  # Rician, as in magnitude images
    return np.clip(machine.scale * np.exp(rng.normal(0, 0.1)) * magnitude, 0, 32767).astype(np.int16)


def _ellipsoid(x: np.ndarray, y: np.ndarray, z: np.ndarray, half: tuple[float, ...] | np.ndarray) -> np.ndarray:
    """About the depth in mm below the surface of an ellipsoid around 0, negative outside."""
    radius = np.sqrt((x / half[0]) ** 2 + (y / half[1]) ** 2 + (z / half[2]) ** 2)
    return (1 - radius) * float(min(half))


def _over(below: np.ndarray, value: np.ndarray | float, depth: np.ndarray, softness: float) -> np.ndarray:
    """`value` where `depth` (mm) is above 0, with an edge of `softness` mm."""
    inside = 0.5 + 0.5 * np.tanh(depth / softness)
    return below + inside * (value - below)


def _texture(shape: tuple[int, ...], machine: Scanner, scale: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth random field of mean 0 and deviation 1, `scale` in mm."""
    field = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), [scale / step for step in machine.spacing])
    return (field - field.mean()) / max(float(field.std()), 1e-9)
