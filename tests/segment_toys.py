"""Tiny volumes with a bright organ for the tests of segmentation, in memory and as site folders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import torch

from heterosync.federation.modelfile import save_model
from heterosync.methods import get_method, make_method
from heterosync.training import SEGMENTATION
from heterosync.training.segmentation import FoldData
from toys import SMOKE

#: Settings of the smoke profile: a tiny U-Net on 16-voxel patches of 2 mm, three rounds, float32.
TINY: dict = {
    "network": "unet_tiny",
    "spacing": 2.0,
    "patch": [16, 16, 16],
    "crops": 8,
    "rounds": 3,
    "batch_size": 4,
    "lr": 1e-2,
    "augment": False,
    "precision": "float32",
}
SHAPE = (24, 22, 18)


def smoke(method: str) -> dict:
    """Settings of the smoke profile for any method."""
    return TINY if get_method(method).task is SEGMENTATION else SMOKE


def toy_volume(
    seed: int, shape: tuple[int, int, int] = SHAPE, contrast: float = 3.0, grain: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Noise with an ellipsoid that is brighter by `contrast` and noisier by `grain`, and its mask (uint8)."""
    rng = np.random.default_rng(seed)
    middle = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
    radii = np.array(shape) * rng.uniform(0.22, 0.3, 3)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    mask = (((places - middle) / radii) ** 2).sum(-1) <= 1
    image = rng.normal(0, 1, shape) + contrast * mask
    if grain:
        image += mask * rng.normal(0, grain, shape)
    return image.astype(np.float32), mask.astype(np.uint8)


def toy_cases(count: int = 5, seed: int = 0) -> FoldData:
    """Volumes in memory, normalised, 2 mm: the last but one validates, the last tests."""
    cases = []
    for number in range(count):
        image, mask = toy_volume(1000 * seed + number)
        image = (image - image.mean()) / image.std()
        place = np.diag([2.0, 2.0, 2.0, 1.0])
        arrays = {"image": torch.from_numpy(image[None]), "mask": torch.from_numpy(mask[None])}
        cases.append(SimpleNamespace(id=f"case-{number}", affine=torch.from_numpy(place), **arrays))
    rows = np.arange(count)
    config = SimpleNamespace(batch_size=None, device="cpu", threads=None)
    return FoldData(cases, {"train": rows[:-2], "validation": rows[-2:-1], "test": rows[-1:]}, config)


def toy_volume_site(folder: Path, count: int = 5, seed: int = 0, held: int = 1, **scanner: float) -> Path:
    """A site folder of NIfTI volumes of 2 mm: the last `held` cases are held out, the others are in folds 1 and 2 in
    turn. `scanner`: how `toy_volume` shows the organ."""
    rows = ["image,mask,split,fold"]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        names = [f"{part}/{number}.nii.gz" for part in ("images", "masks")]
        for name, values in zip(names, toy_volume(1000 * seed + number, **scanner), strict=True):
            nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 2.0, 2.0, 1.0])), folder / name)
        rows.append(",".join([*names, *(("test", "") if number >= count - held else ("train", str(1 + number % 2)))]))
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    (folder / "site.yaml").write_text("task: segmentation\nfolds: 2\ndevice: cpu\n")
    return folder


def receiving(folder: Path, cases: int = 2) -> Path:
    """The same without training cases: an outside test set."""
    return toy_volume_site(folder, cases, seed=9, held=cases)


def toy_segmenter(path: Path, seed: int = 0, **training: object) -> Path:
    """A model file of a network with random values."""
    settings = {**TINY, "seed": seed, **training}
    network = make_method("prostate_ahnet", None, settings).build_model()
    return save_model(path, "prostate_ahnet", {}, settings, network.state_dict(), ("background", "organ"), 3)


def toy_volume_alliance(folder: Path, sites: int = 3) -> dict[str, Path]:
    names = [f"site-{chr(ord('a') + i)}" for i in range(sites)]
    return {name: toy_volume_site(folder / name, seed=i) for i, name in enumerate(names)}
