"""FedDpS, a reconstruction in two readings: the draw of sites, the draw of images, and FedAvg where all take part."""

from __future__ import annotations

import json
import math
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from core_toys import settings, toy_data, trainer
from heterosync.errors import UserError
from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import load_model
from heterosync.federation.results import read_history
from heterosync.federation.runner import run_inprocess
from heterosync.federation.server import memory_of
from heterosync.methods import make_method
from heterosync.methods.answer import Answer
from heterosync.methods.feddps import draw, joining, kernel, subset_weights
from heterosync.models.encoder import features
from method_toys import last, own, same
from toys import SMOKE, toy_alliance

ONE = {"m_select": 1}
FEW = {"reading": "B", "total": 27, "epsilon": 10.0}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return toy_alliance(tmp_path_factory.mktemp("three"), 3, (15, 15), signal=155)


def memory_after(summary) -> dict[str, torch.Tensor]:
    return memory_of(load_model(summary.folder / "last_model.pt").assets)


def by_round(summary, scalar: str) -> dict[str, list[float]]:
    """Site -> its values, round by round."""
    found: dict[str, list[float]] = {}
    for _, site, name, value in read_history(summary.folder):
        if name == scalar and site.startswith("site-"):
            found.setdefault(site, []).append(value)
    return found


def answer(**tensors) -> Answer:
    held = {name: torch.as_tensor(value) for name, value in tensors.items()}
    return Answer(10, {}, 0.5, 10.0, tuple(held), held.__getitem__)


# -- reading A: which sites --------------------------------------------------------------------------------------------


def points(*squares: float) -> torch.Tensor:
    """Three profiles with these squared distances d12, d13, d23."""
    d12, d13, d23 = squares
    x = (d13 - d23 + d12) / (2 * math.sqrt(d12))
    return torch.tensor([[0, 0], [math.sqrt(d12), 0], [x, math.sqrt(d13 - x * x)]], dtype=torch.float64)


def test_probabilities_of_three_sites_by_hand():
    subsets, weights = subset_weights(kernel(points(1, 4, 4)), 2)
    assert subsets == [(0, 1), (0, 2), (1, 2)]
    assert (weights / weights.sum()).tolist() == pytest.approx([0.0577, 0.4711, 0.4711], abs=5e-5)


