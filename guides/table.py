"""A diagonal normal posterior for tables of mixed columns, with gaps."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.nn import MLP

__all__ = ["Table"]

# One column: its name, its kind, its categories, and mean and standard deviation of what it holds.
Column = tuple[str, str, Sequence[str], float, float]


class Table(PyroModule):
    r"""The diagonal normal guide of tables, whose network sees numbers of about unit size.

    .. math:: q(z \mid x) = \mathcal{N}\bigl(\mu(u, m), \mathrm{diag}\,\sigma^2(u, m)\bigr)

    Real columns are standardized, positive ones and counts by their logarithms, categories are one
    number each; u is 0 at a gap, and the network sees the mask m as well.

    Args:
        shape: The number of columns, ``[D]``.
        columns: ``data.columns``; by default D real ones of mean 0 and standard deviation 1.
        latent: The dimension of z.
        hidden: The widths of the encoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.

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
    ) -> None:
        super().__init__()
        if columns is None and len(shape) == 1:
            columns = [(f"{j}", "real", (), 0.0, 1.0) for j in range(shape[0])]
        if [len(columns or ())] != list(shape):
            raise ValueError(
                f"Expected a column for each number of data of shape {list(shape)}, got "
                f"{len(columns or ())}: give columns=data.columns."
            )
        self.columns = list(columns or ())
        width = sum(max(len(categories), 1) + 1 for _, _, categories, _, _ in self.columns)
        self.encoder = MLP(width, (2, latent), hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, D]``."""
        seen = torch.ones_like(x, dtype=torch.bool) & mask
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(self.units(x, seen)).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def units(self, x: Tensor, seen: Tensor) -> Tensor:
        """Columns ``[..., D]`` as numbers of about unit size, 0 where they are not seen."""
        parts = [seen.to(x)]
        change = {"positive": torch.log, "count": torch.log1p}
        # 1 is possible in every column, and no logarithm of it is infinite.
        x = x.masked_fill(~seen, 1.0)
        for j, (_, kind, categories, loc, scale) in enumerate(self.columns):
            value = x[..., j, None]
            if categories:
                value = (value == torch.arange(len(categories), device=x.device)).to(x)
            else:
                value = (change.get(kind, torch.clone)(value) - loc) / scale
            parts.append(value * seen[..., j, None])
        return torch.cat(parts, -1)
