"""The study runner: one run after the other or side by side, none twice, none lost, each with its cost and scores."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from heterosync.cli import main
from heterosync.data.tables import read_csv
from heterosync.errors import ProblemList, UserError
from heterosync.federation.initial import state_hash
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.study.layout import (
    COLUMNS,
    Prediction,
    read_done,
    read_predictions,
    read_spec,
    write_predictions,
)
from heterosync.study.running import one
from heterosync.study.running.engines import InProcess, Task, Trained
from heterosync.study.running.one import PARENT, held, play
from heterosync.study.running.plan_file import read_plan
from heterosync.study.running.progress import Lines, Table
from heterosync.study.running.runner import Machine, Work, is_done, lay_out, prepare, run_study
from heterosync.study.running.status import states_of
from toys import SMOKE, toy_images

PLAN = {
    "name": "toy",
    "engine": "inprocess",
    "methods": ["fedavg", "local", "central", "hsl"],
    "scenarios": [{"scenario": "synthetic", "scale": 0.2}],
    "anchor": {"kind": "synthetic", "per_class": 10},
    "training": dict(SMOKE),
    "keep": ["best", "last", "own"],
}


def laid_out(folder: Path, **changes) -> tuple[Work, Path]:
    """A plan in `folder`, and its study folder, with data and run_spec.json as before the first run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **changes}))
    out = folder / "study"
    work = lay_out(read_plan(folder / "plan.yaml"), out)
    prepare(work, out, Lines(io.StringIO()))
    return work, out


