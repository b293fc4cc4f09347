"""FedTP: what each site is sent, the hyper-network's gradient, and the federated averaging that is left without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core_toys import settings, toy_data
from heterosync.cli import main
from heterosync.errors import UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.fusion import Fusion
from heterosync.federation.initial import initial_state
from heterosync.federation.modelfile import load_model
from heterosync.federation.results import read_history
from heterosync.federation.server import Server
from heterosync.methods import make_method
from heterosync.methods.answer import Answer
from heterosync.methods.fedtp import EMBEDDING, HYPER, MOMENTUM, FedTP
from heterosync.models.vit import HyperNetwork, ViT, qkv_names
from heterosync.study.export import export_model
from heterosync.training import LocalTrainer
from method_toys import last, same
from toys import SMALL

SITES = ("site-a", "site-b")
QKV = qkv_names(SMALL["fedtp"]["depth"])


def made(**changes) -> FedTP:
    method = make_method("fedtp", {**SMALL["fedtp"], **changes}, settings())
    assert isinstance(method, FedTP)
    return method


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def trained(method: FedTP, memory: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in memory.items() if not name.startswith(MOMENTUM)}


def answers(method: FedTP, memory: dict[str, Tensor], moved: float, samples=(30, 10)) -> dict[str, Answer]:
    """The sites' answers when every tensor has moved by noise of this size."""
    state, found = initial_state(method), {}
    for site, n in zip(SITES, samples, strict=True):
        sent = method.for_site(state, memory, site)
        noise = torch.Generator().manual_seed(n)
        back = {k: v + moved * torch.randn(v.shape, generator=noise, dtype=v.dtype) for k, v in sent.items()}
        found[site] = Answer(n, {}, n / sum(samples), float(n), tuple(back), back.__getitem__)
    return found


# -- the networks ------------------------------------------------------------------------------------------------------


def test_the_sizes_of_the_paper():
    """178 million weights of the hyper-network as specified, 802 million for the layout of a ViT-S; 8 MiB travel."""
    with torch.device("meta"):
        assert count(HyperNetwork(6, 1536, 128)) == 178_214_148
        assert count(HyperNetwork(12, 1152, 384)) == 801_658_116
    model = ViT(224)
    assert [model.state_dict()[name].shape for name in qkv_names(6)] == [(1536, 128)] * 6
    assert not [name for name in model.state_dict() if "qkv.bias" in name]
    assert sum(value.numel() * value.element_size() for value in model.state_dict().values()) / 2**20 == pytest.approx(
        8.0, abs=0.01
    )


def test_the_class_token_sees_every_patch():
    model = ViT(32, patch=16, dim=32, depth=2, heads=2, dim_head=16, mlp=64).eval()
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    assert model(images).shape == (2,)
    assert all(float(part.abs().max()) > 0 for part in gradient.unfold(2, 16, 16).unfold(3, 16, 16).flatten(1, 3)[0])


def test_settings_that_do_not_fit():
    with pytest.raises(UserError, match="fedtp setting 'patch' is 10, which does not divide image_size 32"):
        made(patch=10)
    with pytest.raises(UserError, match="'weights' is 'imagenet', but fedtp trains a ViT from scratch: set it to none"):
        make_method("fedtp", SMALL["fedtp"], settings(weights="imagenet", backbone="resnet18"))
    with pytest.raises(UserError, match="fedtp setting 'hyper_lr' is -1.0: the smallest possible value is 0"):
        made(hyper_lr=-1.0)


# -- what a round sends ------------------------------------------------------------------------------------------------


def test_sites_differ_in_their_own_attention_and_in_nothing_else():
    method = made()
    server = Server(method, initial_state(method), sites=SITES)
    one, other = (server.for_site(site) for site in SITES)
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    assert differ == set(QKV) and list(one) == list(initial_state(method))
    again = Server(method, initial_state(method), sites=SITES)
    assert same(again.for_site("site-b"), other, "")  # of the seed alone


def test_all_of_the_network_comes_back_and_nothing_stays(smoke_run):
    method = made()
    model = method.build_model()
    assert method.returned_names(model) == method.shared_names(model) == tuple(model.state_dict())
    assert method.own_names(model) == ()
    state = last(smoke_run("fedtp", SMALL["fedtp"]))
    assert set(state) == set(model.state_dict()) and not [name for name in state if HYPER in name or EMBEDDING in name]


# -- the server --------------------------------------------------------------------------------------------------------


