"""Where the ELBO falls short of log p(x): the guide's family, or that it is amortized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pyrovae._tools import InputError, standard_error
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.result import LogLikelihood

__all__ = ["Gaps", "inference_gaps"]


@dataclass(frozen=True)
class Gaps:
    r"""The gap between log p(x) and the ELBO in two parts, ``[N]`` each, in nats.

    .. math:: \ln p(x) - \mathcal{L}(q) = \underbrace{\ln p(x) - \mathcal{L}(q^*_x)}
              _{\text{approximation}} + \underbrace{\mathcal{L}(q^*_x) - \mathcal{L}(q)}
              _{\text{amortization}}

    Attributes:
        amortization: The gain of a normal of independent coordinates fitted to each datum over
            the guide; negative where the guide is richer than such a normal.
        approximation: What such a normal still lacks; too small by as much as log p(x) is.
        log_prob: The estimate of log p(x) used.
    """

    amortization: Tensor
    approximation: Tensor
    log_prob: LogLikelihood

    @property
    def total(self) -> Tensor:
        """Both together: log p(x) − ELBO, ``[N]``."""
        return self.amortization + self.approximation

    @property
    def amortization_mean(self) -> float:
        """The mean over data, in nats."""
        return self.amortization.double().mean().item()

    @property
    def amortization_standard_error(self) -> float:
        """The standard error of that mean over data."""
        return standard_error(self.amortization.double()).item()

    @property
    def approximation_mean(self) -> float:
        """The mean over data, in nats."""
        return self.approximation.double().mean().item()

    @property
    def approximation_standard_error(self) -> float:
        """The standard error of that mean over data."""
        return standard_error(self.approximation.double()).item()

    @property
    def verdict(self) -> str:
        """In words: how large both gaps are, and how far log p(x) can be trusted."""
        return (
            f"The ELBO is {self.total.double().mean():.3g} nats below log p(x): "
            f"{self.amortization_mean:.3g} ± {self.amortization_standard_error:.2g} because the "
            f"guide is amortized, {self.approximation_mean:.3g} ± "
            f"{self.approximation_standard_error:.2g} because a normal of independent coordinates "
            f"is not the posterior. {self.log_prob.verdict}"
        )


def inference_gaps(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    refine_steps: int = 200,
    num_samples: int = 1000,
    log_prob: LogLikelihood | None = None,
    seed: int | None = None,
) -> Gaps:
    r"""How far the ELBO lies below log p(x), and why.

    .. math:: q^*_x = \arg\max_{q \in \mathcal{Q}} \mathcal{L}(q; x), \qquad
              \mathcal{Q} = \{\mathcal{N}(m, \mathrm{diag}\, s^2)\}

    Args:
        model: The model program.
        guide: The guide program, of continuous latents.
        x: Data ``[N, ...]``; ``context`` are further arguments of both programs, ``[N, ...]``.
        refine_steps: The number of optimizer steps for each datum, from the guide's moments.
        num_samples: The number of samples K of the refined normal, for its ELBO and for log p(x).
        log_prob: A better estimate of log p(x) of the same data, such as one of
            :func:`pyrovae.annealed_log_likelihood`; by default importance sampling from the
            refined normal.
        seed: Seeds the draws; None draws a seed from torch's global stream.

    Raises:
        ValueError: If a latent is discrete, ``refine_steps`` is not positive, or ``log_prob`` is
            of other data.

    References:
        Cremer et al., Inference Suboptimality in Variational Autoencoders (arXiv 1801.03558).
    """
    if not isinstance(refine_steps, int) or refine_steps < 1:
        raise InputError(f"Expected an integer refine_steps >= 1, got {refine_steps!r}.")
    refined = log_likelihood(
        model, guide, x, *context, num_samples=num_samples, refine_steps=refine_steps, seed=seed
    )
    best = refined if log_prob is None else log_prob
    if len(best.log_prob) != len(x) or (best.data and best.data != refined.data):
        raise InputError(
            f"Expected log p(x) of the same {len(x)} data, got one of {len(best.log_prob)}"
            f"{' that differ' if len(best.log_prob) == len(x) else ''}: estimate it on the x and "
            f"context given here, binarized once."
        )
    amortization, before = refined.amortization_gap, refined.guide_elbo
    if amortization is None or before is None:
        raise RuntimeError("An estimate with refine_steps lacks the ELBO of its guide.")
    bound = before + amortization
    return Gaps(amortization, best.log_prob.to(bound) - bound, best)
