"""A study folder read back: outcomes, problems, summaries, comparisons, CSV tables."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from heterosync.errors import UserError
from heterosync.study.evidence.comparisons import compare
from heterosync.study.evidence.measures import MEAN_OF_MODELS, MEAN_PROBABILITY, measurements, summaries
from heterosync.study.evidence.outcomes import by_series, read_study, sites_of
from heterosync.study.evidence.statistics import paired_bootstrap
from heterosync.study.evidence.tables import write_tables
from heterosync.study.layout import UNSEEN, read_done, read_predictions, write_done
from study_data import fake_study

TOY = {
    "combined": {"clinic": (9, 9), "rare": (30, 2), "none": (12, 0)},
    "hospitals": {"gxfy": (12, 10), "sysu": (14, 14), "unseen": (8, 20)},
    "label-skew": {"node-1": (10, 10), "node-2": (20, 4)},
}
METHODS = ("hsl", "fedavg", "local")


@pytest.fixture
def study(tmp_path):
    return fake_study(
        tmp_path / "study", METHODS, tuple(TOY), repeats=2, sites=TOY, levels={"label-skew": ("10", "20:80")}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Read only."""
    return fake_study(tmp_path_factory.mktemp("whole") / "study", METHODS, ("combined", "hospitals"), 2, sites=TOY)


def run(study, name: str):
    folder = study / "runs" / name
    assert folder.is_dir()
    return folder


def predictions(study, name: str) -> list[dict[str, str]]:
    with (run(study, name) / "results" / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def edit_predictions(study, name: str, change) -> None:
    path = run(study, name) / "results" / "predictions.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def only_problem(study, runs: int) -> str:
    """The one problem of a study in which `runs` of 24 are still readable."""
    found = read_study(study)
    assert len(found.outcomes) == runs
    (problem,) = found.problems
    assert "\n" not in problem
    return problem


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_finished_study_is_read_in_the_order_of_its_plan(study):
    found = read_study(study)
    assert found.problems == []
    assert found.plan["name"] == "toy" and found.info["versions"] == {"heterosync": "0.0", "torch": "2.0"}
    series = by_series(found)
    assert list(series) == [("combined", "all"), ("hospitals", "all"), ("label-skew", "10"), ("label-skew", "20-80")]
    assert list(series["combined", "all"]) == list(METHODS)
    assert list(series["combined", "all"]["hsl"]) == [0, 1]
    one = series["combined", "all"]["fedavg"][1]
    rows = [row for row in predictions(study, "combined/all/r1/fedavg") if row["site"] == "rare"]
    scores = one.scores["rare"]
    assert list(scores.ids) == [row["id"] for row in rows] and list(scores.patients) == [row["patient"] for row in rows]
    assert list(scores.labels) == [int(row["label"]) for row in rows]
    assert list(scores.scores) == [float(row["probability"]) for row in rows]
    assert one.tests["rare"]["n_positive"] == 2 and one.cost["engine"] == "inprocess" and one.cost["seconds"] > 60
    assert one.info["status"] == "completed" and {"train_loss", "val_auc_received"} <= {row[2] for row in one.history}


def test_the_unseen_population_is_kept_by_model(study):
    series = by_series(read_study(study))["hospitals", "all"]
    assert list(series["hsl"][0].unseen) == ["best"] and not series["hsl"][0].personal
    assert list(series["local"][0].unseen) == ["site:gxfy", "site:sysu"] and series["local"][0].personal
    assert sites_of(series) == ["gxfy", "sysu", UNSEEN]


def test_missing_running_and_failed_runs_are_named(study):
    for repeat in ("r0", "r1"):
        (run(study, f"label-skew/20-80/{repeat}/local") / "done.json").unlink()
    failed = run(study, "combined/all/r1/hsl")
    (failed / "done.json").unlink()
    (failed / "failed.json").write_text(json.dumps({"cause": "the disk is full", "failed": "now"}))
    found = read_study(study)
    assert len(found.outcomes) == 21
    assert found.problems[0] == "combined hsl r1 left out: it failed: the disk is full"
    assert found.problems[1].startswith("label-skew 20-80 local: no result yet for r0, r1:")


def test_a_study_whose_runs_have_not_begun_has_no_outcome(study):
    for path in (study / "runs").rglob("done.json"):
        path.unlink()
    found = read_study(study)
    assert found.outcomes == [] and len(found.problems) == 12


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda lines: [*lines[:4], lines[4].replace(",0.", ",x."), *lines[5:]], "line 5: probability 'x."),
        (lambda lines: [*lines[:4], "clinic,a,,2,0.5,best", *lines[5:]], "line 5: label '2'"),
        (lambda lines: [*lines[:4], lines[4][:9], *lines[5:]], "line 5: "),
        (lambda lines: [lines[0].replace("patient", "person"), *lines[1:]], "the header must be"),
        (lambda lines: lines[:-3], "9 cases of none, 0 positive, but the run tested n 12, n_positive 0"),
        (lambda lines: [*lines, lines[-1]], "stands there twice for model best"),
        (lambda lines: [*lines, lines[-1].replace(",best", ",last")], "site none is scored by more than one model"),
        (
            lambda lines: [line.replace("none,", "unseen,").replace(",best", ",other") for line in lines],
            "model 'other'",
        ),
        (lambda lines: [], "the file is empty"),
    ],
)
def test_damaged_predictions_are_named_and_the_rest_goes_on(study, change, told):
    edit_predictions(study, "combined/all/r0/fedavg", change)
    problem = only_problem(study, 23)
    assert problem.startswith("combined fedavg r0 left out: ") and "predictions.csv" in problem and told in problem