def test_without_a_local_step_only_weight_decay_moves_the_hyper_network():
    method = made(hyper_decay=0.0)
    memory = method.server_memory(SITES)
    before = trained(method, memory)
    method.fuse(initial_state(method), answers(method, memory, 0.0), memory)
    assert same(trained(method, memory), before, "")
    method = made()
    method.fuse(initial_state(method), answers(method, memory, 0.0), memory)
    for name, value in before.items():
        torch.testing.assert_close(memory[name], value * (1 - 0.01 * 1e-3))


def test_the_gradient_is_that_of_finite_differences():
    """g = sum_k n_k/n J_k^T (sent - returned), entry by entry, of the hyper-network and of each embedding."""
    method = made(hyper_lr=1.0, hyper_momentum=0.0, hyper_decay=0.0)
    memory = {name: value.double() for name, value in method.server_memory(SITES).items()}
    given = answers(method, memory, 0.1)

    def inner(state: dict[str, Tensor]) -> float:
        """sum_k n_k/n <h(e_k), sent - returned>, with the bracket's right side as it was."""
        total = 0.0
        for site, answer in given.items():
            now = method.for_site({}, state, site)
            moved = {name: sent[site][name] - answer[name] for name in QKV}
            total += answer.weight * sum(float((now[name] * moved[name]).sum()) for name in QKV)
        return total

    start = {name: value.clone() for name, value in memory.items()}
    sent = {site: method.for_site({}, start, site) for site in SITES}
    method.fuse(initial_state(method), given, memory)
    for name in (HYPER + "body.0.weight", HYPER + "heads.1.bias", EMBEDDING + "site-a", EMBEDDING + "site-b"):
        gradient = (start[name] - memory[name]).flatten()
        at = int(gradient.abs().argmax())
        ends = []
        for step in (1e-6, -1e-6):
            other = {key: value.clone() for key, value in start.items()}
            other[name].view(-1)[at] += step
            ends.append(inner(other))
        assert float(gradient[at]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4) and gradient[at] != 0


def test_momentum_is_remembered_and_an_absent_site_only_decays():
    method = made(hyper_decay=0.0)
    memory = method.server_memory(SITES)
    present = {"site-a": answers(method, memory, 0.1)["site-a"]}
    start = trained(method, memory)
    method.fuse(initial_state(method), present, memory)
    assert torch.equal(memory[EMBEDDING + "site-b"], start[EMBEDDING + "site-b"])
    name = HYPER + "body.0.weight"
    first = memory[name] - start[name]
    torch.testing.assert_close(memory[MOMENTUM + name], -first / 0.01, rtol=1e-3, atol=1e-6)
    before, buffer = memory[name].clone(), memory[MOMENTUM + name].clone()
    method.fuse(initial_state(method), answers(method, memory, 0.0), memory)  # no new gradient: momentum goes on
    torch.testing.assert_close(memory[name], before - 0.01 * 0.9 * buffer)


def test_a_frozen_hyper_network_with_one_embedding_is_fedavg_on_the_rest():
    """Two rounds of real training: all but QKV is FedAvg's mean to the last bit, QKV starts anew each round."""
    method = made(hyper_lr=0.0)
    tied = method.server_memory(SITES)
    tied[EMBEDDING + "site-b"].copy_(tied[EMBEDDING + "site-a"])
    state = initial_state(method)
    server, fedavg = Server(method, state, tied, sites=SITES), Fusion(state, "samples", "fedtp")
    sites = {
        site: LocalTrainer(made(hyper_lr=0.0), toy_data((n, n), seed=n), site)
        for site, n in zip(SITES, (20, 10), strict=True)
    }
    first = server.for_site("site-a")
    for round_ in range(2):
        server.start(round_, state)
        fedavg.start(round_)
        for site, trainer in sites.items():
            received = server.for_site(site)
            assert all(torch.equal(received[name], first[name]) for name in QKV)
            result = trainer.train_round(round_, received)
            answer = Contribution(site, "fedtp", round_, result.state, {}, int(result.metrics["n_train"]))
            server.accept(answer)
            fedavg.accept(answer)
        state, mean = server.result(), fedavg.result()
        assert all(torch.equal(state[name], mean[name]) for name in state if name not in QKV)
        assert not torch.equal(state["fc.weight"], first["fc.weight"])


