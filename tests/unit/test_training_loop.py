"""The local loop: against a plain loop, best snapshot, guards, resume."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from core_toys import settings, toy_data, toy_set, trainer
from heterosync.errors import SiteError, UserError
from heterosync.methods import make_method
from heterosync.training import LocalTrainer
from heterosync.training.augment import augment, draw_augmentation
from heterosync.training.batches import batch_bounds, plan_epoch
from heterosync.training.seeds import seed_of, stream
from heterosync.training.state import request_digest


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def plain_loop(name: str, data, changes: dict, rounds: int) -> dict[str, torch.Tensor]:
    """Adam, BCE and the model's forward written out; it shares only the plan of batches and the network."""
    s = settings(**changes)
    model = make_method(name, None, s).build_model().to(memory_format=torch.channels_last).train()
    rows = data.splits["train"]
    x, y = torch.from_numpy(data.primary.pixels), torch.from_numpy(data.primary.labels)
    for r in range(rounds):
        moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}
        t = 0
        for epoch in range(s.local_epochs):
            plan = plan_epoch(data.primary.labels[rows], 20 if name == "hsl" else 0, s, "site-a", r, epoch)
            torch.manual_seed(seed_of(s.seed, "site-a", r, epoch, "dropout"))
            lr = 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * (r * s.local_epochs + epoch) / 10))
            draws = [
                draw_augmentation(len(plan), stream(s.seed, "site-a", r, epoch, "augment", half))
                for half in ("primary", "anchor")
            ]
            for a, b in batch_bounds(len(plan), s.batch_size):
                pick = rows[plan.primary[a:b]]
                images = (x[pick] / 255).to(memory_format=torch.channels_last)
                if s.augment:
                    images = augment(x[pick] / 255, *(d[a:b] for d in draws[0])).to(memory_format=torch.channels_last)
                if name == "hsl":
                    other = torch.from_numpy(data.anchor.pixels[plan.anchor[a:b]]) / 255
                    if s.augment:
                        other = augment(other, *(d[a:b] for d in draws[1]))
                    p1, p2 = (torch.sigmoid(z) for z in model(images, other.to(memory_format=torch.channels_last)))
                    y2 = torch.from_numpy(data.anchor.labels[plan.anchor[a:b]]).float()
                    loss = 0.5 * cross_entropy(p1, y[pick].float()) + 0.5 * cross_entropy(p2, y2)
                else:
                    loss = cross_entropy(torch.sigmoid(model(images)), y[pick].float())
                model.zero_grad()
                loss.backward()
                t += 1
                with torch.no_grad():
                    for p in model.parameters():
                        g = p.grad + s.weight_decay * p
                        m, v = moments[p]
                        m.mul_(0.9).add_(0.1 * g)
                        v.mul_(0.999).add_(0.001 * g * g)
                        p -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return model.state_dict()


def cross_entropy(p, y):
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


@pytest.mark.parametrize(
    ("name", "changes"),
    [("local", {}), ("hsl", {}), ("hsl", {"augment": True, "batch_size": 8}), ("local", {"match_steps": 40})],
)
def test_trainer_equals_a_plain_loop(name, changes):
    data = toy_data((14, 10))
    mine = trainer(name, data=data, **changes)
    mine.train_round(0)
    state = mine.train_round(1).state
    plain = plain_loop(name, data, changes, 2)
    # Adam turns rounding of a tiny gradient into a step of up to lr: compare the bulk closely and all within a step
    for key, value in plain.items():
        assert (state[key] - value).abs().max() < 1e-3, key
    start = make_method(name, None, settings()).build_model().state_dict()
    mine_all, plain_all, start_all = (
        torch.cat([d[k].flatten().double() for k, v in start.items() if v.is_floating_point()])
        for d in (state, plain, start)
    )
    assert (mine_all - plain_all).norm() < 1e-3 * (plain_all - start_all).norm()


