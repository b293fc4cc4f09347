"""Mistakes in the options of a job or of a simulation end with one line that names the option and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from heterosync.errors import UserError
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.folder import read_learning
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running.simulator import simulate
from toys import SMOKE, toy_alliance


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rounds": 0}, "rounds"),
        ({"rounds": "many"}, "rounds: 'many'"),
        ({"min_clients": -1}, "min_clients: -1 is not a whole number of at least 0"),
        ({"min_clients": True}, "min_clients"),
        ({"min_clients": 3, "sites": ["a", "b"]}, "min_clients: 3, but the job names 2 sites"),
        ({"sites": ["a", "a"]}, "named twice"),
        ({"sites": ["a/b"]}, "'a/b' cannot be the name of a site"),
        ({"sites": "site-a"}, "not a list of site names"),
        ({"train_timeout": 1.5}, "train_timeout: 1.5"),
        ({"task_request_interval": 0}, "task_request_interval"),
        ({"in_process": "yes"}, "in_process: 'yes' is not true or false"),
        ({"training": []}, "training: [] is not a table"),
        ({"min_client": 2}, "did you mean 'min_clients'"),
        ({"start_round": 1}, "job option 'start_round' is not known"),
        ({"source": "m.pt"}, "job option 'source' is not known"),
        ({"training": {"epochs": 3}}, "epochs"),
        ({"training": {"lr": "fast"}}, "lr"),
        ({"training": {"lr": -1.0}}, "lr"),
        ({"method_settings": {"temprature": 3.0}}, "did you mean 'temperature'"),
        ({"method_settings": {"temperature": "hot"}}, "temperature"),
    ],
)
def test_bad_options_of_a_job(tmp_path: Path, options: dict, text: str) -> None:
    with pytest.raises(UserError) as caught:
        build_job("hsl", tmp_path / "job", JobOptions.from_dict(options))
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "job").exists()  # nothing is written before everything is checked


def test_an_unknown_method(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'hsl'"):
        build_job("hls", tmp_path / "job")


def test_a_folder_that_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a heterosync job folder"):
        read_learning(tmp_path)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> dict:
    root = tmp_path_factory.mktemp("ready")
    toy_alliance(root / "data", 2)
    job = build_job("hsl", root / "job", JobOptions(training=SMOKE))
    return {"job": job, "workspace": root / "ws", "sites": ["site-a", "site-b"], "data": root / "data"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sites": []}, "no sites"),
        ({"sites": ["site-a", "site-a"]}, "named twice"),
        ({"sites": ["site-a", "site-x"]}, "no folder 'site-x'"),
        ({"sites": ["../etc"]}, "cannot be the name of a site"),
        ({"threads": 0}, "between 1 and the number of sites"),
        ({"threads": 3}, "between 1 and the number of sites"),
        ({"data": Path("/nowhere")}, "/nowhere"),
        ({"job": Path("/nowhere")}, "not a job folder"),
        ({"workspace": Path("/tmp/two words")}, "path with spaces"),
    ],
)
def test_bad_arguments_of_a_simulation_start_nothing(ready: dict, change: dict, text: str) -> None:
    with pytest.raises(UserError) as caught:
        simulate(**{**ready, **change})
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert not ready["workspace"].exists()


def test_a_simulation_never_empties_a_folder_of_somebody_else(ready: dict, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="thesis.txt"):
        simulate(**{**ready, "workspace": tmp_path})
    (tmp_path / "thesis.txt").rename(tmp_path / "results")  # the name of one of our own folders does not make it ours
    with pytest.raises(UserError, match="results"):
        simulate(**{**ready, "workspace": tmp_path})
    (tmp_path / "results").rename(tmp_path / "thesis.txt")
    with pytest.raises(UserError, match="lies in the workspace"):
        simulate(**{**ready, "workspace": ready["data"].parent})
    assert (tmp_path / "thesis.txt").read_text() == "precious"
