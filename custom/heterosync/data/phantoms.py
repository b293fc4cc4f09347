"""What the synthetic images are made of: body regions as bones in soft tissue, and scanners. Data, no code."""

from __future__ import annotations

from dataclasses import dataclass

# A capsule is a segment with a radius: x0, y0, x1, y1, radius, brightness. The field of view is -1..1, y points down.
Capsule = tuple[float, float, float, float, float, float]

#: Bones of each body region; soft tissue is drawn around them. Negative brightness is air.
REGIONS: dict[str, tuple[Capsule, ...]] = {
    "elbow": (
        (0.05, -1.3, 0.0, -0.15, 0.17, 0.5),
        (-0.14, 0.12, -0.3, 1.3, 0.11, 0.42),
        (0.12, 0.02, 0.22, 1.3, 0.13, 0.46),
        (-0.14, -0.08, 0.16, -0.1, 0.13, 0.45),
    ),
    "forearm": ((-0.22, -1.3, -0.2, 1.3, 0.12, 0.45), (0.22, -1.3, 0.16, 1.3, 0.13, 0.48)),
    "humerus": ((-0.2, -0.62, -0.12, -0.5, 0.3, 0.45), (-0.12, -0.5, 0.15, 1.3, 0.17, 0.55)),
    "finger": (
        (0.0, 0.42, 0.02, 1.3, 0.19, 0.5),
        (0.0, -0.28, 0.0, 0.2, 0.15, 0.47),
        (0.0, -0.8, 0.0, -0.48, 0.11, 0.42),
    ),
    "wrist": (
        (-0.2, 0.4, -0.24, 1.3, 0.2, 0.5),
        (0.27, 0.42, 0.26, 1.3, 0.12, 0.44),
        *((x, 0.1 - 0.15 * abs(x), x, 0.1 - 0.15 * abs(x), 0.13, 0.42) for x in (-0.32, -0.07, 0.2)),
        *((x, -0.2, x, -0.2, 0.12, 0.42) for x in (-0.3, -0.1, 0.1, 0.3)),
        *((x, -0.42, 1.4 * x, -1.3, 0.08, 0.4) for x in (-0.34, -0.11, 0.11, 0.34)),
    ),
    "hand": tuple((x, 0.5, 2 * x, -0.9, 0.09, 0.42) for x in (-0.4, -0.2, 0.0, 0.2, 0.4)),
    "shoulder": (
        (0.1, -0.05, 0.12, 0.05, 0.3, 0.46),
        (0.15, 0.1, 0.35, 1.3, 0.18, 0.5),
        (-1.3, -0.5, 0.25, -0.55, 0.09, 0.44),
        (-0.35, -0.1, -0.5, 0.8, 0.2, 0.28),
    ),
    "chest": (
        (0.0, -1.3, 0.0, 1.3, 0.12, 0.3),
        (-0.45, -0.35, -0.5, 0.45, 0.33, -0.35),
        (0.45, -0.35, 0.5, 0.45, 0.33, -0.35),
        *((0.05, y, 0.85, y + 0.25, 0.04, 0.12) for y in (-0.7, -0.35, 0.0, 0.35)),
        *((-0.05, y, -0.85, y + 0.25, 0.04, 0.12) for y in (-0.7, -0.35, 0.0, 0.35)),
    ),
}


@dataclass(frozen=True)
class Scanner:
    """gamma and contrast of the grey curve, blur in units of the field of view, factor on the grain."""

    gamma: float
    contrast: float
    offset: float
    blur: float
    grain: float


SCANNERS = {
    "A": Scanner(1.0, 1.0, 0.0, 0.012, 0.8),
    "B": Scanner(0.7, 0.8, 0.1, 0.02, 1.0),
    "C": Scanner(1.4, 1.15, -0.02, 0.01, 1.4),
    "D": Scanner(0.85, 0.7, 0.2, 0.016, 1.2),
    "E": Scanner(1.2, 0.9, 0.05, 0.02, 0.7),
    "F": Scanner(1.0, 0.9, 0.08, 0.015, 1.0),
    "G": Scanner(0.9, 0.9, 0.05, 0.015, 1.0),
}

#: The scanner of a domain that names a region alone.
PLAIN_SCANNER = "A"

#: What stands in for the hospitals of the table `hospitals`: one organ, each hospital with its own scanner; the unseen
#: population has a scanner that no hospital has.
HOSPITALS = {
    "sysu01": "shoulder/A",
    "sysu06": "shoulder/B",
    "sysucc": "shoulder/C",
    "gxfy": "shoulder/D",
    "fsss": "shoulder/E",
    "ptc": "shoulder/F",
}