ENGINES = {"inprocess": InProcess()}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two repeats of four methods, all done."""
    work, out = laid_out(tmp_path_factory.mktemp("study"), repeats=2)
    for spec in work.specs:
        play(out, spec.path, ENGINES, say=lambda line: None)
    return out


def results(study: Path, label: str, repeat: int = 0) -> Path:
    return study / f"runs/synthetic/all/r{repeat}/{label}/results"


def test_a_run_leaves_its_record_its_cost_and_no_workspace(study):
    for label in ("fedavg", "local", "central", "hsl"):
        folder = results(study, label).parent
        names = {path.name for path in (folder / "results").iterdir()}
        assert {"run.json", "history.csv", "cross_site_metrics.json", "predictions.csv", "tensorboard"} <= names
        assert not (folder / "work").exists() and not (folder / "failed.json").exists()
        done = read_done(folder)
        assert done.digest == read_spec(folder).digest and done.engine == "inprocess"
        assert done.seconds > 0 and done.peak_memory_bytes > 100e6
        assert (done.bytes_per_site_round > 0) == (label in ("fedavg", "hsl"))
    assert sorted(path.name for path in (results(study, "local") / "own").iterdir())[0] == "site-a.pt"


def test_the_scores_of_sites_are_their_own_and_unseen_images_are_scored(study):
    for label in ("fedavg", "hsl", "local"):
        rows = read_predictions(results(study, label))
        sites = {row.site for row in rows}
        assert sites == {"site-a", "site-b", "site-c", "site-d", "site-e", "unseen"}
        models = {(row.site, row.model) for row in rows}
        tests = json.loads((results(study, label) / "cross_site_metrics.json").read_text())
        for site in sites - {"unseen"}:
            mine = [row for row in rows if row.site == site]
            assert len(mine) == tests["local" if label == "local" else "best"][site]["n"]
            assert sum(row.label for row in mine) == tests["local" if label == "local" else "best"][site]["n_positive"]
        own = {f"site:{site}" for site in sites - {"unseen"}}
        assert {model for site, model in models if site == "unseen"} == (own if label == "local" else {"best"})
        assert len({row.id for row in rows if row.site == "unseen"}) == len(
            read_csv(study / "data/synthetic/all/r0/unseen/manifest.csv").rows
        )


def test_unseen_scores_are_those_of_the_model_file(study):
    """Written independently: the model file, the raw pixels, one image at a time."""
    import torch

    folder = study / "data/synthetic/all/r0/unseen"
    method, network = load_model(results(study, "fedavg") / "best_model.pt").build()
    pixels = np.load(folder / "images.npz")["images"]
    scored = {row.id: row.probability for row in read_predictions(results(study, "fedavg")) if row.site == "unseen"}
    for number, (_, row) in enumerate(read_csv(folder / "manifest.csv").records()):
        image = torch.from_numpy(pixels[number]).float().div(255).expand(1, 3, -1, -1)
        with torch.inference_mode():
            assert float(method.predict(network, image, "self")) == pytest.approx(
                scored[f"seed 0 {row['source']}"], abs=1e-5
            )


def test_methods_of_a_repeat_share_images_splits_and_first_weights_and_repeats_do_not(study):
    def images(label: str, repeat: int) -> set:
        rows = read_predictions(results(study, label, repeat))
        return {(row.site, row.id, row.label) for row in rows if row.site != "unseen"}

    assert images("fedavg", 0) == images("hsl", 0) == images("local", 0) == images("central", 0)
    assert images("fedavg", 1) == images("hsl", 1)
    assert not {id_ for _, id_, _ in images("hsl", 0)} & {id_ for _, id_, _ in images("hsl", 1)}
    numbers = [{id_.split(" ", 2)[2] for _, id_, _ in images("hsl", repeat)} for repeat in (0, 1)]
    assert numbers[0] != numbers[1]  # another split, not only other images in the same rows
    runs = [json.loads((results(study, "fedavg", repeat) / "run.json").read_text()) for repeat in (0, 1)]
    assert [run["training"]["seed"] for run in runs] == [0, 1]
    local, fedavg = (
        load_model(results(study, n) / f).build()[0]
        for n, f in (("local", "own/site-a.pt"), ("fedavg", "last_model.pt"))
    )
    assert state_hash(local.build_model().state_dict()) == state_hash(fedavg.build_model().state_dict())


def test_a_done_run_is_not_repeated(study):
    class Never:
        name = "never"

        def record(self, work: Path) -> Path:
            raise AssertionError("trained again")

        def train(self, task: Task, say: Callable[[str], None]) -> Trained:
            raise AssertionError("trained again")

    before = read_done(results(study, "fedavg").parent)
    assert play(study, "synthetic/all/r0/fedavg", {"inprocess": Never()}, lambda line: None) == before
    assert {state.state for state in states_of(study)} == {"done"}


def test_an_interrupted_run_goes_on_after_its_last_round_and_ends_the_same(tmp_path, study):
    class CutOff(InProcess):
        def train(self, task: Task, say: Callable[[str], None]) -> Trained:
            options = {"anchors_may_differ": task.anchors_may_differ, "stop": lambda done: done >= 1}
            run_inprocess(task.method, task.sites, task.work, task.settings, task.training, **options)
            raise KeyboardInterrupt

    _, out = laid_out(tmp_path, methods=["hsl"])
    run = "synthetic/all/r0/hsl"
    with pytest.raises(KeyboardInterrupt):
        play(out, run, {"inprocess": CutOff()}, lambda line: None)
    (state,) = states_of(out)
    assert (state.state, state.rounds_done, state.rounds) == ("broken off", 1, 2)
    lines: list[str] = []
    done = play(out, run, ENGINES, lines.append)
    assert [line[:7] for line in lines] == ["round 2"]
    assert done.seconds > state.seconds
    whole, cut = (load_model(folder / "last_model.pt") for folder in (results(study, "hsl"), results(out, "hsl")))
    assert state_hash(whole.state) == state_hash(cut.state)
    assert read_predictions(results(study, "hsl")) == read_predictions(results(out, "hsl"))


def test_a_failed_run_keeps_its_cause_and_is_tried_again(tmp_path):
    class Failing(InProcess):
        def train(self, task: Task, say: Callable[[str], None]) -> Trained:
            raise UserError("site a: no space\nsite b: no space")

    _, out = laid_out(tmp_path, methods=["fedavg"])
    with pytest.raises(UserError):
        play(out, "synthetic/all/r0/fedavg", {"inprocess": Failing()}, lambda line: None)
    (state,) = states_of(out)
    assert (state.state, state.cause) == ("failed", "site a: no space; site b: no space")
    play(out, "synthetic/all/r0/fedavg", ENGINES, lambda line: None)
    assert [state.state for state in states_of(out)] == ["done"]


def test_cut_off_while_it_tidies_up_a_run_is_done(tmp_path, monkeypatch):
    _, out = laid_out(tmp_path, methods=["fedavg"])

    def cut(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(one.shutil, "rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        play(out, "synthetic/all/r0/fedavg", ENGINES, lambda line: None)
    assert [state.state for state in states_of(out)] == ["done"]


def test_only_one_process_carries_out_a_run(study):
    folder = results(study, "fedavg").parent
    with held(folder / ".lock", "busy"), pytest.raises(UserError, match="carried out by another process"):
        play(study, "synthetic/all/r0/fedavg", ENGINES, lambda line: None)


def test_an_unknown_run_gets_the_nearest(study):
    with pytest.raises(UserError, match="did you mean 'synthetic/all/r0/fedavg'"):
        play(study, "synthetic/all/r0/fedvag", ENGINES)


# -- many runs, with a stand-in for `study one` -----------------------------------------------------------------------

FAKE = """
import json, os, pathlib, signal, sys, time
study, run = sys.argv[1:]
folder = pathlib.Path(study, "runs", run)
label = folder.name
with open(pathlib.Path(study).parent / "log.txt", "a") as log:
    log.write(f"start {os.getpid()} {time.monotonic()} {os.environ['OMP_NUM_THREADS']} "
              f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
if label == "local":
    raise ValueError("boom")
if label == "fedprox":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60 if label == "hsl" else 1)
spec = json.loads((folder / "run_spec.json").read_text())
done = dict(digest=spec["digest"], seconds=1.0, peak_memory_bytes=1, bytes_per_site_round=0, engine="x", finished="")
(folder / "done.json").write_text(json.dumps(done))
"""


@pytest.fixture
def fake(tmp_path: Path) -> list[str]:
    (tmp_path / "fake.py").write_text(FAKE)
    return [sys.executable, str(tmp_path / "fake.py")]


def started(folder: Path) -> list[list[str]]:
    return [line.split()[1:] for line in (folder / "log.txt").read_text().splitlines()]


def test_a_run_that_dies_takes_no_other_with_it(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    work, out = laid_out(tmp_path, methods=["local", "fedavg", "fedprox", "fedbn"])
    failed = run_study(work, out, Machine(fake, jobs=2, cores=6, gpus=("0", "3")), Lines())
    assert set(failed) == {"synthetic r0 local", "synthetic r0 fedprox"}
    assert "ValueError: boom" in failed["synthetic r0 local"] and "out of memory" in failed["synthetic r0 fedprox"]
    assert [state.state for state in states_of(out)] == ["failed", "done", "failed", "done"]
    assert all(threads == "3" for _, _, threads, _ in started(tmp_path))
    assert {gpu for *_, gpu in started(tmp_path)} == {"0", "3"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Machine(fake, jobs=2, cores=6).environment(0, 1)["OMP_NUM_THREADS"] == "3"  # said for this study
    assert Machine(fake, jobs=2).environment(0, 1)["OMP_NUM_THREADS"] == "5"
    assert "synthetic r0 fedavg: done in 1 s" in capsys.readouterr().out

    first = len(started(tmp_path))
    run_study(work, out, Machine(fake), Lines())
    assert len(started(tmp_path)) == first + 2  # the failed ones alone


def test_runs_are_carried_out_side_by_side(tmp_path, fake):
    work, out = laid_out(tmp_path, methods=["fedavg", "fedbn", "fedopt"])
    began = time.monotonic()
    assert not run_study(work, out, Machine(fake, jobs=3), Lines())
    ended = time.monotonic()
    times = [float(moment) for _, moment, *_ in started(tmp_path)]
    assert max(times) - min(times) < 1 and ended - began < 3 * 1 + 2  # each one sleeps for a second


def test_stopping_leaves_no_process_behind(tmp_path, fake):
    class Impatient(Lines):
        def state(self, overall, running):
            if len(running) == 2 and (tmp_path / "log.txt").exists() and len(started(tmp_path)) == 2:
                raise KeyboardInterrupt

    work, out = laid_out(tmp_path, methods=["hsl"], repeats=2)
    with pytest.raises(KeyboardInterrupt):
        run_study(work, out, Machine(fake, jobs=2), Impatient())
    for pid, *_ in started(tmp_path):
        assert not psutil.pid_exists(int(pid))
    assert not [spec for spec in work.specs if is_done(spec, out)]


def test_a_study_is_run_by_one_process_at_a_time(tmp_path, fake):
    work, out = laid_out(tmp_path, methods=["fedavg"])
    with held(out / ".lock", "busy"), pytest.raises(UserError, match="being run by another process"):
        run_study(work, out, Machine(fake), Lines())


def test_a_plan_may_grow_and_another_plan_is_refused(tmp_path, fake):
    work, out = laid_out(tmp_path, methods=["fedavg"])
    run_study(work, out, Machine(fake), Lines())
    grown, _ = laid_out(tmp_path, methods=["fedavg", "fedbn"], repeats=2)
    assert [is_done(spec, out) for spec in grown.specs] == [True, False, False, False]
    with pytest.raises(
        UserError, match=r"another plan: its run synthetic/all/r0/fedavg has another training 'lr' \(.*, now 0.01\)"
    ):
        laid_out(tmp_path, methods=["fedavg", "fedbn"], repeats=2, training={**SMOKE, "lr": 0.01})
    with pytest.raises(UserError, match="has another training 'rounds'"):
        laid_out(tmp_path, methods=["fedavg", "fedbn"], training={**SMOKE, "rounds": 7})
    with pytest.raises(UserError, match=r"has another source 'noise' \(None, now 9\)"):
        laid_out(tmp_path, methods=["fedavg", "fedbn"], source={"kind": "synthetic", "noise": 9})
    with pytest.raises(UserError, match=r"has another group \('patient', now 'image'\)"):
        laid_out(tmp_path, methods=["fedavg", "fedbn"], repeats=3, group="image")  # more repeats are no other plan
    with pytest.raises(UserError, match="another plan: its run synthetic/all/r0/fedbn is not in this plan"):
        laid_out(tmp_path, methods=["fedavg"], repeats=2)
    with pytest.raises(ProblemList, match="nowhere") as told:  # what is wrong with a plan comes before its place
        laid_out(tmp_path, methods=["fedavg"], anchor="nowhere")
    assert "another plan" not in str(told.value)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.txt").write_text("mine")
    with pytest.raises(UserError, match="not of a study"):
        lay_out(work.data.plan, tmp_path / "thesis")


def test_too_few_sites_are_told_before_the_start(tmp_path):
    (tmp_path / "one.csv").write_text("site,domain,negative,positive\nalone,elbow/A,6,6\n")
    with pytest.raises(UserError, match="has 1 site, and method fedavg needs two"):
        laid_out(tmp_path, scenarios=["one.csv"], methods=["fedavg", "local"])
    assert not (tmp_path / "study").exists()


def test_a_run_ends_with_the_runner_that_started_it(tmp_path):
    """Even where the runner was killed and could end nothing itself."""
    code = """