def test_lost_rows_of_the_unseen_population_are_noticed(study):
    folder = run(study, "hospitals/all/r0/fedavg")
    rows = len(read_predictions(folder / "results"))
    write_done(folder, replace(read_done(folder), rows=rows))
    edit_predictions(study, "hospitals/all/r0/fedavg", lambda lines: lines[:-2])  # the unseen ones stand last
    assert f"has {rows - 2} rows, the run wrote {rows}: the file is truncated" in only_problem(study, 23)


def test_many_damaged_rows_are_told_in_few_lines(study):
    edit_predictions(study, "combined/all/r0/fedavg", lambda lines: [line.replace(",best", ",") for line in lines])
    found = read_study(study)
    assert len(found.outcomes) == 23 and len(found.problems) == 4
    assert found.problems[-1].endswith("and 59 more such lines")


@pytest.mark.parametrize("name", ["predictions.csv", "run.json"])
def test_a_lost_result_file_is_named(study, name):
    (run(study, "combined/all/r0/fedavg") / "results" / name).unlink()
    assert name in only_problem(study, 23)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("done.json", "{"),
        ("done.json", "{}"),
        ("run_spec.json", "[]"),
        ("results/run.json", "[]"),
        ("results/cross_site_metrics.json", '{"best": 3}'),
        ("results/history.csv", "round,site,metric,value\n0,a,b\n"),
    ],
)
def test_damaged_records_are_named(study, name, text):
    (run(study, "combined/all/r0/fedavg") / name).write_text(text)
    assert name in only_problem(study, 23)


@pytest.mark.parametrize(
    "change",
    [{"digest": "another"}, {"repeat": 1}, {"label": "hsl"}],
)
def test_a_run_of_another_plan_is_refused(study, change):
    path = run(study, "combined/all/r0/fedavg") / "run_spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert "holds a run of another plan: remove it" in only_problem(study, 23)


def test_results_that_were_made_for_another_plan_are_refused(study):
    path = run(study, "combined/all/r0/fedavg") / "done.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": "another"}))
    assert "holds a run of another plan: remove it" in only_problem(study, 23)


def test_a_run_that_the_plan_does_not_know_is_left_out(study):
    path = study / "study.json"
    info = json.loads(path.read_text())
    del info["runs"]["runs/combined/all/r0/fedavg"]
    path.write_text(json.dumps(info))
    assert only_problem(study, 23).endswith("runs/combined/all/r0/fedavg is of another plan: left out")


