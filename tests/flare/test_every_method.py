"""Every method through FLARE's parts of ours, in one process: controller, aggregator, persistor, executor, filter.

What the real simulator adds is the transport; tests/flare/test_study_engines.py takes one method of each kind there.
"""

from __future__ import annotations

import copy
import csv
import json
import re
from pathlib import Path

import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants

from flare_toys import FakeFederation, fake_context
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.flare import messages
from heterosync.flare.executor import DATA_ROOT, HeteroSyncExecutor
from heterosync.flare.filters import OutboundFilter
from heterosync.methods import METHODS, make_method
from heterosync.methods.base import COMMON_LEAVES
from heterosync.training import CLASSIFICATION
from toys import SMALL, SMOKE, toy_alliance

#: A cut network meets its server in every step, and a swarm has none: both need FLARE itself.
NAMES = [m.name for m in METHODS if m.task is CLASSIFICATION and not (m.pooled or m.split or m.topology == "swarm")]


class Sites:
    """Real sites behind the executor and the outbound filter of a job. Both are new for every task, and so is FLARE's
    context, as in a process of its own: what a site must remember has to lie on its disk."""

    def __init__(self, root: Path, folders: dict[str, Path], method: str, settings: dict):
        self.learning = (method, settings, SMOKE)
        self.root, self.folders = root, folders

    def __call__(self, site: str, task: str, round_: int, message: Shareable) -> Shareable:
        executor, gate = HeteroSyncExecutor(*self.learning, in_process=True), OutboundFilter(*self.learning)
        known = {FLContextKey.SCOPE_PROPERTIES: {DATA_ROOT: str(self.folders[site])}, FLContextKey.TASK_NAME: task}
        context = fake_context(self.root / site / "job", site, **known)
        message = copy.deepcopy(message)  # nothing is shared between processes
        message.set_header(AppConstants.CURRENT_ROUND, round_)
        answer = copy.deepcopy(gate.process(executor.execute(task, message, context, Signal()), context))
        executor.handle_event(EventType.SWAP_OUT, context)
        return answer


def history(folder: Path) -> list[list[str]]:
    with (folder / "history.csv").open(newline="") as file:
        return sorted(row for row in csv.reader(file) if row[2] != "seconds")


@pytest.mark.parametrize("name", NAMES)
def test_a_job_gives_the_tensors_of_the_inprocess_run(name: str, tmp_path: Path) -> None:
    settings = SMALL.get(name, {})
    folders = toy_alliance(tmp_path / "data", 2)
    done = run_inprocess(name, folders, tmp_path / "oracle", settings, SMOKE)
    sites = Sites(tmp_path, folders, name, settings)
    job = FakeFederation(
        tmp_path / "server", list(folders), sites, method=name, method_settings=settings, training=SMOKE
    ).play()
    assert job.reasons == [] and job.read("run.json")["status"] == "completed"
    assert history(job.folder) == history(done.folder)
    assert job.read("cross_site_metrics.json") == json.loads((done.folder / "cross_site_metrics.json").read_text())
    for file in ("last_model.pt", "best_model.pt"):
        assert (job.folder / file).exists() == (done.folder / file).exists()
        if (done.folder / file).exists():
            ours, theirs = load_model(job.folder / file), load_model(done.folder / file)
            assert ours.versions == theirs.versions
            for one, other in ((ours.state, theirs.state), (ours.assets, theirs.assets)):
                assert list(one) == list(other) and all(torch.equal(one[key], value) for key, value in other.items())

    method = make_method(name, settings, SMOKE)
    model = method.build_model(weights="none")
    returned = {key: list(model.state_dict()[key].shape) for key in method.returned_names(model)}
    told = set(re.findall(r"\w+", " ".join(COMMON_LEAVES)))
    for site in folders:
        lines = [json.loads(line) for line in (tmp_path / site / "job" / "audit.jsonl").read_text().splitlines()]
        assert all(line["left"] for line in lines)
        for line in [line for line in lines if line["task"] == messages.TRAIN]:
            sent = {item["name"]: item["shape"] for item in line["items"]}
            assert {key: sent.pop(key) for key in returned} == returned  # by name and shape, and besides only scalars
            assert all(shape == [] for shape in sent.values())
            assert set(method.scalars) <= set(sent) <= told | set(method.scalars)
