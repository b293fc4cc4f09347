"""A study's two engines give the same tensors and the same scores, kind by kind of method, also when cut off."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from heterosync.cli.study_engine import Simulator
from heterosync.errors import UserError
from heterosync.federation.initial import state_hash
from heterosync.federation.modelfile import load_model
from heterosync.flare.running.processes import package_environment
from heterosync.methods import GROUPS, METHODS, Method
from heterosync.study.layout import read_done, read_predictions
from heterosync.study.running.engines import InProcess, Task, Trained
from heterosync.study.running.one import play
from heterosync.study.running.plan_file import read_plan
from heterosync.study.running.progress import Lines
from heterosync.study.running.runner import lay_out, prepare
from heterosync.training import CLASSIFICATION
from toys import SMALL, SMOKE, toy_alliance

pytestmark = [pytest.mark.flare, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def hashes(trained: Trained) -> dict[str, str]:
    """The state of every model that a run leaves: global ones and each site's own."""
    files = {name: trained.record / name for name in ("last_model.pt", "best_model.pt")} | trained.own
    return {name: state_hash(load_model(path).state) for name, path in files.items() if path.exists()}


#: What a method may do differently that shows in its messages.
HOOKS = ("shared_names", "returned_names", "combine", "fuse", "for_site", "server_memory")


def ways(kind: type[Method]) -> tuple[object, ...]:
    """How a method uses the wire; those of a kind differ in their loss and their server's rule."""
    return (
        kind.personal,
        kind.weighting == "none",
        *(getattr(kind, hook) is not getattr(Method, hook) for hook in HOOKS),
    )


def kinds() -> list[str]:
    """The methods of 2024, and of the others one of each way to use the wire that these have not. The rest goes through
    FLARE's parts without its transport (test_every_method.py); a cut network (test_split.py) and a swarm
    (test_swarm.py) have files of their own."""
    names = [kind.name for kind in GROUPS["of 2024"]]
    seen = {ways(kind) for kind in GROUPS["of 2024"]}
    for kind in reversed(METHODS):
        if kind.task is CLASSIFICATION and not (kind.pooled or kind.split or kind.topology == "swarm"):
            if ways(kind) not in seen:
                seen.add(ways(kind))
                names.append(kind.name)
    return names


@pytest.mark.parametrize("name", kinds())
def test_the_simulator_gives_the_tensors_of_the_inprocess_engine(name: str, tmp_path: Path) -> None:
    sites = toy_alliance(tmp_path / "data", 2)

    def task(engine: str) -> Task:
        return Task(name, SMALL.get(name, {}), dict(SMOKE), sites, tmp_path / "data", tmp_path / engine)

    simulated = Simulator().train(task("flare"), lambda line: None)
    expected = InProcess().train(task("inprocess"), lambda line: None)
    assert hashes(simulated) == hashes(expected) and hashes(expected)
    for site in sites:
        assert simulated.predictions[site].read_text() == expected.predictions[site].read_text()
    assert not [p for p in psutil.Process().children(recursive=True) if "nvflare" in " ".join(p.cmdline())]


PLAN = {
    "name": "toy",
    "engine": "flare",
    "methods": ["hsl"],
    "scenarios": [{"scenario": "two.csv"}],
    "anchor": {"kind": "synthetic", "per_class": 10},
    "training": {**SMOKE, "rounds": 4},
}


def laid_out(folder: Path, **changes) -> Path:
    folder.mkdir()
    (folder / "two.csv").write_text(
        "site,domain,negative,positive\nsite-a,elbow/A,8,8\nsite-b,wrist/B,8,8\nunseen,hand/C,4,4\n"
    )
    (folder / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **changes}))
    work = lay_out(read_plan(folder / "plan.yaml"), folder / "study")
    prepare(work, folder / "study", Lines(io.StringIO()))
    return folder / "study"


def test_a_simulated_run_that_was_cut_off_goes_on_and_scores_as_the_other_engine(tmp_path: Path) -> None:
    study, run = laid_out(tmp_path / "flare"), "two/all/r0/hsl"
    folder = study / "runs" / run
    command = [sys.executable, "-m", "heterosync.cli", "study", "one", str(study), run]
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=package_environment(), start_new_session=True)
    model = folder / "work/workspace/server/simulate_job/last_model.pt"
    deadline = time.monotonic() + 300
    while not (model.exists() and load_model(model).round >= 1):  # a round is stored
        assert child.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    time.sleep(1.0)
    os.kill(child.pid, signal.SIGTERM)
    child.wait(60)
    assert read_done(folder) is None

    lines: list[str] = []
    done = play(study, run, {"flare": Simulator()}, lines.append)
    assert done.engine == "flare" and done.bytes_per_site_round > 0 and done.peak_memory_bytes > 500e6
    assert "goes on with an interrupted simulation" in lines
    assert not (folder / "work").exists() and not (folder / "work.trainings").exists()
    other = laid_out(tmp_path / "inprocess", engine="inprocess")
    play(other, run, {"inprocess": InProcess()}, lambda line: None)
    results = [place / "runs" / run / "results" for place in (study, other)]
    assert read_predictions(results[0]) == read_predictions(results[1])
    assert len({state_hash(load_model(place / "last_model.pt").state) for place in results}) == 1


def test_a_method_that_pools_runs_in_one_process_under_either_engine(tmp_path: Path) -> None:
    study = laid_out(tmp_path / "flare", methods=["central"])
    done = play(study, "two/all/r0/central", {"flare": Simulator()}, lambda line: None)
    assert done.engine == "inprocess" and done.bytes_per_site_round == 0


def test_what_a_simulation_cannot_do_is_one_line(tmp_path: Path) -> None:
    sites = toy_alliance(tmp_path / "data", 2)
    (sites["site-b"] / "manifest.csv").write_text("image,label\nnone.png,normal\n")
    task = Task("fedavg", {}, dict(SMOKE), sites, tmp_path / "data", tmp_path / "work")
    with pytest.raises(UserError, match="site-b"):
        Simulator().train(task, lambda line: None)
