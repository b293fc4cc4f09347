"""AdaFedProx, a reconstruction: what the agent sees and earns, that it can learn, and FedProx where it is frozen."""

from __future__ import annotations

import json
import math

import pytest
import torch

from core_toys import settings, trainer
from heterosync.errors import UserError
from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import load_model
from heterosync.federation.results import read_history
from heterosync.federation.runner import run_inprocess
from heterosync.federation.server import Server, memory_of
from heterosync.methods import make_method
from heterosync.methods.adafedprox import observations, validation_accuracy
from heterosync.methods.agent import Agent
from heterosync.methods.answer import Answer
from heterosync.methods.labels import label_entropy
from method_toys import last, own, same
from toys import SMOKE

#: Learns from its first experience on, which it makes in round 2.
EAGER = {"agent_batch": 1, "mu_scope": "per_client", "eps_decay": 1.0}
ROUNDS = {"rounds": 5}


def answer(samples: int = 10, tensors: dict | None = None, **scalars: float) -> Answer:
    told = {"label_entropy": 0.6, "n_epochs": 1, "train_accuracy": 0.5, "val_accuracy": 0.5, "n_validation": 4}
    held = tensors or {}
    return Answer(samples, {**told, "train_loss": 0.7, **scalars}, 0.5, 1.0, tuple(held), held.__getitem__)


def memory_after(summary) -> dict[str, torch.Tensor]:
    return memory_of(load_model(summary.folder / "last_model.pt").assets)


# -- what it sees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((100, 50, 200, 20, 80), 1.3842),
        ((3987, 7584), 0.6440),
        ((1066, 650), 0.6635),
        ((5, 5), math.log(2)),
        ((0, 9), 0),
    ],
)
def test_label_entropy(counts, expected):
    assert label_entropy(counts) == pytest.approx(expected, abs=5e-5)


def test_a_site_is_seen_by_five_numbers():
    answers = {
        "a": answer(30, label_entropy=0.69, n_epochs=4, train_accuracy=0.9, train_loss=0.2),
        "b": answer(10, label_entropy=0.10, n_epochs=1, train_accuracy=0.4, train_loss=1.0),
        "c": answer(60, label_entropy=0.30, n_epochs=5, train_accuracy=0.5, train_loss=0.4),
    }
    rows = observations(answers, 5)
    assert rows["a"].tolist() == pytest.approx([0.69, 0.3, 0.8, 0.9, 0.0])
    assert rows["b"].tolist() == pytest.approx([0.10, 0.1, 0.2, 0.4, 1.0])
    assert rows["c"].tolist() == pytest.approx([0.30, 0.6, 1.0, 0.5, 0.25])
    assert observations({"a": answer()}, 1)["a"][4] == 0  # one site has no spread of losses


def test_the_reward_is_weighed_by_validation_images():
    answers = {"a": answer(val_accuracy=0.9, n_validation=30), "b": answer(val_accuracy=0.5, n_validation=10)}
    assert validation_accuracy(answers) == pytest.approx(0.8)
    assert validation_accuracy({"a": answer(n_validation=0)}) is None


def test_sites_report_these_numbers_of_their_own_split(smoke_run, two):
    done = smoke_run("adafedprox")
    told = {(r, s, name): v for r, s, name, v in read_history(done.folder)}
    for site in two:
        assert told[0, site, "label_entropy"] == pytest.approx(math.log(2))  # half of the toys are positive
        assert told[0, site, "n_epochs"] == 1
        assert 0 <= told[1, site, "train_accuracy"] <= 1
    records = json.loads((done.folder / "run.json").read_text())["rounds"]
    plain = json.loads((smoke_run("fedavg", {"weighting": "equal"}).folder / "run.json").read_text())["rounds"]
    assert [r["bytes"] for r in records] == [r["bytes"] for r in plain]  # weights, and nothing else of any size
    names = {name for _, _, name in told} - {name for _, _, name, _ in read_history(smoke_run("fedavg").folder)}
    assert names == set(make_method("adafedprox").scalars)


def test_accuracies_are_of_the_received_and_of_the_sent_model():
    site = trainer("adafedprox")
    start = initial_state(site.method)
    result = site.train_round(0, start)
    received = site.evaluate("validation", start).metrics
    assert result.metrics["val_accuracy"] == received["accuracy"] and result.metrics["n_validation"] == received["n"]
    shared = {name: result.state[name] for name in start}
    assert result.metrics["train_accuracy"] == site.evaluate("train", shared).metrics["accuracy"]


