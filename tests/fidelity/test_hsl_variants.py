"""The variants of HSL (docs/anchor.md): what each changes, and that it changes nothing else."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from core_toys import settings, toy_data, toy_set, trainer
from heterosync.data.dataset import SiteData
from heterosync.errors import UserError
from heterosync.federation.wire import METRICS
from heterosync.methods import make_method
from heterosync.methods.anchored import AnchorSettings, anchor_weight
from heterosync.methods.hsl_distill import divergence
from heterosync.models import MMoE
from heterosync.models.shared import NormedMMoE, SharedMMoE, TaskBatchNorm
from heterosync.training import Batch

VARIANTS = ("hsl_shared", "hsl_norm", "hsl_distill")


def images(n: int, seed: int, size: int = 32) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batch(n: int = 8) -> Batch:
    labels = (torch.arange(n) % 2).float()
    return Batch(images(n, 1), labels, images(n, 2), labels.flip(0))


def other_anchor(data: SiteData, flipped: bool = False) -> SiteData:
    """The same site with other anchor images, or with every anchor label turned round."""
    other = toy_set((10, 10), 5)
    if flipped:
        other = copy.copy(data.anchor)
        object.__setattr__(other, "labels", 1 - data.anchor.labels)
    return SiteData(data.labels, data.primary, data.splits, other, "other", data.config)


def state(name: str, method_settings: dict | None = None, data: SiteData | None = None) -> dict[str, Tensor]:
    return trainer(name, method_settings, data=data or toy_data(), local_epochs=2).train_round(0).state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- the anchor's weight -----------------------------------------------------------------------------------------------


def test_the_weight_over_the_rounds() -> None:
    def weights(schedule: str) -> list[float]:
        made = AnchorSettings(anchor_weight=0.8, anchor_schedule=schedule, anchor_rounds=4)
        return [anchor_weight(made, round_) for round_ in range(6)]

    assert [anchor_weight(AnchorSettings(anchor_weight=0.8), round_) for round_ in range(3)] == [0.8] * 3
    assert weights("rising") == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert weights("falling") == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
    with pytest.raises(UserError, match="'anchor_rounds' counts only with anchor_schedule=rising or falling"):
        AnchorSettings(anchor_rounds=4)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_schedule_reaches_the_loss(name: str) -> None:
    """A weight that has fallen to 0 trains as weight 0 does, in that round."""
    falling = {"anchor_schedule": "falling", "anchor_rounds": 1}
    states = []
    for own in (falling, {"anchor_weight": 0.0}, {}):
        site = trainer(name, own, data=toy_data())
        start = site.method.build_model().state_dict()
        site.train_round(0, start)
        states.append(site.train_round(1, start).state)
    assert same(states[0], states[1]) and not same(states[0], states[2])


@pytest.mark.parametrize("name", VARIANTS)
def test_without_weight_no_anchor_label_counts(name: str) -> None:
    data = toy_data()
    off, on = {"anchor_weight": 0.0}, {}
    assert same(state(name, off, data), state(name, off, other_anchor(data, flipped=True)))
    assert not same(state(name, on, data), state(name, on, other_anchor(data, flipped=True)))
    assert not same(state(name, on, data), state(name, off, data))


@pytest.mark.parametrize("statistics", ["task", "shared"])
def test_one_encoder_without_weight_never_looks_at_an_anchor_image(statistics: str) -> None:
    """With one layer a task that is plain averaging, tensor by tensor: below."""
    data, own = toy_data(), {"anchor_weight": 0.0, "statistics": statistics}
    assert same(state("hsl_shared", own, data), state("hsl_shared", own, other_anchor(data)))
    assert not same(state("hsl_shared", {"statistics": statistics}, data), state("hsl_shared", own, data))


@pytest.mark.parametrize("statistics", ["task", "shared"])
def test_without_distillation_it_is_hsl_shared(statistics: str) -> None:
    own = {"statistics": statistics}
    parent = state("hsl_shared", own)
    assert same(state("hsl_distill", {**own, "distill_weight": 0.0}), parent)
    assert not same(state("hsl_distill", own), parent)


@pytest.mark.parametrize("statistics", ["task", "shared"])
def test_the_teacher_sees_the_anchor_images_as_in_a_step(statistics: str) -> None:
    """Of the primary images only what they do to common statistics counts, and with statistics of each task nothing."""
    model, one = SharedMMoE("resnet_tiny", statistics=statistics).train(), batch()
    both = copy.deepcopy(model).encode_both(one.images, one.anchor_images)[1]
    torch.testing.assert_close(model.encode_anchor(one.images, one.anchor_images), both, rtol=0, atol=0)
    other = model.encode_anchor(images(8, 9), one.anchor_images)
    assert torch.equal(other, both) == (statistics == "task")


@pytest.mark.parametrize("name", ["hsl_shared", "hsl_distill"])
def test_linear_heads_without_weight_are_equal_averaging(name: str) -> None:
    """The plain classifier and nothing else, tensor by tensor: what the anchor then adds is the anchor's alone."""
    own = {"heads": "linear", "anchor_weight": 0.0} | ({"distill_weight": 0.0} if name == "hsl_distill" else {})
    data, where = toy_data(), {"match_steps": 20}
    plain = trainer("no_al", data=data, local_epochs=2, **where).train_round(0).state
    found = state(name, own, data)
    first = {key.replace("net.fc.", "tasks.0.").replace("net.", "encoder."): value for key, value in plain.items()}
    assert first.keys() <= found.keys() and same(first, {key: found[key] for key in first})
    rest = {key for key in found if key not in first}
    assert all(key.startswith("tasks.1.") or ".anchor." in key for key in rest)
    assert not same(state(name, {"heads": "linear"}, data), found)


