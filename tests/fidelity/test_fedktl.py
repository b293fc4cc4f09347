"""FedKTL: the fixed classifier, what little goes up, the server's side, both kinds of generator, and mu = 0."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core_toys import settings, toy_data, trainer
from heterosync.data.anchor import load_anchor
from heterosync.errors import UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.federation.server import Server, memory_of
from heterosync.federation.wire import Blocked, WirePolicy, audit_lines
from heterosync.methods import bytes_per_round, make_method, traffic
from heterosync.methods.answer import Answer
from heterosync.models.generator import SIDE, build_stand_in, fit_stand_in, load_generator, resized
from heterosync.models.prototypes import (
    align,
    class_means,
    discrepancy,
    feature_transformer,
    margin_logits,
    simplex_etf,
)
from heterosync.training import Batch
from method_toys import last, own, same
from toys import SMALL, SMOKE, toy_site

ALONE = {"mu": 0.0}


def made(**changes):
    return make_method("fedktl", {**SMALL["fedktl"], **changes}, settings())


# -- the site's side ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_frame_is_equiangular(classes):
    frame = simplex_etf(classes).double()
    expected = torch.full((classes, classes), -1 / (classes - 1)).double().fill_diagonal_(1)
    torch.testing.assert_close(frame @ frame.T, expected, atol=1e-6, rtol=0)


def test_the_margin_by_hand():
    """Golden value G12: the cosine 0.5 of the true class becomes 0.0236, its logit 1.510."""
    logits = margin_logits(torch.tensor([[0.5, -0.5]], dtype=torch.float64), torch.tensor([0]), 64.0, 0.5)
    assert float(logits[0, 0]) == pytest.approx(64 * math.cos(math.pi / 3 + 0.5), abs=1e-9)
    assert float(logits[0, 0]) == pytest.approx(1.510, abs=5e-4) and float(logits[0, 0]) / 64 == pytest.approx(
        0.0236, abs=5e-5
    )
    assert float(logits[0, 1]) == -32.0


def test_the_margin_never_rewards_a_larger_angle():
    angles = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    cosines = torch.stack([angles.cos(), -angles.cos()], 1)
    true = margin_logits(cosines, torch.zeros(200, dtype=torch.int64), 64.0, 0.5)[:, 0]
    assert (true.diff() < 0).all()


def test_a_score_is_not_tied_where_a_softmax_would_be():
    model = made().build_model().eval()
    turn = torch.tensor([1e-4, 2e-4, 3e-4], dtype=torch.float64)
    across = torch.stack([-model.etf[1, 1], model.etf[1, 0]]).double()
    near = nn.functional.normalize(turn.cos()[:, None] * model.etf[1].double() + turn.sin()[:, None] * across)
    model.direction = lambda found: near
    scores = model(torch.rand(3, 3, 32, 32))
    cosines = near @ model.etf.double().T
    assert len(set(scores.tolist())) == 3 and float(scores.min()) > 0.99
    assert len(set(torch.softmax(64 * cosines.float(), 1)[:, 1].tolist())) == 1


def test_prototypes_are_the_normalised_means_of_what_is_there():
    site = trainer("fedktl", SMALL["fedktl"], toy_data((20, 10)))
    result = site.train_round(0, initial_state(site.method))
    train = site.data.splits["train"]
    with torch.no_grad():
        found = site.model.eval().direction(site.model.body(site.data.primary.batch(train)))
    labels = torch.from_numpy(site.data.primary.labels[train])
    for kind in (0, 1):
        mean = found[labels == kind].mean(0)
        torch.testing.assert_close(result.state["proto"][kind], (mean / mean.norm()).float(), atol=1e-5, rtol=1e-4)
    assert result.state["proto_class"].tolist() == [1, 1]


def test_a_class_that_a_site_lacks_has_no_prototype():
    site = trainer("fedktl", SMALL["fedktl"], toy_data((20, 20)))
    rows = site.data.splits["train"]
    site.data.splits["train"] = rows[site.data.primary.labels[rows] == 0]
    state = site.train_round(0, initial_state(site.method)).state
    assert state["proto_class"].tolist() == [1, 0] and state["proto"][1].tolist() == [0, 0]


def test_every_round_starts_from_the_same_projection_and_pulls_features_to_the_vectors():
    site = trainer("fedktl", SMALL["fedktl"])
    start = initial_state(site.method)
    pairs = {**start, "lat": torch.randn(2, 64), "img_class": torch.ones(2, dtype=torch.int64)}
    seen = []
    original = site.method.loss

    def loss(model, batch: Batch) -> Tensor:
        if not seen or seen[-1] is not model.epoch_started:
            seen.append(model.epoch_started)
            assert torch.equal(model.proj.weight, start["proj.weight"])
        return original(model, batch)

    site.method.loss = loss
    for round_ in range(2):
        site.model.epoch_started = object()
        state = site.train_round(round_, pairs).state
        assert not torch.equal(state["proj.weight"], start["proj.weight"])  # trained along, then discarded
    assert len(seen) == 2
    batch = Batch(torch.rand(8, 3, 32, 32), torch.arange(8).float() % 2)
    site.model.zero_grad()
    original(site.model, batch).backward()
    assert float(site.model.proj.weight.grad.abs().max()) > 0
    site.method.correct_gradients(site.model)
    gradients = [p.grad for p in site.model.parameters() if p.grad is not None]
    assert float(nn.utils.get_total_norm(gradients)) <= 100.001


# -- what travels ------------------------------------------------------------------------------------------------------


def test_four_numbers_and_two_flags_go_up(smoke_run):
    method = made()
    model = method.build_model()
    assert method.returned_names(model) == ("proto", "proto_class")
    assert method.shared_names(model) == ("etf", "proj.weight", "proj.bias", "lat", "img_class")
    assert (bytes_per_round(method, model), traffic(method, model)) == (32, "32 bytes")
    state = model.state_dict()
    policy = WirePolicy("fedktl", {name: state[name] for name in ("proto", "proto_class")})
    policy.check({name: state[name] for name in ("proto", "proto_class")})
    assert sum(line["bytes"] // 4 for line in audit_lines({"proto": state["proto"]})) == 4
    for name in ("net.fc.weight", "lat", "proj.weight", "generator.mu.weight"):
        with pytest.raises(Blocked, match=f"tensor '{name}' is not one of the 2"):
            policy.check({name: state[name]})
    assert set(last(smoke_run("fedktl", SMALL["fedktl"]))) == set(method.shared_names(model))


def test_without_mu_a_site_learns_nothing_of_the_others(two, smoke_run, tmp_path):
    """Bit-identical under a change of another site's data, and to the site's training all alone."""
    other = {**two, "site-b": toy_site(tmp_path / "b", (10, 10), seed=9, signal=60)}
    here, there = (own(smoke_run("fedktl", ALONE, sites)) for sites in (two, other))
    assert same(here, there, "net.") and torch.equal(here["proto"], there["proto"])
    assert not here["img_class"].any() and not there["img_class"].any()  # no pairs are made, let alone used
    alone = run_inprocess("fedktl", {"site-a": two["site-a"]}, tmp_path / "out", ALONE, SMOKE, min_sites=1)
    assert same(own(alone), here, "net.")
    here, there = (own(smoke_run("fedktl", SMALL["fedktl"], sites)) for sites in (two, other))
    assert not torch.equal(here["net.fc.weight"], there["net.fc.weight"])


# -- the server's side -------------------------------------------------------------------------------------------------


def answers(*kinds: tuple[int, ...], seed: int = 0) -> dict[str, Answer]:
    """Prototypes of sites with these classes, near the frame's vectors."""
    noise, found = torch.Generator().manual_seed(seed), {}
    for i, present in enumerate(kinds):
        flags = torch.tensor([int(c in present) for c in (0, 1)])
        proto = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]) + 0.1 * torch.randn(2, 2, generator=noise)
        sent = {"proto": nn.functional.normalize(proto) * flags[:, None], "proto_class": flags}
        found[f"site-{i}"] = Answer(9, {}, 1 / len(kinds), 1.0, tuple(sent), sent.__getitem__)
    return found


