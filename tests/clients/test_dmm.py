"""Pyro's examples/dmm.py: sequences of several lengths, packed for a recurrent network."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from clients import agrees, fits, has_no_false_alarm, runs_eagerly, takes_the_steps_of_pyro
from pyro import poutine
from pyro.contrib.examples.polyphonic_data_loader import (
    get_mini_batch,
    pad_and_reverse,
    reverse_sequences,
)
from pyro.distributions import TransformedDistribution
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceTMC_ELBO, config_enumerate
from pyro.optim import ClippedAdam
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import pyrovae

NOTES, LATENT, HIDDEN, STEPS = 5, 2, 6, 4


class Emitter(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(LATENT, HIDDEN), nn.Linear(HIDDEN, NOTES)
        self.relu = nn.ReLU()

    def forward(self, z):
        return torch.sigmoid(self.out(self.relu(self.hidden(z))))


class Transition(nn.Module):
    """A gate between a linear step, which begins as none, and a nonlinear one."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, LATENT))
        self.step = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, LATENT))
        self.scale, self.linear = nn.Linear(LATENT, LATENT), nn.Linear(LATENT, LATENT)
        self.linear.weight.data = torch.eye(LATENT)
        self.linear.bias.data = torch.zeros(LATENT)
        self.relu, self.softplus = nn.ReLU(), nn.Softplus()

    def forward(self, z):
        gate, step = torch.sigmoid(self.gate(z)), self.step(z)
        loc = (1 - gate) * self.linear(z) + gate * step
        return loc, self.softplus(self.scale(self.relu(step)))


class Combiner(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(LATENT, HIDDEN)
        self.loc, self.scale = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
        self.tanh, self.softplus = nn.Tanh(), nn.Softplus()

    def forward(self, z, h_rnn):
        both = 0.5 * (self.tanh(self.hidden(z)) + h_rnn)
        return self.loc(both), self.softplus(self.scale(both))


class DMM(nn.Module):
    """A Markov chain of latents, masked where a sequence has ended, its KL scaled in training."""

    def __init__(self, num_iafs=0):
        super().__init__()
        self.emitter, self.trans, self.combiner = Emitter(), Transition(), Combiner()
        self.rnn = nn.RNN(NOTES, HIDDEN, nonlinearity="relu", batch_first=True)
        self.iafs = [affine_autoregressive(LATENT, hidden_dims=[4]) for _ in range(num_iafs)]
        self.iafs_modules = nn.ModuleList(self.iafs)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(LATENT)), nn.Parameter(torch.zeros(LATENT))
        self.h_0 = nn.Parameter(torch.zeros(1, 1, HIDDEN))

    def model(self, batch, batch_reversed, mask, lengths, annealing_factor=1.0):
        pyro.module("dmm", self)
        z_prev = self.z_0.expand(batch.size(0), LATENT)
        with pyro.plate("z_minibatch", len(batch)):
            for t in pyro.markov(range(1, batch.size(1) + 1)):
                there = mask[:, t - 1 : t]
                with poutine.scale(scale=annealing_factor):
                    prior = dist.Normal(*self.trans(z_prev)).mask(there).to_event(1)
                    z_t = pyro.sample(f"z_{t}", prior)
                emission = dist.Bernoulli(self.emitter(z_t)).mask(there).to_event(1)
                pyro.sample(f"obs_x_{t}", emission, obs=batch[:, t - 1, :])
                z_prev = z_t

    def guide(self, batch, batch_reversed, mask, lengths, annealing_factor=1.0):
        pyro.module("dmm", self)
        h_0 = self.h_0.expand(1, batch.size(0), HIDDEN).contiguous()
        output, _ = self.rnn(batch_reversed, h_0)
        output = pad_and_reverse(output, lengths)
        z_prev = self.z_q_0.expand(batch.size(0), LATENT)
        with pyro.plate("z_minibatch", len(batch)):
            for t in pyro.markov(range(1, batch.size(1) + 1)):
                posterior = dist.Normal(*self.combiner(z_prev, output[:, t - 1, :]))
                with poutine.scale(scale=annealing_factor):
                    if len(self.iafs) > 0:
                        posterior = TransformedDistribution(posterior, self.iafs)
                        assert posterior.batch_shape[-1:] == (len(batch),)
                        posterior = posterior.mask(mask[:, t - 1])
                    else:
                        assert posterior.batch_shape[-2:] == (len(batch), LATENT)
                        posterior = posterior.mask(mask[:, t - 1 : t]).to_event(1)
                    z_prev = pyro.sample(f"z_{t}", posterior)


def sequences(n=8):
    generator = torch.Generator().manual_seed(1)
    notes = torch.bernoulli(torch.full((n, STEPS, NOTES), 0.4), generator=generator)
    lengths = torch.arange(n) % STEPS + 1
    return notes * (torch.arange(STEPS) < lengths[:, None])[..., None], lengths


def batch(rows):
    """The arguments of both programs, as the example's loader prepares them."""
    return get_mini_batch(torch.as_tensor(rows), *sequences())


