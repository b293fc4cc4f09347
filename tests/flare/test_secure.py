"""One provisioned alliance with mutual TLS, and what hospitals and networks do to it.

Server and sites are separate process trees on loopback. The tests run in file order on one federation: at first
site-c is down, then kits that must not get in knock at the door, then all three sites are there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from federation_toys import (
    SERVER,
    Alliance,
    Federation,
    contributors,
    federation,
    job_of,
    model_digest,
    oracle,
    until,
    with_certificate,
)
from heterosync.errors import UserError
from heterosync.federation.runner import run_inprocess
from heterosync.files import write_json
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.jobs.segments import segment_job
from heterosync.flare.running.session import COMPLETED
from segment_toys import TINY, receiving, toy_volume_alliance
from toys import SMOKE

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.secure]

ALL, TWO = ["site-a", "site-b", "site-c"], ["site-a", "site-b"]


@pytest.fixture(scope="module")
def started(root: Path, data: dict[str, Path]) -> Iterator[Federation]:
    with federation(root / "alliance", data, start=TWO) as running:
        yield running


@pytest.fixture(scope="module")
def everybody(started: Federation) -> Federation:
    """The federation from where site-c is up, too."""
    started.start("site-c")
    started.wait_for(ALL)
    return started


# -- a site is down for the whole run ----------------------------------------------------------------------------------


def test_without_one_site_the_others_train_when_min_clients_allows(started, root, data):
    done = started.run(job_of(root, "two", min_clients=2))
    assert done.end.status == COMPLETED and done.record()["status"] == "completed"
    assert contributors(done) == [TWO] * 2
    assert model_digest(done.folder / "last_model.pt") == oracle(root, {site: data[site] for site in TWO})


def test_without_a_site_that_must_take_part_the_job_never_starts_and_says_why(started, root):
    lines: list[str] = []
    session = started.session()
    job_id = session.submit(job_of(root, "all-named", sites=tuple(ALL)))
    with pytest.raises(UserError, match="never started"):
        session.follow(job_id, lines.append, timeout=8)
    assert any(line.startswith("the job waits:") for line in lines), lines
    until(lambda: session.meta(job_id)["status"].startswith("FINISHED"), 30, "the job is over")


# -- kits that must not get in -----------------------------------------------------------------------------------------


def test_foreign_expired_and_future_certificates_do_not_get_in(started, root, data):
    alliance = started.alliance
    foreign = Alliance(root / "foreign", data, alliance.server).kits["site-c"]
    day = timedelta(days=1)
    expired = with_certificate(alliance, "site-c", root / "expired", -3 * day, -2 * day)
    future = with_certificate(alliance, "site-c", root / "future", 2 * day, 3 * day)  # a clock that is two days off
    kits = {"foreign": foreign, "expired": expired, "future": future}
    for name, kit in kits.items():
        started.start(name, kit=kit)
    try:
        last_words = {
            "foreign": "CERTIFICATE_VERIFY_FAILED",
            "expired": "ask the alliance lead for a renewed kit",
            "future": "set the clock",
        }
        for name, kit in kits.items():
            until(lambda n=name, k=kit: last_words[n] in started.console(n, k), 120, f"{name} has tried")
        for name in ("expired", "future"):
            assert started.started[name].wait(timeout=30) != 0
        assert "Successfully registered" not in started.console("foreign", foreign)
        assert started.session().sites() == TWO
    finally:
        for name in kits:
            started.kill(name)


@pytest.mark.parametrize("file", ["fed_client.json", "rootCA.pem", "start.sh", "sub_start.sh"])
def test_an_edited_start_up_file_stops_the_site_before_it_connects(started, root, file):
    kit = Path(shutil.copytree(started.alliance.kits["site-c"], root / f"edited-{file}"))
    target = kit / "startup" / file
    target.write_text(target.read_text() + "\n")
    started.start("edited", kit=kit)
    assert started.started["edited"].wait(timeout=60) != 0
    assert f"edited: {file}" in started.console("edited", kit)
    assert started.session().sites() == TWO


# -- all three sites ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_model_as_in_one_process(everybody, root, data):
    done = everybody.run(job_of(root, "all", in_process=False))
    assert done.end.status == COMPLETED
    assert model_digest(done.folder / "last_model.pt") == oracle(root, data)
    assert any(line.startswith("round 1/2, site site-a: ") for line in done.lines)
    assert any(line.startswith("round 2/2 done ") for line in done.lines)
    storage = everybody.alliance.kits[SERVER] / "jobs-storage"
    assert any(storage.iterdir()), "the server keeps its jobs inside its kit"


def test_two_jobs_at_once_do_not_disturb_each_other(everybody, root, data):
    session = everybody.session()
    ids = [session.submit(job_of(root, name)) for name in ("first", "second")]
    for job_id in ids:
        done = everybody.finish(job_id)
        assert done.end.status == COMPLETED
        assert model_digest(done.folder / "last_model.pt") == oracle(root, data)


@pytest.mark.parametrize("user", ["member@site-a.org", "admin@site-a.org"])
def test_an_admin_without_the_right_cannot_submit(everybody, root, user):
    with pytest.raises(UserError, match="no right"):
        everybody.session(user).submit(job_of(root, "forbidden"))


def test_a_lead_submits_and_follows_but_not_with_custom_code(everybody, root):
    lead = everybody.session("lead@site-a.org")
    job = build_job("hsl", root / "jobs" / "byoc", JobOptions(training=SMOKE), byoc=True)
    end = lead.follow(lead.submit(job), timeout=60)
    assert end.status == "FINISHED:FAILED_TO_RUN" and "BYOC not permitted" in end.cause


def test_custom_code_that_the_server_lets_pass_stops_at_the_sites(everybody, root):
    """The server's own policy is loosened for this test: what a hospital forbids does not depend on it."""
    path = everybody.alliance.kits[SERVER] / "local" / "authorization.json"
    kept = path.read_text()
    policy = json.loads(kept)
    policy["permissions"]["project_admin"]["byoc"] = "any"
    job = build_job("hsl", root / "jobs" / "byoc-2", JobOptions(training=SMOKE), byoc=True)
    try:
        path.write_text(json.dumps(policy))
        everybody.restart_server()
        everybody.wait_for(ALL)
        session = everybody.session()
        end = session.follow(session.submit(job), timeout=60)
        details = session.meta(end.job_id)["job_deploy_detail"]
    finally:
        path.write_text(kept)
        everybody.restart_server()
        everybody.wait_for(ALL)
    assert end.status == "FINISHED:FAILED_TO_RUN"
    assert sum("BYOC not permitted" in line for line in details) == 3, details