def test_the_hyper_network_changes_the_outcome(smoke_run):
    learnt, frozen = (smoke_run("fedtp", {**SMALL["fedtp"], "hyper_lr": lr}) for lr in (1.0, 0.0))
    names = [name for name in last(learnt) if name not in QKV]
    assert not all(torch.equal(last(learnt)[name], last(frozen)[name]) for name in names)
    moved = load_model(learnt.folder / "last_model.pt").assets["server." + EMBEDDING + "site-a"]
    assert not torch.equal(moved, load_model(frozen.folder / "last_model.pt").assets["server." + EMBEDDING + "site-a"])


def test_sites_join_and_leave_between_the_jobs_of_a_training():
    method = made()
    before = {name: value + 1 for name, value in method.server_memory(("site-a", "site-c")).items()}
    state = initial_state(method)
    server = Server(method, state, before, sites=SITES)
    new = {part + EMBEDDING + "site-b" for part in ("", MOMENTUM)}
    assert server.memory.keys() == before.keys() | new  # site-c may come back
    assert all(torch.equal(server.memory[name], value) for name, value in before.items())
    assert not torch.equal(server.memory[EMBEDDING + "site-b"], server.memory[EMBEDDING + "site-a"])
    assert not server.memory[MOMENTUM + EMBEDDING + "site-b"].any()
    sent = {site: server.for_site(site, state) for site in SITES}
    assert not same(sent["site-a"], sent["site-b"], QKV[0])


@pytest.mark.parametrize("site", ["site-b", "weight"])  # the second is the end of other names too
def test_what_the_server_remembers_is_of_known_sites_in_known_shapes(site):
    method, sites = made(), ("site-a", site)
    state, before = initial_state(method), method.server_memory(("site-a",))
    assert Server(method, state, before, sites=sites).memory.keys() == method.server_memory(sites).keys()
    lacking = {name: value for name, value in before.items() if name != HYPER + "body.0.weight"}
    unknown = [{**before, name: torch.zeros(1)} for name in ("other", "other.site-a", EMBEDDING + "no site")]
    short = [{**before, EMBEDDING + name: torch.zeros(3)} for name in ("site-a", "site-c", site)]
    for damaged in (lacking, *unknown, *short):
        with pytest.raises(UserError, match=f"does not fit the sites site-a, {site}: begin a new training"):
            Server(method, state, damaged, sites=sites)


# -- whose model -------------------------------------------------------------------------------------------------------


def test_a_site_is_tested_with_the_attention_that_it_was_sent(smoke_run, tmp_path):
    done = smoke_run("fedtp", SMALL["fedtp"])
    files = {site: load_model(done.folder / "sites" / site / "own_best.pt") for site in SITES}
    models = {site: file.build()[1].state_dict() for site, file in files.items()}
    assert {n for n in models["site-a"] if not torch.equal(models["site-a"][n], models["site-b"][n])} >= set(QKV)
    best = load_model(done.folder / "last_model.pt")
    with pytest.raises(UserError, match=r"it is only what the sites share: take a site's own own_best\.pt"):
        best.build()
    best.check_shared()  # yet a training may go on from it
    program = export_model(done.folder / "sites" / "site-a" / "own_best.pt", tmp_path / "model.pt2")
    assert program["largest_difference"] < 1e-5 and program["output"].startswith("float32")
    assert {row[0] for row in read_history(done.folder) if row[2] == "val_auc_received"} == {0, 1, 2}


def test_its_first_weights_are_random_whatever_lies_on_the_machine(smoke_run):
    done = smoke_run("fedtp", SMALL["fedtp"])
    assert load_model(done.folder / "last_model.pt").versions["initial_weights"] == "none"
    assert FedTP.first_weights(settings(weights="auto", backbone="resnet18")) == "none"
    assert made().in_words() == "a ViT of 2 layers of width 32 at 32 px"


def test_two_runs_give_the_same_tensors(smoke_run, two: dict[str, Path]):
    again = smoke_run("fedtp", SMALL["fedtp"], two, match_steps=1)  # another key, the same run
    assert same(last(again), last(smoke_run("fedtp", SMALL["fedtp"])), "")


def test_settings_that_say_nothing_are_refused_or_told(capsys):
    with pytest.raises(UserError, match="fedtp setting 'hyper_momentum' counts only with hyper_lr above 0"):
        made(hyper_lr=0.0, hyper_momentum=0.5)
    assert main(["job", "describe", "fedtp"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  backbone = "))
    assert line.endswith("counts only with other methods)")
