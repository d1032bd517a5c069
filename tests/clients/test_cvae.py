"""Pyro's examples/cvae: a quadrant is seen, and a network's guess of the rest is known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from clients import agrees, fits, has_no_false_alarm, runs_eagerly, takes_the_steps_of_pyro
from pyro.infer import Trace_ELBO
from torch import nn
from torch.nn.functional import binary_cross_entropy

import pyrovae

SIDE, LATENT, HIDDEN, HIDDEN_FROM_VIEW = 4, 2, 8, -1
PIXELS = SIDE * SIDE


class Baseline(nn.Module):
    """Guesses the whole image from the part that is seen."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(PIXELS, HIDDEN), nn.Linear(HIDDEN, PIXELS)
        self.relu = nn.ReLU()

    def forward(self, x):
        return torch.sigmoid(self.last(self.relu(self.first(x.view(-1, PIXELS)))))


class MaskedLoss(nn.Module):
    """The cross-entropy of the pixels that are not seen."""

    def forward(self, guess, target):
        target = target.view(guess.shape)
        there = target != HIDDEN_FROM_VIEW
        return binary_cross_entropy(guess[there], target[there], reduction="none").sum()


class Encoder(nn.Module):
    """Moments of the latent from two images, one of which fills up the other."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(PIXELS, HIDDEN)
        self.loc, self.log_scale = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
        self.relu = nn.ReLU()

    def forward(self, x, y):
        filled = x.clone()
        filled[x == HIDDEN_FROM_VIEW] = y[x == HIDDEN_FROM_VIEW]
        hidden = self.relu(self.hidden(filled.view(-1, PIXELS)))
        return self.loc(hidden), torch.exp(self.log_scale(hidden))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(LATENT, HIDDEN), nn.Linear(HIDDEN, PIXELS)
        self.relu = nn.ReLU()

    def forward(self, z):
        return torch.sigmoid(self.last(self.relu(self.first(z))))


class CVAE(nn.Module):
    """p(y | x): the guess is made without a gradient, and hidden pixels alone are scored."""

    def __init__(self, baseline_net):
        super().__init__()
        self.baseline_net = baseline_net
        self.prior_net, self.generation_net = Encoder(), Decoder()
        self.recognition_net = Encoder()

    def model(self, xs, ys=None):
        pyro.module("generation_net", self)
        batch_size = xs.shape[0]
        with pyro.plate("data"):
            with torch.no_grad():
                guess = self.baseline_net(xs).view(xs.shape)
            zs = pyro.sample("z", dist.Normal(*self.prior_net(xs, guess)).to_event(1))
            loc = self.generation_net(zs)
            if ys is not None:
                hidden = xs == HIDDEN_FROM_VIEW
                loc_there = loc[hidden.view(-1, PIXELS)].view(batch_size, -1)
                ys_there = ys[hidden].view(batch_size, -1)
                likelihood = dist.Bernoulli(loc_there, validate_args=False).to_event(1)
                pyro.sample("y", likelihood, obs=ys_there)
            else:
                pyro.deterministic("y", loc.detach())
            return loc

    def guide(self, xs, ys=None):
        with pyro.plate("data"):
            if ys is None:
                guess = self.baseline_net(xs).view(xs.shape)
                loc, scale = self.prior_net(xs, guess)
            else:
                loc, scale = self.recognition_net(xs, ys)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def images(n=12):
    """What is seen of images, and the images: all but one quadrant is hidden."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.bernoulli(torch.full((n, SIDE, SIDE), 0.4), generator=generator)
    seen = torch.full_like(whole, HIDDEN_FROM_VIEW)
    seen[:, : SIDE // 2, : SIDE // 2] = whole[:, : SIDE // 2, : SIDE // 2]
    return seen, whole


XS, YS = images()


def trained_baseline():
    baseline, criterion = Baseline(), MaskedLoss()
    optimizer = torch.optim.Adam(baseline.parameters(), lr=0.05)
    target = torch.where(XS == HIDDEN_FROM_VIEW, YS, float(HIDDEN_FROM_VIEW))
    for _ in range(5):
        optimizer.zero_grad()
        (criterion(baseline(XS), target) / len(XS)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return baseline.eval()


def programs():
    cvae = CVAE(trained_baseline())
    return cvae.model, cvae.guide


def test_steps():
    takes_the_steps_of_pyro(programs, [(XS, YS)] * 5, Trace_ELBO)


@pytest.mark.usefixtures("recorded")
def test_eager():
    runs_eagerly(programs, [(XS, YS)] * 3, Trace_ELBO, "a mask as an index")


@pytest.mark.filterwarnings("ignore:No gradient goes from loc at site 'z'.*If this is meant")
def test_fit_and_evidence():
    """log p(y | x) of the hidden pixels."""
    cvae = CVAE(trained_baseline())
    before = {name: value.clone() for name, value in cvae.baseline_net.state_dict().items()}
    fits(cvae.model, cvae.guide, (XS, YS))
    assert all(torch.equal(v, before[n]) for n, v in cvae.baseline_net.state_dict().items())
    found = pyrovae.log_likelihood(cvae.model, cvae.guide, XS, YS, num_samples=2000, seed=0)
    with torch.no_grad():
        p = dist.Normal(*cvae.prior_net(XS, cvae.baseline_net(XS).view(XS.shape))).to_event(1)
        q = dist.Normal(*cvae.recognition_net(XS, YS)).to_event(1)
        z = q.sample((2000,))
        scores = dist.Bernoulli(cvae.generation_net(z)).log_prob(YS.flatten(1))
        hidden = (XS == HIDDEN_FROM_VIEW).flatten(1)
        agrees(found, p.log_prob(z) - q.log_prob(z) + (scores * hidden).sum(-1))


def test_samples():
    """Without ys the model returns probabilities and has nothing to draw."""
    cvae = CVAE(trained_baseline())
    y = pyrovae.sample(cvae.model, YS, like=XS, seed=0)
    assert y.shape == (len(XS), PIXELS * 3 // 4)
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_samples_of_each_image():
    """The argument that is drawn comes first, then what it is drawn for."""
    cvae = CVAE(trained_baseline())

    def model(ys, xs):
        return cvae.model(xs, ys)

    several = XS[:2].repeat_interleave(2000, 0)
    y = pyrovae.sample(model, several, like=YS, seed=0).reshape(2, 2000, -1).mean(1)
    with torch.no_grad():
        prior = cvae.prior_net(XS[:2], cvae.baseline_net(XS[:2]).view(2, SIDE, SIDE))
        loc = cvae.generation_net(dist.Normal(*prior).sample((2000,))).mean(0)
    expected = loc[(XS[:2] == HIDDEN_FROM_VIEW).flatten(1)].view(2, -1)
    # Two means of 2,000 numbers in [0, 1], four standard errors of 0.5 / sqrt(2000) each.
    torch.testing.assert_close(y, expected, rtol=0, atol=4 * 0.5 * (2 / 2000) ** 0.5)


def test_check():
    says = {"gradients": "baseline_net", "samples": "depend on the data", "capture": "mask"}
    has_no_false_alarm(pyrovae.check(*programs(), XS, YS), **says)
