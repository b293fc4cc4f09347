"""A cross-validation on volumes: plan, shared folds, ensembles, and a report whose numbers are checked by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy import stats

from heterosync.cli import main
from heterosync.errors import ProblemList, UserError
from heterosync.federation.modelfile import load_model
from heterosync.study.evidence.cross_site import PUBLISHED
from heterosync.study.layout import read_done, read_spec
from heterosync.study.pages import volume_report
from heterosync.study.pages.volume_report import make_report, report_text, volume_results, write_volume_report
from heterosync.study.pages.wish import Wish
from heterosync.study.running import volume_runs
from heterosync.study.running.engines import InProcess
from heterosync.study.running.kinds import plan_of
from heterosync.study.running.one import play
from heterosync.study.running.plan_file import read_plan
from heterosync.study.running.progress import Lines
from heterosync.study.running.record import read_study
from heterosync.study.running.runner import Machine, lay_out, plan_text, run_study
from heterosync.study.running.status import states_of
from heterosync.study.running.volume_cells import VolumeData
from heterosync.study.scores import read_scores
from heterosync.training import SEGMENTATION
from heterosync.training.segmentation import probability_map
from page_toys import Page
from study_toys import toy_run
from volume_study_toys import laid_out, rewrite, toy_sites, volume_plan

ENGINES = {"inprocess": InProcess()}
RUNS = "runs/sites/all/r0"


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two folds, their ensembles: all done."""
    work, out = laid_out(tmp_path_factory.mktemp("volumes"))
    for spec in work.specs:
        play(out, spec.path, ENGINES, quiet)
    return out


@pytest.fixture(scope="module")
def report(study: Path) -> Path:
    return write_volume_report(volume_results(study))[-1].parent


def table(report: Path, name: str) -> list[dict[str, str]]:
    with (report / "tables" / name).open(newline="") as file:
        return list(csv.DictReader(file))


# -- folds and ensembles ----------------------------------------------------------------------------------------------


def test_all_experiments_share_the_folds(study: Path) -> None:
    validated: dict[str, dict[str, set[str]]] = {}  # method -> site and fold -> cases
    for path in read_study(study).runs:
        spec = read_spec(study / path)
        if "ensemble" in spec.settings:
            continue
        training = json.loads((study / path / "results" / "run.json").read_text())["training"]
        settings = SEGMENTATION.Settings.from_dict(training)
        for site in ("north", "south"):
            data = SEGMENTATION.load(spec.data(study) / site, settings, False, False)
            ids = {split: {data.cases[row].id for row in rows} for split, rows in data.splits.items()}
            assert not ids["train"] & ids["validation"] and not ids["test"] & (ids["train"] | ids["validation"])
            validated.setdefault(spec.method, {})[f"{site} {training['fold']}"] = ids["validation"]
            tested = {row.case for row in read_scores(study / path / "results") if row.site == site}
            assert tested == ids["test"]
    assert validated["prostate_ahnet"] == validated["prostate_private"]
    for site in ("north", "south"):
        first, second = (validated["prostate_ahnet"][f"{site} {fold}"] for fold in (1, 2))
        assert len(first) == len(second) == 2 and not first & second  # each of four training cases validates once


def test_the_ensemble_is_the_mean_of_its_submodels(study: Path) -> None:
    checked = 0
    for method, name, model in (
        ("prostate_ahnet", "best_model.pt", "best"),
        ("prostate_private", "own/north.pt", "site:north"),
    ):
        scores = {
            (row.site, row.case): row.dice
            for row in read_scores(study / RUNS / f"{method}-ensemble" / "results")
            if row.model == model
        }
        built = [load_model(study / RUNS / f"{method}-fold{fold}" / "results" / name).build() for fold in (1, 2)]
        for site in ("south", "unseen"):
            data = SEGMENTATION.load(study / "data/sites/all/r0" / site, built[0][0].training, False, False)
            for row in data.splits["test"]:
                case = data.cases[int(row)]
                maps = [
                    probability_map(made, [network], torch.as_tensor(np.array(case.image)), torch.device("cpu"))
                    for made, network in built
                ]
                found = np.mean([one.numpy() for one in maps], axis=0) >= 0.5
                mask = np.asarray(case.mask[0]) > 0
                dice = 2 * (found & mask).sum() / (found.sum() + mask.sum())
                assert scores[site, case.id] == pytest.approx(dice, abs=2e-3)  # a voxel at the very threshold
                checked += 1
    assert checked == 2 * (1 + 3)


