"""FedPPKT: the teacher that stays, the pictures that it is turned into, and what the server makes of generators."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

from core_toys import settings, toy_data, trainer
from heterosync import pulse
from heterosync.data.dataset import load_site
from heterosync.errors import Aborted, UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.initial import initial_state
from heterosync.federation.runner import run_inprocess
from heterosync.federation.server import Server
from heterosync.methods import make_method
from heterosync.methods.answer import Answer
from heterosync.methods.fedppkt import FedPPKT, part
from heterosync.models.inversion import DeepGenerator, MetaGenerator, StatisticsGap, bernoulli_kl
from heterosync.training import Batch
from heterosync.training.classification import PictureExamples
from heterosync.training.feed import Feed
from method_toys import last, own, same
from toys import SMOKE, toy_site

SMALL = {
    **{"teacher_epochs": 3, "nz": 4, "ngf": 2, "synthesis_batch": 8, "pool": 16, "kd_steps": 2},
    **{"server_gen_epochs": 1, "server_gen_steps": 2},
}


def ready(**changes):
    """A trainer whose site has had its stage 0 (round 0), and the state that it began with."""
    done = trainer("fedppkt", {**SMALL, **changes}, toy_data((15, 15), anchor=None, signal=155), rounds=9)
    state = initial_state(done.method)
    done.train_round(0, state)
    return done, state


def answers(states: dict[str, dict[str, Tensor]]) -> dict[str, Answer]:
    share = 1 / len(states)
    return {site: Answer(9, {}, share, 1.0, tuple(t), t.__getitem__) for site, t in states.items()}


# -- the mathematics ---------------------------------------------------------------------------------------------------


def test_divergence_of_two_classes_from_one_logit_each():
    t, s = torch.tensor([0.3, -2.0, 40.0]).double(), torch.tensor([-1.0, 0.5, -40.0]).double()
    for temperature in (1.0, 20.0):
        expected = kl_divergence(Bernoulli(logits=t / temperature), Bernoulli(logits=s / temperature))
        assert torch.allclose(bernoulli_kl(t, s, temperature), expected)
    two = [torch.log_softmax(torch.stack([torch.zeros_like(x), x], 1) / 20, 1) for x in (t, s)]
    assert torch.allclose(bernoulli_kl(t, s, 20.0), (two[0].exp() * (two[0] - two[1])).sum(1))
    assert float(bernoulli_kl(t, t).abs().max()) == 0


def test_the_gap_by_hand_and_its_smoothing():
    layer = nn.BatchNorm2d(2).eval()
    layer.running_mean.copy_(torch.tensor([1.0, -1.0]))
    gap = StatisticsGap(layer)
    first = torch.tensor([[0.0, 2.0], [4.0, 6.0]])[:, :, None, None]  # means 2, 4; variances 4, 4
    by_hand = math.hypot(1, 5) + math.hypot(3, 3)
    assert float(gap(first)[1]) == pytest.approx(by_hand)
    assert float(gap(first)[1]) == pytest.approx(by_hand)  # nothing is remembered yet
    gap.remember()
    assert float(gap(first)[1]) == pytest.approx(by_hand)  # smoothed with itself
    _, second = gap(torch.zeros(2, 2, 1, 1))  # moments 0.9 of the first
    assert float(second) == pytest.approx(math.hypot(1 - 1.8, -1 - 3.6) + math.hypot(1 - 3.6, 1 - 3.6))
    assert float(gap(torch.zeros(2, 2, 1, 1))[1]) == float(second) and not layer._forward_pre_hooks


def test_the_generators_step_is_adams_with_the_copys_gradients_added():
    torch.manual_seed(0)
    generator = DeepGenerator(32, 3, depth=4, width=2).double()
    before = copy.deepcopy(generator)
    meta = MetaGenerator(generator, 2, 6, 5e-3, 0.015, lambda images, rng: images)
    seen: list[float] = []

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return ((images.double().mean((1, 2, 3)) - labels) ** 2).mean()

    DeepGenerator.__call__, call = lambda self, z: call(self, z.double()), DeepGenerator.__call__  # draws are float32
    try:
        best, labels, losses = meta.epoch(loss, np.random.default_rng(1))
        fast, rng = copy.deepcopy(before), np.random.default_rng(1)
        z = torch.from_numpy(rng.standard_normal((6, 4, 1, 1), dtype=np.float32)).requires_grad_()
        y = torch.from_numpy(rng.integers(0, 2, 6).astype(np.float32))
        groups = [{"params": list(fast.parameters()), "lr": 5e-3}, {"params": [z], "lr": 0.015}]
        inner, total = torch.optim.Adam(groups, betas=(0.5, 0.999)), []
        for _ in range(2):
            inner.zero_grad()
            value = loss(fast(z), y)
            value.backward()
            seen.append(value.item())
            total.append([p.grad.clone() for p in fast.parameters()])
            inner.step()
    finally:
        DeepGenerator.__call__ = call
    for parameter, *gradients in zip(before.parameters(), *total, strict=True):
        parameter.grad = gradients[0] + gradients[1]
    torch.optim.Adam(before.parameters(), lr=2 * 5e-3, betas=(0.5, 0.999)).step()
    for ours, theirs in zip(generator.parameters(), before.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert losses == pytest.approx(seen) and torch.equal(labels, y) and best.shape == (6, 3, 32, 32)
    assert all(p.grad is None for p in generator.parameters())


def test_the_generator_at_the_papers_size():
    with torch.device("meta"):
        generator = DeepGenerator(224)
        assert generator.latent == (256, 7, 7)
        assert generator(torch.empty(2, 256, 7, 7)).shape == (2, 3, 224, 224)
        assert not list(generator.buffers())
    with pytest.raises(UserError, match="'image_size' is 100: a generator of five stages makes multiples of 32"):
        DeepGenerator(100)


# -- a round -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sent(two, tmp_path_factory):
    """A run of three rounds: its summary, and all that its sites sent."""
    seen: list[Contribution] = []
    accept = Server.accept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "accept", lambda self, sent: [seen.append(sent), accept(self, sent)][1])
        out = tmp_path_factory.mktemp("ppkt") / "run"
        summary = run_inprocess("fedppkt", two, out, SMALL, {**SMOKE, "rounds": 3})
    return summary, seen


def test_teacher_and_pool_never_leave(sent):
    summary, seen = sent
    first = initial_state(make_method("fedppkt", SMALL, settings()))
    for contribution in seen:
        assert {name.split(".")[0] for name in contribution.tensors} == {"student", "gen"}
        assert set(contribution.tensors) == set(first) - {"rounds"}
    kept = {name.split(".")[0] for name in own(summary)} - {"student", "gen", "rounds"}
    assert kept == {"teacher", "taught", "pool", "pool_labels", "made"}


def test_the_first_round_leaves_the_student_as_it_is(sent):
    summary, seen = sent
    first = initial_state(make_method("fedppkt", SMALL, settings()))
    by_round = {r: [c for c in seen if c.round == r] for r in range(3)}
    assert [len(part) for part in by_round.values()] == [2, 2, 2]
    for contribution in by_round[0]:
        assert same(contribution.tensors, first, "student.") and not same(contribution.tensors, first, "gen.")
        assert contribution.metrics["steps"] == 0
    for contribution in by_round[1]:
        assert not same(contribution.tensors, first, "student.") and contribution.metrics["steps"] == 2
    assert int(last(summary)["rounds"]) == 3


def test_two_runs_are_equal_also_after_a_kill(sent, two, tmp_path):
    def kill(event: dict) -> None:
        if event["event"] == "site" and event["round"] == 1:
            raise KeyboardInterrupt

    changes = {**SMOKE, "rounds": 3}
    with pytest.raises(KeyboardInterrupt):
        run_inprocess("fedppkt", two, tmp_path / "run", SMALL, changes, progress=kill)
    again = run_inprocess("fedppkt", two, tmp_path / "run", SMALL, changes)
    assert again.state_hash == sent[0].state_hash and again.metrics == sent[0].metrics
    assert all(same(own(again, site), own(sent[0], site), "") for site in two)


def test_private_training_images_are_read_in_stage_0_alone(sent, two, tmp_path, monkeypatch):
    """Afterwards their files are gone, and not one picture of the training split is taken from memory either."""
    read: list[tuple[str, int]] = []
    rows: set[tuple[int, int]] = set()  # (images of the site, row)
    chosen, batch = PictureExamples.chosen, Feed.batch

    def watched(self, round_, epoch, rows):
        read.append((self._site, epoch))
        return chosen(self, round_, epoch, rows)

    sites = {name: shutil.copytree(folder, tmp_path / name) for name, folder in two.items()}
    loaded = [load_site(folder, 32, need_anchor=False) for folder in sites.values()]
    private, other = (
        {(len(site.primary), row) for site in loaded for split in splits for row in site.splits[split]}
        for splits in (["train"], ["validation", "test"])
    )

    def noted(self, part):
        rows.update((len(self), row) for row in part)
        return batch(self, part)

    def remove(event: dict) -> None:
        if event["event"] == "round" and event["round"] == 0:
            assert sorted(read) == [(name, epoch) for name in sites for epoch in range(3)]
            for folder in sites.values():
                (folder / "images.npz").unlink()
                shutil.rmtree(folder / ".heterosync")
            monkeypatch.setattr(Feed, "batch", noted)

    monkeypatch.setattr(PictureExamples, "chosen", watched)
    monkeypatch.setattr(PictureExamples, "training", None)
    run = run_inprocess("fedppkt", sites, tmp_path / "run", SMALL, {**SMOKE, "rounds": 3}, progress=remove)
    assert len(read) == 6 and run.state_hash == sent[0].state_hash
    assert len(private) == 54 and rows == other


def test_a_teacher_is_a_classifier_of_its_sites_images():
    done, state = ready(teacher_epochs=8)
    teacher = done.model.teacher
    assert done._examples.evaluate(teacher, "test").metrics["auc"] > 0.9
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    done.model.train()
    assert not teacher.training and done.model.student.training
    taught = {name: value.clone() for name, value in teacher.state_dict().items()}
    done.train_round(1, {**state, "rounds": torch.tensor(1)})
    assert same(teacher.state_dict(), taught, "")  # statistics and counters too


def test_the_pictures_are_of_the_classes_they_were_made_for():
    done, _ = ready(teacher_epochs=8, ngf=4, nz=8, g_steps=30, synthesis_batch=16, w_bn=0.1, w_oh=10.0)
    model, method = done.model, done.method
    with torch.no_grad():
        guess = model.teacher(model.pool[:16].float() / 255) > 0
    assert int(model.made) == 16 and set(model.pool_labels[:16].tolist()) == {0, 1}
    assert float((guess == model.pool_labels.bool()[:16]).float().mean()) > 0.8
    losses = method._synthesise(model, np.random.default_rng(0))
    assert min(losses) < losses[0]
    assert int(model.made) == 32  # the pool holds 16: the new ones took the place of the old


def test_the_student_learns_what_its_teacher_says_of_the_pictures():
    done, _ = ready(teacher_epochs=6, pool=32, synthesis_batch=32)
    model, batch = done.model.train(), Batch(done.model.pool.float() / 255, done.model.pool_labels.float())
    optimizer, losses = torch.optim.Adam(model.student.parameters(), 3e-3), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = done.method.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 4 and all(p.grad is None for p in model.teacher.parameters())
    expected = 400 * bernoulli_kl(model.teacher(batch.images), model.student(batch.images), 20.0).mean()
    assert float(done.method.loss(model, batch)) == pytest.approx(float(expected), rel=1e-3)


def test_the_student_counts_only_through_the_adversarial_term():
    def drawn(w_adv: float, scale: float) -> Tensor:
        done, _ = ready(w_adv=w_adv, g_steps=3)
        with torch.no_grad():
            done.model.student.net.fc.weight.mul_(scale)
        done.method._synthesise(done.model, np.random.default_rng(0))
        return done.model.pool

    assert torch.equal(drawn(0.0, 1.0), drawn(0.0, 50.0))
    assert not torch.equal(drawn(1.1, 1.0), drawn(1.1, 50.0))


def test_a_round_keeps_the_last_generator_and_pool_beside_the_best_student(monkeypatch):
    done, state = ready()
    done.method.training = settings(local_epochs=3, rounds=9)
    scores = iter([(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (0.25, 0.0)])  # the first epoch is the best
    monkeypatch.setattr(PictureExamples, "validate", lambda self, model: next(scores))
    made: list[Tensor] = []
    synthesise = FedPPKT._synthesise

    def watched(self, model, rng):
        losses = synthesise(self, model, rng)
        made.append(model.pool.clone())
        return losses

    monkeypatch.setattr(FedPPKT, "_synthesise", watched)
    before = int(done.model.made)
    result = done.train_round(1, {**state, "rounds": torch.tensor(1)})
    assert result.metrics["best_epoch"] == 0 and len(made) == 3
    assert torch.equal(result.state["pool"], made[-1]) and int(result.state["made"]) == before + 24


def test_sites_keep_their_own_generator_until_it_has_been_refined():
    done, state = ready()
    mine = {name: value.clone() for name, value in done.model.gen.state_dict().items()}
    for rounds, keeps in ((0, True), (1, True), (2, False)):
        foreign = {name: value + 1 if name.startswith("gen.") else value for name, value in state.items()}
        done.method.receive(done.model, {**foreign, "rounds": torch.tensor(rounds)})
        assert same(done.model.gen.state_dict(), mine, "") == keeps


def test_a_site_that_joins_later_has_its_stage_0_then():
    done = trainer("fedppkt", SMALL, toy_data((15, 15), anchor=None, signal=155), rounds=9)
    result = done.train_round(5, {**initial_state(done.method), "rounds": torch.tensor(5)})
    assert bool(done.model.taught) and int(done.model.made) == 8 and result.metrics["steps"] == 2


# -- the server --------------------------------------------------------------------------------------------------------


def fused(round_: int, **changes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What two sites with different tensors become in a round, and their plain mean."""
    method = make_method("fedppkt", {**SMALL, **changes}, settings())
    state = initial_state(method)
    sent = {name: value for name, value in state.items() if name != "rounds"}
    other = {name: value + 0.02 if value.is_floating_point() else value + 2 for name, value in sent.items()}
    other = {name: value.abs() if "running_var" in name else value for name, value in other.items()}
    result = method.fuse({**state, "rounds": torch.tensor(round_)}, answers({"a": sent, "b": other}), {})
    mean = {name: ((sent[name].double() + other[name].double()) / 2).to(sent[name].dtype) for name in sent}
    return result, mean


