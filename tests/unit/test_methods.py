"""The method table, the base and its hooks, local learning."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from core_toys import settings, toy_data, trainer
from heterosync.errors import UserError
from heterosync.federation.wire import CHECK_IN, METRICS
from heterosync.methods import GROUPS, bytes_per_round, get_method, make_method, method_names
from heterosync.methods.base import COMMON_LEAVES, SCALAR_LEAVES, STATUS, VOLUME_LEAVES, Method
from heterosync.study.method_table import amount, method_facts, methods_page, privacy_class
from heterosync.training import CLASSIFICATION, SEGMENTATION, LocalTrainer

ROOT = Path(__file__).parents[2]


def test_names_and_facts():
    assert {"hsl", "local"} <= set(method_names())
    assert len(set(method_names())) == len(method_names())
    for name in method_names():
        cls = get_method(name)
        assert issubclass(cls, Method) and not {*map(get_method, method_names())} & {*cls.__mro__[1:]}
        assert cls.status in STATUS
        assert cls.weighting in {"equal", "samples", "metric", "quality", "none", *cls.scalars}
        assert cls.title and cls.citation and cls.leaves
        for item in fields(cls.Settings):
            assert item.metadata["source"]  # every default cites its source
    with pytest.raises(UserError, match="there is no method 'hls': did you mean 'hsl'"):
        get_method("hls")


def test_what_leaves_is_told_in_full():
    told = " ".join((*COMMON_LEAVES, *VOLUME_LEAVES, *SCALAR_LEAVES.values()))
    for name in (METRICS | set(CHECK_IN)) - {"site"}:
        assert re.search(rf"\b{name}\b", told), name  # whatever the allow-list lets pass is in the text
    assert next(line for line in COMMON_LEAVES if "n_positive" in line).startswith("W2")
    for name in method_names():
        leaves = get_method(name).leaves
        common = VOLUME_LEAVES if get_method(name).task is SEGMENTATION else COMMON_LEAVES
        assert leaves[-len(common) :] == common
        assert (len(leaves) > len(common)) == (get_method(name).weighting != "none")


def test_every_score_of_a_task_may_leave():
    for task in (CLASSIFICATION, SEGMENTATION):
        assert {task.metric, task.received, task.best, *task.averaged} <= METRICS
        assert task.metric in task.averaged


def test_the_page_of_methods_is_what_the_code_says():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == methods_page(), "run `heterosync job table --out docs/methods.md`"
    for name in method_names():
        assert page.count(f"| `{name}` |") == 2 and f"- `{name}`: " in page  # what it does, what it costs, what leaves


def test_the_readme_names_every_method_in_its_group():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if re.match(r"\| [A-Za-z0-9 ]+ \| `", line)]
    expected = {group: ", ".join(f"`{method.name}`" for method in methods) for group, methods in GROUPS.items()}
    assert table == [f"| {group} | {names} |" for group, names in expected.items() if names]


def test_amounts_in_words():
    assert [amount(size) for size in (0, 12, 2048, 50_000, 60_000, 44_000_000)] == [
        "nothing",
        "12 bytes",
        "2.0 KiB",
        "48.8 KiB",
        "0.1 MiB",
        "42.0 MiB",
    ]


def test_classes_and_costs_of_some():
    facts = {name: method_facts(name) for name in ("fedavg", "fedbn", "local", "splitavg")}
    assert {name: privacy_class(f) for name, f in facts.items()} == {
        "fedavg": "W1",
        "fedbn": "W1",
        "local": "W0",
        "splitavg": "W3",
    }
    full = bytes_per_round(make_method("fedavg"), make_method("fedavg").build_model("none"))
    assert facts["fedbn"]["bytes_received"] + facts["fedbn"]["bytes_kept"] == full == facts["local"]["bytes_kept"]


def test_initial_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    a = make_method("hsl", None, settings()).build_model().state_dict()
    torch.rand(3)
    b = make_method("hsl", None, settings()).build_model().state_dict()
    c = make_method("hsl", None, settings(seed=1)).build_model().state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["experts.weight1"], c["experts.weight1"])
    assert not torch.equal(a["encoders.0.conv1.weight"], a["encoders.1.conv1.weight"])
    torch.set_rng_state(before)


def test_what_leaves_and_how_much():
    full = settings(backbone="resnet18")
    hsl, local = make_method("hsl", None, full), make_method("local", None, full)
    model = hsl.build_model()
    assert hsl.shared_names(model) == tuple(model.state_dict())
    assert bytes_per_round(hsl, model) / 2**20 == pytest.approx(90.57, abs=0.005)  # with the BatchNorm statistics
    assert local.shared_names(local.build_model()) == () and bytes_per_round(local, local.build_model()) == 0


def test_local_networks():
    plain, paired = make_method("local", None, settings()), make_method("local", {"network": "mmoe"}, settings())
    assert (plain.uses_anchor, paired.uses_anchor, Method.uses_anchor) == (False, True, False)
    trainer("local", data=toy_data(anchor=None)).train_round(0)  # needs no anchor pack
    with pytest.raises(UserError, match="did you mean 'mmoe'"):
        make_method("local", {"network": "mmo"}, settings())


def test_settings_of_the_mmoe_need_the_mmoe():
    with pytest.raises(UserError, match="local setting 'temperature' counts only with network=mmoe: set that too"):
        make_method("local", {"temperature": 2.0}, settings())
    assert make_method("local", {"network": "mmoe", "temperature": 2.0}, settings()).settings.temperature == 2.0
    plain = make_method("local", None, settings())
    make_method("local", plain.settings.to_dict(), settings())  # as a model file and a resumed run hold them


def test_local_mmoe_is_hsl_without_exchange():
    alone, hsl = trainer("local", {"network": "mmoe"}), trainer("hsl")
    a, b = alone.train_round(0), hsl.train_round(0)
    assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)
    assert a.metrics.keys() == b.metrics.keys()


class Frozen(Method):
    """A method of three lines beyond its facts: a personal head and a pull towards the received state."""

    name, title, status, citation, leaves = "frozen", "Frozen head", "reconstruction", "test", ("W1: the body",)
    mu = 0.0

    def shared_names(self, model):
        return tuple(name for name in model.state_dict() if not name.startswith("net.fc."))

    def round_start(self, model, received, examples):
        self.received = {name: received[name] for name, _ in model.named_parameters() if name in received}

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        if self.mu:
            loss = loss + self.mu / 2 * sum(
                (p - self.received[n]).square().sum() for n, p in model.named_parameters() if n in self.received
            )
        return loss


def test_a_new_method_needs_one_small_class(tmp_path):
    def run(mu: float, work=None) -> LocalTrainer:
        method = Frozen(None, settings(local_epochs=3))
        method.mu = mu
        return LocalTrainer(method, toy_data(), "site-a", work=work)

    start = Frozen(None, settings(seed=5)).build_model().state_dict()
    shared = {k: v for k, v in start.items() if not k.startswith("net.fc.")}
    free, held = run(0.0), run(100.0)
    moved = []
    for mine in (free, held):
        own_head = mine.model.state_dict()["net.fc.weight"].clone()
        assert not torch.equal(own_head, start["net.fc.weight"])
        state = mine.train_round(0, shared).state
        moved.append(sum((state[n] - start[n]).square().sum() for n in shared if "running" not in n and "num" not in n))
    assert moved[1] < moved[0] / 2
    keeper = run(0.0, tmp_path)
    head = keeper.train_round(0, shared).state["net.fc.weight"]
    again = run(0.0, tmp_path)
    again.restore()
    assert torch.equal(again.model.state_dict()["net.fc.weight"], head)  # personal tensors survive a restart
    seen = []
    again.method.round_start = lambda model, *_: seen.append(model.state_dict()["net.fc.weight"].clone())
    again.train_round(1, shared)
    assert torch.equal(seen[0], head)  # and the next round goes on with them
    again.train_round(1, {k: v + 0.01 if v.is_floating_point() else v for k, v in shared.items()})
    assert len(seen) == 2 and torch.equal(seen[1], head)  # also when it is asked again with another global model


def test_partner_rows():
    def rows(partner: str, n: int, k: int) -> np.ndarray | None:
        return make_method("hsl", {"test_partner": partner, "n_partners": 4}, settings()).partner_rows(n, k)

    assert rows("self", 5, 10) is None
    short, long = rows("sat_index", 5, 10), rows("sat_index", 25, 10)
    assert short.shape == (1, 5) and long.shape == (1, 25)
    assert (long[0, :5] == short[0]).all() and sorted(long[0, :10]) == list(range(10))
    mean = rows("sat_mean", 3, 10)
    assert mean.shape == (4, 3) and (mean == mean[:, :1]).all() and len(set(mean[:, 0])) == 4
    with pytest.raises(UserError, match="'test_partner' is 'sat_mean', but there is no anchor pack"):
        rows("sat_mean", 3, 0)
