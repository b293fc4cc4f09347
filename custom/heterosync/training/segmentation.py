"""The task of segmentation: volumes with a mask, seen in random patches and segmented window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heterosync import pulse
from heterosync.errors import SiteError, UserError
from heterosync.models.ahnet import build_segmenter, need_monai
from heterosync.models.encoder import file_mark, named_file
from heterosync.training.batches import Batch, batch_bounds
from heterosync.training.checks import check_machine, check_trainable, split_rows
from heterosync.training.dice import THRESHOLD, CaseScore, dice_coefficient, score_case, soft_dice_loss, summarise
from heterosync.training.examples import Examples
from heterosync.training.learner import Learner
from heterosync.training.patches import Case, Patches
from heterosync.training.precision import autocast
from heterosync.training.seeds import stream
from heterosync.training.stacked import Stack, draw_stack
from heterosync.training.task import Task
from heterosync.training.views import View, axial_view, views_file, write_views
from heterosync.training.volume_settings import VolumeSettings

DIAGNOSTIC_PATCHES = 2


@dataclass(frozen=True)
class FoldData:
    """A site's cases, one fold of its training cases as validation split.

    cases[row] has `id`, `image` float32 and `mask` uint8 (1, x, y, z), and `affine` (4, 4).
    """

    cases: Any
    splits: dict[str, np.ndarray]
    config: Any
    labels: tuple[str, str] = ("background", "organ")
    anchor_digest: None = None


class Segmentation(Task):
    name = "segmentation"
    metric = "dice"
    shown = "Dice"
    undefined = "the validation split is empty"
    averaged = ("dice", "hd95", "volume_error")
    reported = ("dice", "ci_low", "ci_high", "dice_sd", "hd95", "volume_error", "n", "n_missed")
    counted = ("n_missed", "nothing found")
    columns = ("id", "split", "dice", "hd95", "volume", "reference_volume", "model")
    items = "volumes"
    layout = torch.contiguous_format
    Settings = VolumeSettings

    def load(self, folder: Any, settings: VolumeSettings, need_anchor: bool, pooled: bool) -> FoldData:
        need_monai()
        from heterosync.data.volume_dataset import load_volume_site
        from heterosync.data.volume_preprocess import Preprocessing

        site = load_volume_site(folder, Preprocessing(settings.spacing, settings.interpolation))
        return FoldData(site, site.fold(settings.fold), site.config)

    def open(self, learner: Learner, data: FoldData, site: str, device: torch.device, precision: str) -> VolumeExamples:
        return VolumeExamples(learner, data, site, device, precision)

    def network(self, settings: VolumeSettings, weights: str) -> nn.Module:
        return build_segmenter(settings.network, settings.psp_blocks, weights)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return soft_dice_loss(outputs, targets)

    def in_words(self, settings: VolumeSettings) -> str:
        patch = " x ".join(map(str, settings.patch))
        return f"{settings.network} on patches of {patch} voxels of {settings.spacing:g} mm"

    def initial_weights(self, settings: VolumeSettings) -> str:
        return "none" if settings.weights == "none" else file_mark(named_file(settings.weights))

    def random_batch(self, learner: Learner, size: int, device: torch.device) -> Batch:
        images = torch.rand(size, 1, *learner.training.patch, device=device)
        return Batch(images, (images > THRESHOLD).float())


SEGMENTATION = Segmentation()


@dataclass(frozen=True)
class Segmented:
    """Scores of one split, case by case in manifest order; `cases` never leave the site."""

    cases: list[CaseScore]
    metrics: dict[str, float | None]  # see dice.summarise
    views: list[View] = field(default_factory=list, repr=False)  # what a person would look at, case by case

    def rows(self, split: str, model: str) -> list[list[Any]]:
        return [
            [case.id, split, case.dice, case.hd95, case.volume, case.reference_volume, model] for case in self.cases
        ]

    def keep(self, folder: Path, model: str) -> None:
        write_views(folder / views_file(model), self.views)


class VolumeExamples(Examples):
    """A site's volumes; patches go to the device, whole volumes only while they are segmented."""

    def __init__(self, learner: Learner, data: FoldData, site: str, device: torch.device, precision: str):
        self._learner, self._data, self._site = learner, data, site
        self._device, self._precision = device, precision
        check_machine(site, device, precision)
        self._patches = Patches(data.cases, learner.training.patch, learner.training.foreground)

    def check_trainable(self) -> None:
        check_trainable(self._site, self._data, SEGMENTATION.items, 1)
        if not len(self._data.splits["validation"]):
            raise SiteError(
                f"site {self._site}: the validation split is empty: add volumes, or lower folds in site.yaml"
            )

    @property
    def count(self) -> int:
        return len(self._data.splits["train"])

    def chosen(self, round_: int, epoch: int, rows: np.ndarray) -> Iterator[Batch]:
        """`crops` patches of each training case, in random order. A patch depends on its own stream, so the batch size
        changes how patches are grouped and nothing else."""
        settings = self._learner.training
        key = (settings.seed, self._site, round_, epoch)
        items = [(row, crop) for row in self._data.splits["train"][rows].tolist() for crop in range(settings.crops)]
        order = stream(*key, "order").permutation(len(items))
        for start, stop in batch_bounds(len(items), settings.batch_size):
            chosen = [items[i] for i in order[start:stop]]
            yield self._batch([self._patch(row, (*key, row, crop), settings.augment) for row, crop in chosen])

    def training(self, size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """One patch of each training case, the same in every round."""
        rows = self._data.splits["train"] if rows is None else self._data.splits["train"][rows]
        key = (self._learner.training.seed, self._site, "diagnostics")
        for start in range(0, len(rows), size):
            part = rows[start : start + size].tolist()
            yield self._batch([self._patch(row, (*key, row), augmented=False) for row in part])

    def sample(self) -> Batch:
        return next(self.training(DIAGNOSTIC_PATCHES))

    def validate(self, model: nn.Module) -> tuple[float | None, float]:
        """Mean Dice over cases, and 1 - it."""
        found = [dice_coefficient(mask, case.mask) for case, mask in self._segmented([model], "validation")]
        dice = float(np.mean(found)) if found else None
        return dice, 1 - dice if dice is not None else 0.0

    def evaluate(self, model: nn.Module, split: str) -> Segmented:
        return self.evaluate_ensemble([model], split)

    def evaluate_ensemble(self, models: Sequence[nn.Module], split: str) -> Segmented:
        """The same for the mean of the models' probabilities."""
        scores, views = [], []
        for case, found in self._segmented(models, split):
            scores.append(score_case(case.id, found, case.mask, case.spacing, case.millilitres))
            image, mask, mine = (part.numpy() for part in (case.image[0], case.mask, found))
            views.append(axial_view(case.id, scores[-1].dice, image, mask, mine, case.spacing))
        return Segmented(scores, summarise(scores), views)

    def _patch(self, row: int, key: tuple, augmented: bool) -> tuple[Tensor, Tensor]:
        place = stream(*key, "crop")
        if not augmented:
            image, mask = self._patches.draw(row, place)
            return image.to(self._device), mask.to(self._device)
        stack = Stack(draw_stack(stream(*key, "augment")), self._learner.training.patch, self._device)
        image, mask = self._patches.draw(row, place, stack.margin)
        return stack.apply(image.to(self._device), mask.to(self._device))

    def _batch(self, patches: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        images, masks = zip(*patches, strict=True)
        return Batch(torch.stack(images), torch.stack(masks))

    def _segmented(self, models: Sequence[nn.Module], split: str) -> Iterator[tuple[Case, Tensor]]:
        """Each case of a split with the mask (x, y, z) that the models find."""
        for row in split_rows(self._site, self._data, split):
            case = self._patches.case(int(row))
            try:
                found = probability_map(self._learner, models, case.image, self._device, self._precision)
            except UserError as error:
                raise SiteError(f"site {self._site}, {split} split: {error}") from error
            yield case, found >= THRESHOLD


def probability_map(
    learner: Learner,
    models: Sequence[nn.Module],
    image: Tensor,
    device: torch.device,
    precision: str = "float32",
) -> Tensor:
    """Probabilities float32 (x, y, z), on the CPU, for an image (1, x, y, z): the mean over `models`, an ensemble.

    Windows of the settings' patch size overlap and are blended by a Gaussian (MONAI); an image smaller than a window is
    padded with its mean, zero. The modes of the models are left as they were. Raises `UserError` where a value is not
    finite.
    """
    from monai.inferers import sliding_window_inference

    settings = learner.training
    modes = [model.training for model in models]
    for model in models:
        model.eval()

    def probabilities(windows: Tensor) -> Tensor:
        pulse.beat()
        with autocast(device, precision):
            return torch.stack([learner.predict(model, windows, "self").float() for model in models]).mean(0)

    run: Callable[..., Tensor] = sliding_window_inference
    try:
        with torch.inference_mode():
            found = run(
                image[None].to(device),
                settings.patch,
                settings.batch_size,
                probabilities,
                overlap=settings.overlap,
                mode="gaussian",
            )
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    found = found[0, 0].float().cpu()
    if not torch.isfinite(found).all():
        raise UserError("the model gives values that are not finite: lower setting 'lr' or use precision float32")
    return found
