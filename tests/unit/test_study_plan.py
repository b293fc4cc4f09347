"""Plans of studies: presets, variants, what makes two runs the same, and everything that can be wrong in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from heterosync.data.splits import split_rows
from heterosync.errors import ProblemList, UserError
from heterosync.study.running.cells import StudyData
from heterosync.study.running.estimate import estimate
from heterosync.study.running.kinds import KINDS
from heterosync.study.running.plan import Plan, plan_of
from heterosync.study.running.plan_file import preset_names, read_plan
from toys import SMOKE, toy_images

PLANS = sorted((Path(__file__).parents[2] / "docs" / "plans").glob("*.yaml"))
BASE = {
    "methods": ["hsl", "fedavg"],
    "scenarios": [{"scenario": "synthetic", "scale": 0.1}],
    "training": dict(SMOKE),
}


def written(folder: Path, **changes) -> Path:
    """A plan file: `BASE` with changes; None takes a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def plan_with(folder: Path, **changes) -> Plan:
    return read_plan(written(folder, **changes))


def specs(plan: Plan) -> list:
    return [spec for _, _, spec in KINDS[plan.task].data(plan).runs()]


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_plans_whose_runs_have_different_names_and_digests(name):
    found = specs(read_plan(name))
    assert len(found) == len({spec.folder("out") for spec in found}) == len({spec.digest for spec in found}) > 4


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_of_the_docs_can_be_read(path):
    assert read_plan(path).name == path.stem


@pytest.mark.parametrize("name", ["comparison", "busi-comparison"])
def test_the_comparison_has_every_method_of_the_paper(name):
    """Hu et al. 2025, Real-world validation and ablations, and swarm learning."""
    classical = {"hsl", "no_sat", "no_al", "central", "local", "fedavg", "fedprox", "fedbn", "splitavg", "personalized"}
    new = {"fedppkt", "fedktl", "fedtp", "adafedprox", "fedrcl", "fedcome", "feddps", "feddys", "clip", "swarm"}
    plan = read_plan(next(path for path in PLANS if path.stem == name))
    assert {entry.method for entry in plan.methods} == classical | new and len(plan.seeds) == 3


def test_the_paper_preset_has_its_scenarios_levels_and_repeats():
    found = specs(read_plan("paper"))
    levels = {name: {spec.level for spec in found if spec.scenario == name} for name in {s.scenario for s in found}}
    assert {len(levels["label-skew"]), len(levels["quantity-skew"])} == {10}
    assert levels["feature-skew"] == levels["hospitals"] == {"all"}
    assert {spec.repeat for spec in found} == {0, 1, 2, 3, 4}
    mixed = [cell for cell in StudyData(read_plan("paper")).cells if cell.entry.name == "combined-non-sat-mix"]
    assert all(cell.anchors_differ for cell in mixed)


def test_a_plan_survives_being_stored(tmp_path):
    plan = plan_with(tmp_path, scenarios=[{"scenario": "B", "levels": [2, 100], "methods": ["hsl"]}], repeats=2)
    assert plan_of(plan.to_dict()) == plan
    assert [spec.level for spec in specs(plan)] == ["2", "2", "100", "100"]
    assert plan.scenarios[0].name == "label-skew"


def test_a_repeat_is_a_seed_of_training_and_data(tmp_path):
    plan = plan_with(tmp_path, seeds=[5, 3])
    assert [(s.repeat, s.settings["training"]["seed"]) for s in specs(plan)] == [(0, 5), (0, 5), (1, 3), (1, 3)]
    assert [cell.seed for cell in StudyData(plan).cells] == [5, 3]


def test_the_digest_follows_what_decides_on_the_result_and_nothing_else(tmp_path):
    def digests(folder: str, **changes) -> list[str]:
        return [spec.digest for spec in specs(plan_with(tmp_path / folder, **changes))]

    plain = digests("a")
    assert digests("b", engine="inprocess", keep=["best"], name="other") == plain
    assert digests("c", repeats=2, methods=["hsl", "fedavg", "local"])[:2] == plain
    changed = digests("d", methods=["hsl", {"method": "fedavg", "settings": {"weighting": "equal"}}])
    assert changed[0] == plain[0] and changed[1] != plain[1]
    for i, other in enumerate(({"seed": 1}, {"scale": 0.2, "scenarios": ["synthetic"]}, {"group": "image"})):
        assert not set(digests(f"e{i}", **other)) & set(plain)


