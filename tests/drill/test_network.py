"""One site behind a bad line: TLS over real TCP, between network namespaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drill.wire import NEAR, Wire, why_not, wire
from federation_toys import Federation, contributors, federation, job_of, model_digest, oracle
from heterosync.flare.kits.project import Server
from heterosync.flare.running.poc import free_port
from heterosync.flare.running.session import COMPLETED
from toys import SMOKE

pytestmark = [pytest.mark.drill]

ALL, TWO = ["site-a", "site-b", "site-c"], ["site-a", "site-b"]


@pytest.fixture(scope="module")
def line() -> Iterator[Wire]:
    if reason := why_not():
        pytest.skip(reason)
    with wire() as laid:
        yield laid


@pytest.fixture(scope="module")
def behind_the_line(line: Wire, tmp_path_factory, data) -> Iterator[Federation]:
    """An alliance whose site-c is at the far end of the line."""
    root = tmp_path_factory.mktemp("network")
    with federation(root / "alliance", data, start=TWO, server=Server(NEAR, free_port())) as running:
        running.start("site-c", within=line.enter())
        running.wait_for(ALL)
        yield running


def test_cut(line: Wire, behind_the_line, tmp_path: Path, data, tell: Callable[[str], None]) -> None:
    """network cut for 30 s in the middle of a transfer"""
    armed: list[str] = []
    line.rate = 300_000  # a model takes seconds, so that the cut falls into the middle of one

    def arm(job_id: str) -> None:
        log = behind_the_line.run_folder("site-c", job_id) / "log.txt"
        if not armed and log.exists() and "round 1/3, epoch " in log.read_text():
            armed.append(job_id)
            line.cut_in_transfer(after=400_000, seconds=30)

    training = {**SMOKE, "rounds": 3}
    try:
        done = behind_the_line.run(job_of(tmp_path, "cut", training), look=arm, timeout=400)
    finally:
        line.rate = 1e9
    assert line.cuts == 1
    rounds = done.record()["rounds"]
    tell(f"{done.end.status}; contributors per round: {contributors(done)}")
    tell(f"seconds per round: {[round(record['seconds']) for record in rounds]}")
    assert done.end.status == COMPLETED and contributors(done) == [ALL] * 3
    assert model_digest(done.folder / "last_model.pt") == oracle(tmp_path, data, training)
    tell("the final model is that of an undisturbed run, tensor for tensor")


def test_slow_and_lossy(line: Wire, behind_the_line, tmp_path: Path, data, tell: Callable[[str], None]) -> None:
    """200 ms delay there and back, 5 % of the packets lost in each direction"""
    line.delay, line.loss, line.sent, line.lost = 0.1, 0.05, 0, 0
    try:
        done = behind_the_line.run(job_of(tmp_path, "lossy"), timeout=500)
    finally:
        line.delay = line.loss = 0.0
    tell(f"{done.end.status}; contributors per round: {contributors(done)}; {line.lost} of {line.sent} packets lost")
    tell(f"seconds per round: {[round(record['seconds']) for record in done.record()['rounds']]}")
    assert line.lost > 0
    assert done.end.status == COMPLETED and contributors(done) == [ALL] * 2
    assert model_digest(done.folder / "last_model.pt") == oracle(tmp_path, data)
    tell("the final model is that of an undisturbed run, tensor for tensor")