def test_the_mixtures_settings_count_with_the_mixture() -> None:
    with pytest.raises(UserError, match="'drop_tower' counts only with heads=mmoe"):
        make_method("hsl_shared", {"heads": "linear", "drop_tower": 0.1})


@pytest.mark.parametrize("name", VARIANTS)
def test_a_schedule_counts_with_a_weight(name: str) -> None:
    with pytest.raises(UserError, match="'anchor_schedule' counts only with anchor_weight above 0"):
        make_method(name, {"anchor_weight": 0.0, "anchor_schedule": "rising"})


@pytest.mark.parametrize("own", [{"distill_on": "logits"}, {"distill_temperature": 3.0}])
def test_what_is_distilled_counts_with_a_weight(own: dict) -> None:
    with pytest.raises(UserError, match=f"'{next(iter(own))}' counts only with distill_weight above 0"):
        make_method("hsl_distill", {"distill_weight": 0.0, **own})


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_the_anchor_reaches_the_primary_encoder() -> None:
    """What the variants are for: at the start, 32 px, tiny network."""
    ratios = {}
    for name, own in [("hsl", {}), *((name, {}) for name in VARIANTS), ("hsl_norm", {"embedding": "scaled"})]:
        method = make_method(name, own, settings())
        model = method.build_model()
        before = copy.deepcopy(model.state_dict())
        found = method.diagnostics(model, SimpleNamespace(sample=batch))
        assert set(found) <= METRICS and all(math.isfinite(value) for value in found.values())
        assert same(before, model.state_dict()) and model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        ratios[name + own.get("embedding", "")] = found["anchor_gradient_ratio"]
    assert ratios["hsl"] < 0.02
    assert ratios["hsl_normscaled"] > 5 * ratios["hsl"] and ratios["hsl_norm"] > 5 * ratios["hsl"]
    assert ratios["hsl_shared"] == ratios["hsl_distill"] > 0.1


# -- the normed embedding ----------------------------------------------------------------------------------------------


def test_the_normed_network_has_hsls_tensors() -> None:
    theirs = make_method("hsl", None, settings()).build_model().state_dict()
    ours = make_method("hsl_norm", None, settings()).build_model().state_dict()
    assert same(theirs, ours)


