"""The pictures of a trained pair, as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrovae.data import Dataset
from pyrovae.report import figures as plots
from pyrovae.sampling import decode, encode, interpolate, reconstruct, sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_pictures", "png", "sample_picture"]

REACH = 2.5


def draw_pictures(
    model: Callable, guide: Callable, data: Dataset, history: list[dict], seed: int = 0
) -> dict[str, bytes]:
    """Learning curves, samples, reconstructions, latent space and what lies between data.

    Args:
        model: The model program.
        guide: The guide program.
        data: The data that it was trained on; pictures show test data.
        history: The rows of its training.
        seed: Seeds the draws.

    Returns:
        PNG by name. The latent space is drawn for each real-valued latent that is a vector, the
        manifold for a single one of two dimensions.
    """
    every, *shown = data.split("test")
    x, *context = every[:10], *(tensor[:10] for tensor in shown)
    found = {} if not history else {"learning_curves": plots.learning_curves(history)}
    found["samples"] = sample_picture(model, every, *shown, n=64, seed=seed)
    xhat = _first(reconstruct(model, guide, x, *context, seed=seed))
    found["reconstructions"] = plots.reconstructions(
        x, xhat.reshape(x.shape), title="Test data and reconstructions E[x | z], z ~ q(z | x)"
    )
    means = encode(guide, every, *shown)
    codes = {n: z for n, z in means.items() if z.is_floating_point()}
    labels = data.labels.test if data.labels else None
    vectors = {name: z for name, z in codes.items() if z.dim() == 2}
    for name, z in vectors.items():
        key = "latent_space" if len(vectors) == 1 else f"latent_space_{name}"
        found[key] = plots.latent_space(z, labels, site=name)
    if len(codes) == len(means):
        half = [tensor[:5] for tensor in context]
        rows = _first(interpolate(model, guide, x[:5], every[10:15], *half))
        found["interpolations"] = plots.interpolations(
            rows.reshape(*rows.shape[:2], *data.shape),
            title="Between the encodings of two test data, E[x | z]",
        )
    if len(codes) == 1 and not shown and next(iter(codes.values())).shape[1:] == (2,):
        found["manifold"] = _manifold(model, next(iter(codes)), data)
    return {name: png(figure) for name, figure in found.items()}


def sample_picture(
    model: Callable, like: Tensor, *context: Tensor, n: int, seed: int | None
) -> Figure:
    """Draws from the model: E[x | z] for z from the prior, where the likelihood knows it.

    Args:
        model: The model program.
        like: A batch ``[N, ...]``; its values are not used.
        context: The model's further arguments ``[N, ...]``, taken from the first row on.
        n: How many to draw.
        seed: Seeds the draws.
    """
    rows = [
        tensor.repeat(-(-n // len(tensor)), *(1,) * (tensor.dim() - 1))[:n] for tensor in context
    ]
    images = _first(sample(model, *rows, like=like, n=n, mean=True, seed=seed))
    return plots.image_grid(
        images.reshape(n, *like.shape[1:]), title="Samples, E[x | z] with z from the prior"
    )


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _manifold(model: Callable, site: str, data: Dataset, side: int = 15) -> Figure:
    axis = torch.linspace(-REACH, REACH, side)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    images = _first(decode(model, {site: grid.reshape(-1, 2)}, like=data.test))
    return plots.manifold(images.reshape(side, side, *data.shape), (-REACH, REACH))


def _first(found: Tensor | dict[str, Tensor]) -> Tensor:
    return found if isinstance(found, Tensor) else next(iter(found.values()))
