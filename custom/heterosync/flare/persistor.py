"""The global model on the server's disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants

from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import save_model
from heterosync.federation.runner import BEST_MODEL, LAST_MODEL
from heterosync.files import write_with
from heterosync.flare import messages
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings

#: Private property of the server's context: the two label names, which the check-in found out.
LABELS = "heterosync_labels"


class GlobalModelPersistor(ModelPersistor):
    """Makes the initial state once, from the method's name, and writes `last_model.pt` whole after every round.

    method, method_settings, training: as in the executor. No class path of a model ever stands in a job.
    """

    def __init__(self, method: str, method_settings: dict | None = None, training: dict | None = None):
        super().__init__()
        self._method, self._settings, self._training = method, method_settings or {}, training or {}

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """The state before the first round. Raises `UserError` for unknown settings."""
        self._made = make_method(self._method, self._settings, TrainingSettings.from_dict(self._training))
        return make_model_learnable(initial_state(self._made), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        state = model[ModelLearnableKey.WEIGHTS]
        if not state:
            return  # a method whose weights stay at the sites
        save_model(
            messages.run_folder(fl_ctx) / LAST_MODEL,
            method=self._made.name,
            settings=self._made.settings,
            training=self._made.training,
            state=state,
            labels=fl_ctx.get_prop(LABELS) or (),
            round_=fl_ctx.get_prop(AppConstants.CURRENT_ROUND, 0) + 1,
        )


def keep_as_best(folder: Path) -> None:
    """Make `best_model.pt` what `last_model.pt` is now; that one is replaced and never changed, so a link will do."""
    last = folder / LAST_MODEL

    def link(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(last, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(last, temporary)

    if last.exists():
        write_with(folder / BEST_MODEL, link)