import pathlib, sys, time
from heterosync.study.running.one import Watch
folder = pathlib.Path(sys.argv[1])
with Watch(folder, folder):
    time.sleep(120)
"""
    environment = {**Machine([]).environment(0, 1), PARENT: "1"}
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=100)
    assert ended.returncode == -signal.SIGTERM
    assert json.loads((tmp_path / "progress.json").read_text())["peak_memory_bytes"] > 0


def test_the_live_table_is_drawn_again_in_place_and_leaves_nothing():
    out = io.StringIO()
    table = Table(out)
    run = {"run": "A r0 hsl", "rounds_done": 1, "rounds": 4, "seconds": 30.0, "peak_memory_bytes": 2**30}
    table.state("0 of 2 runs, about 2 min left", [run])
    assert "A r0 hsl [#####               ] 1/4 rounds, 30 s, 1.0 GiB" in out.getvalue()
    table.event("done", "A r0 hsl: done")
    assert out.getvalue().endswith("\x1b[2F\x1b[JA r0 hsl: done\n")
    table.close()
    assert out.getvalue().endswith("A r0 hsl: done\n")


def test_lines_tell_each_round_once(capsys):
    lines = Lines()
    for done in (0, 1, 1, 2):
        lines.state("soon", [{"run": "x", "rounds_done": done, "rounds": 2}])
    assert capsys.readouterr().out == "  x: round 1 of 2; soon\n  x: round 2 of 2; soon\n"


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands_from_plan_to_clean(tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, "methods": ["fedavg", "local"]}))
    out = str(tmp_path / "study")
    assert main(["study", "run", str(tmp_path / "plan.yaml"), "--out", out, "--dry-run"]) == 0
    assert "2 runs" in capsys.readouterr().out and not (tmp_path / "study").exists()
    command = ["study", "run", str(tmp_path / "plan.yaml"), "--out", out, "--jobs", "2", "--json"]
    assert main(command) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events if event["event"] != "round"][:3] == ["plan", "data", "start"]
    assert sorted(event["run"] for event in events if event["event"] == "done") == [
        "synthetic r0 fedavg",
        "synthetic r0 local",
    ]
    assert events[-1] == {"event": "end", "study": out, "failed": {}}
    began = time.monotonic()
    assert main(command) == 0  # nothing is left to do
    assert time.monotonic() - began < 20
    assert main(["study", "status", out]) == 0
    assert "2 of 2 runs done" in capsys.readouterr().out
    assert main(["study", "status", out, "--json"]) == 0
    assert {run["state"] for run in json.loads(capsys.readouterr().out)["runs"]} == {"done"}

    study = tmp_path / "study"
    assert main(["study", "clean", out]) == 0
    assert "results and images stay" in capsys.readouterr().out
    assert not list(study.rglob("*.pt")) and len(list(study.rglob("predictions.csv"))) == 2
    assert main(["study", "clean", out, "--all"]) == 1
    assert "add --yes" in capsys.readouterr().err and (study / "study.json").exists()
    assert main(["study", "clean", out, "--all", "--yes"]) == 0
    assert not study.exists()


# -- predictions.csv --------------------------------------------------------------------------------------------------


def test_predictions_are_read_back_as_they_were_written(tmp_path):
    rows = [
        Prediction("a", 'odd, "name"\n1', "", 0, 0.1 + 0.2, "best"),
        Prediction("unseen", "2", "p 7", 1, 1e-17, "site:a"),
    ]
    write_predictions(tmp_path, rows[1:])
    assert read_predictions(tmp_path) == rows[1:]
    write_predictions(tmp_path, rows)
    assert read_predictions(tmp_path)[0].probability == 0.1 + 0.2


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("a,1,,2,0.5,best", "line 2: label '2' must be 0 or 1"),
        ("a,1,,1,nan,best", "line 2: probability 'nan' must be a number from 0 to 1"),
        ("a,1,,1,1.5,best", "from 0 to 1"),
        ("a,1,,1,0.5", "5 values for 6 columns"),
        (",1,,1,0.5,best", "must not be empty"),
    ],
)
def test_damaged_predictions_are_told_by_line(line, part, tmp_path):
    (tmp_path / "predictions.csv").write_text(",".join(COLUMNS) + f"\n{line}\n")
    with pytest.raises(UserError, match=part):
        read_predictions(tmp_path)


def test_predictions_with_other_columns_or_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="missing"):
        read_predictions(tmp_path)
    (tmp_path / "predictions.csv").write_text("id,label\n1,0\n")
    with pytest.raises(UserError, match="the header must be site,id,patient,label,probability,model"):
        read_predictions(tmp_path)


def test_a_source_with_patients_and_an_anchor_source_of_files(tmp_path):
    """A real source: an npz with patients; anchors drawn from another one."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [60, 60])
    patients = np.array([f"p{i // 2}" for i in range(120)])
    names = np.array(["benign", "malignant"])[labels]
    np.savez(tmp_path / "pool.npz", images=toy_images(labels, 0), labels=names, patients=patients)
    np.savez(
        tmp_path / "anchor.npz", images=rng.integers(0, 255, (24, 32, 32), np.uint8), labels=np.repeat(["x", "y"], 12)
    )
    (tmp_path / "two.csv").write_text("site,negative,positive\na,20,20\nb,16,16\n")
    work, out = laid_out(
        tmp_path,
        methods=["hsl"],
        scenarios=["two.csv"],
        source={"path": "pool.npz", "negative": "benign", "positive": "malignant"},
        anchor={"path": "anchor.npz", "negative": "x", "positive": "y", "per_class": 10},
    )
    done = play(out, "two/all/r0/hsl", ENGINES, lambda line: None)
    rows = read_predictions(out / "runs/two/all/r0/hsl/results")
    assert done.engine == "inprocess" and {row.site for row in rows} == {"a", "b", "unseen"}
    assert all(row.patient.startswith("p") and not row.id.startswith("seed") for row in rows)
    assert json.loads((out / "data/two/all/r0/a/anchor/anchor.json").read_text())["n"] == 20
