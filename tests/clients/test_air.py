"""Pyro's examples/air: objects found one after another, with learned baselines for the choices."""

from functools import partial
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from clients import agrees, fits, has_no_false_alarm, runs_eagerly, takes_the_steps_of_pyro
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, softplus

import pyrovae

STEPS, SIDE, WINDOW, WHAT, HIDDEN = 2, 6, 3, 2, 8


class State(NamedTuple):
    h: torch.Tensor
    c: torch.Tensor
    bl_h: torch.Tensor
    bl_c: torch.Tensor
    pres: torch.Tensor
    where: torch.Tensor
    what: torch.Tensor


def chance(t):
    """The prior probability of another object."""
    return 0.5


def affine(where):
    """Matrices [[s, 0, x], [0, s, y]] of rows [s, x, y]."""
    padded = torch.cat((where.new_zeros(len(where), 1), where), 1)
    return padded[:, [1, 0, 2, 0, 1, 3]].view(-1, 2, 3)


def resampled(images, theta, size):
    n, side = len(images), int(images[0].numel() ** 0.5)
    grid = affine_grid(theta, [n, 1, size, size], align_corners=False)
    return grid_sample(images.view(n, 1, side, side), grid, align_corners=False).view(n, -1)


def pasted(where, windows):
    return resampled(windows, affine(where), SIDE).view(-1, SIDE, SIDE)


def cut(where, images):
    inverse = torch.cat((where.new_ones(len(where), 1), -where[:, 1:]), 1) / where[:, :1]
    return resampled(images, affine(inverse), WINDOW)


class AIR(nn.Module):
    """The window of an object is masked where there is none; the guide may see a part of the data.

    Baselines are networks of their own, which see what came before without its gradient.
    """

    def __init__(self):
        super().__init__()
        inputs = SIDE**2 + 3 + WHAT + 1
        self.prior_loc = nn.Parameter(torch.tensor([3.0, 0.0, 0.0]), requires_grad=False)
        self.prior_scale = nn.Parameter(torch.tensor([0.1, 1.0, 1.0]), requires_grad=False)
        self.rnn, self.bl_rnn = nn.LSTMCell(inputs, HIDDEN), nn.LSTMCell(inputs, HIDDEN)
        self.encode, self.decode = nn.Linear(WINDOW**2, 2 * WHAT), nn.Linear(WHAT, WINDOW**2)
        self.predict, self.bl_predict = nn.Linear(HIDDEN, 7), nn.Linear(HIDDEN, 1)
        for name, size in {"h": HIDDEN, "c": HIDDEN, "bl_h": HIDDEN, "bl_c": HIDDEN}.items():
            setattr(self, f"{name}_init", nn.Parameter(torch.zeros(1, size)))
        self.where_init = nn.Parameter(torch.zeros(1, 3))
        self.what_init = nn.Parameter(torch.zeros(1, WHAT))

    def model(self, data, batch_size, z_pres_prior_p=chance):
        pyro.module("decode", self.decode)
        with pyro.plate("data", data.size(0), device=data.device) as ix:
            batch = data[ix]
            n = batch.size(0)
            canvas, pres = torch.zeros(n, SIDE, SIDE), torch.ones(n, 1)
            for t in range(STEPS):
                there = dist.Bernoulli(z_pres_prior_p(t) * pres).to_event(1)
                pres = pyro.sample(f"z_pres_{t}", there)
                place = dist.Normal(self.prior_loc.expand(n, 3), self.prior_scale.expand(n, 3))
                where = pyro.sample(f"z_where_{t}", place.mask(pres).to_event(1))
                code = dist.Normal(torch.zeros(n, WHAT), torch.ones(n, WHAT))
                what = pyro.sample(f"z_what_{t}", code.mask(pres).to_event(1))
                canvas = canvas + pasted(where, self.decode(what)) * pres.view(-1, 1, 1)
            seen = dist.Normal(canvas.view(n, -1), torch.ones(n, SIDE**2)).to_event(1)
            pyro.sample("obs", seen, obs=batch.view(n, -1))

    def guide(self, data, batch_size, **kwargs):
        for name in ("rnn", "predict", "encode", "bl_rnn", "bl_predict"):
            pyro.module(name, getattr(self, name))
        for name in ("h", "c", "bl_h", "bl_c", "where", "what"):
            pyro.param(f"{name}_init", getattr(self, f"{name}_init"))
        size = {"subsample_size": batch_size, "device": data.device}
        with pyro.plate("data", data.size(0), **size) as ix:
            batch = data[ix]
            n = batch.size(0)
            start = {name: getattr(self, f"{name}_init").expand(n, -1) for name in State._fields
                     if name != "pres"}  # fmt: skip
            state = State(pres=torch.ones(n, 1), **start)
            for t in range(STEPS):
                state = self.guide_step(t, state, batch)

    def guide_step(self, t, prev, batch):
        raw = batch.view(len(batch), -1)
        h, c = self.rnn(torch.cat((raw, prev.where, prev.what, prev.pres), 1), (prev.h, prev.c))
        out = self.predict(h)
        infer, bl_h, bl_c = self.baseline(prev, raw)
        there = dist.Bernoulli(torch.sigmoid(out[:, :1]) * prev.pres).to_event(1)
        pres = pyro.sample(f"z_pres_{t}", there, infer=infer)
        place = dist.Normal(out[:, 1:4] + self.prior_loc, softplus(out[:, 4:]) * self.prior_scale)
        where = pyro.sample(f"z_where_{t}", place.mask(pres).to_event(1))
        loc, scale = self.encode(cut(where, batch)).chunk(2, 1)
        code = dist.Normal(loc, softplus(scale)).mask(pres).to_event(1)
        what = pyro.sample(f"z_what_{t}", code)
        return State(h, c, bl_h, bl_c, pres, where, what)

    def baseline(self, prev, raw):
        before = (raw, prev.where.detach(), prev.what.detach(), prev.pres.detach())
        bl_h, bl_c = self.bl_rnn(torch.cat(before, 1), (prev.bl_h, prev.bl_c))
        value = self.bl_predict(bl_h) * prev.pres
        return {"baseline": {"baseline_value": value.squeeze(-1)}}, bl_h, bl_c