def test_draws_follow_the_determinants():
    profiles = torch.rand(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    distance = ((profiles[:, None] - profiles[None]) ** 2).sum(-1)
    s = (1 - distance / distance.max()).numpy()
    full = s.T @ s
    chances = np.array([np.linalg.det(full[np.ix_(c, c)]) for c in combinations(range(5), 3)])
    counts = dict.fromkeys(combinations(range(5), 3), 0)
    weighed = subset_weights(kernel(profiles), 3)
    for round_ in range(10_000):
        counts[draw(*weighed, 0, round_)] += 1
    expected = chances / chances.sum() * 10_000
    assert chisquare(list(counts.values()), expected).pvalue > 0.01
    assert expected.max() > 2 * expected.min()  # far from uniform


def test_sites_of_the_same_profile_never_train_together():
    profiles = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    subsets, weights = subset_weights(kernel(torch.cat([profiles, profiles[:1]])), 2)
    chance = dict(zip(subsets, weights.tolist(), strict=True))
    assert chance[0, 3] == 0 and all(value > 0 for pair, value in chance.items() if pair != (0, 3))


def test_where_no_subset_stands_out_all_are_as_likely():
    assert kernel(torch.ones(3, 4)).tolist() == [[3.0] * 3] * 3
    assert subset_weights(kernel(torch.ones(3, 4)), 2)[1].tolist() == [1, 1, 1]
    assert subset_weights(kernel(torch.rand(2, 4)), 3)[0] == [(0, 1)]  # fewer sites than asked for


def test_too_many_subsets_are_refused():
    method = make_method("feddps", {"m_select": 12}, settings())
    with pytest.raises(UserError, match=r"feddps setting 'm_select' is 12: 24 sites have 2704156 subsets of that size"):
        method.server_memory(tuple(f"s{i}" for i in range(24)))
    assert len(method.server_memory(tuple(f"s{i}" for i in range(3)))) == 7


def test_a_profile_is_the_mean_feature_under_the_first_model():
    data = toy_data()
    site = trainer("feddps", None, data)
    start = initial_state(site.method)
    first = site.train_round(0, start).state
    model = site.method.build_model().eval()
    with torch.no_grad():
        expected = features(model.net, data.primary.batch(data.splits["train"])).mean(0)
    torch.testing.assert_close(first["profile"], expected)
    moved = {name: first[name] for name in start}
    assert torch.equal(site.train_round(1, moved).state["profile"], first["profile"])  # told once and for all
    assert int(first["joined"]) == len(data.splits["train"])


def test_in_every_round_but_the_first_only_the_chosen_train(smoke_run, three):
    done = smoke_run("feddps", {"m_select": 2}, three, rounds=4)
    steps = by_round(done, "steps")
    trained = np.array([[value > 0 for value in steps[site]] for site in three])
    assert trained.sum(0).tolist() == [3, 2, 2, 2]
    memory = memory_after(done)
    assert sum(float(memory[f"rate.{site}"]) for site in three) == 2  # of the round to come
    assert all(memory[f"told.{site}"].any() for site in three)


def test_who_rests_does_not_count(smoke_run, two):
    done = smoke_run("feddps", ONE)
    steps = by_round(done, "steps")
    (chosen,) = (site for site in two if steps[site][1])
    assert same(last(done), own(done, chosen), "net.")
    rested = own(done, next(site for site in two if site != chosen))
    assert int(rested["joined"]) == 0 and not same(rested, own(done, chosen), "net.")
    rounds = json.loads((done.folder / "run.json").read_text())["rounds"]
    assert [record["contributors"] for record in rounds] == [sorted(two)] * 2  # both score the model that they got
    assert all(len(values) == 3 for values in by_round(done, "val_auc_received").values())  # and the last fusion


def test_where_all_take_part_it_is_fedavg(smoke_run):
    fedavg = last(smoke_run("fedavg"))
    for chosen in ({"m_select": 2}, {"reading": "B"}):
        state = last(smoke_run("feddps", chosen))
        assert same(state, fedavg) and set(state) - set(fedavg) == {"rate"}
    assert not same(last(smoke_run("feddps", ONE)), fedavg)
    assert not same(last(smoke_run("feddps", FEW)), fedavg)


def test_only_sites_that_answer_are_drawn():
    """Of four sites one leaves; m of the others train in every round, and it rests when it comes back."""
    method = make_method("feddps", {"m_select": 2}, settings())
    sites = ("a", "b", "c", "d")
    memory, state = method.server_memory(sites), {"rate": torch.tensor(1.0).double(), "w": torch.ones(1)}
    profiles = {site: torch.eye(4)[i].repeat(16) + 0.1 for i, site in enumerate(sites)}
    told = {site: answer(profile=profiles[site], joined=5, w=[1.0]) for site in sites}
    drawn = []
    for round_ in range(12):
        here = sites if round_ == 0 else sites[:3]
        method.fuse(state, {site: told[site] for site in here}, memory)
        rates = {site: float(method.for_site(state, memory, site)["rate"]) for site in sites}
        drawn.append({site for site in sites if rates[site]})
        assert len(drawn[-1]) == 2 and set(rates.values()) == {0.0, 1.0}
    assert all("d" not in chosen for chosen in drawn[1:]) and set.union(*drawn[1:]) == {"a", "b", "c"}
    method.fuse(state, told, memory)
    assert sum(float(memory[f"rate.{site}"]) for site in sites) == 2


def test_a_chain_gains_and_loses_sites(three, tmp_path):
    """And a site without training data receives the model, which is one for all."""
    two = {name: three[name] for name in ("site-a", "site-b")}
    run_inprocess("feddps", two, tmp_path / "one", ONE, {**SMOKE, "rounds": 2})
    more = {"site-b": three["site-b"], "site-c": three["site-c"]}
    outside = shutil.copytree(three["site-a"], tmp_path / "outside", ignore=shutil.ignore_patterns("splits.csv", ".h*"))
    header, *rows = (outside / "manifest.csv").read_text().splitlines()
    (outside / "manifest.csv").write_text("\n".join([f"{header},split", *(f"{row},test" for row in rows)]) + "\n")
    sites, training = {**more, "outside": outside}, {**SMOKE, "rounds": 4}
    done = run_inprocess("feddps", sites, tmp_path / "next", ONE, training, resume=tmp_path / "one")
    record = json.loads((done.folder / "run.json").read_text())
    assert record["receivers"] == ["outside"] and done.rounds == 4
    assert [part["contributors"] for part in record["rounds"]] == [["site-a", "site-b"]] * 2 + [
        ["site-b", "site-c"]
    ] * 2
    steps = by_round(done, "steps")
    assert steps["site-c"][0] > 0 and (steps["site-b"][-1] > 0) != (steps["site-c"][-1] > 0)
    assert set(done.metrics["last"]) == {"site-b", "site-c", "outside"}
    received = load_model(done.folder / "sites/outside/results/last_model.pt")
    assert same(received.state, last(done)) and received.build()[1] is not None


# -- reading B: which images -------------------------------------------------------------------------------------------


def test_every_image_is_as_likely_at_a_small_site_as_at_a_large_one():
    torch.manual_seed(0)
    small = np.concatenate([joining(0.3, 100).numpy() for _ in range(1000)])
    large = np.concatenate([joining(0.3, 10_000).numpy() for _ in range(10)])
    for drawn in (small, large):  # 100,000 chances each; 4 standard errors
        assert len(drawn) / 100_000 == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 100_000))
    assert chisquare(np.bincount(small, minlength=100)).pvalue > 0.001
    assert torch.equal(joining(1.0, 5), torch.arange(5))


