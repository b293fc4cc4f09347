"""A study on volumes under FLARE's simulator: the scores and models of the in-process engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from heterosync.cli.study_engine import Simulator
from heterosync.federation.initial import state_hash
from heterosync.federation.modelfile import load_model
from heterosync.study.running.engines import InProcess
from heterosync.study.running.one import play
from heterosync.study.scores import read_scores
from volume_study_toys import laid_out

pytestmark = [pytest.mark.flare, pytest.mark.slow]


def test_fine_tuned_submodels_are_the_same_under_both_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engines = {"flare": Simulator(), "inprocess": InProcess()}
    found = {}
    for engine in engines:
        tuned = {"method": "prostate_finetune", "training": {"weights": {"from": "prostate_ahnet"}, "rounds": 1}}
        _, out = laid_out(tmp_path / engine, engine=engine, methods=["prostate_ahnet", tuned])
        play(out, "sites/all/r0/prostate_ahnet-fold2", {engine: InProcess()}, lambda line: None)
        done = play(out, "sites/all/r0/prostate_finetune-fold2", engines, lambda line: None)
        results = out / "runs/sites/all/r0/prostate_finetune-fold2/results"
        own = {path.name: state_hash(load_model(path).state) for path in sorted((results / "own").iterdir())}
        found[engine] = (own, read_scores(results))
        assert done.engine == engine and set(own) == {"north.pt", "south.pt"}
    assert found["flare"] == found["inprocess"]
