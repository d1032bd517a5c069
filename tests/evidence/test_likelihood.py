"""log p(x) against closed forms, and the errors that it states."""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae
from pairs import LATENT, binary, discrete, shipped_bernoulli
from pyrovae._tools import precision
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.evidence.pareto import pareto_smooth, tail_length
from pyrovae.guides.linear_gaussian import LinearGaussian as ExactGuide
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.models.linear_gaussian import LinearGaussian
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import site_scores

X = binary()


def _linear(latent=4, n=200):
    pyro.set_rng_seed(5)
    model = LinearGaussian((1, 8, 8), latent)
    return model, pyrovae.sample(model, like=torch.zeros(1, 1, 8, 8), n=n, seed=1)


def test_exact_guide_gives_the_closed_form_with_constant_weights():
    model, x = _linear()
    guide = ExactGuide((1, 8, 8), 4).match(model)
    found = pyrovae.log_likelihood(model, guide, x, num_samples=50, seed=0)
    torch.testing.assert_close(found.log_prob, model.log_prob(x).double(), atol=1e-4, rtol=0)
    assert found.ess.min() > 50 - 1e-6
    assert found.standard_error.max() < 1e-5
    assert found.mean == pytest.approx(model.log_prob(x).double().mean().item(), abs=1e-4)


def test_mean_field_guide_is_within_its_stated_error_of_the_closed_form():
    model, x = _linear(n=300)
    guide = MeanField((1, 8, 8), 4, ())
    pyrovae.fit(model, guide, x, epochs=60, batch_size=50, lr=0.01, seed=0)
    model, _ = _linear()
    found = pyrovae.log_likelihood(model, guide, x, num_samples=2000, seed=0)
    exact = model.log_prob(x).double()
    z = (found.log_prob - exact) / found.standard_error
    assert (z.abs() < 3).double().mean() >= 0.95
    assert z.abs().mean() > 0.3
    assert (
        abs(found.mean - model.log_prob(x).double().mean().item()) < 4 * found.mean_standard_error
    )


def test_discrete_latents_agree_with_the_sum_over_their_values():
    model, guide = discrete()
    with torch.no_grad():
        logits = model.net(torch.eye(3))
        each = dist.Bernoulli(logits=logits).to_event(3).log_prob(X[:, None])
    exact = torch.logsumexp(each - math.log(3), dim=1).double()
    found = pyrovae.log_likelihood(model, guide, X, num_samples=4000, seed=0)
    assert ((found.log_prob - exact).abs() < 5 * found.standard_error + 1e-5).all()


@pytest.mark.parametrize("rows", [1, 64, 640, 10**6])
def test_the_result_does_not_depend_on_the_chunking(rows):
    pair, x = shipped_bernoulli(), binary(100)
    expected = pyrovae.log_likelihood(*pair, x, num_samples=300, seed=3)
    found = pyrovae.log_likelihood(*pair, x, num_samples=300, seed=3, max_rows=rows)
    torch.testing.assert_close(found.log_prob, expected.log_prob, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.ess, expected.ess, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.khat, expected.khat, rtol=1e-3, atol=1e-3)


def test_memory_is_bounded_by_the_rows_scored_at_once():
    seen = []
    model, guide = shipped_bernoulli()

    def watched(x):
        model(x)
        seen.append(watched.rows)

    watched.rows = 0

    def count(module, inputs, output):
        watched.rows = output[..., 0, 0, 0].numel()

    handle = model.decoder.register_forward_hook(count)
    pyrovae.log_likelihood(watched, guide, binary(130), num_samples=500, max_rows=256, seed=0)
    handle.remove()
    assert max(seen) == 256
    assert len(seen) > 130 * 500 / 256


