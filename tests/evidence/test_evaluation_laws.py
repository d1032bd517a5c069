"""What every estimate of log p(x) must obey: exactness, honest errors, one answer for one seed."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from forks import Fork
from oracles import ORACLES, Normals, curved, linear_gaussian

import pyrovae
from pairs import binary, shipped_bernoulli, two_latents
from pyrovae.evidence.annealing import annealed_log_likelihood
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.pareto import pareto_smooth, tail_length
from pyrovae.evidence.result import LogLikelihood, compare_log_likelihood
from pyrovae.evidence.weights import Sums, Tail, curve_points
from pyrovae.pairs.traces import site_log_prob as log_prob

X = binary()
each_oracle = pytest.mark.parametrize("make", ORACLES.values(), ids=ORACLES)


def _within(found, exact, slack=0.0):
    """Errors as large as stated, one by one and in the mean."""
    z = (found.log_prob - exact) / (found.standard_error + slack)
    assert z.square().mean().sqrt() < 2.0
    assert abs(found.mean - exact.mean().item()) < 4 * found.mean_standard_error + slack


@each_oracle
def test_importance_sampling_is_exact_within_its_stated_error(make):
    model, guide, x, exact = make()
    found = log_likelihood(model, guide, x, num_samples=8000, seed=1)
    _within(found, exact)
    assert found.mean_standard_error < 0.05


@each_oracle
def test_annealing_is_exact_within_its_stated_error(make):
    model, guide, x, exact = make()
    how = {"num_temperatures": 12, "num_steps": 3, "num_chains": 128, "seed": 2}
    found = annealed_log_likelihood(model, guide, x, **how)
    _within(found, exact)
    assert found.mean_standard_error < 0.1
    assert 0.5 < found.acceptance.mean() < 0.95


def test_stated_errors_of_importance_sampling_cover_two_hundred_repeats():
    model, guide, x, exact = linear_gaussian(stretch=1.3)
    found = log_likelihood(model, guide, x[:1].expand(200, -1), num_samples=400, seed=0)
    z = (found.log_prob - exact[0]) / found.standard_error
    assert 0.90 <= (z.abs() < 2).double().mean() <= 0.99
    assert 0.6 <= (z.abs() < 1).double().mean() <= 0.76


def test_stated_errors_of_annealing_cover_two_hundred_repeats():
    model, guide, x, exact = linear_gaussian(stretch=1.6, shift=0.8)
    how = {"num_temperatures": 3, "num_steps": 2, "num_chains": 64, "seed": 0}
    found = annealed_log_likelihood(model, guide, x[:1].expand(200, -1), **how)
    z = (found.log_prob - exact[0]) / found.standard_error
    assert 0.90 <= (z.abs() < 2).double().mean() <= 0.99
    assert found.standard_error.mean() > 0.02


def test_paired_differences_have_the_variance_that_they_state():
    model, guide, x, _ = linear_gaussian(n=64)
    rough = [log_likelihood(model, guide, x, num_samples=20, seed=s) for s in (0, 1)]
    found = compare_log_likelihood(*rough)
    assert abs(found.difference) < 3 * found.monte_carlo_standard_error
    assert found.standard_error == pytest.approx(found.monte_carlo_standard_error, rel=0.5)
    assert "cannot be told apart" in found.verdict


def test_the_bound_rises_with_the_number_of_samples_to_log_p():
    model, guide, x, exact = curved()
    found = log_likelihood(model, guide, x, num_samples=10_000, seed=0)
    assert found.curve.num_samples == (1, 10, 100, 1000, 10_000)
    means = list(found.curve.mean.values())
    assert means == sorted(means)
    assert (found.curve.log_prob.diff(dim=0) >= 0).all()
    torch.testing.assert_close(found.curve.log_prob[-1], found.log_prob)
    assert means[0] < exact.mean() - 2
    bound = pyrovae.elbo(model, guide, x, particles=10_000, seed=3)
    assert means[0] == pytest.approx(bound.mean, abs=1.0)


def test_sums_over_pieces_are_those_over_the_whole():
    generator = torch.Generator().manual_seed(0)
    log_weight = 2 * torch.randn(350, 3, generator=generator, dtype=torch.float64) - 500
    log_weight[7, 1] = -math.inf
    sums = Sums(350, [1, 30, 100, 350], torch.zeros(3))
    for piece in log_weight.split([1, 29, 128, 2, 190]):
        sums.add(piece)
    found, weight = sums.result(), (log_weight - log_weight.amax(0)).exp()
    torch.testing.assert_close(found["log_prob"], log_weight.logsumexp(0) - math.log(350))
    torch.testing.assert_close(found["ess"], weight.sum(0) ** 2 / (weight**2).sum(0))
    error = weight.std(0) / 350**0.5 / weight.mean(0)
    torch.testing.assert_close(found["standard_error"], error)
    for column, k in enumerate((1, 30, 100, 350)):
        whole = log_weight[: 350 // k * k].unflatten(0, (-1, k))
        expected = (whole.logsumexp(1) - math.log(k)).mean(0)
        torch.testing.assert_close(found["curve"][:, column], expected)


def test_smoothed_weights_are_those_of_arviz():
    """Where ArviZ 0.x and 1.x agree on the length of the tail: 3√K is whole."""
    generator = torch.Generator().manual_seed(1)
    for draws in (400, 2500):
        spread = torch.tensor([0.3, 1.0, 2.0, 4.0], dtype=torch.float64)[:, None]
        log_weight = spread * torch.randn(4, draws, generator=generator, dtype=torch.float64)
        log_weight = log_weight.sort(dim=1).values
        expected = torch.as_tensor(_arviz(log_weight.numpy().copy()))
        length = tail_length(draws)
        _, tail = pareto_smooth(log_weight[:, -(length + 1) :], draws)
        smoothed = torch.cat([log_weight[:, :-length], tail], 1)
        found = smoothed - smoothed.logsumexp(1, keepdim=True)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        sums = Sums(draws, [draws], torch.zeros(4))
        for part in log_weight.T[torch.randperm(draws, generator=generator)].split(100):
            sums.add(part)
        estimate = smoothed.logsumexp(1) - math.log(draws)
        torch.testing.assert_close(sums.result()["smoothed"], estimate)


def _arviz(log_weight):
    try:
        from arviz import psislw
    except ImportError:
        from arviz_stats.base import array_stats

        return array_stats.psislw(-log_weight, axis=-1)[0]
    return psislw(log_weight)[0]


def test_the_tail_is_kept_while_the_rest_passes_by():
    generator = torch.Generator().manual_seed(0)
    log_weight = torch.randn(5000, 2, generator=generator, dtype=torch.float64)
    tail = Tail(5000, torch.zeros(2, dtype=torch.float64))
    for part in log_weight.split(128):
        tail.add(part)
        assert sum(map(len, tail.waiting)) <= 4 * tail.keep + 128
    expected = log_weight.sort(dim=0).values[-(tail_length(5000) + 1) :].T
    assert torch.equal(tail.ascending(), expected)


@pytest.mark.parametrize("size", [7, 16, 25])
def test_fused_bernoullis_score_as_the_distribution_does(size):
    value = torch.bernoulli(torch.full((5, size), 0.4))
    logits = 40 * torch.randn(3, 5, size)
    logits[0, 0, 0] = -200.0
    fn = dist.Bernoulli(logits=logits).to_event(1)
    site = {"fn": fn, "value": value, "args": (), "kwargs": {}}
    expected = dist.Bernoulli(logits=logits.double()).to_event(1).log_prob(value.double())
    for fused in (False, True):
        with torch.no_grad():
            found = log_prob(site, fused=fused)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


def test_fused_bernoullis_have_the_slopes_of_the_distribution():
    value = torch.bernoulli(torch.full((5, 12), 0.4))
    logits = (10 * torch.randn(3, 1, 12)).requires_grad_()
    slopes = []
    for fused in (False, True):
        fn = dist.Bernoulli(logits=logits).to_event(1)
        found = log_prob({"fn": fn, "value": value, "args": (), "kwargs": {}}, fused=fused)
        (slope,) = torch.autograd.grad((found * torch.arange(5.0)).sum(), logits)
        slopes.append(slope)
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-5)


def test_draws_depend_on_a_datum_s_place_alone():
    pair, x = shipped_bernoulli(), binary(140)
    few, many = (log_likelihood(*pair, x[:n], num_samples=50, seed=3) for n in (100, 140))
    torch.testing.assert_close(few.log_prob, many.log_prob[:100], atol=1e-5, rtol=0)
    less = log_likelihood(*pair, x, num_samples=256, seed=3)
    more = log_likelihood(*pair, x, num_samples=300, seed=3, curve=[256])
    torch.testing.assert_close(more.curve.log_prob[0], less.log_prob, atol=1e-5, rtol=0)


def test_a_defensive_mixture_bounds_the_weights():
    model, guide, x, exact = linear_gaussian(latent=2, stretch=0.5, n=40)
    plain = log_likelihood(model, guide, x, num_samples=4000, seed=0)
    mixed = log_likelihood(model, guide, x, num_samples=4000, seed=0, defensive=0.1)
    assert (plain.khat > 0.5).double().mean() > 0.9
    assert (mixed.khat < plain.khat).double().mean() > 0.8
    assert mixed.mean_standard_error < plain.mean_standard_error
    _within(mixed, exact)
    assert mixed.method.endswith("for 10% of the draws, the prior")


def test_a_defensive_mixture_takes_any_latents():
    pair = two_latents()
    plain = log_likelihood(*pair, X, num_samples=4000, seed=0)
    mixed = log_likelihood(*pair, X, num_samples=4000, seed=1, defensive=0.2)
    found = compare_log_likelihood(plain, mixed)
    assert abs(found.difference) < 4 * found.monte_carlo_standard_error


class Halves(torch.nn.Module):
    """A guide that proposes positive values for a latent of either sign."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.HalfNormal(torch.ones(len(x), 2)).to_event(1))