EVERY = batch(range(8))
ANNEALED = [(*batch([i, 7 - i, 3]), 0.2 + 0.2 * i) for i in range(3)] + [EVERY]


def programs(num_iafs=0, guide=lambda guide: guide):
    dmm = DMM(num_iafs)
    return dmm.model, guide(dmm.guide)


def clipped():
    options = {"lr": 0.01, "betas": (0.96, 0.999), "clip_norm": 10.0, "lrd": 0.99996}
    return ClippedAdam(options | {"weight_decay": 2.0})


@pytest.mark.parametrize("num_iafs", [0, 2])
def test_steps(num_iafs):
    takes_the_steps_of_pyro(partial(programs, num_iafs), ANNEALED, Trace_ELBO, clipped)


@pytest.mark.parametrize("loss", [TraceTMC_ELBO, TraceEnum_ELBO])
def test_steps_with_several_draws_of_each_latent(loss):
    several = partial(config_enumerate, default="parallel", num_samples=2, expand=False)
    takes_the_steps_of_pyro(partial(programs, guide=several), ANNEALED, loss, clipped)


@pytest.mark.usefixtures("recorded")
def test_eager():
    runs_eagerly(programs, [EVERY] * 3, Trace_ELBO, "PackedSequence")


def packing(program):
    """A program of rows in any order, cut to the longest and packed where they are read."""

    def run(x, mask, lengths):
        x, mask = x[:, : lengths.max()], mask[:, : lengths.max()]
        turned = reverse_sequences(x, lengths)
        turned = pack_padded_sequence(turned, lengths, batch_first=True, enforce_sorted=False)
        return program(x, turned, mask, lengths)

    return run


ROWS = EVERY[0], EVERY[2], EVERY[3]


def steps_by_hand(dmm, k, z_given=None):
    """Log-weights ``[K, N]`` of K draws of the guide."""
    x, turned, mask, lengths = EVERY
    output, _ = dmm.rnn(turned, dmm.h_0.expand(1, len(x), HIDDEN).contiguous())
    output = pad_and_reverse(output, lengths)
    z_p, z_q = (start.expand(k, len(x), LATENT) for start in (dmm.z_0, dmm.z_q_0))
    weights = torch.zeros(k, len(x))
    for t in range(STEPS):
        q = dist.Normal(*dmm.combiner(z_q, output[:, t])).to_event(1)
        z = q.sample()
        score = dist.Normal(*dmm.trans(z_p)).to_event(1).log_prob(z) - q.log_prob(z)
        score += dist.Bernoulli(dmm.emitter(z)).to_event(1).log_prob(x[:, t])
        weights += score * mask[:, t]
        z_p = z_q = z
    return weights


def test_fit_and_evidence():
    """Some batches are shorter than others, and have fewer sites."""
    dmm = DMM()
    model, guide = packing(dmm.model), packing(dmm.guide)
    fits(model, guide, ROWS)
    found = pyrovae.log_likelihood(model, guide, *ROWS, num_samples=1000, seed=0)
    with torch.no_grad():
        agrees(found, steps_by_hand(dmm, 1000))


def test_evidence_with_flows():
    """Flows know the density of their own draws alone."""
    dmm = DMM(num_iafs=2)
    model, guide = packing(dmm.model), packing(dmm.guide)
    fits(model, guide, ROWS)
    found = pyrovae.log_likelihood(model, guide, *ROWS, num_samples=1000, seed=0)
    many = tuple(each.repeat(500, *[1] * (each.dim() - 1)) for each in ROWS)
    with torch.no_grad():
        drawn = poutine.trace(guide).get_trace(*many)
        replayed = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*many)
    agrees(found, (by_datum(replayed) - by_datum(drawn)).reshape(500, -1))


def by_datum(trace):
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)


def test_a_packed_sequence_has_no_rows_to_evaluate():
    with pytest.raises(pyrovae.InputError, match="got PackedSequence as argument 1"):
        pyrovae.log_likelihood(*programs(), *EVERY, num_samples=2)


def test_batches_of_other_sites_have_no_evidence():
    dmm = DMM()
    few = tuple(each[ROWS[2] < 4].repeat(40, *[1] * (each.dim() - 1)) for each in ROWS)
    rows = tuple(torch.cat([each, more]) for each, more in zip(ROWS, few, strict=True))
    with pytest.raises(pyrovae.InputError, match=r"no latents .* on this batch"):
        pyrovae.log_likelihood(packing(dmm.model), packing(dmm.guide), *rows, num_samples=2)


def test_samples():
    dmm = DMM()
    x = pyrovae.sample(dmm.model, *EVERY[1:], like=EVERY[0], seed=0)
    assert list(x) == [f"obs_x_{t}" for t in range(1, STEPS + 1)]
    assert all(each.shape == (8, NOTES) for each in x.values())


def test_check():
    model, guide = map(packing, programs())
    says = {"capture": "reads a value back", "independent_data": "no latents ['z_4'] on this batch"}
    has_no_false_alarm(pyrovae.check(model, guide, *ROWS), **says)
