"""log p(x) by importance sampling, written by hand in PyTorch and in NumPyro."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from speed_hand import KEEP_RANDOM, VAE
from speed_numpyro import programs
from speed_problem import Problem
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["RIVALS"]

CHUNK = 32
"""Samples of each of 64 images at a time: what a decoder makes of them stays in the cache."""


def by_hand(problem: Problem, compiled: bool = False) -> Callable[[Tensor, int], Tensor]:
    """A loop over chunks of samples, whose weights are added up in float64."""
    vae = VAE(problem)

    def weigh(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
        noise = torch.randn((CHUNK, *loc.shape), device=loc.device)
        z = loc + log_scale.exp() * noise
        logits = vae.decoder(z)
        likelihood = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        # The constants of the two normals cancel.
        prior, guide = -0.5 * z.square(), -0.5 * noise.square() - log_scale
        return (prior - guide).sum(-1) - likelihood.flatten(2).sum(-1)

    fast = torch.compile(weigh, options=KEEP_RANDOM) if compiled else weigh

    @torch.no_grad()
    def run(x: Tensor, samples: int) -> Tensor:
        loc, log_scale = vae.encoder(x).unbind(-2)
        total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        for _ in range(-(-samples // CHUNK)):
            total = torch.logaddexp(total, fast(x, loc, log_scale).double().logsumexp(0))
        return total - math.log(-(-samples // CHUNK) * CHUNK)

    return run


def by_numpyro(problem: Problem) -> Callable[[Tensor, int], Tensor]:
    """Traces under ``vmap`` over samples, chunks in one ``lax.scan``, all of it jitted."""
    import jax
    import jax.numpy as jnp
    from numpyro import handlers
    from numpyro.infer.util import log_density

    model, guide, parameters = programs(problem)

    def weight(key: Any, x: Any) -> Any:
        seeded = handlers.seed(handlers.substitute(guide, data=parameters), key)
        trace = handlers.trace(seeded).get_trace(x)
        z = trace["z"]["value"]
        drawn, _ = log_density(guide, (x,), {}, parameters | {"z": z})
        joint, _ = log_density(model, (x,), {}, parameters | {"z": z})
        return joint - drawn

    # log_density() adds up a batch, so that each image is a batch of its own.
    each = jax.vmap(jax.vmap(weight, (0, None)), (0, 0))

    @jax.jit
    def run(key: Any, x: Any, chunks: Any) -> Any:
        def chunk(total: Any, key: Any) -> tuple:
            keys = jax.random.split(key, (len(x), CHUNK))
            found = jax.nn.logsumexp(each(keys, x[:, None]), axis=1)
            return jnp.logaddexp(total, found), None

        start = jnp.full(len(x), -jnp.inf)
        return jax.lax.scan(chunk, start, jax.random.split(key, len(chunks)))[0]

    def call(x: Tensor, samples: int) -> Tensor:
        chunks = jnp.arange(-(-samples // CHUNK))
        found = run(jax.random.key(0), jnp.asarray(x.cpu().numpy()), chunks)
        total = torch.from_numpy(jax.device_get(found).copy()).double()
        return total - math.log(len(chunks) * CHUNK)

    return call


RIVALS: dict[str, Callable[[Problem], Callable[[Tensor, int], Tensor]]] = {
    "by hand": by_hand,
    "by hand, compiled": lambda problem: by_hand(problem, compiled=True),
    "NumPyro, vmap and jit": by_numpyro,
}