def test_a_guide_that_covers_a_part_of_the_prior_is_told_of():
    model, _, x, exact = curved()
    found = log_likelihood(model, Halves(), x, num_samples=4000, seed=0)
    assert found.uncovered == pytest.approx(0.75, abs=0.12)
    assert "gives no density to" in found.verdict
    assert found.mean < exact.mean() - 1
    mixed = log_likelihood(model, Halves(), x, num_samples=8000, seed=0, defensive=0.5)
    _within(mixed, exact)
    assert "gives no density" not in mixed.verdict


@pytest.mark.parametrize("mix", [0.0, 0.2])
def test_refining_reaches_the_best_normal_of_independent_coordinates(mix):
    model, _, x, exact = linear_gaussian(latent=3, n=70)
    guide = Normals(3, 0.3, 2.0)
    found = log_likelihood(
        model, guide, x, num_samples=2000, seed=0, refine_steps=120, defensive=mix
    )
    precision = torch.linalg.inv(model.posterior(x[:1]).covariance_matrix[0].double())
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    bound = exact - gap
    elbo = pyrovae.elbo(model, guide, x, particles=200, seed=1).elbo.double()
    if mix == 0:
        best = found.curve.log_prob[0]
        assert best.mean().item() == pytest.approx(bound.mean().item(), abs=0.06)
        expected = (bound - elbo).mean().item()
        assert found.amortization_gap.mean().item() == pytest.approx(expected, rel=0.05)
    _within(found, exact)


