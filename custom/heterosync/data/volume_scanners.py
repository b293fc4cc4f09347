"""The scanners of the synthetic prostate volumes. Data, no code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scanner:
    """spacing: mm to the right, the front, the top; orientation: array order of its files; tilt: standard deviation in
    degrees of the slices' angles. fat, peripheral, transition: brightness of these tissues (muscle is 0.2, urine 1);
    gamma of the grey curve; scale of the stored numbers; bias: amplitude of the slow shading; coil: strength of the
    flare of a coil in the rectum, above 1 with a balloon that widens it; noise: standard deviation on the scale of the
    brightness; blur in mm within slices."""

    spacing: tuple[float, float, float]
    orientation: str
    tilt: float
    fat: float
    peripheral: float
    transition: float
    gamma: float
    scale: float
    bias: float
    coil: float
    noise: float
    blur: float


SCANNERS = {
    "north": Scanner((0.75, 0.75, 3.0), "LPS", 3, 0.75, 0.85, 0.42, 1.0, 400, 0.15, 0.0, 0.03, 0.4),
    "south": Scanner((1.0, 1.0, 4.0), "RAS", 6, 0.12, 0.62, 0.5, 0.7, 1500, 0.3, 0.0, 0.06, 0.8),
    "west": Scanner((0.6, 0.6, 3.6), "LAS", 10, 0.6, 0.95, 0.3, 1.5, 200, 0.25, 2.5, 0.045, 0.5),
    "unseen": Scanner((0.9, 0.9, 2.5), "PSR", 8, 0.5, 0.75, 0.38, 1.2, 900, 0.4, 0.8, 0.05, 0.6),
}
