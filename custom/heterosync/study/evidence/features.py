"""What a trained encoder knows of the sites: its features of test images, before and after training, and two numbers
that say how far the sites lie apart in them. A t-SNE map of the same features is a picture, not a measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from heterosync.data.dataset import load_site
from heterosync.data.images import Images
from heterosync.errors import UserError
from heterosync.federation.modelfile import load_model
from heterosync.models import MMoE
from heterosync.models.classifier import Classifier
from heterosync.models.encoder import features as body_features
from heterosync.models.shared import SharedEncoder
from heterosync.training.seeds import stream

POINTS = 60
FOLDS = 5
_BATCH = 32


@dataclass(frozen=True)
class Features:
    """One row per image, (n, d): output of the primary task's encoder with the first weights and with those of the
    chosen global model; `sites`: whose image it is. Every site has the same number of rows."""

    before: np.ndarray
    after: np.ndarray
    sites: list[str]


def run_features(model: Path | str, sites: Iterable[Path], points: int = POINTS, seed: int = 0) -> Features:
    """Features of the same test images of every site folder, as many of each site (at most `points`, as few as the
    smallest site has), drawn with `seed`.

    Raises `UserError` for a model that is not one global model, for first weights that are not on this machine, and for
    site folders that cannot be read or have no test images.
    """
    file = load_model(model)
    method, after = file.build()
    before = method.build_model().eval()
    training = method.training
    images = {}
    for folder in sites:
        data = load_site(folder, training.image_size, training.channels, need_anchor=False, fit=training.fit)
        images[folder.name] = (data.primary, data.splits["test"])
    count = min([points, *(len(rows) for _, rows in images.values())])
    if not images or count < 2:
        raise UserError(f"{file.path}: no t-SNE map, since a site has fewer than 2 test images")
    named, found = [], ([], [])  # type: tuple[list[str], tuple[list[np.ndarray], list[np.ndarray]]]
    for site, (primary, rows) in sorted(images.items()):
        chosen = np.sort(stream(seed, "features", site).choice(rows, count, replace=False))
        for network, parts in zip((before, after), found, strict=True):
            parts.append(encoded(network, primary, chosen))
        named += [site] * count
    return Features(np.concatenate(found[0]), np.concatenate(found[1]), named)


def encoded(model: nn.Module, images: Images, rows: np.ndarray) -> np.ndarray:
    """Encoder output (n, d) of these rows: of a two-task network as the primary task sees it, else what enters the last
    layer."""
    with torch.inference_mode():
        parts = [
            _encode(model, images.batch(rows[start : start + _BATCH])).double().numpy()
            for start in range(0, len(rows), _BATCH)
        ]
    return np.concatenate(parts)


def _encode(model: nn.Module, batch: Tensor) -> Tensor:
    if isinstance(model, (MMoE, SharedEncoder)):
        return model.encode(0, batch)
    if isinstance(model, Classifier):
        return body_features(model.net, batch)
    raise UserError(f"a {type(model).__name__} has no single encoder whose features could be compared")


def tsne(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Points (n, 2) of scikit-learn's t-SNE, started from the principal components; perplexity 30, or a third of the
    points where there are fewer than 90."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    points: np.ndarray = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    return points


def site_accuracy(features: np.ndarray, sites: Sequence[str], seed: int = 0) -> float | None:
    """Accuracy of a logistic regression that guesses the site from the features, cross-validated (5 folds, or as many
    as the smallest site has images); chance is 1 / number of sites where all have as many. None with one site or a
    single image of a site."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    smallest = min(np.unique(sites, return_counts=True)[1])
    if len(set(sites)) < 2 or smallest < 2:
        return None
    folds = StratifiedKFold(min(FOLDS, int(smallest)), shuffle=True, random_state=seed)
    guess = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(cross_val_score(guess, features, list(sites), cv=folds).mean())


def mmd2(a: np.ndarray, b: np.ndarray, gamma: float) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel exp(-gamma |x - y|^2) (Gretton et al., JMLR 2012, eq.
    3): around 0, also below, where both samples come from one distribution."""
    from sklearn.metrics.pairwise import rbf_kernel

    m, n = len(a), len(b)
    within_a = (rbf_kernel(a, gamma=gamma).sum() - m) / (m * (m - 1))
    within_b = (rbf_kernel(b, gamma=gamma).sum() - n) / (n * (n - 1))
    return float(within_a + within_b - 2 * rbf_kernel(a, b, gamma=gamma).mean())


def site_mmd2(features: np.ndarray, sites: Sequence[str]) -> float | None:
    """Mean of `mmd2` over all pairs of sites; gamma from the median distance of all points, so that the scale of the
    features does not count. None with one site or a single image of a site."""
    from sklearn.metrics import euclidean_distances

    where = np.asarray(sites)
    parts = [features[where == site] for site in sorted(set(sites))]
    if len(parts) < 2 or min(map(len, parts)) < 2:
        return None
    distances = euclidean_distances(features)[np.triu_indices(len(features), 1)]
    median = float(np.median(distances))
    gamma = 1 / (2 * median**2) if median else 1.0
    return float(np.mean([mmd2(a, b, gamma) for a, b in combinations(parts, 2)]))
