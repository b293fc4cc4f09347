"""The trainer process: same answers as in process, errors that arrive as they were, deaths that cost one call."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from heterosync.errors import HeteroSyncError, TrainerDied, TrainerHung, UserError
from heterosync.federation.initial import initial_state
from heterosync.federation.site import SiteTrainer
from heterosync.federation.worker import TrainerProcess
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings


def start(smoke: dict) -> dict[str, torch.Tensor]:
    return initial_state(make_method("hsl", {}, TrainingSettings.from_dict(smoke)))


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def same(one, other) -> None:
    assert list(one.tensors) == list(other.tensors)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert {**one.metrics, "seconds": 0} == {**other.metrics, "seconds": 0}
    assert (one.site, one.method, one.round, one.samples) == (other.site, other.method, other.round, other.samples)


#: Imported by every Python process that finds it: prints at its start and later, through Python and past it.
NOISE = """
import os, sys, threading
def shout():
    print("{'progress': 1}")
    os.write(1, b"raw noise\\n")
    print(sys.stdin.read())
print("hello", flush=True)
threading.Timer(1.0, shout).start()
"""


def test_the_process_answers_as_the_trainer_does_and_leaves_nothing_behind(
    tmp_path: Path, alliance, smoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when libraries print to stdout and read stdin in it, and when it dies between two calls."""
    (tmp_path / "noisy").mkdir()
    (tmp_path / "noisy/sitecustomize.py").write_text(NOISE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "noisy"))
    lines: list[str] = []
    state = start(smoke)
    arguments = ("site-a", alliance["site-a"], "hsl", {}, smoke)
    plain = SiteTrainer(*arguments, tmp_path / "plain")
    with TrainerProcess(*arguments, tmp_path / "process", log=lines.append) as process:
        assert process.check_in() == plain.check_in()
        first, expected = process.train(0, state), plain.train(0, state)
        same(first, expected)
        earlier = process.pid
        assert earlier is not None
        os.kill(earlier, signal.SIGKILL)
        assert wait_until(lambda: process.pid is None)
        same(process.train(1, first.tensors), plain.train(1, expected.tensors))
        assert process.validate(state, "test", "best") == plain.validate(state, "test", "best")
        pid = process.pid
        assert pid not in (None, earlier) and alive(pid)
    assert process.pid is None and not alive(pid)
    assert any("round 1/2, epoch 1/1" in line for line in lines)
    results = [(tmp_path / name / "results/predictions.csv").read_bytes() for name in ("process", "plain")]
    assert results[0] == results[1]
    log = (tmp_path / "process/trainer.log").read_text()
    assert "round 1/2" in log and "raw noise" in log
    assert not list((tmp_path / "process").glob("*.tensors"))