def test_equal_steps_are_those_of_hsl_at_every_site(tmp_path):
    methods = [
        "hsl",
        "fedavg",
        "local",
        "central",
        {"method": "local", "variant": "mmoe", "settings": {"network": "mmoe"}},
    ]
    data = StudyData(plan_with(tmp_path, methods=methods, match_steps="both"))
    runs = {spec.label: (cell, entry, spec) for cell, entry, spec in data.runs()}
    assert list(runs) == [
        *("hsl", "fedavg", "fedavg-equal_steps", "local", "local-equal_steps"),
        *("central", "central-equal_steps", "local-mmoe"),  # with the anchor task its steps are HSL's
    ]
    items = {label: cell.steps(entry, spec) for label, (cell, entry, spec) in runs.items()}
    assert items["fedavg"] == items["local"] == items["central"] < items["hsl"]
    assert {items[label] for label in runs if label.endswith(("equal_steps", "mmoe"))} == {items["hsl"]}
    assert runs["fedavg-equal_steps"][2].variant == "equal_steps"


def test_a_cut_network_takes_the_steps_of_the_largest_site_everywhere(tmp_path):
    (tmp_path / "skewed.csv").write_text("site,negative,positive\na,60,60\nb,10,10\nc,10,10\n")
    changes = {"methods": ["splitavg", "fedavg"], "scenarios": ["skewed.csv"], "scale": 1.0}
    cut, plain = (cell.steps(entry, spec) for cell, entry, spec in StudyData(plan_with(tmp_path, **changes)).runs())
    cell = StudyData(plan_with(tmp_path, **changes)).cells[0]
    assert cut * sum(cell.images(site)[0] for site in "abc") == plain * 3 * cell.images("a")[0]


def test_switches_for_all_runs_or_beside_them(tmp_path):
    both = {s.label: s.settings["training"] for s in specs(plan_with(tmp_path, balanced_sampler="both"))}
    assert list(both) == ["hsl", "hsl-unbalanced", "fedavg", "fedavg-unbalanced"]
    assert both["hsl-unbalanced"]["balanced_sampler"] is False and "balanced_sampler" not in both["hsl"]
    off = specs(plan_with(tmp_path, balanced_sampler=False, match_steps=True))
    assert [s.label for s in off] == ["hsl", "fedavg"]
    assert all(s.settings["training"]["balanced_sampler"] is False for s in off)
    assert [s.settings["training"].get("match_steps") for s in off] == [None, 200]


def test_precision_is_one_for_all_runs(tmp_path):
    training = {key: value for key, value in SMOKE.items() if key != "precision"}
    assert {s.settings["training"]["precision"] for s in specs(plan_with(tmp_path, training=training))} == {"float32"}


def test_planned_sizes_are_those_of_the_splits(tmp_path):
    (cell, *_) = StudyData(plan_with(tmp_path)).cells
    for site in cell.sites:
        rows = [row for row in cell.table if row.site == site]
        labels = [0] * sum(row.negative for row in rows) + [1] * sum(row.positive for row in rows)
        assert [len(part) for part in split_rows(labels, None, 0).values()] == list(cell.images(site))


def test_the_estimate_grows_with_the_work(tmp_path):
    data = StudyData(plan_with(tmp_path, methods=["fedavg"], scenarios=[BASE["scenarios"][0], "synthetic"][:1]))
    longer = StudyData(plan_with(tmp_path / "b", methods=["fedavg"], training={**SMOKE, "rounds": 2000}))
    (short,), (long,) = (estimate(each.runs(), "inprocess", each.timed) for each in (data, longer))
    assert 0 < short < long


def test_tables_and_sources_are_found_beside_the_plan(tmp_path, monkeypatch):
    labels = np.repeat([0, 1], 12)
    np.savez(tmp_path / "pool.npz", images=toy_images(labels, 0), labels=labels)
    (tmp_path / "mine.csv").write_text("site,negative,positive\na,6,6\nb,6,6\n")
    (tmp_path / "b" / "combined").mkdir(parents=True)  # no table: the one of that name comes with heterosync
    source = {"path": "pool.npz", "negative": "0", "positive": "1"}
    plan = plan_with(tmp_path, scenarios=["mine.csv"], source=source, methods=["fedavg"])
    assert [cell.name for cell in StudyData(plan_with(tmp_path / "b", scenarios=["D"])).cells] == ["combined r0"]
    monkeypatch.chdir("/")
    data = StudyData(plan)
    assert data.cells[0].sites == ["a", "b"] and not data.problems(tmp_path / "out")


