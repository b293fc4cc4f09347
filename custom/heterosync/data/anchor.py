"""The anchor pack: the small public set of labelled images that every site holds identically (the Shared Anchor Task).

A pack is a folder with `anchor.json` and either `anchor.npz` (arrays `images`, uint8 (n, h, w) or (n, h, w, 3), and
`labels`, 0 or 1) or `anchor.csv` (image, label) with its image files. Its digest is SHA-256 over the sorted pairs
(content hash of the decoded picture, label): the same pictures have the same digest in either form, and the server
compares the digests of all sites before the first round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from heterosync.data.cache import load_pictures
from heterosync.data.decoding import Decoded
from heterosync.data.grey import to_uint8
from heterosync.data.images import Images, content_hash
from heterosync.data.site import image_name
from heterosync.data.tables import read_csv
from heterosync.errors import ProblemList, UserError
from heterosync.files import new_folder, read_json, write_json, write_text

INFO, PACK, TABLE = "anchor.json", "anchor.npz", "anchor.csv"
_COPY_AGAIN = "copy the whole anchor folder again from the alliance's lead"


@dataclass(frozen=True)
class AnchorInfo:
    """What `anchor.json` says: `n` images, the negative and the positive label's names, and whether it is 1:1."""

    name: str
    digest: str
    n: int
    labels: tuple[str, str]
    balanced: bool = True


def read_anchor_info(folder: Path | str) -> AnchorInfo:
    """Read `<folder>/anchor.json`; `folder` is the pack itself. Raises `UserError` when absent or damaged."""
    path = Path(folder) / INFO
    if not path.is_file():
        raise UserError(f"anchor/{INFO}: the file is missing: {_COPY_AGAIN}")
    try:
        given = read_json(path)
        labels = tuple(given["labels"])
        info = AnchorInfo(given["name"], given["digest"], given["n"], labels, given.get("balanced", True))
        types = [str, str, int, tuple, bool]
        if [type(value) for value in vars(info).values()] != types or [type(label) for label in labels] != [str, str]:
            raise ValueError
        return info
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"anchor/{INFO}: damaged: {_COPY_AGAIN}") from error


def write_anchor(
    folder: Path | str,
    images: Sequence[np.ndarray] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    name: str,
    negative: str,
    positive: str,
    balanced: bool = True,
) -> str:
    """Write a pack of uint8 pictures, (h, w) or (h, w, 3), with labels 0 or 1; returns its digest.

    Pictures of one shape go into `anchor.npz`, others become PNG files. They are stored in the order of the digest, so
    that packs of the same pictures are alike. Raises `UserError` when the labels are not whole numbers, or not 1:1
    (unless `balanced` is False, for the ablation without a homogeneous anchor), a picture occurs twice, or `folder` is
    not empty.
    """
    pictures = [to_uint8(image) for image in images]
    labels = _whole_numbers(labels, f"anchor '{name}'")
    hashes = [content_hash(picture) for picture in pictures]
    problems = [f"anchor '{name}': {problem}" for problem in _count_problems(labels, balanced)]
    if len(set(hashes)) < len(hashes):
        problems.append(f"anchor '{name}': {len(hashes) - len(set(hashes))} pictures occur twice: remove the copies")
    if len(pictures) != len(labels):
        problems = [f"anchor '{name}': {len(pictures)} pictures but {len(labels)} labels: give one label per picture"]
    if problems:
        raise ProblemList(problems)
    order = sorted(range(len(labels)), key=lambda row: (hashes[row], labels[row]))
    pictures, labels = [pictures[row] for row in order], labels[order]
    digest = digest_of([hashes[row] for row in order], labels)
    with new_folder(folder) as temporary:
        if len({picture.shape for picture in pictures}) == 1:
            np.savez_compressed(temporary / PACK, images=np.stack(pictures), labels=labels.astype(np.uint8))
        else:
            (temporary / "images").mkdir()
            lines = ["image,label"]
            for row, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                Image.fromarray(picture).save(temporary / "images" / f"{row:05d}.png")
                lines.append(f"images/{row:05d}.png,{label}")
            write_text(temporary / TABLE, "\n".join(lines) + "\n")
        info = {"name": name, "digest": digest, "n": len(labels), "labels": [negative, positive], "balanced": balanced}
        write_json(temporary / INFO, info)
    return digest