def test_two_runs_are_identical_and_seeds_and_sites_differ():
    first, second = (trainer(local_epochs=2).train_round(0) for _ in range(2))
    assert same(first.state, second.state)
    torch.rand(7)  # the process' own history does not matter
    assert same(first.state, trainer(local_epochs=2).train_round(0).state)
    assert not same(first.state, trainer(local_epochs=2, seed=1).train_round(0).state)
    assert not same(first.state, trainer(local_epochs=2, site="site-b").train_round(0).state)


def test_training_leaves_global_generators_alone():
    before = torch.get_rng_state()
    mine = trainer()
    mine.train_round(0)
    mine.evaluate("test")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["hsl", "local"])
def test_separable_toy_is_learned(name):
    mine = trainer(name, data=toy_data((40, 40)), local_epochs=4)
    losses = [mine.train_round(r).epochs for r in range(2)]
    flat = [epoch["train_loss"] for epochs in losses for epoch in epochs]
    assert flat[-1] < flat[0]
    result = mine.evaluate("test")
    assert result.metrics["auc"] > 0.9
    assert result.metrics["auc"] == pytest.approx(roc_auc_score(result.labels, result.probabilities))


def test_round_result_and_progress():
    seen = []
    mine = trainer(local_epochs=2, progress=seen.append)
    result = mine.train_round(1)
    assert set(result.metrics) == {
        "val_auc_received", "val_auc_best", "best_epoch", "train_loss", "n_train", "n_validation", "steps", "seconds",
        "primary_gradient", "anchor_gradient", "anchor_gradient_ratio", "partner_effect", "mixture_share",
    }  # fmt: skip
    assert (result.metrics["n_train"], result.metrics["n_validation"], result.metrics["steps"]) == (24, 8, 4)
    assert [(p["site"], p["round"], p["rounds"], p["epoch"], p["epochs"]) for p in seen] == [
        ("site-a", 1, 2, 0, 2),
        ("site-a", 1, 2, 1, 2),
    ]
    assert seen[1]["seconds_per_epoch"] > 0 and seen[1]["val_auc"] == result.epochs[1]["val_auc"]
    assert [e["lr"] for e in result.epochs] == pytest.approx(
        [5.5e-4 + 4.5e-4 * math.cos(math.pi * e / 10) for e in (2, 3)]
    )
    assert all(v.device.type == "cpu" and v.is_contiguous() for v in result.state.values())
    assert result.state["encoders.0.bn1.num_batches_tracked"].dtype == torch.int64


def stub_validator(mine: LocalTrainer, scores: list[float | None], losses: list[float] | None = None) -> list[dict]:
    """Validation gives `scores` in turn (the first is for the received model); the states it saw are returned."""
    states: list[dict] = []

    def validation_score():
        states.append({k: v.clone() for k, v in mine.model.state_dict().items()})
        return scores[len(states) - 1], (losses or [0.5] * 9)[len(states) - 1]

    mine.validation_score = validation_score
    return states


def test_the_best_epoch_is_uploaded_not_the_last():
    mine = trainer(local_epochs=5)
    states = stub_validator(mine, [0.5, 0.6, 0.7, 0.8, 0.9, 0.4])
    result = mine.train_round(0)
    assert result.metrics["best_epoch"] == 3 and result.metrics["val_auc_best"] == 0.9
    assert all(torch.equal(result.state[k], states[4][k]) for k in result.state)
    assert all(torch.equal(mine.model.state_dict()[k], states[4][k]) for k in result.state)
    assert result.metrics["train_loss"] == result.epochs[3]["train_loss"]


def test_ties_go_to_the_later_epoch_and_patience_ends_a_round():
    mine = trainer(local_epochs=4)
    stub_validator(mine, [0.5, 0.8, 0.8, 0.7, 0.8])
    assert mine.train_round(0).metrics["best_epoch"] == 3
    patient = trainer(local_epochs=6, patience=2)
    stub_validator(patient, [0.5, 0.8, 0.9, 0.7, 0.8, 0.99, 0.99])
    result = patient.train_round(0)
    assert len(result.epochs) == 4 and result.metrics["best_epoch"] == 1