def test_every_model_is_tested_at_every_site_and_on_the_challenge_set(study: Path) -> None:
    rows = read_scores(study / RUNS / "prostate_private-ensemble" / "results")
    assert {(row.model, row.site) for row in rows} == {
        (f"site:{model}", site) for model in ("north", "south") for site in ("north", "south", "unseen")
    }
    assert len([row for row in rows if row.site == "unseen"]) == 2 * 3


def test_an_interrupted_ensemble_goes_on_where_it_was(study: Path, tmp_path: Path, monkeypatch) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    folder = copy / RUNS / "prostate_private-ensemble"
    before = read_scores(folder / "results")
    for name in ("done.json", "results/predictions.csv"):
        (folder / name).unlink()
    scored, real = [], volume_runs.score_ensemble

    def counted(model, files, sites, device, **options):
        scored.append((model, *sites))
        return real(model, files, sites, device, **options)

    def cut(line: str) -> None:
        if "at south" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(volume_runs, "score_ensemble", counted)
    with pytest.raises(KeyboardInterrupt):
        play(copy, "sites/all/r0/prostate_private-ensemble", ENGINES, cut)
    assert scored == [("site:north", "north"), ("site:north", "south")]
    done = play(copy, "sites/all/r0/prostate_private-ensemble", ENGINES, quiet)
    assert len(scored) == 6 == len(set(scored)) and done.engine == "inprocess"
    assert read_scores(folder / "results") == before and not (folder / "work").exists()