def test_errors_and_effective_sizes_are_those_of_the_weights():
    model, guide = shipped_bernoulli()
    with torch.no_grad():
        model.decoder.layers[-1].weight.mul_(6)
    found = pyrovae.log_likelihood(model, guide, X, num_samples=100, seed=2)
    parameters = Pair(model, guide)
    layout = inspect_pair(parameters, X)
    with torch.no_grad():
        with seeded(subseed(subseed(2, 0), 0)):
            guide_trace = parameters.trace_guide(X, particles=100)
        model_trace = parameters.replay_model(guide_trace, X, particles=100)
        scores = site_scores(model_trace, layout, 100, len(X))
        q = site_scores(guide_trace, layout, 100, len(X))
        log_weight = (scores["z"] + scores["x"] - q["z"]).double()
    weight = (log_weight - log_weight.amax(0)).exp()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.log_prob, log_weight.logsumexp(0) - math.log(100), **close)
    torch.testing.assert_close(found.standard_error, weight.std(0) / 10 / weight.mean(0), **close)
    torch.testing.assert_close(found.ess, weight.sum(0) ** 2 / (weight**2).sum(0), **close)


def test_more_samples_raise_the_bound_and_shrink_the_error():
    model, guide = shipped_bernoulli()
    with torch.no_grad():
        model.decoder.layers[-1].weight.mul_(6)
    found = [pyrovae.log_likelihood(model, guide, X, num_samples=k, seed=0) for k in (5, 50, 5000)]
    assert found[0].mean < found[1].mean < found[2].mean
    assert found[1].mean_standard_error > 3 * found[2].mean_standard_error


def test_khat_is_that_of_arviz():
    """Where ArviZ 0.x and 1.x agree on the length of the tail: 3√K is whole."""
    generator = torch.Generator().manual_seed(0)
    for draws in (100, 400, 2500):
        noise = torch.randn(6, draws, generator=generator, dtype=torch.float64)
        spread = torch.tensor([0.3, 0.7, 1.0, 1.5, 2.5, 4.0])[:, None]
        log_weight = spread * noise
        tail = log_weight.sort(dim=1).values[:, -(tail_length(draws) + 1) :]
        expected = torch.tensor(_arviz_khat(log_weight.numpy()))
        torch.testing.assert_close(pareto_smooth(tail, draws)[0], expected, rtol=1e-6, atol=1e-6)


def _arviz_khat(log_weight):
    try:
        from arviz import psislw
    except ImportError:
        from arviz_stats.base import array_stats

        return array_stats.psislw(-log_weight, axis=-1)[1]
    return psislw(log_weight)[1]


def test_khat_of_known_tails():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4, 100_000, generator=generator, dtype=torch.float64)
    shape = torch.tensor([0.2, 0.5, 0.8, 1.2], dtype=torch.float64)
    log_weight = -shape[:, None] * uniform.log()
    tail = log_weight.sort(dim=1).values[:, -(tail_length(100_000) + 1) :]
    assert (pareto_smooth(tail, 100_000)[0] - shape).abs().max() < 0.12
    assert torch.equal(pareto_smooth(torch.zeros(2, 60), 1000)[0], torch.zeros(2))
    assert pareto_smooth(torch.zeros(2, 3), 4)[0].isnan().all()


