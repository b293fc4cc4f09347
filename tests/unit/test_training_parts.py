"""Settings, schedule, batches, augmentation, metrics, selection, precision: each against an independent computation."""

from __future__ import annotations

import errno
import io
import os

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchvision.transforms import RandomRotation
from torchvision.transforms.functional import InterpolationMode, rotate

from core_toys import settings
from heterosync.errors import UserError
from heterosync.files import write_stream
from heterosync.methods import make_method
from heterosync.training import BestRound, Plateau, TrainingSettings, binary_metrics, choose_precision, precision
from heterosync.training.augment import MAX_ANGLE, augment, draw_augmentation
from heterosync.training.batches import batch_bounds, plan_epoch, replacement_probability
from heterosync.training.checks import check_device
from heterosync.training.metrics import auc, auc_interval
from heterosync.training.schedule import lr_at
from heterosync.training.seeds import seed_of

# -- settings ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers_recipe():
    s = TrainingSettings()
    assert (s.rounds, s.local_epochs, s.optimizer, s.lr, s.weight_decay) == (20, 5, "adam", 1e-3, 1e-4)
    assert (s.image_size, s.batch_size, s.schedule, s.schedule_period, s.lr_floor) == (224, 64, "cosine", 10, 1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "training setting 'learning_rate' is unknown"),
        ({"round": 3}, "did you mean 'rounds'"),
        ({"rounds": 2.5}, "'rounds' is 2.5: it must be a whole number"),
        ({"rounds": 0}, "the smallest possible value is 1"),
        ({"augment": "yes"}, "'augment' is 'yes': it must be true or false"),
        ({"lr": "fast"}, "'lr' is 'fast': it must be a finite number"),
        ({"lr": float("nan")}, "must be a finite number"),
        ({"optimizer": "adamm"}, "did you mean 'adam'"),
        ({"lr": 1e-5}, "'lr_floor' is 0.0001, above 'lr'"),
        ({"channels": 2}, "1 .grey. or 3"),
        ({"batch_size": 1}, "smallest possible value is 2"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(UserError, match=message):
        TrainingSettings.from_dict(values)


def test_settings_round_trip_and_yaml_numbers():
    s = TrainingSettings.from_dict({"lr": "1e-2", "rounds": 3})
    assert s.lr == 0.01
    assert TrainingSettings.from_dict(s.to_dict()) == s
    with pytest.raises(UserError, match="hsl setting 'temprature' is unknown: did you mean 'temperature'"):
        make_method("hsl", {"temprature": 1}, s)
    with pytest.raises(UserError, match="'loss_weights' is 0.5: it must be a list of 2"):
        make_method("hsl", {"loss_weights": 0.5}, s)
    assert make_method("hsl", {"loss_weights": [1, 0]}, s).settings.to_dict()["loss_weights"] == [1.0, 0.0]


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_learning_rate_over_global_epochs():  # G3
    s = TrainingSettings()
    found = [lr_at(e, s) for e in (0, 2, 5, 10, 15, 20)]
    assert found == pytest.approx([1e-3, 9.14e-4, 5.5e-4, 1e-4, 5.5e-4, 1e-3], rel=1e-3)
    restart = TrainingSettings(schedule="warm_restart")
    assert [lr_at(e, restart) for e in (9, 10, 12)] == pytest.approx([lr_at(9, s), 1e-3, lr_at(2, s)])
    assert lr_at(33, TrainingSettings(schedule="constant")) == 1e-3


# -- batches -----------------------------------------------------------------------------------------------------------


def test_replacement_probability():  # G5
    assert replacement_probability(np.repeat([0, 1], [1985, 1985])) == 0
    assert replacement_probability(np.repeat([0, 1], [3931, 39])) == pytest.approx(0.4950, abs=5e-5)
    assert replacement_probability(np.zeros(5, int)) == 0


def test_balancing_reaches_one_to_one_and_only_swaps_the_majority():
    labels = np.repeat([0, 1], [1900, 100])
    plan = plan_epoch(labels, 0, settings(), "site-a", 0, 0)
    off = plan_epoch(labels, 0, settings(balanced_sampler=False), "site-a", 0, 0)
    assert len(plan) == 2000
    assert labels[plan.primary].mean() == pytest.approx(0.5, abs=0.04)
    assert sorted(off.primary) == list(range(2000))
    changed = plan.primary != off.primary
    assert (labels[off.primary[changed]] == 0).all() and (labels[plan.primary[changed]] == 1).all()


def test_pairs_cover_both_sets_and_keep_their_partner():
    labels = np.repeat([0, 1], [60, 60])
    plan = plan_epoch(labels, 500, settings(), "site-a", 0, 0)
    assert len(plan) == 500
    assert sorted(plan.anchor) == list(range(500))
    assert set(plan.primary) == set(range(120))
    first = plan.anchor < 120
    assert (plan.primary[first] == plan.anchor[first]).all()  # 2.4: image i is paired with anchor image i
    small = plan_epoch(labels, 30, settings(), "site-a", 0, 0)
    assert len(small) == 120 and sorted(small.primary) == list(range(120)) and set(small.anchor) <= set(range(30))


def test_match_steps_and_streams():
    labels = np.repeat([0, 1], [60, 20])
    matched = settings(match_steps=300)
    assert len(plan_epoch(labels, 0, settings(), "a", 0, 0)) == 80
    alone, paired = plan_epoch(labels, 0, matched, "a", 0, 0), plan_epoch(labels, 300, matched, "a", 0, 0)
    assert len(alone) == 300
    assert (alone.primary == paired.primary).all()  # one sampler, whatever the method
    for site, round_, epoch in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1)):
        assert (plan_epoch(labels, 0, matched, site, round_, epoch).primary != alone.primary).any()
    assert seed_of(0, "a", 1) != seed_of(0, "a1", "")


