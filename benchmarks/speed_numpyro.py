"""The same training in NumPyro: many steps in one compiled scan, images on the device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from speed_problem import CONVOLUTIONAL, LR, SHAPE, Problem, Race
from torch import Tensor, nn

from pyrovae.nn import MLP, ConvDecoder, ConvEncoder

__all__ = ["by_numpyro", "programs"]

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
EVENT = len(SHAPE)
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def by_numpyro(problem: Problem, images: Tensor) -> Race:
    """``numpyro.infer.SVI`` with every minibatch of a turn under one ``jax.jit``.

    XLA takes five times as long for convolutions inside a loop on a CPU: there the turn is a loop
    of jitted steps.

    Raises:
        ImportError: If NumPyro is not installed, or JAX has no such device.
    """
    import jax
    import jax.numpy as jnp
    import numpyro.optim
    from numpyro.infer import SVI, TraceMeanField_ELBO

    platform = {"cpu": "cpu", "cuda": "gpu"}[problem.device]
    if platform not in {device.platform for device in jax.devices()}:
        raise ImportError(f"JAX has no {platform} here")
    pixels, (model, guide, _) = jnp.asarray(images.cpu().numpy()), programs(problem)
    loss = TraceMeanField_ELBO(num_particles=problem.particles)
    svi = SVI(model, guide, numpyro.optim.Adam(LR), loss)

    def step(carried: tuple, pixels: Any, rows: Any) -> tuple:
        state, key = carried
        x = pixels[rows]
        if problem.binarize:
            key, draw = jax.random.split(key)
            p = x.astype(jnp.float32) / 255
            x = (jax.random.uniform(draw, p.shape) < p).astype(jnp.float32)
        state, loss = svi.update(state, x)
        return (state, key), loss

    def turn(carried: tuple, pixels: Any, index: Any) -> tuple:
        return jax.lax.scan(lambda carried, rows: step(carried, pixels, rows), carried, index)

    def one_by_one(carried: tuple, pixels: Any, index: Any) -> tuple:
        losses = []
        for rows in index:
            carried, loss = fast(carried, pixels, rows)
            losses.append(loss)
        return carried, jnp.stack(losses)

    looped = problem.device == "cpu" and problem.networks == CONVOLUTIONAL
    fast = jax.jit(step if looped else turn, donate_argnums=0)
    train = one_by_one if looped else fast
    example = jnp.zeros((problem.batch, *SHAPE))
    carried = [(svi.init(jax.random.key(0), example), jax.random.key(1))]

    def run(index: Tensor) -> Any:
        carried[0], losses = train(carried[0], pixels, jnp.asarray(index.cpu().numpy()))
        return torch.from_numpy(jax.device_get(losses).copy())

    return run


def programs(problem: Problem) -> tuple[Callable, Callable, dict]:
    """The pair of a problem in NumPyro, and its weights by the names of their parameters."""
    import jax.numpy as jnp
    import numpyro

    (encode, encoder), (decode, decoder) = map(_translated, _networks(problem.pair()))
    latent = problem.latent

    def model(x: Any) -> None:
        weights = numpyro.param("decoder", decoder)
        with numpyro.plate("data", len(x)):
            prior = numpyro.distributions.Normal(jnp.zeros(latent), 1.0).to_event(1)
            z = numpyro.sample("z", prior)
            likelihood = numpyro.distributions.Bernoulli(logits=decode(weights, z))
            numpyro.sample("x", likelihood.to_event(EVENT), obs=x)

    def guide(x: Any) -> None:
        weights = numpyro.param("encoder", encoder)
        with numpyro.plate("data", len(x)):
            moments = encode(weights, x)
            posterior = numpyro.distributions.Normal(moments[:, 0], jnp.exp(moments[:, 1]))
            numpyro.sample("z", posterior.to_event(1))

    return model, guide, {"encoder": encoder, "decoder": decoder}


def _networks(pair: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    model, guide = pair
    return guide.encoder, model.decoder


def _translated(network: nn.Module) -> tuple[Callable, dict]:
    """A network as a function of weights and inputs ``[N, ...]`` in JAX, and its weights."""
    import jax.numpy as jnp

    weights = {n: jnp.asarray(p.detach().cpu().numpy()) for n, p in network.named_parameters()}
    return lambda weights, x: _apply(network, weights, "", x), weights


def _apply(layer: nn.Module, weights: dict, path: str, x: Any) -> Any:
    def part(name: str, x: Any) -> Any:
        return _apply(getattr(layer, name), weights, f"{path}{name}.", x)

    match layer:
        case MLP():
            return part("layers", x.reshape(len(x), -1)).reshape(len(x), *layer.out_shape)
        case ConvEncoder():
            return part("head", part("layers", x.transpose(LAST)).transpose(FIRST))
        case ConvDecoder():
            return part("layers", part("stem", x).transpose(LAST)).transpose(FIRST)
        case nn.Sequential():
            for name, _ in layer.named_children():
                x = part(name, x)
            return x
        case nn.ReLU():
            return x * (x > 0)
    return _affine(layer, weights[f"{path}weight"], weights[f"{path}bias"], x)


def _affine(layer: nn.Module, weight: Any, bias: Any, x: Any) -> Any:
    """One layer; convolutions have their channels last, which XLA runs faster on a CPU."""
    from jax.lax import conv_general_dilated

    names = ("NHWC", "HWIO", "NHWC")
    match layer:
        case nn.Linear():
            return x @ weight.T + bias
        case nn.Conv2d():
            kernel, pads = weight.transpose(2, 3, 1, 0), [(p, p) for p in layer.padding]
            y = conv_general_dilated(x, kernel, layer.stride, pads, dimension_numbers=names)
        case nn.ConvTranspose2d():
            kernel = weight.transpose(2, 3, 0, 1)[::-1, ::-1]
            inner = [k - 1 - p for k, p in zip(layer.kernel_size, layer.padding, strict=True)]
            pads = [(i, i + o) for i, o in zip(inner, layer.output_padding, strict=True)]
            spread = {"lhs_dilation": layer.stride, "dimension_numbers": names}
            y = conv_general_dilated(x, kernel, (1, 1), pads, **spread)
    return y + bias