@pytest.mark.parametrize("samples", [200, 1000])
def test_weights_equal_up_to_rounding_have_no_tail(samples):
    """With an exact posterior every weight is p(x), in float32 not to the last bit."""
    pyro.set_rng_seed(5)
    model, guide = LinearGaussian((1, 1, 4), 2), ExactGuide((1, 1, 4), 2)
    guide.match(model)
    x = pyrovae.sample(model, like=torch.zeros(1, 1, 1, 4), n=40, seed=1)
    found = pyrovae.log_likelihood(model, guide, x, num_samples=samples, seed=0)
    assert bool((found.khat < 0.5).all()), found.khat
    assert found.verdict.kind == "good"
    step = torch.finfo(torch.float32).eps * 8
    noise = torch.tensor([0, 0, 1, -1, 2]).double().repeat(samples // 5) * step
    noise[:3] = 5 * step
    tail = (noise - 11).sort().values[None, -(tail_length(samples) + 1) :]
    assert pareto_smooth(tail, samples)[0] == 0


def test_weights_that_tie_with_the_threshold_are_no_part_of_the_tail():
    """As in ArviZ 0.23: a discrete latent gives few distinct weights, and no heavy tail by that."""
    import arviz  # here, as it takes a second

    generator = torch.Generator().manual_seed(2)
    levels = 0.2 * torch.arange(12, dtype=torch.float64)
    chosen = torch.randint(12, (4, 400), generator=generator)
    log_weight = torch.where(torch.arange(400) < 370, 0.0, levels[chosen])
    tail = log_weight.sort(dim=1).values[:, -(tail_length(400) + 1) :]
    assert bool((tail[:, 0] == tail[:, 20]).all())
    found = pareto_smooth(tail, 400)[0]
    if hasattr(arviz, "psislw"):  # ArviZ 1 has them in the tail
        expected = torch.tensor(_arviz_khat(log_weight.numpy()))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    two = torch.where(torch.arange(400) < 370, 0.0, torch.ones(1, 400, dtype=torch.float64))
    assert pareto_smooth(two[:, -61:], 400)[0] < 0.5
    few = torch.where(torch.arange(400) < 397, 0.0, torch.ones(1, 400, dtype=torch.float64))
    assert pareto_smooth(few[:, -61:], 400)[0] == math.inf


def test_data_that_lie_anyhow_are_evaluated_by_one_graph():
    """Data of stride 0, and a last tile that is filled up: compiled, at what a user leaves out."""
    pair, x = shipped_bernoulli(), X[:1].expand(70, -1, -1, -1)
    expected = pyrovae.log_likelihood(*pair, x, num_samples=100, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pyrovae.log_likelihood(*pair, x, num_samples=100, seed=0, compile=True)
    torch.testing.assert_close(found.log_prob, expected.log_prob, atol=1e-3, rtol=0)


def test_a_subsampling_plate_leaves_each_datum_its_own_log_likelihood():
    model, guide = shipped_bernoulli()

    class Subsampled:
        def __init__(self, program, encodes):
            self.program, self.encodes = program, encodes

        def __call__(self, x):
            rows = torch.arange(len(x))
            with pyro.plate("data", 1000, subsample=rows):
                if self.encodes:
                    loc, log_scale = guide.encoder(x).unbind(-2)
                    pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
                else:
                    z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
                    logits = model.decoder(z)
                    pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    plain = pyrovae.log_likelihood(model, guide, X, num_samples=200, seed=0)
    pair = Subsampled(model, False), Subsampled(guide, True)
    found = pyrovae.log_likelihood(*pair, X, num_samples=200, seed=0)
    torch.testing.assert_close(found.log_prob, plain.log_prob)


def test_a_masked_site_counts_for_nothing():
    model, guide = shipped_bernoulli()
    keep = torch.arange(len(X)) % 2 == 0

    class Masked:
        def __call__(self, x):
            with pyro.poutine.mask(mask=keep):
                model(x)

    def masked_guide(x):
        with pyro.poutine.mask(mask=keep):
            guide(x)

    plain = pyrovae.log_likelihood(model, guide, X, num_samples=100, seed=0)
    found = pyrovae.log_likelihood(Masked(), masked_guide, X, num_samples=100, seed=0)
    torch.testing.assert_close(found.log_prob[keep], plain.log_prob[keep])
    assert (found.log_prob[~keep] == 0).all()


def test_seeds_are_repeatable_and_leave_the_global_stream_alone():
    pair = shipped_bernoulli()
    before = torch.get_rng_state()
    one = pyrovae.log_likelihood(*pair, X, num_samples=20, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    two = pyrovae.log_likelihood(*pair, X, num_samples=20, seed=1)
    other = pyrovae.log_likelihood(*pair, X, num_samples=20, seed=2)
    assert torch.equal(one.log_prob, two.log_prob)
    assert not torch.equal(one.log_prob, other.log_prob)
    drawn = [pyrovae.log_likelihood(*pair, X, num_samples=20).log_prob for _ in range(2)]
    assert not torch.equal(*drawn)


def test_bad_input_is_named():
    model, guide = shipped_bernoulli()
    with pytest.raises(ValueError, match="num_samples >= 1, got 0"):
        pyrovae.log_likelihood(model, guide, X, num_samples=0)
    with pytest.raises(ValueError, match="at least one datum"):
        pyrovae.log_likelihood(model, guide, X[:0])

    def broken(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            logits = (
                model.decoder(z) / (x.flatten(1).sum(-1) != x[5].sum()).float()[:, None, None, None]
            )
            logits = logits * (x.flatten(1).sum(-1) != x[5].sum()).float()[:, None, None, None]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    first = int((X.flatten(1).sum(-1) == X[5].sum()).nonzero()[0])
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match=rf"'x' in the model is NaN for datum {first}"),
    ):
        pyrovae.log_likelihood(broken, guide, X, num_samples=10, seed=0)


def test_a_single_sample_states_no_error():
    found = pyrovae.log_likelihood(*shipped_bernoulli(), X, num_samples=1, seed=0)
    assert found.standard_error.isnan().all()
    assert found.log_prob.isfinite().all()


def test_weights_of_zero_give_minus_infinity():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.full((len(x),), 2.0), 3.0))

    found = pyrovae.log_likelihood(model, guide, torch.zeros(3, 2), num_samples=50, seed=0)
    assert (found.log_prob == -math.inf).all()


