"""A normalizing flow as the prior, and independent Bernoulli pixels."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineCoupling, Permute
from pyro.nn import DenseNN, PyroModule
from torch import Tensor, nn

from pyrovae.nn import MLP

__all__ = ["FlowPrior"]


class FlowPrior(PyroModule):
    r"""A VAE for binary data whose prior is a RealNVP, learned with it.

    .. math:: z = (T_J \circ \dots \circ T_1)(\epsilon), \quad \epsilon \sim \mathcal{N}(0, I),
              \qquad x_d \mid z \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_d(z)))

    Each T scales and shifts one half of its input as the other half says, and turns their order
    round, so that both directions take one pass.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z, two at least.
        hidden: The widths of the decoder's hidden layers.
        activation: The name of a :mod:`torch.nn` activation.
        steps: The number J of couplings.
        width: The width of the two hidden layers of each coupling.
        mean: The mean of the data, where the pixels start; on the command line ``model.mean=data``.

    Raises:
        ValueError: If z has fewer than two dimensions.

    References:
        Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP (arXiv 1605.08803);
        Chen et al., Variational Lossy Autoencoder (arXiv 1611.02731), section 3.2.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        steps: int = 4,
        width: int = 64,
        mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        if latent < 2:
            raise ValueError(f"Expected latent >= 2, for a flow to couple halves, got {latent}.")
        self.decoder = MLP(latent, shape, hidden, activation)
        if mean is not None:
            self.decoder.last.bias.data = mean.flatten().logit(eps=1e-3)
        self.keep, rest = latent // 2, latent - latent // 2
        self.couplings = nn.ModuleList(
            DenseNN(self.keep, [width, width], [rest, rest]) for _ in range(steps)
        )
        self.register_buffer("zero", torch.zeros(latent), persistent=False)
        self.register_buffer("turned", torch.arange(latent).flip(0), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``z`` ``[N, latent]`` and observe ``x`` ``[N, *shape]`` where ``mask`` is true."""
        couplings = [AffineCoupling(self.keep, net) for net in self.couplings]
        flow = [step for coupling in couplings for step in (coupling, Permute(self.turned))]
        prior = dist.TransformedDistribution(dist.Normal(self.zero, 1.0).to_event(1), flow)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(mask).to_event(x.dim() - 1), obs=x)
