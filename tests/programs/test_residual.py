"""The residual pair learns what colour a thing has, and draws things of every colour."""

import pyro
import pytest
import torch
from pyro import poutine

import pyrovae
from pyrovae.data.images import draw_shapes
from pyrovae.guides.residual import Residual as Guide
from pyrovae.models.residual import Residual

SMALL = {"latent": 4, "channels": (16,), "hidden": (64,)}


def chroma(x):
    """What is left of the channels without their mean, which a grey image has not."""
    return x - x.mean(1, keepdim=True)


def test_hues_are_reconstructed_and_drawn_from_the_prior():
    x = torch.from_numpy(draw_shapes(512, size=8).x) / 255
    pyro.set_rng_seed(0)
    model, guide = Residual(x.shape[1:], **SMALL), Guide(x.shape[1:], **SMALL)
    how = {"objective": "trace_mean_field_elbo", "batch_size": 64, "lr": 5e-3, "compile": False}
    pyrovae.fit(model, guide, x, epochs=30, seed=0, **how)
    # Scales that z sets leave 0.00 to 0.06 of the hues explained; one a channel, 0.75.
    missed = chroma(pyrovae.reconstruct(model, guide, x, seed=0) - x)
    assert missed.square().sum() < 0.5 * chroma(x).square().sum()
    drawn = pyrovae.sample(model, like=x, n=512, mean=True, seed=0)
    assert 0.4 < chroma(drawn).square().sum() / chroma(x).square().sum() < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_channel_has_one_scale_whatever_z(dtype):
    model = Residual((3, 5, 7), **SMALL).to(dtype)
    model.scale = torch.tensor([0.1, 0.2, 0.3], dtype=dtype)[:, None, None]
    trace = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(6, 3, 5, 7).to(dtype))
    found = trace.nodes["x"]["fn"].base_dist.base_dist
    assert found.loc.std(0).min() > 0
    assert found.loc.dtype == trace.nodes["x"]["value"].dtype == dtype
    assert found.scale.unique().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert (found.scale == model.scale).all()
