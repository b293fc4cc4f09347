"""What a job cannot reach, whatever it says: another user's training, files by their path, answers without number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants

from heterosync.errors import HeteroSyncError, UserError
from heterosync.federation.trainings import Submitter, claim, training_folder
from heterosync.files import read_json, write_json
from heterosync.flare import messages
from heterosync.methods import make_method
from heterosync.methods.base import Method

#: How often a site is asked about a model (to train it, to score it) in one training: so often per round of the
#: training, which leaves room to repeat each, and so often beside that, four times what the tests at its end need.
PER_ROUND, BESIDE = 2, 12
#: In the site's folder of a training: how many such questions there were.
QUESTIONS = "questions.json"


class TooMany(HeteroSyncError):
    """A site was asked about a model more often than the rounds of the training allow."""


def submitter_of(fl_ctx: FLContext) -> Submitter:
    """Who submitted the job. The server wrote it into the job's meta; the job itself has no say in it."""
    meta = fl_ctx.get_prop(FLContextKey.JOB_META) or {}
    keys = (JobMetaKey.SUBMITTER_NAME, JobMetaKey.SUBMITTER_ORG, JobMetaKey.SUBMITTER_ROLE)
    return Submitter(*(str(meta.get(key.value) or "") for key in keys))


def site_training(fl_ctx: FLContext, training_id: str) -> Path:
    """This site's folder of the training that the job goes on with, or begins where `training_id` is "".

    Raises `UserError` for an id that is none, and for a training of somebody else.
    """
    root, site = messages.run_folder(fl_ctx).parent, fl_ctx.get_identity_name()
    folder = training_folder(root, site, training_id or fl_ctx.get_job_id())
    return claim(folder, submitter_of(fl_ctx), begins=not training_id)


def job_method(
    method: str, method_settings: Mapping[str, Any] | None, training: Mapping[str, Any] | None, fl_ctx: FLContext
) -> Method:
    """The method of a job, as `make_method`. Raises `UserError` also where a training setting is a path, unless this is
    the simulator: there the one who writes the job owns the machine."""
    made = make_method(method, method_settings, training)
    if made.training.weights_path and fl_ctx.get_job_id() != SimulatorConstants.JOB_NAME:
        line = f"training setting 'weights' is '{made.training.weights}': a job may not name a path"
        raise UserError(f"{line}: give the name of a file that every site has in torch's cache (hub/checkpoints)")
    return made


def count_question(folder: Path, rounds: int) -> None:
    """Write down, before it is answered, that the site is asked about a model. Raises `TooMany` when it was often
    enough for a training of `rounds` rounds: who may ask without end learns of the site's images one score at a time.
    """
    file, limit = folder / QUESTIONS, PER_ROUND * rounds + BESIDE
    before = int(read_json(file)["asked"]) if file.exists() else 0
    if before >= limit:
        line = f"training '{folder.name}' has asked {before} times to train or score a model"
        raise TooMany(f"{line}, which is all that its {rounds} rounds allow: nothing more is answered")
    write_json(file, {"asked": before + 1})