@pytest.mark.parametrize(
    "text", ["[]", '{"plan": {}}', '{"plan": {}, "runs": []}', '{"plan": {}, "runs": {"a/b": ""}}']
)
def test_a_damaged_study_is_refused(study, text):
    (study / "study.json").write_text(text)
    with pytest.raises(UserError, match="study.json is damaged.*run `heterosync study run` again"):
        read_study(study)


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no study.json: name the folder"):
        read_study(tmp_path)


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_measurements_are_the_metrics_of_the_predictions(whole):
    found = {(m.spec.name, m.site, m.model): m.values for m in measurements(read_study(whole))}
    for name, folder in (
        ("combined r0 hsl", "combined/all/r0/hsl"),
        ("hospitals r1 fedavg", "hospitals/all/r1/fedavg"),
    ):
        rows = read_predictions(run(whole, folder) / "results")
        for site in {row.site for row in rows} - {"none"}:
            of_site = [(row.label, row.probability) for row in rows if row.site == site]
            assert found[name, site, "best"]["auc"] == pytest.approx(roc_auc_score(*zip(*of_site, strict=True)))
    assert ("hospitals r0 local", "sysu", "site:sysu") in found


def test_a_site_without_positives_keeps_its_other_numbers(whole):
    study = read_study(whole)
    none = next(m for m in measurements(study) if m.site == "none")
    assert (none.values["auc"], none.values["recall"], none.values["n"], none.values["n_positive"]) == (
        None,
        None,
        12,
        0,
    )
    assert none.values["accuracy"] is not None
    summary = {s.metric: s for s in summaries(study, resamples=50) if (s.site, s.label) == ("none", "hsl")}
    assert (summary["auc"].mean, summary["auc"].defined, summary["auc"].pooled.estimate) == (None, 0, None)
    assert (summary["auc"].n, summary["auc"].n_positive, summary["accuracy"].defined) == (24, 0, 2)


def test_the_sites_models_on_the_unseen_population(whole):
    of_local = [m for m in measurements(read_study(whole)) if m.site == UNSEEN and m.spec.name == "hospitals r0 local"]
    assert [m.model for m in of_local] == ["site:gxfy", "site:sysu", MEAN_OF_MODELS, MEAN_PROBABILITY]
    values = [m.values["auc"] for m in of_local]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2)
    rows = [row for row in read_predictions(run(whole, "hospitals/all/r0/local") / "results") if row.site == UNSEEN]
    labels = {row.id: row.label for row in rows}
    means = {case: np.mean([row.probability for row in rows if row.id == case]) for case in labels}
    assert values[3] == pytest.approx(roc_auc_score([labels[case] for case in means], list(means.values())))


def test_summaries_hold_the_repeats_and_the_pool(whole):
    study = read_study(whole)
    found = {(s.site, s.label, s.metric): s for s in summaries(study, resamples=100)}
    one = found["clinic", "fedavg", "auc"]
    runs = by_series(study)["combined", "all"]["fedavg"]
    each = [roc_auc_score(runs[r].scores["clinic"].labels, runs[r].scores["clinic"].scores) for r in (0, 1)]
    assert list(one.values.values()) == pytest.approx(each) and one.mean == pytest.approx(np.mean(each))
    assert one.sd == pytest.approx(np.std(each, ddof=1)) and one.defined == 2
    pooled = [
        np.concatenate([getattr(runs[r].scores["clinic"], name) for r in (0, 1)]) for name in ("labels", "scores")
    ]
    assert one.pooled.estimate == pytest.approx(roc_auc_score(*pooled))
    assert one.pooled.low < one.pooled.estimate < one.pooled.high and one.n == 36
    unseen = found[UNSEEN, "local", "auc"]
    assert len(unseen.values) == 2 and unseen.n == 56  # one value per repeat, the mean over the sites' models


# -- comparisons -------------------------------------------------------------------------------------------------------


def pair_of(comparisons, **wanted):
    (found,) = [p for p in comparisons.pairs if all(getattr(p, name) == value for name, value in wanted.items())]
    return found


