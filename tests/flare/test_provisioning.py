"""Project files of an alliance, and what provisioning makes of them."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml
from cryptography.x509 import DNSName, SubjectAlternativeName
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.lighter.utils import load_crt, verify_cert
from nvflare.security.security import FLAuthorizer

from heterosync.cli import main
from heterosync.errors import ProblemList, UserError
from heterosync.flare.jobs import allowlist
from heterosync.flare.kits import kit, policy
from heterosync.flare.kits.project import Server, make_project, project_text, read_project, read_sites, with_server
from heterosync.flare.kits.provision import provision, renew, state_file
from kit_toys import ADMIN, NAME, toy_kits, toy_project, write_sites

ROOT = Path(__file__).resolve().parents[2] / "provisioning"
COMMITTED = {
    "alliance": ("thyroid", "fl.thyroid.example.org", "admin@thyroid.example.org"),
    "prostate": ("prostate", "fl.prostate.example.org", "admin@prostate.example.org"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_kits(tmp_path_factory.mktemp("alliance")).parents[2]


@pytest.fixture(scope="module")
def kits(home: Path) -> Path:
    return home / "kits" / NAME / "prod_00"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# --- project files ---


@pytest.mark.parametrize("folder", COMMITTED)
def test_committed_projects_equal_what_the_command_writes(folder: str) -> None:
    committed = ROOT / folder / "project.yml"
    name, host, admin = COMMITTED[folder]
    description = read_project(committed)["description"]
    project = make_project(name, Server(host), admin, ROOT / folder / "sites.csv", description)
    assert committed.read_text(encoding="utf-8") == project_text(project)


def test_the_alliance_of_the_paper() -> None:
    project = read_project(ROOT / "alliance" / "project.yml")
    roles = [(entry["type"], entry.get("role")) for entry in project["participants"]]
    sites = [entry["name"] for entry in project["participants"] if entry["type"] == "client"]
    assert sites == ["sysu01", "sysu06", "sysucc", "gxfy", "fsss"]
    assert (
        roles.count(("server", None)) == roles.count(("admin", "project_admin")) == roles.count(("admin", "lead")) == 1
    )
    assert roles.count(("admin", "org_admin")) == 5 and roles.count(("admin", "member")) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("site,org,admin\n", "no hospital"),
        ("site,org\na,a\n", "column 'admin' is missing"),
        ("site,org,admin,phone\na,a,x@a.org,1\n", "column 'phone' is not known"),
        ("site,org,admin\nsite a,a,x@a.org\n", "row 2: site 'site a' cannot be used"),
        ("site,org,admin\n,a,x@a.org\n", "row 2: column 'site' is empty: write letters"),
        ("site,org,admin\na,the-a,x@a.org\n", "row 2: org 'the-a' cannot be used"),
        ("site,org,admin\na,a,x-at-a.org\n", "row 2: admin 'x-at-a.org' cannot be used: write an e-mail address"),
        ("site,org,admin\na,a,x@a.org\nA,b,y@b.org\n", "row 3: site 'A' is already the name of row 2: write another"),
        ("site,org,admin\na,a,x@a.org\nb,b,x@a.org\n", "row 3: admin 'x@a.org' is already the name of row 2"),
        (f"site,org,admin\na,a,{ADMIN}\n", "is already the name of the project admin"),
        ("site,org,admin\nserver,a,x@a.org\n", "is already the name of the server"),
        (f"site,org,admin\n{'a' * 63 + 'b' * 2},a,x@a.org\n", "row 2: site"),
        ("site,org,admin\na,a\n", "row 2: 2 values for 3 columns"),
    ],
)
def test_a_wrong_table_is_refused_with_its_row(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        make_project(NAME, Server("fl.example.org"), ADMIN, write_sites(tmp_path, text))
    assert words in str(caught.value) and "sites.csv" in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ProblemList) as caught:
        read_sites(write_sites(tmp_path, "site,org,admin\na b,a,x@a.org\nc,c,nobody\n"), {})
    assert len(caught.value.problems) == 2


def test_mistakes_of_the_arguments_are_told_with_those_of_the_table(tmp_path: Path) -> None:
    with pytest.raises(ProblemList) as caught:
        make_project(
            "my alliance", Server("fl.example.org"), "boss", write_sites(tmp_path, "site,org,admin\n,a,x@a.org\n")
        )
    told = caught.value.problems
    assert len(told) == 3 and "--name" in told[0] and "--admin" in told[1] and "row 2: column 'site'" in told[2]


@pytest.mark.parametrize(
    ("name", "host", "admin", "words"),
    [
        ("my alliance", "fl.example.org", ADMIN, "--name 'my alliance'"),
        (NAME, "fl example", ADMIN, "--server 'fl example' cannot be used: write a host name"),
        (NAME, "fl.example.org", "boss", "--admin 'boss'"),
    ],
)
def test_other_wrong_arguments(tmp_path: Path, name: str, host: str, admin: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_project(name, Server(host), admin, write_sites(tmp_path))


def test_init_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["alliance", "init", str(write_sites(tmp_path)), "--name", NAME, "--admin", ADMIN, "--out", str(tmp_path)]
    assert main(command) == 1 and "which server?" in capsys.readouterr().err
    assert main([*command, "--port", "8100"]) == 1 and "--port" in capsys.readouterr().err
    assert main([*command, "--loopback", "--server", "x.org"]) == 1 and "contradict" in capsys.readouterr().err
    file = str(tmp_path / "new.yml")  # --out is the folder
    assert main([*command[:-1], file, "--loopback"]) == 1 and "name the folder" in capsys.readouterr().err
    assert not (tmp_path / "new.yml").exists()
    assert main([*command, "--server", "fl.example.org", "--also", "fl,10.0.0.5", "--port", "8100"]) == 0
    assert "2 sites, 5 users" in capsys.readouterr().out
    server = read_project(tmp_path / "project.yml")["participants"][0]
    assert server["fed_learn_port"] == 8100 and server["host_names"] == ["fl.example.org", "fl", "10.0.0.5"]
    assert main([*command, "--loopback"]) == 1 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "- a", "name: x", "participants: {", None])
def test_a_file_that_is_no_project(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "project.yml").write_text(text)
    with pytest.raises(UserError, match="project.yml"):
        read_project(tmp_path / "project.yml")


# --- kits ---


def test_a_project_that_flare_refuses_leaves_one_line(tmp_path: Path) -> None:
    project = toy_project(tmp_path)
    with pytest.raises(UserError, match="cannot be provisioned"):
        provision({**project, "builders": [{"path": "no.such.Builder"}]}, tmp_path / "kits")
    project["builders"][2] = {**project["builders"][2], "args": {"root_valid_days": 5}}
    provision(project, tmp_path / "kits")
    with pytest.raises(UserError, match="cannot be provisioned: .*root_valid_days"):
        provision(toy_project(tmp_path), tmp_path / "kits")


def test_the_key_of_the_authority_is_in_no_kit_and_closed_to_others(home: Path, kits: Path) -> None:
    state = state_file(home / "kits", NAME)
    assert state.parent.stat().st_mode & 0o777 == 0o700
    secret = read(state)["root_pri_key"].splitlines()[5]
    assert not any(secret in p.read_text(errors="replace") for p in kits.rglob("*") if p.is_file())
    assert (kits / "site-a" / "startup" / "client.key").stat().st_mode & 0o077 == 0


def test_resources_of_site_and_server(kits: Path) -> None:
    for name in ("site-a", "localhost"):
        content = read(kits / name / "local" / "resources.json")
        assert content["class_allow_list"] == allowlist.class_allow_list()
        assert content["class_list_enforcement_mode"] == "enforce"
        assert content == read(kits / name / "local" / "resources.json.default")
    assert read(kits / "site-a" / "local" / "resources.json")["allow_log_streaming"] is False
    server = read(kits / "localhost" / "local" / "resources.json")
    assert server["servers"][0]["heart_beat_timeout"] == policy.HEART_BEAT_TIMEOUT
    assert {part["id"] for part in server["components"]} >= {"job_manager", "job_store", "job_scheduler"}
    assert "/tmp" not in json.dumps(server)


def test_a_server_stores_inside_its_kit(kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from heterosync.flare.kits.storage import WorkspaceJobs, WorkspaceStorage

    server = read(kits / "localhost" / "local" / "resources.json")
    (manager,) = [part for part in server["components"] if part["id"] == "job_manager"]
    monkeypatch.chdir(tmp_path)  # as FLARE enters the kit before it builds components
    jobs = WorkspaceJobs(**manager["args"])
    storage = WorkspaceStorage(**server["snapshot_persistor"]["args"]["storage"]["args"])
    assert jobs.uri_root == str(tmp_path / "jobs-storage") and storage.root_dir == str(tmp_path / "snapshot-storage")


@pytest.mark.parametrize("name", ["site-a", "localhost"])
def test_rights(kits: Path, name: str) -> None:
    for file in ("authorization.json", "authorization.json.default"):
        authorizer = FLAuthorizer("clinic_a", read(kits / name / "local" / file))

        def may(role: str, right: str, org: str = "clinic_a", judge: FLAuthorizer = authorizer) -> bool:
            user = Person("someone@x.org", org, role)
            return judge.authorize(AuthzContext(right=right, user=user, submitter=user))[0]

        roles = ("project_admin", "org_admin", "lead", "member")
        assert not any(may(role, "byoc") for role in roles)
        assert [role for role in roles if may(role, "submit_job")] == ["project_admin", "lead"]
        assert all(may(role, "list_jobs") for role in roles)
        assert not may("member", "abort_job") and not may("org_admin", "shutdown", "clinic_b")
        assert may("org_admin", "shutdown") and not may("org_admin", "cat", "clinic_b")
        assert [role for role in roles if may(role, "cat")] == ([*roles[:2]] if name == "localhost" else [])


def test_privacy_of_a_site(kits: Path) -> None:
    content = read(kits / "site-a" / "local" / "privacy.json")
    (scope,) = content["scopes"]
    assert content["default_scope"] == scope["name"] and scope["properties"] == {"data_root": ""}
    assert [entry["path"] for entry in scope["task_result_filters"]] == [policy.SITE_FILTER]
    assert [entry["path"] for entry in scope["task_data_filters"]] == [policy.SITE_PEER_GATE]
    assert not (kits / "localhost" / "local" / "privacy.json").exists()


def test_every_class_that_a_kit_names_is_there(kits: Path) -> None:
    named = {
        name for file in kits.rglob("local/*.json") for name in re.findall(r'"(heterosync\.[\w.]+)"', file.read_text())
    }
    assert {policy.SITE_FILTER, policy.SITE_PEER_GATE, policy.KIT_GUARD, policy.STORAGE, policy.JOBS} <= named
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), attribute), type)


def test_a_hospital_joins_and_nobody_else_needs_a_new_kit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kits = toy_kits(tmp_path)
    before = {path: path.read_bytes() for path in kits.rglob("*") if path.is_file()}
    file = tmp_path / "project.yml"
    file.write_text(project_text(toy_project(tmp_path)))
    new = write_sites(tmp_path / "new", "site,org,admin\nsite-c,clinic_c,admin@clinic-c.org\n")
    command = ["alliance", "add", str(file), str(new), "--out"]
    assert main([*command, str(tmp_path / "elsewhere")]) == 1
    assert "the folder of the first provisioning" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "kits"), "--json"]) == 0
    made = [Path(place) for place in json.loads(capsys.readouterr().out)["kits"]]
    assert [place.name for place in made] == ["site-c", "admin@clinic-c.org"]
    assert sorted(p.name for p in made[0].parent.iterdir()) == sorted(place.name for place in made)
    assert before == {path: path.read_bytes() for path in kits.rglob("*") if path.is_file()}
    root = load_crt(kits / "localhost" / "startup" / "rootCA.pem")
    verify_cert(load_crt(made[0] / "startup" / "client.crt"), root.public_key())
    assert kit.verify(made[0])["fingerprint"] == kit.verify(kits / "site-a")["fingerprint"]
    assert [p["name"] for p in yaml.safe_load(file.read_text())["participants"]][-2:] == [
        "site-c",
        "admin@clinic-c.org",
    ]
    assert main([*command, str(tmp_path / "kits")]) == 1
    said = capsys.readouterr().err
    assert "'site-c' is already the name of a site of the alliance" in said
    assert "'admin@clinic-c.org' is already the name of an admin of the alliance" in said
    file.write_text(file.read_text() + "name: another\n")
    assert main([*command, str(tmp_path / "kits")]) == 1
    assert "the key 'name' stands twice" in capsys.readouterr().err


def test_renewal_makes_new_certificates_for_those_named(tmp_path: Path) -> None:
    kits, project = toy_kits(tmp_path), toy_project(tmp_path)
    state = state_file(tmp_path / "kits", NAME).read_bytes()
    with pytest.raises(UserError, match="'site-x' is no participant"):
        renew(project, tmp_path / "kits", ["site-x"])
    assert state_file(tmp_path / "kits", NAME).read_bytes() == state
    (new,), _ = renew(project, tmp_path / "kits", ["site-a"])
    old = load_crt(kits / "site-a" / "startup" / "client.crt")
    assert load_crt(new / "startup" / "client.crt").serial_number != old.serial_number
    verify_cert(
        load_crt(new / "startup" / "client.crt"), load_crt(kits / "site-b" / "startup" / "rootCA.pem").public_key()
    )


def test_a_forgotten_host_name_gets_into_the_certificate_by_renewal(tmp_path: Path) -> None:
    toy_kits(tmp_path)
    project = toy_project(tmp_path)
    project["participants"][0]["host_names"].append("fl.example.org")
    names = []
    for kits, _ in (provision(project, tmp_path / "kits"), renew(project, tmp_path / "kits", ["localhost"])):
        certificate = load_crt(kits[0] / "startup" / "server.crt")
        names.append(certificate.extensions.get_extension_for_class(SubjectAlternativeName).value)
    assert [DNSName("fl.example.org") in found for found in names] == [False, True]


def test_another_server_for_the_same_alliance(tmp_path: Path) -> None:
    project = with_server(toy_project(tmp_path), Server("fl.example.org", 443))
    servers = [entry for entry in project["participants"] if entry["type"] == "server"]
    assert [server["name"] for server in servers] == ["fl.example.org"] and len(project["participants"]) == 8


def test_a_hospital_that_joins_later_gets_the_server_that_provisioning_was_told(tmp_path: Path) -> None:
    file, kits = tmp_path / "project.yml", tmp_path / "kits"
    file.write_text(project_text(toy_project(tmp_path)))
    words = ["--out", str(kits), "--server", "fl.example.org", "--also", "fl", "--port", "8100"]
    assert main(["alliance", "provision", str(file), *words]) == 0
    new = write_sites(tmp_path / "new", "site,org,admin\nsite-c,clinic_c,admin@clinic-c.org\n")
    assert main(["alliance", "add", str(file), str(new), "--out", str(kits)]) == 0
    called = [read(p)["servers"][0]["service"]["target"] for p in kits.glob("*/prod_*/site-*/startup/fed_client.json")]
    assert called == ["fl.example.org:8100"] * 3


def test_further_names_of_a_loopback_server_get_into_its_certificate(tmp_path: Path) -> None:
    file, kits = tmp_path / "project.yml", tmp_path / "kits"
    file.write_text(project_text(toy_project(tmp_path)))
    assert main(["alliance", "provision", str(file), "--out", str(kits), "--loopback", "--also", "fl"]) == 0
    certificate = load_crt(next(kits.glob("*/prod_00/localhost/startup/server.crt")))
    assert DNSName("fl") in certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
