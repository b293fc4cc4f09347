"""A finished study that nobody trained: the files of a study folder with made-up scores, for tests of its report."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from heterosync.study import layout
from heterosync.study.layout import Done, Prediction, RunSpec
from heterosync.training.metrics import binary_metrics

#: Site -> (negative, positive) test cases; `unseen` is what no site trains on.
SITES: dict[str, dict[str, tuple[int, int]]] = {
    "feature-skew": {f"site-{part}": (30, 30) for part in ("elbow", "finger", "forearm", "hand", "humerus", "wrist")},
    "label-skew": {"node-1": (40, 40), "node-2": (70, 10)},
    "quantity-skew": {"node-1": (15, 15), "node-2": (60, 60)},
    "combined": {
        "screening-centre": (80, 8),
        "specialised-hospital": (6, 60),
        "clinic-1": (15, 15),
        "clinic-2": (15, 15),
        "rare-disease-region": (300, 2),
    },
    "hospitals": {"sysu01": (100, 180), "sysu06": (40, 25), "gxfy": (30, 28), "unseen": (12, 90)},
}
#: Distance of the two classes in standard deviations of the score, method by method.
SKILL = {
    "hsl": 1.9,
    "no_sat": 1.3,
    "no_al": 1.5,
    "fedavg": 1.6,
    "fedprox": 1.5,
    "fedbn": 1.4,
    "personalized": 1.5,
    "splitavg": 1.2,
    "ditto": 1.4,
    "fedadam": 1.3,
    "scaffold": 1.5,
    "moon": 1.6,
    "local": 1.0,
    "central": 2.2,
}
#: Methods that keep a model per site.
PERSONAL = ("local", "personalized", "fedbn", "splitavg", "ditto")
LEVELS: dict[str, tuple[str, ...]] = {"label-skew": ("2", "10", "100"), "quantity-skew": ("1", "20", "80")}
#: Coupling of the anchor task, logged by the methods that have one.
COUPLED = ("hsl", "no_al", "personalized")


def fake_study(
    folder: Path,
    methods: Sequence[str] = ("hsl", "fedavg", "local", "fedbn-equal_steps"),
    scenarios: Sequence[str] = ("combined", "hospitals"),
    repeats: int = 3,
    levels: Mapping[str, Sequence[str]] = LEVELS,
    sites: Mapping[str, Mapping[str, tuple[int, int]]] = SITES,
    rounds: int = 5,
    seed: int = 0,
) -> Path:
    """Write a study folder with every run finished; `methods` are labels, `method` or `method-variant`.

    A method's scores at a site keep to `SKILL`, cases are as hard for one method as for another, every fourth image is
    tested in all repeats, and two images in three share a patient with the one before.
    """
    specs = [
        RunSpec(
            scenario,
            layout.level_folder(level),
            repeat,
            label.partition("-")[0],
            label.partition("-")[2],
            label,
            {"method": {}, "training": {"rounds": rounds, "seed": repeat}},
            f"digest of {scenario} {level} {repeat} {label}",
        )
        for scenario in scenarios
        for level in (levels.get(scenario) or (None,))
        for repeat in range(repeats)
        for label in methods
    ]
    entries = [
        {"scenario": name, "name": name, "scale": None, "anchor": None, "any_domain": False} for name in scenarios
    ]
    plan = {"name": "toy", "methods": list(methods), "scenarios": entries, "seeds": list(range(repeats))}
    runs = {spec.folder(folder).relative_to(folder).as_posix(): spec.digest for spec in specs}
    cells = {(spec.scenario, spec.level, spec.repeat): dict(sites[spec.scenario]) for spec in specs}
    study = {
        "name": "toy",
        "digest": "toy",
        "plan": plan,
        "engine": "inprocess",
        "seeds": list(range(repeats)),
        "source": "synthetic",
        "versions": {"heterosync": "0.0", "torch": "2.0"},
        "runs": runs,
        "cells": [
            {"scenario": scenario, "level": level, "repeat": repeat, "seed": repeat}
            | {"sites": {name: [2 * sum(n), sum(n) // 3, sum(n)] for name, n in of_cell.items() if name != "unseen"}}
            for (scenario, level, repeat), of_cell in cells.items()
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / layout.STUDY).write_text(json.dumps(study))
    for spec in specs:
        fake_run(folder, spec, sites[spec.scenario], rounds, seed)
    return folder


def fake_run(study: Path, spec: RunSpec, sites: Mapping[str, tuple[int, int]], rounds: int = 5, seed: int = 0) -> Path:
    """Write one finished run."""
    folder = spec.folder(study)
    results = folder / layout.RESULTS
    results.mkdir(parents=True, exist_ok=True)
    layout.write_spec(folder, spec)
    trained = [site for site in sites if site != layout.UNSEEN]
    personal = spec.method in PERSONAL
    rows: list[Prediction] = []
    tests = {}
    for site in trained:
        model = layout.own_model(site) if personal else layout.GLOBAL
        of_site = _predictions(spec, site, sites[site], model, seed)
        rows += of_site
        tests[site] = binary_metrics(np.array([r.label for r in of_site]), np.array([r.probability for r in of_site]))
    if layout.UNSEEN in sites:
        for model in [layout.own_model(site) for site in trained] if personal else [layout.GLOBAL]:
            rows += _predictions(spec, layout.UNSEEN, sites[layout.UNSEEN], model, seed)
    layout.write_predictions(results, rows)
    known = [values["auc"] for values in tests.values() if values["auc"] is not None]
    mean = {"auc": sum(known) / len(known) if known else None, "sites": len(tests)}
    name = "local" if personal else layout.GLOBAL
    (results / "cross_site_metrics.json").write_text(json.dumps({name: {**tests, "mean": mean}}))
    _write_record(results, spec, trained, rounds)
    cost = _rng(spec.label, "cost")
    layout.write_done(
        folder,
        Done(
            digest=spec.digest,
            seconds=60.0 + 30 * cost.random() + 5 * spec.repeat,
            peak_memory_bytes=int((2 + cost.random()) * 2**30),
            bytes_per_site_round=0 if spec.method in ("local", "central") else int((40 + 50 * cost.random()) * 2**20),
            engine="inprocess",
            finished="2025-01-01T00:00:00+00:00",
        ),
    )
    return folder


def _predictions(spec: RunSpec, site: str, counts: tuple[int, int], model: str, seed: int) -> list[Prediction]:
    labels = np.repeat([0, 1], counts)
    n = len(labels)
    cases = _rng(seed, spec.scenario, spec.level, site, spec.repeat)  # the same for every method
    own = _rng(seed, spec.scenario, spec.level, site, spec.repeat, spec.label, model)
    far = SKILL[spec.method] + 0.3 * _rng(spec.scenario, spec.level, site).standard_normal()
    far += 0.2 * own.standard_normal() - 0.5 * (site == layout.UNSEEN)
    score = far * (labels - 0.5) + 0.8 * cases.standard_normal(n) + 0.6 * own.standard_normal(n)
    shared = (np.arange(n) % 4 == 0) | (site == layout.UNSEEN)  # the unseen population is the same in every repeat
    ids = [f"{site}/{k:05d}.png" if shared[k] else f"{site}/r{spec.repeat}-{k:05d}.png" for k in range(n)]
    patients = [f"{site}-p{k // 3}" for k in range(n)]
    probabilities = 1 / (1 + np.exp(-score))
    return [Prediction(site, ids[k], patients[k], int(labels[k]), float(probabilities[k]), model) for k in range(n)]


def _write_record(results: Path, spec: RunSpec, sites: Sequence[str], rounds: int) -> None:
    curve = _rng(spec.scenario, spec.level, spec.repeat, spec.label)
    rows = []
    for round_ in range(rounds + 1):
        for place, site in enumerate(sites):
            auc = 0.5 + 0.12 * SKILL[spec.method] * (1 - np.exp(-round_ / 2)) + 0.02 * curve.standard_normal()
            rows.append((round_, site, "val_auc_received", float(np.clip(auc - 0.02 * place, 0, 1))))
            if round_ < rounds:
                rows.append((round_, site, "train_loss", 0.7 * float(np.exp(-round_ / 4)) + 0.02 * curve.random()))
                rows.append((round_, site, "seconds", 2 + curve.random()))
            if round_ < rounds and spec.method in COUPLED:
                primary, anchor = 1 + curve.random(), 0.1 + 0.05 * curve.random()
                rows.append((round_, site, "primary_gradient", primary))
                rows.append((round_, site, "anchor_gradient", anchor))
                rows.append((round_, site, "anchor_gradient_ratio", anchor / primary))
                rows.append((round_, site, "partner_effect", 0.01 * curve.random()))
                rows.append((round_, site, "mixture_share", 0.5 + 0.1 * curve.random()))
    lines = ["round,site,metric,value", *(f"{r},{s},{m},{v}" for r, s, m, v in rows)]
    (results / "history.csv").write_text("\n".join(lines) + "\n")
    info = {
        "method": spec.method,
        "training": {"rounds": rounds, "seed": spec.repeat, "image_size": 64},
        "sites": list(sites),
        "versions": {"heterosync": "0.0", "torch": "2.0"},
        "status": "completed",
        "wall_seconds": 60.0,
        "best_round": rounds - 1,
        "rounds": [
            {
                "round": r,
                "contributors": sorted(sites),
                "refused": {},
                "seconds": 10.0,
                "bytes": {site: 1000 for site in sites},
            }
            for r in range(rounds)
        ],
    }
    (results / "run.json").write_text(json.dumps(info))


def _rng(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32("|".join(map(str, key)).encode()))
