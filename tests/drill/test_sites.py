"""Sites without disk space, with 2 GB of junk, and under the name of another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from federation_toys import SERVER, Federation, contributors, federation, job_of, until
from heterosync.flare.kits.kit import seal
from heterosync.flare.running.processes import package_environment
from heterosync.flare.running.session import COMPLETED
from toys import SMOKE

pytestmark = [pytest.mark.drill]

ALL, TWO = ["site-a", "site-b", "site-c"], ["site-a", "site-b"]
FAULTY = Path(__file__).parents[1] / "faulty_site"
GIB = 2**30


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory, data) -> Iterator[Federation]:
    """An alliance in which the kit of site-c, and so its workspace, lies on a file system of 32 MiB."""
    root = tmp_path_factory.mktemp("sites")
    with federation(root / "alliance", data, start=TWO) as running:
        kit = running.alliance.kits["site-c"]
        aside = kit.rename(kit.with_name("aside"))
        kit.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", kit], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}: run `make drill`")
        try:
            shutil.copytree(aside, kit, dirs_exist_ok=True)
            yield running
            running.kill("site-c")
        finally:
            subprocess.run(["umount", kit], check=True)


def test_a_borrowed_name(small_disk, tmp_path: Path, tell: Callable[[str], None]) -> None:
    """a site that claims the name of another hospital with its own, valid certificate"""
    alliance = small_disk.alliance
    borrowed = Path(shutil.copytree(alliance.kits["site-c"], tmp_path / "borrowed"))
    for name in ("client.crt", "client.key"):
        shutil.copy(alliance.kits["site-b"] / "startup" / name, borrowed / "startup" / name)
    seal(borrowed, load_pem_private_key(alliance.state()["root_pri_key"].encode(), None))
    small_disk.start("site-c", kit=borrowed)
    refused = "authenticated as 'site-b' but claimed"
    until(lambda: small_disk.logged(SERVER, refused), 60, "the server refuses")
    until(lambda: "Login failed" in small_disk.console("site-c", borrowed), 60, "the site hears of it")
    assert small_disk.session().sites() == TWO
    small_disk.kill("site-c")
    tell('the server lets nobody in: "authenticated as \'site-b\' but claimed …"; at the site: "Login failed"')
    small_disk.start("site-c")
    small_disk.wait_for(ALL)
    tell("the real site-c registers afterwards as if nothing had been")


def test_full_disk(small_disk, tmp_path: Path, tell: Callable[[str], None]) -> None:
    """full disk at a site, from its first finished round until round 3 of 5"""
    filler = small_disk.alliance.kits["site-c"] / "filler"
    at_hand: list[Path] = []
    rounds: list[int] = []  # of the state that the site has after two rounds without space

    def fill(job_id: str) -> None:
        record = small_disk.run_folder(SERVER, job_id) / "run.json"
        done = len(json.loads(record.read_text())["rounds"]) if record.exists() else 0
        if done == 1 and not filler.exists():
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            (saved,) = small_disk.alliance.kits["site-c"].glob(f"trainings/{job_id}/state.pt")
            at_hand.append(saved)
        elif done >= 3 and filler.exists():
            rounds.append(torch.load(at_hand[0], weights_only=True)["round"])
            filler.unlink()

    if "site-c" not in small_disk.session().sites():
        small_disk.start("site-c")
        small_disk.wait_for(ALL)
    training = {**SMOKE, "rounds": 5, "local_epochs": 25, "patience": 25}
    job = job_of(tmp_path, "full", training, min_clients=2, wait_after_min=10)
    done = small_disk.run(job, look=fill)
    console, refused = small_disk.console("site-c"), done.record()["rounds"][1]["refused"]
    (line, *_) = [line for line in console.splitlines() if "PROBLEM" in line and "the disk is full" in line]
    tell(f"{done.end.status}; contributors per round: {contributors(done)}")
    tell(f"the lead reads: {refused}")
    tell(f"the site reads: … {line[line.index('the disk is full') :]}")
    assert done.end.status == COMPLETED and done.record()["status"] == "completed"
    assert rounds == [0], "the state of the last round that could be saved is whole"
    assert contributors(done)[:2] == [ALL, TWO] and contributors(done)[-1] == ALL


def test_two_gigabytes_of_junk(small_disk, tmp_path: Path, tell: Callable[[str], None]) -> None:
    """2 GiB of junk in an answer of a site"""
    before = psutil.virtual_memory().available
    if before < 12 * GIB:
        pytest.skip(f"needs 12 GiB of free memory, there are {before / GIB:.0f}")
    paths = os.pathsep.join([str(FAULTY), package_environment()["PYTHONPATH"]])
    small_disk.restart("site-c", PYTHONPATH=paths, TOY_FAULTS=json.dumps({"0": "flood"}))
    peak = {SERVER: 0, "site-c": 0}

    def measure(job_id: str) -> None:
        for name in peak:
            for process in small_disk.processes(name, job_id):
                with_memory = process.memory_info().rss if process.is_running() else 0
                peak[name] = max(peak[name], with_memory)

    done = small_disk.run(job_of(tmp_path, "flood", min_clients=2, wait_after_min=120), look=measure, timeout=400)
    small_disk.restart("site-c")
    tell(f"{done.end.status}; contributors per round: {contributors(done)}")
    tell(f"refused: {[record['refused'] for record in done.record()['rounds']]}")
    tell(f"largest memory seen: { ({name: round(value / GIB, 1) for name, value in peak.items()}) } GiB")
    assert done.end.status == COMPLETED and contributors(done) == [TWO, ALL]
    assert done.record()["rounds"][0]["refused"] == {"site-c": "tensor 'junk' is not part of the shared state"}