def test_standard_errors_of_the_mean_are_those_of_draws_and_of_data():
    found = pyrovae.LogLikelihood(
        log_prob=torch.tensor([-3.0, -5.0, -10.0]),
        standard_error=torch.tensor([0.2, 0.1, 0.2]),
        ess=torch.ones(3),
        khat=torch.zeros(3),
        num_samples=9,
    )
    assert found.mean == pytest.approx(-6.0)
    assert found.mean_standard_error == pytest.approx(0.3 / 3)
    assert found.data_standard_error == pytest.approx((13 / 3) ** 0.5)


@pytest.mark.parametrize("estimate", [pyrovae.log_likelihood, pyrovae.annealed_log_likelihood])
def test_scales_are_those_of_training_alone(estimate):
    """One for all, one for each datum, one within a datum, or one of a single program."""
    how = {"seed": 0, "compile": False}
    if estimate is pyrovae.annealed_log_likelihood:
        how |= {"num_chains": 4, "num_temperatures": 2}
    pair, each = shipped_bernoulli(), torch.linspace(0.5, 2.0, len(X))
    plain = estimate(*pair, X, **how)
    for model_scale, guide_scale in ((3.0, 3.0), (each, each), (1.0, 0.1)):
        model = pyro.poutine.scale(pair[0], scale=model_scale)
        guide = pyro.poutine.scale(pair[1], scale=guide_scale)
        found = estimate(model, guide, X, **how)
        for name in ("log_prob", "standard_error", "ess"):
            assert torch.equal(getattr(found, name), getattr(plain, name))
        assert torch.equal(found.curve.log_prob, plain.curve.log_prob)

    def pixels(x, scale=1.0):
        rows, columns = pyro.plate("data", len(x), dim=-2), pyro.plate("pixel", 2, dim=-1)
        with pyro.poutine.scale(scale=scale), rows, columns:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixel", 2, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    scaled = partial(pixels, scale=1 + torch.arange(10.0).reshape(5, 2))
    found, expected = (estimate(m, guide, torch.zeros(5, 2), **how) for m in (scaled, pixels))
    assert torch.equal(found.log_prob, expected.log_prob)
    elbo = pyrovae.elbo(scaled, guide, torch.zeros(5, 2), seed=0)
    assert torch.equal(elbo.elbo, pyrovae.elbo(pixels, guide, torch.zeros(5, 2), seed=0).elbo)


