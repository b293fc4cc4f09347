"""Probabilities for images that the model has never seen, from a model file alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from heterosync.data.anchor import INFO as ANCHOR_INFO
from heterosync.data.packs import Pack
from heterosync.data.readers import PILLOW_SUFFIXES, ImageReader, to_size
from heterosync.data.site import CONFIG, MANIFEST, read_manifest, read_site_config
from heterosync.errors import ProblemList, UserError
from heterosync.federation.modelfile import ModelFile, load_model
from heterosync.files import write_text
from heterosync.methods.base import Method
from heterosync.study.partners import partner_images
from heterosync.study.table import csv_table
from heterosync.training import CLASSIFICATION
from heterosync.training.metrics import binary_metrics

SUFFIXES = (*PILLOW_SUFFIXES, ".dcm", ".dicom", ".ima", ".nii", ".nii.gz", ".npy")


@dataclass(frozen=True)
class Source:
    """The images to be scored: a reader, their names in a fixed order and, for a site folder, their labels (else
    None)."""

    reader: ImageReader
    names: list[str]
    labels: list[int] | None = None


@dataclass(frozen=True)
class Predictions:
    """Probabilities of the positive class (n,), in the order of `names`; `metrics` where labels were known."""

    names: list[str]
    probabilities: np.ndarray
    classes: tuple[str, ...]
    metrics: dict[str, float | None] | None

    def to_csv(self, path: Path) -> Path:
        """Columns image, probability, label; a label is the class at the threshold 0.5. Written whole or not at all."""
        negative, positive = self.classes if len(self.classes) == 2 else ("0", "1")
        rows = [
            (name, f"{probability:.8f}", positive if probability >= 0.5 else negative)
            for name, probability in zip(self.names, self.probabilities, strict=True)
        ]
        return write_text(path, csv_table(("image", "probability", "label"), rows))


def open_source(path: Path | str) -> Source:
    """A site folder (the rows of its manifest), a folder of images at any depth, one image, or an .npz pack.

    An anchor pack below a folder is left out: it is no site's test data. Raises `UserError` when there is nothing to
    read, or when the folder holds site folders.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: name an image, a folder of images or a site folder")
    if path.is_file():
        names = _entries(path, path.name) or [path.name]
        return Source(ImageReader(path.parent), names)
    if (path / CONFIG).exists() and (path / MANIFEST).exists():
        config = read_site_config(path)
        rows = read_manifest(path, config)
        return Source(ImageReader(path, config.window), [row.image for row in rows], [row.label for row in rows])
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sites = [file.parent for file in files if file.name == CONFIG and file.parent != path]
    if sites:
        raise UserError(f"{path} holds site folders: name one of them, for example {sites[0]}")
    anchors = {file.parent for file in files if file.name == ANCHOR_INFO} - {path}
    names, problems = [], []
    for file in files:
        name = file.relative_to(path).as_posix()
        if any(part.startswith(".") for part in file.relative_to(path).parts) or anchors.intersection(file.parents):
            continue
        try:
            names += _entries(file, name) or ([name] if name.lower().endswith(SUFFIXES) else [])
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ProblemList(problems)
    if not names:
        raise UserError(f"{path} holds no image: PNG, JPEG, DICOM (.dcm), NIfTI, .npy and .npz packs are read")
    return Source(ImageReader(path), names)


def predict(
    model: Path | str | ModelFile,
    source: Path | str | Source,
    partner: str | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    anchor: Path | str | None = None,
) -> Predictions:
    """Score every image once. `partner` is "self", "sat_index" or "sat_mean" (None: as the model was trained to be
    tested).

    `batch_size` images are read and decoded at a time, by several threads; each then passes the network by itself and
    in float32, so that its score depends on no other image: alone, in any batch and in any order it is the same. For
    the same reason `sat_index` picks an image's partner by the image's content (reconstruction: the published script
    goes by position). `anchor` is a folder that holds anchor/, for a model file without partner images.

    Raises `ProblemList` with every unreadable image and `UserError` for a partner that neither the file nor `anchor`
    provides.
    """
    file = model if isinstance(model, ModelFile) else load_model(model)
    source = source if isinstance(source, Source) else open_source(source)
    method, network = file.build()
    if method.task is not CLASSIFICATION:
        raise UserError(f"a model of method '{method.name}' segments volumes: only pictures are scored here")
    partner = partner or str(getattr(method.settings, "test_partner", "self"))
    partners = partner_images(method, file.assets, partner, anchor)
    place = open_device(device)
    network = network.to(place)
    partners = None if partners is None else partners.to(place)
    scores, problems = [], []
    for read in _read(source, method, batch_size):
        if isinstance(read, str):
            problems.append(read)
        elif not problems:  # otherwise the rest is only read, to name all that is damaged
            scores.append(_score(method, network, read.to(place), partner, partners))
    if problems:
        raise ProblemList(problems)
    probabilities = np.array(scores)
    if not np.isfinite(probabilities).all():
        name = source.names[int(np.flatnonzero(~np.isfinite(probabilities))[0])]
        raise UserError(f"{name}: the model gives a score that is not finite; its weights are damaged")
    metrics = None if source.labels is None else binary_metrics(np.array(source.labels), probabilities)
    return Predictions(source.names, probabilities, file.labels, metrics)


def open_device(name: str) -> torch.device:
    """Raises `UserError` for a device that this machine does not have."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); use cpu") from error


def _score(method: Method, network: nn.Module, image: Tensor, partner: str, partners: Tensor | None) -> float:
    """Probability for one image (1, c, h, w)."""
    with torch.inference_mode():
        if partners is None:
            return float(method.predict(network, image, "self").double())
        if partner == "sat_index":
            digest = hashlib.sha256(image.cpu().numpy().tobytes()).digest()
            chosen = int.from_bytes(digest[:8], "big") % len(partners)
            return float(method.predict(network, image, partners[chosen : chosen + 1]).double())
        scores = method.predict(network, image.expand(len(partners), -1, -1, -1).contiguous(), partners)
        return float(scores.double().mean())


def _read(source: Source, method: Method, batch_size: int) -> Iterator[Tensor | str]:
    """Float32 (1, c, h, w) per image, or what is wrong with it, in order."""
    settings = method.training

    def read(name: str) -> Tensor | str:
        try:
            pixels = to_size(source.reader.read(name), settings.image_size, settings.channels, settings.fit)
        except UserError as error:
            return str(error)
        return torch.from_numpy(np.array(pixels)).float().div_(255).unsqueeze(0)

    with ThreadPoolExecutor(max_workers=4) as pool:
        for start in range(0, len(source.names), batch_size):
            yield from pool.map(read, source.names[start : start + batch_size])


def _entries(file: Path, name: str) -> list[str]:
    """Names of all images in a pack; [] for any other file."""
    if not name.lower().endswith(".npz"):
        return []
    try:
        return [f"{name}#{i}" for i in range(len(Pack(file)))]
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:  # a damaged archive raises anything
        raise UserError(f"{name}: the pack is truncated or damaged: copy it again") from error
