"""Stand-ins for the parts of FLARE that a component talks to, and answers as sites send them."""

from __future__ import annotations

import json
import sysconfig
import venv
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator

from heterosync.flare import messages
from heterosync.flare.aggregator import EqualWeightAggregator
from heterosync.flare.controller import HeteroSyncController
from heterosync.flare.persistor import GlobalModelPersistor
from toys import SMOKE


def bare_environment(folder: Path) -> Path:
    """The python of a new environment that borrows the packages installed here, but not heterosync.

    An editable installation is a line in a .pth file, and Python reads such files only in the environment's own folder.
    """
    venv.create(folder, with_pip=False)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    borrowed = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin" / "python"


def fake_context(folder: Path, identity: str = "site-a", **props: Any) -> FLContext:
    """A context whose run folder is `folder`; `props` are private properties."""
    folder.mkdir(parents=True, exist_ok=True)
    workspace = SimpleNamespace(get_run_dir=lambda job_id: str(folder))
    engine = SimpleNamespace(get_workspace=lambda: workspace, fire_event=lambda event, context: None)
    context = FLContext()
    context.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=False)
    context.set_prop(FLContextKey.CURRENT_RUN, "job-1", private=False, sticky=False)
    context.set_prop(ReservedKey.IDENTITY_NAME, identity, private=False, sticky=False)
    for name, value in props.items():
        context.set_prop(name, value, private=True, sticky=False)
    return context


def submitted_by(name: str, role: str = "lead") -> dict[str, Any]:
    """The property of a context that says who submitted the job, as FLARE keeps it."""
    keys = (JobMetaKey.SUBMITTER_NAME, JobMetaKey.SUBMITTER_ORG, JobMetaKey.SUBMITTER_ROLE)
    return {FLContextKey.JOB_META: dict(zip([key.value for key in keys], (name, "org", role), strict=True))}


def toy_state(value: float = 0.0) -> dict[str, torch.Tensor]:
    """A state of three tensors: weights, a BatchNorm statistic and an integer counter."""
    return {
        "w": torch.full((2, 3), value),
        "bn.running_mean": torch.full((3,), value * 2),
        "bn.num_batches_tracked": torch.tensor(int(value)),
    }


def answer(site: str, tensors: dict[str, Any], round_: int = 0, samples: int = 10, **changes: Any) -> Shareable:
    """What the server gets from `site` for a train task; `changes` replace fields of the envelope."""
    fields = {"method": "hsl", "round": round_, "samples": samples, "metrics": {"val_auc_received": 0.5}, **changes}
    message = messages.tensors_message(tensors, fields)
    message.set_peer_props({ReservedKey.IDENTITY_NAME: site})
    message.add_cookie(AppConstants.CONTRIBUTION_ROUND, round_)
    return message


def started_aggregator(folder: Path, round_: int = 0, method: str = "hsl") -> tuple[EqualWeightAggregator, FLContext]:
    """An aggregator in the middle of a round of `toy_state`."""
    aggregator = EqualWeightAggregator(method)
    state = toy_state() if method == "hsl" else {}
    props = {AppConstants.GLOBAL_MODEL: make_model_learnable(state, {}), AppConstants.CURRENT_ROUND: round_}
    context = fake_context(folder, "server", **props)
    aggregator.handle_event(AppEventType.ROUND_STARTED, context)
    return aggregator, context


class FakeFederation:
    """The controller with real aggregator and persistor, and sites played by a function: no process, no network.

    `site(name, task, round, message)` returns a site's reply (None: no answer in time); `plain_site` is the default.
    """

    def __init__(
        self, folder: Path, sites: list[str], site: Callable[..., Shareable | None] | None = None, **args: Any
    ):
        self.folder, self.site = folder, site or plain_site
        self.reasons: list[str] = []
        self.asked: list[tuple[str, Any]] = []
        self.abort_signal = Signal()
        training = {**SMOKE, **args.pop("training", {})}
        learning = {"method": args.pop("method", "hsl"), "method_settings": args.pop("method_settings", {})}
        self.controller = HeteroSyncController(**learning, training=training, **args)
        self.aggregator = EqualWeightAggregator(**learning, training=training)
        parts = {
            "aggregator": self.aggregator,
            "persistor": GlobalModelPersistor(**learning, training=training),
            "shareable_generator": FullModelShareableGenerator(),
        }
        self.handlers = [self.controller, *parts.values()]
        self.clients = [Client(name, f"token-{name}") for name in sites]
        self.context = fake_context(folder, "server")
        engine = self.context.get_engine()
        engine.fire_event, engine.get_component, engine.get_clients = self._fire, parts.get, lambda: self.clients
        engine.get_cell = lambda: None
        self.controller.communicator = SimpleNamespace(broadcast_and_wait=self._broadcast)

    def play(self) -> FakeFederation:
        self.controller.initialize(self.context)
        self.controller.control_flow(self.abort_signal, self.context)
        return self

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def _fire(self, event: str, context: FLContext) -> None:
        for handler in self.handlers:
            with suppress(Exception):  # FLARE logs what a handler raises, and goes on
                handler.handle_event(event, context)
        if event == EventType.FATAL_SYSTEM_ERROR:
            self.reasons.append(context.get_prop(FLContextKey.EVENT_DATA))
            self.abort_signal.trigger(True)

    def _broadcast(self, task: Task, fl_ctx: FLContext, targets: list[str], *rest: Any) -> None:
        if self.abort_signal.triggered:
            return
        round_ = task.data.get_header(AppConstants.CURRENT_ROUND)
        self.asked.append((task.name, round_))
        for client in [client for client in self.clients if client.name in targets]:
            client_task = ClientTask(client, task)
            task.before_task_sent_cb(client_task, fl_ctx)
            reply = self.site(client.name, task.name, round_, task._broadcast_data)
            if reply is not None:
                reply.set_peer_props({ReservedKey.IDENTITY_NAME: client.name})
                reply.set_cookie_jar(task.data.get_cookie_jar())
                client_task.result = reply
                task.result_received_cb(client_task, fl_ctx)


def plain_site(name: str, task: str, round_: int, message: Shareable, auc: float = 0.5, **report: Any) -> Shareable:
    """A site that sends back what it got."""
    if task == messages.CHECK_IN:
        fields = {"site": name, "method": "hsl", "anchor_digest": "0" * 64, "labels": ["normal", "abnormal"]}
        fields |= {"model_hash": "1" * 64, "initial_weights": None, "precision": "float32"}
        fields |= {"versions": {"heterosync": "1.0"}, "counts": {"train": 10}}
        return messages.scalars_message({**fields, **report})
    tensors, _ = messages.open_message(message)
    if task == messages.VALIDATE:
        return messages.scalars_message({"auc": auc, "n": 10})
    fields = {"method": report.get("method", "hsl"), "round": round_, "samples": 10}
    return messages.tensors_message(tensors, {**fields, "metrics": {"val_auc_received": auc, "val_auc_best": auc}})