# -- the agent ---------------------------------------------------------------------------------------------------------


def test_the_agent_finds_the_best_action_of_a_bandit():
    torch.manual_seed(0)
    seen, agent = torch.rand(10), Agent(10, 1)
    for t in range(600):
        done = torch.rand(1) if torch.rand(()) < math.exp(-0.005 * t) else agent.act(seen)
        agent.remember(seen, done, -float((done - 0.3).square()), seen)
        agent.learn()
    assert float(agent.act(seen)) == pytest.approx(0.3, abs=0.05)


def test_an_agent_goes_on_from_its_memory():
    def play(agent: Agent, steps: int) -> Agent:
        for _ in range(steps):
            agent.remember(torch.rand(4), torch.rand(2), float(torch.rand(())), torch.rand(4))
            agent.learn()
        return agent

    torch.manual_seed(0)
    agent = play(Agent(4, 2, capacity=6, batch=3), 5)
    kept = {name: value.clone() for name, value in agent.memory().items()}
    assert {name: value.shape for name, value in kept.items()} == {
        name: value.shape for name, value in Agent(4, 2, capacity=6, batch=3).memory().items()
    }
    again = Agent(4, 2, kept, capacity=6, batch=3)
    ends = []
    for one in (agent, again):
        torch.manual_seed(1)
        ends.append(play(one, 4).memory())
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert int(ends[0]["experiences"]) == 9 and not torch.equal(ends[0]["past"], kept["past"])


def test_it_learns_nothing_before_a_batch_is_full():
    agent = Agent(4, 1, batch=3)
    before = {name: value.clone() for name, value in agent.memory().items() if name.startswith("agent.")}
    for i in range(3):
        agent.remember(torch.rand(4), torch.rand(1), 0.5, torch.rand(4))
        agent.learn()
        still = all(torch.equal(agent.memory()[name], value) for name, value in before.items())
        assert still == (i < 2)


def test_an_experience_pairs_a_mu_with_what_the_model_of_its_round_reached():
    method = make_method("adafedprox", {"eps_decay": 1.0}, settings())
    memory, sent = method.server_memory(("a", "b")), {"mu": torch.tensor(0.0, dtype=torch.float64)}
    known = {name: value.shape for name, value in memory.items()}
    seen, done = [], []
    for round_ in range(5):
        seen.append(torch.cat([memory["site.a"], memory["site.b"]]))
        done.append(float(memory["mu"]))
        reach = {"val_accuracy": round_ / 10}  # of the model that round `round_` starts from
        state = method.fuse(sent, {s: answer(train_accuracy=round_ / 7, **reach) for s in ("a", "b")}, memory)
        assert 0 < float(state["mu"]) < 1 and state["mu"] == memory["mu"].mean()
    assert {name: value.shape for name, value in memory.items()} == known
    assert int(memory["experiences"]) == 3 and int(memory["round"]) == 5
    for i, row in enumerate(memory["past"][:3]):
        action = i + 1  # that of round 0 was chosen without having seen anything
        assert torch.equal(row[:10], seen[action]) and row[10] == pytest.approx(done[action], abs=1e-6)
        assert row[11] == pytest.approx((action + 1) / 10) and torch.equal(row[12:], seen[action + 1])


def test_an_absent_site_is_known_by_its_last_report():
    method = make_method("adafedprox", None, settings())
    memory, sent = method.server_memory(("a", "b")), {"mu": torch.tensor(0.0, dtype=torch.float64)}
    method.fuse(sent, {"a": answer(), "b": answer(train_accuracy=0.25)}, memory)
    method.fuse(sent, {"a": answer(train_accuracy=0.75)}, memory)
    assert (float(memory["site.a"][3]), float(memory["site.b"][3])) == (0.75, 0.25)


def test_it_explores_with_a_probability_that_falls():
    drawn = []
    for decay in (0.0, 100.0):
        method = make_method("adafedprox", {"eps_decay": decay}, settings())
        memory, sent = method.server_memory(("a",)), {"mu": torch.tensor(0.0, dtype=torch.float64)}
        values = []
        for _ in range(4):
            method.fuse(sent, {"a": answer()}, memory)
            values.append(float(memory["mu"]))
        drawn.append(values)
    assert len(set(drawn[0])) == 4 and len(set(drawn[1])) == 1  # the same state, an agent that has not learnt


# -- in a federation ---------------------------------------------------------------------------------------------------


