"""The demo with the in-process runner in the place of the simulator, in small."""

from __future__ import annotations

import json

import pytest

from heterosync.errors import UserError
from heterosync.federation.runner import run_inprocess
from heterosync.files import own_folder
from heterosync.study.demo import MARK, METHODS, run_demo
from toys import SMOKE


def test_demo_writes_summary_table_and_figure(tmp_path):
    asked = []

    def run_job(method, method_settings, training, data, sites, folder):
        asked.append((method, dict(method_settings), len(sites)))
        run_inprocess(method, {site: data / site for site in sites}, folder / "results", method_settings, training)
        return folder / "results"

    said = []
    out = tmp_path / "demo"
    summary = run_demo(out, run_job, {**SMOKE, "rounds": 1}, scale=0.25, say=said.append)
    assert asked == [("hsl", {}, 5), ("local", {"network": "classifier"}, 5)]
    assert json.loads((out / "summary.json").read_text()) == summary
    sites = {"site-a", "site-b", "site-c", "site-d", "site-e"}
    assert set(summary) == set(METHODS) and all(set(values) == sites | {"mean"} for values in summary.values())
    files = ("summary.json", "report.md", "auc.png", "auc.svg")
    for name in files:
        assert (out / name).stat().st_size > 100
        assert any(line.strip() == str(out / name) for line in said), f"the demo does not name {name}"
    assert any("synthetic" in line for line in said)


def test_an_earlier_demo_is_replaced_and_other_files_are_not(tmp_path):
    out = own_folder(tmp_path / "demo", MARK, "heterosync demo")
    (out / "old.txt").write_text("x")
    assert list(own_folder(out, MARK, "heterosync demo").glob("*.txt")) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not from `heterosync demo`"):
        own_folder(mine, MARK, "heterosync demo")
    assert (mine / "thesis.txt").exists()