def images(n=12):
    x = torch.zeros(n, SIDE, SIDE)
    x[torch.arange(n), 1 + torch.arange(n) % 4, 2] = 1.0
    return x + 0.1 * torch.randn(n, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


X = images()
STEPPED = [(X, {"batch_size": size, "z_pres_prior_p": chance}) for size in (4, 4, 12, 4)]


def programs():
    air = AIR()
    return air.model, air.guide


def whole(air):
    """Programs of the data alone, all of which count."""
    return partial(air.model, batch_size=None), partial(air.guide, batch_size=None)


def rates():
    return pyro.optim.Adam(lambda name: {"lr": 0.01 if "bl_" in name else 0.001})


def test_steps():
    takes_the_steps_of_pyro(programs, STEPPED, TraceGraph_ELBO, rates)


@pytest.mark.usefixtures("recorded")
def test_eager():
    runs_eagerly(programs, STEPPED, TraceGraph_ELBO, "takes its gradient by code of its own")


def test_fit_and_evidence():
    air = AIR()
    fits(*whole(air), (X,), TraceGraph_ELBO())
    found = pyrovae.log_likelihood(*whole(air), X, num_samples=2000, seed=0)
    many = X.repeat(1000, 1, 1)
    with torch.no_grad():
        drawn = poutine.trace(air.guide).get_trace(many, None)
        replayed = poutine.trace(poutine.replay(air.model, trace=drawn)).get_trace(many, None)
    agrees(found, by_hand(replayed, drawn).reshape(1000, -1))


def by_hand(replayed, drawn):
    """ln p(x, z) - ln q(z | x), where windows of no object do not count."""
    seen = replayed.nodes["obs"]
    found = seen["fn"].log_prob(seen["value"])
    for name, site in replayed.nodes.items():
        if name.startswith("z_"):
            ours, theirs = (t.nodes[name]["fn"] for t in (replayed, drawn))
            found += ours.log_prob(site["value"]) - theirs.log_prob(site["value"])
    return found


def test_a_number_of_the_batch_is_bound_before_an_evaluation():
    with pytest.raises(pyrovae.InputError, match=r"got int as argument 1: .* functools.partial"):
        pyrovae.log_likelihood(*programs(), X, 12, num_samples=2)


def test_samples():
    x = pyrovae.sample(whole(AIR())[0], like=X, n=20, seed=0)
    assert x.shape == (20, SIDE**2)


def test_check():
    says = {"reparameterized": "has no rsample"}
    has_no_false_alarm(pyrovae.check(*whole(AIR()), X), **says)
