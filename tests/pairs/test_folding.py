"""Programs that take no dimension of particles: their particles run as further rows."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import Normal
from zoo import ZOO

import pyrovae
from pyrovae.objectives import estimate, make_objective
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.folding import Folded
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import samples

N, WIDTH, LATENT = 64, 64, 3


class Normalized(nn.Module):
    """Hidden units that are as many as a tile has data, so that a third dimension fits."""

    def __init__(self):
        super().__init__()
        self.before, self.norm = nn.Linear(LATENT, 64), nn.BatchNorm1d(64)
        self.after = nn.Linear(64, WIDTH)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.3, 3)

    def forward(self, z):
        return self.after(torch.relu(self.norm(self.before(z))))


class Shares(nn.Module):
    """A softmax over the second dimension, as in Pyro's prodLDA."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(LATENT, WIDTH)

    def forward(self, z):
        return 5 * torch.softmax(3 * self.net(z), dim=1)


class Joined(nn.Module):
    """Joins two halves along the second dimension, as Pyro's AIR does."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(LATENT + 1, WIDTH)

    def forward(self, z):
        return self.net(torch.cat((z, z[:, :1] ** 2), 1))


class Reshaped(nn.Module):
    """Takes the size of the batch for the first dimension."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(LATENT, WIDTH)

    def forward(self, z):
        return self.net(z.reshape(N if len(z) == N else len(z), -1))


NETWORKS = (Normalized, Shares, Joined, Reshaped)
X = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
each = pytest.mark.parametrize("network", NETWORKS, ids=[n.__name__ for n in NETWORKS])


class Model(pyro.nn.PyroModule):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