def digest_of(content: Sequence[str], labels: Sequence[int] | np.ndarray) -> str:
    """SHA-256 over the sorted lines 'content hash, label'."""
    lines = sorted(f"{hash_},{int(label)}\n" for hash_, label in zip(content, labels, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def anchor_digest(folder: Path | str) -> str:
    """The digest of the content that lies in `folder` now; raises `ProblemList` when the pack is not in order."""
    pack, problems = inspect_anchor(Path(folder), None)
    if problems or pack is None:
        raise ProblemList(problems)
    return pack.digest


def load_anchor(
    folder: Path | str, image_size: int, channels: int = 3, cache: Path | None = None, fit: str = "stretch"
) -> Images:
    """The pack's pictures at `image_size`, in the order of the digest: the same order at every site.

    `folder` is the pack itself, `cache` a folder for the decoded pictures (None: decode). Raises `ProblemList`.
    """
    pack, problems = inspect_anchor(Path(folder), image_size, channels, cache, fit)
    if problems or pack is None or pack.images is None:
        raise ProblemList(problems)
    return pack.images


@dataclass(frozen=True)
class AnchorPack:
    """A pack that was read and is in order; `content` are the hashes of its pictures, `images` None without a size."""

    info: AnchorInfo
    digest: str
    content: list[str]
    images: Images | None


def inspect_anchor(
    folder: Path, image_size: int | None, channels: int = 3, cache: Path | None = None, fit: str = "stretch"
) -> tuple[AnchorPack | None, list[str]]:
    """Read and check a pack: the pack, or None and one line for each problem."""
    if not folder.is_dir():
        return None, [f"anchor: the folder is missing: {_COPY_AGAIN}"]
    try:
        info = read_anchor_info(folder)
        names, labels = _read_pack(folder) if (folder / PACK).is_file() else _read_table(folder, info)
    except ProblemList as error:
        return None, error.problems
    except UserError as error:
        return None, [str(error)]
    decoded = load_pictures(folder, names, image_size, channels, root=cache, task="anchor", fit=fit)
    problems = [f"anchor/{text}" for _, text in sorted(decoded.errors.items())]
    problems += [f"anchor: {problem}" for problem in _count_problems(labels, info.balanced)]
    if problems:
        return None, problems
    return _verified(info, names, labels, decoded)


def _verified(
    info: AnchorInfo, names: list[str], labels: np.ndarray, decoded: Decoded
) -> tuple[AnchorPack | None, list[str]]:
    content = [str(hash_) for hash_ in decoded.content]
    problems = []
    seen: dict[str, str] = {}
    for name, hash_ in zip(names, content, strict=True):
        if hash_ in seen:
            problems.append(f"anchor/{name}: the same picture as {seen[hash_]}: remove one of them")
        seen.setdefault(hash_, name)
    digest = digest_of(content, labels)
    if info.n != len(labels):
        problems.append(f"anchor/{INFO}: says {info.n} images but the pack holds {len(labels)}: {_COPY_AGAIN}")
    elif info.digest != digest:
        problems.append(f"anchor/{INFO}: its digest differs from that of the pack's content: {_COPY_AGAIN}")
    if problems:
        return None, problems
    images = None
    if decoded.pixels is not None:
        images = Images(decoded.pixels, labels, [f"anchor/{name}" for name in names])
        order = sorted(range(len(labels)), key=lambda row: (content[row], labels[row]))
        if order != list(range(len(labels))):  # only packs that write_anchor did not write
            images = images.subset(order)
    return AnchorPack(info, digest, content, images), []


def _count_problems(labels: np.ndarray, balanced: bool) -> list[str]:
    if not set(np.unique(labels).tolist()) <= {0, 1}:
        return ["labels other than 0 and 1: correct them"]
    negative, positive = int((labels == 0).sum()), int((labels == 1).sum())
    if not negative or not positive:
        return [f"{negative} negative and {positive} positive images: both classes are needed"]
    if balanced and negative != positive:
        return [f"{negative} negative but {positive} positive images: draw as many of each, or declare it unbalanced"]
    return []


def _read_pack(folder: Path) -> tuple[list[str], np.ndarray]:
    try:
        with np.load(folder / PACK, allow_pickle=False) as pack:
            stored = pack["labels"]
        if stored.ndim != 1:
            raise ValueError("labels")
    except KeyError:
        raise UserError(f"anchor/{PACK}: the array 'labels' is missing: {_COPY_AGAIN}") from None
    except Exception as error:  # a damaged zip raises anything: BadZipFile, zlib.error, EOFError, ValueError, ...
        raise UserError(f"anchor/{PACK}: truncated or damaged: {_COPY_AGAIN}") from error
    labels = _whole_numbers(stored, f"anchor/{PACK}")
    return [f"{PACK}#{row}" for row in range(len(labels))], labels


def _whole_numbers(labels: Sequence[int] | np.ndarray, where: str) -> np.ndarray:
    """Labels as int64; a cut-off 0.9 would silently be another class."""
    labels = np.asarray(labels)
    if labels.size and labels.dtype.kind not in "iub":
        raise UserError(f"{where}: the labels are of type {labels.dtype}: store whole numbers, 0 and 1")
    return labels.astype(np.int64)


def _read_table(folder: Path, info: AnchorInfo) -> tuple[list[str], np.ndarray]:
    if not (folder / TABLE).exists():
        raise UserError(f"anchor: neither {PACK} nor {TABLE} is there: {_COPY_AGAIN}")
    table = read_csv(folder / TABLE, f"anchor/{TABLE}")
    absent = [column for column in ("image", "label") if column not in table.header]
    if absent:
        raise ProblemList([f"anchor/{TABLE}: the column '{column}' is missing: {_COPY_AGAIN}" for column in absent])
    known = {"0": 0, "1": 1, info.labels[0]: 0, info.labels[1]: 1}
    names, labels, problems = [], [], []
    for (line, row), (_, values) in zip(table.records(), table.rows, strict=True):
        name, wrong = image_name(row.get("image", ""))
        label = known.get(row.get("label", ""))
        wrong = table.ragged(values) or wrong
        if label is None:
            wrong = wrong or f"the label is neither '{info.labels[0]}' nor '{info.labels[1]}': correct it"
        if wrong or label is None:
            problems.append(f"anchor/{TABLE} row {line}: {wrong}")
        else:
            names.append(name)
            labels.append(label)
    if problems:
        raise ProblemList(problems)
    return names, np.asarray(labels, dtype=np.int64)
