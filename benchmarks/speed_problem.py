"""What is timed: networks, a batch, and images to draw it from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae._tools.seeding import seeded
from pyrovae.guides.convolutional import Convolutional as ConvolutionalGuide
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.models.convolutional import Convolutional as ConvolutionalModel
from pyrovae.nn import MLP

__all__ = ["CONVOLUTIONAL", "IMAGES", "LR", "SHAPE", "Problem", "Race", "make_images"]

SHAPE, IMAGES, LR = (1, 28, 28), 10_000, 1e-3
CONVOLUTIONAL = "convolutional"

Race = Callable[[Tensor], object]
"""Takes the rows of some steps, int64 [S, M], trains on them, and returns their losses [S]."""


@dataclass(frozen=True)
class Problem:
    """A step of training.

    Args:
        networks: The widths from the images to the latents, such as ``"784-400-20"``, the
            decoder's being those turned round; or ``"convolutional"``, the shipped pair.
        batch: The size M of a minibatch.
        particles: The samples L per datum.
        sites: How many latent sites of equal size share the latent dimensions.
        device: Where everything is.
        binarize: Whether pixels are drawn anew from uint8 intensities; else images are float32.
    """

    networks: str
    batch: int
    particles: int = 1
    sites: int = 1
    device: str = "cpu"
    binarize: bool = True

    @property
    def latent(self) -> int:
        """The latent dimensions."""
        return 20 if self.networks == CONVOLUTIONAL else int(self.networks.rpartition("-")[2])

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """A model and its guide, with the same weights each time."""
        with seeded(2):
            model, guide = self._programs()
        return model.to(self.device), guide.to(self.device)

    def _programs(self) -> tuple[nn.Module, nn.Module]:
        if self.networks == CONVOLUTIONAL:
            return ConvolutionalModel(SHAPE, self.latent), ConvolutionalGuide(SHAPE, self.latent)
        latent, hidden = self.latent, [int(width) for width in self.networks.split("-")[1:-1]]
        if self.sites > 1:
            return ManyModel(latent, hidden[::-1], self.sites), ManyGuide(
                latent, hidden, self.sites
            )
        return Bernoulli(SHAPE, latent, hidden[::-1]), MeanField(SHAPE, latent, hidden)


def make_images(device: str) -> Tensor:
    """Smooth bright blobs on black, uint8 ``[IMAGES, 1, 28, 28]``."""
    with seeded(0):
        coarse = torch.rand(IMAGES, 1, 4, 4)
    return torch.cat([_bright(part) for part in coarse.split(100)]).to(device)


def _bright(coarse: Tensor) -> Tensor:
    blobs = nn.functional.interpolate(coarse, size=SHAPE[-1], mode="bicubic")
    return (255 * (20 * (blobs - 0.7)).sigmoid()).round().to(torch.uint8)


class ManyModel(PyroModule):
    """The Bernoulli model with its latent cut into sites of equal size."""

    def __init__(self, latent: int, hidden: list[int], sites: int) -> None:
        super().__init__()
        self.decoder, self.sites = MLP(latent, SHAPE, hidden), sites
        self.register_buffer("zero", torch.zeros(latent // sites), persistent=False)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = dist.Normal(self.zero, 1.0).to_event(1)
            z = torch.cat([pyro.sample(f"z_{n}", prior) for n in range(self.sites)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(3), obs=x)


class ManyGuide(PyroModule):
    """The mean-field guide with its latent cut into sites of equal size."""

    def __init__(self, latent: int, hidden: list[int], sites: int) -> None:
        super().__init__()
        self.encoder, self.sites = MLP(SHAPE, (2, latent), hidden), sites

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).unbind(-2)
            parts = zip(loc.chunk(self.sites, -1), log_scale.chunk(self.sites, -1), strict=True)
            for n, (part, log) in enumerate(parts):
                pyro.sample(f"z_{n}", dist.Normal(part, log.exp()).to_event(1))
