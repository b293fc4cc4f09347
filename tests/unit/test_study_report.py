"""Tables, figures and reports from result files alone."""

from __future__ import annotations

import csv
import json
import re

import pytest

from heterosync.cli import main
from heterosync.errors import UserError
from heterosync.study.evidence.runs import find_runs, read_runs
from heterosync.study.pages.report import report_text, score_table, summary, write_report
from heterosync.study.table import mean, number, text_table, with_interval
from study_toys import toy_run


def test_table_cells():
    assert number(0.91234) == "0.912" and number(None) == "-"
    assert with_interval(0.9, 0.81, 0.954) == "0.900 (0.81 to 0.95)"
    assert with_interval(0.9, None, None) == "0.900"
    assert mean([1.0, None, 0.5]) == 0.75 and mean([None]) is None


def test_text_table_lines_up():
    lines = text_table(["site", "auc"], [["a", "0.9"], ["a long name", "-"]]).splitlines()
    assert len(set(map(len, lines))) == 1
    assert lines[1] == "|-------------|----:|"


@pytest.fixture
def runs(tmp_path):
    return read_runs([toy_run(tmp_path / "one"), toy_run(tmp_path / "two", "local")])


def test_summary_has_every_site_and_the_plain_mean(runs):
    assert summary(runs) == {
        "hsl": {"site-a": 0.9, "site-b": pytest.approx(0.8), "mean": pytest.approx(0.85)},
        "local": {"site-a": 0.8, "site-b": pytest.approx(0.7), "mean": pytest.approx(0.75)},
    }


def test_a_site_that_only_receives_is_no_part_of_the_mean(tmp_path):
    folder = toy_run(tmp_path / "one")
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, "receivers": ["site-b"]}))
    assert summary(read_runs([folder]))["hsl"]["mean"] == 0.9


def test_table_of_two_runs(runs):
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in score_table(runs).splitlines()]
    assert rows[0] == ["site", "test images (positive)", "hsl", "local"]
    assert rows[2] == ["site-a", "40 (10)", "0.900 (0.70 to 0.95)", "0.800 (0.70 to 0.95)"]
    assert rows[-1] == ["mean", "", "0.850", "0.750"]


def test_report_files(runs, tmp_path):
    files = write_report(runs, tmp_path / "out")
    assert [file.name for file in files] == [
        "report.md",
        "auc.csv",
        "auc.png",
        "auc.svg",
        "rounds.png",
        "rounds.svg",
        "index.html",
    ]
    assert all(file.stat().st_size > 100 for file in files)
    with open(tmp_path / "out" / "auc.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["model"], row["site"], row["auc"]) for row in rows][0] == ("hsl", "best", "site-a", "0.9")
    assert len(rows) == 4


def test_figures_are_the_same_for_the_same_numbers(runs, tmp_path):
    first, second = write_report(runs, tmp_path / "1"), write_report(runs, tmp_path / "2")
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_report_of_a_run_that_was_cut_off(tmp_path):
    """Two of three rounds are done, nothing is tested, the status still says running."""
    runs = read_runs([toy_run(tmp_path / "run", rounds=2, tested=False, status="running")])
    text = report_text(runs)
    assert "still going or broken off, 2 of 3 rounds" in text
    assert "Not tested yet" in text and "0.650" in text  # mean of 0.7 and 0.6 after round 1
    names = [file.name for file in write_report(runs, tmp_path / "out")]
    assert names == ["report.md", "auc.csv", "rounds.png", "rounds.svg", "index.html"]


def test_report_before_the_first_round_has_ended(tmp_path):
    run = toy_run(tmp_path / "run", rounds=0, tested=False, status="running")
    (run / "cross_site_metrics.json").unlink()
    (run / "history.csv").unlink()
    assert "No result yet" in report_text(read_runs([run]))
    assert write_report(read_runs([run]), tmp_path / "out")


def test_sites_that_were_away_or_refused_are_named(tmp_path):
    run = toy_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    info["rounds"][1]["contributors"] = ["site-a"]
    info["rounds"][1]["refused"] = {"site-b": "tensor 'w' is missing"}
    (run / "run.json").write_text(json.dumps(info))
    text = report_text(read_runs([run]))
    assert "round 2: without site-b" in text
    assert "refused, round 2: site-b: tensor 'w' is missing" in text


def test_an_undefined_auc_is_left_out_of_the_mean(tmp_path):
    run = toy_run(tmp_path / "run")
    tests = json.loads((run / "cross_site_metrics.json").read_text())
    del tests["best"]["site-b"]["auc"]
    (run / "cross_site_metrics.json").write_text(json.dumps(tests))
    runs = read_runs([run])
    assert summary(runs)["hsl"] == {"site-a": 0.9, "site-b": None, "mean": 0.9}
    assert write_report(runs, tmp_path / "out")


def test_runs_are_found_below_a_workspace_and_told_apart(tmp_path):
    toy_run(tmp_path / "ws" / "server" / "simulate_job")
    toy_run(tmp_path / "ws" / "results")  # the copy that `heterosync simulate` makes when it ends
    assert find_runs(tmp_path / "ws") == [tmp_path / "ws" / "server" / "simulate_job"]
    toy_run(tmp_path / "second" / "server" / "simulate_job")
    labels = [run.label for run in read_runs([tmp_path / "ws", tmp_path / "second"])]
    assert labels == ["hsl (ws)", "hsl (second)"]


def test_the_store_of_a_training_is_left_out_beside_its_job(tmp_path):
    server = tmp_path / "ws" / "server"
    job = toy_run(server / "simulate_job")
    other = toy_run(server / "trainings" / "of-another-job")
    toy_run(server / "trainings" / "simulate_job")
    toy_run(tmp_path / "ws" / "results")
    info = json.loads((job / "run.json").read_text())
    (job / "run.json").write_text(json.dumps({**info, "training_id": "simulate_job"}))
    assert find_runs(tmp_path / "ws") == [job, other]  # nothing else tells of the other training
    assert find_runs(server / "trainings" / "simulate_job") == [server / "trainings" / "simulate_job"]


def test_results_alone_are_a_run_too(tmp_path):
    toy_run(tmp_path / "ws" / "results")
    assert find_runs(tmp_path / "ws") == [tmp_path / "ws" / "results"]


def test_command(tmp_path, capsys):
    run = toy_run(tmp_path / "run")
    assert main(["report", str(run), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["auc"]["mean"] == pytest.approx(0.85)
    assert entry["tested_model"] == "best" and entry["rounds_done"] == 3
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "auc.png" in capsys.readouterr().out


def test_folders_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run.json"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="is not a folder"):
        read_runs([tmp_path / "absent"])
