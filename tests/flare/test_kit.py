"""The seal of a kit: nothing of `startup/` can change unnoticed, and a kit that changed does not start."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.fed.client.shell_cmd import ShellCommandProcessor

from heterosync.cli import main
from heterosync.errors import ProblemList, UserError
from heterosync.flare.kits import kit
from heterosync.flare.kits.guard import KitGuard
from kit_toys import copy_kit, run, toy_kits


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_kits(tmp_path_factory.mktemp("alliance"))


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def reorder(path: Path) -> None:
    entries = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(entries.items()))))


def forge(path: Path) -> None:
    """Another good signature of the kit in the place of one."""
    entries = json.loads(path.read_text())
    entries["start.sh"] = entries["stop_fl.sh"]
    path.write_text(kit._exact(entries))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited script": (lambda s: edit(s / "sub_start.sh"), "edited: sub_start.sh"),
    "edited configuration": (lambda s: edit(s / "fed_client.json"), "edited: fed_client.json"),
    "edited authority": (lambda s: edit(s / "rootCA.pem"), "edited: rootCA.pem"),
    "edited list": (lambda s: edit(s / "kit.json"), "kit.json"),
    "edited seal": (lambda s: edit(s / "signature.json"), "edited: signature.json"),
    "reordered seal": (lambda s: reorder(s / "signature.json"), "edited: signature.json"),
    "forged seal": (lambda s: forge(s / "signature.json"), "edited: signature.json (its entry start.sh)"),
    "added file": (lambda s: (s / "extra.json").write_text("{}"), "added: extra.json"),
    "added folder": (lambda s: (s / "custom").mkdir(), "added: custom"),
    "linked file": (lambda s: (s / "x.sh").symlink_to(s / "start.sh"), "added: x.sh"),
    "missing script": (lambda s: (s / "stop_fl.sh").unlink(), "missing: stop_fl.sh"),
    "missing configuration": (lambda s: (s / "fed_client.json").unlink(), "missing: fed_client.json"),
    "missing list": (lambda s: (s / "kit.json").unlink(), "missing: kit.json"),
    "missing seal": (lambda s: (s / "signature.json").unlink(), "missing: signature.json"),
    "missing authority": (lambda s: (s / "rootCA.pem").unlink(), "rootCA.pem is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_found_and_named(kits: Path, tmp_path: Path, change: str) -> None:
    act, words = CHANGES[change]
    broken = copy_kit(kits / "site-a", tmp_path)
    act(broken / "startup")
    with pytest.raises(UserError) as caught:
        kit.verify(broken)
    assert words in str(caught.value)


def test_every_participant_has_a_sealed_kit_that_flare_accepts_too(kits: Path, tmp_path: Path) -> None:
    for place in kits.iterdir():
        facts = kit.verify(place, kit.ALLIANCE)
        assert facts["name"] == place.name and facts["sealed_by"] == "alliance"
        assert facts["files"].keys() == {p.name for p in (place / "startup").iterdir()} - {"kit.json", "signature.json"}
    startup = kits / "site-a" / "startup"
    check = [sys.executable, "-m", "nvflare.tool.verify_startup_kits"]
    assert run([*check, "-f", str(startup), "-c", str(startup / "rootCA.pem")], tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("name", "book", "words"),
    [
        ("site-a", "docs/hospital.md", "data_root in local/privacy.json"),
        ("localhost", "docs/alliance-lead.md", "startup/start.sh"),
        ("lead@clinic-a.org", "docs/alliance-lead.md", "fl_admin.sh"),
    ],
)
def test_the_readme_names_the_first_steps_and_is_sealed(kits: Path, name: str, book: str, words: str) -> None:
    text = (kits / name / "startup" / "readme.txt").read_text()
    assert "heterosync kit verify" in text and book in text and words in text and name in text
    assert "Edit nothing in startup/" in text and "modify" not in text
    assert (Path(__file__).parents[2] / book).exists() and "readme.txt" in kit.verify(kits / name)["files"]


def test_the_hospital_edits_local_freely(kits: Path, tmp_path: Path) -> None:
    mine = copy_kit(kits / "site-a", tmp_path)
    edit(mine / "local" / "privacy.json")
    (mine / "local" / "resources.json").unlink()
    assert kit.verify(mine)["name"] == "site-a"


def test_several_changes_are_named_at_once(kits: Path, tmp_path: Path) -> None:
    broken = copy_kit(kits / "site-a", tmp_path)
    edit(broken / "startup" / "start.sh")
    (broken / "startup" / "stop_fl.sh").unlink()
    with pytest.raises(ProblemList) as caught:
        kit.verify(broken)
    assert len(caught.value.problems) == 2


def test_a_removed_seal_hides_no_other_change(kits: Path, tmp_path: Path) -> None:
    broken = copy_kit(kits / "site-a", tmp_path)
    edit(broken / "startup" / "start.sh")
    (broken / "startup" / "extra.json").write_text("{}")
    (broken / "startup" / "signature.json").unlink()
    with pytest.raises(ProblemList) as caught:
        kit.verify(broken)
    told = [problem.split(": ", 1)[1] for problem in caught.value.problems]
    assert told == ["missing: signature.json, the seal of the kit", "added: extra.json", "edited: start.sh"]


def test_another_alliance_cannot_replace_the_seal_unnoticed(kits: Path, tmp_path: Path) -> None:
    other = toy_kits(tmp_path / "other")
    mixed = copy_kit(kits / "site-a", tmp_path)
    for name in ("signature.json", "kit.json"):
        (mixed / "startup" / name).write_bytes((other / "site-a" / "startup" / name).read_bytes())
    with pytest.raises(ProblemList, match="the seal does not fit"):
        kit.verify(mixed)
    assert kit.verify(other / "site-a")["fingerprint"] != kit.verify(kits / "site-a")["fingerprint"]


def test_the_site_cannot_put_its_own_seal_in_place_of_the_alliances(kits: Path, tmp_path: Path) -> None:
    broken = copy_kit(kits / "site-a", tmp_path)
    edit(broken / "startup" / "fed_client.json")
    with pytest.raises(UserError, match="sealed by the alliance"):
        kit.seal(broken)
    (broken / "startup" / "signature.json").unlink()
    kit.seal(broken)
    assert kit.verify(broken)["sealed_by"] == "site"
    with pytest.raises(ProblemList, match="missing: signature.json.*site_signature.json is no substitute"):
        kit.verify(broken, kit.ALLIANCE)  # which is what start.sh and the guard of its kit ask for


@pytest.mark.parametrize(
    "change", ["edited configuration", "added file", "missing script", "missing seal", "edited seal"]
)
def test_a_changed_kit_does_not_start(kits: Path, tmp_path: Path, change: str) -> None:
    act, words = CHANGES[change]
    broken = copy_kit(kits / "site-a", tmp_path)
    act(broken / "startup")
    for script in ("start.sh", "sub_start.sh"):
        code, output = run(["bash", str(broken / "startup" / script)], tmp_path)
        assert code == 1 and words in output and "this kit does not start" in output
    assert not (broken / "daemon_pid.fl").exists() and not (broken / "log.txt").exists()


def test_the_console_of_a_changed_kit_does_not_open(kits: Path, tmp_path: Path) -> None:
    broken = copy_kit(kits / "lead@clinic-a.org", tmp_path)
    edit(broken / "startup" / "fed_admin.json")
    code, output = run(["bash", str(broken / "startup" / "fl_admin.sh")], tmp_path)
    assert code == 1 and "edited: fed_admin.json" in output


@pytest.mark.flare
@pytest.mark.parametrize("kind", ["client", "server"])
def test_a_process_started_past_the_scripts_stops_itself(kits: Path, tmp_path: Path, kind: str) -> None:
    name = {"client": "site-a", "server": "localhost"}[kind]
    broken = copy_kit(kits / name, tmp_path)
    for script in ("start.sh", "sub_start.sh"):
        path = broken / "startup" / script
        path.write_text("".join(x for x in path.read_text().splitlines(True) if "heterosync" not in x))
    command = [sys.executable, "-m", f"nvflare.private.fed.app.{kind}.{kind}_train", "-m", str(broken)]
    command += ["-s", f"fed_{kind}.json", "--set", "secure_train=true", f"uid={name}", "org=o", "config_folder=config"]
    code, output = run(command, tmp_path)
    assert code == 1 and "PROBLEM: " in output and "edited: start.sh" in output
    assert (broken / "shutdown.fl").exists()  # ends the loop of sub_start.sh


@pytest.mark.flare
def test_the_loop_of_an_edited_start_script_ends_too(kits: Path, tmp_path: Path) -> None:
    broken = copy_kit(kits / "site-a", tmp_path)
    path = broken / "startup" / "sub_start.sh"
    path.write_text("".join(x for x in path.read_text().splitlines(True) if "heterosync" not in x))
    code, output = run(["bash", str(path)], tmp_path)
    assert code == 0 and "edited: sub_start.sh" in output and output.count("new pid") == 1


def test_commands(kits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kit", "verify", str(kits / "site-a")]) == 0
    said = capsys.readouterr().out
    assert "OK: " in said and "SHA256:" in said and "telephone" in said and "PRIVATE" not in said
    assert main(["kit", "verify", str(kits / "site-a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "site-a"
    broken = copy_kit(kits / "site-a", tmp_path)
    edit(broken / "startup" / "start.sh")
    assert main(["kit", "verify", str(broken)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "edited: start.sh" in said[0] and "ask the alliance lead for a fresh kit" in said[-1]
    assert all(line.startswith("heterosync: ") for line in said)
    assert main(["kit", "secure", str(kits / "site-a")]) == 1
    assert "sealed by the alliance" in capsys.readouterr().err
    assert main(["kit", "verify", str(tmp_path)]) == 1
    assert "is no startup kit" in capsys.readouterr().err


def test_a_site_answers_no_shell_commands_of_its_server(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell, other = ShellCommandProcessor(), ClientRequestProcessors.request_processors[0]
    monkeypatch.setattr(ClientRequestProcessors, "request_processors", [shell, other])
    answered = ClientRequestProcessors.request_processors  # FLARE holds the list itself before the guard is built
    KitGuard(workspace=str(kits / "site-a"))
    assert answered == [other]
