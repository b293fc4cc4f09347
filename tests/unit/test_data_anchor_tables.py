"""Anchor tables: one pack for all sites, or the mix of different ones; and their command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from heterosync.cli import main
from heterosync.data.anchor import inspect_anchor, read_anchor_info
from heterosync.data.anchor_tables import (
    anchor_table_names,
    anchors_of_sites,
    read_anchor_table,
    sources_from,
    write_anchors,
)
from heterosync.data.scenario_check import check_scenario
from heterosync.data.scenario_tables import read_table
from heterosync.errors import UserError

MIX = ["screening-centre", "specialised-hospital", "clinic-1", "clinic-2", "rare-disease-region"]


def test_the_tables_of_the_paper() -> None:
    assert anchor_table_names() == ["non-sat-mix", "sat-bus-bra", "sat-cifar10", "sat-rsna"]
    for name, source, counts in (("rsna", "rsna", 1000), ("cifar10", "cifar10", 500), ("bus-bra", "bus-bra", 500)):
        rows = anchors_of_sites(read_anchor_table(f"sat-{name}"), ["a", "b"])
        assert rows["a"] == rows["b"] and (rows["a"].source, rows["a"].counts) == (source, (counts, counts))
    mix = anchors_of_sites(read_anchor_table("non-sat-mix"), [row.site for row in read_table("combined")])
    assert [(mix[site].source, mix[site].counts) for site in MIX] == [
        ("rsna", (1000, 1000)),
        ("rsna", (1000, 1)),
        ("rsna", (1, 1000)),
        ("bus-bra", (500, 500)),
        ("cifar10", (500, 500)),
    ]
    assert anchors_of_sites(read_anchor_table("non-sat-mix"), MIX, 0.01)["specialised-hospital"].counts == (10, 1)
    with pytest.raises(UserError, match="site 'site-hand' has no row in the anchor table, which has screening-centre"):
        anchors_of_sites(read_anchor_table("non-sat-mix"), ["site-hand"])


def pack(folder: Path, seed: int, counts: tuple[int, int], size: int = 12) -> Path:
    """A stand-in for a public set, as npz with the labels that the anchor table names."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{seed}.npz"
    n = sum(counts)
    images = np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8)
    np.savez(file, images=images, labels=np.repeat(["off", "on"], counts))
    return file


def table(file: Path, *rows: str) -> Path:
    file.write_text("\n".join(["site,source,negative_label,positive_label,negative,positive", *rows]) + "\n")
    return file


def test_a_mix_of_packs_and_their_size(tmp_path: Path) -> None:
    mix = table(tmp_path / "mix.csv", "a,one,off,on,4,1", "b,one,off,on,4,1", "c,two,off,on,3,3")
    rows = anchors_of_sites(read_anchor_table(mix), ["a", "b", "c"])
    paths = {"one": pack(tmp_path, 1, (6, 6)), "two": pack(tmp_path, 2, (6, 6))}
    packs = write_anchors(rows, tmp_path / "packs", sources_from(rows.values(), paths), seed=3, size=8)
    assert packs["a"] == packs["b"] != packs["c"]
    info = read_anchor_info(packs["a"])
    assert (info.n, info.balanced, info.labels) == (5, False, ("off", "on")) and inspect_anchor(packs["a"], 8)[1] == []
    assert np.load(packs["c"] / "anchor.npz")["images"].shape == (6, 8, 8) and read_anchor_info(packs["c"]).balanced


def run(*words: object) -> int:
    return main(["data", *[str(word) for word in words]])


def test_scenario_with_a_mix_on_synthetic_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ("scenario", "combined", "synthetic", "--sat", "non-sat-mix", "--scale", 0.01, "--image-size", 16)
    assert run(*words, "--out", out) == 0
    assert "specialised-hospital, anchor task: synthetic chest/G for rsna, 10 Normal, 1 Lung" in capsys.readouterr().out
    digests = {site: json.loads((out / site / "anchor" / "anchor.json").read_text())["digest"] for site in MIX}
    assert len(set(digests.values())) == 5
    assert run("check", out) == 0
    text = capsys.readouterr().out
    assert "rare-disease-region: train 89 (4 positive), validation 15 (1 positive), test 45 (2 positive)" in text
    assert check_scenario(out).digest in text
    for site in MIX[1:]:  # all the same now, where the record says that they differ
        for name in ("anchor.npz", "anchor.json"):
            (out / site / "anchor" / name).write_bytes((out / MIX[0] / "anchor" / name).read_bytes())
    assert run("check", out, "--json") == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert problems == ["the sites' anchor packs are all the same, but the scenario gives them different ones"]


