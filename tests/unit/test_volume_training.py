"""Segmentation: loss, scores, augmentation, patches, windows, ensembles and the one loop over volumes."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist
from torch import nn

from heterosync.errors import UserError
from heterosync.federation.site import SiteTrainer
from heterosync.methods import make_method
from heterosync.models.ahnet import build_segmenter
from heterosync.training import SEGMENTATION, LocalTrainer, VolumeSettings, precision
from heterosync.training.dice import CaseScore, dice_coefficient, score_case, soft_dice_loss, summarise
from heterosync.training.patches import Patches
from heterosync.training.schedule import lr_at
from heterosync.training.seeds import stream
from heterosync.training.segmentation import FoldData, probability_map
from heterosync.training.stacked import PROBABILITY, RANGES, Draw, Stack, draw_stack
from segment_toys import TINY, toy_cases, toy_volume, toy_volume_site


def learner(name: str = "prostate_ahnet", **changes):
    return make_method(name, None, {**TINY, **changes})


def trainer(data: FoldData | None = None, **changes) -> LocalTrainer:
    work = changes.pop("work", None)
    return LocalTrainer(learner(**changes), data or toy_cases(), "site-a", work=work)


# -- network and settings ----------------------------------------------------------------------------------------------


def test_the_ahnet_has_the_stated_parameters():
    for levels, count in ((4, 38_133_768), (0, 38_127_780)):
        model = build_segmenter("ahnet", levels)
        assert sum(p.numel() for p in model.parameters()) == count
    size = sum(v.numel() * v.element_size() for v in model.state_dict().values()) / 2**20
    assert f"{size:.1f}" == "145.7" and f"{count:,}".replace(",", " ") in build_segmenter.__doc__


def test_the_ahnet_begins_where_it_can_learn():
    """MONAI's own start: logits of sd 4 to 5, and one sign for each of the eight voxels that a last one becomes."""
    torch.manual_seed(0)
    logits = build_segmenter("ahnet", 0).train()(torch.randn(1, 1, 64, 32, 32)).detach()
    assert 0.1 < logits.std() < 1.0
    eight = [logits[..., i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    assert all(torch.allclose(eight[0], one, atol=1e-6) for one in eight)


def test_the_ahnet_segments_a_patch_of_the_smallest_size():
    model = build_segmenter("ahnet", 0).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, 64, 32, 32)).shape == (1, 1, 64, 32, 32)


def test_the_tiny_network_normalises_each_volume_by_itself():
    """No statistics of a site's scanner are fused, which would be true of none of them; AH-Net keeps its BatchNorm."""
    model = build_segmenter("unet_tiny")
    assert not any("running" in name for name in model.state_dict())
    volumes = torch.randn(2, 1, 16, 16, 16)
    changed = torch.stack([volumes[0], 5 * volumes[1] + 3])
    first, second = (model.train()(images)[0] for images in (volumes, changed))
    assert torch.allclose(first, second, atol=1e-5)  # whatever else is in the batch
    assert torch.allclose(first, model.eval()(volumes[:1])[0], atol=1e-5)
    assert any("running_mean" in name for name in build_segmenter("ahnet", 0).state_dict())


def test_first_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    first, again, other = (learner(seed=seed).build_model().state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch": [96, 96, 32]}, "x and y must be multiples of 128 with psp_blocks 4"),
        ({"patch": [96, 96, 48], "psp_blocks": 2}, "z of 32"),
        ({"patch": [32, 32, 32], "psp_blocks": 2}, "one side must be at least 64"),
        ({"network": "unet_tiny", "patch": [18, 16, 16]}, "multiples of 4"),
        ({"network": "unet_tiny", "psp_blocks": 2}, "counts only with network=ahnet"),
        ({"schedule": "constant", "lr_factor": 0.1}, "counts only with schedule=plateau"),
        ({"image_size": 64}, "training setting 'image_size' is unknown"),
        ({"fold": 0}, "smallest possible value is 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        VolumeSettings.from_dict(changes)


def test_classification_and_segmentation_know_their_own_settings():
    with pytest.raises(UserError, match="'patch' is unknown"):
        make_method("fedavg", None, {"patch": [32, 32, 32]})


# -- scores ------------------------------------------------------------------------------------------------------------


def test_dice_is_equation_1():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.random((7, 6, 5)) < share) for share in (0.3, 0.5))
    first, second = ({tuple(i) for i in np.argwhere(m.numpy())} for m in (a, b))
    assert dice_coefficient(a, b) == pytest.approx(2 * len(first & second) / (len(first) + len(second)), abs=1e-15)
    empty = torch.zeros_like(a)
    assert dice_coefficient(a, a) == 1 and dice_coefficient(a, empty) == 0 and dice_coefficient(empty, empty) == 1


