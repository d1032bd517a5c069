"""A normal posterior with an affine mean and one covariance, exact for a linear decoder."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyrovae.nn import MLP

__all__ = ["LinearGaussian"]


class LinearGaussian(PyroModule):
    r"""A normal posterior whose mean is affine in the data and whose covariance is shared.

    .. math:: q(z \mid x) = \mathcal{N}(Vx + c, \; L L^\top)

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.

    References:
        Tipping and Bishop, Probabilistic principal component analysis (1999), JRSS B 61(3).
    """

    def __init__(self, shape: Sequence[int], latent: int = 2) -> None:
        super().__init__()
        self.encoder = MLP(shape, latent, hidden=())
        # Pyro gives a PyroParam back as a tensor that satisfies its constraint.
        self.scale_tril: Tensor = PyroParam(  # type: ignore[assignment]
            torch.eye(latent), constraint=constraints.softplus_lower_cholesky
        )

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` given ``x`` and ``mask`` ``[N, *shape]``."""
        with pyro.plate("data", len(x)):
            loc = self.encoder(x, mask)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.scale_tril))

    def match(self, model: PyroModule) -> "LinearGaussian":
        r"""Set V, c and L to the exact posterior of a model whose posterior is of this family.

        .. math:: c = \mu(0), \qquad V = \partial \mu / \partial x, \qquad
                  \mu(x) = \mathbb{E}[z \mid x]

        Args:
            model: A model with ``posterior(x)``, which returns a multivariate normal.

        Raises:
            ValueError: If the latents of the model and of the guide differ in dimension.
        """
        affine, shape = self.encoder.last, self.encoder.in_shape
        origin = affine.weight.new_zeros((1, *shape), dtype=torch.float64)
        exact = model.posterior(origin)
        if exact.event_shape != self.encoder.out_shape:
            raise ValueError(
                f"Expected a model with {self.encoder.out_shape[0]} latent dimensions, "
                f"got {exact.event_shape[0]}; give model and guide the same latent."
            )
        slope = torch.autograd.functional.jacobian(lambda x: model.posterior(x).mean[0], origin)
        with torch.no_grad():
            affine.weight.copy_(slope.flatten(1))
            affine.bias.copy_(exact.mean[0])
        self.scale_tril = exact.scale_tril[0].to(affine.weight.dtype)
        return self
