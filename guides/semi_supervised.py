"""A classifier q(y|x) for the hidden labels, and a code given data and label."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.nn import MLP

__all__ = ["SemiSupervised"]


class SemiSupervised(PyroModule):
    r"""The guide of M2, which infers the label where there is none.

    .. math:: q(y, z \mid x) = \mathrm{Cat}\bigl(y; \pi(x)\bigr) \,
              \mathcal{N}\bigl(z; \mu(x, y), \mathrm{diag}\,\sigma^2(x, y)\bigr)

    :class:`pyro.infer.TraceEnum_ELBO` sums over hidden labels exactly; every other objective
    samples them.

    Args:
        shape: The event shape of the data, ``[D]`` or ``[C, H, W]``.
        latent: The dimension of z.
        classes: The number of labels.
        hidden: The widths of the hidden layers of both networks; at least one.
        activation: The name of a :mod:`torch.nn` activation.
        alpha: The weight of ln q(y|x) of each known label, which is added to the bound in
            training. At 0 what is trained is the bound; otherwise the training loss holds a
            classifier's loss too, while all that is scored in eval mode (validation, the ELBO,
            log p(x)) stays the bound. The paper's weight is 0.1 N over the number of labels.

    Raises:
        ValueError: If ``alpha`` is negative.

    References:
        Kingma et al., Semi-supervised Learning with Deep Generative Models (arXiv 1406.5298),
        equations 6 to 9.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 20,
        classes: int = 10,
        hidden: Sequence[int] = (400,),
        activation: str = "ReLU",
        alpha: float = 0.0,
    ) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"Expected alpha >= 0, got {alpha}.")
        width, *rest = hidden
        self.alpha = alpha
        self.classifier = MLP(shape, classes, hidden, activation)
        self.encoder, self.label = MLP(shape, width, ()), nn.Embedding(classes, width)
        self.posterior = nn.Sequential(
            getattr(nn, activation)(), MLP(width, (2, latent), rest, activation)
        )

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | bool = True) -> None:
        """Sample ``y`` ``[N]`` where it is −1, and ``z`` ``[N, latent]``, given ``x``, ``mask``."""
        # Pyro's types ask for a torch.BoolTensor, which no comparison is said to return.
        hidden = y < 0
        with pyro.plate("data", len(x)):
            logits = self.classifier(x, mask)
            q = dist.Categorical(logits=torch.where(hidden[:, None], logits, logits.detach()))
            with pyro.poutine.mask(mask=hidden):  # type: ignore[call-overload]
                drawn = pyro.sample("y", q, infer={"enumerate": "parallel"})
            if self.training and self.alpha:
                with pyro.poutine.mask(mask=~hidden):  # type: ignore[call-overload]
                    known = dist.Categorical(logits=logits).log_prob(y.clamp(min=0))
                    pyro.factor("classifier", -self.alpha * known, has_rsample=True)
            h = self.encoder(x, mask) + self.label(torch.where(hidden, drawn, y))
            loc, log_scale = self.posterior(h).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