def test_the_check_of_equal_anchors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        words = ("scenario", "feature-skew", "synthetic", "--sat", "sat-rsna", "--scale", 0.01, "--image-size", 16)
        assert run(*words, "--seed", seed, "--out", tmp_path / str(seed)) == 0
    assert run("check", tmp_path / "0") == 0
    site, other = (tmp_path / str(seed) / "site-hand" for seed in (0, 1))
    for name in ("anchor.npz", "anchor.json"):
        (site / "anchor" / name).write_bytes((other / "anchor" / name).read_bytes())
    capsys.readouterr()
    assert run("check", tmp_path / "0") == 1
    assert "the sites' anchor packs differ: give every site the same copy" in capsys.readouterr().out
    with np.load(tmp_path / "0" / "site-elbow" / "anchor" / "anchor.npz") as anchor:
        picture = anchor["images"][0]
    images = dict(np.load(other / "images.npz"))
    images["images"][0] = picture  # the pack of another site
    np.savez(tmp_path / "0" / "site-hand" / "images.npz", **images)
    assert any(
        line == "1 images of site-hand are in the anchor pack of site-elbow: they must differ"
        for line in check_scenario(tmp_path / "0").problems
    )


def test_plan_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    assert run("scenario", "quantity-skew", "synthetic", "--level", 80, "--plan", "--out", tmp_path / "o") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "synthetic: 8678 images, 4339 intact, 4339 fracture",
        "node-1, shoulder: 54 intact, 53 fracture",
    ]
    assert "node-1, test: 31 images: 16 intact, 15 fracture" in lines and sorted(tmp_path.iterdir()) == before


def test_a_collection_without_domains_and_images_as_the_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    labels, patients = np.arange(200) % 2, np.array([f"p{i // 4}" for i in range(200)])
    np.savez(tmp_path / "my.npz", images=images, labels=labels, patients=patients)
    words = ("scenario", "label-skew", tmp_path / "my.npz", "--negative", 0, "--positive", 1, "--level", 4)
    assert run(*words, "--scale", 0.02, "--out", tmp_path / "no") == 1
    assert "take images of any with --any-domain" in capsys.readouterr().err
    for group in ("patient", "image"):
        out = tmp_path / group
        assert run(*words, "--any-domain", "--scale", 0.02, "--group", group, "--out", out) == 0
        assert run("check", out, "--no-anchor") == 0
        header = (out / "node-1" / "manifest.csv").read_text().splitlines()[0]
        assert header == f"image,label,{'patient' if group == 'patient' else 'source_patient'},split,source"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("label-skew synthetic --out {out}", "label-skew has the levels 2, 4, 6, 8, 10, 20, 40, 60, 80, 100: choose"),
        ("label-skew synthetic --level 30 --out {out}", "not '30': choose one of them"),
        ("combined synthetic --level 3 --out {out}", "combined has no levels: leave out --level 3"),
        ("lable-skew synthetic --out {out}", "did you mean 'label-skew'"),
        ("combined synthetic", "give --out DIR for the site folders, or --plan"),
        ("combined synthetic --sat sat-rnsa --out {out}", "'sat-rnsa' is neither a CSV file nor an anchor table; did"),
        ("feature-skew synthetic --sat non-sat-mix --out {out}", "site 'site-humerus' has no row in the anchor table"),
        ("combined synthetic --sat sat-rsna --anchor {tmp} --out {out}", "leave one out"),
        ("combined synthetic --sat-size 32 --out {out}", "--sat-size goes with --sat TABLE"),
        ("combined synthetic --negative a --out {out}", "of their own: leave out --negative"),
        ("combined {npz} --negative off --positive on --image-size 32 --out {out}", "--image-size is for synthetic"),
        ("{any} {npz} --negative off --positive on --sat sat-rsna --out {out}", "--sat-source rsna=PATH"),
        ("{any} {npz} --negative off --positive on --sat sat-rsna --sat-source rsna --out {out}", "write NAME=PATH"),
        ("{any} {npz} --negative off --positive on --sat sat-rsna --sat-source r=x --out {out}", "no such source; "),
        ("{any} {npz} --negative off --positive on --kind npy --out {out}", "no kind of source is named 'npy'; did"),
        ("{any} {npz} --positive on --out {out}", "with --negative and --positive"),
        ("feature-skew synthetic --scale 0 --out {out}", "scale must be a number above 0"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    npz = pack(tmp_path, 1, (6, 6))
    (tmp_path / "any.csv").write_text("site,negative,positive\na,3,3\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    places = {"out": tmp_path / "out", "tmp": tmp_path, "npz": npz, "any": tmp_path / "any.csv"}
    assert run("scenario", *words.format(**places).split()) == 1
    error = capsys.readouterr().err.splitlines()
    assert message in error[0] and error[0].startswith("heterosync: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "has no rows"),
        (("a,one,off,on,0,1",), "line 2: counts '0' and '1' must be whole numbers from 1"),
        (("a,one,off,on,1,1", "a,two,off,on,1,1"), "line 3: site 'a' stands there twice"),
        (("a,,off,on,1,1",), "line 2: every column must be filled"),
        (("a,one,off,on,1",), "line 2: 5 values for 6 columns"),
    ],
)
def test_bad_anchor_tables(tmp_path: Path, rows: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_anchor_table(table(tmp_path / "t.csv", *rows))


def test_bad_header_and_damaged_record(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("site,source\na,rsna\n")
    with pytest.raises(UserError, match="the header must be site,source,negative_label"):
        read_anchor_table(tmp_path / "t.csv")
    (tmp_path / "scenario.json").write_text('{"table": [{"site": "a"}]}')
    with pytest.raises(UserError, match="is no record of a scenario"):
        check_scenario(tmp_path)
