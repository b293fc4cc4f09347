"""`heterosync doctor --kit`: one readable finding for everything that keeps a site from the alliance."""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nvflare.lighter.utils import (
    Identity,
    generate_cert,
    generate_keys,
    load_private_key,
    serialize_cert,
    serialize_pri_key,
)

from heterosync.cli import main
from heterosync.flare.kits import doctor as kit_doctor
from heterosync.flare.kits import kit
from heterosync.flare.kits.doctor import NOTE, OK, PROBLEM, Finding, examine_kit
from heterosync.flare.kits.provision import state_file
from kit_toys import NAME, copy_kit, free_port, toy_kits

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.timezone.utc)


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory, port: int) -> Path:
    return toy_kits(tmp_path_factory.mktemp("alliance"), port)


def found(folder: Path, name: str, now: datetime.datetime | None = None) -> list[Finding]:
    return [finding for finding in examine_kit(folder, now) if finding.name == name]


def root_key(kits: Path):
    return load_private_key(json.loads(state_file(kits.parents[1], NAME).read_text())["root_pri_key"])


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """Greets every client whose certificate is of its kit's authority, as a gRPC server does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "startup" / "server.crt", folder / "startup" / "server.key")
    context.load_verify_locations(folder / "startup" / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    listening = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as secured:
                    secured.sendall(b"hello")
            except OSError:
                plain.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def test_a_good_kit(kits: Path, port: int) -> None:
    with server(kits / "localhost", port):
        findings = examine_kit(kits / "site-a")
        assert found(kits / "lead@clinic-a.org", "server")[0].state == OK
    assert not [finding for finding in findings if finding.state == PROBLEM]
    names = [finding.name for finding in findings]
    assert names == ["kit", "certificate", "authority", "name", "clock", "versions", "versions", "policy", "server"]
    assert "SHA256:" in findings[0].found and "mutual TLS" in findings[-1].found
    assert "server" not in [finding.name for finding in examine_kit(kits / "localhost")]


def test_no_server_there(kits: Path) -> None:
    (finding,) = found(kits / "site-a", "server")
    assert finding.state == PROBLEM and "not reachable" in finding.found and "firewall" in finding.remedy


def test_a_server_of_another_alliance(kits: Path, tmp_path: Path, port: int) -> None:
    other = toy_kits(tmp_path, port)
    with server(other / "localhost", port):
        (finding,) = found(kits / "site-a", "server")
    assert finding.state == PROBLEM and "its certificate is not accepted here" in finding.found


def test_a_certificate_of_another_alliance(kits: Path, tmp_path: Path, port: int) -> None:
    other, mixed = toy_kits(tmp_path, port), copy_kit(kits / "site-a", tmp_path)
    for name in ("client.crt", "client.key"):
        (mixed / "startup" / name).write_bytes((other / "site-a" / "startup" / name).read_bytes())
    with server(kits / "localhost", port):
        findings = examine_kit(mixed)
    problems = {finding.name: finding.found for finding in findings if finding.state == PROBLEM}
    assert problems.keys() == {"kit", "authority", "server"}
    assert "not issued by the authority of rootCA.pem" in problems["authority"]
    assert "refuses this kit's certificate" in problems["server"]


def test_an_expired_certificate(kits: Path, tmp_path: Path) -> None:
    old, key = copy_kit(kits / "site-a", tmp_path), root_key(kits)
    own, public = generate_keys()
    dates = {"not_valid_before": NOW - 400 * DAY, "not_valid_after": NOW - 2 * DAY}
    expired = generate_cert(Identity("site-a", "clinic_a"), Identity(NAME), key, public, **dates)
    (old / "startup" / "client.crt").write_bytes(serialize_cert(expired))
    (old / "startup" / "client.key").write_bytes(serialize_pri_key(own))
    kit.seal(old, key)
    assert found(old, "kit")[0].state == OK
    (finding,) = found(old, "certificate")
    assert finding.state == PROBLEM and f"expired on {NOW - 2 * DAY:%Y-%m-%d}" in finding.found
    assert "renewed kit" in finding.remedy


@pytest.mark.parametrize(
    ("later", "name", "state", "words"),
    [
        (345 * DAY, "certificate", NOTE, "ends on"),
        (361 * DAY, "certificate", PROBLEM, "expired"),
        (3651 * DAY, "authority", PROBLEM, "expired"),
        (-2 * DAY, "certificate", PROBLEM, "the clock here says"),
        (-2 * DAY, "clock", PROBLEM, "before the kit was made"),
    ],
)
def test_dates_and_clock(kits: Path, later: datetime.timedelta, name: str, state: str, words: str) -> None:
    (finding,) = found(kits / "site-a", name, NOW + later)
    assert finding.state == state and words in finding.found and finding.remedy


def test_the_clock_of_a_machine_with_and_without_a_time_server(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit_doctor, "_synchronised", lambda: False)
    assert found(kits / "site-a", "clock")[0].state == NOTE
    monkeypatch.setattr(kit_doctor, "_synchronised", lambda: True)
    assert found(kits / "site-a", "clock")[0].state == OK


def test_a_name_that_is_not_that_of_the_certificate(kits: Path, tmp_path: Path) -> None:
    mine = copy_kit(kits / "site-a", tmp_path)
    script = mine / "startup" / "sub_start.sh"
    script.write_text(script.read_text().replace("uid=site-a", "uid=site-b"))
    (finding,) = found(mine, "name")
    assert finding.state == PROBLEM and "'site-a'" in finding.found and "'site-b'" in finding.found


def test_other_versions_than_the_alliances(kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heterosync.__version__", "0.0.9")
    assert [f.state for f in found(kits / "site-a", "versions")] == [PROBLEM, OK]


def test_a_policy_of_the_hospitals_own(kits: Path, tmp_path: Path) -> None:
    mine = copy_kit(kits / "site-a", tmp_path)
    file = mine / "local" / "privacy.json"
    content = json.loads(file.read_text())
    content["scopes"][0]["properties"]["data_root"] = "/data/site"
    file.write_text(json.dumps(content))
    assert found(mine, "policy")[0].state == OK
    content["scopes"][0]["task_result_filters"][0]["args"]["withhold"] = ["n_positive"]
    file.write_text(json.dumps(content))
    assert [f.state for f in found(mine, "policy")] == [NOTE]
    scope = content["scopes"][0]["task_result_filters"][0]
    for args, words in (
        ({"withold": ["n_positive"]}, "'withold' is no key of this filter: did you mean 'withhold'"),
        ({"methods": ["hls"]}, "method 'hls' is not known: did you mean 'hsl'"),
    ):
        file.write_text(json.dumps(content).replace(json.dumps(scope["args"]), json.dumps(args)))
        wrong = [f for f in found(mine, "policy") if f.state == PROBLEM]
        assert len(wrong) == 1 and words in wrong[0].found and "task_result_filters" in wrong[0].remedy
    both = json.loads(json.dumps(content))
    for kind in ("task_data_filters", "task_result_filters"):  # the same slip twice is one finding
        both["scopes"][0][kind][0]["args"]["withhold"] = ["n_positiv"]
    file.write_text(json.dumps(both))
    (wrong,) = [f for f in found(mine, "policy") if f.state == PROBLEM]
    assert wrong.remedy == "Correct it under task_result_filters and task_data_filters"
    file.write_text(
        json.dumps(content).replace(json.dumps(scope["path"]), json.dumps(scope["path"]) + ', "disabled": true')
    )
    assert [f.state for f in found(mine, "policy")] == [NOTE, PROBLEM]
    content["scopes"].append({"name": "open"})
    file.write_text(json.dumps(content))
    assert [f.state for f in found(mine, "policy")] == [NOTE, PROBLEM]
    file.unlink()
    assert PROBLEM in [f.state for f in found(mine, "policy")]


@pytest.mark.parametrize(
    ("text", "words"),
    [('{\n "scopes": [,]}', "line 2 column 13"), ("[]", "is not built as"), ('{"scopes": [1]}', "is not built as")],
)
def test_a_slip_in_the_policy_is_one_problem_of_the_list(kits: Path, tmp_path: Path, capsys, text, words) -> None:
    mine = copy_kit(kits / "site-a", tmp_path)
    (mine / "local" / "privacy.json").write_text(text)
    assert main(["doctor", "--kit", str(mine), "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    (policy,) = [check for check in checks if check["name"] == "policy"]
    assert policy["state"] == PROBLEM and words in policy["found"] and "delete" not in str(checks)
    assert policy["remedy"] == "Mend it, or restore it from privacy.json.default"
    data = [check for check in checks if check["name"] == "data"]
    assert [check["state"] for check in data] == [NOTE] and {"server", "gpu"} <= {check["name"] for check in checks}


def test_a_wrong_site_folder_is_told_with_its_setting(kits: Path, tmp_path: Path, monkeypatch) -> None:
    mine = copy_kit(kits / "site-a", tmp_path)
    file, made = mine / "local" / "privacy.json", kit.Kit(mine)
    content = json.loads(file.read_text())
    (tmp_path / "empty").mkdir()
    for value, words in (
        ("data", "a relative path. Give an absolute path"),
        (str(tmp_path / "gone"), "which is no folder here"),
        (str(tmp_path / "empty"), "which has no site.yaml"),
    ):
        content["scopes"][0]["properties"]["data_root"] = value
        file.write_text(json.dumps(content))
        folder, (wrong,) = kit_doctor.site_folder(made)
        assert folder is None and wrong.state == PROBLEM
        assert f"data_root in local/privacy.json is {value}, {words}" in f"{wrong.found}. {wrong.remedy}"
    content["scopes"][0]["properties"]["data_root"] = ""
    file.write_text(json.dumps(content))
    assert kit_doctor.site_folder(made, {"HETEROSYNC_DATA": "/data"}) == (None, [])


def test_a_kit_without_its_files_is_examined_all_the_same(kits: Path, tmp_path: Path) -> None:
    mine = copy_kit(kits / "site-a", tmp_path)
    for name in ("client.crt", "fed_client.json"):
        (mine / "startup" / name).unlink()
    problems = [finding.found for finding in examine_kit(mine) if finding.state == PROBLEM]
    assert any("missing: fed_client.json" in text for text in problems) and len(problems) == len(set(problems))


def test_command(
    kits: Path, port: int, tmp_path: Path, alliance, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.delenv("HETEROSYNC_DATA", raising=False)
    mine = copy_kit(kits / "site-a", tmp_path)
    with server(kits / "localhost", port):
        assert main(["doctor", "--kit", str(mine)]) == 1
        said = capsys.readouterr().out
        assert "PROBLEM data: no site folder named" in said and "data_root in local/privacy.json" in said
        file = mine / "local" / "privacy.json"
        content = json.loads(file.read_text())
        content["scopes"][0]["properties"]["data_root"] = str(alliance["site-a"])
        file.write_text(json.dumps(content))
        assert main(["doctor", "--kit", str(mine), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ready"] and {"gpu", "disk", "data site-a", "allow-list", "server", "packages"} <= checks.keys()
    assert checks["anchor site-a"]["found"].startswith("digest ") and "port" not in checks
    assert main(["doctor", "--kit", str(kits / "localhost"), "--json"]) == 0
    assert {"port"} <= {check["name"] for check in json.loads(capsys.readouterr().out)["checks"]}
    main(["doctor", "--kit", str(kits / "lead@clinic-a.org"), "--json"])
    assert not {"allow-list", "data"} & {check["name"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert main(["doctor", "--kit", str(tmp_path / "nowhere")]) == 1
    assert "is no startup kit" in capsys.readouterr().err
