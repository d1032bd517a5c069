"""What is to be read off a code: the accuracy of simple classifiers on posterior means."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae._tools.seeding import subseed

__all__ = ["Probe", "fit_probe", "is_probable"]

NEIGHBOURS, MOST = 5, 10_000


class Probe(NamedTuple):
    """The accuracy on data that the classifiers were not fitted to.

    Attributes:
        linear: Of multinomial logistic regression on the standardized posterior means.
        knn: Of the vote of the five nearest neighbours among them.
        chance: Of always saying the class that is most frequent where they were fitted.
        classes: The number of classes.
        num_test: The number of data that accuracy is measured on.
    """

    linear: float
    knn: float
    chance: float
    classes: int
    num_test: int


def is_probable(labels: Tensor) -> bool:
    """Whether labels are whole numbers of at least two classes, with ten data or more."""
    whole = not labels.is_floating_point() and not labels.is_complex()
    return whole and labels.dim() == 1 and len(labels) >= 10 and len(labels.unique()) > 1


def fit_probe(features: Tensor, labels: Tensor, seed: int) -> Probe:
    """Fit classifiers to half of the data, and count their hits on the other half.

    Args:
        features: Posterior means ``[N, D]``; at most ten thousand of them are taken.
        labels: Classes ``[N]``.
        seed: Seeds the choice of the halves.

    References:
        Alain and Bengio, Understanding intermediate layers using linear classifier probes
        (arXiv 1610.01644).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng(subseed(seed, 0)).permutation(len(labels))[:MOST]
    x, y = features.double().cpu().numpy()[order], labels.cpu().numpy()[order]
    half = len(y) // 2
    (fitted, tested), (known, asked) = ((each[:half], each[half:]) for each in (x, y))
    values, counts = np.unique(known, return_counts=True)
    chance = float((asked == values[counts.argmax()]).mean())
    hits = [chance, chance]
    if len(values) > 1:
        kinds = LogisticRegression(max_iter=500), KNeighborsClassifier(min(NEIGHBOURS, half))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fits = [make_pipeline(StandardScaler(), kind).fit(fitted, known) for kind in kinds]
        hits = [float(each.score(tested, asked)) for each in fits]
    return Probe(*hits, chance, len(torch.unique(labels)), len(asked))
