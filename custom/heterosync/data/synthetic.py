"""Synthetic radiograph-like images: a seeded generator, so that everything runs without any medical data.

An image is a body region (soft tissue and bones as smooth capsules) of a varying patient, a finding in the positive
class (a fracture line in a bone, or an opacity), and a scanner with its own grey curve, sharpness and noise. Regions
and scanners differ between sites, findings are subtle: a site alone learns visibly worse than all images together.
Nothing here is medical data, and no result on it says anything about patients.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heterosync.data.anchor import write_anchor
from heterosync.data.collection import Collection
from heterosync.data.phantoms import HOSPITALS, PLAIN_SCANNER, REGIONS, SCANNERS, Scanner
from heterosync.data.scenario import write_scenario
from heterosync.data.scenario_tables import UNSEEN, SiteRow, read_table, scaled
from heterosync.errors import UserError, nearest

CLASSES = ("intact", "fracture")
ANCHOR_CLASSES = ("clear", "opacity")
ANCHOR_DOMAIN = "chest/G"
ANCHOR_PER_CLASS = 100


@dataclass(frozen=True)
class SyntheticSpec:
    """How hard the images are.

    The defaults put a small CNN near AUC 0.79 when each site of the table `synthetic` trains alone, and near 0.88 when
    it trains on the images of all sites (64 pixels, tested on 80:80 further images per domain).

    image_size: pixels of a side.
    visibility: contrast of a finding as a share of the bone's brightness; each image has 0.5 to 1.5 times this.
    noise: standard deviation of the grain on the scale 0..1, times the scanner's own factor.
    variation: spread between patients (position, size, angle, density); 1 is the default, 0 makes them alike.
    """

    image_size: int = 64
    visibility: float = 1.4
    noise: float = 0.04
    variation: float = 1.0

    def __post_init__(self) -> None:
        if not 16 <= self.image_size <= 1024:
            raise UserError(f"synthetic images: image size must be 16 to 1024, not {self.image_size}")
        if min(self.visibility, self.noise, self.variation) < 0:
            raise UserError("synthetic images: visibility, noise and variation must not be below 0")


def synthetic_images(domain: str, labels: Sequence[int] | np.ndarray, seed: int, spec: SyntheticSpec) -> np.ndarray:
    """uint8 (n, size, size) images of `domain`, "<region>/<scanner>"; label 1 shows a finding.

    A region alone has the scanner A; a hospital of the table `hospitals` has its stand-in.
    Image i depends on (seed, domain, label, i) alone, so a longer list starts with the same images.
    Raises `UserError` for an unknown region or scanner.
    """
    region, _, scanner = HOSPITALS.get(domain.casefold(), domain).partition("/")
    scanner = scanner or PLAIN_SCANNER
    for kind, name, known in (("region", region, REGIONS), ("scanner", scanner, SCANNERS)):
        if name not in known:
            raise UserError(f"synthetic domain '{domain}': unknown {kind} '{name}'; {nearest(name, known)}")
    images = np.empty((len(labels), spec.image_size, spec.image_size), dtype=np.uint8)
    for index, label in enumerate(labels):
        rng = np.random.default_rng([seed, zlib.crc32(domain.encode()), int(label), index])
        picture = _expose(_draw(region, bool(label), spec, rng), SCANNERS[scanner], spec, rng)
        images[index] = np.rint(picture * 255)
    return images


def _draw(region: str, positive: bool, spec: SyntheticSpec, rng: np.random.Generator) -> np.ndarray:
    """Brightness (size, size) of one patient before the scanner."""
    x, y = _patient_grid(spec, rng)
    shapes = np.array(REGIONS[region])
    shapes[:, 4] *= np.exp(spec.variation * rng.normal(0, 0.08, len(shapes)))
    shapes[:, 5] *= np.exp(spec.variation * rng.normal(0, 0.12, len(shapes)))
    shapes = shapes.astype(np.float32)
    distance = _distance(x, y, shapes)
    radius, brightness = shapes[:, 4, None, None], shapes[:, 5, None, None]
    inside = _step(radius - distance, 0.015)
    cortex = np.exp(-(((distance - 0.82 * radius) / (0.16 * radius)) ** 2))  # the dense rim of a bone
    marrow = 1 + 0.25 * _texture(spec.image_size, 0.08, rng)
    bones = (brightness * inside * (0.7 * marrow + 0.45 * cortex)).sum(0)
    flesh = 1.0 if region == "chest" else _step((radius - distance).max(0) + 0.2, 0.06)
    tissue = 0.22 * flesh * (1 + 0.3 * _texture(spec.image_size, 0.25, rng))
    strength = spec.visibility * rng.uniform(0.5, 1.5)
    if region == "chest":
        change = _opacity(x, y, shapes, inside, rng)
    else:
        change = _fracture(x, y, shapes, inside, rng)
    vessel = _vessel(x, y, shapes, inside, rng)  # a normal dark line along a bone: dark lines alone prove nothing
    return tissue + bones - 0.3 * vessel + (strength * change if positive else 0)


def _patient_grid(spec: SyntheticSpec, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (size, size) of the pixels in a patient turned, scaled, shifted and sometimes mirrored."""
    ticks = np.linspace(-1, 1, spec.image_size, dtype=np.float32)  # float32 halves the time
    x, y = np.meshgrid(ticks, ticks)
    angle = spec.variation * rng.normal(0, 0.15)
    scale = np.exp(spec.variation * rng.normal(0, 0.1))
    shift = spec.variation * rng.normal(0, 0.08, 2)
    mirror = rng.choice([-1, 1])
    cos, sin = float(scale * np.cos(angle)), float(scale * np.sin(angle))
    return float(mirror) * (cos * x - sin * y + float(shift[0])), sin * x + cos * y + float(shift[1])