def test_without_auc_the_loss_chooses():
    mine = trainer(local_epochs=3)
    stub_validator(mine, [None] * 4, [9, 0.5, 0.3, 0.4])
    result = mine.train_round(0)
    assert result.metrics["best_epoch"] == 1
    assert "val_auc_best" not in result.metrics and "val_auc_received" not in result.metrics


def test_one_class_validation_is_said_once(caplog):
    data = toy_data((20, 20))
    rows = data.splits["validation"]
    data.splits["validation"] = rows[data.primary.labels[rows] == 0]
    with caplog.at_level(logging.WARNING):
        result = trainer(data=data, local_epochs=2).train_round(0)
    assert caplog.text.count("lacks a class") == 1
    losses = [e["val_loss"] for e in result.epochs]
    assert result.epochs[0]["val_auc"] is None and result.metrics["best_epoch"] == int(np.argmin(losses))
    data.splits["validation"] = rows[:0]
    assert (
        trainer(data=data, local_epochs=2).train_round(0).metrics["best_epoch"] == 1
    )  # nothing to choose by: the last


def test_steps_that_are_not_finite_are_skipped_and_counted(monkeypatch):
    mine = trainer("local", batch_size=4)
    loss, calls = mine.method.loss, []

    def sometimes(model, batch):
        calls.append({k: v.clone() for k, v in model.named_parameters()})
        return loss(model, batch) * (float("inf") if len(calls) in (2, 3) else 1.0)

    mine.method.loss = sometimes
    result = mine.train_round(0)
    assert (result.epochs[0]["steps"], result.epochs[0]["skipped"]) == (4, 2)
    assert all(torch.equal(calls[1][k], calls[3][k]) for k in calls[1])  # both bad steps changed nothing
    assert any(not torch.equal(calls[0][k], calls[1][k]) for k in calls[1])
    assert math.isfinite(result.metrics["train_loss"])


def test_a_skipped_step_leaves_the_model_as_it_was():
    mine = trainer("local", batch_size=4)
    loss, seen = mine.method.loss, []

    def sometimes(model, batch):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        if len(seen) == 2:
            batch = replace(batch, images=batch.images * float("nan"))
        return loss(model, batch)

    mine.method.loss = sometimes
    result = mine.train_round(0)
    assert result.epochs[0]["skipped"] == 1
    assert same(seen[1], seen[2])  # BatchNorm's statistics and counters too
    assert all(torch.isfinite(v).all() for v in result.state.values())
    assert {int(v) for k, v in result.state.items() if "tracked" in k} == {5}  # the applied steps are counted, no other


@pytest.mark.parametrize("partner", ["self", "sat_mean"])
def test_float64_stays_on_the_cpu(monkeypatch, partner):
    """MPS has no float64: what a tensor of the device becomes must first be brought to the CPU."""
    brought = set()
    cpu, double = torch.Tensor.cpu, torch.Tensor.double

    def to_cpu(tensor):
        result = cpu(tensor).view_as(tensor)
        brought.add(id(result))
        kept.append(result)
        return result

    def to_double(tensor):
        assert id(tensor) in brought
        return double(tensor)

    kept: list[torch.Tensor] = []
    mine = trainer("hsl", {"test_partner": partner, "n_partners": 2}, augment=True)
    mine.method.diagnostics = lambda model, batch: {}
    monkeypatch.setattr(torch.Tensor, "cpu", to_cpu)
    monkeypatch.setattr(torch.Tensor, "double", to_double)
    mine.train_round(0)
    assert brought


def test_divergence_names_site_round_and_setting():
    mine = trainer("local", batch_size=4, site="clinic")
    loss = mine.method.loss
    mine.method.loss = lambda model, batch: loss(model, batch) * float("nan")
    with pytest.raises(UserError, match=r"site clinic, round 1: 5 steps in a row had no finite loss.*'lr' \(0.001\)"):
        mine.train_round(1)


