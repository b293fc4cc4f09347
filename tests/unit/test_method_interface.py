"""What a method may do beyond averaging, part by part, and in runs of a toy method that uses all of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import heterosync.methods as methods
from core_toys import settings, toy_data
from heterosync.errors import ContributionRefused, HeteroSyncError, UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.fusion import Fusion
from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.federation.server import Server, memory_of
from heterosync.federation.wire import METRICS
from heterosync.flare.jobs.builder import obstacle
from heterosync.methods import METHODS, make_method
from heterosync.methods.answer import Answer, mean
from heterosync.methods.base import COMMON_LEAVES, SCALAR_LEAVES, Method
from heterosync.training import LocalTrainer
from interface_toys import Everything
from toys import SMOKE, toy_alliance


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> type[Everything]:
    monkeypatch.setattr(methods, "METHODS", (*METHODS, Everything))
    return Everything


def test_scalars_of_methods_stand_on_the_allow_list_and_are_told() -> None:
    assert set(SCALAR_LEAVES) <= METRICS
    for method in METHODS:
        for name in method.scalars:
            assert SCALAR_LEAVES[name] in method.leaves
    for name, line in SCALAR_LEAVES.items():
        assert re.match(r"W[02], ", line) and name in line and name not in " ".join(COMMON_LEAVES)


def test_only_plain_updates_are_noised_and_only_means_go_round_in_a_swarm() -> None:
    for method in METHODS:
        made = make_method(method.name)
        model = made.build_model(weights="none")
        if made.returned_names(model) != made.shared_names(model):
            assert not made.only_updates
        if made.individual or made.per_site:
            assert obstacle(made, "topology")


# -- a run with everything ---------------------------------------------------------------------------------------------


def test_a_run_of_a_method_that_uses_every_part(everything, tmp_path: Path) -> None:
    sites = toy_alliance(tmp_path / "data", 3, (12, 8))
    run_inprocess("everything", sites, tmp_path / "run", training=SMOKE)
    last = load_model(tmp_path / "run" / "last_model.pt")
    own = everything(None, settings()).build_model().state_dict()
    assert set(last.state) == {n for n in own if n.startswith("net.")} | {"turn", "gift", "told"}  # `seen` only goes up
    memory = memory_of(last.assets)
    assert memory["rounds"] == 2 and memory["seen"].tolist() == [[1.0, 12.0], [1.0, 13.0], [2.0, 14.0]]
    assert last.state["told"] == 2  # set by `fuse`; the sites cannot change it
    assert last.state["turn"] == -1
    history = (tmp_path / "run" / "history.csv").read_text().splitlines()
    steps = {tuple(row.split(",")[:2]): float(row.split(",")[3]) for row in history if ",steps," in row}
    # in round r the site whose turn it is rests; site-c trains in both
    assert [steps[str(r), s] > 0 for r in (0, 1) for s in sorted(sites)] == [False, True, True, True, False, True]
    rested = {row.split(",")[2] for row in history if row.startswith("0,site-a,")}
    assert {"n_epochs", "val_auc_best"} <= rested and not {"train_loss", "best_epoch"} & rested


def test_a_killed_run_goes_on_with_the_memory(everything, tmp_path: Path) -> None:
    sites = toy_alliance(tmp_path / "data", 2, (12, 8))
    whole = run_inprocess("everything", sites, tmp_path / "whole", training=SMOKE)
    part = run_inprocess("everything", sites, tmp_path / "part", training=SMOKE, stop=lambda done: done == 1)
    assert part.rounds == 1
    again = run_inprocess("everything", sites, tmp_path / "part", training=SMOKE)
    assert again.state_hash == whole.state_hash
    a, b = (load_model(tmp_path / run / "last_model.pt").assets for run in ("whole", "part"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    method = everything(None, settings())
    with pytest.raises(UserError, match="what its server remembers of the rounds before .* does not fit the sites"):
        Server(method, initial_state(method), memory_of(a), sites=["site-a"])


# -- at the server -----------------------------------------------------------------------------------------------------


def contribution(method: str, site: str, tensors, round_: int = 0, samples: int = 10, **metrics: float):
    return Contribution(site, method, round_, tensors, {"n_epochs": 1.0, **metrics}, samples)


@pytest.mark.parametrize("spilled", [False, True])
def test_fuse_reads_each_answer_when_it_asks_for_it(spilled: bool, tmp_path: Path) -> None:
    state = {"w": torch.zeros(3), "n": torch.tensor(0)}
    fusion = Fusion(state, "samples", "toy", tmp_path / "spill" if spilled else None)
    fusion.start(0)
    sent = {
        site: {"w": torch.randn(3, generator=torch.Generator().manual_seed(i)), "n": torch.tensor(i)}
        for i, site in enumerate("bca")
    }
    for i, site in enumerate(sent):
        fusion.accept(Contribution(site, "toy", 0, sent[site], {"steps": float(i)}, samples=i + 1))
    answers = fusion.answers()
    assert list(answers) == ["a", "b", "c"]
    assert [a.samples for a in answers.values()] == [3, 1, 2] and answers["c"].scalars == {"steps": 1.0}
    assert [a.weight for a in answers.values()] == [3 / 6, 1 / 6, 2 / 6]
    for site, answer in answers.items():
        assert set(answer.names) == {"w", "n"}
        assert torch.equal(answer["w"], sent[site]["w"]) and torch.equal(answer["n"], sent[site]["n"])
        answer["w"].zero_()  # a fresh tensor each time
        assert torch.equal(answer["w"], sent[site]["w"])
    if spilled:
        for file in (tmp_path / "spill").glob("*.contribution"):
            file.unlink()
        with pytest.raises(FileNotFoundError):  # it was not read before
            answers["a"]["w"]
        return
    means = {name: mean(answers, name) for name in state}
    fused = fusion.result()
    assert all(torch.equal(means[name], fused[name]) for name in state)  # to the last bit
    with pytest.raises(HeteroSyncError, match="no contribution to fuse"):
        fusion.answers()


def test_the_mean_of_answers_by_other_weights() -> None:
    def answer(value: float) -> Answer:
        tensors = {"w": torch.tensor([value]), "n": torch.tensor(int(value))}
        return Answer(1, {}, 0.5, 1.0, tuple(tensors), tensors.__getitem__)

    answers = {"a": answer(0), "b": answer(4)}
    assert mean(answers, "w") == 2.0
    assert mean(answers, "w", {"a": 0.0, "b": 2.0}) == 4.0
    assert mean(answers, "n", {"a": 1.0, "b": 2.0}) == 3 and mean(answers, "n").dtype == torch.int64


def test_the_server_takes_what_goes_up_and_sends_what_comes_down(everything) -> None:
    method = everything(None, settings())
    state = initial_state(method)
    server = Server(method, state, sites=["a", "b"])
    server.start(0, state)
    assert set(server.fusion.reference) == {n for n in state if n.startswith("net.")} | {"seen"}
    good = {n: v for n, v in state.items() if n.startswith("net.")} | {"seen": torch.ones(2)}
    with pytest.raises(ContributionRefused, match="'seen' is missing"):
        server.accept(contribution("everything", "a", {n: good[n] for n in good if n != "seen"}))
    with pytest.raises(ContributionRefused, match="'told' is not part"):
        server.accept(contribution("everything", "a", {**good, "told": torch.tensor(0)}))
    with pytest.raises(ContributionRefused, match="it reports no n_epochs, which this method goes by"):
        server.accept(Contribution("a", "everything", 0, good, {}, 10))
    assert server.for_site("a")["turn"] == 1 and server.for_site("b")["turn"] == 0
    server.accept(contribution("everything", "a", good))
    assert server.result().keys() == state.keys()


def test_a_fused_state_that_does_not_fit_is_a_defect_with_a_name(everything) -> None:
    class Wrong(everything):
        def fuse(self, sent, answers, memory):
            return {**super().fuse(sent, answers, memory), "told": torch.zeros(2)}

    method = Wrong(None, settings())
    state = initial_state(method)
    server = Server(method, state, sites=["a"])
    server.start(0, state)
    good = {n: v for n, v in state.items() if n.startswith("net.")} | {"seen": torch.ones(2)}
    server.accept(contribution("everything", "a", good))
    with pytest.raises(HeteroSyncError, match=r"tensor 'told' of the fused state is \(\(2,\), 'float32'\) instead of"):
        server.result()


def test_what_only_comes_down_stays_where_the_mean_is_taken() -> None:
    class Down(Method):
        name, title, status, citation, leaves = "down", "Down", "exact", "test", ("W1: all but the classifier",)

        def returned_names(self, model):
            return tuple(name for name in self.shared_names(model) if not name.startswith("net.fc."))

    method = Down(None, settings())
    state = initial_state(method)
    assert obstacle(method, "topology") == "needs a server that does more than take the mean"
    server = Server(method, state)
    server.start(0, state)
    sent = {name: torch.ones_like(value) for name, value in state.items() if not name.startswith("net.fc.")}
    server.accept(Contribution("a", "down", 0, sent))
    result = server.result()
    assert list(result) == list(state)
    assert torch.equal(result["net.fc.weight"], state["net.fc.weight"]) and (result["net.conv1.weight"] == 1).all()


# -- at a site ---------------------------------------------------------------------------------------------------------


def site_of(method: Method) -> LocalTrainer:
    return LocalTrainer(method, toy_data(), "site-a")


class Plain(Method):
    name, title, status, citation, leaves = "plain", "Plain", "exact", "test", ("W1: all",)


def test_an_epoch_over_all_rows_is_the_ordinary_one() -> None:
    class All(Plain):
        def batches(self, model, examples, round_, epoch):
            return examples.chosen(round_, epoch, np.arange(examples.count))

    a, b = (site_of(kind(None, settings(local_epochs=2, augment=True))) for kind in (Plain, All))
    one, two = a.train_round(0), b.train_round(0)
    assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)


def test_chosen_rows_are_the_only_ones_seen() -> None:
    seen: list[torch.Tensor] = []

    class Few(Plain):
        def batches(self, model, examples, round_, epoch) -> Iterator:
            for batch in examples.chosen(round_, epoch, np.array([1, 4, 6])):
                seen.append(batch.images)
                yield batch

    site = site_of(Few(None, settings(local_epochs=1, augment=False, balanced_sampler=False)))
    result = site.train_round(0)
    ordered = torch.cat([batch.images for batch in site._examples.training(3)])
    labels = torch.cat([batch.labels for batch in site._examples.training(3)])
    rows = site.data.splits["train"]
    assert len(ordered) == len(rows) and labels.tolist() == site.data.primary.labels[rows].tolist()
    assert torch.equal(ordered, torch.from_numpy(site.data.primary.pixels[rows]).float() / 255)
    shown = torch.cat(seen)
    assert len(shown) == 3 and all(any(torch.equal(image, ordered[row]) for image in shown) for row in (1, 4, 6))
    assert result.metrics["steps"] == 1


def test_what_batches_does_first_happens_before_the_first_step() -> None:
    found: list[float] = []

    class Early(Plain):
        def batches(self, model, examples, round_, epoch) -> Iterator:
            assert model.training
            with torch.no_grad():
                model.net.fc.bias.fill_(5.0)
            yield from examples.batches(round_, epoch)

        def loss(self, model, batch):
            found.append(float(model.net.fc.bias.detach()))
            return super().loss(model, batch)

    site_of(Early(None, settings(local_epochs=1))).train_round(0)
    assert found[0] == 5.0 and found[1] != 5.0


@pytest.mark.parametrize("kind", ["rests", "nothing left at once", "nothing left later"])
def test_a_round_without_steps_sends_back_what_came(kind: str) -> None:
    called: list[str] = []

    class Resting(Plain):
        def trains(self, model) -> bool:
            return kind != "rests"

        def batches(self, model, examples, round_, epoch) -> Iterator:
            if kind == "nothing left later" and epoch < 2:
                yield from examples.batches(round_, epoch)

        def round_end(self, model, examples) -> None:
            called.append("end")

    site = site_of(Resting(None, settings(local_epochs=4)))
    received = {name: value.clone() for name, value in Plain(None, settings(seed=9)).build_model().state_dict().items()}
    result = site.train_round(0, received)
    if kind == "nothing left later":
        assert len(result.epochs) == 2 and called == ["end"] and result.metrics["train_loss"] > 0
        return
    assert all(torch.equal(result.state[name], received[name]) for name in received) and not called
    assert result.metrics["steps"] == 0 and result.metrics["val_auc_best"] == result.metrics["val_auc_received"]
    assert "train_loss" not in result.metrics and "best_epoch" not in result.metrics and not result.epochs


def test_a_round_in_between_that_rests_keeps_the_moments(tmp_path: Path) -> None:
    class Resting(Plain):
        resting = False

        def trains(self, model) -> bool:
            return not self.resting

    method = Resting(None, settings(local_epochs=1, keep_moments=True))
    site = LocalTrainer(method, toy_data(), "site-a", work=tmp_path)
    site.train_round(0)
    kept = site._last["moments"]
    method.resting = True
    site.train_round(1)
    assert kept is not None and site._last["moments"]["state"].keys() == kept["state"].keys()