def test_normed_embeddings_and_gates() -> None:
    f1, f2 = torch.rand(5, 64) * 3, torch.rand(5, 64)
    model = NormedMMoE("resnet_tiny", temperature=2.0)
    e = model.embed(f1, f2)
    torch.testing.assert_close(e.mean(1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(e.var(1, unbiased=False), torch.ones(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.gate(1, e), torch.softmax(model.gates[1](e) / 2, 1))
    scaled = NormedMMoE("resnet_tiny", temperature=1.0, embedding="scaled")
    published = MMoE("resnet_tiny", temperature=1.0)
    torch.testing.assert_close(scaled.embed(f1, f2), 128 * published.embed(f1, f2))
    published.load_state_dict(scaled.state_dict())
    torch.testing.assert_close(scaled.gate(0, e), published.gate(0, e))


def test_its_scores_have_the_partners_of_training() -> None:
    site = trainer("hsl_norm", data=toy_data())
    rows = site.method.partner_rows(3, 20)
    assert rows.shape == (4, 3) and (rows == rows[:, :1]).all()
    assert make_method("hsl_norm", {"test_partner": "self"}, settings()).partner_rows(3, 20) is None


# -- one encoder -------------------------------------------------------------------------------------------------------


def test_one_encoder_two_towers() -> None:
    plain = make_method("hsl_shared").build_model("none")
    # HSL's less one encoder, and less the half of experts and gates that looks at a partner
    assert sum(p.numel() for p in plain.parameters()) == 23_723_650 - 11_439_168 - 12 * 512 * 62 - 2 * 512 * 12
    model = SharedMMoE("resnet_tiny").eval()
    x, y = images(4, 1), images(4, 2)
    first, second = model(x, y)
    torch.testing.assert_close(first, model(x))  # the primary answer does not depend on an anchor image
    torch.testing.assert_close(second, model(images(4, 3), y)[1])
    f = model.encode(0, x)
    gate = torch.softmax(model.gates[0](f), 1)
    mixed = torch.stack([(gate[i, :, None] * model.experts(f)[i]).sum(0) for i in range(4)])
    torch.testing.assert_close(first, model.towers[0](mixed + model.skips[0](f)))


def test_statistics_of_each_task_or_of_both() -> None:
    x, y = images(6, 1), images(6, 2) * 0.1
    made = {kind: SharedMMoE("resnet_tiny", statistics=kind).train() for kind in ("task", "shared")}
    alone = copy.deepcopy(made["task"])
    alone(x)
    for model in made.values():
        model(x, y)

    def means(model: SharedMMoE) -> dict[str, Tensor]:
        return {k: v for k, v in model.state_dict().items() if "running_mean" in k and ".anchor." not in k}

    assert same(means(made["task"]), means(alone))  # as without anchor images
    norms = [layer for layer in made["task"].modules() if isinstance(layer, TaskBatchNorm)]
    assert norms and not any(torch.equal(one.running_mean, one.anchor.running_mean) for one in norms)
    assert not any(isinstance(layer, TaskBatchNorm) for layer in made["shared"].modules())
    both = nn.BatchNorm2d(8)
    both(made["shared"].encoder.conv1(torch.cat([x, y])))
    torch.testing.assert_close(made["shared"].encoder.bn1.running_mean, both.running_mean)


def test_the_norm_of_two_tasks_is_batchnorm_for_each() -> None:
    plain = nn.BatchNorm2d(4)
    nn.init.uniform_(plain.weight)
    plain(torch.rand(5, 4, 3, 3))
    two, x = TaskBatchNorm(plain), torch.rand(5, 4, 3, 3)
    for task in (0, 1):
        two.task = task
        for mode in (True, False):
            other = copy.deepcopy(plain).train(mode)
            torch.testing.assert_close(copy.deepcopy(two).train(mode)(x), other(x))


# -- distillation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["features", "logits"])
@pytest.mark.parametrize(("statistics", "heads"), [("task", "mmoe"), ("shared", "mmoe"), ("task", "linear")])
def test_distillation_starts_at_zero_and_pulls_back(on: str, statistics: str, heads: str) -> None:
    method = make_method("hsl_distill", {"distill_on": on, "statistics": statistics, "heads": heads}, settings())
    model = method.build_model().train()
    assert "distillation" not in method.terms(model, batch())  # nothing was received
    method.round_start(model, {}, None)
    assert method.terms(model, batch())["distillation"].abs() < 1e-6
    assert model.heads() and all(head.training for head in model.heads())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    distances = []
    for _ in range(6):
        optimizer.zero_grad()
        term = method.terms(model, batch())["distillation"]
        term.backward()
        optimizer.step()
        distances.append(term.item())
    assert distances[0] > 1e-4 and distances[-1] < distances[0]
    assert all(parameter.grad is None for parameter in method._received.parameters())


def test_divergence_is_kullback_and_leiblers() -> None:
    z, t, tau = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.5]), 2.0
    q, p = torch.sigmoid(z / tau), torch.sigmoid(t / tau)
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean() * tau**2
    torch.testing.assert_close(divergence(z, t, tau), wanted)
    assert divergence(z, z, tau).abs() < 1e-6
