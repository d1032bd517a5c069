"""Tables of mixed columns, with gaps and covariates: each column a likelihood in its own units."""

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.nn import MLP, Column, Units

__all__ = ["Table"]

# A density of a column that repeats its values would grow without bound below such a scale.
LEAST = 0.05


def _real(h: Tensor, loc: float, scale: float) -> dist.TorchDistribution:
    """A real number, from ``h`` ``[..., 2]``."""
    return dist.Normal(loc + scale * h[..., 0], scale * (softplus(h[..., 1]) + LEAST))


def _positive(h: Tensor, loc: float, scale: float) -> dist.TorchDistribution:
    """A number above 0, whose logarithm has this mean and scale."""
    return dist.LogNormal(loc + scale * h[..., 0], scale * (softplus(h[..., 1]) + LEAST))


def _count(h: Tensor, loc: float, scale: float) -> dist.TorchDistribution:
    """A whole number from 0, about exp(loc)."""
    mean = softplus(h[..., 0] + 0.5) * math.exp(loc) + 1e-6
    r = softplus(h[..., 1]) + 1e-2
    return dist.NegativeBinomial(r, logits=mean.log() - r.log())


def _binary(h: Tensor, loc: float, scale: float) -> dist.TorchDistribution:
    """0 or 1."""
    return dist.Bernoulli(logits=h[..., 0])


def _categorical(h: Tensor, loc: float, scale: float) -> dist.TorchDistribution:
    """The code of a category."""
    return dist.Categorical(logits=h)


def _ordinal(h: Tensor, loc: float, scale: float) -> dist.TorchDistribution:
    """The place in an order: P(x ≤ c) is a sigmoid of cuts that rise."""
    cuts = torch.cat([h[..., :1], softplus(h[..., 1:])], -1).cumsum(-1)
    below = torch.nn.functional.pad(cuts.sigmoid(), (0, 1), value=1.0)
    return dist.Categorical(probs=below - torch.nn.functional.pad(below[..., :-1], (1, 0)) + 1e-6)


LIKELIHOODS = {
    "real": _real,
    "positive": _positive,
    "count": _count,
    "binary": _binary,
    "categorical": _categorical,
    "ordinal": _ordinal,
}


class Table(PyroModule):
    r"""A VAE for tables of mixed columns.

    .. math:: z \sim \mathcal{N}(0, I), \qquad x_j \mid z, c \sim p_j(x_j; f_j(z, c))

    Each column is a site of its own, ``x.NAME``, with the likelihood of its kind: normal for real
    numbers, log-normal for positive ones, negative binomial for counts, Bernoulli, categorical, and
    a cumulative logit for ordered categories. log p(x | c) is in the data's units. The covariates c
    are columns that the model is given and does not explain.

    Args:
        shape: The number of columns, ``[D]``.
        columns: ``data.columns``; by default D real ones of mean 0 and standard deviation 1.
        latent: The dimension of z.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        context_columns: ``data.context_columns``, of what the programs take between x and the mask.

    Raises:
        ValueError: If there is not one column for each of D, or one of an unknown kind.

    References:
        Nazábal et al., Handling Incomplete Heterogeneous Data using VAEs (arXiv 1807.03653),
        section 3.1.
    """

    def __init__(
        self,
        shape: Sequence[int],
        columns: Sequence[Column] | None = None,
        latent: int = 10,
        hidden: Sequence[int] = (128, 128),
        activation: str = "ReLU",
        context_columns: Sequence[Column] = (),
    ) -> None:
        super().__init__()
        if columns is None:
            columns = [(f"{j}", "real", (), 0.0, 1.0) for j in range(math.prod(shape))]
        kinds = [kind for _, kind, *_ in columns]
        if [len(kinds)] != list(shape) or not LIKELIHOODS.keys() >= {*kinds}:
            raise ValueError(
                f"Expected columns for data of shape {list(shape)}, each of a kind among "
                f"{', '.join(LIKELIHOODS)}, got {kinds}: give columns=data.columns."
            )
        self.columns, self.context = list(columns), Units(context_columns)
        sizes = {"binary": lambda c: 1, "categorical": len, "ordinal": lambda c: len(c) - 1}
        self.sizes = [sizes.get(kind, lambda c: 2)(c) for _, kind, c, _, _ in self.columns]
        self.decoder = MLP(latent + self.context.width, sum(self.sizes), hidden, activation)
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, *context: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe the columns of ``x`` ``[N, D]``.

        ``context`` are the covariates ``[N]``, and the mask ``[N, D]`` if it has no name.
        """
        c, seen = self.context.beside(x, *context, mask=mask)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            inputs = torch.cat([z, c.expand(*z.shape[:-1], -1)], -1)
            outputs = self.decoder(inputs).split(self.sizes, -1)
            for j, (name, kind, _, loc, scale) in enumerate(self.columns):
                likelihood = LIKELIHOODS[kind](outputs[j], loc, scale)
                pyro.sample(f"x.{name}", likelihood.mask(seen[..., j]), obs=x[..., j])
