"""Read public prostate sets in the layout in which their makers publish them, and plain folders.

To add one: a function here and a line in `VOLUME_SOURCES`. No set is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from heterosync.data.dicom_series import Series, series_geometry, series_header, series_values
from heterosync.data.tables import read_csv
from heterosync.data.volume_collection import CaseCollection, FoundCase
from heterosync.data.volumes import METAIMAGE, NIFTI, Volume, explaining, open_volume
from heterosync.errors import ProblemList, UserError, nearest
from heterosync.files import read_json

Found = tuple[list[FoundCase], list[str]]  # cases, and notes of what was left out


def open_cases(
    source: Path, kind: str, masks: Path | None = None, foreground: tuple[int, ...] | None = None
) -> CaseCollection:
    """The cases of a set of `kind` in the folder `source`; `masks` where they lie apart, `foreground` in place of the
    set's own mask values.

    Raises `UserError`, or `ProblemList` with every case that cannot be opened.
    """
    if kind not in VOLUME_SOURCES:
        raise UserError(f"no kind of volumes is named '{kind}'; {nearest(kind, VOLUME_SOURCES)}")
    reader = VOLUME_SOURCES[kind]
    for folder in (source, masks):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the folder of the set")
    if reader.masks != (masks is not None):
        mend = "name their folder with --masks" if reader.masks else "leave out --masks"
        raise UserError(f"the masks of {kind} lie {'apart from' if reader.masks else 'beside'} its images: {mend}")
    cases, notes = reader.read(source, masks) if masks else reader.read(source)
    if not cases:
        raise UserError(f"{source} holds no case as {kind} has them ({reader.layout}): give its top folder")
    return CaseCollection(source.name, cases, foreground or reader.foreground, tuple(notes))


def from_promise12(folder: Path) -> Found:
    """PROMISE12 (Litjens et al., Med. Image Anal. 2014): `Case00.mhd`, `Case00.raw`, `Case00_segmentation.mhd`, ….

    Test cases have no segmentation and are left out.
    """
    pairs, bare = [], 0
    for path in sorted(folder.rglob("Case[0-9][0-9].mhd")):
        mask = path.with_name(f"{path.stem}_segmentation.mhd")
        if mask.is_file():
            pairs.append((path.stem, path.stem, path, mask))
        else:
            bare += 1
    return _opened(folder, pairs), _left_out(bare, "they have no segmentation")


def from_decathlon(folder: Path) -> Found:
    """Medical Segmentation Decathlon, Task05_Prostate (Antonelli et al., Nat. Commun. 2022): `dataset.json`,
    `imagesTr/prostate_00.nii.gz` (T2 and ADC in one 4-D file), `labelsTr/prostate_00.nii.gz` (1 peripheral zone,
    2 transition zone)."""
    file = folder / "dataset.json"
    if not file.is_file():
        raise UserError(f"{file} is missing: give the folder Task05_Prostate")
    content = read_json(file)
    try:
        channels = {str(name).upper(): int(number) for number, name in content["modality"].items()}
        listed = [
            (folder / "imagesTr" / Path(pair["image"]).name, folder / "labelsTr" / Path(pair["label"]).name)
            for pair in content["training"]
        ]
        bare = int(content.get("numTest", 0))
        channel = channels["T2"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: no list of training pairs with a T2 channel: unpack Task05_Prostate again") from error
    pairs = [(image.name.split(".")[0], image.name.split(".")[0], image, label) for image, label in listed]
    return _opened(folder, sorted(pairs), channel), _left_out(bare, "test images without labels")


def from_prostate158(folder: Path) -> Found:
    """Prostate158 (Adams et al., Comput. Biol. Med. 2022): `train/020/t2.nii.gz` and `t2_anatomy_reader1.nii.gz` in a
    folder per patient (1 central gland, 2 peripheral zone), at any depth."""
    pairs, bare = [], 0
    for path in sorted(folder.rglob("t2.nii.gz")):
        mask = path.with_name("t2_anatomy_reader1.nii.gz")
        if mask.is_file():
            pairs.append((path.parent.relative_to(folder).as_posix(), path.parent.name, path, mask))
        else:
            bare += 1
    return _opened(folder, pairs), _left_out(bare, "they have no t2_anatomy_reader1.nii.gz")


def from_plain(folder: Path) -> Found:
    """`images/NAME` and `masks/NAME`: NIfTI, MetaImage or folders of a DICOM series, alike named but for the suffix."""
    images, masks = (dict(_volumes_in(folder / part)) for part in ("images", "masks"))
    lone = [
        f"{folder / 'masks'}: no mask of {name}: add it or remove the image" for name in images if name not in masks
    ]
    lone += [
        f"{folder / 'images'}: no image of the mask {name}: add it or remove it" for name in masks if name not in images
    ]
    if lone:
        raise ProblemList(lone)
    return _opened(folder, [(name, name, images[name], masks[name]) for name in sorted(images)]), []


def from_prostatex(folder: Path, masks: Path) -> Found:
    """PROSTATEx (Litjens et al., TCIA 2017): `ProstateX-0000/<study>/<series>/….dcm`, and masks named by patient:
    `ProstateX-0000.nii.gz` as in `mask_prostate` of Cuocolo et al. (Eur. J. Radiol. 2021, public for 204 patients).

    The T2 series is that whose description has `t2_tse_tra`; of several that which `image_list.csv` beside the folder
    of the masks names by its number, else the last one on the mask's grid. Patients without a mask are left out.
    """
    tops = sorted({path for path in folder.rglob("ProstateX-[0-9][0-9][0-9][0-9]") if path.is_dir()})
    numbers = _series_numbers(masks.parent / "image_list.csv")
    cases, problems, bare = [], [], 0
    for top in tops:
        mask = masks / f"{top.name}.nii.gz"
        if not mask.is_file():
            bare += 1
            continue
        try:
            drawn = open_volume(mask)
            with explaining(top.name):
                series = _t2_series(top, drawn, numbers.get(top.name))
            image = Volume(top.name, series.geometry, lambda series=series: series_values(series))  # type: ignore[misc]
            cases.append(FoundCase(top.name, top.name, image, drawn))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ProblemList(problems)
    return cases, _left_out(bare, "they have no mask")


def _t2_series(patient: Path, mask: Volume, number: int | None) -> Series:
    folders = sorted({path.parent for path in patient.rglob("*.dcm")})
    found = [path for path in folders if "t2_tse_tra" in series_header(path)[0].lower()]
    if not found:
        raise UserError("no series is described as t2_tse_tra: download the T2 series of this patient")
    named = [path for path in found if series_header(path)[1] == number] or found
    series = [series_geometry(path) for path in named]
    fitting = [one for one in series if one.geometry.mismatch(mask.geometry) is None]
    return max(fitting or series, key=lambda one: one.number)  # what fits none is told when it is read


def _series_numbers(table: Path) -> dict[str, int]:
    """`ProstateX-0000_t2_tse_tra_4` per row: series 4 of that patient."""
    if not table.is_file():
        return {}
    names = [values[0].rsplit("_", 1) for _, values in read_csv(table).rows]
    return {name.split("_")[0]: int(rest[0]) for name, *rest in names if rest and rest[0].isdecimal()}


def _volumes_in(folder: Path) -> Iterator[tuple[str, Path]]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: put the volumes into images and their masks into masks")
    for path in sorted(folder.iterdir()):
        suffix = next((end for end in (*NIFTI[::-1], *METAIMAGE) if path.name.lower().endswith(end)), "")
        if not path.name.startswith(".") and (suffix or path.is_dir()):
            yield path.name[: len(path.name) - len(suffix)], path


def _opened(folder: Path, pairs: list[tuple[str, str, Path, Path]], channel: int | None = None) -> list[FoundCase]:
    """Cases of (id, patient, image, mask); raises `ProblemList` with everything that is no volume."""
    cases, problems = [], []
    for id_, patient, *paths in pairs:
        opened = []
        for path, part in zip(paths, (channel, None), strict=True):
            try:
                name = path.relative_to(folder).as_posix()
                opened.append(open_volume(path, name, part))
            except UserError as error:
                problems.append(str(error))
        if len(opened) == 2:
            cases.append(FoundCase(id_, patient, *opened))
    if problems:
        raise ProblemList(problems)
    return cases


def _left_out(count: int, why: str) -> list[str]:
    return [f"{count} cases left out: {why}"] if count else []


@dataclass(frozen=True)
class VolumeSource:
    """read: folder (and folder of masks, where `masks`) to cases and notes; `layout` in short, for messages."""

    read: Callable[..., Found]
    layout: str
    foreground: tuple[int, ...] = (1,)
    masks: bool = False


VOLUME_SOURCES = {
    "volumes": VolumeSource(from_plain, "images/NAME and masks/NAME"),
    "prostatex": VolumeSource(from_prostatex, "ProstateX-0000/STUDY/SERIES/*.dcm", masks=True),
    "promise12": VolumeSource(from_promise12, "Case00.mhd and Case00_segmentation.mhd"),
    "msd-prostate": VolumeSource(from_decathlon, "dataset.json, imagesTr, labelsTr", (1, 2)),
    "prostate158": VolumeSource(from_prostate158, "020/t2.nii.gz and t2_anatomy_reader1.nii.gz", (1, 2)),
}
