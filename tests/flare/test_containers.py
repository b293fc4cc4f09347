"""Container, Kubernetes and service files, held against real kits as far as that goes without an engine."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from heterosync.errors import ProblemList
from heterosync.flare.kits import kit
from kit_toys import run, toy_kits

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = ROOT / "provisioning" / "containers"
UNIT = ROOT / "provisioning" / "service" / "heterosync-site.service"


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_kits(tmp_path_factory.mktemp("alliance"))


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    """The services of compose.yml with the default of each variable."""
    text = (CONTAINERS / "compose.yml").read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))["services"]


def dockerfile(word: str) -> list[str]:
    lines = (CONTAINERS / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"{word} ")]


def of_unit(key: str) -> list[str]:
    return [line.split("=", 1)[1] for line in UNIT.read_text().splitlines() if line.startswith(f"{key}=")]


@pytest.mark.parametrize("name", ["server", "site", "site-gpu"])
def test_a_container_can_write_to_its_kit_only_and_not_to_its_keys_or_data(services, name):
    service = services[name]
    mounts = {target: mode for _, target, *mode in (volume.split(":") for volume in service["volumes"])}
    assert mounts.pop("/kit") == []
    assert set(mounts) >= {"/kit/startup", "/kit/local"} and set(map(tuple, mounts.values())) == {("ro",)}
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["user"] == dockerfile("USER")[-1] != "0:0"


def test_only_the_server_has_a_port_and_only_one(services):
    assert {name: service.get("ports", []) for name, service in services.items()} == {
        "server": ["8002:8002"],
        "site": [],
        "site-gpu": [],
    }


def test_the_examples_settings_are_those_of_the_compose_file():
    used = set(re.findall(r"\$\{(\w+):-", (CONTAINERS / "compose.yml").read_text()))
    assert used == set(re.findall(r"^(\w+)=", (CONTAINERS / ".env.example").read_text(), re.MULTILINE))


def test_what_the_image_copies_exists_and_is_in_the_build_context(services):
    copied = [source for line in dockerfile("COPY") for source in line.split()[:-1]]
    assert "custom" in copied and all((ROOT / source).exists() for source in copied)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == set(copied)
    for service in services.values():
        build = service["build"]
        assert (CONTAINERS / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
        assert set(build.get("args", {})) <= set(
            re.findall(r"^ARG (\w+)", (CONTAINERS / "Dockerfile").read_text(), re.M)
        )


@pytest.mark.parametrize("participant", ["site-a", "localhost"])
def test_image_and_service_start_a_script_that_is_in_the_kit(kits, participant):
    (command,), (service,) = dockerfile("CMD"), of_unit("ExecStart")
    for words, place in ((yaml.safe_load(command), "/kit"), (shlex.split(service), of_unit("WorkingDirectory")[0])):
        assert words[-1] == "--once"
        script = kits / participant / Path(words[-2]).relative_to(place)
        assert "--once)" in script.read_text() and "heterosync.flare.kits.kit" in script.read_text()


def test_the_service_writes_to_the_kit_only_and_not_to_its_keys(kits):
    (place,) = of_unit("WorkingDirectory")
    assert of_unit("ReadWritePaths") == [place]
    sealed = {Path(path).relative_to(place).as_posix() for path in of_unit("ReadOnlyPaths")[0].split()}
    assert sealed == {"startup", "local"} and all((kits / "site-a" / name).is_dir() for name in sealed)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_no_fault_in_the_service():
    done = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.flare
@pytest.mark.parametrize(("participant", "kind"), [("site-a", "client"), ("localhost", "server")])
def test_flares_chart_runs_what_the_kits_own_script_runs(tmp_path, kits, participant, kind):
    config, out = CONTAINERS / "kubernetes.yml", tmp_path / "out"
    words = ["deploy", "prepare", str(kits / participant), "--config", str(config), "--output", str(out)]
    code, output = run([sys.executable, "-m", "nvflare.cli", *words], tmp_path)
    assert code == 0, output[-2000:]
    values = yaml.safe_load((out / "helm_chart" / "values.yaml").read_text())
    workspace = values["persistence"]["workspace"]
    script = (kits / participant / "startup" / "sub_start.sh").read_text()
    (started,) = re.findall(r"exec python3 (.*)", script)
    own = started.replace('"$WORKSPACE"', workspace["mountPath"]).split()
    uid = [f"uid={values['siteName']}"] if kind == "client" else []
    assert sorted([*values["args"], *uid]) == sorted(own)
    assert values["securityContext"]["runAsNonRoot"] and values["resources"]["limits"]["nvidia.com/gpu"] == 1
    claim, pod = yaml.safe_load_all((CONTAINERS / "kubernetes-volume.yml").read_text())
    assert claim["metadata"]["name"] == workspace["claimName"]
    assert pod["spec"]["securityContext"] == values["securityContext"]
    assert kit.verify(kits / participant)  # `prepare` left the kit alone, and what it made is no kit:
    with pytest.raises(ProblemList, match="missing: sub_start.sh"):
        kit.verify(out)