def test_single_class_site_is_left_alone():
    plan = plan_epoch(np.zeros(7, int), 0, settings(), "a", 0, 0)
    assert sorted(plan.primary) == list(range(7))


def test_no_item_is_dropped_and_no_batch_has_one():
    for items in range(2, 70):
        bounds = batch_bounds(items, 16)
        assert [i for a, b in bounds for i in range(a, b)] == list(range(items))
        assert all(2 <= b - a <= 17 for a, b in bounds)


# -- augmentation ------------------------------------------------------------------------------------------------------


def test_rotation_and_flip_are_exact_where_they_can_be():
    x = torch.rand(4, 3, 16, 16)
    angles, flips = np.array([0.0, 0.0, 90.0, 180.0]), np.array([False, True, False, False])
    y = augment(x, angles, flips)
    for found, wanted in zip(y, (x[0], x[1].flip(-1), x[2].rot90(1, (-2, -1)), x[3].rot90(2, (-2, -1))), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        augment(x[2:3], np.array([90.0]), np.array([True]))[0], x[2].rot90(1, (-2, -1)).flip(-1), atol=1e-5, rtol=0
    )


def test_rotation_agrees_with_torchvision():
    x = torch.rand(1, 3, 33, 33)
    y = augment(x, np.array([11.0]), np.array([False]))
    assert torch.equal(y, rotate(x, 11.0, InterpolationMode.NEAREST))
    assert RandomRotation(MAX_ANGLE).interpolation == InterpolationMode.NEAREST  # what the published code calls
    assert set(y.unique().tolist()) <= {0.0, *x.unique().tolist()}


def test_augmentation_draws():
    angles, flips = draw_augmentation(4000, np.random.default_rng(0))
    assert abs(angles).max() <= MAX_ANGLE and abs(angles.mean()) < 0.5 and angles.std() == pytest.approx(8.66, abs=0.2)
    assert flips.mean() == pytest.approx(0.5, abs=0.03)
    y = augment(torch.ones(8, 1, 20, 20), angles[:8], flips[:8])
    assert 0 <= y.min() and y.max() <= 1 + 1e-6


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_agree_with_sklearn():
    rng = np.random.default_rng(0)
    for n in (5, 30, 400):
        labels = np.concatenate([[0, 1], rng.integers(0, 2, n)])
        scores = np.round(rng.random(n + 2) * 0.6 + labels * 0.3, 1 if n < 400 else 3)  # with ties
        scores = np.clip(scores, 0, 1)
        found = binary_metrics(labels, scores)
        called = scores >= 0.5
        assert found["auc"] == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, called))
        assert found["recall"] == pytest.approx(sk.recall_score(labels, called))
        assert found["precision"] == pytest.approx(sk.precision_score(labels, called, zero_division=0))
        assert (found["n"], found["n_positive"]) == (n + 2, labels.sum())
        assert 0 <= found["ci_low"] <= found["auc"] <= found["ci_high"] <= 1


def test_undefined_metrics_are_none():
    one = binary_metrics(np.zeros(4, int), np.array([0.1, 0.2, 0.3, 0.4]))
    assert one["auc"] is None and one["ci_low"] is None and one["recall"] is None
    assert one["precision"] == 0 and one["accuracy"] == 1
    assert binary_metrics(np.array([], int), np.array([]))["accuracy"] is None