def test_images_are_known_by_their_content_not_by_their_path(tmp_path):
    def digest(folder: str, source: str, grey: int) -> str:
        labels = np.repeat([0, 1], 12)
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / source, images=np.full((24, 32, 32), grey, np.uint8), labels=labels)
        (tmp_path / folder / "mine.csv").write_text("site,negative,positive\na,6,6\nb,6,6\n")
        named = {"path": source, "negative": "0", "positive": "1"}
        plan = plan_with(tmp_path / folder, scenarios=["mine.csv"], source=named, methods=["fedavg"])
        return specs(plan)[0].digest

    first = digest("a", "pool.npz", 7)
    assert digest("b", "renamed.npz", 7) == first and digest("c", "pool.npz", 8) != first


WRONG = {
    "no list of methods": ({"methods": "hsl"}, "methods must be a list"),
    "no scenarios": ({"scenarios": None}, "scenarios must be a list"),
    "an unknown key": ({"repeat": 3}, "'repeat'", "did you mean 'repeats'"),
    "an unknown method": ({"methods": ["fedvag"]}, "no method 'fedvag'", "did you mean 'fedavg'"),
    "a stand-in under the name of what it stands for": (
        {"methods": ["hsl", {"method": "clip", "settings": {"clip_model": "stand-in"}}]},
        "method clip: 'Stand-in for CLIP features' must not pass for it in a table: give it variant: stand-in",
    ),
    "a method of another task": (
        {"methods": ["prostate_ahnet"]},
        "method prostate_ahnet",
        "segmentation",
        "leave it out",
    ),
    "an unknown scenario": ({"scenarios": ["lable-skew"]}, "'lable-skew'", "did you mean 'label-skew'"),
    "an unknown level": ({"scenarios": [{"scenario": "B", "levels": [101]}]}, "no level '101'", "did you mean"),
    "a level of a scenario without": ({"scenarios": [{"scenario": "D", "levels": [2]}]}, "has no levels"),
    "a level twice": ({"scenarios": [{"scenario": "B", "levels": [2, 2]}]}, "named twice"),
    "a method twice": ({"methods": ["hsl", "hsl"]}, "method 'hsl' is there twice", "variant"),
    "a scenario twice": ({"scenarios": ["D", "combined"]}, "scenario 'combined' is there twice", "name"),
    "a scenario with an unknown label": (
        {"scenarios": [{"scenario": "D", "methods": ["fedavgg"]}]},
        "runs method 'fedavgg'",
        "did you mean 'fedavg'",
    ),
    "an unknown engine": ({"engine": "flair"}, "engine is 'flair'", "did you mean 'flare'"),
    "an unknown setting": ({"training": {"round": 3}}, "'round' is unknown", "did you mean 'rounds'"),
    "a bad setting of a method": ({"methods": [{"method": "fedprox", "settings": {"mu": -1}}]}, "fedprox", "mu"),
    "a seed in training": ({"training": {**SMOKE, "seed": 3}}, "leave out seed"),
    "seeds and repeats": ({"seeds": [1, 2], "repeats": 2}, "leave out repeats"),
    "seeds twice": ({"seeds": [1, 1]}, "different whole numbers"),
    "no repeats": ({"repeats": 0}, "whole number from 1"),
    "steps twice": ({"training": {**SMOKE, "match_steps": 9}, "match_steps": "both"}, "leave one out"),
    "sampler twice": ({"training": {**SMOKE, "balanced_sampler": True}, "balanced_sampler": False}, "leave one out"),
    "a switch's own name": (
        {"methods": [{"method": "fedavg", "variant": "equal_steps"}]},
        "the name that a switch gives",
    ),
    "no anchor for hsl": ({"source": {"path": "x.npz"}}, "hsl needs an anchor pack", "synthetic"),
    "no anchor to count by": (
        {"source": {"path": "x.npz"}, "methods": ["fedavg"], "match_steps": "both"},
        "match_steps",
        "name an anchor",
    ),
    "an anchor's sources that nobody reads": (
        {"anchor": {"table": "sat-rsna", "sources": {"rsna": "x"}}},
        "would not be read",
        "leave out sources",
    ),
    "an unknown control of the anchor": (
        {"anchor": {"kind": "synthetic", "control": "noise_pixel"}},
        "anchor, control is 'noise_pixel'",
        "did you mean 'noise_pixels'",
    ),
    "a scale of zero": ({"scale": 0}, "number above 0"),
    "an unknown key of the source": ({"source": {"path": "x", "posative": "1"}}, "did you mean 'positive'"),
    "a source without path": ({"source": {"negative": "a"}}, "names no path"),
    "domains of synthetic images": ({"scenarios": [{"scenario": "D", "any_domain": True}]}, "leave out any_domain"),
    "an unknown thing to keep": ({"keep": ["bests"]}, "did you mean 'best'"),
    "a folder name with a slash": ({"name": "a/b"}, "use letters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_with_a_remedy(name, tmp_path):
    changes, *parts = WRONG[name]
    path = written(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        read_plan(path)
    (line,) = [line for line in str(error.value).splitlines() if all(part in line for part in parts)]
    assert line.startswith(str(path))


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(ProblemList) as error:
        plan_with(tmp_path, methods=["fedvag", "hls"], scale=-1, engine="x", repeat=2)
    assert len(error.value.problems) == 5


@pytest.mark.parametrize(
    ("text", "part"),
    [("- a\n- b\n", "a plan is a table"), ("methods: [a\nscenarios: b", "line 2: not readable YAML"), ("", "a table")],
)
def test_a_file_that_is_no_plan(text, part, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=part):
        read_plan(tmp_path / "p.yaml")


def test_an_unknown_preset_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean 'paper'"):
        read_plan("papr")


def test_impossible_counts_are_told_for_every_scenario_before_anything_is_written(tmp_path):
    labels = np.repeat([0, 1], [30, 12])
    np.savez(tmp_path / "pool.npz", images=toy_images(labels, 0), labels=np.array(["no", "yes"])[labels])
    (tmp_path / "a.csv").write_text("site,negative,positive\none,10,10\ntwo,10,10\n")
    (tmp_path / "b.csv").write_text("site,negative,positive\none,40,3\ntwo,3,3\n")
    plan = plan_with(
        tmp_path,
        source={"path": "pool.npz", "negative": "no", "positive": "yes"},
        methods=["fedavg"],
        scenarios=["a.csv", "b.csv"],
        repeats=2,
    )
    problems = StudyData(plan).problems(tmp_path / "out")
    assert len(problems) == 3 and not (tmp_path / "out").exists()
    assert "scenario a: two: 10 images with label 'yes' wanted, 2 left in pool.npz: short by 8" in problems[0]
    assert "scenario b: one: 40 images with label 'no' wanted, 30 left in pool.npz: short by 10" in problems[1]


def test_anchors_of_different_size_have_no_equal_steps(tmp_path):
    changes = {"scenarios": ["combined"], "scale": 0.01, "anchor": {"table": "non-sat-mix"}, "match_steps": "both"}
    with pytest.raises(UserError, match="anchor packs differ in size"):
        StudyData(plan_with(tmp_path, **changes))
    only = {"scenarios": [{"scenario": "combined", "methods": ["hsl"]}]}  # nothing there would get other steps
    assert [spec.label for spec in specs(plan_with(tmp_path, **{**changes, **only}))] == ["hsl"]


def test_a_scenario_without_anchor_needs_one_only_for_what_runs_in_it(tmp_path):
    changes = {"source": {"path": "x.npz"}, "match_steps": True}
    without = {"scenario": "combined", "any_domain": True}
    anchored = {"scenario": "combined", "name": "b", "anchor": "pack"}
    plan_with(tmp_path, methods=["hsl"], scenarios=[anchored], **changes)
    with pytest.raises(UserError, match="match_steps counts HSL's steps, and scenario combined has no anchor"):
        plan_with(tmp_path, scenarios=[{**without, "methods": ["fedavg"]}, anchored], **changes)
    plan_with(tmp_path, scenarios=[{**without, "methods": ["fedavg"]}, anchored], source={"path": "x.npz"})


def test_a_misspelt_plan_file_gets_the_near_one_beside_it(tmp_path):
    (tmp_path / "thesis.yaml").write_text("")
    for name in ("tehsis.yaml", "thesis.yml"):
        with pytest.raises(UserError, match=f"did you mean '{tmp_path}/thesis.yaml'\\? presets: demo, "):
            read_plan(tmp_path / name)
    with pytest.raises(UserError, match="did you mean 'demo'"):
        read_plan("dmeo")
