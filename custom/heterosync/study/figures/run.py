"""Figures of one run, or of a few runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heterosync.study.figures.style import MUTED, look, pyplot, save


def score_per_site(
    series: Mapping[str, Mapping[str, Mapping[str, Any]]],
    stem: Path,
    metric: str = "auc",
    shown: str = "AUC",
    chance: float | None = 0.5,
) -> list[Path]:
    """One mark per site and run with its 95 % interval, and a dashed line at each run's mean.

    `series`: run label -> site -> metrics (`metric`, called `shown`, with `ci_low` and `ci_high`); `chance`: where a
    line marks guessing. Writes `<stem>.png` and `<stem>.svg`; returns
    both.
    """
    plt = pyplot()
    sites = sorted({site for metrics in series.values() for site in metrics})
    figure, axes = plt.subplots(figsize=(max(5.0, 1.1 * len(sites) + 2), 3.8))
    step = 0.6 / max(len(series), 1)
    for k, (label, metrics) in enumerate(series.items()):
        style = look(k)
        known = [(i, metrics[site]) for i, site in enumerate(sites) if metrics.get(site, {}).get(metric) is not None]
        if not known:
            continue
        at = [i + (k - (len(series) - 1) / 2) * step for i, _ in known]
        values = [m[metric] for _, m in known]
        low = [max(0.0, m[metric] - m["ci_low"]) if m.get("ci_low") is not None else 0.0 for _, m in known]
        high = [max(0.0, m["ci_high"] - m[metric]) if m.get("ci_high") is not None else 0.0 for _, m in known]
        average = sum(values) / len(values)
        axes.errorbar(
            at, values, yerr=[low, high], capsize=2, linestyle="none", label=f"{label} (mean {average:.3f})", **style
        )
        axes.axhline(average, color=style["color"], linestyle="--", linewidth=0.8, alpha=0.6)
    if chance is not None:
        axes.axhline(chance, color=MUTED, linewidth=0.8)
    axes.set_xticks(range(len(sites)), sites)
    axes.set_xlim(-0.6, len(sites) - 0.4)
    axes.set_ylim(top=1.02)
    axes.set_ylabel(f"{shown} on the site's test set")
    axes.set_title(f"Test {shown} per site")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=min(3, max(1, len(series))))
    return save(figure, stem)


def score_over_rounds(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    stem: Path,
    shown: str = "AUC",
    chance: float | None = 0.5,
) -> list[Path]:
    """Validation score against the round: a thin line per site, a thick one for the mean. `curves`: run -> site ->
    (round, score); `shown`, `chance`: as for `score_per_site`."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 3.8))
    for k, (label, sites) in enumerate(curves.items()):
        style = look(k)
        per_round: dict[int, list[float]] = {}
        for points in sites.values():
            axes.plot(*zip(*points, strict=True), color=style["color"], linewidth=0.7, alpha=0.45) if points else None
            for round_, value in points:
                per_round.setdefault(round_, []).append(value)
        rounds = sorted(per_round)
        if rounds:
            means = [sum(per_round[r]) / len(per_round[r]) for r in rounds]
            axes.plot(rounds, means, markersize=3, linewidth=2, label=f"{label}, mean over sites", **style)
    if chance is not None:
        axes.axhline(chance, color=MUTED, linewidth=0.8)
    axes.set_ylim(top=1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("rounds of training that the model has seen")
    axes.set_ylabel(f"{shown} on the sites' validation sets")
    axes.set_title(f"Validation {shown}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return save(figure, stem)
