"""HSL's acceptance rules at one site; fusion and the manifest check have their own tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from core_toys import settings, toy_data, trainer
from heterosync.methods import make_method
from heterosync.models import MMoE
from heterosync.models.mechanism import mechanism
from heterosync.training import Batch, score


def images(n: int, seed: int, size: int = 64) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_h1_size_gates_and_embedding():
    assert sum(p.numel() for p in make_method("hsl").build_model("none").parameters()) == 23_723_650
    torch.manual_seed(0)
    model = MMoE("resnet_tiny").eval()
    f1, f2 = model.encode(0, images(6, 1)), model.encode(1, images(6, 2))
    entropies = []
    for temperature in (0.5, 1.0, 3.0, 10.0):
        model.temperature = temperature
        e = model.embed(f1 * 3, f2 * 3)
        torch.testing.assert_close(e.sum(1), torch.ones(6))
        for task in (0, 1):
            torch.testing.assert_close(model.gate(task, e).sum(1), torch.ones(6))
        entropies.append(-(e * e.log()).sum(1))
    for low, high in zip(entropies, entropies[1:], strict=False):
        assert (low < high).all()


def test_temperature_golden_values():  # G4
    model = MMoE("resnet_tiny", temperature=3.0)
    row = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 3.0]])
    torch.testing.assert_close(model.embed(*row), torch.tensor([[0.1416, 0.1976, 0.2758, 0.3849]]), atol=5e-5, rtol=0)
    model.temperature = 1.0
    torch.testing.assert_close(model.embed(*row), torch.tensor([[0.0321, 0.0871, 0.2369, 0.6439]]), atol=5e-5, rtol=0)


def test_entropy_of_gaussian_features():  # what T does: docs/hsl.md
    model = MMoE("resnet_tiny")
    features = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).mul(3).relu()
    shares = []
    for temperature in (0.5, 1.0, 3.0, 10.0):
        model.temperature = temperature
        e = model.embed(features[:, :512], features[:, 512:])
        shares.append((-(e * e.clamp_min(1e-300).log()).sum(1).mean() / np.log(1024)).item())
    assert shares == pytest.approx([0.18, 0.49, 0.96, 0.997], abs=0.015)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet_tiny"])
def test_h3_partner_reaches_the_primary_score_through_the_temperature(backbone):
    torch.manual_seed(0)
    model = MMoE(backbone).double().eval()
    x, partners = images(4, 1).double(), (images(4, 2).double(), images(4, 3).double())
    effect = {}
    with torch.no_grad():
        for temperature in (3.0, 1e6):
            model.temperature = temperature
            p, q = (torch.sigmoid(model(x, partner)[0]) for partner in partners)
            effect[temperature] = (p - q).abs().max().item()
    assert effect[3.0] > 1e3 * effect[1e6] > 0
    assert effect[3.0] < 1e-3  # small at the start: docs/hsl.md, Coupling


def test_mechanism_at_the_start_is_as_small_as_measured():  # docs/hsl.md, Coupling
    torch.manual_seed(0)
    y = (torch.arange(16) % 2).float()
    found = mechanism(MMoE(), images(16, 1), y, images(16, 2), y)
    assert 1e-5 < found["anchor_gradient_ratio"] < 1e-2
    assert 1e-9 < found["partner_effect"] < 1e-4


def test_loss_is_the_weighted_sum_of_both_tasks():
    method = make_method("hsl", None, settings())
    model = method.build_model().eval()
    batch = Batch(images(4, 1, 32), torch.tensor([0.0, 1, 1, 0]), images(4, 2, 32), torch.tensor([1.0, 1, 0, 0]))
    p = [torch.sigmoid(z) for z in model(batch.images, batch.anchor_images)]
    wanted = sum(
        -0.5 * (y * q.log() + (1 - y) * (1 - q).log()).mean()
        for q, y in zip(p, (batch.labels, batch.anchor_labels), strict=True)
    )
    torch.testing.assert_close(method.loss(model, batch), wanted)


def test_weight_zero_equals_the_network_without_anchor_loss():
    data = toy_data()
    off = trainer("hsl", {"loss_weights": [1.0, 0.0]}, data=data)
    never = trainer("hsl", data=data)
    never.method.loss = lambda model, batch: bce(model(batch.images, batch.anchor_images)[0], batch.labels)
    on = trainer("hsl", {"loss_weights": [1.0, 1.0]}, data=data)
    a, b, c = (t.train_round(0).state for t in (off, never, on))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)
    model = off.method.build_model()
    off.method.loss(model, Batch(images(4, 1, 32), torch.ones(4), images(4, 2, 32), torch.zeros(4))).backward()
    for part in (model.towers[1], model.gates[1], model.skips[1]):
        assert all(p.grad is None or not p.grad.any() for p in part.parameters())  # 6.1, No-SAT


def test_h6_the_next_round_goes_on_from_the_fused_state():
    sites = [trainer("hsl", data=toy_data(seed=s), site=f"site-{s}") for s in range(2)]
    states = [site.train_round(0).state for site in sites]
    fused = {k: (states[0][k].double() + states[1][k].double()).div(2).to(states[0][k].dtype) for k in states[0]}
    for site in sites:
        started = []
        site.method.round_start = lambda model, *_, seen=started: seen.append(
            {k: v.clone() for k, v in model.state_dict().items()}
        )
        site.train_round(1, fused)
        assert all(torch.equal(started[0][k], fused[k]) for k in fused)


@pytest.mark.parametrize("partner", ["self", "sat_index", "sat_mean"])
def test_h7_each_test_image_is_scored_once_and_alone(partner):
    data = toy_data((38, 6))  # far from balanced
    mine = trainer("hsl", {"test_partner": partner, "n_partners": 3}, data=data, augment=True)
    mine.train_round(0)
    result = mine.evaluate("test")
    rows = data.splits["test"]
    assert result.ids == [data.primary.ids[r] for r in rows]
    assert (result.labels == data.primary.labels[rows]).all()
    assert (mine.evaluate("test").probabilities == result.probabilities).all()
    small = trainer("hsl", {"test_partner": partner, "n_partners": 3}, data=data, batch_size=3)
    np.testing.assert_allclose(
        small.evaluate("test", mine.model.state_dict()).probabilities, result.probabilities, atol=1e-6
    )
    if partner == "self":
        order = np.random.default_rng(0).permutation(len(rows))
        shuffled = score(mine.method, mine.model, data.primary, rows=rows[order])
        np.testing.assert_allclose(shuffled, result.probabilities[order], atol=1e-6)


def test_partner_scores_are_the_stated_averages():
    data = toy_data()
    model = trainer("hsl", data=data).model.eval()
    anchor = data.anchor.batch(np.arange(20))
    x = data.primary.batch(np.arange(6))
    for partner, k in (("sat_index", 1), ("sat_mean", 4)):
        method = make_method("hsl", {"test_partner": partner, "n_partners": 4}, settings())
        rows = method.partner_rows(6, 20)
        assert rows.shape == (k, 6)
        with torch.no_grad():
            wanted = sum(torch.sigmoid(model(x, anchor[r])[0]) for r in rows) / k
        found = score(method, model, data.primary, data.anchor, np.arange(6))
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)