def test_a_job_that_asks_for_more_gets_no_answer(everybody, root):
    """A job that lets another executor, one on FLARE's own list, answer the training, and brings no filter.

    The sites do not build it; where the hospitals have widened their list to FLARE's, their filter blocks every answer.
    """
    job = job_of(root, "greedy")
    path = job / "app" / "config" / "config_fed_client.json"
    config = json.loads(path.read_text())
    config["executors"][0]["tasks"] = ["check_in"]
    other = {"path": "nvflare.app_common.np.np_trainer.NPTrainer", "args": {}}
    config["executors"].append({"tasks": ["train", "validate"], "executor": other})
    config["task_result_filters"] = []
    write_json(path, config)
    done = everybody.run(job)
    assert done.end.status != COMPLETED
    for site in ALL:
        log = everybody.run_folder(site, done.end.job_id) / "log.txt"
        assert "np_trainer.NPTrainer' at config path" in log.read_text() and "not in allow_list" in log.read_text()
    for site in ALL:
        path = everybody.alliance.kits[site] / "local" / "resources.json"
        content = json.loads(path.read_text())
        write_json(path, {**content, "class_allow_list": [*content["class_allow_list"], other["path"]]})
    done = everybody.run(job)
    assert done.end.status != COMPLETED and "outbound filter blocked" in done.end.cause
    for site in ALL:
        audit = everybody.run_folder(site, done.end.job_id) / "audit_site.jsonl"
        records = [json.loads(line) for line in audit.read_text().splitlines()]
        assert [record["left"] for record in records] == [False]
        assert "something else than the executor of heterosync" in records[0]["reason"]