def test_a_frozen_agent_is_fedprox_and_without_mu_fedavg(smoke_run):
    equal = {"weighting": "equal"}
    for mu, plain in ((0.3, smoke_run("fedprox", {"mu": 0.3, **equal})), (0.0, smoke_run("fedavg", equal))):
        state = last(smoke_run("adafedprox", {"agent": "frozen", "mu": mu}))
        assert same(state, last(plain)) and set(state) - set(last(plain)) == {"mu"} and float(state["mu"]) == mu
    assert not same(last(smoke_run("adafedprox")), last(smoke_run("fedavg", equal)))
    assert memory_after(smoke_run("adafedprox", {"agent": "frozen", "mu": 0.0})) == {}


def test_the_mu_of_a_round_is_the_servers(smoke_run):
    done = smoke_run("adafedprox", EAGER, **ROUNDS)
    memory = memory_after(done)
    assert memory["mu"].shape == (2,) and int(memory["round"]) == 5 and int(memory["experiences"]) == 3
    for site, mu in zip(("site-a", "site-b"), memory["done"], strict=True):
        assert float(own(done, site)["mu"]) == pytest.approx(float(mu), abs=1e-6)  # of the last round that was trained
    assert float(last(done)["mu"]) == pytest.approx(float(memory["mu"].mean()))
    single = smoke_run("adafedprox")
    assert own(single)["mu"] == own(single, "site-b")["mu"] and memory_after(single)["mu"].shape == (1,)


def test_a_killed_run_goes_on_with_the_agent(smoke_run, two, tmp_path):
    whole = smoke_run("adafedprox", EAGER, **ROUNDS)

    def kill(event: dict) -> None:
        if event.get("round") == 3 and event.get("site") == "site-a":
            raise KeyboardInterrupt

    training = {**SMOKE, **ROUNDS}
    with pytest.raises(KeyboardInterrupt):
        run_inprocess("adafedprox", two, tmp_path, EAGER, training, progress=kill)
    again = run_inprocess("adafedprox", two, tmp_path, EAGER, training)
    assert again.state_hash == whole.state_hash
    ours, theirs = memory_after(again), memory_after(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    fresh = make_method("adafedprox", EAGER, settings()).server_memory(("site-a", "site-b"))
    assert not torch.equal(ours["agent.actor.0.weight"], fresh["agent.actor.0.weight"])


def test_settings_that_a_frozen_agent_has_no_use_for_are_refused():
    with pytest.raises(UserError, match="adafedprox setting 'mu' counts only with agent=frozen"):
        make_method("adafedprox", {"mu": 0.1})
    with pytest.raises(UserError, match="adafedprox setting 'gamma' counts only with agent=learning"):
        make_method("adafedprox", {"agent": "frozen", "gamma": 0.5})
    with pytest.raises(
        UserError, match=r"'buffer' is 8: it must hold one agent_batch \(16\), or the agent never learns"
    ):
        make_method("adafedprox", {"buffer": 8})
    assert make_method("adafedprox", {"buffer": 8, "agent_batch": 8}).settings.buffer == 8
    with pytest.raises(UserError, match="adafedprox setting 'gamma' is 1.5: the largest possible value is 1"):
        make_method("adafedprox", {"gamma": 1.5})


def test_the_agent_goes_on_with_its_sites_alone():
    """It sees them all at once; without an agent nothing ties a training to its sites."""
    method = make_method("adafedprox", EAGER, settings())
    state, memory = initial_state(method), method.server_memory(("site-a", "site-b"))
    for sites in (("site-a", "site-c"), ("site-a",), ("site-a", "site-b", "site-c")):
        with pytest.raises(
            UserError, match=f"does not fit the sites {', '.join(sites)}: begin a new training, or go on"
        ):
            Server(method, state, memory, sites=sites)
    frozen = make_method("adafedprox", {"agent": "frozen"}, settings())
    assert Server(frozen, initial_state(frozen), {}, sites=("site-a", "site-c")).memory == {}


def test_a_site_that_only_receives_gets_the_same_network():
    method = make_method("adafedprox", {**EAGER, "mu_scope": "per_client"}, settings())
    state, memory = initial_state(method), method.server_memory(("site-a", "site-b"))
    assert method.per_site and method.one_model
    memory["mu"] = torch.tensor([0.25, 0.5], dtype=torch.float64)
    sent = {site: method.for_site(state, memory, site) for site in ("site-b", "outside")}
    assert float(sent["site-b"]["mu"]) == 0.5 and float(sent["outside"]["mu"]) == float(state["mu"])
    assert all(torch.equal(sent["outside"][name], state[name]) for name in state)
