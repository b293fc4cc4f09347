"""What SplitAVG's docstring says of it: equations, what is sent, faults that it must not have, degenerate cases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from core_toys import settings
from heterosync.errors import HeteroSyncError, UserError
from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.federation.split import Exchange, Tail, together
from heterosync.methods import bytes_per_image, bytes_per_round, make_method
from heterosync.methods.splitavg import SplitAVG
from heterosync.training import Batch
from toys import SMOKE, toy_site

#: Bits of the plain computation, where nothing is rounded on the way.
EXACT = {"wire_dtype": "float32"}
PLAIN_SGD = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0, "schedule": "constant"}


class Iteration:
    """One iteration of K sites and the server, on random images; every half keeps its gradients."""

    def __init__(self, order: list[int] | None = None, answer=None, late_first: bool = False, **method_settings):
        sites, images = 3, 4
        chosen = {**EXACT, **method_settings}
        self.method = make_method("splitavg", chosen, settings(**PLAIN_SGD))
        self.start = self.method.build_model().state_dict()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(sites, images, 3, 32, 32, generator=generator)
        self.labels = (torch.arange(sites * images) % 3 == 0).float().view(sites, images)
        self.tail = Tail(self.method, initial_state(self.method), {})
        reports = {f"site-{k}": {"counts": {"train": images}, "precision": "float32"} for k in range(sites)}
        self.tail.checked_in(reports)
        self.tail.start(0, initial_state(self.method))
        names = [f"site-{k}" for k in (order or range(sites))]
        self.seen: list[dict[str, Tensor]] = []
        self.answers: dict[str, dict[str, Tensor]] = {}

        def reply(sent):
            self.seen += [sent[site] for site in sorted(sent)]
            self.answers = self.tail.answer(sent)
            return answer(self.answers) if answer else dict(self.answers)

        exchange = Exchange(names, reply)
        self.models: list[nn.Module] = [self.model() for _ in range(sites)]
        self.losses: list[float] = [0.0] * sites

        def play(k: int, site: str) -> None:
            method = make_method("splitavg", chosen, settings(**PLAIN_SGD))
            steps = iter(range(9))
            method.exchange = lambda parcel: exchange.ask(site, next(steps), parcel)
            loss = method.loss(self.models[k], Batch(self.images[k], self.labels[k]))
            loss.backward()
            self.losses[k] = loss.item()

        threads = [threading.Thread(target=play, args=pair) for pair in enumerate(names)]
        for thread in threads[::-1] if late_first else threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()

    def model(self) -> nn.Module:
        model = self.method.build_model().train()
        model.load_state_dict(self.start)
        return model

    def central(self) -> nn.Module:
        """The same network after the backward pass of one centralised step on the union of the batches."""
        model = self.model()
        bce(model(self.images.flatten(0, 1)), self.labels.flatten()).backward()
        return model

    def head_gradients(self, k: int) -> dict[str, Tensor]:
        return {n: p.grad for n, p in self.models[k].named_parameters() if p.grad is not None}


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# -- the equations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v2", [False, True])
def test_a_step_of_tied_sites_is_the_centralised_step(v2):
    """cut=conv1, no BatchNorm at the sites: gradients of the server and, summed over sites, of the heads."""
    it = Iteration(cut="conv1", v2=v2)
    central = {name: p.grad for name, p in it.central().named_parameters()}
    tail = {name: p.grad for name, p in it.tail.model.named_parameters() if p.grad is not None}
    assert set(tail) == set(central) - {"net.conv1.weight"}
    for name, gradient in tail.items():
        close(gradient, central[name])
    assert set(it.head_gradients(0)) == {"net.conv1.weight"}
    close(sum(it.head_gradients(k)["net.conv1.weight"] for k in range(3)), central["net.conv1.weight"])
    state = it.tail.state()
    for name, gradient in central.items():
        if name in state:
            close(state[name], it.start[name] - 0.1 * gradient)


def test_the_servers_batchnorm_sees_the_union():
    it = Iteration(cut="conv1")
    central = it.central().state_dict()
    state = it.tail.state()
    for name in [name for name in state if "running" in name]:
        close(state[name], central[name])
    features = nn.functional.conv2d(it.images.flatten(0, 1), it.start["net.conv1.weight"], stride=2, padding=3)
    close(state["net.bn1.running_mean"], 0.1 * features.mean((0, 2, 3)))
    close(it.models[0].state_dict()["net.bn1.running_mean"], torch.zeros(8))  # the site's copy takes no part


def test_the_first_batchnorm_is_a_sites_own_at_the_later_cut():
    it = Iteration(cut="maxpool")
    assert not [name for name in it.tail.state() if name.startswith(("net.conv1", "net.bn1"))]
    means = [model.state_dict()["net.bn1.running_mean"] for model in it.models]
    assert not torch.equal(means[0], means[1])
    assert set(it.head_gradients(0)) == {"net.conv1.weight", "net.bn1.weight", "net.bn1.bias"}


def zero(answers: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {site: {**parcel, "gradient": torch.zeros_like(parcel["gradient"])} for site, parcel in answers.items()}


def test_a_zero_gradient_of_the_server_leaves_the_sites_as_they_are():
    """Golden value G17: the official update, backward of ones, moves a site whatever the server says."""
    it = Iteration(cut="conv1", answer=zero)
    for k in range(3):
        assert float(it.head_gradients(k)["net.conv1.weight"].abs().max()) == 0.0
    wrong = it.model()
    features = it.method.head(wrong, it.images[0])
    features.backward(torch.ones_like(features))
    assert float(wrong.net.conv1.weight.grad.abs().max()) > 0.0


@pytest.mark.parametrize("v2", [False, True])
def test_permuted_sites_make_the_same_server(v2):
    one, other = Iteration(v2=v2), Iteration(v2=v2, order=[2, 0, 1])
    moved = max(float((value - one.start[name]).abs().max()) for name, value in one.tail.state().items())
    for name, value in one.tail.state().items():  # a sum in another order may put an activation across a ReLU's edge
        torch.testing.assert_close(value, other.tail.state()[name], atol=moved / 100, rtol=0)
    late = Iteration(v2=v2, late_first=True).tail.state()
    assert all(torch.equal(value, late[name]) for name, value in one.tail.state().items())


def test_v2_is_v1_without_labels():
    v1, v2 = Iteration(), Iteration(v2=True)
    for name, value in v1.tail.state().items():
        close(v2.tail.state()[name], value)
    for k in range(3):
        for name, gradient in v1.head_gradients(k).items():
            close(v2.head_gradients(k)[name], gradient)
    assert v1.losses == pytest.approx(v2.losses, abs=1e-6)
    assert [set(parcel) for parcel in v1.seen] == [{"features", "labels"}] * 3
    assert [set(parcel) for parcel in v2.seen] == [{"features"}] * 3 + [{"logit_gradient"}] * 3
    for k, parcel in enumerate(v2.seen[3:]):  # what v2 tells all the same
        assert torch.equal((parcel["logit_gradient"] < 0).float(), v2.labels[k])


def test_site_mean_gives_all_sites_one_gradient():
    mean, own = Iteration(grad_mode="site_mean"), Iteration()
    parts = [own.answers[site]["gradient"] for site in sorted(own.answers)]
    assert not torch.equal(parts[0], parts[1])
    for parcel in mean.answers.values():
        close(parcel["gradient"], torch.stack(parts).mean(0))


def test_float16_keeps_small_gradients():
    half, whole = Iteration(wire_dtype="float16"), Iteration()
    assert half.seen[0]["features"].dtype == torch.float16
    for site, parcel in half.answers.items():
        assert parcel["gradient"].dtype == torch.float16
        back, exact = parcel["gradient"].float() / parcel["scale"], whole.answers[site]["gradient"]
        assert float((back - exact).norm()) < 0.1 * float(exact.norm())
    tiny = half.method._packed(torch.tensor([1e-9, -3e-9]))
    torch.testing.assert_close(tiny["gradient"].float() / tiny["scale"], torch.tensor([1e-9, -3e-9]), rtol=1e-3, atol=0)
    assert float(half.method._packed(torch.zeros(2))["gradient"].abs().sum()) == 0


def test_values_that_are_not_finite_change_nothing():
    method = make_method("splitavg", EXACT, settings())
    tail, start = Tail(method, initial_state(method), {}), initial_state(method)
    tail.checked_in({"a": {"counts": {"train": 4}, "precision": "float32"}})
    tail.start(0, start)
    bad = {"features": torch.full((4, 8, 8, 8), torch.nan), "labels": torch.zeros(4)}
    answer = tail.answer({"a": bad})["a"]
    assert torch.isnan(answer["loss"]) and torch.isnan(answer["gradient"]).all()
    assert all(torch.equal(value, start[name]) for name, value in tail.state().items())


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_bytes_and_tensors_that_leave():
    full = settings(backbone="resnet18", image_size=224)
    made = make_method("splitavg", None, full)
    model = made.build_model(weights="none")
    assert bytes_per_round(made, model) == 0 and made.returned_names(model) == ()
    text = " ".join((SplitAVG.__doc__ or "").split())
    image = bytes_per_image(made, model)
    assert f"{image / 2**20:.2f} MiB per image and epoch" in text and f"{64 * image / 2**20:.1f} MiB" in text
    assert f"{5 * 1000 * image / 2**30:.1f} GiB" in text
    native = make_method("splitavg", {"cut": "conv1", "wire_dtype": "float32"}, full)
    assert f"{bytes_per_image(native, model) / 2**20:.2f} MiB at conv1" in text
    down = sum(value.numel() * value.element_size() for value in initial_state(made).values())
    assert f"{down / 2**20:.1f} MiB, goes down once" in text
    for v2, cut in [(False, "conv1"), (True, "maxpool")]:
        made = make_method("splitavg", {"v2": v2, "cut": cut}, settings(image_size=45))
        features = made.head(made.build_model(), torch.zeros(2, 3, 45, 45))
        assert made.parcels(made.build_model())[0]["features"][0] == tuple(features.shape[1:])


def run(sites: dict[str, Path], out: Path, method: str = "splitavg", method_settings=None, **changes):
    least = 1 if len(sites) == 1 else None
    return run_inprocess(method, sites, out, method_settings, {**SMOKE, "lr": 3e-3, **changes}, min_sites=least)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, dict[str, Tensor]]]:
    """(site, number, message) of everything that reaches the server."""
    seen: list[tuple[str, int, dict[str, Tensor]]] = []
    original = Exchange.ask

    def ask(self, site, step, parcel):
        seen.append((site, step, parcel))
        return original(self, site, step, parcel)

    monkeypatch.setattr(Exchange, "ask", ask)
    return seen


def test_an_epoch_is_a_pass_of_the_largest_site(two, tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    done = run(two, tmp_path, rounds=2, local_epochs=2)
    for site in two:  # 36 images: 16 + 16 + 4, twice, in two rounds, at the site of 18 images too
        sizes = [len(parcel["labels"]) for name, _, parcel in seen if name == site]
        assert sizes == [16, 16, 4] * 4
        assert [step for name, step, _ in seen if name == site] == [*range(6)] * 2
    state = torch.load(done.folder / "sites" / "site-b" / "state.pt", weights_only=True)
    assert state["metrics"]["best_epoch"] == 1 and "val_auc_best" not in state["metrics"]
    record = (done.folder / "run.json").read_text()
    made = make_method("splitavg", None, settings())
    image = bytes_per_image(made, made.build_model())
    assert f'"site-b": {2 * 36 * image}' in record
    assert {*done.metrics} == {"local", "last"}


# -- degenerate cases --------------------------------------------------------------------------------------------------


def test_one_site_is_local_learning(two, tmp_path):
    one = {"site-a": two["site-a"]}
    split = run(one, tmp_path / "split", method_settings=EXACT)
    run(one, tmp_path / "local", "local")
    states = [
        torch.load(tmp_path / kind / "sites" / "site-a" / "state.pt", weights_only=True)["state"]
        for kind in ("split", "local")
    ]
    last = load_model(split.folder / "last_model.pt").state
    whole = {**states[0], **last}  # the site's copy of the tail is that of the round's start
    assert all(torch.equal(whole[name], value) for name, value in states[1].items())


@pytest.mark.parametrize("changes", [{}, {"keep_moments": True}], ids=["new moments", "kept moments"])
def test_it_goes_on_after_a_kill_to_the_same_end(two, tmp_path, changes):
    """Cut off when site-a has made its round and the server has not: both go back to where the round began."""
    training = {"rounds": 3, **changes}
    whole = run(two, tmp_path / "whole", **training)

    def kill(event: dict) -> None:
        if (event["event"], event.get("round")) == ("site", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inprocess("splitavg", two, tmp_path / "cut", None, {**SMOKE, "lr": 3e-3, **training}, progress=kill)
    again = run(two, tmp_path / "cut", **training)
    assert again.metrics == whole.metrics and again.state_hash == whole.state_hash
    memory = [name for name in load_model(whole.folder / "last_model.pt").assets if name.startswith("server.")]
    assert bool(memory) == bool(changes)


def test_keeping_the_moments_makes_a_difference(two, tmp_path):
    assert run(two, tmp_path / "a").state_hash != run(two, tmp_path / "b", keep_moments=True).state_hash


# -- what sites keep and predict by ------------------------------------------------------------------------------------


def test_a_sites_own_model_is_whole_and_the_servers_is_not(two, tmp_path):
    done = run(two, tmp_path, rounds=3, local_epochs=2)
    own = load_model(done.folder / "sites" / "site-a" / "own_best.pt")
    method, model = own.build()
    assert set(own.state) == set(model.state_dict())
    with pytest.raises(UserError, match="only what the sites share: take a site's own own_best.pt"):
        load_model(done.folder / "last_model.pt").build()
    heads = [load_model(done.folder / "sites" / site / "own_best.pt").state["net.conv1.weight"] for site in two]
    assert not torch.equal(*heads)  # they drift
    p = method.predict(model, torch.rand(2, 3, 32, 32), "self")
    assert p.shape == (2,) and bool(((p > 0) & (p < 1)).all())


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_site_with_batches_of_its_own_is_refused(tmp_path):
    sites = {name: toy_site(tmp_path / name, (10, 10), seed=i) for i, name in enumerate(["site-a", "site-b"])}
    file = sites["site-b"] / "site.yaml"
    file.write_text(file.read_text() + "batch_size: 8\n")
    with pytest.raises(UserError, match="site-b: site.yaml sets batch_size 8: method splitavg needs batches of 16"):
        run(sites, tmp_path / "out")
    file.write_text(file.read_text().replace("batch_size: 8", "batch_size: 16"))
    run(sites, tmp_path / "out2", rounds=1)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"cut": "layer1"}, "splitavg setting 'cut' is 'layer1'"),
        ({"v2": "False"}, "splitavg setting 'v2' is 'False': it must be true or false"),
        ({"grad_mode": "mean"}, "splitavg setting 'grad_mode' is 'mean'"),
        ({"n_iter": 3}, "splitavg setting 'n_iter' is unknown"),
    ],
)
def test_settings_are_checked(change, cause):
    with pytest.raises(UserError, match=cause):
        make_method("splitavg", change)


def test_a_failing_site_ends_the_round_of_all(two, tmp_path, monkeypatch):
    original = SplitAVG.ask
    calls = []

    def ask(self, features, labels):
        calls.append(1)
        if len(calls) == 3:
            raise UserError("the disk is full")
        return original(self, features, labels)

    monkeypatch.setattr(SplitAVG, "ask", ask)
    with pytest.raises(UserError, match="the disk is full"):
        run(two, tmp_path)
    monkeypatch.undo()
    assert run(two, tmp_path).state_hash == run(two, tmp_path / "plain").state_hash


def parcel(images: int = 4) -> dict[str, Tensor]:
    return {"features": torch.zeros(images, 8, 8, 8), "labels": torch.zeros(images)}


def asks(*sites: str, messages: Callable[[str], list[dict[str, Tensor]]]) -> None:
    method = make_method("splitavg", EXACT, settings())
    tail = Tail(method, initial_state(method), {})
    tail.checked_in({site: {"counts": {"train": 4}, "precision": "float32"} for site in sites})
    tail.start(0, initial_state(method))
    exchange = Exchange(list(sites), tail.answer, patience=5)

    def play(site):
        def train(ask):
            for step, message in enumerate(messages(site)):
                ask(step, message)

        return train

    together({site: play(site) for site in sites}, exchange)


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        (lambda site: [parcel()] * (2 if site == "a" else 1), "fewer steps|more steps"),
        (lambda site: [parcel(4 if site == "a" else 5)], "batches of different sizes"),
        (
            lambda site: [parcel() if site == "a" else {"features": torch.zeros(4, 8, 8, 8)}],
            r"site b sent \['features'\]",
        ),
        (lambda site: [{**parcel(), "labels": torch.zeros(3)}], "different lengths"),
    ],
)
def test_sites_that_are_out_of_step_are_told(messages, cause):
    with pytest.raises(HeteroSyncError, match=cause):
        asks("a", "b", messages=messages)


def test_a_message_out_of_order_is_an_error():
    exchange = Exchange(["a", "b"], lambda sent: dict.fromkeys(sent, {}), patience=0.3)
    with pytest.raises(HeteroSyncError, match="site a sent message 3 of the round, 0 is due"):
        exchange.ask("a", 3, {})
    exchange = Exchange(["a", "b"], lambda sent: dict.fromkeys(sent, {}), patience=0.3)
    with pytest.raises(HeteroSyncError, match="nothing came from b for 0.3 s"):
        exchange.ask("a", 0, {})
    with pytest.raises(HeteroSyncError, match="takes no part"):
        Exchange(["a"], lambda sent: {}).ask("c", 0, {})


def test_it_learns(two, tmp_path):
    done = run(two, tmp_path, local_epochs=6)
    assert min(values["auc"] for name, values in done.metrics["local"].items() if name in two) > 0.9
    assert np.isfinite(done.validation[-1])
