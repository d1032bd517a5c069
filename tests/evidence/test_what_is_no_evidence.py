"""Pairs that give no log p(x) of each datum are refused wherever one would be reported."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from known_pairs import KNOWN, Linear, draw

import pyrovae
from pairs import binary, shipped_bernoulli
from pyrovae.diagnostics import inference_gaps
from pyrovae.evidence.annealing import annealed_log_likelihood
from pyrovae.evidence.importance import log_likelihood
from pyrovae.objectives import per_datum
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.support import possible, support_of

X = draw(8, 4)
EVERYWHERE = {
    "log_likelihood": lambda *pair: log_likelihood(*pair, num_samples=10, seed=0),
    "annealed": lambda *pair: annealed_log_likelihood(*pair, num_temperatures=1, seed=0),
    "elbo": pyrovae.elbo,
    "diagnose": pyrovae.diagnose,
    "gaps": lambda *pair: inference_gaps(*pair, refine_steps=1, num_samples=10),
}
everywhere = pytest.mark.parametrize("report", EVERYWHERE.values(), ids=EVERYWHERE)


class Outside(Linear):
    """With a factor of the whole batch."""

    def forward(self, x):
        if not self.encodes:
            pyro.factor("penalty", torch.tensor(-7.0))
        super().forward(x)


@everywhere
def test_a_factor_outside_of_the_plate_is_no_datum_s(report):
    with pytest.raises(ValueError, match=r"'penalty' lies outside the plate 'data', so it belongs"):
        report(Outside(False), Outside(True), X)


class Trained(Outside):
    """The same with something to train."""

    def __init__(self, encodes):
        super().__init__(encodes, torch.nn.Linear(2, 4))

    @classmethod
    def pair(cls):
        return cls(False), cls(True)


# Half of each program is not used.
@pytest.mark.filterwarnings("ignore:No gradient reaches")
def test_a_factor_outside_of_the_plate_trains_but_is_not_validated():
    optim, how = pyro.optim.Adam({"lr": 0.01}), {"epochs": 1, "batch_size": 4, "compile": False}
    svi = pyrovae.SVI(*Trained.pair(), optim, pyro.infer.Trace_ELBO(), compile=False)
    assert math.isfinite(svi.step(X))
    fit = pyrovae.fit(*Trained.pair(), X, **how, objective="trace_elbo", seed=0)
    assert math.isfinite(fit.history[-1]["train_loss"])
    data = pyrovae.Dataset("two", X[0].shape, train=X, valid=X)
    for refused in (
        lambda: per_datum(pyro.infer.Trace_ELBO(), Pair(*Trained.pair()), X),
        lambda: pyrovae.fit(*Trained.pair(), data, **how, objective="trace_elbo", seed=0),
    ):
        with pytest.raises(ValueError, match="'penalty' lies outside"):
            refused()


@everywhere
def test_masks_that_differ_between_the_programs_are_refused(report):
    class Unmasked(Linear):
        def forward(self, x, there):
            super().forward(x)

    model, _, args, _ = KNOWN["masked"]()
    with pytest.raises(ValueError, match="'z' is masked otherwise in the model than in the guide"):
        report(model, Unmasked(True), *args)


@everywhere
def test_what_depends_on_masked_values_is_refused(report):
    _, guide, args, _ = KNOWN["masked"]()

    def model(x, there):
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), 2), 1.0)
            z = pyro.sample("z", prior.mask(there).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) + 0 * x, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"'x' of the model depends on values of \['z'\] that are"):
        report(model, guide, *args)


def test_a_mask_that_depends_on_a_latent_is_not_refined():
    class Depends(torch.nn.Module):
        def __init__(self, encodes):
            super().__init__()
            self.encodes = encodes

        def forward(self, x):
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(torch.zeros(len(x)), 1.0))
                b = pyro.sample("b", dist.Normal(torch.zeros(len(x)), 1.0).mask(a > 0))
                if not self.encodes:
                    loc = torch.where(a > 0, a + b, a)
                    pyro.sample("x", dist.Normal(loc[..., None], 1.0).to_event(1), obs=x)

    pair, x = (Depends(False), Depends(True)), draw(6, 1)
    assert log_likelihood(*pair, x, num_samples=100, seed=0).log_prob.isfinite().all()
    with pytest.raises(ValueError, match=r"\['b'\] are masked\) depends on latents"):
        log_likelihood(*pair, x, num_samples=100, refine_steps=2, seed=0)


def test_a_guide_that_leaves_the_prior_s_simplex_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            share = pyro.sample("share", dist.Dirichlet(torch.ones(len(x), 3)))
            pyro.sample("x", dist.Normal(share[..., :1], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("share", dist.LogNormal(x.new_zeros(len(x), 3), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"'share' outside the support of its prior, Simplex"):
        log_likelihood(model, guide, draw(6, 1), seed=0)


def test_part_of_a_datum_has_no_log_likelihood_of_the_whole():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("pixels", 4, subsample_size=2, dim=-1) as part:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, part])

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0))

    assert pyrovae.elbo(model, guide, X).elbo.isfinite().all()
    for estimate in (log_likelihood, annealed_log_likelihood):
        with pytest.raises(ValueError, match=r"Plates \['pixels'\] subsample within a datum"):
            estimate(model, guide, X, seed=0)


def test_a_loop_over_part_of_a_datum_is_a_part_too():
    # All columns are alike, so that any two of four, each counted twice, are worth the four.
    def program(encodes, size):
        def run(x):
            with pyro.plate("data", len(x)):
                if encodes:
                    pyro.sample("z", dist.Normal(x.mean(-1), 1e-5))
                    return
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                for i in pyro.plate("columns", 4, subsample_size=size):
                    pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[:, i])

        return run

    x = X[:, :1].expand(-1, 4)
    objective = "trace_mean_field_elbo"
    whole = pyrovae.elbo(program(False, None), program(True, None), x, objective=objective)
    part = pyrovae.elbo(program(False, 2), program(True, 2), x, objective=objective)
    for ours, theirs in zip(part, whole, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3)
    with pytest.raises(ValueError, match=r"Plates \['columns'\] subsample within a datum"):
        log_likelihood(program(False, 2), program(True, 2), x, seed=0)


def test_every_tile_of_data_has_to_be_possible():
    x = binary(130)
    x[100, 0, 0, 0] = 0.5
    for name in ("log_likelihood", "annealed", "diagnose"):
        with pytest.raises(
            ValueError, match=r"'x' observes 0\.5, outside the support of Bernoulli"
        ):
            EVERYWHERE[name](*shipped_bernoulli(), x)


def test_bounds_that_a_transform_moved_are_known():
    """An exponential guide that starts at -2, under an exponential prior."""

    def wide(x):
        with pyro.plate("data", len(x)):
            shifted = dist.TransformedDistribution(
                dist.Exponential(0.3 + 0 * x[:, 0]), [dist.transforms.AffineTransform(-2.0, 1.0)]
            )
            pyro.sample("n", shifted)

    def model(x):
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Exponential(1.0 + 0 * x[:, 0]))
            pyro.sample("x", dist.Normal(n[..., None], 1.0).to_event(1), obs=x)

    x, nodes = draw(5, 1), torch.arange(0.0005, 30, 0.001, dtype=torch.float64)
    joint = dist.Normal(nodes, 1.0).log_prob(x.double()) - nodes
    exact = joint.logsumexp(1) + math.log(0.001)
    found = log_likelihood(model, wide, x, num_samples=4000, seed=0)
    assert ((found.log_prob - exact).abs() < 4 * found.standard_error).all()
    assert found.uncovered == 0


SUPPORTS = {
    "exponential": (dist.Exponential(torch.ones(3)), [-1.0, 0.5, 2.0], [0, 1, 1]),
    "uniform": (dist.Uniform(torch.zeros(3), 1.0), [-1.0, 0.5, 2.0], [0, 1, 0]),
    "angle": (dist.VonMises(torch.zeros(3), 1.0), [-4.0, 0.5, 3.0], [0, 1, 1]),
    "event": (dist.Gamma(torch.ones(2, 2), 1.0).to_event(1), [[1.0, -1.0], [1.0, 1.0]], [0, 1]),
    "masked": (
        dist.Gamma(torch.ones(2), 1.0).mask(torch.tensor([False, True])),
        [-1.0, -1.0],
        [1, 0],
    ),
    "mixture of parts": (
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)),
            dist.Uniform(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])),
        ),
        [0.5, 1.5, 2.5],
        [1, 0, 1],
    ),
    "shifted": (
        dist.TransformedDistribution(
            dist.Exponential(torch.ones(3)), [dist.transforms.AffineTransform(1.0, 2.0)]
        ),
        [0.5, 1.5, -3.0],
        [0, 1, 0],
    ),
    "not a number": (dist.Exponential(torch.ones(2)), [math.nan, -1.0], [1, 0]),
}
FREE = {
    "normal": dist.Normal(torch.zeros(2), 1.0).to_event(1),
    "flow": dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0), [dist.transforms.AffineTransform(1.0, 2.0)]
    ),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    ),
    "simplex": dist.Dirichlet(torch.ones(3)),
}


@pytest.mark.parametrize("case", SUPPORTS)
def test_what_is_possible_is_told_through_every_wrapper(case):
    fn, value, expected = SUPPORTS[case]
    assert possible(fn, torch.tensor(value)).tolist() == [bool(e) for e in expected]


@pytest.mark.parametrize("case", FREE)
def test_nothing_is_looked_at_where_every_value_is_possible(case):
    fn = FREE[case]
    assert possible(fn, torch.zeros(fn.shape())) is None


def test_an_angle_has_the_support_of_one_turn():
    for fn in (dist.VonMises(0.0, 1.0), dist.VonMises(torch.zeros(2), 1.0).to_event(1)):
        transform = torch.distributions.biject_to(support_of(fn))
        u = torch.tensor([2.0, 5.0])
        z = transform(u)
        torch.testing.assert_close(z, torch.tensor([2.0, 5.0 - 2 * math.pi]))
        assert transform.log_abs_det_jacobian(u, z).abs().sum() == 0
        assert torch.equal(transform.inv(z), z)


def test_a_layout_knows_of_what_lies_outside_of_the_plate():
    pair = Pair(Outside(False), Outside(True))
    assert inspect_pair(pair, X).adrift == ("penalty",)
    assert inspect_pair(Pair(Linear(False), Linear(True)), X).adrift == ()


def test_a_pair_without_latents_has_nothing_to_refine_or_to_anneal():
    loc = torch.nn.Parameter(torch.zeros(4))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    pair = model, lambda x: None
    exact = dist.Normal(0.0, 1.0).log_prob(X).sum(-1).double()
    found = log_likelihood(*pair, X, num_samples=30, seed=0)
    torch.testing.assert_close(found.log_prob, exact)
    assert found.khat.max() < 0.7
    assert pyrovae.elbo(*pair, X, particles=3).mean == pytest.approx(exact.mean().item())
    for report in (
        lambda: log_likelihood(*pair, X, num_samples=10, refine_steps=2),
        lambda: annealed_log_likelihood(*pair, X, num_temperatures=1),
        lambda: pyrovae.bidirectional(*pair, like=X, num_temperatures=1),
    ):
        with pytest.raises(pyrovae.InputError, match="nothing to anneal: log_likelihood as it is"):
            report()