class Guide(pyro.nn.PyroModule):
    """An encoder that is normalized too, with a second latent below the first."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.Linear(64, LATENT)
        )

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


def pair_of(network):
    torch.manual_seed(2)
    model, guide = Model(network()).eval(), Guide().eval()
    return model, guide


def by_hand(model, guide, k, seed):
    """ln p(x, z) - ln q(z|x) of K draws, one at a time on the batch: ``[K, N]``."""
    with torch.no_grad():
        loc = guide.encoder(X)
        torch.manual_seed(seed)
        found = []
        for _ in range(k):
            z = loc + 0.5 * torch.randn(N, LATENT)
            found.append(
                Normal(0, 1).log_prob(z).sum(-1)
                + Normal(model.decoder(z), 1).log_prob(X).sum(-1)
                - Normal(loc, 0.5).log_prob(z).sum(-1)
            )
        return torch.stack(found)


@each
def test_log_weights_are_those_of_each_particle_alone(network):
    model, guide = pair_of(network)
    exact = by_hand(model, guide, 1000, seed=1).double()
    bound = exact.mean(0)
    found = pyrovae.elbo(model, guide, X, particles=1000, seed=0).elbo
    error = exact.std(0) * math.sqrt(2 / 1000)
    assert ((found - bound).abs() / error).max() < 5
    evidence = exact.logsumexp(0) - math.log(1000)
    ll = pyrovae.log_likelihood(model, guide, X, num_samples=1000, seed=0, compile=False)
    noise = (exact - evidence).exp().std(0) / math.sqrt(1000)
    assert ((ll.log_prob - evidence).abs() / (noise**2 + ll.standard_error**2).sqrt()).max() < 6


@each
@pytest.mark.parametrize("n", [1, 2, N])
@pytest.mark.parametrize("k", [1, 2, 64])
def test_scores_of_particles_are_a_loop_over_single_ones(network, k, n):
    pair = Pair(*pair_of(network))
    inspect_pair(pair, X[:n])
    with torch.no_grad():
        values, own = pair.draw((X[:n],), k)
        model, _ = pair.score_model((X[:n],), k, values)
        again = pair.score_guide((X[:n],), k, values)
        assert values["z"].shape == (k, n, LATENT)
        for i in {0, k // 2, k - 1}:
            one = {"z": values["z"][i]}
            alone, _ = pair.score_model((X[:n],), None, one)
            theirs = pair.score_guide((X[:n],), None, one)
            for name, score in model.items():
                torch.testing.assert_close(score[i], alone[name][0], rtol=1e-5, atol=1e-4)
            for scores in (own, again):
                torch.testing.assert_close(scores["z"][i], theirs["z"][0], rtol=1e-5, atol=1e-4)


def folds(model, guide):
    pair = Pair(model, guide)
    inspect_pair(pair, X)
    return pair.folds


def test_a_pair_that_takes_a_plate_of_particles_keeps_it():
    model, guide = Model(nn.Linear(LATENT, WIDTH)), Guide()
    guide.encoder = nn.Linear(WIDTH, LATENT)
    assert not folds(model, guide)
    for network in NETWORKS:
        assert folds(Model(network()), guide)


@pytest.mark.parametrize("name", ["iwae", "iwae_dreg", "beta_elbo", "reweighted_wake_sleep"])
def test_objectives_of_several_samples_descend_what_a_loop_over_them_gives(name):
    """Particle by particle, without a plate; in eval mode, where rows do not touch."""
    model, guide = pair_of(Shares)
    pair, objective = Pair(model, guide), make_objective(name, particles=4)
    objective.prepare(pair, (X,))
    assert pair.folds
    torch.manual_seed(5)
    found = objective.estimate(pair, X)
    slopes = torch.autograd.grad(found.surrogate, [*pair.named().values()])

    torch.manual_seed(5)
    loc = guide.encoder(X)
    noise = torch.randn(4, N, LATENT)
    latents = [loc + 0.5 * eps for eps in noise]
    if name == "reweighted_wake_sleep":
        latents = [z.detach() for z in latents]
    log_p = torch.stack(
        [
            Normal(0, 1).log_prob(z).sum(-1) + Normal(model.decoder(z), 1).log_prob(X).sum(-1)
            for z in latents
        ]
    )
    log_q = torch.stack([Normal(loc, 0.5).log_prob(z).sum(-1) for z in latents])
    bound = (log_p - log_q).logsumexp(0) - math.log(4)
    if name == "beta_elbo":
        closed = torch.distributions.kl_divergence(Normal(loc, 0.5), Normal(0.0, 1.0)).sum(-1)
        prior = torch.stack([Normal(0, 1).log_prob(z).sum(-1) for z in latents])
        bound = (log_p - prior).mean(0) - 4 * closed
    torch.testing.assert_close(found.loss, -bound.sum(), rtol=1e-5, atol=1e-3)
    gain = bound
    if name == "reweighted_wake_sleep":
        gain = ((log_p - log_q).detach().softmax(0) * (log_p + log_q)).sum(0)
    if name == "iwae_dreg":
        weights = (log_p - log_q).detach().softmax(0)
        held = torch.stack([Normal(loc.detach(), 0.5).log_prob(z).sum(-1) for z in latents])
        of_guide = torch.autograd.grad(
            -(weights**2 * (log_p - held)).sum(), [*guide.parameters()], retain_graph=True
        )
        of_model = torch.autograd.grad(-bound.sum(), [*model.parameters()])
        expected = (*of_model, *of_guide)
    else:
        expected = torch.autograd.grad(-gain.sum(), [*model.parameters(), *guide.parameters()])
    for ours, theirs in zip(slopes, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_batch_normalization_is_trained_on_the_rows_of_all_particles():
    model, guide = pair_of(Normalized)
    norm = model.decoder.norm
    pair, objective = Pair(model, guide), make_objective("iwae", particles=4)
    objective.prepare(pair, (X,))
    before, seen = norm.running_mean.clone(), []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with pair.mode(training=True):
        objective.estimate(pair, X)
    (rows,) = seen
    assert rows.shape == (4 * N, 64)
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * rows.mean(0))


def test_pyros_vectorized_particles_loop_where_a_plate_is_not_taken():
    model, guide = pair_of(Shares)
    pair = Pair(model, guide)
    inspect_pair(pair, X)
    losses = []
    for vectorized in (True, False):
        loss = pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=vectorized)
        torch.manual_seed(0)
        losses.append(estimate(loss, pair, X).loss)
    assert losses[0] == losses[1]


def test_training_and_evaluation_can_be_captured(monkeypatch):
    """What was recorded of either runs as it is here, so that no kernel has to be made."""
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
    found = []
    for compile in (False, True):
        model, guide = pair_of(Joined)
        fit = pyrovae.fit(
            model, guide, X, objective="iwae", epochs=1, batch_size=32, seed=0, compile=compile
        )
        ll = pyrovae.log_likelihood(model, guide, X, num_samples=64, seed=0, compile=compile)
        found.append(torch.tensor([fit.history[-1]["train_elbo"], ll.mean]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def cluster_model(x):
    """A discrete latent that is summed over, above a network with a softmax over dimension 1."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
        shares = torch.softmax(z, dim=1)
        y = pyro.sample("y", dist.Categorical(shares), infer={"enumerate": "parallel"})
        means = (2.0 * y.unsqueeze(-1) - 2) * torch.ones(WIDTH)
        pyro.sample("x", dist.Normal(means, 1.0).to_event(1), obs=x)


def plain_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :LATENT], 1.0).to_event(1))