def test_a_job_without_our_filter_still_passes_the_sites_own(everybody, root, data):
    job = job_of(root, "unfiltered")
    path = job / "app" / "config" / "config_fed_client.json"
    config = json.loads(path.read_text())
    config["task_result_filters"] = []
    write_json(path, config)
    done = everybody.run(job)
    assert done.end.status == COMPLETED
    for site in ALL:
        folder = everybody.run_folder(site, done.end.job_id)
        assert not (folder / "audit.jsonl").exists()
        assert len((folder / "audit_site.jsonl").read_text().splitlines()) == 6


def test_a_training_is_nobody_elses(everybody, root):
    """Server and sites know from FLARE who submitted a job."""
    job = job_of(root, "begun")
    begun = everybody.run(segment_job(job, root / "jobs" / "begun-1", segment_rounds=1), user="lead@site-a.org")
    assert begun.end.status == COMPLETED
    id_ = begun.end.job_id
    for name in (*ALL, SERVER):
        owner = everybody.alliance.kits[name] / "trainings" / id_ / "owner.json"
        assert json.loads(owner.read_text()) == {"name": "lead@site-a.org", "org": "sitea"}
    session = everybody.session("lead@site-b.org")
    end = session.follow(session.submit(segment_job(job, root / "jobs" / "begun-2", id_)), timeout=120)
    assert end.status != COMPLETED and end.cause.startswith(f"training '{id_}' was begun by another user")
    assert not any((everybody.alliance.kits[site] / "trainings" / end.job_id).exists() for site in ALL)


def test_a_hospital_that_demands_noise_noises_itself(everybody, root):
    """The job clips so that nothing is clipped; one hospital wants more, and the server gets no other weights of it."""
    path = everybody.alliance.kits["site-b"] / "local" / "privacy.json"
    kept = path.read_text()
    policy = json.loads(kept)
    policy["scopes"][0]["task_result_filters"][0]["args"] |= {"max_clip": 0.25, "min_noise": 0.01}
    try:
        write_json(path, policy)
        done = everybody.run(job_of(root, "weak", dp_clip=1e9))
    finally:
        path.write_text(kept)
    assert done.end.status == COMPLETED
    for site in ALL:
        record = everybody.alliance.kits[site] / "trainings" / done.end.job_id / "privacy.jsonl"
        releases = [json.loads(line) for line in record.read_text().splitlines()]
        assert [release["round"] for release in releases] == [0, 1] and min(r["norm"] for r in releases) > 0.25
        assert {(r["clip"], r["noise"]) for r in releases} == {(0.25, 0.01) if site == "site-b" else (1e9, 0.0)}


def test_volumes_are_segmented_and_received_with_kits_that_allow_no_code(everybody, root, tmp_path):
    """The same kits, on volumes: two hospitals train, the third one only receives the model."""
    volumes = {**toy_volume_alliance(tmp_path / "volumes", 2), "site-c": receiving(tmp_path / "volumes" / "site-c")}
    kept = {}
    training = {**TINY, "rounds": 2, "crops": 2}
    job = build_job("prostate_ahnet", root / "jobs" / "volumes", JobOptions(training=training, in_process=True))
    assert not (job / "app" / "custom").exists()
    try:
        for site, folder in volumes.items():
            path = everybody.alliance.kits[site] / "local" / "privacy.json"
            kept[path] = path.read_text()
            content = json.loads(kept[path])
            content["scopes"][0]["properties"]["data_root"] = str(folder)
            write_json(path, content)
        done = everybody.run(job)
    finally:
        for path, text in kept.items():
            path.write_text(text)
    assert done.end.status == COMPLETED and contributors(done) == [["site-a", "site-b"]] * 2
    assert done.record()["receivers"] == ["site-c"]
    assert all("monai" in report["versions"] for report in done.record()["check_in"].values())
    alone = run_inprocess("prostate_ahnet", volumes, tmp_path / "oracle", training=training).folder
    received = everybody.run_folder("site-c", done.end.job_id) / "heterosync" / "results"
    for name in ("last_model.pt", "best_model.pt"):
        files = (done.folder / name, alone / name, received / name)
        assert len({model_digest(file) for file in files}) == 1, name