def test_refining_works_on_other_supports_and_below_other_latents():
    model, guide, x, exact = ORACLES["constrained"]()
    found = log_likelihood(model, guide, x, num_samples=2000, seed=0, refine_steps=40)
    assert (found.log_prob - exact).abs().max() < 0.3
    assert (found.amortization_gap > 0).all()
    plain = log_likelihood(*two_latents(), X, num_samples=3000, seed=0)
    found = log_likelihood(*two_latents(), X, num_samples=50, seed=0, refine_steps=2)
    assert found.log_prob.isfinite().all()
    assert plain.amortization_gap is None


def test_guides_without_a_density_are_refused():
    model, guide, x, _ = linear_gaussian(latent=2)

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(guide.encoder(x)).to_event(1))

    def auxiliary(x):
        with pyro.plate("data", len(x)):
            side = pyro.sample("side", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(guide.encoder(x) + side[..., None], 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"one point at \['z'\]"):
        log_likelihood(model, point, x, seed=0)
    with pytest.raises(ValueError, match=r"auxiliary sites \['side'\]"):
        log_likelihood(model, auxiliary, x, seed=0)


def test_options_that_make_no_sense_are_named():
    model, guide, x, _ = linear_gaussian(latent=2)
    for options, message in (
        ({"defensive": 1.0}, "0 <= defensive < 1"),
        ({"refine_steps": -1}, "refine_steps >= 0"),
        ({"max_rows": 0}, "max_rows >= 1"),
        ({"compile": "yes"}, "compile='auto'"),
        ({"curve": (5, 2000)}, "curve over 1 to num_samples=1000"),
        ({"checkpoint": "/nowhere/at/all"}, "folder for the checkpoint"),
        ({"processes": True}, r"torch\.distributed to be initialized"),
    ):
        with pytest.raises(ValueError, match=message):
            log_likelihood(model, guide, x, **options)
    assert curve_points(1000) == [1, 10, 100, 1000]
    assert curve_points(64, [50, 5]) == [5, 50, 64]


def _result(**changed):
    numbers = {
        "log_prob": torch.tensor([-3.0, -5.0, -4.0]),
        "standard_error": torch.full((3,), 0.1),
    }
    numbers |= {"ess": torch.full((3,), 50.0), "khat": torch.zeros(3), "num_samples": 100}
    return LogLikelihood(**numbers | changed)


def test_verdicts_say_what_is_wrong_and_what_to_do():
    sound = _result().verdict
    assert "k-hat is at most 0.7 for all 3 data points: nothing in the weights speaks" in sound
    assert "no draw has reached" in sound
    assert "annealed_log_likelihood with initial='prior' may" in sound
    many = {"log_prob": torch.zeros(200), "standard_error": torch.full((200,), 0.1)}
    rare = _result(**many, khat=torch.tensor([0.9] + [0.1] * 199)).verdict
    assert "1 of 200 data points (0.5%)" in rare
    assert "refine" in rare
    refined = "importance sampling from the guide refined for each datum"
    assert "refine_steps" not in _result(khat=torch.full((3,), 0.9), method=refined).verdict
    heavy = _result(khat=torch.tensor([0.1, 0.9, math.inf])).verdict
    assert "unreliable for 2 of 3 data points (67%), where k-hat is above 0.7" in heavy
    assert "annealed_log_likelihood" in heavy
    assert "too few to tell" in _result(khat=torch.full((3,), math.nan)).verdict
    zero = _result(log_prob=torch.tensor([-3.0, -math.inf, -4.0])).verdict
    assert "All weights are zero for 1 of 3 data" in zero
    chains = {"acceptance": torch.full((3,), 0.7), "num_samples": 16}
    assert "bidirectional" in _result(**chains, ess=torch.full((3,), 12.0)).verdict
    few = _result(**chains, ess=torch.tensor([1.0, 12.0, 12.0])).verdict
    assert "1 of 3 data points (33%), where fewer than 8 of 16 chains make up" in few


KINDS = {
    "good": {},
    "fair": {"khat": torch.tensor([math.nan, 0.0, 0.0])},
    "fair, a heavy tail in twenty": {
        "log_prob": -torch.ones(20),
        "standard_error": torch.full((20,), 0.1),
        "khat": torch.tensor([0.9] + 19 * [0.0]),
    },
    "doubtful tails": {"khat": torch.tensor([0.0, 0.9, 0.0])},
    "doubtful, impossible": {"log_prob": torch.tensor([-3.0, -math.inf, -4.0])},
    "doubtful, uncovered": {"uncovered": 0.1},
    "doubtful, biased": {"standard_error": torch.full((3,), 2.0)},
    "good chains": {"acceptance": torch.full((3,), 0.7), "khat": torch.full((3,), math.nan)},
    "doubtful chains": {"acceptance": torch.full((3,), 0.7), "ess": torch.ones(3)},
}


@pytest.mark.parametrize("case", KINDS)
def test_a_verdict_has_a_kind_that_programs_decide_by(case):
    found = _result(**KINDS[case]).verdict
    assert found.kind == case.partition(",")[0].partition(" ")[0]
    again = pickle.loads(pickle.dumps(found))
    assert (again, again.kind) == (found, found.kind)


def test_the_bias_of_a_mean_is_told_where_its_error_hides_it():
    model, guide, x, exact = linear_gaussian(stretch=1.6, shift=0.5)
    found = log_likelihood(model, guide, x[:1].expand(1000, -1), num_samples=30, seed=0)
    bias = found.mean - exact[0].item()
    assert bias < -3 * found.mean_standard_error
    assert found.mean_bias == pytest.approx(bias, rel=0.4)
    assert "which its standard error does not contain" in found.verdict
    assert "does not contain" not in _result(standard_error=torch.full((3,), math.nan)).verdict


def test_a_comparison_is_paired():
    hard = torch.tensor([-100.0, -200.0, -50.0, -400.0], dtype=torch.float64)
    better = hard + torch.tensor([1.0, 1.2, 0.9, 1.1])
    noise = {"standard_error": torch.full((4,), 0.03), "ess": torch.ones(4), "khat": torch.ones(4)}
    a, b = (_result(log_prob=values, **noise) for values in (better, hard))
    found = compare_log_likelihood(a, b)
    assert found.difference == pytest.approx(1.05)
    assert found.standard_error == pytest.approx((better - hard).std().item() / 2)
    assert found.monte_carlo_standard_error == pytest.approx((8 * 0.03**2) ** 0.5 / 4)
    parts = found.data_standard_error**2 + found.monte_carlo_standard_error**2
    assert found.standard_error**2 == pytest.approx(parts)
    assert found.verdict.startswith("The first is better by 1.050")
    assert found.verdict.kind == "first"
    assert compare_log_likelihood(b, a).verdict.startswith("The second")
    assert compare_log_likelihood(b, a).verdict.kind == "second"
    assert compare_log_likelihood(a, a).verdict.kind == "tied"
    assert found.of("One", "Other", "Both").startswith("One is better by 1.050")
    assert (
        "standard error unknown"
        in compare_log_likelihood(
            _result(log_prob=torch.tensor([-1.0, -math.inf, 0.0])), _result()
        ).verdict
    )


def test_results_of_different_data_are_not_compared():
    pair = shipped_bernoulli()
    one = log_likelihood(*pair, X, num_samples=20, seed=0)
    other = log_likelihood(*pair, 1 - X, num_samples=20, seed=0)
    with pytest.raises(ValueError, match="that differ"):
        compare_log_likelihood(one, other)
    with pytest.raises(ValueError, match="got 12 and 3 data"):
        compare_log_likelihood(one, _result())
    single = log_likelihood(*pair, X[:1], num_samples=20, seed=0)
    with pytest.raises(ValueError, match="at least 2 data"):
        compare_log_likelihood(single, single)
    with pytest.raises(TypeError, match="two results of log_likelihood, got Tensor"):
        compare_log_likelihood(one, other.log_prob)


class Stops(torch.nn.Module):
    """A model that is interrupted after so many calls."""

    def __init__(self, model, calls):
        super().__init__()
        self.model, self.left = model, calls

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.model(x)


@pytest.mark.parametrize(
    ("estimate", "options", "calls"),
    [
        (log_likelihood, {"num_samples": 60}, 11),
        (log_likelihood, {"num_samples": 60, "refine_steps": 3, "defensive": 0.1}, 62),
        (annealed_log_likelihood, {"num_chains": 4, "num_temperatures": 2, "num_steps": 1}, 77),
    ],
)
def test_an_evaluation_that_was_stopped_goes_on(tmp_path, estimate, options, calls):
    (model, guide), x, file = shipped_bernoulli(), binary(200), tmp_path / "evaluation"
    whole = estimate(Stops(model, 10_000), guide, x, seed=4, **options)
    with pytest.raises(KeyboardInterrupt):
        estimate(Stops(model, calls), guide, x, seed=4, checkpoint=file, **options)
    assert file.exists()
    resumed = Stops(model, 10_000)
    found = estimate(resumed, guide, x, checkpoint=file, **options)
    for name in ("log_prob", "standard_error", "ess", "khat", "smoothed"):
        assert torch.equal(getattr(found, name).nan_to_num(), getattr(whole, name).nan_to_num()), (
            name
        )
    assert found.curve.log_prob.shape == whole.curve.log_prob.shape
    assert torch.equal(found.curve.log_prob, whole.curve.log_prob)
    assert found.log_prob.shape == (200,)
    finished = Stops(model, 12)
    again = estimate(finished, guide, x, seed=4, checkpoint=file, **options)
    assert torch.equal(again.log_prob, whole.log_prob)
    assert list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_of_another_evaluation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pyrovae._tools.precision.rounds", lambda *args: True)
    (model, guide), file = shipped_bernoulli(), tmp_path / "evaluation"
    options = {"num_samples": 30, "seed": 4, "checkpoint": file}
    log_likelihood(model, guide, X, **options)
    content = file.read_bytes()
    for x, changed, message in (
        (X, {"num_samples": 31}, "made with curve = "),
        (X, {"seed": 5}, "made with a log-weight|made with seed = 4"),
        (1 - X, {}, "made with a log-weight|made with data = "),
        (X, {"defensive": 0.1}, r"made with defensive = 0\.0"),
        (X, {"precision": "bf16"}, "made with a log-weight|this evaluation has bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            log_likelihood(model, guide, x, **options | changed)
    with torch.no_grad():
        model.decoder.layers[0].bias[0] += 1e-7
    with pytest.raises(ValueError, match="made with weights = "):
        log_likelihood(model, guide, X, **options)
    assert file.read_bytes() == content
    file.write_bytes(content[:50])
    with pytest.raises(ValueError, match="no checkpoint of an evaluation, or a damaged one"):
        log_likelihood(model, guide, X, **options)


def test_an_edited_prior_with_the_same_weights_is_another_evaluation(tmp_path):
    model, guide, x, _ = linear_gaussian(latent=2)

    def edited(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(torch.zeros(2), 1.0).to_event(1))
            loc = model.decoder(z)
            pyro.sample("x", dist.Normal(loc, model.scale).to_event(1), obs=x)

    options = {"num_samples": 30, "seed": 4, "checkpoint": tmp_path / "evaluation"}
    log_likelihood(model, guide, x, **options)
    with pytest.raises(ValueError, match="a log-weight"):
        log_likelihood(edited, guide, x, **options)


def _shared(rank, folder):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pair, store = shipped_bernoulli(), f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(rank)
    how = {"num_samples": 40, "processes": True, "checkpoint": folder / "file"}
    found = log_likelihood(*pair, binary(200), **how)
    torch.save([found.seed, found.log_prob], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_several_processes_find_what_one_does(tmp_path):
    running = [Fork(_shared, rank, tmp_path) for rank in (0, 1)]
    assert [fork.end()[0] for fork in running] == [0, 0]
    (seed, found), (same, other) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert seed == same
    assert torch.equal(found, other)
    torch.manual_seed(0)
    whole = log_likelihood(*shipped_bernoulli(), binary(200), num_samples=40, seed=seed)
    assert torch.equal(found, whole.log_prob)
    assert {path.name for path in tmp_path.iterdir()} >= {"file.0", "file.1"}


@pytest.mark.parametrize("n", [2, 4, 100])
def test_runs_that_are_alike_are_told_apart_at_the_stated_rate(n):
    """Twice the standard error of two differences is exceeded by 30% of them."""
    one, rest = torch.ones(n), {"num_samples": 10}
    estimates = torch.randn(600, 2, n, generator=torch.Generator().manual_seed(0)).unbind(1)
    found = [
        compare_log_likelihood(
            *(LogLikelihood(each, 0 * one, 10 * one, 0 * one, **rest) for each in both)
        ).verdict.kind
        for both in zip(*estimates, strict=True)
    ]
    assert 0.02 < sum(kind != "tied" for kind in found) / 600 < 0.08
