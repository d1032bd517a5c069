"""Hierarchies against their equations, and linear ones against their closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from structures import ladder, two_layer
from torch import nn
from torch.distributions import MultivariateNormal

import pyrovae
from pyrovae.guides.ladder import Ladder as LadderGuide
from pyrovae.guides.two_layer import TwoLayer as TwoLayerGuide
from pyrovae.models.ladder import Ladder
from pyrovae.models.two_layer import TwoLayer


def test_every_prior_is_that_of_its_equation():
    for make, above in ((two_layer, ["z2"]), (ladder, ["z3", "z2"])):
        model, _, args = make()
        nodes = pyro.poutine.trace(model).get_trace(*args).nodes
        for name in above:
            z, below = nodes[name]["value"], nodes[f"z{int(name[1]) - 1}"]["fn"].base_dist
            if make is two_layer:
                loc, log_scale = model.decoder_top(z).unbind(-2)
                scale = log_scale.exp()
            else:
                loc, scale = model.decoders[int(name[1]) - 2](z).unbind(-2)
                scale = nn.functional.softplus(scale) + 1e-3
            torch.testing.assert_close(below.loc, loc)
            torch.testing.assert_close(below.scale, scale)
        logits = nodes["x"]["fn"].base_dist.base_dist.logits  # below the mask of what is observed
        torch.testing.assert_close(logits, model.decoder(nodes["z1"]["value"]))


class Linear:
    """A hierarchy of two scalars with affine maps and Gaussian data, whose marginal is known.

    z2 ~ N(0, 1), z1 = 0.8 z2 + 0.3 + 0.6 noise, x = b z1 + c + 0.7 noise; what x says of z1 is
    u = b(x - c) / bb, which is z1 with noise of variance 0.7^2 / bb.
    """

    b, c = torch.tensor([1.0, -0.5, 2.0]).double(), torch.tensor([0.2, 0.0, -1.0]).double()
    bb = (b @ b).item()
    noise = 0.7 / bb**0.5
    to_u = (b / bb).tolist(), -(b @ c).item() / bb

    def marginal(self):
        spread = (0.8**2 + 0.6**2) * torch.outer(self.b, self.b)
        covariance = spread + 0.7**2 * torch.eye(3).double()
        return MultivariateNormal(self.c + 0.3 * self.b, covariance)

    def edited(self, model, top, scale):
        """The model's program with one line changed: the likelihood."""

        def forward(x):
            with pyro.plate("data", len(x)):
                z2 = pyro.sample("z2", dist.Normal(model.zero, 1.0).to_event(1))
                loc, raw = top(z2).unbind(-2)
                z1 = pyro.sample("z1", dist.Normal(loc, scale(raw)).to_event(1))
                pyro.sample("x", dist.Normal(model.decoder(z1), 0.7).to_event(1), obs=x)

        return forward

    def two_layer(self):
        settings = {"latent": (1, 1), "hidden": (), "hidden_top": ()}
        model, guide = TwoLayer((3,), **settings), TwoLayerGuide((3,), **settings)
        affine(model.decoder_top, [0.8, 0.0], [0.3, math.log(0.6)])
        affine(model.decoder, self.b, self.c)
        gain, loc, scale = posterior(0.3, 1.0, 1.0, 0.0, self.noise)
        weight, bias = self.to_u
        affine(
            guide.encoder,
            [gain * w for w in weight] + [0.0] * 3,
            [gain * bias + loc, math.log(scale)],
        )
        gain, loc, scale = posterior(0.0, 1.0, 0.8, 0.3, 0.6)
        affine(guide.encoder_top, [gain, 0.0], [loc, math.log(scale)])
        model.double().forward = self.edited(model, model.decoder_top, torch.exp)
        return model, guide.double()

    def gated_ladder(self):
        return self.ladder("GLU")

    def ladder(self, activation="Identity"):
        settings = {"latent": (1, 1), "hidden": (1, 1), "activation": activation}
        model, guide = Ladder((3,), **settings), LadderGuide((3,), **settings)
        affine(model.decoders[0], [0.8, 0.0], [0.3, raw(0.6)])
        affine(model.decoder, self.b, self.c)
        for network, weight, bias in (guide.encoder, *self.to_u), (guide.encoders[0], [1.0], 0.0):
            if activation == "GLU":  # Gates that are half open.
                affine(network, [2 * w for w in weight] + [0.0] * len(weight), [2 * bias, 0.0])
            else:
                affine(network, weight, bias)
        gain, loc, scale = posterior(0.0, 1.0, 0.8, 0.3, (0.6**2 + self.noise**2) ** 0.5)
        affine(guide.upward[1], [gain, 0.0], [loc, raw(scale)])
        affine(guide.upward[0], [1.0, 0.0], [0.0, raw(self.noise)])
        affine(guide.downward[0], [0.8, 0.0], [0.3, raw(0.6)])
        model.double().forward = self.edited(
            model, model.decoders[0], lambda s: torch.nn.functional.softplus(s) + 1e-3
        )
        return model, guide.double()


def raw(scale):
    return math.log(math.expm1(scale - 1e-3))


def affine(network, weight, bias):
    """Set a chain of layers to x -> weight x + bias; the inner ones pass a scalar on."""
    *inner, last = [m.double() for m in network.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for layer in inner:
            layer.weight.zero_()
            layer.weight[0] = len(layer.weight)  # Of two, the other opens a gate by half.
            layer.bias.zero_()
        last.weight.copy_(torch.as_tensor(weight, dtype=torch.float64).reshape(last.weight.shape))
        last.bias.copy_(torch.as_tensor(bias, dtype=torch.float64).reshape(last.bias.shape))


def posterior(mean, variance, slope, intercept, noise):
    """z ~ N(mean, variance) given u = slope z + intercept + noise: gain u + loc, and its scale."""
    precision = 1 / variance + (slope / noise) ** 2
    gain = slope / noise**2 / precision
    return gain, mean / variance / precision - gain * intercept, precision**-0.5


@pytest.mark.parametrize("kind", ["two_layer", "ladder", "gated_ladder"])
def test_a_linear_hierarchy_under_its_exact_guide_has_no_gap(kind):
    model, guide = getattr(Linear(), kind)()
    x = Linear().marginal().sample((6,))
    expected = Linear().marginal().log_prob(x)
    found = pyrovae.elbo(model, guide, x, particles=5, seed=0).elbo
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.05)
    found = pyrovae.elbo(model, guide, x, particles=400, seed=0).elbo
    assert (found < expected - 0.01).any()
    ll = pyrovae.log_likelihood(model, guide, x, num_samples=4000, seed=0)
    assert ((ll.log_prob - expected).abs() < 5 * ll.standard_error + 1e-6).all()
