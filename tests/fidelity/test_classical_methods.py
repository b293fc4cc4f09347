"""What every method's docstring says of it: equations, what is sent, and the setting that makes it another method."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core_toys import settings, trainer
from heterosync.data.dataset import load_site
from heterosync.errors import UserError
from heterosync.federation import runner
from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import load_model
from heterosync.federation.results import read_history
from heterosync.federation.runner import RunSummary, run_inprocess
from heterosync.federation.server import memory_of
from heterosync.methods import METHODS, Method, bytes_per_round, get_method, make_method, method_names
from heterosync.methods.fedavg import FedAvg
from heterosync.methods.fedbn import FedBN, batchnorm_names
from heterosync.methods.moon import contrast
from heterosync.methods.personalized import personal_mix
from heterosync.methods.proximal import proximal_term
from heterosync.methods.traffic import amount
from heterosync.models.encoder import build_encoder
from heterosync.training import CLASSIFICATION, Batch
from method_toys import last, own, same
from toys import SMALL, SMOKE, toy_alliance, toy_site

#: Enough to learn the toys by, so that one run per method serves for most tests.
TRAINING = {**SMOKE, "rounds": 2, "local_epochs": 3, "lr": 3e-3}
#: What differs from it: the smaller site of FedKTL learns from its 18 images alone, and needs more steps.
RECIPES = {"fedktl": {**TRAINING, "batch_size": 4}}
#: One plain gradient step on all images at once.
ONE_STEP = {
    **{**SMOKE, "rounds": 1, "local_epochs": 1, "batch_size": 512, "optimizer": "sgd", "lr": 0.1},
    **{"weight_decay": 0.0, "schedule": "constant", "balanced_sampler": False},
}


@pytest.fixture(scope="module")
def play(two: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Runs a method over `two`, or over a single site, and remembers the outcome."""
    done: dict[str, RunSummary] = {}
    base = tmp_path_factory.mktemp("runs")

    def run(method: str, method_settings: dict | None = None, alone: bool = False, **changes) -> RunSummary:
        key = json.dumps([method, method_settings, alone, changes], sort_keys=True)
        if key not in done:
            sites = {"site-a": two["site-a"]} if alone else two
            out, least = base / f"{method}-{len(done)}", 1 if alone else None
            chosen = {**SMALL.get(method, {}), **(method_settings or {})}
            recipe = {**RECIPES.get(method, TRAINING), **changes}
            done[key] = run_inprocess(method, sites, out, chosen, recipe, min_sites=least)
        return done[key]

    return run


