"""FLARE's own ways to a kit: plain `nvflare provision`, and keys that each site makes itself."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from pathlib import Path

import pytest
from nvflare.lighter.utils import load_crt

from heterosync.errors import ProblemList
from heterosync.flare.jobs import allowlist
from heterosync.flare.kits import kit, policy
from kit_toys import run

ROOT = Path(__file__).resolve().parents[2] / "provisioning"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.flare
def test_plain_flare_makes_the_same_kits(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "nvflare.cli",
        "provision",
        "-p",
        str(ROOT / "alliance" / "project.yml"),
        "-w",
        "kits",
    ]
    code, output = run(command, tmp_path)
    assert code == 0, output[-2000:]
    kits = tmp_path / "kits" / "thyroid" / "prod_00"
    with (ROOT / "alliance" / "sites.csv").open() as file:
        sites = [row["site"] for row in csv.DictReader(file)]
    assert all(kit.verify(kits / site, kit.ALLIANCE)["kind"] == "client" for site in sites)
    assert read(kits / "gxfy" / "local" / "privacy.json") == policy.privacy()


PROFILE = """\
name: toy
scheme: grpc
connection_security: mtls
server: {host: localhost, fed_learn_port: 8002, admin_port: 8002}
"""


@pytest.mark.flare
def test_keys_that_never_leave_the_site(tmp_path: Path) -> None:
    def flare(*words: str) -> str:
        code, output = run([sys.executable, "-m", "nvflare.cli", *words], tmp_path)
        assert code == 0, output[-2000:]
        return output

    (tmp_path / "profile.yaml").write_text(PROFILE)
    (tmp_path / "site-a.yaml").write_text("name: toy\nparticipants: [{name: site-a, type: client, org: clinic_a}]\n")
    flare("cert", "init", "--profile", "profile.yaml", "-o", "ca")
    flare("cert", "request", "--participant", "site-a.yaml")
    request = tmp_path / "site-a" / "site-a.request.zip"
    flare("cert", "approve", str(request), "--ca-dir", "ca", "--profile", "profile.yaml")
    for travels in (request, request.with_name("site-a.signed.zip")):
        with zipfile.ZipFile(travels) as archive:
            assert not any(b"PRIVATE KEY" in archive.read(name) for name in archive.namelist())
    fingerprint = kit.cert_fingerprint_sha256(load_crt(tmp_path / "ca" / "rootCA.pem"))
    flare("package", "site-a/site-a.signed.zip", "--fingerprint", fingerprint)
    made = tmp_path / "workspace" / "toy" / "prod_00" / "site-a"
    with pytest.raises(ProblemList, match="missing"):
        kit.verify(made)
    policy.secure(made)
    assert kit.verify(made, kit.SITE)["fingerprint"] == fingerprint
    assert read(made / "local" / "privacy.json") == policy.privacy()
    assert read(made / "local" / "resources.json")["class_allow_list"] == allowlist.class_allow_list()
    (made / "local" / "privacy.json").write_text("{}")
    policy.secure(made)  # once more, after an upgrade: what the site has edited stays
    assert read(made / "local" / "privacy.json") == {}
    with (made / "startup" / "start.sh").open("a") as script:
        script.write("# edited\n")
    code, output = run(["bash", str(made / "startup" / "start.sh")], tmp_path)
    assert code == 1 and "edited: start.sh" in output
