"""Fusion: equation 1 against independent arithmetic, bit-stable in arrival order, and refusals that take nothing."""

from __future__ import annotations

import time
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from heterosync.errors import ContributionRefused, HeteroSyncError
from heterosync.federation.contribution import Contribution
from heterosync.federation.fusion import Fusion
from heterosync.federation.server import Server
from heterosync.federation.tensorfile import TensorFile
from heterosync.methods import make_method


def state(seed: int) -> dict[str, torch.Tensor]:
    """A convolution, a BatchNorm with its counter, a scalar: everything that a real state holds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.running_mean": torch.randn(4, generator=generator) * 1e3,
        "bn.running_var": torch.rand(4, generator=generator) * 1e-6,
        "bn.num_batches_tracked": torch.tensor(10 * seed),
        "scale": torch.randn((), generator=generator),
    }


def contribution(site: str, tensors, samples: int = 10, method: str = "hsl", round_: int = 0) -> Contribution:
    return Contribution(site, method, round_, tensors, {}, samples)


def fuse(contributions, weighting: str = "equal", spill: Path | None = None):
    fusion = Fusion(state(0), weighting, "hsl", spill)
    fusion.start(0)
    for one in contributions:
        fusion.accept(one)
    return fusion.result()


@pytest.mark.parametrize(("weighting", "expected"), [("equal", 2.0), ("samples", 3.0)])
def test_golden_g1(weighting: str, expected: float) -> None:
    fusion = Fusion({"w": torch.zeros(1)}, weighting, "hsl")
    fusion.start(0)
    fusion.accept(contribution("a", {"w": torch.tensor([0.0])}, 100))
    fusion.accept(contribution("b", {"w": torch.tensor([4.0])}, 300))
    assert fusion.result()["w"].item() == expected


@pytest.mark.parametrize("spilled", [False, True])
def test_equal_fusion_is_the_arithmetic_mean_of_every_tensor(tmp_path: Path, spilled: bool) -> None:
    states = [state(seed) for seed in (1, 2, 4)]
    fused = fuse([contribution(f"s{i}", s) for i, s in enumerate(states)], spill=tmp_path if spilled else None)
    assert list(fused) == list(states[0])
    for name in states[0]:
        mean = np.mean([s[name].numpy().astype(np.float64) for s in states], axis=0)
        assert fused[name].dtype == states[0][name].dtype and fused[name].shape == states[0][name].shape
        if name == "bn.num_batches_tracked":
            assert fused[name].item() == 23  # 70 / 3, rounded
        else:
            np.testing.assert_allclose(fused[name].numpy(), mean, rtol=1e-6)


def test_equal_weights_ignore_the_size_of_a_site() -> None:
    small = fuse([contribution("a", state(1), 200), contribution("b", state(2), 200)])
    skewed = fuse([contribution("a", state(1), 200), contribution("b", state(2), 14263)])
    assert all(torch.equal(small[name], skewed[name]) for name in small)


def test_sample_weights_follow_the_size_of_a_site() -> None:
    fused = fuse([contribution("a", state(1), 200), contribution("b", state(2), 14263)], "samples")
    expected = (200 * state(1)["conv.weight"].double() + 14263 * state(2)["conv.weight"].double()) / 14463
    torch.testing.assert_close(fused["conv.weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_result_does_not_depend_on_the_order_of_arrival_nor_on_where_contributions_wait(tmp_path: Path) -> None:
    # values whose float32 sum depends on the order
    values = {"a": 1e8, "b": 1.0, "c": -1e8, "d": 0.1}
    results = []
    for spill in (None, tmp_path / "spill"):
        for order in permutations(values):
            fusion = Fusion({"w": torch.zeros(3)}, "samples", "hsl", spill)
            fusion.start(0)
            for site in order:
                fusion.accept(contribution(site, {"w": torch.full((3,), values[site])}, 7 + ord(site)))
            results.append(fusion.result()["w"])
    assert all(torch.equal(results[0], other) for other in results)


def test_one_site_comes_back_unchanged() -> None:
    fused = fuse([contribution("a", state(3))])
    assert all(torch.equal(fused[name], value) for name, value in state(3).items())


def test_numpy_in_numpy_out() -> None:
    def arrays(seed: int) -> dict:
        return {name: value.numpy() if value.ndim else value.numpy()[()] for name, value in state(seed).items()}

    fused = fuse([contribution("a", arrays(1)), contribution("b", arrays(2))])
    expected = fuse([contribution("a", state(1)), contribution("b", state(2))])
    for name, value in fused.items():
        assert isinstance(value, np.generic if value.ndim == 0 else np.ndarray)
        np.testing.assert_array_equal(value, expected[name].numpy())


def broken(**changes) -> dict:
    tensors = {**state(1), **changes}
    return {name: value for name, value in tensors.items() if value is not None}


REFUSALS = {
    "missing": (contribution("b", broken(scale=None)), "'scale' is missing"),
    "extra": (contribution("b", broken(patients=torch.zeros(3))), "'patients' is not part"),
    "shape": (contribution("b", broken(**{"conv.weight": torch.zeros(4, 3, 3)})), "'conv.weight' has shape"),
    "type": (contribution("b", broken(scale=torch.zeros((), dtype=torch.float64))), "'scale' has type float64"),
    "no tensor": (contribution("b", broken(scale=[1.0])), "'scale' is a list"),
    "nan": (contribution("b", broken(scale=torch.tensor(float("nan")))), "'scale' holds values that are not finite"),
    "inf": (contribution("b", broken(scale=torch.tensor(float("-inf")))), "'scale' holds values that are not finite"),
    "round": (contribution("b", state(1), round_=1), "of round 1, this is round 0"),
    "method": (contribution("b", state(1), method="local"), "of method 'local'"),
    "twice": (contribution("a", state(1)), "contributed to this round already"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("spilled", [False, True])
def test_refusals_name_site_and_reason_and_take_nothing(case: str, spilled: bool, tmp_path: Path) -> None:
    bad, reason = REFUSALS[case]
    fusion = Fusion(state(0), "equal", "hsl", tmp_path if spilled else None)
    fusion.start(0)
    fusion.accept(contribution("a", state(2)))
    with pytest.raises(ContributionRefused, match=f"site {bad.site} refused") as refusal:
        fusion.accept(bad)
    assert reason in refusal.value.reason
    assert fusion.refused == {bad.site: refusal.value.reason}
    assert fusion.contributors == ["a"]
    fused = fusion.result()
    assert all(torch.equal(fused[name], value) for name, value in state(2).items())


def test_sample_weights_need_samples() -> None:
    fusion = Fusion(state(0), "samples", "hsl")
    fusion.start(0)
    with pytest.raises(ContributionRefused, match="0 training images"):
        fusion.accept(contribution("a", state(1), 0))


def test_large_finite_values_are_not_mistaken_for_infinite() -> None:
    fusion = Fusion({"w": torch.zeros(2)}, "equal", "hsl")
    fusion.start(0)
    fusion.accept(contribution("a", {"w": torch.full((2,), 3e38)}))
    assert torch.equal(fusion.result()["w"], torch.full((2,), 3e38))


def test_a_round_forgets_the_round_before(tmp_path: Path) -> None:
    for spill in (None, tmp_path):
        fusion = Fusion(state(0), "equal", "hsl", spill)
        fusion.start(0)
        fusion.accept(contribution("a", state(1)))
        fusion.start(1)
        assert fusion.contributors == [] and fusion.refused == {}
        with pytest.raises(HeteroSyncError, match="no contribution"):
            fusion.result()
        fusion.accept(contribution("b", state(2), round_=1))
        assert torch.equal(fusion.result()["scale"], state(2)["scale"])


def test_spilled_files_are_deleted_with_the_fusion(tmp_path: Path) -> None:
    (tmp_path / "7.contribution").write_bytes(b"left by a killed run")
    fusion = Fusion(state(0), "equal", "hsl", tmp_path)
    assert not list(tmp_path.iterdir())
    fusion.start(0)
    fusion.accept(contribution("a", state(1)))
    assert list(tmp_path.iterdir())
    fusion.close()
    assert not list(tmp_path.iterdir())


def test_methods_that_share_nothing_fuse_nothing() -> None:
    fusion = Fusion({}, "none", "local")
    fusion.start(0)
    fusion.accept(contribution("a", {}, method="local"))
    with pytest.raises(ContributionRefused, match="not part of the shared state"):
        fusion.accept(contribution("b", {"w": torch.zeros(1)}, method="local"))
    assert fusion.result() == {}


def test_a_model_of_95_mb_is_fused_fast_and_in_little_memory(tmp_path: Path) -> None:
    reference = {f"layer{i}": torch.full((512, 512, 9), float(i)) for i in range(10)}  # 94 MB
    fusion = Fusion(reference, "equal", "hsl", tmp_path)
    for round_ in range(2):
        fusion.start(round_)
        for site in "abc":
            began = time.thread_time()
            fusion.accept(contribution(site, reference, round_=round_))
            accepted = time.thread_time() - began
        began = time.thread_time()
        fused = fusion.result()
        fused_in = time.thread_time() - began
    assert all(torch.equal(fused[name], value) for name, value in reference.items())
    # processor time; measured: 0.03 s and 0.3 s. The margin is for busy machines.
    assert accepted < 0.3 and fused_in < 1.0


def test_a_cut_off_tensor_file_is_noticed(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "x").write(state(1))
    read = file.read()
    assert all(torch.equal(read[name], value) for name, value in state(1).items())
    file.write({"short": torch.ones(2)})
    assert (tmp_path / "x").stat().st_size == 8 and list(file.read()) == ["short"]
    with (tmp_path / "x").open("r+b") as raw:
        raw.truncate(5)
    with pytest.raises(HeteroSyncError, match="cut off"):
        file.read()


# -- weights by a validation score -------------------------------------------------------------------------------------


def weighed(scores: dict[str, float | None], values: dict[str, float], weighting: str = "metric") -> Fusion:
    fusion = Fusion({"w": torch.zeros(2), "n": torch.tensor(0)}, weighting, "hsl", None, "val_dice_best")
    fusion.start(0)
    for site, score in scores.items():
        state = {"w": torch.full((2,), values[site]), "n": torch.tensor(int(values[site]))}
        metrics = {} if score is None else {"val_dice_best": score}
        fusion.accept(Contribution(site, "hsl", 0, state, metrics, samples=1000))
    return fusion


def test_metric_weights_golden_numbers() -> None:
    values = {"a": 1.0, "b": 2.0, "c": 6.0}
    fused = weighed({"a": 0.9, "b": 0.6, "c": 0.5}, values).result()  # (0.9 + 1.2 + 3.0) / 2.0
    assert torch.allclose(fused["w"], torch.full((2,), 2.55), rtol=1e-7) and fused["n"] == 3
    fused = weighed({"a": 0.8, "b": 0.0, "c": 0.2}, values).result()  # a site whose model finds nothing does not count
    assert torch.allclose(fused["w"], torch.full((2,), 2.0), rtol=1e-7)
    equal = weighed({"a": 0.7, "b": 0.7, "c": 0.7}, values).result()
    assert torch.allclose(equal["w"], torch.full((2,), 3.0), rtol=1e-7)


@pytest.mark.parametrize("weighting", ["metric", "quality"])
def test_metric_weights_that_are_all_zero_are_equal(weighting: str) -> None:
    fused = weighed({"a": 0.0, "b": 0.0, "c": 0.0}, {"a": 1.0, "b": 2.0, "c": 6.0}, weighting).result()
    assert torch.equal(fused["w"], torch.full((2,), 3.0))


@pytest.mark.parametrize(
    ("weighting", "mean"),
    [
        ("metric", (0.9 * 1 + 0.6 * 2 + 0.5 * 6) / 2.0),  # Dice of what the sites send
        ("quality", (0.1 * 1 + 0.1 * 2 + 0.8 * 6) / 1.0),  # Dice of what they received
        ("samples", (10 * 1 + 30 * 2 + 60 * 6) / 100),  # numbers of training volumes
        ("equal", 3.0),
    ],
)
def test_the_weightings_of_the_prostate_federation_golden_numbers(weighting: str, mean: float) -> None:
    server = Server(make_method("prostate_ahnet", {"weighting": weighting}), {"w": torch.zeros(2)})
    server.start(0, {"w": torch.zeros(2)})
    sites = {"a": (1.0, 0.9, 0.1, 10), "b": (2.0, 0.6, 0.1, 30), "c": (6.0, 0.5, 0.8, 60)}
    for site, (value, sent, received, cases) in sites.items():
        metrics = {"val_dice_best": sent, "val_dice_received": received}
        state = {"w": torch.full((2,), value)}
        server.accept(Contribution(site, "prostate_ahnet", 0, state, metrics, samples=cases))
    assert torch.allclose(server.result()["w"], torch.full((2,), mean), rtol=1e-6)


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (None, "it reports no val_dice_best, by which sites are weighed here"),
        (-0.1, "its val_dice_best is -0.1"),
        (float("nan"), "its val_dice_best is nan"),
        (float("inf"), "its val_dice_best is inf"),
        (1.0001, "its val_dice_best is 1.0001, by which sites are weighed here: it must be from 0 to 1"),
        (100.0, "its val_dice_best is 100.0"),  # per cent
    ],
)
def test_a_score_that_is_no_weight_is_refused(score: float | None, reason: str) -> None:
    fusion = weighed({"a": 0.5}, {"a": 1.0})
    metrics = {} if score is None else {"val_dice_best": score}
    with pytest.raises(ContributionRefused, match=reason):
        fusion.accept(Contribution("b", "hsl", 0, {"w": torch.ones(2), "n": torch.tensor(1)}, metrics))
    assert fusion.contributors == ["a"] and reason in fusion.refused["b"]
    assert torch.equal(fusion.result()["w"], torch.ones(2))