def test_the_transformer_brings_prototypes_to_where_the_generator_is_at_home():
    torch.manual_seed(0)
    transformer, draw = feature_transformer(2, 8), torch.Generator().manual_seed(0)
    labels = torch.arange(10) % 2
    prototypes = nn.functional.normalize(torch.where(labels[:, None] == 0, 1.0, -1.0) + 0.3 * torch.randn(10, 2))

    def home(count: int) -> Tensor:
        return 3 + torch.randn(count, 8, generator=draw)

    centres, trace = align(transformer, prototypes, labels, home, 0.1, 100, 0.01, 100, draw)
    assert trace[-1] < 0.5 * trace[0] and len(trace) == 100
    torch.testing.assert_close(centres, class_means(transformer(prototypes), labels, 2))
    assert float(centres.mean()) > 1 and not torch.allclose(centres[0], centres[1])


def test_the_discrepancy_by_hand():
    one, other = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    expected = 2 * sum(1 - math.exp(-25 / (2 * b)) for b in (10, 15, 20, 50))
    assert float(discrepancy(one, other)) == pytest.approx(expected, rel=1e-6)
    assert float(discrepancy(other, other)) == pytest.approx(0, abs=1e-6)


def test_there_is_a_pair_for_every_class_that_somebody_has():
    method = made()
    sent = initial_state(method)
    assert sent["img_class"].tolist() == [0, 0]
    memory = method.server_memory(())
    state = method.fuse(sent, answers((0, 1), (0,)), memory)
    assert state["img_class"].tolist() == [1, 1] and not torch.equal(state["lat"][0], state["lat"][1])
    assert all(torch.equal(state[name], sent[name]) for name in ("etf", "proj.weight", "proj.bias"))
    only = method.fuse(state, answers((0,), (0,)), memory)  # nobody has the second one any more: its pair stays
    assert only["img_class"].tolist() == [1, 1] and torch.equal(only["lat"][1], state["lat"][1])
    assert not torch.equal(only["lat"][0], state["lat"][0])
    assert torch.equal(method.fuse(sent, answers((0,)), memory)["lat"], sent["lat"])  # too little to go by
    assert int(memory["round"]) == 3


