"""The command line: help, exit codes, JSON, job folders."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heterosync.cli import build_parser, main
from heterosync.cli.base import add_command, parse_settings, run_command
from heterosync.errors import UserError
from heterosync.methods import method_names


def all_parsers(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()):
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from all_parsers(child, (*path, name))


PARSERS = {" ".join(path): parser for path, parser in all_parsers(build_parser()) if path}


@pytest.mark.parametrize("command", sorted(PARSERS))
def test_help_of_every_command_has_an_example_of_that_command(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"example:\n  heterosync {command}" in text


@pytest.mark.parametrize("command", sorted(PARSERS))
def test_every_argument_is_explained_or_a_plain_word(command):
    for action in PARSERS[command]._actions:
        if action.option_strings and action.option_strings[0] not in ("-h", "--out"):
            assert action.help, f"{command}: {action.option_strings} has no help"


def test_examples_parse():
    """An example in a help text that the parser itself refuses would be worse than none."""
    for command, parser in PARSERS.items():
        for line in parser.epilog.splitlines()[1:]:
            words = line.split()
            assert words[0] == "heterosync"
            assert build_parser().parse_args(words[1:]), command


def test_the_command_line_does_not_import_torch():
    heavy = "[name for name in ('torch', 'nvflare', 'numpy') if name in sys.modules]"
    code = f"import sys, heterosync.cli as cli; cli.build_parser(); print({heavy})"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5  # 0.1 s on an idle machine; torch alone takes seconds on a busy one


def _environment() -> dict[str, str]:
    import os

    import heterosync

    return {**os.environ, "PYTHONPATH": str(Path(heterosync.__file__).parents[1])}


def test_exit_codes(capsys):
    def parser(run) -> argparse.ArgumentParser:
        made = argparse.ArgumentParser()
        add_command(made.add_subparsers(), "x", "do it", run, "heterosync x")
        return made

    def user_error(arguments):
        raise UserError("file a.csv, row 3: no label: write one")

    def interrupt(arguments):
        raise KeyboardInterrupt

    def defect(arguments):
        raise ValueError("ours")

    assert run_command(parser(lambda arguments: None), ["x"]) == 0
    assert run_command(parser(lambda arguments: 1), ["x"]) == 1
    capsys.readouterr()
    assert run_command(parser(user_error), ["x"]) == 1
    assert capsys.readouterr().err == "heterosync: file a.csv, row 3: no label: write one\n"
    assert run_command(parser(interrupt), ["x"]) == 130
    assert run_command(parser(lambda arguments: None), ["y"]) == 2
    with pytest.raises(ValueError):
        run_command(parser(defect), ["x"])


def test_version(capsys):
    from heterosync import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"heterosync {__version__}"


def test_settings_are_read_as_json_where_they_are_json():
    pairs = ["rounds=3", "lr=1e-3", "augment=false", "weights=none", "loss_weights=[1, 0]", "source=/a=b"]
    pairs += ["patch=32,32,16", "note=a,b"]
    assert parse_settings(pairs) == {
        "rounds": 3,
        "lr": 1e-3,
        "augment": False,
        "weights": "none",
        "loss_weights": [1, 0],
        "source": "/a=b",
        "patch": [32, 32, 16],
        "note": "a,b",
    }
    for wrong in (["rounds"], ["=3"], ["rounds=1", "rounds=2"]):
        with pytest.raises(UserError, match="--set"):
            parse_settings(wrong)


def test_job_list_gives_one_object_per_method(capsys):
    assert main(["job", "list", "--json"]) == 0
    methods = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(methods) == method_names()
    for entry in methods.values():
        assert entry["status"] and entry["citation"] and entry["leaves_a_site"]
    # 23 723 650 parameters and the BatchNorm statistics of two ResNet18 (2 x 9600 floats, 2 x 20 counters of 8 bytes)
    assert methods["hsl"]["parameters"] == 23_723_650
    assert methods["hsl"]["bytes_per_round"] == 4 * (23_723_650 + 2 * 9600) + 8 * 40
    assert methods["local"]["bytes_per_round"] == 0
    # what is trained: control variates and a frozen earlier model are not, Ditto's second network is
    trained = {name: methods[name]["parameters"] for name in ("no_al", "scaffold", "moon", "ditto")}
    assert list(trained.values()) == [11_177_025, 11_177_025, 11_177_025, 2 * 11_177_025]
    assert main(["job", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, entry in methods.items():  # one line for each, with its group and status
        (line,) = [line for line in lines if f" {name} " in line and entry["title"] in line]
        assert entry["group"] in line and entry["status"] in line


def test_job_describe_names_settings_and_what_leaves(capsys):
    assert main(["job", "describe", "hsl"]) == 0
    text = capsys.readouterr().out
    for part in ("23,723,650 parameters", "temperature = 3.0", "rounds = 20", "what leaves a site", "min_clients = 0"):
        assert part in text
    for part in ("status: corrected: as the source means it", "two-task", "Hu et al."):
        assert part in text
    assert "beside what travels: nothing at a site; nothing at the server (of five sites)" in text
    assert "backbone = resnet18  (one of resnet18, resnet_tiny)" in text
    assert "topology = None  (one of star, swarm)" in text
    assert "test_partner = self  (one of self, sat_index, sat_mean)" in text
    assert main(["job", "describe", "clip"]) == 0
    assert "`ViT-B-32.pt` every site has in torch's cache (hub/checkpoints; docs/clip.md)" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["hsl", "local"])
def test_described_settings_are_those_that_export_takes(method, tmp_path, capsys):
    assert main(["job", "describe", method]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and " = " in line]
    described = {line.split()[0]: "counts only with" not in line for line in lines}
    assert main(["job", "export", method, "--out", str(tmp_path), "--set", "nosuch=1"]) == 1
    assert set(capsys.readouterr().err.partition("known: ")[2].strip().split(", ")) == set(described)
    assert described["rounds"] and described["temperature"] == described["anchors_may_differ"] == (method == "hsl")
    for name, other in (("temperature", "2"), ("n_experts", "3"), ("anchors_may_differ", "true"), ("min_clients", "2")):
        assert main(["job", "export", method, "--out", str(tmp_path), "--set", f"{name}={other}"]) == (
            0 if described[name] else 1
        )


def test_an_export_says_when_it_replaces_a_job(tmp_path, capsys):
    export = ["job", "export", "local", "--out", str(tmp_path)]
    for told in (False, True):
        assert main(export) == 0
        assert ("in place of the job that was there" in capsys.readouterr().out) == told


def test_weights_may_be_a_file_of_the_sites_only(tmp_path):
    for weights in ("/models/resnet18", "resnet18.pt", "models/resnet18", "none", "auto", "imagenet"):
        assert main(["job", "export", "hsl", "--out", str(tmp_path), "--set", f"weights={weights}"]) == 0


def test_job_export_writes_what_the_builder_writes(tmp_path, capsys):
    from heterosync.flare.jobs.builder import build_job
    from heterosync.flare.jobs.options import JobOptions

    arguments = ["job", "export", "hsl", "--out", str(tmp_path / "out"), "--rounds", "3", "--min-clients", "2"]
    assert main([*arguments, "--set", "image_size=32", "--set", "backbone=resnet_tiny", "--set", "temperature=2"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    training = {"image_size": 32, "backbone": "resnet_tiny", "rounds": 3}
    build_job("hsl", tmp_path / "hsl", JobOptions(min_clients=2, training=training, method_settings={"temperature": 2}))
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*.json")):
        assert json.loads((folder / file).read_text()) == json.loads((tmp_path / "hsl" / file).read_text())


def test_byoc_packs_the_package(tmp_path):
    assert main(["job", "export", "local", "--out", str(tmp_path), "--byoc"]) == 0
    packed = tmp_path / "local" / "app" / "custom" / "heterosync"
    assert (packed / "flare" / "executor.py").is_file() and (packed / "py.typed").is_file()
    assert not list(packed.rglob("__pycache__"))


def test_an_export_without_byoc_removes_the_code_and_the_readme_tells_which(tmp_path):
    export = ["job", "export", "local", "--out", str(tmp_path)]
    readme = tmp_path / "local" / "README.md"
    assert main([*export, "--byoc"]) == 0
    assert "no Python travels" not in readme.read_text() and "brings Python code along" in readme.read_text()
    assert main(export) == 0
    assert not (tmp_path / "local" / "app" / "custom").exists()
    assert "no Python travels" in readme.read_text()


def test_simulate_takes_the_sites_that_its_help_names(tmp_path, capsys):
    from heterosync.cli.run import sites_in

    for site in ("site-b", "site-a", "unseen"):
        (tmp_path / site).mkdir()
        (tmp_path / site / "site.yaml").write_text("")
    assert sites_in(tmp_path) == ["site-a", "site-b"]
    assert main(["simulate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "unseen" in text and "anchor" not in text  # local learning needs none
