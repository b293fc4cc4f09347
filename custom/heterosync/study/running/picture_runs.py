"""A run on pictures: training, then the scores of every test image in one table."""

from __future__ import annotations

from heterosync.federation.modelfile import BEST_MODEL, LAST_MODEL, load_model
from heterosync.methods import get_method
from heterosync.study.layout import write_predictions
from heterosync.study.partners import embed_partners
from heterosync.study.running.collect import run_predictions
from heterosync.study.running.engines import Trained
from heterosync.study.running.job import Cost, Job
from heterosync.study.running.plan import SYNTHETIC


def carry_out(job: Job) -> Cost:
    trained = job.train()
    best, method = job.results / BEST_MODEL, job.spec.method
    if best.exists() and not get_method(method).personal and load_model(best).build()[0].uses_anchor:
        embed_partners(best, next(iter(job.sites.values())))  # it then predicts without an anchor pack at hand
    synthetic = job.plan.where_from() == SYNTHETIC
    prefix = f"seed {job.record['seed']} " if synthetic else ""  # the same name is another image there
    predictions = run_predictions(method, trained, job.data, prefix)
    write_predictions(job.results, predictions)
    _keep_models(job, trained)
    return job.cost(len(predictions))


def _keep_models(job: Job, trained: Trained) -> None:
    for name, file in (("best", BEST_MODEL), ("last", LAST_MODEL)):
        if name not in job.plan.keep:
            (job.results / file).unlink(missing_ok=True)
    if "own" in job.plan.keep:
        job.keep_own(trained)
