"""Every pair that the laws in test_zoo.py hold for: a new program is tested by a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from known_pairs import KNOWN
from structures import MAKE

import one_layer
from pairs import PAIRS, binary
from pyrovae.data.tables import Column
from pyrovae.guides.linear_gaussian import LinearGaussian as LinearGaussianGuide
from pyrovae.guides.sequence import Sequence as ChainGuide
from pyrovae.guides.table import Table as TableGuide
from pyrovae.models.linear_gaussian import LinearGaussian
from pyrovae.models.sequence import Sequence as Chain
from pyrovae.models.table import Table
from pyrovae.objectives import OBJECTIVES

SCORED = "takes reparameterized latents alone, and the guide draws 'y'"
BY_COLUMN = "No site of the model observes x as it is"
FEW = ("trace_elbo", "trace_mean_field_elbo", "iwae")
GREY = ("same_names", "functions")
ALONE = {"trace_enum_elbo": "no sample sites configured for enumeration"}
ENUMERATED = {"trace_elbo": "need to use TraceEnum_ELBO instead"}
NEEDS_PATHS = dict.fromkeys(("trace_mean_field_elbo", "stl", "iwae_stl", "iwae_dreg"), SCORED)


class Entry(NamedTuple):
    """A pair with a batch, and what does not fit it.

    ``make`` returns the model, the guide and ``(x, *context)``. ``refused`` are the objectives
    that raise an error, with its words, and ``doubted`` those that warn. ``limits`` are the rows
    of the check that are to warn, and ``noisy`` the objectives whose gradient is mostly noise, so
    that a few steps need not improve anything. ``alike`` pairs differ from others here by one line
    that no objective sees, so that a few of those stand for all.
    """

    make: Callable[[], tuple]
    refused: dict[str, str] = {}  # noqa: RUF012
    doubted: dict[str, str] = ALONE
    limits: tuple[str, ...] = ()
    noisy: tuple[str, ...] = ()
    alike: bool = False

    @property
    def objectives(self) -> list[str]:
        """The names of the objectives that fit."""
        known = FEW if self.alike else OBJECTIVES
        return [name for name in known if name not in self.refused]


def one(model: str, guide: str) -> tuple:
    """A pair with one latent layer."""
    return *one_layer.pair(model, guide), (one_layer.data(model),)


def linear() -> tuple:
    """The pair whose posterior is exact."""
    return LinearGaussian((4,), 2), LinearGaussianGuide((4,), 2), (torch.randn(12, 4),)


def table() -> tuple:
    """A table with a column of every kind, a third of it missing."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(12, 6, generator=generator)
    sizes = torch.tensor([1.0, 1.0, 9.0, 2.0, 3.0, 4.0])
    x = torch.where(sizes > 1, (sizes * u).floor(), u + 0.1)
    mask = torch.rand(12, 6, generator=generator) > 0.3
    kinds = ("real", "positive", "count", "binary", "categorical", "ordinal")
    columns = [
        Column(k, k, tuple("abcd"[:n]) if j > 2 else ())
        for j, (k, n) in enumerate(zip(kinds, (0, 0, 0, 2, 3, 4), strict=True))
    ]
    options = {"columns": columns, "latent": 3, "hidden": (12,)}
    return (
        Table((6,), **options),
        TableGuide((6,), **options),
        (torch.where(mask, x, torch.eye(6)[1]), mask),
    )


def colour(model: str, guide: str = "convolutional", **options) -> tuple:
    """A pair for images in colour, of an odd size, on a grid of five levels."""
    small = {"shape": (3, 5, 7), "latent": 2, "channels": (3, 4), "hidden": (6,), **options}
    x = torch.rand(12, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    levels = {"levels": 5} if model == "residual" else {}
    pair = (
        one_layer.build("models", model, **small, **levels),
        one_layer.build("guides", guide, **small),
    )
    return *pair, ((4 * x).round() / 4,)


def sequence() -> tuple:
    """Sequences of three lengths, padded."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(12, 5, 3, generator=generator) > 0.5).float()
    lengths = torch.arange(12) % 3 * 2 + 1
    mask = (torch.arange(5) < lengths[:, None])[..., None].expand_as(x)
    return Chain((5, 3), 2, (6,), 4), ChainGuide((5, 3), 2, 6), (x * mask, mask)


def known(name: str) -> tuple:
    """A pair whose log p(x) is known, moved away from there."""
    model, guide, args, _ = KNOWN[name]()
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, guide, args


def written(name: str) -> tuple:
    """A pair as a person may write it."""
    x = binary()
    return *PAIRS[name](), (0.1 + 0.8 * x if name in GREY else x,)


ZOO = {f"{m}-{g}": Entry(partial(one, m, g)) for m, g in one_layer.EACH}
ZOO |= {n: Entry(partial(written, n)) for n in PAIRS if not n.startswith("shipped")}
ZOO |= {
    "poisson-counts": Entry(partial(one, "poisson", "counts")),
    "negative_binomial-counts": Entry(partial(one, "negative_binomial", "counts")),
    "residual": Entry(partial(colour, "residual", "residual", blocks=1), alike=True),
    "convolutional_gaussian": Entry(partial(colour, "convolutional_gaussian"), alike=True),
    "convolutional_continuous": Entry(partial(colour, "convolutional_continuous"), alike=True),
    "linear": Entry(linear),
    "bernoulli-autoencoder": Entry(
        partial(one, "bernoulli", "autoencoder"), noisy=("stl", "iwae_stl", "iwae_dreg")
    ),
    "two_layer": Entry(
        MAKE["two_layer"],
        doubted=ALONE | {"trace_mean_field_elbo": "Failed to verify mean field restriction"},
        limits=("analytic KL",),
    ),
    "ladder": Entry(MAKE["ladder"]),
    "sequence": Entry(sequence),
    "table": Entry(table, dict.fromkeys(("wake_sleep", "reweighted_wake_sleep"), BY_COLUMN)),
    "conditional": Entry(MAKE["conditional"]),
    "gmvae": Entry(MAKE["gmvae"], NEEDS_PATHS, ENUMERATED),
    "semi_supervised": Entry(MAKE["semi_supervised"], NEEDS_PATHS, ENUMERATED),
    "masked": Entry(partial(known, "masked")),
    "partial": Entry(partial(known, "partial")),
    "discrete": Entry(partial(written, "discrete"), NEEDS_PATHS, limits=("reparameterized",)),
    "mixed": Entry(partial(written, "mixed"), NEEDS_PATHS, limits=("reparameterized",)),
}
