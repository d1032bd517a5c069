r"""Wake-sleep and reweighted wake-sleep: no gradient passes through a latent."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.objectives.elbo import total
from pyrovae.objectives.log_weights import Scores, Still, check_cells, check_density, weigh
from pyrovae.pairs.contract import refuse_factors
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Site, drawn, samples, scored


class WakeSleep(Objective):
    r"""The model learns awake; the guide learns awake, from weighted samples, or asleep.

    .. math:: \Delta\theta \propto \sum_k \tilde w_k \nabla_\theta \ln p_\theta(x, z_k), \qquad
              \Delta\phi \propto a \sum_k \tilde w_k \nabla_\phi \ln q_\phi(z_k | x)
              + (1 - a) \nabla_\phi \ln q_\phi(\bar z | \bar x)

    with :math:`z_k \sim q(z | x)`, :math:`\tilde w_k \propto p(x, z_k) / q(z_k | x)`, and a dream
    :math:`\bar x, \bar z \sim p` for each datum. The reported loss is minus the importance-weighted
    bound of the K samples.

    A dream takes the place of every argument that a site of the model observes as it is; the other
    arguments stay.

    Args:
        particles: K; at least 2 where the guide learns awake.
        insomnia: The share a of the guide's learning that is done awake: 0 is wake-sleep, 1 is
            reweighted wake-sleep.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Hinton et al., The Wake-Sleep Algorithm for Unsupervised Neural Networks (1995), Science
        268; Bornschein and Bengio, Reweighted Wake-Sleep (arXiv 1406.2751); Le et al., Revisiting
        Reweighted Wake-Sleep (1805.10469).
    """

    def __init__(self, particles: int = 10, insomnia: float = 1.0) -> None:
        super().__init__(particles)
        if not 0 <= insomnia <= 1:
            raise InputError(f"Expected insomnia from 0 (asleep) to 1 (awake), got {insomnia}.")
        if insomnia > 0 and particles < 2:
            raise InputError(
                "Expected particles >= 2 for a guide that learns awake: the weight of a single "
                "sample is 1, and says nothing. Use more, or insomnia=0."
            )
        self.insomnia = insomnia

    def examine(self, pair: Pair, args: tuple) -> dict[int, str]:
        """Check the scales and the guide's density, and find the sites to dream of."""
        traces = pair.trace(*args)
        check_cells(traces, pair.known)
        check_density(pair, args)
        if self.insomnia == 1:
            return {}
        auxiliary = sorted(set(drawn(traces[1])) - set(pair.known.latents))
        if auxiliary:
            raise InputError(
                f"A dream has no value for {auxiliary}, which the guide alone samples: use "
                f"reweighted_wake_sleep with insomnia=1."
            )
        refuse_factors(pair, args)
        return _heard({n: s["value"] for n, s in scored(traces[0]) if s["is_observed"]}, args)

    def bounds(self, pair: Pair, *args: Any) -> Tensor:
        """The importance-weighted bound of each datum before any scale, ``[N]``, in nats."""
        found, _ = self._awake(pair, args)
        return found.where.by_datum(self._bound(found.log_weights))

    def estimate(self, pair: Pair, *args: Any) -> Estimate:
        """The loss of a batch and its surrogate, with nothing read back from the device."""
        found, latents = self._awake(pair, args)
        log_weights = found.log_weights.detach()
        learnt = sum(found.guide[name] for name in latents)
        rest = found.log_p - sum(q for name, q in found.guide.items() if name not in latents)
        gain = log_weights.softmax(0) * (rest + self.insomnia * learnt)
        surrogate = found.where.loss(gain.sum(0))
        if self.insomnia < 1:
            asleep = _asleep(pair, args, heard=self.known(pair, args))
            surrogate = surrogate - (1 - self.insomnia) * asleep
        return Estimate(found.where.loss(self._bound(log_weights)), surrogate, found.terms)

    def _bound(self, log_weights: Tensor) -> Tensor:
        return log_weights.logsumexp(0) - math.log(self.particles)

    def _awake(self, pair: Pair, args: tuple) -> tuple[Scores, dict[str, Site]]:
        self.known(pair, args)
        with Still():
            guide_trace = pair.trace_guide(*args, particles=self.draws)
        return weigh(pair, guide_trace, args, self.draws), drawn(guide_trace)


def _asleep(pair: Pair, args: tuple, heard: dict[int, str]) -> Tensor:
    """ln q of the latents of one dream a datum, scaled and summed over the batch."""
    with torch.no_grad():
        dream = pair.trace_given(poutine.uncondition(pair.run_model), args)
    sites = samples(dream)
    dreamt = tuple(
        sites[heard[i]]["value"].reshape(arg.shape).to(arg.dtype) if i in heard else arg
        for i, arg in enumerate(args)
    )
    with Still():
        guide_trace = pair.trace_given(poutine.replay(pair.run_guide, trace=dream), dreamt)
    guide_trace.compute_log_prob()
    return total(site["log_prob_sum"] for site in drawn(guide_trace).values())


def _heard(observed: dict[str, Tensor], args: tuple) -> dict[int, str]:
    """The site that observes each argument as it is, by the argument's place."""
    found = {
        index: name
        for index, argument in enumerate(args)
        for name, value in observed.items()
        if _is_same(value, argument)
    }
    if 0 not in found:
        raise InputError(
            f"No site of the model observes x as it is (there are {sorted(observed)}), so that "
            f"the guide cannot be run on a dream: observe x itself, or use reweighted_wake_sleep "
            f"with insomnia=1."
        )
    unheard = sorted(observed.keys() - set(found.values()))
    if unheard and len(found) < len(args):
        raise InputError(
            f"Sites {unheard} observe none of the arguments as it is, so that a dream of them "
            f"cannot be given to the guide: observe the arguments themselves, or use "
            f"reweighted_wake_sleep with insomnia=1."
        )
    return found


def _is_same(value: Tensor, argument: Any) -> bool:
    if not isinstance(argument, Tensor) or value.numel() != argument.numel():
        return False
    return torch.equal(value.reshape(argument.shape).to(argument.dtype), argument)