def test_without_refinement_the_server_averages_with_equal_weights():
    result, mean = fused(4, server_gen_epochs=0, server_gen_steps=10)
    assert int(result["rounds"]) == 5 and same(result, mean, "")
    result, mean = fused(0)  # nor in the first round
    assert same(result, mean, "")


def test_the_server_refines_the_generator_and_nothing_else():
    result, mean = fused(1)
    assert same(result, mean, "student.") and not same(result, mean, "gen.")
    assert all(value.isfinite().all() for value in result.values())  # a NaN differs from everything
    assert same(fused(1)[0], result, "") and not same(fused(2)[0], result, "gen.")  # drawn by the round
    assert not same(fused(1, w_oh_server=0.0)[0], result, "gen.")


def test_the_servers_steps_lower_its_loss():
    method = make_method("fedppkt", {**SMALL, "server_gen_steps": 25, "server_gen_epochs": 1}, settings())
    state = initial_state(method)
    tensors = {name: value for name, value in state.items() if name != "rounds"}
    losses: list[list[float]] = []
    epoch = MetaGenerator.epoch

    def watched(self, loss, rng):
        result = epoch(self, loss, rng)
        losses.append(result[2])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetaGenerator, "epoch", watched)
        method.fuse({**state, "rounds": torch.tensor(1)}, answers({"a": tensors}), {})
    assert len(losses) == 1 and losses[0][-1] < losses[0][0]


