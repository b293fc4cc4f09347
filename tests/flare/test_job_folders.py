"""The job builder, the committed job folders and the list of allowed classes."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
from nvflare.private.fed.server.job_meta_validator import JobMetaValidator

from heterosync.cli import main
from heterosync.errors import UserError
from heterosync.flare.jobs import allowlist
from heterosync.flare.jobs.builder import all_jobs, build_job, job_name
from heterosync.flare.jobs.folder import is_swarm, read_learning
from heterosync.flare.jobs.options import JobOptions
from heterosync.methods import method_names
from segment_toys import smoke

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> dict[str, str]:
    found = {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}
    return {name: text for name, text in found.items() if not Path(name).name.startswith(".__nvfl_")}


def test_committed_jobs_equal_what_the_builder_writes(tmp_path: Path) -> None:
    for name, options in all_jobs():
        build_job(name, tmp_path / job_name(name, options), options)
    assert sorted(p.name for p in (ROOT / "jobs").iterdir() if p.is_dir()) == sorted(p.name for p in tmp_path.iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {*method_names(), "hsl_swarm"}
    for name in sorted(p.name for p in tmp_path.iterdir()):
        assert files(ROOT / "jobs" / name) == files(tmp_path / name), f"run `heterosync job export {name}`"


def test_jobs_hold_configuration_only_and_name_exact_classes() -> None:
    allowed = set(allowlist.class_allow_list())
    every = set()
    for folder in (p for p in (ROOT / "jobs").iterdir() if p.is_dir()):
        assert set(files(folder)) == {
            "README.md",
            "meta.json",
            "app/config/config_fed_client.json",
            "app/config/config_fed_server.json",
        }
        named = set()
        for side in ("client", "server"):
            text = (folder / "app" / "config" / f"config_fed_{side}.json").read_text()
            named |= set(re.findall(r'"path": "([^"]+)"', text))
        every |= named
    assert every | {allowlist.DP_FILTER} == allowed  # that one is in jobs with `dp_clip` only


def test_flare_accepts_the_jobs(tmp_path: Path) -> None:
    build_job("hsl", tmp_path / "hsl", JobOptions(sites=("site-a", "site-b"), min_clients=2))
    for folder in (*(p for p in (ROOT / "jobs").iterdir() if p.is_dir()), tmp_path / "hsl"):
        valid, error, meta = JobMetaValidator().validate(folder.name, zip_directory_to_bytes("", str(folder)))
        assert valid, error
    assert meta["mandatory_clients"] == ["site-a", "site-b"] and meta["min_clients"] == 2


def test_every_allowed_class_exists() -> None:
    for path in allowlist.class_allow_list():
        module, name = path.rsplit(".", 1)
        assert isinstance(getattr(importlib.import_module(module), name), type)


def test_a_job_may_name_what_our_jobs_name_and_nothing_else() -> None:
    committed = json.loads((ROOT / "poc" / "simulator" / "local" / "resources.json").read_text())
    assert committed == allowlist.simulator_resources()
    of_flare = [entry for entry in committed["class_allow_list"] if not entry.startswith("heterosync.flare.")]
    assert of_flare == [allowlist.SHAREABLE_GENERATOR, allowlist.SWARM_CLIENT]
    assert not any(entry.endswith((".", "*")) for entry in committed["class_allow_list"])


def test_the_readme_says_what_a_reviewer_asks(tmp_path: Path) -> None:
    text = (build_job("hsl", tmp_path / "hsl") / "README.md").read_text()
    for part in (
        "W1: all tensors",
        "90.6 MiB per site and round",
        "nvflare simulator jobs/hsl -w poc/simulator",
        "nvflare job submit -j jobs/hsl",
        "audit.jsonl",
        "20 rounds of 5 local epochs",
    ):
        assert part in text
    assert "no tensor leaves or enters a site" in (build_job("local", tmp_path / "l") / "README.md").read_text()


def test_settings_reach_every_component_alike(tmp_path: Path) -> None:
    options = JobOptions(rounds=3, training={"lr": 0.01}, method_settings={"temperature": 2.0}, in_process=True)
    job = build_job("hsl", tmp_path / "job", options)
    expected = {"method": "hsl", "method_settings": {"temperature": 2.0}, "training": {"lr": 0.01, "rounds": 3}}
    assert read_learning(job) == expected
    client = json.loads((job / "app/config/config_fed_client.json").read_text())
    server = json.loads((job / "app/config/config_fed_server.json").read_text())
    assert client["executors"][0]["executor"]["args"] == {**expected, "in_process": True}
    assert client["task_result_filters"][0]["filters"][0]["args"] == expected
    assert server["components"][0]["args"] == expected


@pytest.mark.parametrize("name", ["hsl", "local"])
def test_an_export_is_the_same_every_time(tmp_path: Path, name: str) -> None:
    assert files(build_job(name, tmp_path / "a" / name)) == files(build_job(name, tmp_path / "b" / name))


def test_the_command_writes_the_variants_under_names_of_their_own(tmp_path: Path, capsys) -> None:
    assert main(["job", "export", "hsl", "--topology", "swarm", "--out", str(tmp_path)]) == 0
    assert main(["job", "export", "hsl", "--dp-clip", "2", "--dp-noise", "0.5", "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hsl_dp", "hsl_swarm"]
    client = json.loads((tmp_path / "hsl_dp/app/config/config_fed_client.json").read_text())
    assert client["task_result_filters"][0]["filters"][0]["args"]["noise"] == 0.5
    assert main(["job", "export", "--all", "--dp-clip", "2", "--out", str(tmp_path / "none")]) == 1
    assert "swarm goes from site to site" in capsys.readouterr().err and not (tmp_path / "none").exists()


#: Methods that a variant is not for, and why.
ALONE = dict.fromkeys(("local", "prostate_private", "prostate_finetune"), "keeps its weights at the sites")
ALONE["central"] = "is no federation"
NO_SWARM = dict.fromkeys(("fedbn", "ditto"), "makes a model for each site")
NO_SWARM |= dict.fromkeys(
    (
        *("fedopt", "fedadam", "scaffold", "personalized", "splitavg"),
        *("fedppkt", "fedktl", "fedtp", "adafedprox", "fedcome", "feddps", "feddys"),
    ),
    "needs a server that does more",
)
NO_NOISE = {"swarm": "goes from site to site"}
NO_NOISE |= {"feddys": "goes by label_balance, a statistic of the site's labels, to which no noise is added"}
NO_NOISE |= dict.fromkeys(
    ("scaffold", "personalized", "splitavg", "fedppkt", "fedktl", "adafedprox", "feddps"),
    "sends more than an update of what a site received",
)


def test_the_method_swarm_is_fused_by_the_sites_without_being_asked(tmp_path: Path) -> None:
    training = smoke("swarm")
    job = build_job("swarm", tmp_path / "swarm", JobOptions(training=training))
    assert is_swarm(job) and not is_swarm(build_job("fedavg", tmp_path / "star", JobOptions(training=training)))
    assert job_name("swarm", JobOptions()) == job_name("swarm", JobOptions(topology="swarm")) == "swarm"
    text = (job / "README.md").read_text()
    assert "heterosync job export swarm`" in text and "go from site to site and not to the server" in text
    assert "the scalars of a round below: to the site that leads it, with the weights, and to the server" in text
    assert "gets the\nweights of all others with their scalars of the round" in text
    for option, why in (
        ({"topology": "star"}, "job option topology: method swarm is fused by the sites: leave it out, or take fedavg"),
        ({"wait_after_min": 5}, "wait_after_min: the server of a swarm gets no models to wait for: leave it out"),
        ({"uploads_to_disk": False}, "uploads_to_disk: the server of a swarm gets no models"),
        ({"min_clients": 2}, "a swarm needs every site in every round"),
        ({"training": {**training, "early_stop": True}}, "a swarm runs all its rounds"),
    ):
        with pytest.raises(UserError, match=why):
            build_job("swarm", tmp_path / "no", JobOptions(**{"training": training, **option}))


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize(
    ("option", "refused"), [({"topology": "swarm"}, {**ALONE, **NO_SWARM}), ({"dp_clip": 1.0}, {**ALONE, **NO_NOISE})]
)
def test_a_variant_is_written_or_refused_in_one_line(tmp_path: Path, name: str, option: dict, refused: dict) -> None:
    options = JobOptions(training=smoke(name), **option)
    if name not in refused:
        assert read_learning(build_job(name, tmp_path / "job", options))["method"] == name
        return
    with pytest.raises(UserError) as caught:
        build_job(name, tmp_path / "job", options)
    assert str(caught.value) == f"job option {next(iter(option))}: {str(caught.value).partition(': ')[2]}"
    assert f"method {name} {refused[name]}" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "job").exists()
