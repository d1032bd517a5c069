r"""What torch and Pyro lack: distributions on a grid of grey levels, and some KL divergences.

Eight-bit images are whole numbers k = 0, …, 255, handed over as x = k / 255. A distribution on
that grid gives probability masses, so that its log-likelihood is in nats of a discrete datum, and
:math:`-\ln p(x) / (D \ln 2)` is in bits per dimension.

Importing this module registers, with :func:`torch.distributions.kl_divergence`, the pairs of a
diagonal normal, ``Normal(…).to_event(1)``, with a multivariate normal of full or low rank, so
that :class:`~pyro.infer.TraceMeanField_ELBO` stays analytic for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    constraints,
    kl_divergence,
)
from torch.distributions.kl import register_kl
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid, pad

from pyrovae._tools import InputError
from pyrovae._tools.whole import longest, whole

__all__ = [
    "DiscretizedLogistic",
    "Grid",
    "GridCategorical",
    "MarkovNormal",
    "divergence",
    "kl_standard_normal",
]


class Grid(constraints.Constraint):
    r"""The numbers :math:`k / (L - 1)` for :math:`k = 0, \dots, L - 1`.

    Args:
        levels: The number of levels L: 256 for 8-bit images, 17 for the digits.

    Raises:
        ValueError: If there are fewer than two levels.
    """

    is_discrete = True

    def __init__(self, levels: int) -> None:
        if levels < 2:
            raise InputError(f"Expected levels >= 2, got {levels}.")
        self.levels = levels
        super().__init__()

    def __repr__(self) -> str:
        return f"Grid(levels={self.levels})"

    def check(self, value: Tensor) -> Tensor:
        """Which values lie on the grid, to a thousandth of a step."""
        k = value * (self.levels - 1)
        return (k - self.index(value)).abs() < 1e-3

    def index(self, value: Tensor) -> Tensor:
        """The k of the nearest level."""
        return (value * (self.levels - 1)).round().clamp(0, self.levels - 1)

    def values(self, like: Tensor) -> Tensor:
        """Every level ``[L]``, in the dtype and on the device of ``like``."""
        steps = torch.arange(self.levels, dtype=like.dtype, device=like.device)
        return steps / (self.levels - 1)


class _OnGrid(TorchDistribution):
    """A distribution over a grid, with the parameters that ``arg_constraints`` names."""

    grid: Grid

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Grid:
        """The grid."""
        return self.grid

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same distribution with a larger batch."""
        new = self._get_checked_instance(type(self), _instance)
        for name in self.arg_constraints:
            value = getattr(self, name)
            setattr(new, name, value.expand(*batch_shape, *value.shape[len(self.batch_shape) :]))
        new.grid = self.grid
        super(_OnGrid, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new


class GridCategorical(_OnGrid):
    r"""A categorical distribution over the levels of a grid.

    .. math:: p\bigl(x = \tfrac{k}{L - 1}\bigr) = \mathrm{softmax}(\mathrm{logits})_k

    Args:
        logits: Unnormalized log-probabilities ``[..., L]``.

    Example:
        >>> GridCategorical(torch.zeros(3, 256)).log_prob(torch.tensor([0.0, 51 / 255, 1.0])).exp()
        tensor([0.0039, 0.0039, 0.0039])
    """

    arg_constraints: ClassVar = {"logits": constraints.real_vector}

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits = logits.log_softmax(-1)
        self.grid = Grid(logits.shape[-1])
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-mass of each value, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        index = self.grid.index(value).long().unsqueeze(-1)
        shape = torch.broadcast_shapes(index.shape[:-1], self.batch_shape)
        logits = self.logits.expand(*shape, -1)
        return logits.gather(-1, index.expand(*shape, 1)).squeeze(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``[*sample_shape, *batch_shape]``."""
        with torch.no_grad():
            draws = math.prod(sample_shape)
            index = self.logits.exp().reshape(-1, self.grid.levels).multinomial(draws, True)
            index = index.mT.reshape(self._extended_shape(sample_shape))
            return self.grid.values(self.logits)[index]

    @property
    def mean(self) -> Tensor:
        """E[x]."""
        return self.logits.exp() @ self.grid.values(self.logits)

    @property
    def variance(self) -> Tensor:
        """Var[x]."""
        values = self.grid.values(self.logits)
        return (self.logits.exp() * (values - self.mean.unsqueeze(-1)).square()).sum(-1)


class DiscretizedLogistic(_OnGrid):
    r"""A logistic variable rounded to a grid, with both tails in the outermost levels.

    .. math:: p\bigl(x = \tfrac{k}{L - 1}\bigr) = F(x + h) - F(x - h), \qquad
              F(t) = \mathrm{sigmoid}\bigl(\tfrac{t - \mu}{s}\bigr), \quad h = \tfrac{1}{2(L - 1)}

    with :math:`F(0 - h)` taken as 0 and :math:`F(1 + h)` as 1. The difference is the product
    :math:`F(x + h) \, (1 - F(x - h)) \, (1 - e^{-2h/s})`, whose logarithm is exact however far x
    is from μ.

    Args:
        loc: The location μ, in the units of x.
        scale: The scale s, in the units of x.
        levels: The number of levels L.

    References:
        Salimans et al., PixelCNN++ (arXiv 1701.05517), section 2.1.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int = 256, *, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.grid = Grid(levels)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-mass of each value, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        index, top = self.grid.index(value), self.grid.levels - 1
        below = logsigmoid((value + 0.5 / top - self.loc) / self.scale)
        above = logsigmoid(-(value - 0.5 / top - self.loc) / self.scale)
        width = torch.log(-torch.expm1(-1 / (top * self.scale)))
        inside = (index > 0) & (index < top)
        return (
            below.where(index < top, 0.0) + above.where(index > 0, 0.0) + width.where(inside, 0.0)
        )

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``[*sample_shape, *batch_shape]``."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            x = self.loc + self.scale * u.logit(torch.finfo(u.dtype).tiny)
            return self.grid.index(x) / (self.grid.levels - 1)

    @property
    def mean(self) -> Tensor:
        r""":math:`E[x] = \frac{1}{L - 1} \sum_{k > 0} P(x \ge \frac{k}{L - 1})`."""
        return self._moment(1)

    @property
    def variance(self) -> Tensor:
        """Var[x]."""
        return (self._moment(2) - self._moment(1).square()).clamp(min=0)

    def _moment(self, power: int) -> Tensor:
        top, total = self.grid.levels - 1, torch.zeros_like(self.loc)
        for k in range(1, top + 1):
            weight = (k**power - (k - 1) ** power) / top**power
            total += weight * torch.sigmoid((self.loc - (k - 0.5) / top) / self.scale)
        return total


class MarkovNormal(TorchDistribution):
    r"""The steps of a Markov chain, each a diagonal normal given the one before.

    .. math:: p(z_{1:T}) = \prod_t \mathcal{N}\bigl(z_t; \mu_t, \mathrm{diag}\,\sigma_t^2\bigr),
              \qquad (\mu_t, \sigma_t) = f(z_{t-1}, h_t)

    A step is an element of the batch ``[..., T]``: its log-density is that of z_t given z_{t-1},
    so that ``MarkovNormal(...).mask(steps).to_event(1)`` is the chain of those steps that count.
    Values are scored for all steps at once, and drawn one step after the other, in one piece.

    Args:
        network: A module from z_{t-1} ``[..., L]``, and h_t ``[..., H]`` if there is one, to
            ``(μ, σ)``.
        start: z_0 ``[L]``.
        batch_shape: ``[..., T]``.
        given: h ``[..., T, H]``.
        lengths: How many steps of each chain count ``[...]``: on a CPU no more are drawn than the
            longest has, and all behind are 0.

    References:
        Krishnan, Shalit and Sontag, Structured Inference Networks for Nonlinear State Space Models
        (arXiv 1609.09869), equations 1 and 2.

    Example:
        >>> class Walk(torch.nn.Module):
        ...     def forward(self, z):
        ...         return z, torch.ones_like(z)
        >>> walk = MarkovNormal(Walk(), torch.zeros(2), (3, 5)).to_event(1)
        >>> walk.log_prob(torch.zeros(3, 5, 2))
        tensor([-9.1894, -9.1894, -9.1894])
    """

    arg_constraints: ClassVar = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        network: nn.Module,
        start: Tensor,
        batch_shape: Sequence[int],
        given: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.network, self.start = network, start
        self.given = () if given is None else (given,)
        self.lengths = start.new_tensor(math.inf) if lengths is None else lengths.to(start.dtype)
        super().__init__(torch.Size(batch_shape), start.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same chains, more of them."""
        new = self._get_checked_instance(type(self), _instance)
        new.network, new.start = self.network, self.start
        new.given, new.lengths = self.given, self.lengths
        super(MarkovNormal, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density ``[..., T]`` of each step of z ``[..., T, L]`` given the one before."""
        if self._validate_args:
            self._validate_sample(value)
        first = self.start.expand(*value.shape[:-2], 1, -1)
        loc, scale = self.network(torch.cat([first, value[..., :-1, :]], -2), *self.given)
        return Normal(loc, scale, validate_args=False).log_prob(value).sum(-1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``[*sample_shape, ..., T, L]``."""
        noise = torch.randn(
            self._extended_shape(torch.Size(sample_shape)),
            dtype=self.start.dtype,
            device=self.start.device,
        )
        return whole(_unrolled, self.network, noise, self.start, self.lengths, *self.given)


def _unrolled(
    network: nn.Module, noise: Tensor, start: Tensor, lengths: Tensor, *given: Tensor
) -> Tensor:
    """The values of a chain, one step after the other."""
    previous, steps = start.expand(*noise.shape[:-2], -1), []
    count = longest(lengths, noise.shape[-2])
    parts = (part[..., :count, :].unbind(-2) for part in (noise, *given))
    # Taken apart once: the gradient of a slice is as long as the whole.
    for each, *h in zip(*parts, strict=True):
        loc, scale = network(previous, *h)
        previous = loc + scale * each
        steps.append(previous)
    return pad(torch.stack(steps, -2), (0, 0, 0, noise.shape[-2] - count))


def divergence(q: Any, p: Any) -> Tensor:
    """KL(q ‖ p) in closed form, NotImplementedError where torch knows none."""
    # A plate of particles widens the guide's distribution alone, and torch (2.15) marks where a
    # divergence is infinite (Bernoulli, Uniform, Pareto, …) by a mask of p's own shape.
    batch = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    return kl_divergence(*(fn if fn.batch_shape == batch else fn.expand(batch) for fn in (q, p)))


def kl_standard_normal(loc: Tensor, scale: Tensor) -> Tensor:
    r"""The divergence of a diagonal normal from N(0, I), in nats, summed over the last dimension.

    .. math:: \mathrm{KL} = \tfrac12 \sum_d (\mu_d^2 + \sigma_d^2 - 1 - \ln \sigma_d^2)

    Args:
        loc: The mean μ, ``[..., D]``.
        scale: The standard deviation σ, which broadcasts against it.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes (arXiv 1312.6114), appendix B.
    """
    return 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)


@register_kl(MultivariateNormal, Independent)
@register_kl(LowRankMultivariateNormal, Independent)
@register_kl(Independent, LowRankMultivariateNormal)
def _kl_gaussian(p: Any, q: Any) -> Tensor:
    r"""The divergence where one covariance is diagonal, so that only diagonals meet.

    .. math:: \mathrm{KL}(p \| q) = \underbrace{\tfrac12 \mathrm{tr}(\Sigma_q^{-1} \Sigma_p)
              - \ln q(\mu_p)}_{H(p, q)} - H(p)
    """
    diagonal = p if isinstance(p, Independent) else q
    if not isinstance(diagonal.base_dist, Normal) or diagonal.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    if p.event_shape != q.event_shape:
        raise InputError(
            f"Expected Gaussians of one event shape, got {list(p.event_shape)} and "
            f"{list(q.event_shape)}."
        )
    if diagonal is q:
        precision = q.variance.reciprocal()
    else:
        precision = q.precision_matrix.diagonal(dim1=-2, dim2=-1)
    return 0.5 * (p.variance * precision).sum(-1) - q.log_prob(p.mean) - p.entropy()