def test_names_below_a_prefix():
    assert part({"gen.a": torch.ones(1), "b.gen.a": torch.zeros(1)}, "gen.") == {"a": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"pool": 8, "synthesis_batch": 16}, "'pool' is 8: it must hold the 16 pictures of one synthesis_batch"),
        ({"kd_T": 0}, "'kd_T' is 0.0: the smallest possible value is 1e-06"),
        ({"g_steps": 0}, "smallest possible value is 1"),
        ({"teacher_momentum": 1.0}, "largest possible value is 0.999"),
        ({"server_gen_epochs": 0, "w_oh_server": 2.0}, "'w_oh_server' counts only with server_gen_epochs above 0"),
        ({"weighting": "sample"}, "did you mean 'samples'"),
    ],
)
def test_settings_are_checked(change, cause):
    with pytest.raises(UserError, match=cause):
        make_method("fedppkt", change)


def test_a_teacher_that_diverges_is_told(tmp_path):
    with pytest.raises(UserError, match="the teacher diverges: lower fedppkt setting 'teacher_lr'"):
        run_inprocess(
            "fedppkt",
            {name: toy_site(tmp_path / name, (6, 6), anchor=False) for name in ("a", "b")},
            tmp_path / "run",
            {**SMALL, "teacher_lr": 1e30},
            SMOKE,
        )


