"""A model that segments volumes as a MONAI bundle, which runs with MONAI alone.

Layout and metadata: MONAI Bundle Specification (monai.readthedocs.io, "MONAI Bundle Specification"). The bundle repeats
`data.volume_preprocess` and `training.segmentation.probability_map` as a configuration; `export_bundle` runs it before
it puts it in its place, and refuses one that gives other probabilities.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import monai
import nibabel
import numpy as np
import torch
from torch import Tensor, nn

from heterosync.data.volume_phantoms import FIELD_OF_VIEW, make_phantom
from heterosync.data.volume_preprocess import AXES, INTERPOLATIONS
from heterosync.data.volumes import open_volume, write_nifti
from heterosync.errors import UserError
from heterosync.federation.modelfile import ModelFile
from heterosync.files import new_folder, write_json, write_stream, write_text
from heterosync.models.ahnet import architecture
from heterosync.study.segment import Segmenter, open_segmenter
from heterosync.training.dice import THRESHOLD

#: Largest difference between the bundle's probabilities and the package's that is taken as equal (float32 rounding).
TOLERANCE = 1e-5
CONFIG, META, WEIGHTS, README = "configs/inference.json", "configs/metadata.json", "models/model.pt", "docs/README.md"
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"


def export_bundle(files: Sequence[ModelFile], out: Path | str) -> dict[str, object]:
    """Write the bundle folder `out`, run it on a synthetic oblique volume, and compare it with the model.

    Returns what a user must know. Raises `UserError` when the bundle gives other probabilities, or for more than one
    model; nothing is left behind then.
    """
    if len(files) != 1:
        raise UserError("a bundle holds one model: export each model of an ensemble by itself")
    (file,) = files
    segmenter = open_segmenter(files)
    training = segmenter.method.training
    with new_folder(out) as folder:
        write_json(folder / CONFIG, _inference(training))
        write_json(folder / META, _metadata(file, training))
        state = {f"0.{name}": value for name, value in segmenter.networks[0].state_dict().items()}  # of a Sequential
        write_stream(folder / WEIGHTS, lambda stream: torch.save(state, stream))
        write_text(folder / README, _readme(file, Path(out).name))
        with tempfile.TemporaryDirectory(prefix="heterosync-") as temporary:
            scan = _made_up(Path(temporary) / "scans" / "scan.nii.gz", training.spacing)
            difference = _difference(folder, segmenter, scan, Path(temporary))
        if not difference <= TOLERANCE:
            raise UserError(
                f"the bundle's probabilities differ from the model's by {difference:.1e}: it is not written"
            )
    return {
        "folder": str(out),
        "method": file.method,
        "input": "NIfTI volumes of T2-weighted MRI",
        "output": "a mask of each on its own voxels; with --probability true also the probabilities",
        "largest_difference": difference,
        "run_with": f"python -m monai.bundle run --config_file {CONFIG} --dataset_dir SCANS --output_dir MASKS",
    }


def _difference(bundle: Path, segmenter: Segmenter, scan: Path, work: Path) -> float:
    """Largest difference of probabilities between bundle and model: as they are, and with logits brought into the range
    where a probability shows that they differ. A model that is sure of itself gives 0 and 1 to nearly any input."""
    volume, logits = open_volume(scan), list[Tensor]()
    (network,) = segmenter.networks
    with network.register_forward_hook(lambda _, __, found: logits.append(found.float().cpu().flatten())):
        wanted = segmenter.probabilities(volume)
    plain = np.abs(run_bundle(bundle, scan.parent, work / "plain") - wanted).max()
    values = torch.cat(logits)
    # no more than float32 can tell: TOLERANCE of a probability is then some hundred roundings of the largest logit
    centred = {"middle": float(values.mean()), "spread": max(1.0, float(values.std()), float(values.abs().max()) / 16)}
    changed = {
        "centred": {"_target_": f"{__name__}.Centred", **centred},
        "network_def": "$torch.nn.Sequential(@logits, @centred, torch.nn.Sigmoid())",
    }
    wanted = replace(segmenter, networks=[nn.Sequential(network, Centred(**centred))]).probabilities(volume)
    return float(max(plain, np.abs(run_bundle(bundle, scan.parent, work / "centred", changed) - wanted).max()))


class Centred(nn.Module):
    """Logits with `middle` at 0, in units of `spread`."""

    def __init__(self, middle: float, spread: float):
        super().__init__()
        self._middle, self._spread = middle, spread

    def forward(self, logits: Tensor) -> Tensor:
        return (logits - self._middle) / self._spread


def run_bundle(bundle: Path, scans: Path, out: Path, changed: Mapping[str, Any] | None = None) -> np.ndarray:
    """The probabilities that a bundle gives for the one scan in a folder, in this process and on the CPU. changed: keys
    of its configuration."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(bundle / CONFIG)
    places = {"bundle_root": str(bundle), "dataset_dir": str(scans), "output_dir": str(out)}
    parser.update({**places, "device": "$torch.device('cpu')", "probability": True, **(changed or {})})
    with _quiet_monai():
        parser.get_parsed_content("run")
    (path,) = out.glob("*_probability.nii.gz")
    return np.asarray(nibabel.load(path).dataobj, np.float32)