def test_an_ensemble_needs_all_its_folds(study: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    (copy / RUNS / "prostate_ahnet-ensemble/done.json").unlink()
    (copy / RUNS / "prostate_ahnet-fold1/results/best_model.pt").unlink()
    with pytest.raises(UserError, match=r"best_model.pt was removed: remove .*prostate_ahnet-fold1 and run the plan"):
        play(copy, "sites/all/r0/prostate_ahnet-ensemble", ENGINES, quiet)
    (copy / RUNS / "prostate_ahnet-fold1/done.json").unlink()
    with pytest.raises(UserError, match="needs the model of run sites/all/r0/prostate_ahnet-fold1, which is not"):
        play(copy, "sites/all/r0/prostate_ahnet-ensemble", ENGINES, quiet)
    states = {state.run: state.state for state in states_of(copy)}
    assert states["sites/all/r0/prostate_ahnet-ensemble"] == "failed" and list(states.values()).count("done") == 4


TUNED = {"method": "prostate_finetune", "training": {"weights": {"from": "prostate_ahnet"}, "lr": 1e-3, "rounds": 1}}


def test_a_site_fine_tunes_the_federated_model_of_the_same_fold(tmp_path: Path) -> None:
    """Which has not trained on the cases that validate here. The plan names it before the method that makes it."""
    work, out = laid_out(tmp_path, methods=[TUNED, "prostate_ahnet"])
    specs = {spec.label: spec for spec in work.specs}
    assert list(specs)[:2] == ["prostate_ahnet-fold1", "prostate_finetune-fold1"]
    for fold in (1, 2):
        mine, source = specs[f"prostate_finetune-fold{fold}"], specs[f"prostate_ahnet-fold{fold}"]
        assert work.data.waits_for(mine) == {source.path} and mine.settings["training"]["fold"] == fold
    with pytest.raises(UserError, match="prostate_finetune-fold1 needs the model of run .*ahnet-fold1, which is not"):
        play(out, specs["prostate_finetune-fold1"].path, ENGINES, quiet)
    for spec in work.specs:
        play(out, spec.path, ENGINES, quiet)
    for fold in (1, 2):
        run = json.loads((out / RUNS / f"prostate_finetune-fold{fold}/results/run.json").read_text())
        file = Path(run["training"]["weights"])
        assert file == out / RUNS / f"prostate_ahnet-fold{fold}/results/best_model.pt" and run["training"]["lr"] == 1e-3
    longer = {"method": "prostate_ahnet", "training": {"rounds": 2}}  # another federated model: another fine-tuning
    after = lay_out(read_plan(volume_plan(tmp_path, methods=[TUNED, longer])), tmp_path / "new").specs
    assert not {spec.digest for spec in after} & {spec.digest for spec in work.specs}

    page = write_volume_report(volume_results(out))[-1]
    shown = {row["model"]: row for row in Page(page.read_text(encoding="utf-8")).table("model", "north (n=1)")}
    sets = {(row["model"], row["site"]): row for row in table(page.parent, "cross_site.csv")}
    for model in ("prostate_finetune north", "prostate_finetune south"):  # at home, abroad, together, outside
        for cell in ("north (n=1)", "south (n=1)", "Overall (n=2)", "unseen (n=3)"):
            assert shown[model][cell].startswith(f"{float(sets[model, cell.split(' (')[0]]['dice']):.3f}")
    assert str(tmp_path) not in page.read_text(encoding="utf-8")
    assert "the best model of prostate_ahnet in the same fold (2 runs)" in page.read_text(encoding="utf-8")


FAKE = """
import json, pathlib, sys, time
study, run = sys.argv[1:]
folder = pathlib.Path(study, "runs", run)
log = pathlib.Path(study).parent / "log.txt"
with log.open("a") as file: file.write(f"start {folder.name}\\n")
time.sleep(0.4)
spec = json.loads((folder / "run_spec.json").read_text())
done = dict(digest=spec["digest"], seconds=1.0, peak_memory_bytes=1, bytes_per_site_round=0, engine="x", finished="")
with log.open("a") as file: file.write(f"end {folder.name}\\n")
(folder / "done.json").write_text(json.dumps(done))
"""


def test_ensembles_wait_for_their_folds(tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    work, out = laid_out(tmp_path)
    assert not run_study(work, out, Machine([sys.executable, str(tmp_path / "fake.py")], jobs=3), Lines(io.StringIO()))
    log = (tmp_path / "log.txt").read_text().splitlines()
    for method in ("prostate_ahnet", "prostate_private"):
        assert all(log.index(f"end {method}-fold{n}") < log.index(f"start {method}-ensemble") for n in (1, 2))


# -- the report -------------------------------------------------------------------------------------------------------


def test_t_tests_are_those_of_the_formula(report: Path) -> None:
    cases, tests = table(report, "cases.csv"), table(report, "tests.csv")
    assert {(row["site"], row["model"]) for row in tests} == {
        (site, f"prostate_private {name}") for site in ("Overall", "unseen") for name in ("north", "south")
    }
    for row in tests:
        chosen = [case for case in cases if (case["site"] == "unseen") == (row["site"] == "unseen")]
        dice = {
            model: {(c["site"], c["case"]): float(c["dice"]) for c in chosen if c["model"] == model}
            for model in ("prostate_ahnet", row["model"])
        }
        ours, theirs = ([one[key] for key in sorted(one)] for one in dice.values())
        d = np.array(ours) - np.array(theirs)
        t = d.mean() / (d.std(ddof=1) / math.sqrt(len(d)))
        assert int(row["n"]) == len(d) and float(row["difference"]) == pytest.approx(d.mean())
        assert float(row["t"]) == pytest.approx(t)
        assert float(row["p"]) == pytest.approx(2 * stats.t.sf(abs(t), len(d) - 1))


def test_the_page_shows_the_numbers_of_the_tables(report: Path) -> None:
    page = Page((report / "index.html").read_text(encoding="utf-8"))
    assert not page.open
    sets = {(row["model"], row["site"]): row for row in table(report, "cross_site.csv")}
    cases = table(report, "cases.csv")
    (crossed,) = [t for t in page.tables if t[0][:2] == ["model", "north (n=1)"]]
    header = [cell.split(" (")[0] for cell in crossed[0]]
    assert header == ["model", "north", "south", "Overall", "unseen"] and len(crossed) == 4
    assert crossed[-1][0] == "prostate_ahnet"
    for model, *cells in crossed[1:]:
        for site, cell in zip(header[1:], cells, strict=True):
            row = sets[model, site]
            spread = f" ± {float(row['dice_sd']):.3f}" if row["dice_sd"] else ""
            assert cell.rstrip("*") == f"{float(row['dice']):.3f}{spread}"
            mine = [
                float(case["dice"])
                for case in cases
                if case["model"] == model and (case["site"] == site or (site == "Overall") > (case["site"] == "unseen"))
            ]
            assert float(row["dice"]) == pytest.approx(np.mean(mine)) and int(row["n"]) == len(mine)
            if len(mine) > 1:
                assert float(row["dice_sd"]) == pytest.approx(np.std(mine, ddof=1))
    measures = page.table("model", "test set", "cases", "Dice")
    assert len(measures) == len(sets)
    for shown in measures:
        row = sets[shown["model"], shown["test set"]]
        assert shown["cases"] == row["n"] and shown["nothing found"] == row["n_missed"]
        assert shown["volume error (ml)"] == f"{float(row['volume_error']):.1f}"
        assert shown["95 % Hausdorff (mm)"] == (f"{float(row['hd95']):.1f}" if row["hd95"] else "-")
    tests = {(row["site"], row["model"]): row for row in table(report, "tests.csv")}
    for shown in page.table("test set", "model", "cases", "mean difference in Dice"):
        row = tests[shown["test set"], shown["model"]]
        assert shown["t"] == f"{float(row['t']):.2f}"
        assert shown["p"] == ("< 0.001" if float(row["p"]) < 0.001 else f"{float(row['p']):.3f}")
    folds = {(row["model"], row["site"], row["fold"]): row for row in table(report, "folds.csv")}
    for shown in page.table("model", "test set", "fold1", "fold2"):
        for fold in ("fold1", "fold2"):
            assert shown[fold] == f"{float(folds[shown['model'], shown['test set'], fold]['dice']):.3f}"


def test_the_published_tables_stand_beside_the_measured(study: Path, report: Path) -> None:
    page = Page((report / "index.html").read_text(encoding="utf-8"))
    rows = page.table("model", "NCI (n=20)")
    assert [row["model"] for row in rows] == list(PUBLISHED)
    assert rows[2]["SUNY (n=20)"] == "0.575 ± 0.177" and rows[-1]["ProstateX (n=343)"] == "0.889 ± 0.036"
    order = [t[0][1] for t in page.tables]
    assert order.index("NCI (n=20)") == order.index("north (n=1)") + 1
    text = report_text(volume_results(study))
    assert "0.854 ± 0.074*" in text and "Sarma et al., JAMIA 28(6), 2021, Tables 3 and 4" in text
    assert len(table(report, "published.csv")) == 20


def test_costs_methods_and_settings_are_told(report: Path) -> None:
    page = Page((report / "index.html").read_text(encoding="utf-8"))
    assert {row["method"]: row["runs"] for row in page.table("method", "runs")} == {
        "prostate_ahnet": "3",
        "prostate_private": "3",
    }
    settings = {row["what"]: row["value"] for row in page.table("what", "value")}
    assert settings["training setting network"] == "unet_tiny" and "r0: 0" in settings["seed of each repeat"]
    assert {path.suffix for path in (report / "figures").iterdir()} == {".png", ".svg"}
    assert len(table(report, "costs.csv")) == 6 and not table(report, "missing.csv")


def test_test_cases_are_shown_with_both_contours(study: Path, report: Path) -> None:
    text = (report / "index.html").read_text(encoding="utf-8")
    assert "Page and figures stay where these images may be" in text
    assert "Test cases as prostate_ahnet segments them" in text and "best: Dice" in text and "worst: Dice" in text
    kept = study / RUNS / "prostate_ahnet-ensemble/results/views"
    assert {path.name for path in kept.iterdir()} == {"north", "south", "unseen"}
    tested = {(row["site"], row["case"]) for row in table(report, "cases.csv") if row["model"] == "prostate_ahnet"}
    shown = [f"{site}: {case}" for site, case in tested if f"{site}: {case}" in text]
    assert len(shown) == min(3, len(tested))


def test_a_report_with_slices_of_patients_says_so(study: Path, tmp_path: Path, monkeypatch) -> None:
    written = [Path("figures/sites_r0_overlays.svg"), Path("index.html")]
    monkeypatch.setattr(volume_report, "write_volume_report", lambda results, out: written)
    made = make_report(study, Wish(), quiet)
    assert made.facts["shows_patients"] and made.text.endswith("stay where these images may be.")
    results = volume_results(study)
    results.study.info["source"] = "synthetic"
    monkeypatch.setattr(volume_report, "volume_results", lambda *_: results)
    made = make_report(study, Wish(), quiet)
    assert not made.facts["shows_patients"] and "these images may be" not in made.text
    page = write_volume_report(results, tmp_path / "phantoms")[-1].read_text(encoding="utf-8")
    assert "these images may be" not in page and "Test cases as prostate_ahnet" in page


def test_missing_folds_are_named_and_the_rest_is_told(study: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    (copy / RUNS / "prostate_private-fold2/done.json").unlink()
    shutil.rmtree(copy / RUNS / "prostate_private-ensemble/results")
    results = volume_results(copy)
    assert results.reference == "prostate_ahnet"
    told = "\n".join(results.problems)
    assert "sites prostate_private-fold2: no result yet for r0" in told
    assert "sites prostate_private-ensemble r0 left out: " in told and str(copy) not in told
    text = write_volume_report(results)[-1].read_text(encoding="utf-8")
    assert "prostate_private-fold2: no result yet" in text
    assert {row["model"] for row in table(copy / "report", "cross_site.csv")} == {"prostate_ahnet"}
    assert not table(copy / "report", "tests.csv")

    shutil.rmtree(copy / RUNS / "prostate_ahnet-ensemble/results")
    results = volume_results(copy)
    assert results.reference is None and write_volume_report(results)
    assert "no cross-site table yet, any ensemble is missing" in report_text(results)
    assert table(copy / "report", "folds.csv") and not table(copy / "report", "cross_site.csv")


def test_a_damaged_table_of_scores_is_left_out(study: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    path = copy / RUNS / "prostate_private-ensemble/results/predictions.csv"
    lines = path.read_text().splitlines()
    for changed, told in (
        (lines[:-1], "its models were not tested on the same cases"),
        ([*lines, lines[-1]], "stands there twice for model site:south"),
        ([*lines[:-1], lines[-1].replace(lines[-1].split(",")[3], "1.5")], "dice '1.5' must be a number from 0 to 1"),
        (["site,id"], "the header must be model,site,case,dice"),
    ):
        path.write_text("\n".join(changed) + "\n")
        results = volume_results(copy)
        assert any(told in line for line in results.problems), results.problems
        assert {score.model for one in results.study.validations for score in one.scores} == {"prostate_ahnet"}


def test_the_commands(study: Path, tmp_path: Path, capsys) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    assert main(["study", "report", str(copy), "--json", "--reference", "prostate_private north"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["shows_patients"] is True
    assert facts["reference"] == "prostate_private north" and facts["runs_finished"] == 6 and len(facts["tests"]) == 4
    for options, told in (
        (["--resamples", "10"], "leave out --resamples"),
        (["--no-maps"], "leave out --no-maps"),
        (["--reference", "prostate_ahnt"], "did you mean 'prostate_ahnet'"),
    ):
        assert main(["study", "report", str(copy), *options]) == 1
        assert told in capsys.readouterr().err
    assert main(["study", "status", str(copy)]) == 0
    assert "6 of 6 runs done" in capsys.readouterr().out
    assert main(["study", "clean", str(copy)]) == 0
    assert not list(copy.glob("runs/**/*.pt")) and (tmp_path / "study/data/sites/all/r0/north").is_symlink()


def test_single_runs_are_told_in_dice(study: Path, tmp_path: Path, capsys) -> None:
    run = study / RUNS / "prostate_ahnet-fold1"
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    tests = json.loads((run / "results/cross_site_metrics.json").read_text())["best"]
    assert "Test Dice (95 % interval)" in text and "test volumes (nothing found)" in text and "AUC" not in text
    assert all(f"{tests[name]['dice']:.3f}" in text for name in ("north", "south", "mean"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("report.md", "dice.csv", "dice.png", "dice.svg", "rounds.png", "rounds.svg", "index.html")
    }
    with (tmp_path / "out/dice.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if (row["model"], row["site"]) == ("best", "south"))
    assert float(row["dice"]) == tests["south"]["dice"] and float(row["hd95"]) == tests["south"]["hd95"]
    assert "Validation Dice" in (tmp_path / "out/index.html").read_text()
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["dice"]["north"] == tests["north"]["dice"]
    pictures = toy_run(tmp_path / "pictures")
    assert main(["report", str(run), str(pictures), "--out", str(tmp_path / "both")]) == 1
    assert "make a report on each by itself" in capsys.readouterr().err and not (tmp_path / "both").exists()


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_survives_being_stored_and_says_what_it_will_do(tmp_path: Path) -> None:
    toy_sites(tmp_path)
    plan = read_plan(volume_plan(tmp_path))
    assert plan_of(plan.to_dict()) == plan
    work = lay_out(plan, tmp_path / "study")
    assert [spec.label for spec in work.specs] == [
        *("prostate_ahnet-fold1", "prostate_private-fold1", "prostate_ahnet-fold2", "prostate_private-fold2"),
        *("prostate_ahnet-ensemble", "prostate_private-ensemble"),
    ]
    text = plan_text(work, tmp_path / "study", Machine([]))
    assert "north 5 (1), south 5 (1), unseen 3 (3)" in text and "6 runs" in text
    assert not (tmp_path / "study").exists() and not (tmp_path / "north/folds.csv").exists()
    ((cell, entry, short), *_) = work.runs
    longer = read_plan(volume_plan(tmp_path, training={**plan.training, "rounds": 20}))
    assert cell.items(entry, VolumeData(longer).runs()[0][2]) > 5 * cell.items(entry, short)


def test_the_papers_experiments_are_a_preset() -> None:
    data = VolumeData(read_plan("prostate"))
    (cell,) = data.cells
    assert {site: cell.images(site) for site in cell.sites} == {
        site: (64, 16, 20) for site in ("north", "south", "west")
    }
    specs = [spec for _, _, spec in data.runs()]
    small = {spec.path: spec for _, _, spec in VolumeData(read_plan("prostate-small")).runs()}
    assert len(small) == 3 * (5 + 1)
    tuned = small["phantoms/all/r0/prostate_finetune-fold4"].settings
    assert tuned["from"] == "phantoms/all/r0/prostate_ahnet-fold4" and tuned["training"]["lr"] == 1e-3
    assert tuned["training"]["rounds"] == 5 and tuned["training"]["batch_size"] == 4  # its own, and the plan's
    assert len(specs) == 2 * (5 + 1) and {spec.settings["training"]["fold"] for spec in specs} == {1, 2, 3, 4, 5}
    assert specs[0].settings["training"]["seed"] == specs[3].settings["training"]["seed"] == 0


def test_other_volumes_or_folds_are_another_plan(tmp_path: Path) -> None:
    work, out = laid_out(tmp_path)
    changed = read_plan(volume_plan(tmp_path, training={"network": "unet_tiny", "patch": [16, 16, 16]}))
    with pytest.raises(
        UserError, match="another plan: its run sites/all/r0/prostate_ahnet-ensemble has another training"
    ):
        lay_out(changed, out)
    assert read_done(work.specs[0].folder(out)) is None


def test_other_images_masks_folds_or_labels_are_another_plan(tmp_path: Path) -> None:
    work, out = laid_out(tmp_path)
    plan, north = read_plan(tmp_path / "plan.yaml"), tmp_path / "north"

    def digests() -> list[str]:
        return [spec.digest for _, _, spec in VolumeData(plan).runs()]

    before = [spec.digest for spec in work.specs]
    assert digests() == before  # the folds that have been drawn meanwhile change nothing
    manifest, mask = (north / name for name in ("manifest.csv", "masks/1.nii.gz"))
    for path, change in (
        (manifest, lambda: manifest.write_text("\n".join(manifest.read_text().splitlines()[:-1]) + "\n")),
        (mask, lambda: without_a_voxel(mask)),
        (north / "images/1.nii.gz", lambda: shifted(north / "images/1.nii.gz", mask)),
        (north / "site.yaml", lambda: rewritten(north / "site.yaml", "foreground: [1, 2]\n")),
        (north / "folds.csv", lambda: folds_exchanged(north / "folds.csv")),
    ):
        kept = {file: file.read_bytes() for file in (path, mask)}
        change()
        assert not set(digests()) & set(before), path
        with pytest.raises(UserError, match="the folder of another plan: .* other settings or images: choose another"):
            lay_out(plan, out)
        for file, content in kept.items():
            file.write_bytes(content)
        assert digests() == before


def without_a_voxel(path: Path) -> None:
    """An organ smaller by a voxel, in a file of the same header."""
    image = nibabel.load(path)
    values = np.array(image.dataobj)
    values[tuple(np.argwhere(values)[0])] = 0
    nibabel.save(nibabel.Nifti1Image(values, image.affine, image.header), path)


def shifted(*paths: Path) -> None:
    """The same voxels, 5 mm higher."""
    for path in paths:
        image = nibabel.load(path)
        values, affine = np.array(image.dataobj), image.affine.copy()
        affine[2, 3] += 5
        nibabel.save(nibabel.Nifti1Image(values, affine), path)


def rewritten(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line)


def folds_exchanged(path: Path) -> None:
    rows = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("\n".join(",".join([*row[:2], {"1": "2", "2": "1"}.get(row[2], row[2])]) for row in rows) + "\n")


def test_a_fine_tuning_takes_over_neither_the_rate_nor_the_rounds_of_the_plan(tmp_path: Path) -> None:
    own = {"method": "prostate_finetune", "variant": "own", "training": {**TUNED["training"], "rounds": 7}}
    plain = {"method": "prostate_finetune", "training": {"weights": {"from": "prostate_ahnet"}}}
    later = {"method": "prostate_ahnet", "variant": "later", "training": {"weights": {"from": "prostate_ahnet"}}}
    plan = read_plan(volume_plan(tmp_path, methods=["prostate_ahnet", plain, own, later]))
    made = {entry.label: entry.made(plan.training_of(entry, 0, 1)).training for entry in plan.methods}
    assert {label: (one.lr, one.rounds, one.crops) for label, one in made.items()} == {
        "prostate_ahnet": (1e-2, 1, 4),
        "prostate_finetune": (1e-5, 300, 4),
        "prostate_finetune-own": (1e-3, 7, 4),
        "prostate_ahnet-later": (1e-2, 1, 4),  # a federation, if with a beginning
    }


PHANTOMS = {"kind": "phantoms", "cases": 10}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": ["prostate_ahnet", "prostate_finetune"]}, "the one that was trained without its validation cases"),
        (
            {"methods": [{**TUNED, "training": {"weights": "best_model.pt"}}]},
            "method prostate_finetune: it goes on from a model, .* write training: {weights: {from: LABEL}}",
        ),
        ({"methods": [TUNED, "prostate_private"]}, "weights from 'prostate_ahnet': did you mean 'prostate_finetune'"),
        (
            {"methods": [{**TUNED, "training": {"weights": {"from": "prostate_private"}}}, "prostate_private"]},
            "weights from 'prostate_private': take a method with one model for all sites",
        ),
        (
            {
                "methods": [
                    TUNED,
                    {"method": "prostate_ahnet", "training": {"network": "ahnet", "patch": [128, 128, 64]}},
                ]
            },
            "method prostate_finetune: it has another network than prostate_ahnet",
        ),
        (
            {"methods": [{**TUNED, "training": {**TUNED["training"], "spacing": 3.0}}, "prostate_ahnet"]},
            "method prostate_finetune: it has another spacing than prostate_ahnet",
        ),
        (
            {"methods": [TUNED, {"method": "prostate_ahnet", "training": {"interpolation": "spline"}}]},
            "method prostate_finetune: it has another interpolation than prostate_ahnet",
        ),
        (
            {"methods": [{**TUNED, "training": {"weights": {"fram": "X"}}}, "prostate_ahnet"]},
            r"prostate_finetune: weights is {'fram': 'X'}: write a file, or {from: LABEL} in a method's own training$",
        ),
        (
            {"training": {"weights": {"from": "prostate_ahnet"}}},
            r"plan.yaml: training: weights is {'from': 'prostate_ahnet'}: write a file, or {from: LABEL} in a method's",
        ),
        ({"methods": ["fedavg"]}, "method fedavg learns classification, and the plan's task is segmentation"),
        ({"task": "segmentaton"}, "task is 'segmentaton': did you mean 'segmentation'"),
        ({"folds": 1}, "folds is 1: it must be a whole number from 2"),
        ({"training": {"fold": 2}}, "training: a plan runs every fold: leave out fold, or set folds"),
        ({"training": {"image_size": 64}}, "'image_size' is unknown"),
        ({"source": {**PHANTOMS, "cases": 4}, "folds": 5}, "4 cases leave one of 5 folds or the test set without"),
        ({"source": {**PHANTOMS, "field_of_view": 20}}, "field_of_view is 20 mm: choose 64 to 256"),
        ({"source": {"kind": "phantom"}}, "source has a key 'kind' that is not known"),
        ({"source": {"sites": {"unseen": "north"}}}, "source: site 'unseen'"),
        ({"source": {"sites": {}}}, "source names no sites"),
        ({"keep": ["best"]}, "keep is 'best'"),
        ({"methods": ["prostate_ahnet", "prostate_ahnet"]}, "method 'prostate_ahnet' is there twice"),
        ({"match_steps": True}, "has a key 'match_steps' that is not known"),
    ],
)
def test_what_is_wrong_in_a_plan_is_told(changes: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        read_plan(volume_plan(tmp_path, **changes))


def test_a_plan_for_pictures_refuses_methods_on_volumes(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("methods: [prostate_ahnet]\nscenarios: [synthetic]\n")
    with pytest.raises(UserError, match="learns segmentation, and the plan's task is classification: leave it out"):
        read_plan(path)


def test_all_that_is_wrong_with_site_folders_is_told_before_the_start(tmp_path: Path) -> None:
    toy_sites(tmp_path)
    rewrite(
        tmp_path / "north", lambda image, mask: f"{image},{mask},{1 if '6' not in image else ''}", "image,mask,fold"
    )
    (tmp_path / "south/site.yaml").write_text("task: segmentation\nfolds: 3\n")
    rewrite(tmp_path / "outside", lambda image, mask: f"{image},{mask}", "image,mask")
    sites = {"north": "north", "south": "south", "west": "west"}
    with pytest.raises(ProblemList) as told:
        lay_out(read_plan(volume_plan(tmp_path, source={"sites": sites, "challenge": "outside"})), tmp_path / "study")
    lines = str(told.value).splitlines()
    assert any("north: " in line and "fold 2 has no case" in line for line in lines), lines
    assert "south: site.yaml has folds: 3, the plan 2: make them equal" in lines
    assert "unseen: a challenge set is held out: give every row split test" in lines
    assert any(line.startswith("west: ") for line in lines) and not (tmp_path / "study").exists()