def test_latents_that_are_summed_over_are_summed_for_each_particle():
    pair = Pair(cluster_model, plain_guide)
    inspect_pair(pair, X)
    assert pair.folds
    values, _ = pair.draw((X,), 5)
    found, _ = pair.score_model((X,), 5, values)
    z = values["z"]
    prior = z.log_softmax(-1)
    means = 2.0 * torch.arange(LATENT) - 2
    fit = Normal(means[:, None, None], 1.0).log_prob(X).sum(-1).T
    exact = Normal(0.0, 1.0).log_prob(z).sum(-1) + (prior + fit).logsumexp(-1)
    torch.testing.assert_close(sum(found.values()), exact, rtol=1e-5, atol=1e-3)
    drawn = samples(pair.trace_summed(values, X, particles=5))["y"]["value"]
    assert drawn.shape == (5, N)
    share = (prior + fit).softmax(-1)
    likely = share.amax(-1) > 1 - 1e-6
    assert torch.equal(drawn[likely], share.argmax(-1)[likely])


def subsampled(program, size):
    def wrapped(x):
        with pyro.plate("data", size, subsample_size=len(x)):
            program(x)

    return wrapped


def test_particles_share_the_subsample_and_its_scale():
    decoder = Shares()

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x[:, :LATENT], 1.0).to_event(1))

    pair = Pair(subsampled(model, 100), subsampled(guide, 100))
    inspect_pair(pair, X)
    assert pair.folds
    model_trace, guide_trace = pair.trace(X, particles=3)
    for trace in (model_trace, guide_trace):
        for site in samples(trace).values():
            assert site["scale"] == pytest.approx(100 / N)
            assert {(f.name, f.size) for f in site["cond_indep_stack"]} == {
                ("particles", 3),
                ("data", N),
            }


@pytest.mark.parametrize("name", ["two_layer", "ladder", "gmvae", "semi_supervised", "mixed"])
@pytest.mark.parametrize("objective", ["iwae", "iwae_dreg", "beta_elbo", "reweighted_wake_sleep"])
def test_folded_and_with_a_plate_a_pair_has_one_loss_and_one_gradient(name, objective):
    if objective not in ZOO[name].objectives:
        return
    found = []
    for folds in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = ZOO[name].make()
        pair, loss = Pair(model, guide), make_objective(objective, particles=3)
        loss.prepare(pair, args)
        assert not pair.folds
        pair.folds = folds
        pyro.set_rng_seed(1)
        each = loss.estimate(pair, *args)
        leaves = [*pair.named().values()]
        found.append([each.loss, *torch.autograd.grad(each.surrogate, leaves, allow_unused=True)])
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_flows_know_their_own_draws_and_supports_their_rows():
    torch.manual_seed(0)
    flow = dist.transforms.affine_autoregressive(LATENT)
    decoder = Shares()

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Uniform(top - 1, top + 1))
            w = pyro.sample("w", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(w) + z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x[:, 0], 1.0))
            pyro.sample("z", dist.Uniform(top - 1, top + 1))
            base = dist.Normal(x[:, :LATENT], 1.0).to_event(1)
            pyro.sample("w", dist.TransformedDistribution(base, [flow]))

    pair = Pair(model, guide)
    inspect_pair(pair, X)
    assert pair.folds
    trace = pair.trace_guide(X, particles=4)
    node = trace.nodes["w"]
    assert isinstance(node["fn"], Folded)
    own, again = node["fn"].log_prob(node["value"]), node["fn"].log_prob(node["value"].clone())
    torch.testing.assert_close(own, again, rtol=1e-4, atol=1e-4)
    support = trace.nodes["z"]["fn"].support
    assert support.lower_bound.shape == (4, N)
    assert bool(support.check(trace.nodes["z"]["value"]).all())
    found = pyrovae.annealed_log_likelihood(
        model, guide, X[:8], num_chains=2, num_temperatures=5, seed=0, compile=False
    )
    assert bool(found.log_prob.isfinite().all())


@pytest.mark.parametrize(
    "network", [lambda: nn.Linear(LATENT, WIDTH), Joined], ids=["plate", "rows"]
)
def test_a_plate_without_a_size_holds_the_batch_that_is_in_it(network):
    torch.manual_seed(0)
    decoder = network()

    def pair(sized):
        def plate(x):
            return pyro.plate("data", len(x)) if sized else pyro.plate("data")

        def model(x):
            with plate(x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), LATENT), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        def guide(x):
            with plate(x):
                pyro.sample("z", dist.Normal(x[:, :LATENT], 1.0).to_event(1))

        return model, guide

    sized, free = (
        (
            pyrovae.elbo(*pair(kind), X[:8], particles=4, seed=0).elbo,
            pyrovae.log_likelihood(*pair(kind), X[:8], num_samples=8, seed=0).log_prob,
        )
        for kind in (True, False)
    )
    for ours, theirs in zip(sized, free, strict=True):
        torch.testing.assert_close(ours, theirs)
