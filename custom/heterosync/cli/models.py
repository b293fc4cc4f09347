"""`heterosync predict`, `export` and `partners`: what is done with a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heterosync.cli.base import add_command, add_json, positive, show

PARTNERS = ("self", "sat_index", "sat_mean")


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "predict",
        "score images, or segment volumes, with trained model files",
        _predict,
        "heterosync predict best_model.pt images/ --out scores.csv\n"
        "heterosync predict best_model.pt site-a --partner sat_mean --out scores.csv\n"
        "heterosync predict best_model.pt t2.nii.gz --out mask.nii.gz --probability\n"
        "heterosync predict fold1.pt fold2.pt fold3.pt dicom-series/ --out masks",
    )
    parser.add_argument(
        "models",
        nargs="+",
        type=Path,
        metavar="MODEL",
        help="best_model.pt or last_model.pt of a run; several models of volumes: the mean of their probabilities",
    )
    parser.add_argument(
        "images",
        type=Path,
        metavar="IMAGES",
        help="one image or volume (NIfTI, MetaImage, a folder with a DICOM series), a folder of them, a site folder; "
        "of pictures also an .npz pack",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="of pictures a table with image, probability, label; of volumes a new folder, of one also a .nii.gz file",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: cpu)")
    volumes = parser.add_argument_group("volumes")
    volumes.add_argument(
        "--probability", action="store_const", const=True, help="also write the probability of each voxel"
    )
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--partner", choices=PARTNERS, help="second image of the two-task network (default: the model's own)"
    )
    pictures.add_argument(
        "--anchor", type=Path, metavar="SITE", help="folder with anchor/, if the model file has no partners"
    )
    pictures.add_argument(
        "--batch-size", type=positive, metavar="N", help="images read at a time; changes no score (default: 32)"
    )
    add_json(parser)

    parser = add_command(
        commands,
        "export",
        "write a trained model in a form that runs without heterosync",
        _export,
        "heterosync export best_model.pt --out model.pt2\nheterosync export best_model.pt --out prostate_bundle",
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="of pictures' models a torch.export program (.pt2), of volumes' models a MONAI bundle, a new folder",
    )
    parser.add_argument(
        "--partner", choices=PARTNERS[::2], help="second image of the two-task network (default: the model's own)"
    )
    add_json(parser)

    parser = add_command(
        commands,
        "partners",
        "put partner images of the anchor pack into a model file, for --partner sat_index and sat_mean",
        _partners,
        "heterosync partners best_model.pt --anchor data/site-a",
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--anchor", type=Path, required=True, metavar="FOLDER", help="an anchor pack, or a site folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: MODEL itself, replaced in one step")


def _predict(arguments: argparse.Namespace) -> None:
    from heterosync.study.use import use_models

    facts = use_models(
        "predict",
        arguments.models,
        arguments.images,
        arguments.out,
        (lambda line: None) if arguments.json else (lambda line: print(line, flush=True)),
        device=arguments.device,
        probability=arguments.probability,
        partner=arguments.partner,
        anchor=arguments.anchor,
        batch_size=arguments.batch_size,
    )
    if arguments.json:
        show(facts)


def _export(arguments: argparse.Namespace) -> None:
    from heterosync.study.use import use_models

    facts = use_models("export", [arguments.model], arguments.out, partner=arguments.partner)
    if arguments.json:
        show(facts)
        return
    for name, value in facts.items():
        print(f"{name.replace('_', ' ')}: {value}")


def _partners(arguments: argparse.Namespace) -> None:
    from heterosync.study.partners import embed_partners

    count = embed_partners(arguments.model, arguments.anchor, arguments.out)
    print(f"{arguments.out or arguments.model}: {count} partner images inside")
