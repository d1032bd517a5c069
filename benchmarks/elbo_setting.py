"""What elbo.py compares: a Pyro pair and a hand-written VAE with its weights, and their data."""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyrovae
from handwritten import VAE, copy_from_pair, train
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.models.gaussian import Gaussian

__all__ = ["DTYPES", "LR", "MODELS", "PYRO", "SIZES", "Setting", "load"]

MODELS = {"bernoulli": Bernoulli, "gaussian": Gaussian}
PYRO = {"A": Trace_ELBO, "B": TraceMeanField_ELBO}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
SIZES = {"digits": {"latent": 10, "hidden": 200}, "mnist": {"latent": 20, "hidden": 400}}
LR, TRAINED_ROWS = 1e-3, 64_000


class Setting(NamedTuple):
    """Data for each decoder, the networks' sizes, and the seed of the weights."""

    data: dict[str, pyrovae.Dataset]
    sizes: dict[str, int]
    seed: int

    def rows(self, likelihood: str, num_rows: int) -> Tensor:
        """A minibatch drawn with replacement, so that its rows are independent."""
        data = self.data[likelihood]
        return data.batch(torch.randint(len(data.train), (num_rows,)))

    def pair(self, likelihood: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ...]:
        """A fresh Pyro pair, with the same weights at every call."""
        pyro.clear_param_store()
        torch.manual_seed(self.seed)
        shape, latent, hidden = self.data[likelihood].shape, *self.sizes.values()
        model, guide = MODELS[likelihood](shape, latent, hidden), MeanField(shape, latent, hidden)
        return model.to(dtype), guide.to(dtype)

    def vae(self, likelihood: str, dtype: torch.dtype = torch.float32) -> VAE:
        """The hand-written VAE with the weights of that pair."""
        vae = VAE(self.data[likelihood].shape, **self.sizes, likelihood=likelihood).to(dtype)
        return copy_from_pair(vae, *self.pair(likelihood, dtype))

    def trained_vae(self, likelihood: str) -> VAE:
        """The same after a few epochs."""
        vae, data = self.vae(likelihood), self.data[likelihood]
        epochs = math.ceil(TRAINED_ROWS / len(data.train))
        train(vae, data.batch, len(data.train), range(epochs), lr=LR)
        return vae


def load(name: str, seed: int) -> Setting:
    """Binary data for the Bernoulli decoder, drawn in each minibatch; grey for the Gaussian."""
    data = {
        "bernoulli": pyrovae.load_data(name, binarize="dynamic"),
        "gaussian": pyrovae.load_data(name),
    }
    return Setting(data, SIZES[name], seed)