def test_the_server_asks_for_a_share_of_the_noised_total():
    method = make_method("feddps", {"reading": "B", "total": 50}, settings())
    memory, sent = (
        method.server_memory(("a", "b")),
        {"rate": torch.tensor(1.0, dtype=torch.float64), "w": torch.ones(1)},
    )
    answers = {"a": answer(count=[150.0], joined=150, w=[3.0]), "b": answer(count=[50.0], joined=50, w=[-1.0])}
    state = method.fuse(sent, answers, memory)
    assert float(state["w"]) == 2.0  # by the images that took part
    assert [float(method.for_site(state, memory, site)["rate"]) for site in "ab"] == [0.25, 0.25]
    idle = {site: answer(count=[100.0], joined=0, w=[9.0]) for site in "ab"}
    assert float(method.fuse(sent, idle, memory)["w"]) == 1.0  # nobody trained: what was sent stays


def test_the_noise_is_laplaces():
    method = make_method("feddps", {"reading": "B", "epsilon": 0.5}, settings())
    draws, model = [], method.build_model()
    torch.manual_seed(0)
    for _ in range(300):
        model.count.zero_()
        next(method.batches(model, Counted(), 0, 0), None)
        draws.append(float(model.count) - 40)
    assert abs(np.mean(draws)) < 4 * math.sqrt(8 / 300) and np.mean(np.abs(draws)) == pytest.approx(2, rel=0.25)


class Counted:
    """Examples that are only counted."""

    count = 40

    def chosen(self, round_, epoch, rows):
        return iter(())


def test_a_round_trains_on_the_same_drawn_images_in_all_its_epochs():
    site = trainer("feddps", FEW, local_epochs=3, balanced_sampler=False, batch_size=64)
    start = initial_state(site.method)
    site.train_round(0, start)
    seen = []
    original = site.method.loss
    site.method.loss = lambda model, batch: (
        seen.append(batch.images.sum((1, 2, 3)).sort().values) or original(model, batch)
    )
    state = site.train_round(1, {**start, "rate": torch.tensor(0.5, dtype=torch.float64)}).state
    assert 2 < int(state["joined"]) == len(seen[0]) < site._examples.count
    assert len(seen) == 3 and all(torch.equal(images, seen[0]) for images in seen)
    assert float(state["count"]) != site._examples.count


def test_a_site_with_hardly_an_image_drawn_sits_out():
    site = trainer("feddps", FEW)
    start = initial_state(site.method)
    none = {**start, "rate": torch.tensor(1e-9, dtype=torch.float64)}
    result = site.train_round(0, none)
    assert int(result.state["joined"]) == 0 and result.metrics["steps"] == 0
    assert same(result.state, start, "net.")


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chosen", "told"), [(None, "profile"), ({"reading": "B"}, "count")])
def test_what_crosses_the_network(chosen, told):
    method = make_method("feddps", chosen, settings())
    model = method.build_model()
    net = {name for name in model.state_dict() if name.startswith("net.")}
    assert set(method.shared_names(model)) == net | {"rate"}
    assert set(method.returned_names(model)) == net | {told, "joined"}
    big = make_method("feddps", chosen, settings(backbone="resnet18")).build_model().state_dict()
    assert big[told].numel() == (512 if told == "profile" else 1)


def test_it_is_never_called_a_reproduction():
    method = make_method("feddps")
    assert (
        method.status == "reconstruction" and "reconstruction" in method.title and "not identified" in method.citation
    )


@pytest.mark.parametrize("chosen", [ONE, FEW], ids=["A", "B"])
def test_a_killed_run_goes_on_with_the_same_choice(chosen, smoke_run, two, tmp_path):
    whole = smoke_run("feddps", chosen, rounds=3)

    def kill(event: dict) -> None:
        if event.get("round") == 1 and event.get("site") == "site-a":
            raise KeyboardInterrupt

    training = {**SMOKE, "rounds": 3}
    with pytest.raises(KeyboardInterrupt):
        run_inprocess("feddps", two, tmp_path, chosen, training, progress=kill)
    again = run_inprocess("feddps", two, tmp_path, chosen, training)
    assert again.state_hash == whole.state_hash and by_round(again, "steps") == by_round(whole, "steps")
    ours, theirs = memory_after(again), memory_after(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_settings_of_the_other_reading_are_refused():
    with pytest.raises(UserError, match="feddps setting 'total' counts only with reading=B"):
        make_method("feddps", {"total": 10})
    with pytest.raises(UserError, match="feddps setting 'm_select' counts only with reading=A"):
        make_method("feddps", {"reading": "B", "m_select": 2})
    with pytest.raises(UserError, match="feddps setting 'm_select' is 0: the smallest possible value is 1"):
        make_method("feddps", {"m_select": 0})