def test_a_generator_that_diverges_is_told_with_site_and_round():
    done, state = ready()
    before = {name: value.clone() for name, value in done.model.state_dict().items()}
    with torch.no_grad():
        done.model.teacher.net.fc.bias.fill_(math.nan)
    cause = r"^site site-a, round 1: the generator's loss is not finite: lower fedppkt setting 'lr_g' \(0.005\)$"
    with pytest.raises(UserError, match=cause):
        done.train_round(1, {**state, "rounds": torch.tensor(1)})
    assert same(done.model.state_dict(), before, "")  # as after the last finished round


def test_the_servers_generator_too_and_its_long_work_ends_with_the_job(monkeypatch):
    method = make_method("fedppkt", {**SMALL, "server_gen_epochs": 20}, settings())
    told: list[str] = []
    method.tell = told.append
    state = initial_state(method)
    tensors = {name: value for name, value in state.items() if name != "rounds"}
    late = {**state, "rounds": torch.tensor(3)}
    with pytest.raises(Aborted), pulse.until(lambda: len(told) == 2):
        method.fuse(late, answers({"a": tensors}), {})
    assert told == [f"round 3, the server's refinement: epoch {n}/20" for n in (2, 4)]
    broken = {**tensors, "student.net.fc.bias": torch.full((1,), math.nan)}
    server = Server(method, late, sites=["a"])
    monkeypatch.setattr(server.fusion, "answers", lambda: answers({"a": broken}))  # which it would have refused
    server.start(3, late)
    with pytest.raises(UserError, match="^server, round 3: the generator's loss is not finite: lower fedppkt setting"):
        server.result()


def test_a_site_tells_its_stage_0_and_stops_it_when_the_job_ends():
    done = trainer("fedppkt", {**SMALL, "teacher_epochs": 40}, toy_data((15, 15), anchor=None, signal=155), rounds=9)
    told: list[str] = []
    done.method.tell = told.append
    state = initial_state(done.method)
    with pytest.raises(Aborted), pulse.until(lambda: "the teacher: epoch 8/40" in told):
        done.train_round(0, state)
    assert told == ["the teacher: epoch 4/40", "the teacher: epoch 8/40"] and not done.model.taught
    done.train_round(0, state)
    assert told[-1] == "pictures: epoch 1/1" and told[-2] == "the teacher: epoch 40/40" and done.model.taught