@contextmanager
def _quiet_monai() -> Iterator[None]:
    """Without its warnings about readers of DICOM that are not installed."""
    logger = logging.getLogger("monai")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _made_up(path: Path, spacing: float) -> Path:
    """Part of a synthetic prostate on a grid that is turned about all axes, left and back first as in DICOM."""
    angles = np.deg2rad([8.0, -6.0, 15.0])
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    for axis, angle in enumerate(angles):
        turn = np.eye(4)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        affine = turn @ affine
    affine = affine @ np.diag([0.8 * spacing, 0.7 * spacing, 2.5 * spacing, 1.0])
    affine[:3, 3] = 12.0, -7.0, 30.0
    phantom = make_phantom("north", 0, field_of_view=FIELD_OF_VIEW[0]).image
    write_nifti(path, phantom[30:60, 30:56, 8:16].astype(np.float32), affine)
    return path


def _inference(training: Any) -> dict[str, Any]:
    name, arguments = architecture(training.network, training.psp_blocks)
    mode, padding = INTERPOLATIONS[training.interpolation]
    save = {"_target_": "SaveImaged", "output_dir": "@output_dir", "separate_folder": False, "print_log": False}
    return {
        "imports": ["$import glob", "$import os", "$from collections import deque"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/masks'",
        "probability": False,
        "ckpt_path": f"$@bundle_root + '/{WEIGHTS}'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "logits": {"_target_": name, **arguments},
        "network_def": "$torch.nn.Sequential(@logits, torch.nn.Sigmoid())",
        "network": "$@network_def.to(@device)",
        # Geometry.without_noise: by the rounding of a header alone, Spacing would move an oblique grid
        "square": "$lambda a, s: (lambda u, _, v: u.matmul(v) * s.round(decimals=5))(*torch.linalg.svd(a / s))",
        "ends": "$lambda n: torch.cartesian_prod(*(torch.tensor([0.0, k - 1.0]) for k in n)).T.double()",
        "moved": "$lambda a, b, n: (b - a).matmul(@ends(n)).norm(dim=0).max()",
        "nearer": "$lambda a, b, s, n: b if @moved(a, b, n) < 0.05 * s.min() else a",
        "axes": "$lambda a, s, n: @nearer(a, @square(a, s), s, n)",
        "linear": "$lambda a, n: @axes(a, a.norm(dim=0), n)",
        "clean": "$lambda a, n: torch.cat([torch.cat([@linear(a[:3, :3], n), a[:3, 3:]], 1), a[3:]])",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader", "ensure_channel_first": True},
                {"_target_": "CopyItemsd", "keys": "image", "names": "scan"},
                {
                    "_target_": "Lambdad",
                    "keys": "image",
                    "func": "$lambda x: monai.data.MetaTensor(x.as_tensor(), @clean(x.affine.double(), x.shape[1:]), "
                    "{'filename_or_obj': x.meta['filename_or_obj']})",
                },
                {
                    "_target_": "Orientationd",
                    "keys": "image",
                    "axcodes": "RAS",
                    "labels": [list(pair) for pair in AXES],
                },
                {
                    "_target_": "Spacingd",
                    "keys": "image",
                    "pixdim": training.spacing,
                    "mode": mode,
                    "padding_mode": padding,
                },
                {"_target_": "NormalizeIntensityd", "keys": "image"},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(training.patch),
            "sw_batch_size": training.batch_size,
            "overlap": training.overlap,
            "mode": "gaussian",
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "ResampleToMatchd",
                    "keys": "pred",
                    "key_dst": "scan",
                    "mode": "bilinear",
                    "padding_mode": "border",
                },
                {**save, "keys": "pred", "output_postfix": "probability", "_disabled_": "$not @probability"},
                {"_target_": "AsDiscreted", "keys": "pred", "threshold": THRESHOLD},
                {**save, "keys": "pred", "output_postfix": "mask", "output_dtype": "$np.uint8"},
            ],
        },
        "segment": "$torch.inference_mode()(lambda case: @postprocessing({**case, 'pred': "
        "@inferer(case['image'][None].to(@device), @network)[0]}))",
        "run": [
            "$@network.load_state_dict(torch.load(@ckpt_path, map_location=@device, weights_only=True))",
            "$@network.eval()",
            "$deque(map(@segment, @dataset), maxlen=0)",
        ],
    }