def test_soft_dice_loss_by_hand_and_in_float32_under_autocast():
    logits = torch.tensor([[[[[0.0, 2.0]]]], [[[[-1.0, 1.0]]]]])
    masks = torch.tensor([[[[[1.0, 1.0]]]], [[[[0.0, 0.0]]]]])
    p = torch.sigmoid(logits)
    expected = 1 - 2 * (p * masks).sum() / (p.sum() + masks.sum())
    assert soft_dice_loss(logits, masks).item() == pytest.approx(expected.item(), abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_dice_loss(logits.bfloat16(), masks)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), abs=0.01)
    # 2 M voxels: bfloat16 sums would stop counting at 256
    big = torch.full((1, 1, 128, 128, 128), 10.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert soft_dice_loss(big, torch.ones_like(big)).item() < 1e-3


def surface(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask & ~ndimage.binary_erosion(mask))


def test_hausdorff_distance_and_volumes_against_independent_computation():
    _, first = toy_volume(1)
    _, second = toy_volume(2)
    spacing = (1.0, 0.5, 3.0)
    score = score_case("x", torch.from_numpy(first), torch.from_numpy(second), spacing, 1.5e-3)
    places = [surface(mask.astype(bool)) * np.array(spacing) for mask in (first, second)]
    distances = cdist(*places)
    expected = max(np.percentile(distances.min(axis), 95) for axis in (0, 1))
    assert score.hd95 == pytest.approx(expected, rel=1e-6)
    assert score.volume == pytest.approx(first.sum() * 1.5 / 1000)
    assert score.reference_volume == pytest.approx(second.sum() * 1.5 / 1000)
    nothing = score_case("y", torch.zeros(first.shape), torch.from_numpy(second), spacing, 1.5e-3)
    assert (nothing.hd95, nothing.dice, nothing.volume) == (None, 0.0, 0.0)


def test_millilitres_are_those_of_skewed_voxels():
    data = toy_cases(1)
    skewed = np.array([[2.0, 0, 1.2, 9], [0, 2.0, 0, 9], [0, 0, 1.6, 9], [0, 0, 0, 1]])  # 2 mm apart along each axis
    data.cases[0].affine = torch.from_numpy(skewed)
    case = Patches(data.cases, (16, 16, 16), 0.5).case(0)
    assert case.spacing == pytest.approx((2.0, 2.0, 2.0)) and case.millilitres == pytest.approx(6.4e-3)  # not 8
    score = score_case(case.id, case.mask, case.mask, case.spacing, case.millilitres)
    assert score.volume == score.reference_volume == pytest.approx(int(case.mask.sum()) * 6.4e-3)


def test_a_summary_names_what_is_undefined():
    cases = [CaseScore("a", 0.8, 2.0, 30.0, 20.0), CaseScore("b", 0.6, 4.0, 20.0, 24.0), CaseScore("c", 0, None, 0, 9)]
    found = summarise(cases)
    assert found["dice"] == pytest.approx(1.4 / 3) and found["hd95"] == 3.0
    assert found["dice_sd"] == pytest.approx(np.std([0.8, 0.6, 0], ddof=1))
    assert found["volume_error"] == pytest.approx(23 / 3) and (found["n"], found["n_missed"]) == (3, 1)
    half = 4.302652729911275 * found["dice_sd"] / 3**0.5  # Student's t with 2 degrees of freedom
    assert found["ci_low"] == 0.0 and found["ci_high"] == pytest.approx(min(1.0, 1.4 / 3 + half))
    alone = summarise(cases[:1])
    assert (alone["dice"], alone["dice_sd"], alone["ci_low"]) == (0.8, None, None)
    assert summarise([])["dice"] is None and summarise([])["n"] == 0


# -- augmentation ------------------------------------------------------------------------------------------------------


def patch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    image, mask = toy_volume(seed, (32, 28, 24))
    return torch.from_numpy(image)[None], torch.from_numpy(mask)[None].float()


def stacked(image: torch.Tensor, mask: torch.Tensor, name: str, *parameters: float) -> tuple[torch.Tensor, ...]:
    return Stack(Draw({name: parameters}, 5), tuple(image.shape[1:])).apply(image, mask)


def test_each_transformation_has_chance_one_half_and_stays_in_its_range():
    draws = [draw_stack(np.random.default_rng(seed)) for seed in range(400)]
    for name, ranges in RANGES.items():
        drawn = np.array([draw.parameters[name] for draw in draws if name in draw.parameters])
        assert abs(len(drawn) / 400 - PROBABILITY) < 0.1, name
        for values, (low, high) in zip(drawn.T, ranges, strict=True):
            assert low <= values.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < values.max() <= high
    assert list(RANGES) == [
        "sharpness", "blur", "noise", "brightness", "contrast", "perturb", "rotation", "scaling", "deformation",
    ]  # fmt: skip


@pytest.mark.parametrize("name", RANGES)
def test_a_transformation_alone_changes_what_it_should(name):
    image, mask = patch()
    parameters = tuple(low + 0.9 * (high - low) for low, high in RANGES[name])
    changed, moved = stacked(image, mask, name, *parameters)
    assert type(changed) is torch.Tensor and changed.dtype == torch.float32 and changed.shape == image.shape
    assert not torch.allclose(changed, image)
    spatial = name in ("rotation", "scaling", "deformation")
    assert torch.equal(moved, mask) != spatial
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    again, _ = stacked(image, mask, name, *parameters)
    assert torch.equal(changed, again)


def test_transformations_do_what_their_names_say():
    image, mask = patch()

    def apply(name: str, *values: float) -> tuple[torch.Tensor, torch.Tensor]:
        return stacked(image, mask, name, *values)

    assert apply("scaling", 1.4)[1].sum() > 1.8 * mask.sum() > 0.6 * mask.sum() > apply("scaling", 0.7)[1].sum()
    assert apply("blur", 1.0)[0].std() < image.std() < apply("sharpness", 1.0, 0.5, 20.0)[0].std()
    assert torch.allclose(apply("brightness", 0.05)[0], image + 0.05)
    assert torch.allclose(apply("perturb", 0.1, -0.1)[0], image * 1.1 - 0.1, atol=1e-6)
    assert (apply("noise", 0.5)[0] - image).std().item() == pytest.approx(0.5, rel=0.05)
    assert apply("contrast", 3.0)[0].mean() < image.mean()  # gamma above 1 darkens
    organ, moved = image[mask > 0].mean(), apply("rotation", 0.0, 0.0, 20.0)
    assert moved[0][moved[1] > 0].mean().item() == pytest.approx(organ.item(), abs=0.15)  # image and mask move alike
    bent = apply("deformation", 10.0, 1000.0)
    assert bent[0][bent[1] > 0].mean() > bent[0][mask > 0].mean() + 0.1  # the mask went where the organ went


def test_a_patch_that_is_shown_smaller_sees_what_lies_around_it_once():
    """Not the organ mirrored at the borders of the patch, of which there would be 27."""
    image, mask = toy_volume(3, (60, 56, 50))
    patches = Patches([SimpleNamespace(image=image[None], mask=mask[None])], (24, 24, 24), 1.0)
    stack = Stack(Draw({"scaling": (0.4,)}, 0), (24, 24, 24))
    assert stack.margin == (18, 18, 18)  # (24 - 1) / 2 / 0.4 = 28.75 voxels from the middle, of which 11.5 are there
    whole = 0
    for number in range(4):
        wide = patches.draw(0, stream("z", number), stack.margin)
        drawn = patches.draw(0, stream("z", number))  # the same place, without what is around
        inner = tuple(slice((side - 24) // 2, (side + 24) // 2) for side in wide[0].shape[1:])
        assert all(torch.equal(one[0][inner], two[0]) for one, two in zip(wide, drawn, strict=True))
        seen, found = stack.apply(*wide)
        assert seen.shape == found.shape == (1, 24, 24, 24) and ndimage.label(found[0].numpy())[1] == 1
        beyond = seen == 0
        assert beyond.any() and not found[beyond].any()  # outside the volume: its mean, and no organ
        if found[0, 1:-1, 1:-1, 1:-1].sum() == found.sum():
            assert found.sum().item() == pytest.approx(mask.sum() * 0.4**3, rel=0.06)
            whole += 1
    assert whole
    everything = {name: tuple(np.mean(ranges, 1)) for name, ranges in RANGES.items()} | {"scaling": (0.5,)}
    for number in range(3):
        stack = Stack(Draw(everything, number), (24, 24, 24))
        _, found = stack.apply(*patches.draw(0, stream("z", number), stack.margin))
        assert ndimage.label(found[0].numpy())[1] == 1


def test_what_lies_beyond_the_volume_is_transformed_as_the_volume() -> None:
    """Else a frame would tell where the volume ends: darker or brighter, or without noise."""
    image, mask = np.zeros((2, 1, 24, 24, 24), np.float32)
    image[0, 12:14, 12:14, 12] = [[-1.0, 3.0], [-1.0, 3.0]]  # the range of values that gamma acts on
    mask[0, 20, 20, 20] = 1
    patches = Patches([SimpleNamespace(image=image, mask=mask)], (24, 24, 24), 0.5)

    def seen(chosen: dict) -> torch.Tensor:
        stack = Stack(Draw(chosen, 0), (24, 24, 24))
        return stack.apply(*patches.draw(0, stream("z"), stack.margin))[0]

    changes = {"brightness": (0.05,), "contrast": (2.0,), "perturb": (0.1, -0.1)}
    zero = ((0.05 + 0.95) / 4) ** 2 * 4 - 0.95  # of -0.95 to 3.05
    for names, expected in ((("brightness",), 0.05), (("brightness", "contrast"), zero), (changes, zero * 1.1 - 0.1)):
        found = seen({name: changes[name] for name in names} | {"scaling": (0.4,)})  # 14 of 24 voxels lie beyond
        around = torch.ones_like(found, dtype=torch.bool)
        around[:, 9:15, 9:15, 9:15] = False
        assert torch.allclose(found[around], torch.tensor(expected), atol=1e-5)
        assert not torch.allclose(found, torch.tensor(expected), atol=0.1)  # the bright voxels are seen
    noisy = seen({"noise": (1.0,), "scaling": (0.4,)})
    assert noisy[:, 8:16, 8:16, 8:16].std() / noisy[:, :6].std() == pytest.approx(1, abs=0.15)
    image[:] = 0
    for spatial in ("scaling", "rotation", "deformation"):
        found = seen({**changes, spatial: tuple(low for low, _ in RANGES[spatial])})
        assert torch.allclose(found, torch.full_like(found, 0.05 * 1.1 - 0.1), atol=1e-5), spatial


# -- patches -----------------------------------------------------------------------------------------------------------


def test_patches_follow_the_ratio_and_pad_small_volumes():
    data = toy_cases(2)
    for share in (0.0, 1.0):
        patches = Patches(data.cases, (4, 4, 4), share)
        middles = [patches.draw(0, stream("x", i))[1][0, 2, 2, 2].item() for i in range(40)]
        assert np.mean(middles) == share  # nothing here is clipped at a border
    image, mask = Patches(data.cases, (32, 16, 32), 0.5).draw(1, stream("y"))
    assert image.shape == mask.shape == (1, 32, 16, 32)
    assert not image[0, :4].any() and not image[0, 28:].any() and image[0, 4:28].any()  # 24 of 32 voxels along x
    whole = Patches(data.cases, (24, 22, 18), 0.5).draw(0, stream("z"))
    for part, beyond in zip(whole, Patches(data.cases, (24, 22, 18), 0.5).draw(0, stream("z"), (9, 9, 9)), strict=True):
        assert torch.equal(beyond, torch.nn.functional.pad(part, (9,) * 6))
    assert torch.equal(whole[0], data.cases[0].image) and torch.equal(whole[1], data.cases[0].mask.float())


def test_patches_depend_on_the_stream_and_not_on_the_batch_size():
    def seen(site: str = "site-a", round_: int = 0, epoch: int = 0, **changes) -> torch.Tensor:
        method = learner(augment=True, **changes)
        examples = SEGMENTATION.open(method, toy_cases(), site, torch.device("cpu"), "float32")
        batches = list(examples.batches(round_, epoch))
        assert all(batch.images.shape == batch.labels.shape for batch in batches)
        return torch.cat([batch.images for batch in batches])

    first = seen()
    assert first.shape == (24, 1, 16, 16, 16)  # 3 cases, 8 crops each
    torch.rand(3)
    np.random.rand(3)
    assert torch.equal(first, seen()) and torch.equal(first, seen(batch_size=2))
    for other in (seen("site-b"), seen(round_=1), seen(epoch=1), seen(seed=1)):
        assert not torch.equal(first, other)


# -- windows and ensembles ---------------------------------------------------------------------------------------------


class Voxelwise(nn.Module):
    """logit = a x + b, whatever is around."""

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.a * image + self.b


@pytest.mark.parametrize("shape", [(24, 22, 18), (10, 40, 16)])
def test_overlapping_windows_put_a_volume_together_again(shape):
    image = torch.randn(1, *shape)
    found = probability_map(learner(), [Voxelwise(2, 1)], image, torch.device("cpu"))
    assert torch.allclose(found, torch.sigmoid(2 * image[0] + 1), atol=1e-6)


def test_an_ensemble_is_the_mean_of_its_submodels():
    image, method = torch.randn(1, 20, 20, 20), learner()
    models = [learner(seed=seed).build_model().train() for seed in range(3)]
    alone = [probability_map(method, [model], image, torch.device("cpu")) for model in models]
    together = probability_map(method, models, image, torch.device("cpu"))
    assert torch.allclose(together, torch.stack(alone).mean(0), atol=1e-6)
    assert not torch.allclose(together, alone[0], atol=1e-3) and all(model.training for model in models)


def test_probabilities_that_are_not_finite_are_refused():
    mine = trainer()
    with torch.no_grad():
        next(mine.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="site site-a, test split: the model gives values that are not finite"):
        mine.evaluate("test")


# -- learning rate -----------------------------------------------------------------------------------------------------


def test_the_learning_rate_falls_when_the_metric_stands_still():
    settings = VolumeSettings.from_dict({"lr": 1.0, "lr_patience": 1, "lr_factor": 0.5, "lr_floor": 0.2})
    reached = [0.1, 0.2, 0.2, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    found = [lr_at(epoch, settings, reached[:epoch]) for epoch in range(len(reached) + 1)]
    assert found == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2]


def test_the_rule_remembers_all_rounds_and_forgets_repeated_ones(tmp_path):
    scores = iter([0.0, 0.5, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2])  # received and reached, round by round
    mine = trainer(work=tmp_path, lr_patience=0, lr_factor=0.5)
    mine.validation_score = lambda: (next(scores), 0.0)  # type: ignore[method-assign]
    rates = []
    for round_ in (0, 1, 2):
        rates.append(mine.train_round(round_, mine.model.state_dict()).epochs[0]["lr"])
    assert rates == [1e-2, 1e-2, 0.5e-2]  # after 0.5 and 0.4: one epoch without gain
    resumed = trainer(work=tmp_path, lr_patience=0, lr_factor=0.5)
    assert resumed.restore() == 2
    resumed.validation_score = lambda: (next(scores), 0.0)  # type: ignore[method-assign]
    changed = {
        name: value + 1 if value.is_floating_point() else value for name, value in mine.model.state_dict().items()
    }
    assert resumed.train_round(2, changed).epochs[0]["lr"] == 0.5e-2  # asked again: the trace is cut, not prolonged


# -- the one loop ------------------------------------------------------------------------------------------------------


def test_the_loop_learns_to_segment_and_reports_dice(tmp_path):
    seen = []
    mine = trainer(work=tmp_path)
    mine.progress = seen.append
    state = mine.model.state_dict()
    for round_ in range(8):
        result = mine.train_round(round_, state)
        state = result.state
    assert set(result.metrics) == {
        "val_dice_received", "val_dice_best", "best_epoch", "train_loss", "n_train", "n_validation", "steps", "seconds",
    }  # fmt: skip
    assert result.metrics["val_dice_best"] > 0.8 and result.metrics["steps"] == 6
    assert seen[-1]["val_dice"] == result.epochs[-1]["val_dice"]
    test = mine.evaluate("test")
    assert test.metrics["dice"] > 0.8 and [case.id for case in test.cases] == ["case-4"]
    row = dict(zip(SEGMENTATION.columns, test.rows("test", "best")[0], strict=True))
    assert row["dice"] == test.metrics["dice"] and (row["split"], row["model"]) == ("test", "best")


def test_a_crash_and_a_restart_change_nothing(tmp_path):
    straight, broken = trainer(work=tmp_path / "a", augment=True), trainer(work=tmp_path / "b", augment=True)
    state = straight.model.state_dict()
    first = straight.train_round(0, state).state
    expected = straight.train_round(1, first).state
    broken.train_round(0, state)
    again = trainer(work=tmp_path / "b", augment=True)
    again.restore()
    found = again.train_round(1, first).state
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_empty_splits_are_named():
    data = toy_cases()
    for split, message in (("train", "the train split has fewer than 1 volumes"), ("validation", "split is empty")):
        poor = FoldData(data.cases, {**data.splits, split: np.array([], int)}, data.config)
        with pytest.raises(UserError, match=f"site site-a: .*{message}"):
            trainer(poor).train_round(0, None)


# -- precision ---------------------------------------------------------------------------------------------------------


def test_volumes_train_in_bfloat16_with_weights_and_scores_in_float32():
    method = learner(precision="bfloat16")
    mine = LocalTrainer(method, toy_cases(), "site-a", precision="bfloat16")
    seen = []
    mine.model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    state = mine.model.state_dict()
    for round_ in range(4):
        result = mine.train_round(round_, state)
        state = result.state
    assert set(seen) == {torch.bfloat16} and result.metrics["val_dice_best"] > 0.7
    assert {value.dtype for value in state.values()} == {torch.float32}
    found = mine.evaluate("test").metrics["dice"]
    plain = LocalTrainer(learner(), toy_cases(), "site-a")
    plain.model.load_state_dict(state)
    assert found == pytest.approx(plain.evaluate("test").metrics["dice"], abs=0.02)


def test_auto_measures_both_precisions_on_patches_where_bfloat16_may_pay(monkeypatch):
    method = learner(precision="auto")
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: False)
    assert precision.choose_precision(method) == ("float32", {})
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: True)
    for seconds, expected in ((0.1, "bfloat16"), (10.0, "float32")):
        taken = {"float32": 1.0, "bfloat16": seconds}
        monkeypatch.setattr(precision, "_now", lambda device: 0.0)
        step = precision._step_seconds

        def timed(learner, model, batch, device, name, step=step, taken=taken):
            assert batch.images.shape == batch.labels.shape == (4, 1, 16, 16, 16)
            step(learner, model, batch, device, name)  # the step itself is a real one
            return taken[name]

        monkeypatch.setattr(precision, "_step_seconds", timed)
        assert precision.choose_precision(method, steps=1) == (expected, taken)
        monkeypatch.setattr(precision, "_step_seconds", step)


def test_without_monai_a_site_says_so_in_one_line(tmp_path, monkeypatch):
    site = SiteTrainer("site-a", toy_volume_site(tmp_path / "data"), "prostate_ahnet", None, TINY, tmp_path / "work")
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(UserError) as caught:
        site.check_in()
    assert str(caught.value) == (
        "site site-a: the package monai is not installed, and volumes need it: run pip install heterosync anew"
    )
    with pytest.raises(UserError, match="^the package monai is not installed"):  # the server, before any site is asked
        learner().build_model()
