"""The benchmarks run, at sizes that measure nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is no part of the package

from benchmarks import aggregation, loading, published, round_overhead, step
from benchmarks.__main__ import main
from benchmarks.table import Measurement, as_text


def check(found: list[Measurement]) -> None:
    for measurement in found:
        assert measurement.ours > 0 and measurement.other > 0
        assert measurement.ratio == pytest.approx(measurement.other / measurement.ours)


def test_published_network_has_the_published_size():
    model = published.PublishedMMoE()
    assert sum(parameter.numel() for parameter in model.parameters()) == 23_723_650
    p, a = model.eval()(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))
    assert p.shape == a.shape == (2,) and bool(((p > 0) & (p < 1)).all())


def test_step():
    check(step.run(quick=True))


def test_loading():
    found = loading.run(quick=True)
    check(found)
    assert [measurement.part for measurement in found] == ["loading", "loading"]


@pytest.mark.parametrize("side", ["ours", "stock"])
def test_aggregation(side):
    result = aggregation.measure(side, 3, 2)
    assert result["seconds"] > 0 and result["mib"] >= 1


def test_aggregation_of_both_sides_gives_the_same_mean(tmp_path):
    results = []
    for side in (aggregation._ours, aggregation._stock):
        accept, finish = side(2, tmp_path / side.__name__)
        for i in range(3):
            accept(i, aggregation._state(i, 2))
        results.append(finish())
    from nvflare.apis.dxo import from_shareable

    ours, stock = (from_shareable(result).data for result in results)  # both are what an aggregator gives FLARE
    assert set(ours) == set(stock)
    for name, value in ours.items():
        assert value == pytest.approx(stock[name], rel=1e-6), name


def test_command_prints_ratios_and_the_machine(tmp_path, capsys, monkeypatch):
    measurement = Measurement("loading", "a thing", "ms", 2.0, 8.0, 4.0)
    monkeypatch.setattr(loading, "run", lambda quick: [measurement])
    assert main(["loading", "--quick", "--save", str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "4.00" in out and "machine: processor" in out
    assert json.loads((tmp_path / "b.json").read_text())["measurements"][0]["ratio"] == 4.0
    assert main(["loading", "--save", str(tmp_path / "b.txt")]) == 0
    assert (tmp_path / "b.txt").read_text().startswith(as_text([measurement])[:20])
    with pytest.raises(SystemExit):
        main(["no-such-part"])


@pytest.mark.flare
@pytest.mark.slow
def test_round_overhead(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = round_overhead.measure(2, 2, "resnet_tiny", tmp_path)
    assert 0 < result["seconds_per_round"] < result["seconds"] and result["server_mib"] > 50
