"""Which part of the loss reaches which layer, over a short training: HSL and its variants (docs/anchor.md).

`python -m benchmarks.coupling [--data DIR] [--rounds N] [--backbone NAME]` prints two tables: L2 norms
of the gradients of each part of the loss, as weighted there, by layers; and their ratio to the primary task's on the
primary encoder. Norms are taken at every site, in training mode without dropout, on the 16 images of the site's
diagnostics: before the first step, and at the end of every round's local training. The mean over sites is shown.
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heterosync.data.synthetic import make_alliance
from heterosync.federation.runner import run_inprocess
from heterosync.methods import get_method
from heterosync.methods.base import Method
from heterosync.study.table import text_table
from heterosync.training import Batch

#: Label -> method and its settings.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "hsl": ("hsl", {}),
    "hsl_norm": ("hsl_norm", {}),
    "hsl_norm scaled": ("hsl_norm", {"embedding": "scaled"}),
    "hsl_shared": ("hsl_shared", {}),
    "hsl_shared joint": ("hsl_shared", {"statistics": "shared"}),
    "hsl_distill": ("hsl_distill", {}),
    "hsl_distill logits": ("hsl_distill", {"distill_on": "logits"}),
}
#: Layers of the primary encoder (the only one of the variants with one), then the rest.
LAYERS = ("stem", "layer1", "layer2", "layer3", "layer4", "fc", "anchor encoder", "experts", "gates", "towers")
ENCODER = LAYERS[:6]
SOURCES = ("primary", "anchor", "distillation")

#: source -> layer -> norm
Norms = dict[str, dict[str, float]]


def layer_of(name: str) -> str:
    """The row of a parameter; skips count as towers."""
    if name.startswith("encoders.1."):
        return "anchor encoder"
    part = re.sub(r"^encoders?\.(0\.)?", "", name).split(".")[0]
    return {"conv1": "stem", "bn1": "stem", "skips": "towers"}.get(part, part)


def norms(method: Any, model: nn.Module, batch: Batch) -> Norms:
    """Of a copy of the model, so that nothing of the training changes."""
    assert batch.anchor_images is not None and batch.anchor_labels is not None
    count = min(len(batch.images), len(batch.anchor_images))  # a small site has fewer
    batch = Batch(batch.images[:count], batch.labels[:count], batch.anchor_images[:count], batch.anchor_labels[:count])
    probe = copy.deepcopy(model).train()
    for layer in probe.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    names, weights = zip(*((n, p) for n, p in probe.named_parameters() if p.requires_grad), strict=True)
    found: Norms = {}
    for source, term in method.terms(probe, batch).items():
        gradients = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        squares = dict.fromkeys(LAYERS, 0.0)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                squares[layer_of(name)] += float(gradient.double().square().sum())
        found[source] = {layer: value**0.5 for layer, value in squares.items()}
    return found


@contextmanager
def watched(method: type[Method], seen: list[Norms]) -> Iterator[None]:
    """Every site's norms go into `seen`: one for each when training begins, then one for each at the end of a round."""
    start, end = method.round_start, method.round_end
    begun: set[int] = set()

    def round_start(self: Method, model: nn.Module, received: Mapping[str, Tensor], examples: Any) -> None:
        start(self, model, received, examples)
        if id(self) not in begun:
            begun.add(id(self))
            seen.append(norms(self, model, examples.sample()))

    def round_end(self: Method, model: nn.Module, examples: Any) -> None:
        end(self, model, examples)
        seen.append(norms(self, model, examples.sample()))

    method.round_start, method.round_end = round_start, round_end  # type: ignore[method-assign]
    try:
        yield
    finally:
        method.round_start, method.round_end = start, end  # type: ignore[method-assign]


def measure(label: str, sites: Mapping[str, Path], out: Path, training: Mapping[str, Any]) -> list[Norms]:
    """Norms before training and after each round, means over the sites."""
    name, settings = RUNS[label]
    seen: list[Norms] = []
    with watched(get_method(name), seen):
        run_inprocess(name, sites, out, settings, training)
    moments, count = [], len(sites)
    # round 0: before and after at each site in turn; then one for each site and round
    ordered = [seen[0 : 2 * count : 2], seen[1 : 2 * count : 2]]
    ordered += [seen[begin : begin + count] for begin in range(2 * count, len(seen), count)]
    for group in ordered:
        moments.append(
            {
                source: {layer: float(np.mean([one[source][layer] for one in group])) for layer in LAYERS}
                for source in SOURCES
                if source in group[0]
            }
        )
    return moments


def _on_encoder(layers: Mapping[str, float]) -> float:
    return float(np.linalg.norm([layers[layer] for layer in ENCODER]))


def tables(found: Mapping[str, list[Norms]]) -> str:
    rows, ratios = [], []
    for label, moments in found.items():
        for round_, moment in enumerate(moments):
            for source, layers in moment.items():
                cells = [f"{layers[layer]:.1e}" if layers[layer] else "0" for layer in LAYERS]
                rows.append([label, str(round_), source, *cells])
        for source in SOURCES[1:]:
            if source in moments[0]:
                parts = [_on_encoder(moment[source]) / _on_encoder(moment["primary"]) for moment in moments]
                ratios.append([f"{label}, {source}", *(f"{part:.1e}" for part in parts)])
    header = ["ratio to the primary gradient", *(f"round {i}" for i in range(len(ratios[0]) - 1))]
    return "\n\n".join((text_table(["method", "round", "source", *LAYERS], rows), text_table(header, ratios)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coupling", description="Gradients by source and layer.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="site folders (default: the synthetic alliance)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--local-epochs", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--scale", type=float, default=1.0, help="of the synthetic alliance's counts")
    arguments = parser.parse_args(argv)
    for label in arguments.runs:
        if label not in RUNS:
            parser.error(f"unknown run '{label}': choose from {', '.join(RUNS)}")
    training = {
        "rounds": arguments.rounds,
        "local_epochs": arguments.local_epochs,
        "image_size": arguments.image_size,
        "backbone": arguments.backbone,
        "weights": "none",
        "batch_size": 32,
        "precision": "float32",
    }
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = arguments.data or Path(temporary) / "data"
        if arguments.data is None:
            make_alliance(data, 0, arguments.image_size, arguments.scale)
        sites = {path.parent.name: path.parent for path in sorted(data.glob("*/site.yaml"))}
        sites.pop("unseen", None)
        for number, label in enumerate(arguments.runs or RUNS):
            print(f"training {label} …", flush=True)
            found[label] = measure(label, sites, Path(temporary) / str(number), training)
    print(f"\n{tables(found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
