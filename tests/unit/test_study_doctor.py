"""The doctor finds what is wrong and says what to do."""

from __future__ import annotations

import json
import socket

import pytest

from heterosync.cli import main
from heterosync.errors import UserError
from heterosync.study import doctor
from toys import toy_site

CLASSES = ("heterosync.flare.executor.HeteroSyncExecutor",)


def test_this_machine_runs_the_tests_and_so_has_its_packages():
    checks = {
        check.name: check for check in (doctor.check_python(), doctor.check_packages(), doctor.check_torch_pair())
    }
    assert {check.state for check in checks.values()} == {doctor.OK}
    assert "torchvision" in checks["torch"].found


def test_an_absent_package_is_named():
    check = doctor.check_packages(("numpy", "no-such-package"))
    assert check.state == doctor.PROBLEM and "pip install no-such-package" in check.remedy


def test_a_torchvision_that_does_not_fit_is_found(monkeypatch):
    import torchvision

    def broken(*_):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    check = doctor.check_torch_pair()
    assert check.state == doctor.PROBLEM and "nms does not exist" in check.found


@pytest.mark.parametrize(
    ("content", "state"),
    [
        ({"class_allow_list": list(CLASSES)}, doctor.OK),
        ({"class_allow_list": ["heterosync.flare."]}, doctor.OK),
        ({"class_allow_list": ["nvflare."]}, doctor.PROBLEM),
        ({}, doctor.PROBLEM),
        (None, doctor.NOTE),
    ],
)
def test_allow_list(tmp_path, content, state):
    if content is not None:
        (tmp_path / "local").mkdir()
        (tmp_path / "local" / "resources.json").write_text(json.dumps(content))
    assert doctor.check_allow_list(tmp_path, CLASSES).state == state


def test_data_of_every_site_is_checked(alliance, tmp_path):
    root = next(iter(alliance.values())).parent
    assert [check.state for check in doctor.check_data(root)] == [doctor.OK] * 3
    assert doctor.check_data(tmp_path / "absent")[0].state == doctor.PROBLEM
    assert "no site.yaml" in doctor.check_data(tmp_path)[0].found
    (tmp_path / "site-x").mkdir()
    (tmp_path / "site-x" / "site.yaml").write_text("task: t\nlabels: [a, b]\nbatchsize: 3\n")
    (check, *_) = doctor.check_data(tmp_path)
    assert check.name == "data site-x" and check.state == doctor.PROBLEM


def test_a_device_that_is_absent_is_a_problem_in_doctor_and_check(tmp_path, capsys, monkeypatch):
    import torch

    site = toy_site(tmp_path / "site-a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, there in (("cuda", False), ("cuda:1", False), ("auto", True), ("cpu", True)):
        (site / "site.yaml").write_text(f"task: toy\nlabels: [normal, abnormal]\ndevice: {device}\n")
        (check,) = doctor.check_data(site)
        assert check.state == (doctor.OK if there else doctor.PROBLEM)
        assert main(["data", "check", str(site)]) == (0 if there else 1)
        line = f"site.yaml: device '{device}' is not there: set device in site.yaml to cpu or auto"
        assert (line in capsys.readouterr().out) == (line in check.found) == (not there)


def test_many_problems_of_a_site_are_summarised(tmp_path):
    site = toy_site(tmp_path / "site-a")
    (site / "images.npz").unlink()
    found = [check.found for check in doctor.check_data(site)]
    assert len(found) == 6 and found[-1] == "… and 35 more of this kind, rows 7 to 41"


def test_port_and_server():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        assert doctor.check_port(port).state == doctor.NOTE
        assert doctor.check_server(f"127.0.0.1:{port}").state == doctor.OK
    assert doctor.check_server(f"127.0.0.1:{port}", timeout=1).state == doctor.PROBLEM
    with pytest.raises(UserError, match="host:port"):
        doctor.check_server("localhost")


def test_no_permission_to_write(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "no permission" in doctor.check_disk(tmp_path / "not" / "there").found


def test_command(alliance, tmp_path, capsys):
    site = str(alliance["site-a"])
    assert main(["doctor", "--data", site, "--workspace", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] and {"python", "torch", "memory", "disk", "gpu"} <= {c["name"] for c in report["checks"]}
    assert main(["doctor", "--data", str(tmp_path), "--workspace", str(tmp_path)]) == 1
    assert "PROBLEM data" in capsys.readouterr().out
