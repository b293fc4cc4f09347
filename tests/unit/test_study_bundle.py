"""The MONAI bundle of a model on volumes: it runs without heterosync and gives the same probabilities and masks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import load, verify_net_in_out

from heterosync.cli import main
from heterosync.data.volumes import open_volume
from heterosync.errors import UserError
from heterosync.federation.modelfile import load_model, save_model
from heterosync.methods import make_method
from heterosync.study import bundle
from heterosync.study.segment import open_segmenter
from segment_toys import TINY, toy_segmenter
from volume_toys import oblique, save_nifti

SHAPE = (26, 24, 9)
#: Skewed slices stay skewed, and those of LPS are turned about all axes.
GRIDS = {"lps": oblique((1.1, 1.3, 3.0), (14, -9, 25), "LPS", SHAPE), "psr": oblique((1.5, 3.0, 1.2), axes="PSR")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model file, and its bundle."""
    folder = tmp_path_factory.mktemp("bundle")
    model = toy_segmenter(folder / "best_model.pt")
    assert main(["export", str(model), "--out", str(folder / "prostate")]) == 0
    return model, folder / "prostate"


def scans(folder: Path) -> None:
    rng = np.random.default_rng(3)
    skewed = GRIDS["lps"].copy()
    skewed[:3, 2] += 0.1 * skewed[:3, 0]
    for name, affine in {**GRIDS, "skewed": skewed}.items():
        save_nifti(folder / f"{name}.nii.gz", rng.normal(100, 20, SHAPE).astype(np.float32), affine)


RUN = """
import sys
import monai.bundle
root, scans, masks = sys.argv[1:]
monai.bundle.run(
    config_file=f"{root}/configs/inference.json", meta_file=f"{root}/configs/metadata.json", workflow_type="inference",
    bundle_root=root, dataset_dir=scans, output_dir=masks, probability=True, device="$torch.device('cpu')",
)
assert not [name for name in sys.modules if name.split(".")[0] == "heterosync"]
"""


def test_the_bundle_runs_alone_and_gives_the_same(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, root = made
    scans(tmp_path / "scans")
    words = [sys.executable, "-I", "-c", RUN, root, tmp_path / "scans", tmp_path / "masks"]
    subprocess.run(list(map(str, words)), check=True, cwd=tmp_path, capture_output=True)
    segmenter = open_segmenter([load_model(model)])
    for path in sorted((tmp_path / "scans").iterdir()):
        wanted = segmenter.probabilities(open_volume(path))
        stem = path.name.removesuffix(".nii.gz")
        mask, map_ = (nibabel.load(tmp_path / "masks" / f"{stem}_{end}.nii.gz") for end in ("mask", "probability"))
        np.testing.assert_allclose(np.asarray(map_.dataobj), wanted, atol=1e-5)
        clear = np.abs(wanted - 0.5) > 1e-5
        assert np.array_equal(np.asarray(mask.dataobj)[clear], (wanted >= 0.5)[clear])
        assert mask.get_data_dtype() == np.uint8 and len(np.unique(wanted)) > 100
        for written in (mask, map_):
            np.testing.assert_allclose(written.affine, nibabel.load(path).affine, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["linear", "spline"])
def test_the_network_of_the_bundle_is_the_model(tmp_path: Path, interpolation: str) -> None:
    model = toy_segmenter(tmp_path / "best_model.pt", interpolation=interpolation)
    facts = bundle.export_bundle([load_model(model)], tmp_path / "prostate")
    assert facts["largest_difference"] <= 1e-5
    network = load("prostate", bundle_dir=str(tmp_path), workflow_type="inference", device="cpu").eval()
    _, own = load_model(model).build()
    patches = torch.randn(2, 1, 16, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(network(patches), torch.sigmoid(own(patches)))


def test_metadata_tell_what_goes_in_and_out(made: tuple[Path, Path]) -> None:
    root = made[1]
    meta, config = (str(root / "configs" / name) for name in ("metadata.json", "inference.json"))
    verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu")
    told = json.loads(Path(meta).read_text())
    assert told["network_data_format"]["inputs"]["image"]["spatial_shape"] == [16, 16, 16]
    assert told["changelog"] == {"3.0.0": "prostate_ahnet after 3 rounds of federated training"}
    assert torch.load(root / "models" / "model.pt", weights_only=True).keys()


def test_a_header_rounded_to_32_bits_would_move_the_slices(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Why the bundle cleans the affine: without it, MONAI's Spacing gives another grid than the package."""
    model, root = made
    config = json.loads((root / "configs" / "inference.json").read_text())
    config["clean"] = "$lambda a, n: a"
    (tmp_path / "bundle" / "configs").mkdir(parents=True)
    (tmp_path / "bundle" / "configs" / "inference.json").write_text(json.dumps(config))
    (tmp_path / "bundle" / "models").symlink_to(root / "models")
    path = bundle._made_up(tmp_path / "scans" / "scan.nii.gz", 2.0)
    found = bundle.run_bundle(tmp_path / "bundle", path.parent, tmp_path / "masks")
    wanted = open_segmenter([load_model(model)]).probabilities(open_volume(path))
    assert np.abs(found - wanted).max() > 1e-3


def test_the_check_sees_a_difference_that_a_sure_model_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of some thousand: probabilities are 0 and 1 whatever goes in, and say nothing of the preprocessing."""
    method = make_method("prostate_ahnet", None, TINY)
    network = method.build_model()
    last = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv3d | torch.nn.ConvTranspose3d)][-1]
    last.weight.data *= 2000
    last.bias.data += 20000
    state = network.state_dict()
    file = load_model(save_model(tmp_path / "sure.pt", method.name, {}, TINY, state, ("background", "organ"), 3))
    scan = bundle._made_up(tmp_path / "scans" / "scan.nii.gz", 2.0)
    found = open_segmenter([file]).probabilities(open_volume(scan))
    assert ((found < 1e-6) | (found > 1 - 1e-6)).all()
    assert bundle.export_bundle([file], tmp_path / "whole")["largest_difference"] < 1e-5
    written = bundle._inference

    def without_normalisation(training):
        config = written(training)
        config["preprocessing"]["transforms"][-1] = {"_target_": "ScaleIntensityd", "keys": "image"}
        return config

    monkeypatch.setattr(bundle, "_inference", without_normalisation)
    with pytest.raises(UserError, match="the bundle's probabilities differ from the model's by"):
        bundle.export_bundle([file], tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_bundle_that_differs_is_not_written(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="the bundle's probabilities differ from the model's by"):
        bundle.export_bundle([load_model(made[0])], tmp_path / "prostate")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="a bundle holds one model"):
        bundle.export_bundle([load_model(made[0])] * 2, tmp_path / "prostate")
