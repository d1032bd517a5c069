"""Pyro's examples/vae/ss_vae_M2.py: labels observed or summed over, and a second loss on them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from clients import agrees, fits, has_no_false_alarm, runs_captured, takes_the_steps_of_pyro
from pyro.distributions.util import broadcast_shape
from pyro.infer import SVI as PyroSVI
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import nn

import pyrovae

PIXELS, CLASSES, LATENT, HIDDEN = 9, 4, 2, 8


class Joined(nn.Module):
    """A tensor, or a list of tensors that are broadcast and put side by side."""

    def forward(self, parts):
        if torch.is_tensor(parts):
            return parts
        shape = (*broadcast_shape(*[part.shape[:-1] for part in parts]), -1)
        return torch.cat([part.expand(shape) for part in parts], dim=-1)


class Exp(nn.Module):
    def forward(self, value):
        return torch.exp(value)


class Heads(nn.ModuleList):
    def forward(self, value):
        return [head.forward(value) for head in self]


def network(inputs, *ends):
    """A hidden layer and what comes out of it: pairs of a size and an activation."""
    heads = [nn.Sequential(nn.Linear(HIDDEN, size), *activation) for size, *activation in ends]
    last = heads[0] if len(heads) == 1 else Heads(heads)
    made = nn.Sequential(Joined(), nn.Linear(inputs, HIDDEN), nn.Softplus(), last)
    for layer in made.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.normal_(0, 0.3)
            layer.bias.data.normal_(0, 0.3)
    return made


class SSVAE(nn.Module):
    """p(x | y, z) with q(y | x) and q(z | x, y); plates have no size, and labels may be None."""

    def __init__(self, multiplier=46):
        super().__init__()
        self.encoder_y = network(PIXELS, (CLASSES, nn.Softmax(dim=1)))
        self.encoder_z = network(PIXELS + CLASSES, (LATENT,), (LATENT, Exp()))
        self.decoder = network(LATENT + CLASSES, (PIXELS, nn.Sigmoid()))
        self.multiplier = multiplier

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        n = xs.size(0)
        with pyro.plate("data"):
            prior = dist.Normal(xs.new_zeros(n, LATENT), xs.new_ones(n, LATENT))
            zs = pyro.sample("z", prior.to_event(1))
            alpha = xs.new_ones(n, CLASSES) / (1.0 * CLASSES)
            ys = pyro.sample("y", dist.OneHotCategorical(alpha), obs=ys)
            loc = self.decoder([zs, ys])
            pyro.sample("x", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=xs)
            return loc

    def guide(self, xs, ys=None):
        with pyro.plate("data"):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(self.encoder_y(xs)))
            pyro.sample("z", dist.Normal(*self.encoder_z([xs, ys])).to_event(1))

    def model_classify(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            if ys is not None:
                alpha = self.encoder_y(xs)
                with pyro.poutine.scale(scale=self.multiplier):
                    pyro.sample("y_aux", dist.OneHotCategorical(alpha), obs=ys)

    def guide_classify(self, xs, ys=None):
        """The second loss has no latents."""


def data(n=10):
    generator = torch.Generator().manual_seed(1)
    xs = torch.bernoulli(torch.full((n, PIXELS), 0.4), generator=generator)
    return xs, torch.eye(CLASSES)[torch.arange(n) % CLASSES]


def enumerated():
    return TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)


def programs():
    vae = SSVAE()
    return vae.model, config_enumerate(vae.guide, "parallel", expand=True)


XS, YS = data()
BATCHES = [(XS,), (XS, YS)] * 3


def test_steps():
    takes_the_steps_of_pyro(programs, BATCHES, enumerated)


@pytest.mark.parametrize("sums", ["parallel", "sequential", None])
def test_steps_with_the_auxiliary_loss(sums):
    """Both losses share one optimizer; without labels the second one has no site."""
    found = []
    for kind in (PyroSVI, pyrovae.SVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae, adam = SSVAE(), pyro.optim.Adam({"lr": 0.01, "betas": (0.9, 0.999)})
        guide = config_enumerate(vae.guide, sums, expand=True)
        svis = [
            kind(vae.model, guide, adam, loss=enumerated()),
            kind(vae.model_classify, vae.guide_classify, adam, loss=Trace_ELBO()),
        ]
        losses = []
        for step, batch in enumerate(BATCHES):
            pyro.set_rng_seed(step)
            losses.append([svi.step(*batch) for svi in svis])
        found.append(losses)
    assert found[1][0][1] == 0.0
    assert found[1] == [pytest.approx(each, rel=2e-5) for each in found[0]]


@pytest.mark.usefixtures("recorded")
def test_compiled():
    runs_captured(programs, [(XS,)] * 4, enumerated)


def test_fit_and_evidence():
    """log p(x, y) where labels are given, and log p(x) where not."""
    vae = SSVAE()
    guide = config_enumerate(vae.guide, "parallel", expand=True)
    fits(vae.model, guide, (XS,), enumerated())
    found = [
        pyrovae.log_likelihood(vae.model, guide, *rows, num_samples=3000, seed=0)
        for rows in ((XS,), (XS, YS))
    ]
    with torch.no_grad():
        ys = torch.eye(CLASSES)[:, None].expand(3000, CLASSES, len(XS), CLASSES)
        q = dist.Normal(*vae.encoder_z([XS, ys[0]])).to_event(1)
        z = q.sample((3000,))
        weights = dist.Normal(torch.zeros(LATENT), 1.0).to_event(1).log_prob(z) - q.log_prob(z)
        weights += dist.Bernoulli(vae.decoder([z, ys])).to_event(1).log_prob(XS)
        weights -= torch.tensor(float(CLASSES)).log()
    agrees(found[0], weights.logsumexp(1))
    agrees(found[1], weights[:, YS.argmax(-1), torch.arange(len(XS))])


def test_samples():
    vae = SSVAE()
    assert pyrovae.sample(vae.model, like=XS, n=20, seed=0).shape == (20, PIXELS)
    assert pyrovae.sample(vae.model, YS, like=XS, seed=0).shape == XS.shape


def test_labels():
    vae = SSVAE()
    q = pyrovae.classify(config_enumerate(vae.guide), XS)
    torch.testing.assert_close(q, vae.encoder_y(XS).detach())


def test_check():
    """The guide draws its latents in another order than the model."""
    has_no_false_alarm(pyrovae.check(*programs(), XS), analytic_KL="in another order")


def test_a_check_of_labelled_data_names_what_they_leave_out():
    """The classifier has a gradient where there are no labels, and in the auxiliary loss."""
    row = pyrovae.check(*programs(), XS, YS)["gradients"]
    assert row.status == "failed"
    assert row.message.count("encoder_y") == 4
