"""The global model on the server's disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants

from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import INITIAL_WEIGHTS, LAST_MODEL, save_model
from heterosync.federation.server import assets_of, memory_of
from heterosync.flare import bounds, messages

#: Private property of the server's context: the two label names, which the check-in found out.
LABELS = "heterosync_labels"
#: The same for what its model files say of `PROVISIONED`.
ORIGIN = "heterosync_origin"
#: Another one: the stored model (`ModelFile`) of the training that the job goes on with, None for a new one.
STORED = "heterosync_stored"
#: The same for what a method's server half remembers from round to round: tensors by name.
MEMORY = "heterosync_memory"


class GlobalModelPersistor(ModelPersistor):
    """Makes the initial state once, from the method's name, and writes `last_model.pt` whole after every round.

    method, method_settings, training: as in the executor. No class path of a model ever stands in a job.
    """

    def __init__(self, method: str, method_settings: dict | None = None, training: dict | None = None):
        super().__init__()
        self._method, self._settings, self._training = method, method_settings or {}, training or {}

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """The state before the job's first round. Raises `UserError` for unknown settings and a stored model that does
        not fit them."""
        self._made = bounds.job_method(self._method, self._settings, self._training, fl_ctx)
        self._origin: dict[str, str] = {}
        stored = fl_ctx.get_prop(STORED)
        if stored is None:
            return make_model_learnable(initial_state(self._made), {})
        stored.check_shared()
        fl_ctx.set_prop(MEMORY, memory_of(stored.assets), private=True, sticky=True)
        self._origin = {INITIAL_WEIGHTS: stored.versions.get(INITIAL_WEIGHTS, "unknown")}
        return make_model_learnable(stored.state, {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        state = model[ModelLearnableKey.WEIGHTS]
        if state:  # else a method whose weights stay at the sites
            self.write(state, fl_ctx.get_prop(AppConstants.CURRENT_ROUND, 0) + 1, fl_ctx)

    def write(self, state: Mapping[str, Any], rounds: int, fl_ctx: FLContext) -> None:
        """Make the state after `rounds` rounds this participant's `last_model.pt`."""
        save_model(
            messages.run_folder(fl_ctx) / LAST_MODEL,
            method=self._made.name,
            settings=self._made.settings,
            training=self._made.training,
            state=state,
            labels=fl_ctx.get_prop(LABELS) or (),
            round_=rounds,
            extra=assets_of(fl_ctx.get_prop(MEMORY) or {}),
            versions={**self._origin, **(fl_ctx.get_prop(ORIGIN) or {})},
        )
