"""`heterosync report`, `predict` and `export`: what comes after a training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heterosync.cli.base import add_command, add_json, positive, show
from heterosync.cli.study import report as report_study
from heterosync.errors import UserError

PARTNERS = ("self", "sat_index", "sat_mean")


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        "make tables and figures from the result files of finished, running or broken-off runs",
        _report,
        "heterosync report build/demo/hsl build/demo/local --out build/report\nheterosync report runs/demo",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder, a folder that holds one somewhere, or one study",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the page, tables and figures there")
    add_json(parser)

    parser = add_command(
        commands,
        "predict",
        "score images with a trained model file",
        _predict,
        "heterosync predict best_model.pt images/ --out scores.csv\n"
        "heterosync predict best_model.pt site-a --partner sat_mean --out scores.csv",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="best_model.pt or last_model.pt of a run")
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="a folder of images, one image, an .npz pack or a site folder"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="CSV", help="columns image, probability, label")
    parser.add_argument(
        "--partner", choices=PARTNERS, help="second image of the two-task network (default: the model's own)"
    )
    parser.add_argument(
        "--anchor", type=Path, metavar="SITE", help="folder with anchor/, if the model file has no partners"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images read at a time; changes no score"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: cpu)")
    add_json(parser)

    parser = add_command(
        commands,
        "export",
        "write a trained model as a torch.export program that runs without heterosync",
        _export,
        "heterosync export best_model.pt --out model.pt2",
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="name of the program, usually ending in .pt2"
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


def _report(arguments: argparse.Namespace) -> None:
    from heterosync.study.layout import STUDY
    from heterosync.study.pages.report import read_runs, report_dict, report_text, write_report

    studies = [path for path in arguments.runs if (path / STUDY).is_file()]
    if studies and len(arguments.runs) > 1:
        raise UserError(f"{studies[0]} is a study: report on it by itself, `heterosync study report {studies[0]}`")
    if studies:
        report_study(studies[0], arguments.out, arguments.json)
        return
    runs = read_runs(arguments.runs)
    files = write_report(runs, arguments.out) if arguments.out else []
    if arguments.json:
        show(report_dict(runs))
        return
    print(report_text(runs))
    for file in files:
        print(f"wrote {file}")


def _predict(arguments: argparse.Namespace) -> None:
    from heterosync.study.predict import predict

    result = predict(
        arguments.model, arguments.images, arguments.partner, arguments.batch_size, arguments.device, arguments.anchor
    )
    result.to_csv(arguments.out)
    if arguments.json:
        show({"file": str(arguments.out), "images": len(result.names), "metrics": result.metrics})
        return
    print(f"wrote {arguments.out}: {len(result.names)} images")
    if result.metrics:
        from heterosync.study.table import with_interval

        auc = with_interval(*(result.metrics[key] for key in ("auc", "ci_low", "ci_high")))
        print(f"AUC over every row of the manifest: {auc} (not a test where the model was trained on some of them)")


def _export(arguments: argparse.Namespace) -> None:
    from heterosync.study.export import export_model

    facts = export_model(arguments.model, arguments.out, arguments.partner)
    if arguments.json:
        show(facts)
        return
    for name, value in facts.items():
        print(f"{name.replace('_', ' ')}: {value}")


def _partners(arguments: argparse.Namespace) -> None:
    from heterosync.study.partners import embed_partners

    count = embed_partners(arguments.model, arguments.anchor, arguments.out)
    print(f"{arguments.out or arguments.model}: {count} partner images inside")
