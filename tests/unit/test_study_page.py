"""The report on a study: numbers checked against scikit-learn, a page that needs nothing from outside, honest gaps."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from heterosync.cli import main
from heterosync.errors import UserError
from heterosync.study.figures import boxes
from heterosync.study.figures.style import INK, PAPER
from heterosync.study.pages import html
from heterosync.study.pages.page_tables import _anchor_rows, comparison_table
from heterosync.study.pages.page_tables import _told as setting_told
from heterosync.study.pages.study_report import report_text, study_results, write_study_report
from page_toys import Page
from study_data import fake_study
from study_toys import toy_model, toy_run
from toys import toy_alliance

SITES = {"hospitals": {"north": (25, 20), "<b>&\"south'": (30, 0), "unseen": (12, 20)}, "label-skew": {"n-1": (20, 9)}}


def predictions(study, *where):
    with open(study.joinpath("runs", *where, "results", "predictions.csv"), newline="") as file:
        return list(csv.DictReader(file))


def auc_of(rows) -> float:
    return roc_auc_score([int(r["label"]) for r in rows], [float(r["probability"]) for r in rows])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two scenarios, one with levels; a run is missing, another damaged."""
    folder = tmp_path_factory.mktemp("study") / "s"
    levels = {"label-skew": ("2:1", "9:1")}
    fake_study(folder, ("fedavg", "hsl", "local"), ("hospitals", "label-skew"), 3, levels, SITES, rounds=3)
    info = json.loads((folder / "study.json").read_text())
    info["name"] = "<script>alert(1)</script>"
    info["plan"]["source"] = {"kind": "synthetic"}
    (folder / "study.json").write_text(json.dumps(info))
    shutil.rmtree(folder / "runs/label-skew/9-1/r1/fedavg")
    (folder / "runs/label-skew/2-1/r2/local/results/predictions.csv").write_text("site,id\n")
    return folder


@pytest.fixture(scope="module")
def files(study):
    return write_study_report(study_results(study, resamples=100))


@pytest.fixture(scope="module")
def text(files):
    return files[-1].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_is_whole_and_needs_nothing_from_outside(text, page):
    assert not page.open and text.startswith("<!DOCTYPE html>")
    for word in ("http", "src=", "<link", "<script", "@import", "<iframe", "<!ENTITY", "javascript:"):
        assert word not in text, word
    assert [name for _, name, _ in page.attributes if name.startswith("on")] == []
    assert len(page.ids) == len(set(page.ids))
    links = [value for _, name, value in page.attributes if name in ("href", "xlink:href")]
    assert links and all(v.startswith(("#", "data:image/png;base64,")) for v in links)
    targets = [v[1:] for v in links if v[0] == "#"] + re.findall(r"url\(#([^)]+)\)", text)
    assert set(targets) <= set(page.ids) and set(re.findall(r"url\((.)", text)) <= {"#"}


def test_all_figures_are_written_and_stand_in_the_page(files, page):
    drawn = {path.stem for path in files if path.suffix == ".svg"}
    assert drawn == {path.stem for path in files if path.suffix == ".png"}
    assert drawn == {
        *(f"hospitals_{name}" for name in ("data", "auc", "roc", "unseen", "convergence", "coupling")),
        *(f"label-skew_{name}" for name in ("data", "auc", "convergence", "coupling")),
        "cost",
    }
    assert page.counts["figure"] == page.counts["svg"] == len(drawn)
    assert all(path.is_file() and path.stat().st_size for path in files)
    assert sum(path.stat().st_size for path in files if path.name == "index.html") < 15e6


def test_colours_follow_light_dark_and_print(text):
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert INK not in figures and PAPER not in figures and "var(--ink)" in figures and "var(--paper)" in figures
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert "@media screen and (prefers-color-scheme: dark)" in text  # paper stays white in print


