"""A diagonal normal posterior for tables of mixed columns, with gaps and covariates."""

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import MLP, Column, Units

__all__ = ["Table"]


class Table(PyroModule):
    r"""The diagonal normal guide of tables, whose network sees numbers of about unit size.

    .. math:: q(z \mid x, c) =
              \mathcal{N}\bigl(\mu(u, m, c), \mathrm{diag}\,\sigma^2(u, m, c)\bigr)

    Real columns are standardized, positive ones and counts by their logarithms, categories are one
    number each; u is 0 at a gap, and the network sees the mask m and the covariates c as well.

    Args:
        shape: The number of columns, ``[D]``.
        columns: ``data.columns``; by default D real ones of mean 0 and standard deviation 1.
        latent: The dimension of z.
        hidden: The widths of the encoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        context_columns: ``data.context_columns``, of what the programs take between x and the mask.

    Raises:
        ValueError: If there is not one column for each of D.

    References:
        Nazábal et al., Handling Incomplete Heterogeneous Data using VAEs (arXiv 1807.03653),
        section 3.2.
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
        if [len(columns)] != list(shape):
            raise ValueError(
                f"Expected a column for each number of data of shape {list(shape)}, got "
                f"{len(columns)}: give columns=data.columns."
            )
        self.units, self.context = Units(columns), Units(context_columns)
        width = len(columns) + self.units.width + self.context.width
        self.encoder = MLP(width, (2, latent), hidden, activation)

    def forward(self, x: Tensor, *context: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` ``[N, D]``.

        ``context`` are the covariates ``[N]``, and the mask ``[N, D]`` if it has no name.
        """
        c, seen = self.context.beside(x, *context, mask=mask)
        with pyro.plate("data", len(x)):
            inputs = torch.cat([seen.to(x), self.units(x, seen), c], -1)
            loc, log_scale = self.encoder(inputs).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
