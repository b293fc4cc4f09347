"""Mistakes at the command line: one clear line on stderr, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from heterosync.cli import main
from study_toys import toy_model, toy_run


class Case:
    """A command that fails: words of it, parts that its error line must have, and the exit code."""

    def __init__(self, command: str, *parts: str, code: int = 1):
        self.command, self.parts, self.code = command, parts, code


CASES = {
    "no command": Case("", "COMMAND", code=2),
    "unknown command": Case("reprot", "invalid choice", "did you mean 'report'?", code=2),
    "unknown sub-command": Case("study statsu", "did you mean 'status'?", code=2),
    "job of unknown method": Case("job describe hls", "no method 'hls'", "did you mean 'hsl'"),
    "export of nothing": Case("job export --out {tmp}/out", "METHOD or give --all"),
    "export of one and all": Case("job export hsl --all --out {tmp}/out", "METHOD or give --all"),
    "unknown hyper-parameter": Case("job export hsl --out {tmp}/out --set temprature=2", "temprature", "'temperature'"),
    "setting of another method": Case("job export hsl --out {tmp}/out --set network=mmoe", "unknown setting 'network'"),
    "setting of a wrong type": Case("job export hsl --out {tmp}/out --set rounds=many", "rounds", "whole number"),
    "setting out of range": Case("job export hsl --out {tmp}/out --set image_size=0", "image_size", "smallest"),
    "setting without value": Case("job export hsl --out {tmp}/out --set rounds", "--set rounds", "name=value"),
    "setting given twice": Case("job export hsl --out {tmp}/out --set lr=1 --set lr=2", "given twice"),
    "rounds given twice": Case("job export hsl --out {tmp}/out --rounds 3 --set rounds=4", "--rounds and --set rounds"),
    "sites given twice": Case("job export hsl --out {tmp}/out --sites a --set sites=[]", "--sites and --set sites"),
    "weights that are no file": Case("job export hsl --out {tmp}/out --set weights=imagnet", "did you mean 'imagenet'"),
    "setting of a network that is not used": Case(
        "job export local --out {tmp}/out --set temperature=2", "counts only with network=mmoe"
    ),
    "anchors of a method without them": Case(
        "job export local --out {tmp}/out --set anchors_may_differ=true", "anchors_may_differ", "no anchor task"
    ),
    "export onto other files": Case("job export hsl --out {tmp}/others", "others/hsl", "no heterosync job"),
    "export of all, one onto other files": Case("job export --all --out {tmp}/others", "others/hsl"),
    "rounds of zero": Case("job export hsl --out {tmp}/out --rounds 0", "1 or more", code=2),
    "more sites needed than named": Case("job export hsl --out {tmp}/o --sites a,b --min-clients 3", "min_clients"),
    "export onto a file": Case("job export hsl --out {tmp}/a.txt", "a.txt", "choose"),
    "simulate without data": Case("simulate jobs/hsl", "--data DIR", "HETEROSYNC_DATA"),
    "simulate with data that is absent": Case("simulate jobs/hsl --data {tmp}/none", "is not a folder"),
    "simulate with data without sites": Case("simulate jobs/hsl --data {tmp}/empty", "no site folder"),
    "simulate a folder that is no job": Case("simulate {tmp}/empty --data {data} --workspace {tmp}/ws", "not a job"),
    "simulate a site that is absent": Case("simulate {job} --data {data} --sites site-a,site-q {ws}", "site-q"),
    "simulate with too many threads": Case(
        "simulate {job} --data {data} --sites site-a --threads 3 {ws}", "threads is 3"
    ),
    "simulate sites that meet, with too few threads": Case(
        "simulate jobs/splitavg --data {data} --sites site-a,site-b --threads 1 {ws}",
        "threads is 1",
        "one for each of its 2 sites",
    ),
    "simulate into a folder of others": Case("simulate {job} --data {data} --workspace {tmp}/thesis", "a new folder"),
    "demo into a folder of other files": Case("demo --out {tmp}/thesis", "not from `heterosync demo`"),
    "report on an absent folder": Case("report {tmp}/none", "is not a folder"),
    "report on a folder without a run": Case("report {tmp}/empty", "no run.json"),
    "report on a cut-off record": Case("report {tmp}/cut", "run.json", "not readable JSON"),
    "report on a damaged history": Case("report {tmp}/history", "history.csv", "damaged"),
    "report onto a file": Case("report {run} --out {tmp}/a.txt", "a.txt", "choose"),
    "predict with an absent model": Case("predict {tmp}/none.pt {images} {out}", "none.pt does not exist"),
    "predict with a cut-off model": Case("predict {tmp}/cut.pt {images} {out}", "cut off"),
    "predict with a file that is no model": Case("predict {tmp}/a.txt {images} {out}", "a.txt", "no model file"),
    "predict an absent folder": Case("predict {model} {tmp}/none {out}", "does not exist"),
    "predict a folder without images": Case("predict {model} {tmp}/thesis {out}", "holds no image"),
    "predict a text file": Case("predict {model} {tmp}/a.txt {out}", "a.txt", "unknown image format"),
    "predict a damaged pack": Case("predict {model} {tmp}/pack {out}", "pack.npz", "copy it again"),
    "predict without the partners asked for": Case(
        "predict {model} {images} --partner sat_mean {out}", "no partner images"
    ),
    "predict with an unknown partner": Case("predict {model} {images} --partner sat {out}", "sat", code=2),
    "predict with an anchor that is absent": Case(
        "predict {model} {images} --partner sat_mean --anchor {tmp}/none {out}", "anchor"
    ),
    "predict on a device that is absent": Case("predict {model} {images} --device cuda:9 {out}", "cuda:9"),
    "partners from a folder without an anchor": Case("partners {model} --anchor {tmp}/empty", "anchor"),
    "export of a program with sat_index": Case("export {model} --partner sat_index --out {tmp}/out.pt2", code=2),
    "doctor with a server that is no address": Case("doctor --server nowhere --data {data}", "host:port"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, alliance) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "a.txt").write_text("words")
    (tmp / "empty").mkdir()
    (tmp / "thesis").mkdir()
    (tmp / "thesis" / "chapter.txt").write_text("words")
    (tmp / "others" / "hsl").mkdir(parents=True)
    (tmp / "others" / "hsl" / "notes.txt").write_text("words")
    (tmp / "pack").mkdir()
    (tmp / "pack" / "pack.npz").write_bytes(b"PK\x03\x04 cut off")
    model = toy_model(tmp / "models" / "best_model.pt")
    (tmp / "cut.pt").write_bytes(model.read_bytes()[:5000])
    run = toy_run(tmp / "runs" / "good")
    cut = toy_run(tmp / "cut")
    (cut / "run.json").write_text((cut / "run.json").read_text()[:100])
    history = toy_run(tmp / "history")
    (history / "history.csv").write_text("round,site,metric,value\n0,site-a,val_auc_received\n")
    assert main(["job", "export", "hsl", "--out", str(tmp / "jobs")]) == 0
    data = next(iter(alliance.values())).parent
    images = alliance["site-a"] / "images.npz"
    return {"tmp": tmp, "data": data, "model": model, "run": run, "job": tmp / "jobs" / "hsl", "images": images}


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", list(CASES))
def test_one_clear_line_and_nothing_half_written(name, places, capsys, monkeypatch):
    monkeypatch.delenv("HETEROSYNC_DATA", raising=False)
    case, before = CASES[name], files_below(places["tmp"])
    capsys.readouterr()
    words = {**places, "out": f"--out {places['tmp']}/out.csv", "ws": f"--workspace {places['tmp']}/ws"}
    assert main(case.command.format(**words).split()) == case.code
    error = capsys.readouterr().err
    for part in case.parts:
        assert part in error, error
    assert "Traceback" not in error
    if case.code == 1:
        assert len(error.strip().splitlines()) == 1 and error.startswith("heterosync: "), error
    assert files_below(places["tmp"]) == before


def test_a_full_disk(places, tmp_path, capsys, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("heterosync.files.os.replace", full)
    out = tmp_path / "scores.csv"
    assert main(["predict", str(places["model"]), str(places["images"]), "--out", str(out)]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_permission_to_write(places, tmp_path, capsys, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("heterosync.files.tempfile.mkstemp", denied)
    assert main(["report", str(places["run"]), "--out", str(tmp_path / "out")]) == 1
    assert "no permission to write" in capsys.readouterr().err


def test_json_of_a_failure_is_still_a_line_on_stderr(places, capsys):
    assert main(["report", str(places["tmp"] / "empty"), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "no run.json" in captured.err


def test_good_input_of_the_same_kind_passes(places, tmp_path, capsys):
    """The table above would prove little if these commands failed for another reason."""
    out = tmp_path / "scores.csv"
    assert main(["predict", str(places["model"]), str(places["images"]), "--out", str(out)]) == 0
    assert main(["report", str(places["run"]), "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("[\n") :])