def test_text_is_escaped(text, page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<b>" not in text
    assert page.table("method", "north (20+)")[0].keys() >= {"<b>&\"south' (0+)"}


def test_auc_table_is_what_scikit_learn_says(study, page):
    rows = {row["method"]: row for row in page.table("method", "north (20+)")}
    assert list(rows) == ["hsl", "fedavg", "local"]  # the reference first
    for label in rows:
        repeats = [predictions(study, "hospitals", "all", f"r{r}", label) for r in range(3)]
        aucs = [auc_of([row for row in run if row["site"] == "north"]) for run in repeats]
        assert rows[label]["north (20+)"] == f"{np.mean(aucs):.3f} ± {np.std(aucs, ddof=1):.3f}"
        assert rows[label]["<b>&\"south' (0+)"] == "not defined (n = 90, 0 positive)"
        assert rows[label]["mean of sites"] == f"{np.mean(aucs):.3f}"  # of the one that is defined


def test_missing_repeats_are_told_beside_the_mean(page):
    table = next(rows for rows in page.tables if rows[0][1].startswith("2-1 ("))
    short = {(row[0], level): "(2 of 3)" in cell for row in table[1:] for level, cell in enumerate(row[1:])}
    assert {place for place, told in short.items() if told} == {("fedavg", 1), ("local", 0)}


def test_pooled_auc_and_the_unseen_population(study, page):
    pooled = {(r["site"], r["method"]): r for r in page.table("site", "method", "n", "positive")}
    north = [
        row
        for r in range(3)
        for row in predictions(study, "hospitals", "all", f"r{r}", "hsl")
        if row["site"] == "north"
    ]
    found = pooled["north", "hsl"]
    assert found["AUC (95 % interval)"].startswith(f"{auc_of(north):.3f} (") and found["n"] == "135"
    assert found["positive"] == "60" and pooled["<b>&\"south'", "hsl"]["AUC (95 % interval)"] == "not defined"
    right = [(float(row["probability"]) >= 0.5) == (row["label"] == "1") for row in north]
    assert found["accuracy"] == f"{np.mean(right):.3f}"
    unseen = {row["method"]: row for row in page.table("method", "cases, all repeats (positive)")}
    per_repeat = []
    for r in range(3):
        rows = [row for row in predictions(study, "hospitals", "all", f"r{r}", "local") if row["site"] == "unseen"]
        models = sorted({row["model"] for row in rows})
        assert len(models) == 2
        per_repeat.append(np.mean([auc_of([row for row in rows if row["model"] == m]) for m in models]))
    assert unseen["local"]["mean ± sd"] == f"{np.mean(per_repeat):.3f} ± {np.std(per_repeat, ddof=1):.3f}"
    assert unseen["hsl"]["cases, all repeats (positive)"] == "96 (60)"


def test_differences_are_of_the_same_cases(study, page, text):
    rows = {(r["scenario"], r["site"], r["method"]): r for r in page.table("scenario", "site", "method", "repeats")}
    both = {}
    for label in ("hsl", "fedavg"):
        both[label] = [row for r in (0, 2) for row in predictions(study, "label-skew", "9-1", f"r{r}", label)]
    found = rows["label-skew 9-1", "n-1", "fedavg"]  # r1 of fedavg is missing: the pair rests on two repeats
    assert (found["repeats"], found["n (positive)"]) == ("2", "58 (18)")
    assert found["AUC of reference"] == f"{auc_of(both['hsl']):.3f}"
    assert found["difference (95 % interval)"].startswith(f"{auc_of(both['hsl']) - auc_of(both['fedavg']):+.3f} (")
    assert rows["hospitals", "<b>&\"south'", "local"]["difference (95 % interval)"] == "not defined"
    tested = sum(row["p"] != "-" for row in rows.values())
    assert tested == 2 * 4 and f"{tested} pairs were tested for auc; p values are not corrected" in text


def test_gaps_and_synthetic_images_are_named(study, files, text):
    assert "25 of 27 runs" in text
    assert "label-skew 9-1 fedavg: no result yet for r1" in text
    assert "label-skew 2-1 local r2 left out: runs/label-skew/2-1/r2/local/results/predictions.csv" in text
    assert str(study.parent) not in text  # a page that travels names no folder of this machine
    assert "images of this study are synthetic" in text
    missing = next(path for path in files if path.name == "missing.csv")
    assert "no result yet for r1" in missing.read_text()


def test_methods_seeds_and_costs_are_told(study, page):
    methods = {row["label"]: row for row in page.table("label", "method", "status")}
    assert methods["hsl"]["status"] == "corrected" and methods["local"]["model under test"] == "each site's own"
    settings = {row["what"]: row["value"] for row in page.table("what", "value")}
    assert settings["seed of each repeat"] == "r0: 0, r1: 1, r2: 2"
    assert setting_told(["a", "a", None]) == "a (2 runs); not recorded (1 run)"
    assert settings["training setting image_size"] == "64" and "version of torch, in the runs" in settings
    done = [json.loads(path.read_text()) for path in study.glob("runs/*/*/*/fedavg/done.json")]
    costs = {row["method"]: row for row in page.table("method", "runs", "hours in all")}
    assert costs["fedavg"]["runs"] == str(len(done)) == "8"
    assert costs["fedavg"]["hours in all"] == f"{sum(one['seconds'] for one in done) / 3600:.2f}"
    assert costs["fedavg"]["peak memory (GiB)"] == f"{max(one['peak_memory_bytes'] for one in done) / 2**30:.2f}"


def test_maps_stand_beside_their_numbers(tmp_path):
    """Real site folders and model files; the site folders also give the bars their whole counts."""
    sites = {"hospitals": {"site-a": (10, 8), "site-b": (9, 9)}}
    folder = fake_study(tmp_path / "s", ("hsl", "fedbn"), ("hospitals",), 1, {}, sites, rounds=2)
    toy_alliance(folder / "data/hospitals/all/r0", 2, counts=(20, 16), anchor=False)
    toy_model(folder / "runs/hospitals/all/r0/hsl/results/best_model.pt")
    files = write_study_report(study_results(folder, resamples=20))
    page = Page(files[-1].read_text())
    assert "hospitals_tsne.svg" in {path.name for path in files}
    before, after = page.table("method", "weights", "sites")
    assert (before["weights"], after["weights"]) == ("before training", "after training")
    assert before["chance"] == "0.500" and before["MMD²"] != after["MMD²"]
    with open(folder / "report/tables/maps.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert f"{float(first['mmd2']):.4f}" == before["MMD²"] and first["points"] == before["images per site"]
    assert "36 (16 positive)" in (folder / "report/figures/hospitals_data.svg").read_text()


def test_a_single_method_is_compared_with_nothing(tmp_path):
    sites = {"hospitals": {"a": (9, 9)}}
    folder = fake_study(tmp_path / "s", ("fedavg",), ("hospitals",), 1, {}, sites, rounds=1)
    files = write_study_report(study_results(folder, resamples=20), tmp_path / "out", maps=False)
    assert "nothing to compare" in files[-1].read_text()
    assert "comparisons.csv" not in {path.name for path in files}


def test_bad_input(study, tmp_path):
    with pytest.raises(UserError, match="holds no study.json"):
        study_results(tmp_path)
    with pytest.raises(UserError, match="no finished run of 'fedavgg': did you mean 'fedavg'"):
        study_results(study, "fedavgg")
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="choose another --out"):
        write_study_report(study_results(study, resamples=2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    empty = fake_study(tmp_path / "empty", ("hsl",), ("hospitals",), 1, {}, SITES, rounds=1)
    shutil.rmtree(empty / "runs")
    with pytest.raises(UserError, match="no finished run to report on: hospitals hsl: no result yet for r0"):
        study_results(empty)


def test_commands(tmp_path, capsys):
    sites = {"hospitals": {"a": (9, 9)}}
    folder = fake_study(tmp_path / "s", ("fedavg", "local"), ("hospitals",), 1, {}, sites, rounds=1)
    assert main(["study", "report", str(folder), "--resamples", "20", "--no-maps", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(folder / "report/index.html") and told["reference"] == "fedavg"
    assert told["pairs_tested"] == 1 and told["runs_finished"] == told["runs_planned"] == 2
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0  # a study is known by its study.json
    assert "1 pairs were tested" in capsys.readouterr().out and (tmp_path / "out/index.html").is_file()
    run = toy_run(tmp_path / "run")
    assert main(["report", str(folder), str(run)]) == 1
    assert "is a study: report on it by itself" in capsys.readouterr().err


def test_terminal_text_has_every_site_and_gap(study):
    shown = report_text(study_results(study, resamples=5))
    assert shown.startswith("25 of 27 runs are finished and readable\n  label-skew 2-1 local r2 left out")
    assert re.search(r"\| label-skew 9-1 \| +n-1 \| +fedavg \| +58 \(18\)", shown)


def test_figures_of_one_page_keep_their_ids_apart(tmp_path):
    _, first = boxes.boxes({"a": {"hsl": [0.5, 0.6]}}, tmp_path / "one")
    _, second = boxes.boxes({"a": {"hsl": [0.5, 0.6]}}, tmp_path / "two")
    page = Page(html.figure(first, "x") + html.figure(second, 'a "quoted" <caption>'))
    assert page.ids and len(page.ids) == len(set(page.ids))
    assert ("svg", "aria-label", 'a "quoted" <caption>') in page.attributes
    (tmp_path / "no.svg").write_text("<svg><g></g></svg>")
    with pytest.raises(ValueError, match="no viewBox"):
        html.figure(tmp_path / "no.svg", "x")


def test_the_page_of_single_runs(tmp_path):
    assert main(["report", str(toy_run(tmp_path / "run")), "--out", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out/index.html").read_text())
    assert page.counts["svg"] == 2 and not page.open
    assert page.table("site")[0]["hsl"] == "0.900 (0.70 to 0.95)"


def test_the_page_says_what_pooled_is_once(text):
    assert text.count("the scores of all repeats ranked together") == 1


def test_unknown_patients_are_told_beside_the_column(study):
    found = study_results(study, resamples=10).comparisons
    assert "no patients are known" not in comparison_table(found)
    without = replace(found, pairs=[pair for pair in found.pairs if pair.unit != "patient"])
    assert comparison_table(without).count("no patients are known") == 1
    assert "no patients are known" not in comparison_table(replace(found, pairs=[]))


def test_anchor_digests_stand_by_repeat_and_runs_without_anchor_are_left_out():
    def rows(*of):
        return _anchor_rows(
            [SimpleNamespace(info={"anchor_digest": digest}, spec=SimpleNamespace(repeat=r)) for r, digest in of]
        )

    assert rows((0, None)) == []
    assert rows((0, "a"), (1, "a"), (1, None)) == [["anchor digest", "a"]]
    assert rows((1, "b"), (0, "a"), (0, "a"), (0, None)) == [
        ["anchor digest (drawn anew for each repeat), r0", "a"],
        ["anchor digest (drawn anew for each repeat), r1", "b"],
    ]
    assert rows((0, "a"), (0, "b")) == [["anchor digest, r0", "a"], ["anchor digest, r0", "b"]]