def test_many_prototypes_are_cut_into_batches_of_more_than_one():
    method = made(server_batch=4, server_epochs=2)
    state = method.fuse(initial_state(method), answers(*[(0, 1)] * 4, (0,)), method.server_memory(()))
    assert torch.isfinite(state["lat"]).all() and state["img_class"].tolist() == [1, 1]


def test_the_transformer_goes_on_from_round_to_round_and_depends_on_the_seed_alone():
    method = made()
    memory = method.server_memory(())
    first = method.fuse(initial_state(method), answers((0, 1), (0, 1)), memory)
    again = made().fuse(initial_state(method), answers((0, 1), (0, 1)), made().server_memory(()))
    assert same(first, again, "")
    after = method.fuse(first, answers((0, 1), (0, 1)), memory)
    assert not torch.equal(after["lat"], first["lat"])
    server = Server(method, initial_state(method), memory)
    server.start(0, initial_state(method))
    server.accept(
        Contribution("site-0", "fedktl", 0, {n: answers((0, 1))["site-0"][n] for n in ("proto", "proto_class")})
    )
    assert server.result()["img_class"].tolist() == [1, 1]


# -- the fallback generator --------------------------------------------------------------------------------------------


def test_the_fallback_learns_the_anchor_images_and_is_alike_everywhere(two):
    images = torch.from_numpy(load_anchor(two["site-a"] / "anchor", 32).pixels).float() / 255
    torch.manual_seed(0)
    networks = [build_stand_in(3, 16) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    before = torch.get_rng_state()
    vectors = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    untrained = (networks[0].decode_forward(vectors).mean(0) - resized(images, SIDE).mean(0)).abs().mean()
    for network in networks:
        fit_stand_in(network, images, 40, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(networks[0].state_dict(), networks[1].state_dict(), "")
    assert not any(parameter.requires_grad for parameter in networks[0].parameters()) and not networks[0].training
    rendered = networks[0].decode_forward(vectors)
    assert rendered.shape == (8, 3, SIDE, SIDE) and 0 <= float(rendered.min()) <= float(rendered.max()) <= 1
    assert (rendered.mean(0) - resized(images, SIDE).mean(0)).abs().mean() < 0.7 * untrained


def test_all_sites_render_the_same_pairs(smoke_run):
    one, other = (own(smoke_run("fedktl", SMALL["fedktl"]), site) for site in ("site-a", "site-b"))
    assert int(one["fitted"]) == int(other["fitted"]) == 1
    assert same(one, other, "generator.") and torch.equal(one["img"], other["img"])
    assert float(one["img"].std()) > 0 and torch.equal(one["lat"], other["lat"])
    assert int(own(smoke_run("fedktl", ALONE))["fitted"]) == 0  # nobody looks at pairs


def test_a_killed_run_goes_on_to_the_same_end(two, smoke_run, tmp_path):
    def kill(event: dict) -> None:
        if event["event"] == "site" and event["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inprocess("fedktl", two, tmp_path, SMALL["fedktl"], SMOKE, progress=kill)
    again, whole = run_inprocess("fedktl", two, tmp_path, SMALL["fedktl"], SMOKE), smoke_run("fedktl", SMALL["fedktl"])
    assert again.metrics == whole.metrics and again.state_hash == whole.state_hash
    assert all(same(own(again, site), own(whole, site), "") for site in two)
    ours, theirs = (memory_of(load_model(run.folder / "last_model.pt").assets) for run in (again, whole))
    assert ours.keys() == theirs.keys() and same(ours, theirs, "") and int(ours["round"]) == 2


def test_a_restored_site_keeps_its_generator(tmp_path, monkeypatch):
    options = {"method_settings": SMALL["fedktl"], "rounds": 2}
    straight = trainer("fedktl", **options)
    pairs = {**initial_state(straight.method), "lat": torch.randn(2, 64), "img_class": torch.ones(2, dtype=torch.int64)}
    states = [straight.train_round(round_, pairs).state for round_ in range(2)]
    trainer("fedktl", **options, work=tmp_path).train_round(0, pairs)
    monkeypatch.setattr("heterosync.methods.fedktl.fit_stand_in", lambda *_: pytest.fail("it is fitted already"))
    again = trainer("fedktl", **options, work=tmp_path)
    assert again.restore() == 0 and same(again.model.state_dict(), states[0], "") and again.model.fitted
    assert same(again.train_round(1, pairs).state, states[1], "") and not same(states[0], states[1], "net.")
    assert same(states[1], states[0], "generator.")


def test_the_fallback_needs_the_alliances_anchor_set(two, tmp_path):
    bare = {name: toy_site(tmp_path / name, (10, 10), seed=i, anchor=False) for i, name in enumerate(two)}
    with pytest.raises(UserError, match="anchor: the folder is missing"):
        run_inprocess("fedktl", bare, tmp_path / "out", SMALL["fedktl"], SMOKE)
    another = {**two, "site-b": toy_site(tmp_path / "b", (10, 10), anchor_seed=5)}
    with pytest.raises(UserError, match="the anchor digest differs between sites"):
        run_inprocess("fedktl", another, tmp_path / "out2", SMALL["fedktl"], SMOKE)
    assert run_inprocess("fedktl", bare, tmp_path / "out3", ALONE, {**SMOKE, "rounds": 1}).status == "completed"


# -- a generator from a file -------------------------------------------------------------------------------------------


class Renders(nn.Module):
    """A stand-in for StyleGAN: vectors (n, 8) -> images (n, 3, 16, 16) in [-1, 1]."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(8, 3 * 16 * 16)
        self.register_buffer("latents", 2 + torch.randn(50, 8))

    def forward(self, vectors: Tensor) -> Tensor:
        return torch.tanh(self.layer(vectors)).view(-1, 3, 16, 16)


def written(seed: int = 0) -> None:
    """toy.pt2 in torch's cache."""
    free = ({0: torch.export.Dim.AUTO},)
    path = Path(torch.hub.get_dir()) / "checkpoints" / "toy.pt2"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(torch.export.export(Renders(seed).eval(), (torch.zeros(2, 8),), dynamic_shapes=free), path)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


FILE = {"generator": "toy.pt2", "latent": 8, "server_epochs": 20}


def test_a_provisioned_generator_renders_at_the_server(two, tmp_path, cache):
    written()
    bare = {name: toy_site(tmp_path / name, (10, 10), seed=i, anchor=False) for i, name in enumerate(two)}
    done = run_inprocess("fedktl", bare, tmp_path / "out", FILE, SMOKE)  # and no site needs an anchor set or the file
    state = last(done)
    with torch.no_grad():
        expected = resized((Renders(0)(state["lat"]) + 1) / 2, 32)
    torch.testing.assert_close(state["img"], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(own(done, "site-b")["img"], own(done)["img"]) and "generator.mu.weight" not in own(done)
    method = make_method("fedktl", FILE, settings())
    assert "img" in method.shared_names(method.build_model()) and not method.needs_anchor
    assert (method.title, method.status) == ("FedKTL (toy.pt2)", "code-faithful")
    assert (made().title, made().status) == ("FedKTL (fallback generator)", "reconstruction")
    grey = load_generator("toy.pt2").render(state["lat"], 20, 1)
    assert grey.shape == (2, 1, 20, 20) and 0 <= float(grey.min()) <= float(grey.max()) <= 1


def test_a_generator_that_changes_under_way_stops_the_training(two, tmp_path, cache):
    written()
    run_inprocess("fedktl", two, tmp_path / "out", FILE, SMOKE, stop=lambda rounds: rounds == 1)
    before = load_model(tmp_path / "out" / "last_model.pt").state
    written(seed=1)
    with pytest.raises(UserError, match="generator file toy.pt2 is another than at the start of this training"):
        run_inprocess("fedktl", two, tmp_path / "out", FILE, SMOKE)
    assert same(load_model(tmp_path / "out" / "last_model.pt").state, before, "")


def test_what_is_wrong_with_a_generator_is_told_before_any_training(two, tmp_path, cache):
    def refused(changes: dict, why: str) -> None:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with pytest.raises(UserError, match=why):
            run_inprocess("fedktl", two, out, {**FILE, **changes}, SMOKE)
        assert not list(out.glob("*.pt"))  # nothing was trained

    refused({}, "fedktl setting 'generator' is 'toy.pt2' but .*toy.pt2 does not exist: put the file there")
    cache.mkdir(parents=True)
    (cache / "toy.pt2").write_bytes(b"PK no archive")
    refused({}, "generator file toy.pt2 cannot be read")
    written()
    refused({"latent": 64}, "fedktl setting 'latent' is 64, but the vectors of toy.pt2 have 8 entries: set it to 8")
    refused({"generator": "folder/toy.pt2"}, r"or the name \(no folder\) of a torch.export file")
    refused({"generator": "falback"}, "fedktl setting 'generator' is 'falback': fallback, or the name")
    refused({"fit_steps": 3}, "fedktl setting 'fit_steps' counts only with generator=fallback")
    idle = {
        "generator": "toy.pt2",
        "lambda_": 1,
        "server_epochs": 3,
        "server_lr": 0.1,
        "server_batch": 9,
        "fit_steps": 3,
    }
    for name, value in idle.items():
        with pytest.raises(UserError, match=f"fedktl setting '{name}' counts only with mu above 0"):
            make_method("fedktl", {"mu": 0.0, name: value}, SMOKE)