def test_a_pair_is_the_paired_bootstrap_of_its_pooled_repeats(whole):
    study = read_study(whole)
    found = pair_of(compare(study, resamples=200), site="rare", label="local", metric="auc", unit="case")
    rows = {}
    for label in ("hsl", "local"):
        each = [read_predictions(run(whole, f"combined/all/{r}/{label}") / "results") for r in ("r0", "r1")]
        rows[label] = [row for part in each for row in sorted(part, key=lambda row: row.id) if row.site == "rare"]
    assert [row.id for row in rows["hsl"]] == [row.id for row in rows["local"]]
    labels = np.array([row.label for row in rows["hsl"]])
    scores = [np.array([row.probability for row in rows[label]]) for label in ("hsl", "local")]
    assert found.comparison == paired_bootstrap(labels, *scores, resamples=200)
    assert found.comparison.redraw_rate > 0 and found.comparison.n_positive == 4
    assert (found.reference, found.repeats, found.models, found.left_out) == ("hsl", (0, 1), (1, 1), ())


def test_images_and_patients_are_drawn_whole(whole):
    found = compare(read_study(whole), metrics=("auc",), resamples=50)
    units = {u: pair_of(found, site="rare", label="local", unit=u).comparison for u in ("case", "image", "patient")}
    ids = [
        row["id"] for r in ("r0", "r1") for row in predictions(whole, f"combined/all/{r}/hsl") if row["site"] == "rare"
    ]
    assert (units["case"].units, units["image"].units, units["patient"].units) == (64, len(set(ids)), 11)
    assert len(set(ids)) < 64 and units["patient"].positive_units == 1  # both positives are one patient's


def test_all_metrics_units_and_sites_are_compared(whole):
    found = compare(read_study(whole), resamples=20)
    assert len(found.pairs) == 6 * 2 * 4 * 3  # sites, methods, metrics, units
    assert found.tested() == 10  # `none` has no AUC
    assert found.tested("accuracy") == 12
    assert found.note().startswith("10 pairs were tested for auc; p values are not corrected for their number")
    none = pair_of(found, site="none", label="local", metric="auc", unit="case").comparison
    assert (none.p, none.difference, none.n, none.n_positive) == (None, None, 24, 0)


def test_the_unseen_population_compares_the_mean_over_models(whole):
    found = compare(read_study(whole), metrics=("auc",), units=("case",), resamples=20)
    pair = pair_of(found, site=UNSEEN, label="local")
    series = by_series(read_study(whole))["hospitals", "all"]["local"]
    pooled = []
    for model in ("site:gxfy", "site:sysu"):
        parts = [series[r].unseen[model] for r in (0, 1)]
        pooled.append(roc_auc_score(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("labels", "scores"))))
    assert pair.models == (1, 2)
    assert pair.comparison.estimate_b == pytest.approx(np.mean(pooled))


def test_the_order_of_methods_and_rows_changes_nothing(study):
    before = {
        (p.scenario, p.level, p.site, p.label): p.comparison for p in compare(read_study(study), metrics=("auc",)).pairs
    }
    path = study / "study.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "runs": dict(reversed(info["runs"].items()))}))
    for name in ("combined/all/r0/fedavg", "combined/all/r1/hsl"):
        edit_predictions(study, name, lambda lines: [lines[0], *reversed(lines[1:])])
    after = {
        (p.scenario, p.level, p.site, p.label): p.comparison for p in compare(read_study(study), metrics=("auc",)).pairs
    }
    assert after == before


def test_a_pair_uses_only_what_both_have(study):
    (run(study, "combined/all/r1/fedavg") / "done.json").unlink()
    edited = run(study, "combined/all/r0/local") / "results"
    rows = read_predictions(edited)
    dropped = next(row.id for row in rows if row.site == "clinic")
    lines = [line for line in (edited / "predictions.csv").read_text().splitlines() if f",{dropped}," not in line]
    (edited / "predictions.csv").write_text("\n".join(lines) + "\n")
    (edited / "cross_site_metrics.json").write_text("{}")  # its site tested one image less
    found = compare(read_study(study), metrics=("auc",), units=("case",), resamples=20)
    fedavg = pair_of(found, scenario="combined", site="rare", label="fedavg")
    assert (fedavg.repeats, fedavg.comparison.n, fedavg.left_out) == ((0,), 32, ("1 repeat (r1) not in all",))
    local = pair_of(found, scenario="combined", site="clinic", label="local")
    assert (local.repeats, local.comparison.n) == ((0, 1), 35)
    told = f"combined all clinic: hsl and local: r0: 1 case ({dropped}) not in all, left out"
    assert local.left_out == (f"r0: 1 case ({dropped}) not in all",) and told in found.problems