def _metadata(file: ModelFile, training: Any) -> dict[str, Any]:
    version = f"{file.round}.0.0"
    patch = {
        "type": "image",
        "format": "magnitude",
        "modality": "MR",
        "num_channels": 1,
        "spatial_shape": list(training.patch),
        "dtype": "float32",
        "is_patch_data": True,
    }
    organ = file.labels[-1] if file.labels else "organ"
    return {
        "schema": SCHEMA,
        "version": version,
        "changelog": {version: f"{file.method} after {file.round} rounds of federated training"},
        "monai_version": str(monai.__version__),
        "pytorch_version": str(torch.__version__).split("+")[0],
        "numpy_version": str(np.__version__),
        "required_packages_version": {"nibabel": str(nibabel.__version__)},
        "task": "Segmentation of the whole prostate in T2-weighted MRI",
        "description": f"{training.network}, trained by method {file.method} of heterosync, after Sarma et al., JAMIA "
        "28(6), 2021. For research; not a medical device.",
        "authors": "The sites of the federation that trained it",
        "copyright": "The sites of the federation that trained it",
        "intended_use": "Research only: not validated for clinical use",
        "network_data_format": {
            "inputs": {
                "image": {
                    **patch,
                    "value_range": [-10, 10],
                    "channel_def": {"0": f"T2, {training.spacing:g} mm, zero mean and unit variance of the volume"},
                }
            },
            "outputs": {
                "pred": {
                    **patch,
                    "format": "segmentation",
                    "value_range": [0, 1],
                    "channel_def": {"0": f"probability of the {organ}"},
                }
            },
        },
    }


def _readme(file: ModelFile, name: str) -> str:
    return f"""# {name}

A model of method `{file.method}` after {file.round} rounds, exported by heterosync. In this folder,

    python -m monai.bundle run --config_file {CONFIG} --dataset_dir SCANS --output_dir MASKS

segments every NIfTI file in SCANS on its own voxels; `--probability true` keeps the probabilities, too. That takes
MONAI, nibabel and fire, not heterosync. `monai.bundle.load(name, bundle_dir=parent, workflow_type="inference")` gives
Python the network, from patches of volumes to probabilities. For research; not a medical device.
"""
