"""A linear decoder: the one VAE whose likelihood and posterior are known exactly."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyrovae.nn import MLP

__all__ = ["LinearGaussian"]


class LinearGaussian(PyroModule):
    r"""Probabilistic principal component analysis.

    .. math:: z \sim \mathcal{N}(0, I), \qquad x \mid z \sim \mathcal{N}(Wz + b, \sigma^2 I)

    Its likelihood, posterior and best fit are exact: computed in float64, and given in the wider
    of the dtypes of x and of the module.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``, flattened to D.
        latent: The dimension of z.
        scale: The initial observation scale σ, in units of x.

    Raises:
        ValueError: If ``scale`` is not positive.

    References:
        Tipping and Bishop, Probabilistic principal component analysis (1999), JRSS B 61(3).
    """

    def __init__(self, shape: Sequence[int], latent: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"Expected scale > 0, got {scale!r}.")
        self.decoder = MLP(latent, shape, hidden=())
        # Pyro gives a PyroParam back as a tensor that satisfies its constraint.
        self.scale: Tensor = PyroParam(  # type: ignore[assignment]
            torch.tensor(float(scale)), constraint=constraints.positive
        )
        self.register_buffer("zero", torch.zeros(latent), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        event = x.dim() - 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            likelihood = dist.Normal(self.decoder(z), self.scale)
            pyro.sample("x", likelihood.mask(mask).to_event(event), obs=x)

    def log_prob(self, x: Tensor) -> Tensor:
        r"""The exact log-likelihood ``[N]`` of ``x`` ``[N, *shape]``, in nats.

        .. math:: \ln p(x) = \ln \mathcal{N}(x; b, W W^\top + \sigma^2 I)
                  = \ln p(x \mid z) + \ln p(z) - \ln p(z \mid x) \quad \text{for every } z

        (section 3.1). It is read off at the posterior mean, where no large terms cancel.
        """
        weight, bias, scale = self._exact()
        posterior = self.posterior(x.double())
        z = posterior.mean
        likelihood = dist.Normal(z @ weight.mT + bias, scale).to_event(1).log_prob(self._flat(x))
        prior = dist.Normal(torch.zeros_like(z), 1.0).to_event(1).log_prob(z)
        return (likelihood + prior - posterior.log_prob(z)).to(self._dtype(x))

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        r"""The exact posterior of ``z`` given ``x`` ``[N, *shape]``, of batch shape ``[N]``.

        .. math:: p(z \mid x) = \mathcal{N}\bigl(M^{-1} W^\top (x - b), \; \sigma^2 M^{-1}\bigr),
                  \qquad M = W^\top W + \sigma^2 I
        """
        weight, bias, scale = self._exact()
        m = weight.mT @ weight + scale.square() * torch.eye(len(self.zero)).to(weight)
        tril = torch.linalg.cholesky(m)
        loc = torch.cholesky_solve(weight.mT @ (self._flat(x) - bias).mT, tril).mT
        cov_tril = torch.linalg.cholesky(scale.square() * torch.cholesky_inverse(tril))
        dtype = self._dtype(x)
        return dist.MultivariateNormal(loc.to(dtype), scale_tril=cov_tril.to(dtype))

    @torch.no_grad()
    def fit_exact(self, x: Tensor) -> "LinearGaussian":
        r"""Set W, b and σ to their maximum-likelihood values for ``x`` ``[N, *shape]``.

        .. math:: b = \bar{x}, \qquad \sigma^2 = \frac{1}{D - L} \sum_{j > L} \lambda_j, \qquad
                  W = U_L (\Lambda_L - \sigma^2 I)^{1/2}

        with λ, in falling order, and U the eigenvalues and eigenvectors of the covariance of
        the data, and L the dimension of z (section 3.2).

        Raises:
            ValueError: If no variance is left for the noise, so that there is no maximum.
        """
        affine, x = self.decoder.last, self._flat(x)
        bias, rest = x.mean(0), max(x.shape[-1] - len(self.zero), 0)
        values, vectors = torch.linalg.eigh((x - bias).mT @ (x - bias) / len(x))
        variance = values[:rest].mean()
        if not variance > len(values) * torch.finfo(x.dtype).eps * values[-1]:
            raise ValueError(
                f"Expected data that vary in more than latent={len(self.zero)} directions, got "
                f"{list(x.shape)} with none to spare; choose a smaller latent or add data."
            )
        affine.weight.copy_(vectors[:, rest:] * (values[rest:] - variance).clamp(min=0).sqrt())
        affine.bias.copy_(bias)
        self.scale = variance.sqrt().to(self.zero.dtype)
        return self

    def _exact(self) -> tuple[Tensor, Tensor, Tensor]:
        affine = self.decoder.last
        return affine.weight.double(), affine.bias.double(), self.scale.double()

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.decoder.out_shape or not len(x):
            shape = ", ".join(map(str, self.decoder.out_shape))
            raise ValueError(f"Expected data [N, {shape}] with N > 0, got {list(x.shape)}.")
        return x.flatten(1).double()

    def _dtype(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, self.zero.dtype)
