"""Where importance samples come from: the guide, or a mixture of it with the prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae.evidence.density import Joint, Values, add_up

__all__ = ["Defensive", "FromGuide", "require_density", "require_scorable", "uncovered_share"]

PRIOR_ROWS = 256


class FromGuide:
    """Draws from the guide.

    Args:
        joint: The pair.

    ``line`` says whether values are points on the real line (see
    :class:`pyrovae.evidence.density.Place`).
    """

    line = False

    def __init__(self, joint: Joint) -> None:
        self.joint = joint

    def prepare(self, rows: tuple, seed: int) -> dict[str, Tensor]:
        """Get ready for other data; what there is to report of them, ``[N]`` by name."""
        return {}

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """K draws for each datum, and their log-densities ``[K, N]`` in float64."""
        values, scores = self.joint.draw(rows, particles)
        zero = rows[0].new_zeros(particles, len(rows[0]), dtype=torch.float64)
        return values, zero + add_up(scores.values())

    def score(self, rows: tuple, particles: int, values: Values) -> Tensor:
        """The log-densities of values drawn elsewhere."""
        return add_up(self.joint.guide(rows, particles, values).values())

    def prior(self, rows: tuple, particles: int) -> Values:
        """K draws from the model's prior for each datum."""
        return self.joint.draw_prior(rows, particles)

    def density(self, own: Tensor, prior: Tensor) -> Tensor:
        """The log-density to weigh with, given the proposal's own and the prior's."""
        return own


class Defensive:
    r"""Draws from a proposal, and for a share α of the particles from the prior.

    .. math:: m(z) = (1 - \alpha)\, q(z \mid x) + \alpha\, p(z), \qquad
              \frac{p(x, z)}{m(z)} \le \frac{p(x \mid z)}{\alpha}

    Whole traces are mixed, so that any structure of latents will do. The number of draws from
    each of the two is fixed, and their order random: α is that number's share.

    Args:
        base: The proposal.
        share: The share α of the prior, between 0 and 1.

    References:
        Hesterberg (1995), Weighted average importance sampling and defensive mixture
        distributions; Owen and Zhou (2000), Safe and effective importance sampling.
    """

    def __init__(self, base: FromGuide, share: float) -> None:
        self.base, self.asked, self.line = base, share, base.line
        self.share = share

    def prepare(self, rows: tuple, seed: int) -> dict[str, Tensor]:
        """As the base."""
        return self.base.prepare(rows, seed)

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """K draws for each datum, and their log-densities under the base."""
        count = min(max(round(self.asked * particles), 1), particles - 1)
        self.share = count / particles
        drawn, density = self.base.draw(rows, particles - count)
        prior = self.base.prior(rows, count)
        order = torch.randperm(particles, device=density.device)
        values = {name: torch.cat([drawn[name], prior[name]])[order] for name in drawn}
        return values, torch.cat([density, self.base.score(rows, count, prior)])[order]

    def density(self, own: Tensor, prior: Tensor) -> Tensor:
        """The log-density of the mixture."""
        return torch.logaddexp(own + math.log1p(-self.share), prior + math.log(self.share))


def require_density(joint: Joint, rows: tuple) -> None:
    """Make sure that the guide's scores are a density of its latents.

    Raises:
        ValueError: If the guide has auxiliary latents of its own, or point masses.
    """
    auxiliary, points = joint.odd_sites(rows)
    if auxiliary and not points:
        raise InputError(
            f"The guide's auxiliary sites {auxiliary} are no latents of the model, so that p(x, z) "
            f"over the guide's density does not average to p(x): sample them in the model too, "
            f"from a distribution of your choice."
        )
    if points and not auxiliary:
        raise InputError(
            f"The guide puts all its mass on one point at {points} (a Delta), so there are no "
            f"importance weights: give it a distribution with a density."
        )


def require_scorable(joint: Joint, rows: tuple, mend: str) -> Tensor:
    """Make sure that the guide can score latents that it did not draw.

    Args:
        joint: The pair.
        rows: A few data.
        mend: What to do where it cannot.

    Returns:
        The guide's log-densities of a few draws from the prior, ``[k, N]``.

    Raises:
        ValueError: If the guide's latents are transformed from auxiliary ones, or have no inverse.
    """
    auxiliary, points = joint.odd_sites(rows)
    if auxiliary or points:
        raise InputError(
            f"The guide cannot score latents that it did not draw, because of its sites "
            f"{sorted({*auxiliary, *points})}: {mend}."
        )
    particles = max(1, PRIOR_ROWS // len(rows[0]))
    values = joint.draw_prior(rows, particles)
    try:
        return add_up(joint.guide(rows, particles, values).values())
    except (NotImplementedError, KeyError) as error:
        raise InputError(
            f"The guide cannot score latents that it did not draw ({error}): {mend}."
        ) from error


def uncovered_share(joint: Joint, rows: tuple) -> float:
    """The share of a few draws from the prior to which the guide gives no density.

    NaN where the guide can score nothing but its own draws.
    """
    try:
        found = require_scorable(joint, rows, "")
    except ValueError:
        return math.nan
    return torch.as_tensor(found == -math.inf).double().mean().item()