def test_a_failed_round_leaves_the_model_of_the_last_finished_one():
    mine, calm = trainer("local", batch_size=4), trainer("local", batch_size=4)
    states = [t.train_round(0).state for t in (mine, calm)]
    loss = mine.method.loss
    calls = []

    def fails_late(model, batch):
        calls.append(1)
        return loss(model, batch) * (1.0 if len(calls) < 2 else float("nan"))

    mine.method.loss = fails_late
    with pytest.raises(UserError):
        mine.train_round(1)
    assert same({k: v.contiguous() for k, v in mine.model.state_dict().items()}, states[0])
    mine.method.loss = loss
    assert same(mine.train_round(1).state, calm.train_round(1).state)


def test_scores_that_are_not_finite_are_an_error():
    mine = trainer("local", site="clinic")
    with torch.no_grad():
        mine.model.net.fc.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="site clinic, test split: the model gives scores that are not finite"):
        mine.evaluate("test")


# -- received states ---------------------------------------------------------------------------------------------------


def test_received_model_is_checked():
    mine = trainer(site="clinic")
    good = make_method("hsl", None, settings(seed=5)).build_model().state_dict()
    before = mine.evaluate("test").probabilities
    name = "skips.0.bias"
    for bad, message in [
        ({k: v for k, v in good.items() if k != name}, "site clinic: received model lacks the tensor 'skips.0.bias'"),
        ({**good, "extra": torch.zeros(1)}, "unknown tensor 'extra'"),
        ({**good, name: torch.zeros(3)}, r"'skips.0.bias' is \(3,\) instead of \(32,\)"),
        ({**good, name: torch.full((32,), float("nan"))}, "holds values that are not finite"),
    ]:
        with pytest.raises(UserError, match=message):
            mine.train_round(0, bad)
    other = mine.evaluate("test", good)
    assert not np.allclose(other.probabilities, before)
    assert (mine.evaluate("test").probabilities == before).all()  # a look at another model leaves the own one


def test_what_a_method_refuses_is_told_with_site_and_round_once():
    mine = trainer("local", site="clinic")

    def refuse(model, received, examples):
        raise UserError("site plans are needed")  # of no site, for all its first word

    mine.method.round_start = refuse
    with pytest.raises(SiteError, match="^site clinic, round 0: site plans are needed$"):
        mine.train_round(0)
    mine.data.splits["train"] = mine.data.splits["train"][:1]
    with pytest.raises(SiteError, match="^site clinic: the train split has fewer than 2 images"):
        mine.train_round(0)


def test_a_round_starts_from_the_received_state():  # nothing is re-initialised
    shared = make_method("hsl", None, settings(seed=5)).build_model().state_dict()
    mine = trainer()
    mine.train_round(0)
    seen = []
    mine.method.round_start = lambda model, *_: seen.append(request_digest(model.state_dict()))
    result = mine.train_round(1, shared)
    assert seen == [request_digest(shared)]
    assert result.metrics["val_auc_received"] == pytest.approx(mine.evaluate("validation", shared).metrics["auc"])
    assert same(result.state, trainer(seed=0).train_round(1, shared).state)  # and of nothing else than it


def test_wrong_data_and_splits_are_named():
    with pytest.raises(UserError, match=r"anchor images are \(3, 16, 16\), training settings ask for \(3, 32, 32\)"):
        data = toy_data()
        trainer(data=type(data)(data.labels, data.primary, data.splits, toy_set((4, 4), 1, 16), "x", data.config))
    with pytest.raises(UserError, match="needs the anchor pack"):
        trainer(data=toy_data(anchor=None)).train_round(0)
    with pytest.raises(UserError, match="no split 'tests': did you mean 'test'"):
        trainer().evaluate("tests")
    with pytest.raises(UserError, match="precision 'float16'"):
        trainer(precision_used="float16")


