"""A guide refined for each datum, and what amortization had cost."""

from __future__ import annotations

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyrovae._tools.seeding import seeded, subseed
from pyrovae.evidence.density import Joint, Values, add_up
from pyrovae.evidence.proposals import FromGuide
from pyrovae.evidence.unconstrained import Line

__all__ = ["Refined"]

FIT_STREAM, GUIDE_STREAM = 3, 4
RATE, PAIRS, MOMENT_DRAWS = 0.1, 4, 256


class Refined(FromGuide):
    r"""Draws from a normal of independent coordinates, fitted to each datum's posterior.

    .. math:: q^*_x(u) = \mathcal{N}(u; m, \mathrm{diag}\,s^2), \qquad
              (m, s) = \arg\max\, E[\ln p(x, T(u)) + \ln |\partial T / \partial u|]
              + \textstyle\sum_d \ln s_d

    u are real coordinates of the latents, z = T(u). The fit starts from the guide's moments, takes
    steps of Adam in units of the guide's scale, at a rate that falls to zero, and uses antithetic
    draws.

    Args:
        joint: The pair.
        rows: A few data.
        steps: The number of steps.
        chunk: How many particles are scored at once.

    Raises:
        ValueError: If a latent is discrete.

    References:
        Cremer et al., Inference Suboptimality in Variational Autoencoders (arXiv 1801.03558);
        Kim et al., Semi-Amortized Variational Autoencoders (arXiv 1802.02550).
    """

    line = True

    def __init__(self, joint: Joint, rows: tuple, steps: int, chunk: int) -> None:
        super().__init__(joint)
        self.coordinates, self.steps, self.chunk = Line(joint, rows), steps, chunk
        self.loc: Tensor | None = None
        self.scale: Tensor | None = None

    def prepare(self, rows: tuple, seed: int) -> dict[str, Tensor]:
        """Fit, and estimate the ELBO of the guide as it was, ``guide_elbo`` ``[N]``."""
        with seeded(subseed(seed, 0, GUIDE_STREAM), rows[0].device):
            drawn, scores = self.joint.draw(rows, MOMENT_DRAWS)
        density, points = [], []
        for start in range(0, MOMENT_DRAWS, self.chunk):
            some = {name: value[start : start + self.chunk] for name, value in drawn.items()}
            count = min(self.chunk, MOMENT_DRAWS - start)
            density.append(sum(self.joint.split(self.joint.model(rows, count, some))))
            points.append(self.coordinates.place(rows, some))
        u = torch.cat(points)
        with seeded(subseed(seed, 0, FIT_STREAM), rows[0].device):
            self._set(*self._fit(rows, u.mean(0), u.std(0).clamp(min=1e-4)))
        return {"guide_elbo": (torch.cat(density) - add_up(scores.values())).mean(0)}

    def draw(self, rows: tuple, particles: int) -> tuple[Values, Tensor]:
        """K draws of u for each datum, and their log-densities."""
        noise = torch.randn(
            particles, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device
        )
        u = self.loc + self.scale * noise
        return self.coordinates.part(u), self._density(u)

    def score(self, rows: tuple, particles: int, values: Values) -> Tensor:
        """The log-densities of values of u drawn elsewhere."""
        return self._density(self.coordinates.join(values))

    def prior(self, rows: tuple, particles: int) -> Values:
        """K draws from the model's prior, in coordinates."""
        return self.joint.on_the_line(rows, particles, super().prior(rows, particles))

    def _density(self, u: Tensor) -> Tensor:
        return Normal(self.loc, self.scale).log_prob(u).double().sum(-1)

    def _set(self, loc: Tensor, scale: Tensor) -> None:
        """In place where a compiled graph may read them."""
        if self.loc is None or self.loc.shape != loc.shape:
            self.loc, self.scale = loc.clone(), scale.clone()
        self.loc.copy_(loc)
        self.scale.copy_(scale)

    def _fit(self, rows: tuple, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        shift = torch.zeros_like(loc, requires_grad=True)
        stretch = torch.zeros_like(loc, requires_grad=True)
        optimizer = Adam([shift, stretch], lr=RATE)
        schedule = CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            noise = torch.randn(PAIRS, *loc.shape, dtype=loc.dtype, device=loc.device)
            with torch.enable_grad():
                wide = stretch.exp() * torch.cat([noise, -noise])
                elbo = self._joint_density(rows, loc + scale * (shift + wide)).mean(0)
                loss = -(elbo.sum() + stretch.sum())
                shift.grad, stretch.grad = torch.autograd.grad(loss, (shift, stretch))
            optimizer.step()
            schedule.step()
        return loc + scale * shift.detach(), scale * stretch.detach().exp()

    def _joint_density(self, rows: tuple, u: Tensor) -> Tensor:
        scored = self.joint.model(rows, len(u), self.coordinates.part(u), line=True)
        return sum(self.joint.split(scored))
