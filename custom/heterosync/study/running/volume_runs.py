"""A run of a cross-validation: a submodel that validates on one fold, or the ensemble of all folds' submodels.

The ensemble averages the submodels' probabilities; each is tested on the held-out cases of every site and on the
challenge set (Sarma et al., JAMIA 2021, Training strategy and Statistical analysis).
"""

from __future__ import annotations

from pathlib import Path

import torch

from heterosync.data.tables import read_csv
from heterosync.errors import UserError
from heterosync.federation.modelfile import BEST_MODEL, LAST_MODEL, load_model
from heterosync.federation.site import OWN_MODEL
from heterosync.methods import get_method
from heterosync.study.evidence.cross_site import CaseDice, score_ensemble
from heterosync.study.layout import GLOBAL, RESULTS, RUNS, UNSEEN, VIEWS, own_model, read_done
from heterosync.study.running.job import OWN, Cost, Job
from heterosync.study.running.volume_plan import ENSEMBLE, FROM
from heterosync.study.scores import read_scores, write_scores


def carry_out(job: Job) -> Cost:
    return _ensemble(job) if ENSEMBLE in job.spec.settings else _submodel(job)


def _submodel(job: Job) -> Cost:
    """Sites are scored as they scored themselves, with the model that speaks for the run. Best models always stay: the
    ensemble is made of them, and so are runs that go on from them."""
    source = job.spec.settings.get(FROM)
    trained = job.train(**({"weights": str(_model(job, source, BEST_MODEL).absolute())} if source else {}))
    personal = get_method(job.spec.method).personal
    scores = []
    for site, table in sorted(trained.predictions.items()):
        wanted, model = (OWN_MODEL, own_model(site)) if personal else (GLOBAL, GLOBAL)
        rows = [row for _, row in read_csv(table).records() if row["split"] == "test" and row["model"] == wanted]
        if not rows:
            raise UserError(f"{table} holds no test scores of the model '{wanted}': remove {job.folder} to repeat it")
        scores += [CaseDice.of(model, site, row) for row in rows]
    write_scores(job.results, scores)
    job.keep_own(trained)
    if "last" not in job.plan.keep:
        (job.results / LAST_MODEL).unlink(missing_ok=True)
    return job.cost()


def _ensemble(job: Job) -> Cost:
    """What has been scored in an interrupted session is not scored again."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = {**job.sites, **({UNSEEN: job.data / UNSEEN} if UNSEEN in job.record["sites"] else {})}
    scores: list[CaseDice] = []
    for model, files in _submodels(job).items():
        for site, folder in sorted(places.items()):
            part = job.work / model.replace(":", "-") / site
            if not part.exists():
                ensemble, keep = [load_model(file) for file in files], job.results / VIEWS
                found = score_ensemble(model, ensemble, {site: folder}, device, keep=keep)
                write_scores(part, found)
            scores += read_scores(part)
            job.say(f"model {model} is scored at {site}")
    write_scores(job.results, scores)
    return Cost("inprocess")


def _submodels(job: Job) -> dict[str, list[Path]]:
    """Model -> its files, one per fold. Raises `UserError` where a fold is not done or its model was removed."""
    names = {own_model(site): f"{OWN}/{site}.pt" for site in job.sites}
    if not get_method(job.spec.method).personal:
        names = {GLOBAL: BEST_MODEL}
    found: dict[str, list[Path]] = {model: [] for model in names}
    for path in job.spec.settings[ENSEMBLE]:
        for model, name in names.items():
            found[model].append(_model(job, path, name))
    return found


def _model(job: Job, path: str, name: str) -> Path:
    """A model of another run, at `path`. Raises `UserError` where that is not done or the model was removed."""
    folder = job.study / RUNS / path
    if read_done(folder) is None:
        raise UserError(f"run {job.spec.path} needs the model of run {path}, which is not done: carry it out first")
    file = folder / RESULTS / name
    if not file.is_file():
        raise UserError(f"{file} was removed: remove {folder} and run the plan again to train it anew")
    return file