def test_bfloat16_trains_and_uploads_float32():
    mine, computed = trainer(precision_used="bfloat16", local_epochs=2), set()
    conv = next(m for m in mine.model.modules() if isinstance(m, torch.nn.Conv2d))

    def note(module, inputs, output):
        if module.training:  # the diagnostics, in evaluation mode, are in float32
            computed.add(output.dtype)

    conv.register_forward_hook(note)
    result = mine.train_round(0)
    assert computed == {torch.bfloat16}
    assert {v.dtype for v in result.state.values()} == {torch.float32, torch.int64}
    exact = trainer(local_epochs=2).train_round(0)
    assert not same(result.state, exact.state)
    assert result.metrics["train_loss"] == pytest.approx(exact.metrics["train_loss"], abs=0.05)


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "keep"), [("local", False), ("local", True), ("hsl", True)])
def test_killed_and_restored_equals_uninterrupted(tmp_path, name, keep):
    whole = trainer(name, keep_moments=keep)
    whole.train_round(0)
    wanted = whole.train_round(1)
    trainer(name, keep_moments=keep, work=tmp_path).train_round(0)
    again = trainer(name, keep_moments=keep, work=tmp_path)  # a new process would start like this
    assert again.restore() == 0
    assert same(again.train_round(1).state, wanted.state)


def test_kept_moments_matter():
    fresh, kept = trainer("local"), trainer("local", keep_moments=True)
    assert same(fresh.train_round(0).state, kept.train_round(0).state)
    assert not same(fresh.train_round(1).state, kept.train_round(1).state)


def test_kept_moments_are_those_of_the_best_epoch():
    mine = trainer("local", keep_moments=True, local_epochs=4)
    stub_validator(mine, [0.5, 0.6, 0.9, 0.7, 0.8])
    mine.train_round(0)
    short = trainer("local", keep_moments=True, local_epochs=2)
    stub_validator(short, [0.5, 0.6, 0.9])
    short.train_round(0)
    for kept, wanted in zip(*(t._last["moments"]["state"].values() for t in (mine, short)), strict=True):
        assert all(torch.equal(kept[name], wanted[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_a_finished_round_is_not_trained_twice(tmp_path):
    shared = make_method("hsl", None, settings(seed=5)).build_model().state_dict()
    first = trainer(work=tmp_path).train_round(0, shared)
    again = trainer(work=tmp_path)
    assert again.restore() == 0
    again._train = None  # would fail if called
    stored = again.train_round(0, shared)
    assert same(stored.state, first.state) and stored.metrics == first.metrics and stored.epochs == first.epochs
    fresh = trainer(work=tmp_path)
    fresh.restore()
    other = make_method("hsl", None, settings(seed=6)).build_model().state_dict()
    assert same(fresh.train_round(0, other).state, trainer().train_round(0, other).state)  # another request: trained


def test_a_new_run_in_an_old_folder_starts_anew(tmp_path):
    first = trainer("local", work=tmp_path).train_round(0)
    again = trainer("local", work=tmp_path, lr=2e-3)
    again.restore()
    assert same(again.train_round(0).state, trainer("local", lr=2e-3).train_round(0).state)
    assert not same(again.train_round(0).state, first.state)


def test_damaged_resume_states_are_named(tmp_path):
    mine = trainer("local", work=tmp_path)
    assert mine.restore() is None
    mine.train_round(0)
    file = tmp_path / "state.pt"
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]  # no temporary file is left
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="site site-a: resume state .*state.pt is damaged: delete it"):
        trainer("local", work=tmp_path).restore()
    torch.save({"round": 1}, file)
    with pytest.raises(UserError, match="no resume state of this version"):
        trainer("local", work=tmp_path).restore()
    file.write_bytes(whole)
    with pytest.raises(UserError, match="is of method 'local', not 'hsl'"):
        trainer("hsl", work=tmp_path).restore()
    with pytest.raises(UserError, match="is of site 'site-a', not 'site-b'"):
        trainer("local", work=tmp_path, site="site-b").restore()
    with pytest.raises(UserError, match="another network"):
        trainer("local", {"network": "mmoe"}, work=tmp_path).restore()