def group_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every classifier gets GroupNorm in place of BatchNorm."""
    original = runner.make_method.__globals__["Method"].network

    def network(self, weights: str) -> nn.Module:
        model = original(self, weights)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, nn.BatchNorm2d):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, nn.GroupNorm(2, layer.num_features))
        return model

    monkeypatch.setattr("heterosync.methods.base.Method.network", network)


# -- every method ------------------------------------------------------------------------------------------------------


#: The methods that the toys of this file are for; those of volumes have tests of their own (test_volume_*.py).
PICTURES = [method.name for method in METHODS if method.task is CLASSIFICATION]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_docstring_tells_bytes_and_when_it_is_another_method(method):
    text = " ".join((method.__doc__ or "").split())
    made = make_method(method.name, None, settings(backbone="resnet18") if method.name in PICTURES else None)
    size = bytes_per_round(made, made.build_model("none"))
    if size:
        assert amount(size) in text, f"it is {amount(size)}"
    assert "Degenerates: " in text and "Sent: " in text or method.name == "central"


#: BatchNorm's running statistics lag behind for more than the six epochs of two rounds; distillation slows learning,
#: and so does training on the few images that are hard.
LONGER: dict[str, dict] = {"hsl_shared": {"rounds": 4}, "hsl_distill": {"rounds": 6}, "feddys": {"rounds": 12}}


@pytest.mark.parametrize("name", PICTURES)
def test_a_federation_learns_what_can_be_learnt(play, name):
    """Every method fits an easy task, and every site has a score of the model that it would use."""
    done = play(name, **LONGER.get(name, {}))
    model = next(model for model in ("best", "local") if model in done.metrics)
    assert set(done.metrics[model]) == {"site-a", "site-b"}
    assert min(site["auc"] for site in done.metrics[model].values()) > 0.9
    site = "pooled" if name == "central" else "site-a"
    losses = [row[3] for row in read_history(done.folder) if (row[1], row[2]) == (site, "train_loss")]
    if get_method(name).batches is Method.batches:  # what others train on is not the same in every round
        assert len(losses) == 2 and min(losses) < losses[0]


@pytest.mark.parametrize("name", PICTURES)
def test_it_goes_on_after_a_kill_to_the_same_end(play, two, tmp_path, name):
    """The run is cut off in the middle of round 1; what sites and server must remember lies on their disks."""
    if name == "central":
        stop = {"event": "round", "round": 0}
    else:
        stop = {"event": "site", "round": 1, "site": "site-a"}

    def kill(event: dict) -> None:
        if all(event.get(key) == value for key, value in stop.items()):
            raise KeyboardInterrupt

    settings, recipe = SMALL.get(name), RECIPES.get(name, TRAINING)
    with pytest.raises(KeyboardInterrupt):
        run_inprocess(name, two, tmp_path, settings, recipe, progress=kill)
    again, whole = run_inprocess(name, two, tmp_path, settings, recipe), play(name)
    assert again.metrics == whole.metrics and again.state_hash == whole.state_hash
    site = "pooled" if name == "central" else "site-b"
    assert same(own(again, site), own(whole, site), "")
    if (whole.folder / "last_model.pt").exists():
        ours, theirs = load_model(again.folder / "last_model.pt"), load_model(whole.folder / "last_model.pt")
        assert same(ours.state, theirs.state, "") and set(ours.assets) == set(theirs.assets)
        assert all(torch.equal(ours.assets[key], value) for key, value in theirs.assets.items())


# -- FedAvg ------------------------------------------------------------------------------------------------------------


def test_fedavg_weighs_by_training_images(play):
    sites = {name: own(play("fedavg"), name) for name in ("site-a", "site-b")}
    mean = (36 * sites["site-a"]["net.fc.weight"].double() + 18 * sites["site-b"]["net.fc.weight"].double()) / 54
    assert torch.equal(last(play("fedavg"))["net.fc.weight"], mean.float())
    assert not torch.equal(last(play("no_al"))["net.fc.weight"], mean.float())


def test_with_one_site_averaging_is_local_learning(play):
    assert same(last(play("fedavg", alone=True)), own(play("local", alone=True)), "")
    assert same(last(play("hsl", alone=True)), own(play("local", {"network": "mmoe"}, alone=True)), "")


def test_fedavg_of_one_full_batch_step_is_one_central_step(two, tmp_path, monkeypatch):
    group_norm(monkeypatch)  # per image, as a frozen BatchNorm
    federated, central = (run_inprocess(name, two, tmp_path / name, None, ONE_STEP) for name in ("fedavg", "central"))
    start = initial_state(make_method("fedavg", None, settings(**ONE_STEP)))
    for name, value in last(central).items():
        torch.testing.assert_close(last(federated)[name], value, atol=1e-6, rtol=0)
    assert max(float((value - start[name]).abs().max()) for name, value in last(central).items()) > 1e-3


# -- FedProx -----------------------------------------------------------------------------------------------------------


def test_fedprox_without_mu_is_fedavg(play):
    assert same(last(play("fedprox", {"mu": 0.0})), last(play("fedavg")), "")
    assert not same(last(play("fedprox")), last(play("fedavg")), "")


def test_the_term_of_fedprox_by_hand():
    w = torch.tensor([1.2], dtype=torch.float64, requires_grad=True)
    term = proximal_term([w], [torch.tensor([1.0], dtype=torch.float64)], 0.1)
    term.backward()
    assert term.item() == pytest.approx(0.002, abs=1e-12) and w.grad.item() == pytest.approx(0.02, abs=1e-12)


def test_the_gradient_of_the_term_is_mu_times_the_distance():
    method = make_method("fedprox", {"mu": 0.7}, settings())
    model = method.build_model()
    method.round_start(model, {}, None)
    received = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    batch = Batch(torch.rand(4, 3, 32, 32), torch.tensor([0.0, 1, 0, 1]))
    plain = torch.autograd.grad(FedAvg.loss(make_method("fedavg"), model.eval(), batch), list(model.parameters()))
    whole = torch.autograd.grad(method.loss(model, batch), list(model.parameters()))
    for parameter, w, a, b in zip(model.parameters(), received, plain, whole, strict=True):
        torch.testing.assert_close(b - a, 0.7 * (parameter - w), atol=1e-6, rtol=1e-5)


def test_a_larger_mu_stays_nearer_to_the_received_weights():
    start = initial_state(make_method("fedprox", None, settings()))
    moved = []
    for mu in (0.0, 0.1, 1.0, 10.0):
        site = trainer("fedprox", {"mu": mu}, optimizer="sgd", lr=0.05, match_steps=200)
        state = site.train_round(0, start).state
        parameters = dict(site.model.named_parameters())
        moved.append(sum(float((state[name] - start[name]).square().sum()) for name in parameters))
    assert moved == sorted(moved, reverse=True) and moved[-1] < moved[0] / 2


# -- FedBN -------------------------------------------------------------------------------------------------------------


def test_batchnorm_of_resnet18_by_count():
    net = build_encoder("resnet18", outputs=1)
    names = batchnorm_names(net)
    assert (len(net.state_dict()), len(names), sum("bn" in name for name in names)) == (122, 100, 85)
    made = make_method("fedbn", None, settings(backbone="resnet18"))
    shared = made.shared_names(made.build_model())
    assert len(shared) == 22 and "net.layer2.0.downsample.0.weight" in shared
    assert not [name for name in shared if "bn" in name or "downsample.1" in name]
    state = made.build_model().state_dict()
    assert sum(state[name].numel() for name in set(state) - set(shared)) == 19_220


def test_fedbn_keeps_every_batchnorm_tensor_and_shares_all_else(play):
    done = play("fedbn")
    a, b = own(done), own(done, "site-b")
    kept = set(a) - set(last(done))
    assert kept == {f"net.{name}" for name in batchnorm_names(build_encoder("resnet_tiny", outputs=1))}
    assert not [name for name in kept if "num_batches" not in name and torch.equal(a[name], b[name])]
    received = load_model(done.folder / "sites/site-a/own_best.pt")
    assert set(received.state) == set(a) and received.round == done.rounds
    assert same(received.state, last(done), "")  # the last fusion, with the site's own layers


def test_without_batchnorm_fedbn_is_fedavg(two, tmp_path, monkeypatch):
    group_norm(monkeypatch)
    ours = run_inprocess("fedbn", two, tmp_path / "fedbn", None, TRAINING)
    theirs = run_inprocess("fedavg", two, tmp_path / "fedavg", {"weighting": "equal"}, TRAINING)
    assert same(last(ours), last(theirs), "") and list(last(ours)) == list(last(theirs))


def test_the_shared_part_of_a_personal_method_is_no_model(play):
    with pytest.raises(UserError, match=r"it is only what the sites share: take a site's own own_best\.pt"):
        load_model(play("fedbn").folder / "last_model.pt").build()
    for name in ("fedbn", "ditto", "personalized"):
        file = load_model(play(name).folder / "sites/site-b/own_best.pt")
        _, model = file.build()
        assert same(model.state_dict(), file.state, "")


def test_personal_methods_are_tested_with_the_sites_own_best_model(play):
    done = play("fedbn", rounds=3)
    assert set(done.metrics) == {"local", "last"}
    for site in ("site-a", "site-b"):
        file = load_model(done.folder / "sites" / site / "own_best.pt")
        received = {r: v for r, s, name, v in read_history(done.folder) if (s, name) == (site, "val_auc_received")}
        assert float(file.assets["validation_auc"]) == max(received[r] for r in (1, 2, 3))
        assert file.round == max((r for r in (1, 2, 3)), key=lambda r: (received[r], r))


# -- personalised learning ---------------------------------------------------------------------------------------------


def test_personal_mixing_by_hand():
    weights, mean = [torch.tensor(value, dtype=torch.float64) for value in (1.0, 2.0, 6.0)], torch.tensor(3.0).double()
    mixed = [float(personal_mix(w, mean, 3, 0.5, 0.5)) for w in weights]
    assert mixed == pytest.approx([2.5, 2.75, 3.75]) and sum(mixed) == pytest.approx(9)
    assert [float(personal_mix(w, mean, 3, 2.0, 0.5)) for w in weights] == pytest.approx([4, 5.75, 12.75])


def test_disagreement_shrinks_by_three_eighths_and_the_sum_is_kept():
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    mixed = torch.stack([personal_mix(row, w.mean(0), 5, 0.5, 0.5) for row in w])
    torch.testing.assert_close(mixed - mixed.mean(0), 0.375 * (w - w.mean(0)))
    torch.testing.assert_close(mixed.sum(0), w.sum(0))
    doubled = torch.stack([personal_mix(row, w.mean(0), 5, 2.0, 0.5) for row in w])
    torch.testing.assert_close(doubled.sum(0), 2.5 * w.sum(0))


def test_a_counter_is_rounded():
    assert personal_mix(torch.tensor(3), torch.tensor(5), 3, 0.5, 0.5).item() == 4  # 0.5 x 3 + 0.5 x 6 = 4.5, to even


def test_personalised_learning_of_two_sites_is_hsl(play):
    ours, hsl = last(play("personalized")), last(play("hsl"))
    assert set(ours) - set(hsl) == {"sites"} and int(ours["sites"]) == 2
    assert max(float((ours[name].double() - value.double()).abs().max()) for name, value in hsl.items()) < 1e-6
    mine, theirs = play("personalized").metrics["last"], play("hsl").metrics["last"]
    assert all(mine[site]["auc"] == theirs[site]["auc"] for site in theirs)
    doubled = last(play("personalized", {"compat_double_own": True}))
    assert float((doubled["towers.0.fc1.weight"] - hsl["towers.0.fc1.weight"]).abs().max()) > 1e-3


def test_personalised_learning_with_all_its_own_weight_is_local_learning(play):
    ours, local = own(play("personalized", {"self_weight": 1.0})), own(play("local", {"network": "mmoe"}))
    assert same(ours, local, "")


def test_personalised_learning_without_the_anchor_task(two, tmp_path):
    for name, folder in two.items():
        plain = toy_site(tmp_path / name, (20, 20), seed=len(name), anchor=False)
        assert not (plain / "anchor").exists() and (folder / "anchor").exists()
    sites = {name: tmp_path / name for name in two}
    done = run_inprocess("personalized", sites, tmp_path / "out", {"use_sat": False}, {**SMOKE, "rounds": 2})
    assert done.status == "completed"
    with pytest.raises(UserError, match="'loss_weights' counts only with use_sat=true"):
        make_method("personalized", {"use_sat": False, "loss_weights": [1.0, 0.0]})


def test_a_round_asked_again_mixes_with_the_weights_from_before_it(tmp_path):
    def site(folder: str):
        return trainer("personalized", {"self_weight": 0.7}, work=tmp_path / folder)

    start = initial_state(make_method("personalized", None, settings()))
    mean = {name: value + 0.01 if value.is_floating_point() else value for name, value in start.items()}
    mean["sites"] = torch.tensor(2)
    other = {**mean, "towers.0.fc2.bias": mean["towers.0.fc2.bias"] + 1}
    whole = site("whole")
    whole.train_round(0, start)
    expected = whole.train_round(1, mean).state
    first = site("first")
    first.train_round(0, start)
    first.train_round(1, other)
    again = site("first")
    assert again.restore() == 1
    assert same(again.train_round(1, mean).state, expected, "")


# -- ablations ---------------------------------------------------------------------------------------------------------


def test_no_al_is_fedavg_with_equal_weights(play):
    assert same(last(play("no_al")), last(play("fedavg", {"weighting": "equal"})), "")
    made = make_method("no_al", None, settings(backbone="resnet18"))
    assert sum(p.numel() for p in made.build_model().parameters()) == 11_177_025


@pytest.mark.parametrize("name", ["no_sat", "no_al"])
def test_the_ablations_never_open_the_anchor_pack(tmp_path, name):
    sites = toy_alliance(tmp_path / "data", 2)
    for folder in sites.values():
        for file in (folder / "anchor").iterdir():
            file.write_bytes(b"damaged")
    assert run_inprocess(name, sites, tmp_path / "out", None, {**SMOKE, "rounds": 1}).status == "completed"


def test_no_sat_leaves_the_second_task_without_gradient():
    method = make_method("no_sat", None, settings())
    model = method.build_model()
    batch = Batch(torch.rand(4, 3, 32, 32), torch.tensor([0.0, 1, 0, 1]))
    method.loss(model, batch).backward()
    for name, parameter in model.named_parameters():
        untouched = name.startswith(("skips.1.", "gates.1.", "towers.1."))
        assert (parameter.grad is None or not parameter.grad.any()) == untouched, name


def test_no_sat_is_hsl_that_weighs_the_anchor_task_with_0_and_pairs_an_image_with_itself():
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0.0, 1, 0, 1])
    ablation = make_method("no_sat", None, settings())
    hsl = make_method("hsl", {"loss_weights": [1.0, 0.0]}, settings())
    losses = []
    for method, batch in ((ablation, Batch(images, labels)), (hsl, Batch(images, labels, images, labels))):
        torch.manual_seed(0)
        losses.append(method.loss(method.build_model(), batch))
    assert torch.equal(*losses)


# -- central learning --------------------------------------------------------------------------------------------------


def test_central_learning_trains_on_the_union_and_is_tested_at_every_site(play, two):
    done = play("central")
    sets = {name: load_site(folder, 32) for name, folder in two.items()}
    rows = [row for row in read_history(done.folder) if row[1] == "pooled"]
    assert {int(v) for r, _, name, v in rows if name == "n_train"} == {
        sum(len(s.splits["train"]) for s in sets.values())
    }
    assert set(done.metrics["best"]) == set(two)
    for name, data in sets.items():
        lines = (done.folder / "sites" / name / "results/predictions.csv").read_text().splitlines()[1:]
        assert [line.split(",")[0] for line in lines if line.endswith(",best")] == [
            data.primary.ids[row] for row in data.splits["test"]
        ]
    record = json.loads((done.folder / "run.json").read_text())
    assert record["sites"] == sorted(two) and record["rounds"][0]["bytes"] == {"pooled": 0}


def test_the_pool_is_the_union_split_by_split(two, tmp_path):
    from heterosync.data.pool import load_pool

    pool, sets = load_pool(two, 32), {name: load_site(folder, 32) for name, folder in sorted(two.items())}
    for split, rows in pool.splits.items():
        ids = [f"{name}/{s.primary.ids[row]}" for name, s in sets.items() for row in s.splits[split]]
        assert [pool.primary.ids[row] for row in rows] == ids
    first = next(iter(sets.values()))
    assert np.array_equal(pool.primary.pixels[: len(first.primary)], first.primary.pixels)
    job = load_pool(two["site-a"].parent, 32)  # as the one client of a job finds them: a folder of site folders
    assert {split: len(rows) for split, rows in job.splits.items()} == {s: len(r) for s, r in pool.splits.items()}
    assert len(load_pool(two["site-a"], 32).primary) == len(first.primary)
    with pytest.raises(UserError, match="is no site folder and holds none"):
        load_pool(tmp_path, 32)
    other = toy_site(tmp_path / "c", (10, 10))
    (other / "site.yaml").write_text("task: toy\nlabels: [benign, malignant]\n")
    text = (other / "manifest.csv").read_text().replace("abnormal", "malignant").replace("normal", "benign")
    (other / "manifest.csv").write_text(text)
    with pytest.raises(UserError, match="site-c: its labels are benign / malignant, not normal / abnormal"):
        load_pool({**two, "site-c": other}, 32)


def test_central_learning_of_one_site_is_local_learning(play, two, tmp_path):
    done = run_inprocess("central", {"pooled": two["site-a"]}, tmp_path / "central", None, TRAINING)
    alone = run_inprocess("local", {"pooled": two["site-a"]}, tmp_path / "local", None, TRAINING)
    assert same(last(done), own(alone, "pooled"), "")


# -- FedOpt and FedAdam ------------------------------------------------------------------------------------------------


def test_fedopt_of_plain_steps_is_fedavg(play):
    assert same(last(play("fedopt", {"server_momentum": 0.0})), last(play("fedavg")), "")
    assert not same(last(play("fedopt")), last(play("fedavg")), "")


def test_fedopt_follows_its_equations():
    method = make_method("fedopt", {"server_lr": 0.5, "server_momentum": 0.9}, settings())
    memory, w, m = {"momentum.w": torch.tensor([0.0])}, torch.tensor([1.0]), 0.0
    for change in (0.2, -0.1):
        m = 0.9 * m + change
        state = method.combine({"w": w, "n": torch.tensor(1)}, {"w": w + change, "n": torch.tensor(7)}, memory, 2)
        assert float(state["w"]) == pytest.approx(float(w) + 0.5 * m) and state["n"] == 7
        assert float(memory["momentum.w"]) == pytest.approx(m)
        w = state["w"]


@pytest.mark.parametrize("rule", ["adam", "yogi", "adagrad"])
def test_fedadam_follows_its_equations(rule):
    method = make_method("fedadam", {"rule": rule, "server_lr": 0.1, "tau": 0.01}, settings())
    memory, w, m, v = {"m.w": torch.zeros(1), "v.w": torch.full((1,), 1e-4)}, torch.tensor([1.0]), 0.0, 1e-4
    for d in (0.2, -0.1):
        m = 0.9 * m + 0.1 * d
        square = d * d
        v = {"adam": 0.99 * v + 0.01 * square, "yogi": v - 0.01 * square * np.sign(v - square), "adagrad": v + square}[
            rule
        ]
        state = method.combine({"w": w}, {"w": w + d}, memory, 2)
        assert float(state["w"]) == pytest.approx(float(w) + 0.1 * m / (v**0.5 + 0.01), rel=1e-4)
        w = state["w"]
    whole = method.server_memory(())
    assert all(float(value.max()) == pytest.approx(1e-4) for name, value in whole.items() if name[0] == "v")
    assert len(whole) == 2 * len(list(method.build_model().parameters()))


def test_adagrads_rule_has_no_second_decay():
    with pytest.raises(UserError, match="fedadam setting 'beta2' counts only with rule=adam or rule=yogi"):
        make_method("fedadam", {"rule": "adagrad", "beta2": 0.9})


def test_fedadam_of_a_large_tau_is_fedavg_and_of_a_small_one_a_step_of_sign(play):
    # v starts at tau^2 and a large tau keeps it there: with adagrad's rule sqrt(v) + tau is 2 tau
    wide = last(play("fedadam", {"rule": "adagrad", "beta1": 0.0, "server_lr": 2e4, "tau": 1e4}))
    for name, value in last(play("fedavg")).items():
        torch.testing.assert_close(wide[name], value, atol=1e-4, rtol=0)
    method = make_method("fedadam", {"beta1": 0.0, "beta2": 0.0, "server_lr": 0.1, "tau": 1e-9}, settings())
    w, change = torch.zeros(3), torch.tensor([0.3, -0.2, 0.001])
    state = method.combine({"w": w}, {"w": w + change}, {"m.w": w.clone(), "v.w": w.clone()}, 2)
    torch.testing.assert_close(state["w"], 0.1 * change.sign())


def test_the_servers_memory_is_in_the_model_file(play):
    memory = memory_of(load_model(play("fedadam").folder / "last_model.pt").assets)
    assert set(memory) == set(make_method("fedadam", None, settings()).server_memory(()))
    assert float(memory["m.net.fc.weight"].abs().max()) > 0
    load_model(play("fedadam").folder / "best_model.pt").build()
    assert memory_of(load_model(play("fedavg").folder / "last_model.pt").assets) == {}


# -- SCAFFOLD ----------------------------------------------------------------------------------------------------------


def test_scaffold_is_fedavg_while_its_variates_are_zero_or_equal(play):
    once = {"rounds": 1}
    assert same(last(play("scaffold", **once)), last(play("fedavg", {"weighting": "equal"}, **once)))
    assert not same(last(play("scaffold")), last(play("fedavg", {"weighting": "equal"})))
    assert same(last(play("scaffold", alone=True)), last(play("fedavg", alone=True)))


def test_scaffolds_variate_is_option_ii_for_plain_sgd():
    rate = {"optimizer": "sgd", "lr": 0.05, "schedule": "constant", "weight_decay": 0.0, "local_epochs": 1}
    site = trainer("scaffold", **rate)
    start = initial_state(site.method)
    generator = torch.Generator().manual_seed(0)
    common = {n: 0.01 * torch.randn(v.shape, generator=generator) for n, v in start.items() if n.startswith("control.")}
    state = site.train_round(0, {**start, **common}).state
    steps = site.train_round(0, {**start, **common}).metrics["steps"]
    for key, c in common.items():
        name = key.removeprefix("control.").replace("/", ".")
        option_ii = 0 - c + (start[name] - state[name]) / (steps * 0.05)
        torch.testing.assert_close(state[key], option_ii, atol=2e-5, rtol=1e-3)
        assert torch.equal(state[f"own_{key}"], state[key])


def test_scaffold_sends_two_tensors_per_parameter_and_keeps_the_sites_variate(play):
    made = make_method("scaffold", None, settings())
    model, plain = made.build_model(), make_method("fedavg", None, settings()).build_model()
    shared = set(made.shared_names(model))
    controls = {f"control.{name.replace('.', '/')}" for name, _ in plain.named_parameters()}
    assert shared == set(plain.state_dict()) | controls
    done = play("scaffold")
    a, b, server = own(done), own(done, "site-b"), last(done)
    for name in controls:
        mean = (a[f"own_{name}"].double() + b[f"own_{name}"].double()) / 2
        assert torch.equal(server[name], mean.float())


def test_scaffolds_server_step():
    made = make_method("scaffold", {"server_lr": 0.5}, settings())
    sent = {"net.w": torch.tensor([1.0]), "n": torch.tensor(1), "control.net/w": torch.tensor([0.0])}
    fused = {"net.w": torch.tensor([3.0]), "n": torch.tensor(5), "control.net/w": torch.tensor([0.2])}
    state = made.combine(sent, fused, {}, 2)
    assert (state["net.w"].item(), state["n"].item()) == (2.0, 5) and torch.equal(
        state["control.net/w"], fused["control.net/w"]
    )


# -- Ditto -------------------------------------------------------------------------------------------------------------


def test_ditto_without_lambda_is_local_learning_beside_fedavg(play):
    mine = own(play("ditto", {"lambda_": 0.0}))
    local = own(play("local"))
    assert all(torch.equal(mine[f"own.{name.removeprefix('net.')}"], value) for name, value in local.items())
    assert same(last(play("ditto", local_epochs=1)), last(play("fedavg", local_epochs=1)), "")
    assert not [name for name in last(play("ditto")) if name.startswith("own.")]


def test_ditto_holds_the_own_model_near_the_global_one():
    start = initial_state(make_method("ditto", None, settings()))
    far = []
    for lambda_ in (0.0, 1.0, 10.0):
        site = trainer("ditto", {"lambda_": lambda_}, optimizer="sgd", lr=0.05, match_steps=200)
        state = site.train_round(0, start).state
        names = [name for name, _ in site.model.net.named_parameters()]
        far.append(sum(float((state[f"own.{name}"] - start[f"net.{name}"]).square().sum()) for name in names))
    assert far == sorted(far, reverse=True) and far[-1] < far[0] / 2


# -- MOON --------------------------------------------------------------------------------------------------------------


def test_moon_without_mu_is_fedavg(play):
    assert same(last(play("moon", {"mu": 0.0})), last(play("fedavg")), "")
    assert not same(last(play("moon")), last(play("fedavg")), "")


def test_moons_term():
    z, near, away = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    expected = -np.log(np.exp(1 / 0.5) / (np.exp(1 / 0.5) + np.exp(0.0)))
    assert float(contrast(z, near, away, 0.5)) == pytest.approx(expected)
    assert float(contrast(z, near, near, 0.5)) == pytest.approx(np.log(2))


def test_moon_remembers_the_sites_model_of_the_round_before(play):
    state = own(play("moon"))
    assert all(torch.equal(state[name.replace("previous.", "net.")], state[name]) for name in state if name[0] == "p")
    shared = last(play("moon"))
    assert list(shared) == list(last(play("fedavg")))


def test_moon_looks_at_the_received_model_and_at_the_one_before():
    site = trainer("moon", {"mu": 1.0})
    start = initial_state(site.method)
    site.train_round(0, start)
    seen = {}
    original = site.method.loss

    def loss(model, batch):
        if not seen:
            seen["previous"] = {name: value.clone() for name, value in model.previous.state_dict().items()}
            seen["received"] = {name: value.clone() for name, value in site.method._received.state_dict().items()}
        return original(model, batch)

    before = site.model.net.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    site.method.loss = loss
    site.train_round(1, start)
    assert all(torch.equal(seen["previous"][name], value) for name, value in before.items())
    assert all(torch.equal(seen["received"][name], start[f"net.{name}"]) for name in before)


# -- what is listed ----------------------------------------------------------------------------------------------------


def test_the_weights_of_sites_are_those_of_the_papers():
    equal = {name for name in method_names() if make_method(name).weighting == "equal"}
    samples = {name for name in method_names() if make_method(name).weighting == "samples"}
    assert {"hsl", "no_sat", "no_al", "personalized", "fedbn", "scaffold"} <= equal
    assert {"fedavg", "fedprox", "fedopt", "fedadam", "ditto", "moon"} <= samples
    assert {name for name in method_names() if make_method(name).weighting == "metric"} == {"prostate_ahnet"}
    assert make_method("fedbn", {"weighting": "samples"}).weighting == "samples" and FedBN.weighting == "equal"
    with pytest.raises(UserError, match="fedavg setting 'weighting' is 'sample': did you mean 'samples'"):
        make_method("fedavg", {"weighting": "sample"})