def test_a_nan_past_the_first_tile_names_its_datum():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = torch.where(x == 1, math.nan, z)
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False), obs=x)

    x = torch.zeros(70)
    x[66] = 1
    with pytest.raises(ValueError, match="'x' in the model is NaN for datum 66"):
        pyrovae.log_likelihood(model, guide, x, num_samples=5, seed=0)


def test_infinity_minus_infinity_is_refused():
    model, guide = shipped_bernoulli()

    def never(x):
        model(x)
        with pyro.plate("factors", len(x)):
            for name, value in (("no", -math.inf), ("yes", math.inf)):
                pyro.factor(name, torch.full((len(x),), value))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="infinity minus infinity"):
        pyrovae.log_likelihood(never, guide, X, num_samples=5, seed=0)


def test_compiled_weights_are_those_of_the_handlers(monkeypatch):
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
    pair, x = shipped_bernoulli(), binary(70)
    expected = pyrovae.log_likelihood(*pair, x, num_samples=150, seed=3, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pyrovae.log_likelihood(*pair, x, num_samples=150, seed=3, compile=True)
    torch.testing.assert_close(found.log_prob, expected.log_prob, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.ess, expected.ess, rtol=1e-3, atol=0)
    assert expected.curve.num_samples == (1, 10, 100, 150)


def test_a_precision_is_taken_named_and_given_back(monkeypatch):
    seen, pair = set(), shipped_bernoulli()

    def model(x):
        seen.add(torch.get_float32_matmul_precision())
        pair[0](x)

    monkeypatch.setattr(precision, "rounds", lambda *args: True)
    before = torch.get_float32_matmul_precision()
    options = {"num_samples": 20, "seed": 0}
    with precision.matmul_precision("bf16"):  # of the caller, which no evaluation takes over
        pyrovae.elbo(model, pair[1], X, seed=0)
        expected = pyrovae.log_likelihood(model, pair[1], X, **options)
    assert seen == {"highest"}
    found = pyrovae.log_likelihood(model, pair[1], X, precision="bf16", **options)
    assert seen == {"highest", "medium"}
    assert torch.get_float32_matmul_precision() == before
    assert found.method == f"{expected.method}, with bf16 products"
    # Factors of 8 bits: sums over 64 pixels of terms of size 1 move by a few hundredths.
    torch.testing.assert_close(found.log_prob, expected.log_prob, atol=0.3, rtol=0)


def test_a_precision_that_changes_nothing_is_refused(monkeypatch):
    pair = shipped_bernoulli()
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        pyrovae.log_likelihood(*pair, X, precision="bf61")
    monkeypatch.setattr(precision, "rounds", lambda *args: False)
    pyrovae.log_likelihood(*pair, X, num_samples=2, precision="float32")
    for name in ("bf16", "tf32"):
        with pytest.raises(ValueError, match=f"Expected a device with {name} units"):
            pyrovae.log_likelihood(*pair, X, precision=name)
    pair = [each.double() for each in pair]
    with pytest.raises(ValueError, match="Expected float32 weights for precision='bf16'"):
        pyrovae.log_likelihood(*pair, X.double(), precision="bf16")


@pytest.mark.skipif(
    not precision.rounds("bf16", torch.device("cpu")), reason="no bf16 units in this processor"
)
def test_products_in_bf16_are_rounded_where_the_processor_has_them():
    pair = Bernoulli((1, 28, 28), 20, (400,)), MeanField((1, 28, 28), 20, (400,))
    x = (torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    full, low = (
        pyrovae.log_likelihood(*pair, x, num_samples=50, seed=0, precision=name).log_prob
        for name in ("float32", "bf16")
    )
    assert 1e-4 < (low - full).abs().max() < 0.5


def test_a_model_without_latents_needs_no_samples():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)

    def guide(x):
        pass

    x = torch.randn(5, 3)
    found = pyrovae.log_likelihood(model, guide, x, num_samples=30, seed=0)
    exact = dist.Normal(0.0, 1.0).log_prob(x).sum(-1).double()
    torch.testing.assert_close(found.log_prob, exact)
    assert (found.ess - 30).abs().max() < 1e-6