def test_nothing_in_common_is_refused_in_one_line(study):
    for repeat, label in (("r0", "hsl"), ("r1", "fedavg")):
        (run(study, f"combined/all/{repeat}/{label}") / "done.json").unlink()
    found = compare(read_study(study), metrics=("auc",), units=("case",), resamples=5)
    assert not [p for p in found.pairs if (p.scenario, p.label) == ("combined", "fedavg")]
    assert (
        "combined all rare: hsl and fedavg: not compared, no case was scored by both in the same repeat"
        in found.problems
    )


def test_a_level_without_the_reference_is_named(study):
    for repeat in ("r0", "r1"):
        (run(study, f"label-skew/10/{repeat}/hsl") / "done.json").unlink()
    found = compare(read_study(study), metrics=("auc",), units=("case",), resamples=5)
    assert found.problems == ["label-skew 10: no finished run of 'hsl', nothing is compared there"]
    assert {p.level for p in found.pairs if p.scenario == "label-skew"} == {"20-80"}


def test_an_unknown_reference_is_refused(whole):
    with pytest.raises(UserError, match="no finished run of 'fedavgg' to compare with: did you mean 'fedavg'"):
        compare(read_study(whole), reference="fedavgg")


def test_another_method_can_be_the_reference(whole):
    found = compare(read_study(whole), "local", ("auc",), ("case",), resamples=20)
    assert {p.label for p in found.pairs} == {"hsl", "fedavg"} and {p.reference for p in found.pairs} == {"local"}


def test_patients_that_nobody_knows_are_not_drawn(study):
    for path in study.rglob("predictions.csv"):
        header, *rows = path.read_text().splitlines()
        cells = [row.split(",") for row in rows]
        path.write_text("\n".join([header, *(",".join([c[0], c[1], "", *c[3:]]) for c in cells)]) + "\n")
    found = compare(read_study(study), metrics=("auc",), resamples=5)
    assert {p.unit for p in found.pairs} == {"case", "image"}


# -- CSV ---------------------------------------------------------------------------------------------------------------


def test_tables_hold_every_number(whole, tmp_path):
    study = read_study(whole)
    measured, summed, compared = measurements(study), summaries(study, resamples=20), compare(study, resamples=20)
    files = write_tables(study, measured, summed, compared, tmp_path)
    assert [path.name for path in files] == ["metrics.csv", "summary.csv", "costs.csv", "comparisons.csv"]
    tables = {}
    for path in files:
        with path.open(newline="") as file:
            tables[path.stem] = list(csv.DictReader(file))
        assert all(None not in row and None not in row.values() for row in tables[path.stem])  # no ragged row
    assert [len(tables[name]) for name in tables] == [len(measured), len(summed), 12, len(compared.pairs)]
    none = next(row for row in tables["metrics"] if row["site"] == "none")
    assert (none["auc"], none["n"], none["n_positive"], none["model"]) == ("", "12", "0", "best")
    first, pair = tables["comparisons"][0], compared.pairs[0]
    assert float(first["reference_minus_label"]) == pair.comparison.difference
    assert float(first["p_uncorrected"]) == pair.comparison.p and first["repeats"] == "r0 r1"
    assert int(first["resamples"]) == 20 and int(first["pairs_tested"]) == compared.tested() and first["unit"] == "case"
    row, one = tables["summary"][0], summed[0]
    assert (float(row["mean"]), float(row["sd"]), float(row["ci_low"])) == (one.mean, one.sd, one.pooled.low)
    cost = tables["costs"][0]
    assert float(cost["seconds"]) == study.outcomes[0].cost["seconds"] and cost["engine"] == "inprocess"


def test_tables_without_a_comparison(whole, tmp_path):
    files = write_tables(read_study(whole), [], [], None, tmp_path)
    assert [path.name for path in files] == ["metrics.csv", "summary.csv", "costs.csv"]
