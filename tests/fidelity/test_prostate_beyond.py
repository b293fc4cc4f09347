"""What the prostate paper's Discussion names as future work, and the pattern that its results have."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from heterosync.data.volume_phantoms import make_phantom_alliance
from heterosync.errors import UserError
from heterosync.federation.modelfile import load_model, save_model
from heterosync.federation.runner import run_inprocess
from heterosync.federation.site import SiteTrainer
from heterosync.methods import make_method
from heterosync.methods.prostate_finetune import forgetting
from heterosync.study.evidence.cross_site import cross_site_table, score_ensemble
from heterosync.training import LocalTrainer
from segment_toys import TINY, toy_cases, toy_volume_alliance

ROUNDS = 2


def received(path: Path, seed: int = 3) -> Path:
    """A model file as a federation leaves it."""
    method = make_method("prostate_ahnet", None, {**TINY, "seed": seed})
    state = method.build_model().state_dict()
    return save_model(path, method.name, method.settings, method.training, state, ("background", "organ"), 5)


def finetuner(file: Path, method: str = "prostate_finetune", **settings: float) -> LocalTrainer:
    made = make_method(method, settings, {**TINY, "crops": 2, "lr": 1e-3, "weights": str(file)})
    return LocalTrainer(made, toy_cases(), "site-a")


# -- Learning without Forgetting ---------------------------------------------------------------------------------------


def test_the_distillation_term_is_equation_2_to_4_of_the_paper() -> None:
    z, before, t = torch.tensor([0.3, -2.0, 1.0]), torch.tensor([1.0, -1.0, 1.0]), 2.0
    expected = 0.0
    for new, old in zip(torch.sigmoid(z).tolist(), torch.sigmoid(before).tolist(), strict=True):
        soft = [[p ** (1 / t) / (p ** (1 / t) + (1 - p) ** (1 / t)) for p in (o, 1 - o)] for o in (new, old)]
        expected -= sum(q * math.log(p) for p, q in zip(*soft, strict=True)) / 3
    assert forgetting(z, before, t).item() == pytest.approx(expected, rel=1e-6)
    same = before.clone().requires_grad_()
    forgetting(same, before, t).backward()
    assert torch.allclose(same.grad, torch.zeros(3), atol=1e-7)  # nothing is forgotten yet: nothing pulls


def test_the_learning_rate_is_a_tenth_of_the_federations() -> None:
    rates = {name: make_method(name).training.lr for name in ("prostate_finetune", "prostate_ahnet")}
    assert rates == {"prostate_finetune": 1e-5, "prostate_ahnet": 1e-4}
    assert make_method("prostate_finetune", None, {"lr": 1e-3}).training.lr == 1e-3


def test_without_distillation_it_is_private_training_from_the_received_model(tmp_path: Path) -> None:
    file = received(tmp_path / "best_model.pt")
    plain, private = finetuner(file, distillation=0.0), finetuner(file, "prostate_private")
    assert all(torch.equal(v, load_model(file).state[k]) for k, v in plain.model.state_dict().items())
    for round_ in range(ROUNDS):
        a, b = plain.train_round(round_).state, private.train_round(round_).state
        assert all(torch.equal(a[name], b[name]) for name in a)
    kept = finetuner(file, distillation=1.0).train_round(0).state
    assert any(not torch.equal(kept[name], private.train_round(0).state[name]) for name in kept)


def test_distillation_holds_the_outputs_near_those_of_the_received_model(tmp_path: Path) -> None:
    file = received(tmp_path / "best_model.pt")
    case = toy_cases().cases[4].image[None, :, :24, :20, :16]

    def probabilities(mine: LocalTrainer) -> torch.Tensor:
        with torch.inference_mode():
            return torch.sigmoid(mine.model.eval()(case))

    def moved(weight: float) -> float:
        mine = finetuner(file, distillation=weight)
        before = probabilities(mine)
        for round_ in range(ROUNDS):
            mine.train_round(round_)
        return float((probabilities(mine) - before).abs().mean())

    assert moved(100.0) < 0.5 * moved(0.0)


def test_the_received_model_is_found_named_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="goes on from a model that the site received: set training setting 'weights'"):
        LocalTrainer(make_method("prostate_finetune", None, TINY), toy_cases(), "site-a")
    with pytest.raises(UserError, match="'weights' is 'gone.pt' but .*gone.pt does not exist: put the file there"):
        finetuner(Path("gone.pt"))
    other = make_method("prostate_ahnet", None, {**TINY, "network": "ahnet", "patch": [64, 32, 32], "psp_blocks": 0})
    torch.save(dict(list(other.build_model().state_dict().items())[:3]), tmp_path / "other.pt")
    with pytest.raises(UserError, match="a file of another network .*same settings 'network' and 'psp_blocks'"):
        finetuner(tmp_path / "other.pt")
    with pytest.raises(UserError, match="'temperature' counts only with distillation above 0"):
        make_method("prostate_finetune", {"distillation": 0.0, "temperature": 3.0}, TINY)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = received(cache / "best_model.pt")
    mine = finetuner(Path("best_model.pt"))  # a job names the file, every site has it in the same place
    assert all(torch.equal(v, load_model(file).state[k]) for k, v in mine.model.state_dict().items())


def test_sites_with_other_received_models_are_told_apart_at_the_check_in(tmp_path: Path) -> None:
    sites = toy_volume_alliance(tmp_path / "data", 1)
    marks = set()
    for seed in (1, 2):
        file = received(tmp_path / f"{seed}.pt", seed)
        training = {**TINY, "weights": str(file)}
        site = SiteTrainer("site-a", sites["site-a"], "prostate_finetune", None, training, tmp_path / f"w{seed}")
        marks.add(site.check_in()["initial_weights"])
    assert len(marks) == 2 and all(mark.startswith("file sha256:") for mark in marks)


# -- the pattern of Tables 3 and 4 -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_federated_model_beats_every_private_one_abroad(tmp_path: Path) -> None:
    """Phantoms of three scanners at 4 mm, 24 epochs: every private model is good at home and worse abroad than the
    federated one; so is every model that was fine-tuned at one of the sites. With phantoms of seeds 1 and 2,
    too, the federated and the fine-tuned models were better abroad by 0.1 and more; what a private model loses abroad
    was 0.08 at the least."""
    names = make_phantom_alliance(tmp_path / "data", seed=0, cases=8, field_of_view=64.0)
    places = {name: tmp_path / "data" / name for name in (*names, "unseen")}
    sites = {name: places[name] for name in names}
    training = {**TINY, "spacing": 4.0, "crops": 4, "rounds": 24}
    fused = run_inprocess("prostate_ahnet", sites, tmp_path / "federated", training=training)
    alone = run_inprocess("prostate_private", sites, tmp_path / "private", training=training)
    best = fused.folder / "best_model.pt"
    tuned_by = {**training, "weights": str(best), "rounds": 2, "lr": 1e-3}
    tuned = run_inprocess("prostate_finetune", sites, tmp_path / "tuned", training=tuned_by)

    models = {"federated": best}
    for kind, run in (("private", alone), ("tuned", tuned)):
        models |= {f"{kind} {site}": run.folder / "sites" / site / "own_best.pt" for site in sites}
    scores = [row for name, file in models.items() for row in score_ensemble(name, [load_model(file)], places)]

    def dice(model: str, *where: str) -> float:
        return float(np.mean([row.dice for row in scores if row.model == model and row.site in where]))

    for site in sites:
        abroad = [name for name in sites if name != site]
        assert dice("federated", *abroad) > dice(f"private {site}", *abroad) + 0.1
        assert dice(f"private {site}", site) > dice(f"private {site}", *abroad) + 0.1
        # fine-tuned with Learning without Forgetting: still better abroad than what the site would have trained alone
        assert dice(f"tuned {site}", *abroad) > dice(f"private {site}", *abroad) + 0.05
    table = cross_site_table(scores, "federated", challenge=["unseen"])
    assert "unseen" in table and "tuned north" in table
