"""FedRCL (Seo et al., CVPR 2024): its two terms by hand, its levels, its degenerate settings, what it sends."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from core_toys import settings
from heterosync.errors import UserError
from heterosync.methods import make_method
from heterosync.methods.fedrcl import contrast_terms, pooled_features
from heterosync.training import Batch
from method_toys import last, same


def at_angles(*degrees: float) -> Tensor:
    """Features (n, 2) of length 1, 2, …, which must not matter."""
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1, len(degrees) + 1)[:, None]


def terms(features: Tensor, labels: list[float], all_pairs: bool = False) -> tuple[Tensor, Tensor]:
    return contrast_terms(features, torch.tensor(labels), 0.05, 2, 0.7, all_pairs)


def toy_batch(n: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(n, 3, 32, 32, generator=generator), (torch.arange(n) % 2).float()
    images[labels == 1, :, :16, :16] += 0.6
    return Batch(images, labels)


def test_four_images_by_hand():
    s, p = terms(at_angles(0, 20, 90, 160), [0, 0, 1, 1])
    assert s.tolist() == pytest.approx([0.000000, 0.000006, 0.693682, 0.000000], abs=1e-6)
    assert p.tolist() == pytest.approx([0.261863, 0.261863, 0, 0], abs=1e-6)
    assert (float(s.mean()), float(p.mean())) == pytest.approx((0.173422, 0.130931), abs=1e-6)


def test_under_autocast_they_are_the_same():
    features = at_angles(0, 20, 90, 160).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = terms(features, [0, 0, 1, 1])
    assert all(map(torch.equal, found, terms(features, [0, 0, 1, 1])))


def test_the_two_hardest_of_the_other_class_and_the_hardest_of_the_same():
    s, _ = terms(at_angles(0, 60, 30, 45, 90, 180), [0, 0, 1, 1, 1, 1])
    positive, *negatives = (math.exp(math.cos(math.radians(angle)) / 0.05) for angle in (60, 30, 45))
    assert float(s[0]) == pytest.approx(math.log(1 + sum(negatives) / positive))
    one = contrast_terms(at_angles(0, 60, 30, 45), torch.tensor([0, 0, 1, 1]), 0.05, 1, 0.7)[0]
    assert float(one[0]) == pytest.approx(math.log(1 + negatives[0] / positive))


@pytest.mark.parametrize(("cosine", "expected"), [(0.7001, 0.00248), (0.9, 0.12693), (0.99, 0.59814), (0.6999, 0.0)])
def test_the_penalty_fires_at_lambda(cosine, expected):
    _, p = terms(at_angles(0, math.degrees(math.acos(cosine))), [1, 1])
    assert p.tolist() == pytest.approx([expected] * 2, abs=2e-5)
    if not expected:
        assert float(p.max()) < 1e-8


def test_the_penalty_looks_at_the_least_similar_or_at_every_pair():
    near_and_far = at_angles(0, 10, 80)
    _, hardest = terms(near_and_far, [0, 0, 0])
    assert float(hardest.max()) < 1e-8  # the class as a whole has not collapsed
    _, every = terms(near_and_far, [0, 0, 0], all_pairs=True)
    value = math.log1p(math.exp((math.cos(math.radians(10)) - 1) / 0.05))
    assert every.tolist() == pytest.approx([value, value, 0], abs=1e-7)
    _, twice = terms(at_angles(0, 10, -10), [0, 0, 0], all_pairs=True)
    assert float(twice[0]) == pytest.approx(math.log1p(2 * math.exp((math.cos(math.radians(10)) - 1) / 0.05)))


def test_a_batch_of_one_class_or_with_a_lone_image_has_finite_terms_and_gradients():
    for labels in ([0, 0, 0, 0], [1, 0, 0, 0]):
        features = at_angles(0, 20, 90, 160).requires_grad_()
        for all_pairs in (False, True):
            s, p = terms(features, labels, all_pairs)
            (gradient,) = torch.autograd.grad(s.sum() + p.sum(), features)
            assert torch.isfinite(torch.cat([s, p, gradient.flatten()])).all()
        if len(set(labels)) == 1:
            assert not s.any()  # nothing to tell apart
        else:
            assert float(s[0].detach()) == pytest.approx(math.log(1 + sum(map(math.exp, lone_logits()))))


def lone_logits() -> list[float]:
    """A lone image is its own positive: cosines of its two nearest others, less 1."""
    return [(math.cos(math.radians(angle)) - 1) / 0.05 for angle in (20, 90)]


def test_the_levels_are_the_pooled_features_before_the_last_relu():
    model = make_method("fedrcl", None, settings()).build_model().eval()
    net, images = model.net, toy_batch().images
    with torch.no_grad(), pooled_features(net) as found:
        model(images)
        stem = net.bn1(net.conv1(images))
        x = net.maxpool(stem.relu())
        expected = [stem]
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            block = stage[-1]
            inner = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
            expected.append(inner + (x if block.downsample is None else block.downsample(x)))
            x = expected[-1].relu()
    assert sorted(found) == [0, 1, 2, 3, 4] and bool((found[4] < 0).any())
    for level, value in enumerate(expected):
        torch.testing.assert_close(found[level], value.mean((2, 3)))
    with pooled_features(net, 2) as deepest:
        model(images)
    assert sorted(deepest) == [3, 4] and not net.relu._forward_pre_hooks and not net.layer4[-1].relu._forward_pre_hooks


def test_the_loss_is_the_mean_over_levels_beside_the_classification():
    batch = toy_batch()
    made = {b: make_method("fedrcl", {"contrast": 0.5, "beta": b, "levels": 2}, settings()) for b in (0.0, 3.0)}
    model = made[0.0].build_model().eval()
    with torch.no_grad():
        plain = made[0.0].task.loss(model(batch.images), batch.labels)
        with pooled_features(model.net, 2) as found:
            model(batch.images)
        pairs = [contrast_terms(features, batch.labels, 0.05, 2, 0.7) for features in found.values()]
        for beta, method in made.items():
            expected = plain + sum(0.5 * s.mean() + beta * p.mean() for s, p in pairs) / 2
            torch.testing.assert_close(method.loss(model, batch), expected)
        assert float(sum(p.mean() for _, p in pairs)) > 0


def test_without_its_terms_it_is_fedavg_with_equal_weights(smoke_run):
    off, fedavg = {"contrast": 0.0, "beta": 0.0}, last(smoke_run("fedavg", {"weighting": "equal"}))
    assert same(last(smoke_run("fedrcl", off)), fedavg, "")
    assert not same(last(smoke_run("fedrcl")), fedavg, "")


def test_it_sends_what_fedavg_sends(smoke_run):
    sent = []
    for name, chosen in (("fedrcl", None), ("fedavg", {"weighting": "equal"})):
        record = json.loads((smoke_run(name, chosen).folder / "run.json").read_text())
        made = make_method(name, None, settings())
        sent.append(([round_["bytes"] for round_ in record["rounds"]], made.returned_names(made.build_model())))
    assert sent[0] == sent[1]


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum()
    return math.exp(-float((share * share.clamp_min(1e-12).log()).sum()))


def test_the_penalty_keeps_the_last_stage_from_collapsing():
    ranks = []
    for beta in (0.0, 1.0):
        method, batch = make_method("fedrcl", {"beta": beta}, settings()), toy_batch()
        model = method.build_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(20):
            optimizer.zero_grad()
            method.loss(model, batch).backward()
            optimizer.step()
        with torch.no_grad(), pooled_features(model.net, 1) as found:
            model(batch.images)
        ranks.append(effective_rank(normalize(found[4])))
    assert ranks[1] > ranks[0] * 1.1


def test_the_native_network_has_groups_in_place_of_batchnorm():
    model = make_method("fedrcl", {"norm": "gn"}, settings()).build_model()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    assert {layer.num_groups for layer in layers} == {2}
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    plain = make_method("fedrcl", None, settings()).build_model()
    assert len(layers) == sum(isinstance(layer, nn.BatchNorm2d) for layer in plain.modules())
    assert make_method("fedrcl", {"norm": "gn"}, settings()).loss(model, toy_batch()).isfinite()


def test_max_norm_bounds_a_gradient():
    norms = {}
    for bound in (0.0, 0.01):
        method = make_method("fedrcl", {"max_norm": bound}, settings())
        model = method.build_model()
        method.loss(model, toy_batch()).backward()
        method.correct_gradients(model)
        norms[bound] = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert norms[0.0] > 0.1 and norms[0.01] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "value"), [("tau", 0.0), ("levels", 6), ("topk_neg", 0), ("penalty", "some"), ("norm", "ln"), ("beta", -1)]
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"fedrcl setting '{name}' is "):
        make_method("fedrcl", {name: value})


@pytest.mark.parametrize(
    ("off", "name", "value", "condition"),
    [
        ({"contrast": 0}, "topk_neg", 3, "contrast above 0"),
        ({"beta": 0}, "lambda_", 0.5, "beta above 0"),
        ({"contrast": 0, "beta": 0}, "tau", 0.1, "contrast or beta above 0"),
    ],
)
def test_settings_of_a_term_that_is_left_out_are_refused(off, name, value, condition):
    with pytest.raises(UserError, match=f"fedrcl setting '{name}' counts only with {condition}"):
        make_method("fedrcl", {**off, name: value})
    assert getattr(make_method("fedrcl", {name: value}).settings, name) == value
