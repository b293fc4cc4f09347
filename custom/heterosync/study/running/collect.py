"""The scores of a finished run in one table: every site's test images, and the population that no site trained with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from heterosync.data.dataset import load_site
from heterosync.data.tables import read_csv
from heterosync.errors import UserError
from heterosync.federation.modelfile import BEST_MODEL, load_model
from heterosync.federation.site import OWN_MODEL
from heterosync.methods import get_method
from heterosync.study.layout import GLOBAL, UNSEEN, Prediction, own_model
from heterosync.study.running.engines import Trained
from heterosync.training.evaluation import score


def run_predictions(method: str, trained: Trained, data: Path, prefix: str = "") -> list[Prediction]:
    """The rows of predictions.csv of a run. data: the folder of the site folders; prefix: goes before every image's id,
    where images of one id differ between repeats.

    Sites are scored as they scored themselves, with the model that speaks for the run; `unseen` by the chosen global
    model, or by each site's own. Raises `UserError` when a site's scores are missing.
    """
    personal = get_method(method).personal
    rows: list[Prediction] = []
    for site, table in sorted(trained.predictions.items()):
        wanted, name = (OWN_MODEL, own_model(site)) if personal else (GLOBAL, GLOBAL)
        origin = Origin(data / site, prefix)
        own = [row for _, row in read_csv(table).records() if row["split"] == "test" and row["model"] == wanted]
        if not own:
            raise UserError(
                f"{table} holds no test scores of the model '{wanted}': delete the run's folder to repeat it"
            )
        for row in own:
            id_, patient = origin.of(row["id"])
            rows.append(Prediction(site, id_, patient, int(row["label"]), float(row["probability"]), name))
    if (data / UNSEEN).is_dir():
        models = {own_model(site): path for site, path in sorted(trained.own.items())}
        for name, path in models.items() if personal else [(GLOBAL, trained.record / BEST_MODEL)]:
            rows += _unseen_scores(path, name, data / UNSEEN, Origin(data / UNSEEN, prefix))
    return rows


class Origin:
    """What an image of a site folder is called in its source, and whose it is: the same in every repeat."""

    def __init__(self, folder: Path, prefix: str):
        rows = [row for _, row in read_csv(folder / "manifest.csv").records()]
        self._known = {
            row["image"]: (
                prefix + row.get("source", row["image"]),
                row.get("patient") or row.get("source_patient", ""),
            )
            for row in rows
        }

    def of(self, image: str) -> tuple[str, str]:
        """(id, patient) of an image by its name in the manifest."""
        return self._known[image]


def _unseen_scores(model: Path, name: str, folder: Path, origin: Origin) -> Iterator[Prediction]:
    file = load_model(model)
    method, network = file.build()
    settings = method.training
    frame = (settings.image_size, settings.channels)
    site = load_site(folder, *frame, need_anchor=method.uses_anchor, fit=settings.fit)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = site.splits["test"]
    scores = score(method, network.to(device), site.primary, site.anchor, rows, device)
    for row, probability in zip(rows, scores, strict=True):
        id_, patient = origin.of(site.primary.ids[row])
        yield Prediction(UNSEEN, id_, patient, int(site.primary.labels[row]), float(probability), name)
