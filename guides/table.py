"""A diagonal normal posterior for tables of mixed columns, with gaps and covariates."""

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


def _covariates(columns: Sequence[Column], context: Sequence[Tensor]) -> list[Tensor]:
    """Context ``[N]`` as numbers of about unit size, ``[N, 1]``; C categories are ``[N, C]``."""
    found = []
    for (_, _, categories, loc, scale), value in zip(columns, context, strict=True):
        codes = torch.arange(len(categories), device=value.device)
        number = (value[:, None] - loc) / scale
        found.append((value[:, None] == codes).to(number) if categories else number)
    return found


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
        if columns is None and len(shape) == 1:
            columns = [(f"{j}", "real", (), 0.0, 1.0) for j in range(shape[0])]
        if [len(columns or ())] != list(shape):
            raise ValueError(
                f"Expected a column for each number of data of shape {list(shape)}, got "
                f"{len(columns or ())}: give columns=data.columns."
            )
        self.columns, self.context = list(columns or ()), list(context_columns)
        width = sum(max(len(categories), 1) + 1 for _, _, categories, _, _ in self.columns)
        width += sum(max(len(categories), 1) for _, _, categories, _, _ in self.context)
        self.encoder = MLP(width, (2, latent), hidden, activation)

    def forward(self, x: Tensor, *context: Tensor) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` ``[N, D]``.

        ``context`` are the covariates ``[N]``, and after them the mask ``[N, D]`` if there is one.
        """
        masked = bool(context) and context[-1].shape == x.shape
        given = context[:-1] if masked else context
        if len(given) != len(self.context):
            raise ValueError(
                f"Expected context {[name for name, *_ in self.context]} and perhaps a mask of x, "
                f"got {len(given)} columns: give context_columns=data.context_columns."
            )
        seen = context[-1] if masked else torch.ones_like(x, dtype=torch.bool)
        with pyro.plate("data", len(x)):
            c = _covariates(self.context, given)
            loc, log_scale = self.encoder(torch.cat([self.units(x, seen), *c], -1)).unbind(-2)
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