def test_interval_covers_and_stays_honest_at_the_edge():
    low, high = auc_interval(1.0, 2, 1000)
    assert low < 0.7 and high == 1.0
    low, high = auc_interval(0.8, 50, 50)
    assert (low, high) == pytest.approx((0.70, 0.88), abs=0.03)
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], [40, 40])
    truth = 0.7602  # P(N(1, 1) > N(0, 1))
    inside = 0
    for _ in range(300):
        area = auc(labels, rng.normal(labels))
        low, high = auc_interval(area, 40, 40)
        inside += low <= truth <= high
    assert inside / 300 > 0.91


# -- selection ---------------------------------------------------------------------------------------------------------


def test_plateau_fires_after_three_small_gains():
    rule = Plateau(0.005, 3)
    assert [rule.update(v) for v in (0.70, 0.80, 0.803, 0.801, 0.805)] == [False, False, False, False, True]
    assert not rule.update(0.85)


def test_best_round_ties_to_the_later():
    best = BestRound()
    assert [best.update(r, v) for r, v in enumerate((None, 0.8, 0.7, 0.8, None, 0.79))] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert (best.round, best.value) == (3, 0.8)


# -- precision ---------------------------------------------------------------------------------------------------------


def test_precision_auto_on_a_plain_cpu_is_float32_at_once(monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: False)
    assert choose_precision(make_method("hsl", None, settings(precision="auto"))) == ("float32", {})
    assert choose_precision(make_method("hsl", None, settings(precision="bfloat16"))) == ("bfloat16", {})


@pytest.mark.parametrize("name", ["hsl", "local"])
def test_measured_precision_is_legal_and_leaves_no_trace(monkeypatch, name):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: True)
    before = torch.get_rng_state()
    chosen, timings = choose_precision(make_method(name, None, settings(precision="auto")), steps=2)
    assert chosen in precision.PRECISIONS
    assert set(timings) == set(precision.PRECISIONS) and all(0 < t < 60 for t in timings.values())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("seconds", "chosen"), [(0.8, "bfloat16"), (0.899, "bfloat16"), (0.901, "float32"), (1.2, "float32")]
)
def test_bfloat16_must_gain_a_tenth(monkeypatch, seconds, chosen):
    order: list[str] = []

    def step(learner, model, batch, device, precision):
        order.append(precision)
        pair = (len(order) - 1) // 2
        noise = (5.0, 9.0, 3.0, 0.0, 4.0)  # the first pair warms up; a busy machine slows most of the others
        return (seconds if precision == "bfloat16" else 1.0) + noise[(pair + (precision == "float32")) % 5]

    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "_step_seconds", step)
    found, timings = choose_precision(make_method("local", None, settings(precision="auto")))
    assert found == chosen and timings == pytest.approx({"float32": 1.0, "bfloat16": seconds})
    assert order == ["float32", "bfloat16"] * 5  # in turn


def test_the_measurement_ends_when_its_time_is_up(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "_step_seconds", lambda *a: calls.append(a[-1]) or 1.0)
    monkeypatch.setattr(precision, "BUDGET", 0.0)
    assert choose_precision(make_method("local", None, settings(precision="auto")))[0] == "float32"
    assert len(calls) == 4


@pytest.mark.parametrize("amx", [False, True])
def test_only_cpus_with_amx_are_measured(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert precision.has_fast_bfloat16(torch.device("cpu")) == amx


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "cards", "mps", "here"),
    [
        ("cuda", 0, False, False),
        ("cuda", 1, False, True),
        ("cuda:1", 1, False, False),
        ("cuda:1", 2, False, True),
        ("mps", 0, False, False),
        ("mps", 0, True, True),
        ("cpu", 0, False, True),
    ],
)
def test_devices_that_are_not_there_are_named(monkeypatch, device, cards, mps, here):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if here:
        check_device("clinic", torch.device(device))
        return
    with pytest.raises(UserError, match=f"site clinic: device '{device}' is not there: set device in site.yaml to cpu"):
        check_device("clinic", torch.device(device))


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_while_torch_writes_is_named(tmp_path):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="state.pt: the disk is full"):  # torch alone: "unexpected pos 64 vs 0"
        write_stream(tmp_path / "state.pt", lambda file: torch.save({"a": torch.zeros(1000)}, Full()))
    assert list(tmp_path.iterdir()) == []
