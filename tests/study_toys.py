"""Result files and model files for tests of tables, reports and predictions."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from heterosync.federation.modelfile import save_model
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings
from toys import SMOKE


def toy_run(folder: Path, method: str = "hsl", rounds: int = 3, tested: bool = True, status: str = "completed") -> Path:
    """A run folder of two sites after `rounds` of 3 rounds; site-b is 0.1 worse than site-a in everything."""
    folder.mkdir(parents=True)
    sites = {"site-a": 0.0, "site-b": -0.1}
    records = [
        {
            "round": r,
            "contributors": list(sites),
            "refused": {},
            "seconds": 1.5,
            "bytes": {site: 1000 for site in sites},
        }
        for r in range(rounds)
    ]
    info = {
        "method": method,
        "training": {"rounds": 3},
        "status": status,
        "wall_seconds": 12.5,
        "rounds": records,
        "best_round": 2 if tested else None,
    }
    (folder / "run.json").write_text(json.dumps(info))
    rows = ["round,site,metric,value"]
    for r in range(rounds + tested):
        rows += [f"{r},{site},val_auc_received,{0.6 + 0.1 * r + less}" for site, less in sites.items()]
        rows += [f"{r},{site},train_loss,0.5" for site in sites]
    (folder / "history.csv").write_text("\n".join(rows) + "\n")
    model = "local" if method == "local" else "best"
    best = 0.8 if method == "local" else 0.9
    tests = {
        model: {
            site: {"auc": best + less, "ci_low": 0.7, "ci_high": 0.95, "n": 40, "n_positive": 10, "accuracy": 0.8}
            for site, less in sites.items()
        }
    }
    if tested:
        tests[model]["mean"] = {"auc": best - 0.05, "sites": 2}
    (folder / "cross_site_metrics.json").write_text(json.dumps(tests if tested else {}))
    return folder


def toy_model(path: Path, method: str = "hsl", settings: dict | None = None, seed: int = 0) -> Path:
    """A model file of the smoke profile with random weights: its scores differ between images."""
    training = TrainingSettings.from_dict({**SMOKE, "seed": seed})
    made = make_method(method, settings, training)
    model = made.build_model()
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        noise = torch.rand(value.shape, generator=generator)
        state[name] = value * (0.5 + noise) if value.is_floating_point() else value
    return save_model(path, method, settings or {}, training, state, ("normal", "abnormal"), 3)
