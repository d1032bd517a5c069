"""Estimates of log p(x) as tensors with words about them, and back; and those of fewer data."""

from __future__ import annotations

import json
from dataclasses import replace

from torch import Tensor

from pyrovae._tools import InputError
from pyrovae.evidence.result import Curve, LogLikelihood

__all__ = ["first_data", "from_tensors", "to_tensors"]

ALWAYS = ("log_prob", "standard_error", "ess", "khat")
SOMETIMES = ("smoothed", "guide_elbo", "acceptance")


def to_tensors(ll: LogLikelihood, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything that an estimate holds: tensors ``[..., N]`` by name, and texts by name.

    Args:
        ll: The estimate.
        prefix: What all names begin with, so that several estimates can share a file.
    """
    found = {n: v for n in (*ALWAYS, *SOMETIMES) if (v := getattr(ll, n)) is not None}
    points: tuple[int, ...] = ()
    if ll.curve is not None:
        points, found["curve"] = ll.curve
    about = {
        "data": ll.data,
        "seed": json.dumps(ll.seed),
        "num_samples": str(ll.num_samples),
        "method": ll.method,
        "curve": json.dumps(list(points)),
        "uncovered": str(ll.uncovered),
        "units": "nats",
    }
    return {prefix + n: v for n, v in found.items()}, {prefix + n: v for n, v in about.items()}


def from_tensors(
    tensors: dict[str, Tensor], about: dict[str, str], prefix: str = ""
) -> LogLikelihood | None:
    """The estimate that :func:`to_tensors` took apart; None if there is none of that prefix.

    Raises:
        ValueError: If a part of it is missing.
    """
    if prefix + "log_prob" not in tensors:
        return None
    try:
        points = tuple(json.loads(about[prefix + "curve"]))
        return LogLikelihood(
            **{name: tensors[prefix + name] for name in ALWAYS},
            **{name: tensors.get(prefix + name) for name in SOMETIMES},
            num_samples=int(about[prefix + "num_samples"]),
            curve=Curve(points, tensors[prefix + "curve"]) if points else None,
            method=about[prefix + "method"],
            seed=json.loads(about[prefix + "seed"]),
            data=about[prefix + "data"],
            uncovered=float(about[prefix + "uncovered"]),
        )
    except KeyError as error:
        raise InputError(f"Expected an estimate of log p(x), found none of its {error}.") from error


def first_data(ll: LogLikelihood, n: int) -> LogLikelihood:
    """The estimate for the first n data alone, without their digest."""
    parts = {k: v[:n] for k in (*ALWAYS, *SOMETIMES) if (v := getattr(ll, k)) is not None}
    curve = ll.curve and Curve(ll.curve.num_samples, ll.curve.log_prob[:, :n])
    return replace(ll, **parts, curve=curve, data="")