def test_killed_in_the_middle_of_a_round_it_costs_that_call_and_no_more(tmp_path: Path, alliance, smoke) -> None:
    smoke.update(local_epochs=15, patience=15)
    state = start(smoke)
    arguments = ("site-a", alliance["site-a"], "hsl", {}, smoke)
    undisturbed = SiteTrainer(*arguments, tmp_path / "plain")
    expected = [undisturbed.train(0, state)]
    expected.append(undisturbed.train(1, expected[0].tensors))
    killed: list[int] = []

    def kill_after_first_epoch(line: str) -> None:
        if "round 2/2, epoch 1/15" in line and not killed:
            killed.append(process.pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    with TrainerProcess(*arguments, tmp_path / "process", log=kill_after_first_epoch) as process:
        first = process.train(0, state)
        with pytest.raises(TrainerDied, match=r"site site-a: trainer ended by SIGKILL .* during train"):
            process.train(1, first.tensors)
        again = process.train(1, first.tensors)
        assert process.pid not in killed
    same(first, expected[0])
    same(again, expected[1])


def test_a_step_that_may_not_leave_ends_the_trainer_and_the_next_call_starts_another(tmp_path, alliance, smoke) -> None:
    def blocked(step: int, parcel: dict) -> dict:
        raise UserError("blocked from leaving the site")

    state = initial_state(make_method("splitavg", {}, TrainingSettings.from_dict(smoke)))
    with TrainerProcess("site-a", alliance["site-a"], "splitavg", {}, smoke, tmp_path) as process:
        process.exchange = blocked
        for _ in range(2):  # a living trainer would take the second request for the answer to its step
            with pytest.raises(UserError, match="blocked from leaving the site"):
                process.train(0, state, items=100)
            assert process.pid is None


def test_user_errors_arrive_word_for_word_and_defects_with_their_traceback(tmp_path: Path, alliance, smoke) -> None:
    folder = tmp_path / "later"
    with pytest.raises(UserError) as expected:
        SiteTrainer("site-a", folder, "local", {}, smoke, tmp_path / "a").check_in()
    with TrainerProcess("site-a", folder, "local", {}, smoke, tmp_path / "b") as process:
        with pytest.raises(UserError) as got:
            process.check_in()
        assert str(got.value) == str(expected.value)
        pid = process.pid
        shutil.copytree(alliance["site-a"], folder)
        assert process.check_in()["site"] == "site-a" and process.pid == pid  # a mended mistake needs no new process
        with pytest.raises(HeteroSyncError, match="site site-a: trainer failed in train:\n(.|\n)*Error") as defect:
            process.train("zero", None)  # type: ignore[arg-type]
        assert not isinstance(defect.value, UserError)
        assert process.pid is None


@pytest.mark.parametrize("how", ["abort", "close"])
def test_a_working_trainer_is_stopped_promptly(tmp_path: Path, alliance, smoke, how: str) -> None:
    smoke.update(local_epochs=10_000, patience=10_000)
    training, aborted = threading.Event(), threading.Event()
    process = TrainerProcess(
        "site-a",
        alliance["site-a"],
        "local",
        {},
        smoke,
        tmp_path,
        log=lambda line: training.set() if "epoch" in line else None,
        abort=aborted.is_set,
    )
    ended: list[BaseException] = []

    def train() -> None:
        try:
            process.train(0, None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    assert training.wait(120)
    pid = process.pid
    began = time.monotonic()
    if how == "abort":
        aborted.set()
    else:
        process.close()
    thread.join(30)
    assert time.monotonic() - began < 5
    assert len(ended) == 1 and isinstance(ended[0], TrainerDied)
    # `close` closes the pipe and kills: the trainer may have noticed the first before the second reaches it
    assert {"abort": "the job was aborted", "close": "trainer ended"}[how] in str(ended[0])
    assert pid is not None and not alive(pid)


def test_a_call_that_takes_too_long_ends_the_trainer(tmp_path: Path, alliance, smoke) -> None:
    process = TrainerProcess("site-a", alliance["site-a"], "local", {}, smoke, tmp_path, timeout=0.3)
    with pytest.raises(TrainerDied, match="check_in took longer than 0.3 s"):
        process.check_in()
    assert process.pid is None


#: Imported by the trainer: its first step of a training hangs, those of every later process take `pause` seconds more.
CLUMSY = """
import pathlib, sys, time
if "heterosync.federation.child" in sys.orig_argv:
    from heterosync.training.steps import Steps
    marker, step = pathlib.Path(__file__).with_name("hung"), Steps._step
    def clumsy(*arguments):
        if not marker.exists():
            marker.touch()
            time.sleep(1e6)
        time.sleep({pause})
        return step(*arguments)
    Steps._step = clumsy
"""


def test_a_trainer_that_hangs_is_killed_and_one_that_is_slow_is_not(
    tmp_path: Path, alliance, smoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has one epoch, so no line of progress, for longer than the limit."""
    smoke.update(batch_size=4)
    (tmp_path / "clumsy").mkdir()
    (tmp_path / "clumsy/sitecustomize.py").write_text(CLUMSY.format(pause=1.0))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "clumsy"))
    with TrainerProcess("site-a", alliance["site-a"], "local", {}, smoke, tmp_path / "work") as process:
        process.check_in()
        pid, process.stall = process.pid, 4.0
        with pytest.raises(TrainerHung, match="site site-a: trainer killed: no sign of life for 4 s during train"):
            process.train(0, None)
        assert pid is not None and not alive(pid) and process.pid is None
        assert "in clumsy" in (tmp_path / "work/trainer.log").read_text()  # where it hung
        process.stall = None
        process.check_in()  # the next one starts
        process.stall = 4.0
        began = time.monotonic()
        process.train(0, None)
        assert time.monotonic() - began > process.stall


def test_the_trainer_ends_with_its_parent(tmp_path: Path, alliance, smoke) -> None:
    script = (
        "import sys, threading, time\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from heterosync.federation.worker import TrainerProcess\n"
        f"p = TrainerProcess('site-a', {str(alliance['site-a'])!r}, 'local', {{}}, {smoke!r}, {str(tmp_path)!r})\n"
        "threading.Thread(target=p.check_in).start()\n"
        "while p.pid is None: time.sleep(0.01)\n"
        "print(p.pid, flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not alive(pid))
