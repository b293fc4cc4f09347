"""Mistakes with studies: clear lines on stderr, exit code 1, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from heterosync.cli import main
from toys import SMOKE

PLAN = {
    "methods": ["fedavg"],
    "scenarios": [{"scenario": "synthetic", "scale": 0.1}],
    "training": dict(SMOKE),
    "engine": "inprocess",
}

CASES = {
    "a plan that is absent": ({}, "run {tmp}/none.yaml", "neither a plan file nor a preset", "demo, paper, prostate"),
    "an unknown preset": ({}, "run demmo", "did you mean 'demo'"),
    "an unknown method": ({"methods": ["fedvag"]}, "run {plan}", "did you mean 'fedavg'"),
    "an unknown scenario": ({"scenarios": ["combind"]}, "run {plan}", "did you mean 'combined'"),
    "a contradiction": ({"repeats": 2, "seeds": [1, 2]}, "run {plan}", "leave out repeats"),
    "a source that is absent": (
        {"source": {"path": "no.npz", "negative": "a", "positive": "b"}},
        "run {plan}",
        "no.npz does not exist",
    ),
    "an anchor pack that is absent": ({"anchor": "pack", "methods": ["hsl"]}, "run {plan}", "anchor pack", "missing"),
    "an unknown anchor table": ({"anchor": {"table": "sat-rnsa"}}, "run {plan}", "did you mean 'sat-rsna'"),
    "anchors of a site that has none": ({"anchor": {"table": "non-sat-mix"}}, "run {plan}", "no row in the anchor"),
    "an unknown body region": ({"scenarios": ["{tmp}/region.csv"]}, "run {plan}", "unknown region 'elbov'", "'elbow'"),
    "a bad line of a table": ({"scenarios": ["{tmp}/bad.csv"]}, "run {plan}", "bad.csv line 2", "whole numbers"),
    "an image size of text": ({"source": {"kind": "synthetic", "noise": "much"}}, "run {plan}", "noise", "numbers"),
    "no run at all": ({"scenarios": [{"scenario": "D", "methods": []}]}, "run {plan}", "has no run"),
    "a folder of something else": ({}, "run {plan} --out {tmp}/thesis", "not of a study", "--out"),
    "status of no study": ({}, "status {tmp}/thesis", "not the folder of a study"),
    "status of a damaged study": ({}, "status {tmp}/cut", "study.json", "not readable JSON"),
    "clean of no study": ({}, "clean {tmp}/thesis", "not the folder of a study"),
    "a run of no study": ({}, "one {tmp}/thesis a/all/r0/hsl", "not the folder of a study"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "region.csv").write_text("site,domain,negative,positive\na,elbov/A,6,6\nb,elbow/A,6,6\n")
    (tmp_path / "bad.csv").write_text("site,domain,negative,positive\na,elbow/A,six,6\n")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.txt").write_text("mine")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "study.json").write_text('{"name": ')
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(name, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    changes, command, *parts = CASES[name]
    values = json.loads(json.dumps({**PLAN, **changes}).replace("{tmp}", str(folder)))
    (folder / "plan.yaml").write_text(yaml.safe_dump(values))
    before = sorted(path for path in folder.rglob("*"))
    words = ["study", *(word.format(tmp=folder, plan=folder / "plan.yaml") for word in command.split())]
    assert main(words) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    sites = 5 if name == "anchors of a site that has none" else 1  # one line for each
    assert len(lines) == sites and lines[0].startswith("heterosync: ")
    assert all(part in lines[0] for part in parts), lines
    assert sorted(path for path in folder.rglob("*")) == before


def test_a_damaged_record_of_a_run_is_a_failed_run_in_the_status(folder, capsys):
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    from heterosync.study.running.plan_file import read_plan
    from heterosync.study.running.record import write_study
    from heterosync.study.running.runner import lay_out

    work = lay_out(read_plan(folder / "plan.yaml"), folder / "out")
    write_study(folder / "out", work.data.plan, work.specs, work.data.cells)
    run = work.specs[0].folder(folder / "out")
    run.mkdir(parents=True)
    (run / "done.json").write_text('{"digest": "x"}')
    assert main(["study", "status", str(folder / "out")]) == 0
    assert "synthetic/all/r0/fedavg: failed" in capsys.readouterr().out