def _distance(x: np.ndarray, y: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Distance (k, size, size) of every pixel to the axis of every capsule."""
    x0, y0, x1, y1 = (shapes[:, i, None, None] for i in range(4))
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((x - x0) * dx + (y - y0) * dy) / np.maximum(dx * dx + dy * dy, 1e-9), 0, 1)
    return np.hypot(x - x0 - along * dx, y - y0 - along * dy)


def _fracture(
    x: np.ndarray, y: np.ndarray, shapes: np.ndarray, inside: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A dark line across a bone between two faint bright edges, -1 at its darkest times the bone's brightness."""
    bone, centre, axis = _place(shapes, rng)
    angle = axis + rng.uniform(0.3, 0.7) * np.pi
    u = np.cos(angle) * (x - centre[0]) + np.sin(angle) * (y - centre[1])
    v = -np.sin(angle) * (x - centre[0]) + np.cos(angle) * (y - centre[1])
    v = v + 0.02 * np.sin(u / 0.05 + rng.uniform(0, 2 * np.pi))  # the line is jagged
    width = rng.uniform(0.05, 0.08)
    line = -np.exp(-((v / width) ** 2)) + 0.5 * np.exp(-(((np.abs(v) - 2.2 * width) / width) ** 2))
    reach = np.exp(-((u / (1.8 * shapes[bone, 4])) ** 4))
    return shapes[bone, 5] * inside[bone] * reach * line


def _opacity(
    x: np.ndarray, y: np.ndarray, shapes: np.ndarray, inside: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A soft bright patch in a lung."""
    lung = rng.choice(np.flatnonzero(shapes[:, 5] < 0))
    cx, cy = shapes[lung, 0] + rng.uniform(-0.2, 0.2), rng.uniform(-0.4, 0.5)
    spread = rng.uniform(0.12, 0.25, 2)
    patch = np.exp(-(((x - cx) / spread[0]) ** 2) - ((y - cy) / spread[1]) ** 2)
    return 0.5 * inside[lung] * patch


def _vessel(
    x: np.ndarray, y: np.ndarray, shapes: np.ndarray, inside: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A thin line nearly along a bone, in every image of either class."""
    bone, centre, axis = _place(shapes, rng)
    angle = axis + rng.normal(0, 0.1)
    u = np.cos(angle) * (x - centre[0]) + np.sin(angle) * (y - centre[1])
    v = -np.sin(angle) * (x - centre[0]) + np.cos(angle) * (y - centre[1])
    return np.abs(shapes[bone, 5]) * inside[bone] * np.exp(-((v / 0.03) ** 2) - (u / 0.25) ** 4)


def _place(shapes: np.ndarray, rng: np.random.Generator) -> tuple[int, np.ndarray, float]:
    """A bone, thicker ones more often; a point on its axis within the field of view; the direction of the axis."""
    bone = int(rng.choice(len(shapes), p=np.abs(shapes[:, 4]) / np.abs(shapes[:, 4]).sum()))
    start, end = shapes[bone, :2], shapes[bone, 2:4]
    share = rng.uniform(0.1, 0.9)
    centre = np.clip(start, -0.75, 0.75) * (1 - share) + np.clip(end, -0.75, 0.75) * share
    return bone, centre, float(np.arctan2(*(end - start)[::-1])) if (start != end).any() else rng.uniform(0, np.pi)


def _expose(picture: np.ndarray, scanner: Scanner, spec: SyntheticSpec, rng: np.random.Generator) -> np.ndarray:
    """What the scanner makes of it, in [0, 1]."""
    size = spec.image_size
    picture = _blur(picture, scanner.blur)
    exposure = np.exp(spec.variation * rng.normal(0, 0.1))
    picture = scanner.contrast * np.clip(exposure * picture, 0, 1) ** scanner.gamma + scanner.offset
    grain = _blur(rng.standard_normal((size, size), dtype=np.float32), 0.012)
    picture = picture + spec.noise * scanner.grain * grain / grain.std()
    return np.clip(picture, 0, 1)


def _step(value: np.ndarray, softness: float) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(value / softness)


def _texture(size: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth random field (size, size) with mean 0 and standard deviation 1."""
    field = _blur(rng.standard_normal((size, size), dtype=np.float32), scale)
    return (field - field.mean()) / max(field.std(), 1e-9)


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, `sigma` in units of the field of view (-1..1), by Fourier transform."""
    size = len(picture)
    frequency = np.fft.fftfreq(size, 2 / size)
    damping = np.exp(-2 * (np.pi * sigma * frequency) ** 2).astype(np.float32)
    return np.fft.irfft2(np.fft.rfft2(picture) * damping[:, None] * damping[: size // 2 + 1], s=picture.shape)


def synthetic_collection(
    table: Sequence[SiteRow],
    seed: int = 0,
    spec: SyntheticSpec | None = None,
    classes: tuple[str, str] = CLASSES,
    draw: bool = True,
) -> Collection:
    """Exactly the images that `table` asks for; without `draw` all but the pixels, which is enough for a plan."""
    spec = spec or SyntheticSpec()
    totals: dict[str, list[int]] = {}
    for row in table:
        total = totals.setdefault(row.domain, [0, 0])
        total[0] += row.negative
        total[1] += row.positive
    labels = {domain: np.repeat([0, 1], total) for domain, total in totals.items()}
    numbers = {domain: [*range(total[0]), *range(total[1])] for domain, total in totals.items()}
    return Collection(
        name="synthetic",
        classes=classes,
        labels=np.concatenate(list(labels.values())),
        ids=[f"synthetic {d} {classes[k]} {i}" for d in totals for k, i in zip(labels[d], numbers[d], strict=True)],
        domains=[domain for domain in totals for _ in labels[domain]],
        pixels=np.concatenate([synthetic_images(d, labels[d], seed, spec) for d in totals]) if draw else None,
    )


def make_alliance(
    out: Path | str,
    seed: int = 0,
    image_size: int = 64,
    scale: float = 1.0,
    table: Path | str = "synthetic",
    spec: SyntheticSpec | None = None,
) -> list[str]:
    """Write an alliance of synthetic site folders, each with the same anchor pack; returns the names of its sites.

    The anchor is another task on another region: opacities in chests. `spec` overrides `image_size`.
    Raises `UserError` when `out` is in use or the table names an unknown region or scanner.
    """
    spec = spec or SyntheticSpec(image_size=image_size)
    rows = scaled(read_table(table), scale)
    per_class = max(round(ANCHOR_PER_CLASS * scale), 10)
    anchor_labels = np.repeat([0, 1], per_class)
    anchor_images = synthetic_images(ANCHOR_DOMAIN, anchor_labels, seed, spec)
    collection = synthetic_collection(rows, seed, spec)
    with tempfile.TemporaryDirectory() as temporary:
        anchor = Path(temporary) / "anchor"
        write_anchor(anchor, anchor_images, anchor_labels, "synthetic chest opacity", *ANCHOR_CLASSES)
        folders = write_scenario(collection, rows, out, anchor, seed, task="synthetic fracture detection")
    return [folder.name for folder in folders if folder.name != UNSEEN]
