"""What is drawn comes from the model alone: what it observes, and in which order."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae
from pairs import binary, shipped_bernoulli
from pyrovae.evidence.sandwich import bidirectional

STEPS, CARRY, NOISE = 4, 0.8, 0.5
MANY = 6000


def normal_guide(x, *context):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x.mean(-1), 0.8))


def shifted(x):
    """What precedes each value, as a teacher-forced network is shown it."""
    return torch.nn.functional.pad(x, (1, 0))[:, :-1]


def at_once(x):
    """x_t ~ N(0.8 x_{t-1} + z, 0.5), all steps as one site."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = CARRY * shifted(x) + z[..., None]
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def backward(x):
    """The same with time reversed."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = CARRY * shifted(x.flip(-1)).flip(-1) + z[..., None]
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def by_step(x):
    """The same as a site for each step, which reads the argument."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for t in range(STEPS):
            before = x[:, t - 1] if t else torch.zeros(len(x))
            pyro.sample(f"x_{t}", dist.Normal(CARRY * before + z, NOISE), obs=x[:, t])


def by_latent(x):
    """The same with a latent for each step, whose prior reads the step before."""
    with pyro.plate("data", len(x)):
        level = pyro.sample("z", dist.Normal(0.0, 1.0))
        for t in range(STEPS):
            before = x[:, t - 1] if t else torch.zeros(len(x))
            z = pyro.sample(f"z_{t}", dist.Normal(CARRY * before + level, 0.3))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.4), obs=x[:, t])


def covariance():
    """Of x, exactly."""
    lower = torch.linalg.inv(torch.eye(STEPS) - CARRY * torch.diag(torch.ones(STEPS - 1), -1))
    return lower @ (torch.ones(STEPS, STEPS) + NOISE**2 * torch.eye(STEPS)) @ lower.T


def joined(found):
    return torch.stack([*found.values()], -1) if isinstance(found, dict) else found


@pytest.mark.parametrize("model", [at_once, backward, by_step, by_latent])
def test_a_teacher_forced_model_is_drawn_step_by_step(model):
    found = joined(pyrovae.sample(model, like=torch.zeros(1, STEPS), n=MANY, seed=0))
    expected = covariance().flip(0, 1) if model is backward else covariance()
    spread = expected.diagonal()
    error = ((expected**2 + spread[:, None] * spread) / MANY).sqrt()
    assert ((torch.cov(found.T) - expected).abs() < 4 * error).all()
    other = joined(pyrovae.sample(model, like=torch.full((3, STEPS), 9.0), n=MANY, seed=0))
    torch.testing.assert_close(found, other)


def test_tokens_are_fed_back_through_an_embedding():
    """A chain whose next state is certain: x_{t+1} = x_t + 1 modulo 5."""
    table = torch.nn.Embedding.from_pretrained(60.0 * torch.eye(6)[[1, 2, 3, 4, 0, 5]][:, :5])

    def model(x):
        start = torch.full_like(x[:, :1], 5)
        logits = table(torch.cat([start, x[:, :-1]], 1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)

    found = pyrovae.sample(model, like=torch.zeros(1, 7, dtype=torch.long), n=50, seed=0)
    assert ((found[:, 1:] - found[:, :-1]) % 5 == 1).all()
    assert len(found[:, 0].unique()) == 5


@pytest.mark.parametrize("tile", [600, 3])
def test_a_masked_network_over_pixels_is_drawn_pixel_by_pixel(tile, monkeypatch):
    monkeypatch.setattr("pyrovae.sampling.tile_size", lambda device: tile)
    torch.manual_seed(0)
    weight = torch.randn(9, 9).tril(-1) * 3

    def model(x):
        with pyro.plate("data", len(x)):
            flat = x.flatten(1)
            logits = (2 * flat - 1) @ weight.T
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=flat)

    x = pyrovae.sample(model, like=torch.zeros(1, 3, 3), n=4000 if tile > 3 else 7, seed=0)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    logits = (2 * x - 1) @ weight.T
    score = (x - logits.sigmoid()).mean(0)  # of which the expectation is zero
    error = (logits.sigmoid() * (1 - logits.sigmoid())).mean(0).sqrt() / len(x) ** 0.5
    assert (score.abs() < 4 * error + 1e-6).all()


def cyclic(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = 0.5 * x.mean(-1, keepdim=True) + z[..., None].expand(*z.shape, STEPS)
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def test_a_model_without_an_order_is_refused():
    x = torch.randn(5, STEPS)
    for call in (
        lambda: pyrovae.sample(cyclic, like=x),
        lambda: pyrovae.decode(cyclic, {"z": torch.zeros(3)}, like=x),
        lambda: pyrovae.reconstruct(cyclic, normal_guide, x),
        lambda: bidirectional(cyclic, normal_guide, like=x, n=5, num_chains=1, num_temperatures=0),
    ):
        with pytest.raises(ValueError, match=r"sites \['x'\] depend on the values.*no order"):
            call()


def test_a_start_token_that_is_read_and_not_observed_stays():
    def model(x):
        with pyro.plate("data", len(x)):
            loc = x[:, :-1] + 1
            pyro.sample("x", dist.Normal(loc, 1e-3).to_event(1), obs=x[:, 1:])

    found = pyrovae.sample(model, like=torch.tensor([[7.0, 0, 0, 0]]), n=3, seed=0)
    torch.testing.assert_close(found, torch.tensor([[8.0, 9, 10]] * 3), atol=0.02, rtol=0)


def test_reconstructions_of_a_teacher_forced_model_do_not_copy_x():
    torch.manual_seed(0)
    x = 10.0 * torch.randn(3, STEPS).sign()
    for mean in (True, False):
        found = pyrovae.reconstruct(at_once, normal_guide, x, seed=0, mean=mean)
        flipped = pyrovae.decode(at_once, {"z": torch.zeros(3)}, like=-x, seed=0)
        assert found.shape == x.shape
        # Teacher forcing would follow the sign of the step before: 0.8 * 10 = 8.
        assert (found - CARRY * shifted(x)).abs().max() > 6
        assert flipped.abs().max() < 6


@pytest.mark.parametrize("model", [at_once, by_step])
def test_the_sandwich_of_a_teacher_forced_model_holds_log_p(model):
    found = bidirectional(
        model, normal_guide, like=torch.zeros(1, STEPS), n=200, num_chains=32, seed=1,
        num_temperatures=4, num_steps=2,
    )  # fmt: skip
    prior = dist.MultivariateNormal(torch.zeros(STEPS), covariance())
    exact = prior.log_prob(found.x).double()
    for bound in (exact - found.lower.log_prob, found.upper - exact):
        assert bound.mean() > -3 * bound.std() / 200**0.5
        assert bound.mean() < 0.5


def test_a_zero_context_is_no_template_of_zeros():
    def model(x, level):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = (z + level.sum(-1))[..., None].expand(*z.shape, 3)
            pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x.clone())

    def guide(x, level):
        with pyro.plate("data", len(x)):
            loc = (x.mean(-1) - level.sum(-1)) / (1 + NOISE**2 / 3)
            pyro.sample("z", dist.Normal(loc, (1 / (1 + 3 / NOISE**2)) ** 0.5))

    zeros = torch.zeros(8, 3)
    found = bidirectional(model, guide, zeros, like=zeros, n=40, num_chains=4, num_temperatures=0)
    scale = torch.ones(3, 3) + NOISE**2 * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), scale).log_prob(found.x).double()
    torch.testing.assert_close(found.upper, exact, atol=1e-3, rtol=0)


FLAT = torch.full((10,), 0.1)
LABELS = {
    "itself": lambda y: ((dist.Categorical(FLAT), y), lambda v: v),
    "clamped": lambda y: ((dist.Categorical(FLAT), y.clamp(min=0)), lambda v: v),
    "float": lambda y: ((dist.Poisson(3.0), y.float()), lambda v: v),
    "one-hot": lambda y: (
        (dist.OneHotCategorical(FLAT), torch.nn.functional.one_hot(y, 10).float()),
        lambda v: v.argmax(-1),
    ),
}


@pytest.mark.parametrize("how", LABELS)
@pytest.mark.parametrize("labels", [[3] * 4, [0] * 4, [0, 1, 7, 9]])
def test_a_label_that_is_given_is_kept(how, labels):
    def model(x, y):
        with pyro.plate("data", len(x)):
            (fn, value), read = LABELS[how](y)
            drawn = read(pyro.sample("y", fn, obs=value))
            pyro.sample("x", dist.Normal(10.0 * drawn[..., None], 0.01).to_event(1), obs=x)

    y = torch.tensor(labels)
    found = pyrovae.sample(model, y, like=torch.zeros(1, 1), seed=0)
    torch.testing.assert_close(found[:, 0], 10.0 * y, atol=0.1, rtol=0)
    assert found.shape == (4, 1)


def test_a_partly_hidden_label_is_drawn_where_it_is_hidden():
    def model(x, y):
        with pyro.plate("data", len(x)):
            known = y >= 0
            drawn = pyro.sample("y", dist.Categorical(FLAT), obs=y.clamp(min=0), obs_mask=known)
            pyro.sample("x", dist.Normal(10.0 * drawn[..., None], 0.01).to_event(1), obs=x)

    y = torch.tensor([4] * 20 + [-1] * 200)
    found = (pyrovae.sample(model, y, like=torch.zeros(1, 1), seed=0)[:, 0] / 10).round()
    assert (found[:20] == 4).all()
    assert len(found[20:].unique()) == 10


def test_an_argument_that_depends_on_latents_cannot_be_kept():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    x, y = torch.zeros(4, 1), torch.ones(4)
    with pytest.raises(ValueError, match="'y' observes a further argument and depends"):
        pyrovae.sample(model, y, like=x)
    assert pyrovae.decode(model, {"z": torch.full((4,), 3.0)}, y, like=x).mean() == 3


def test_one_tensor_for_two_arguments_is_told_apart():
    def model(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(y, 0.01).to_event(1), obs=x)

    x = torch.arange(4.0)[:, None]
    found = pyrovae.sample(model, x, like=x, seed=0)
    torch.testing.assert_close(found, x, atol=0.1, rtol=0)


def test_a_site_made_of_data_and_context_is_refused():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x - y)

    with pytest.raises(ValueError, match=r"'x' observes what is made of x and of further arg"):
        pyrovae.sample(model, torch.ones(4, 1), like=torch.zeros(4, 1))


def test_masked_data_are_still_data():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            fn = dist.Normal(torch.full((3,), 5.0), 0.1).mask(mask).to_event(1)
            pyro.sample("x", fn, obs=torch.where(mask, x, 0.0))

    mask = torch.tensor([[True, False, True]] * 6)
    found = pyrovae.sample(model, mask, like=torch.full((1, 3), torch.nan), seed=0)
    assert ((found - 5).abs() < 1).all()


def test_a_reconstruction_without_a_mean_is_a_draw():
    x = torch.tensor([[1.0], [50.0]])

    def model(x, df):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.StudentT(df, z, 0.1).expand([len(x)]), obs=x[:, 0])

    for df, mean in ((5.0, False), (0.9, True)):
        found = pyrovae.reconstruct(model, normal_guide, x, df, mean=mean, seed=0)
        assert not torch.isclose(found, x[:, 0]).any()
    model, guide = shipped_bernoulli()
    x = binary()
    drawn = pyrovae.reconstruct(model, guide, x, mean=False, seed=0)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(drawn, x)


def test_what_is_no_tensor_is_handed_on(monkeypatch):
    monkeypatch.setattr("pyrovae.sampling.tile_size", lambda device: 3)
    seen = []

    def model(x, factor, y, kind=None, extra=()):
        seen.append((factor, kind, [*extra]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(factor * (z + y)[..., None], 0.1).to_event(1), obs=x)

    def guide(x, factor, y, kind=None, extra=()):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1) / factor - y, 0.01))

    y, x = torch.arange(7.0), 2 * torch.arange(7.0)[:, None] + 1
    for context in ((2.0, y, "a", []), (torch.tensor(2.0), y), (2.0, y, None, [[1.0] * 7])):
        drawn = pyrovae.sample(model, *context, like=torch.zeros(1, 1), seed=0, mean=True)
        assert drawn.shape == (7, 1)
        again = pyrovae.reconstruct(model, guide, x, *context, seed=0)
        torch.testing.assert_close(again, x, atol=0.2, rtol=0)
        codes = pyrovae.encode(guide, x, *context)
        torch.testing.assert_close(codes["z"], torch.full((7,), 0.5))
        path = pyrovae.interpolate(model, guide, x, x + 2, *context, steps=3)
        assert path.shape == (7, 3, 1)
    assert (2.0, "a", []) in seen
    with pytest.raises(TypeError, match=r"data \[N, \.\.\.\] as a tensor, .*, got list"):
        pyrovae.encode(guide, [1.0], 2.0, y)


def test_what_is_no_tensor_has_no_tiles():
    def model(x, level):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(level * z[..., None], 1.0).to_event(1), obs=x)

    x = torch.zeros(3, 1)
    for call in (
        lambda: pyrovae.log_likelihood(model, normal_guide, x, 1.0),
        lambda: pyrovae.log_likelihood(model, normal_guide, x, torch.tensor(1.0)),
        lambda: bidirectional(model, normal_guide, 1.0, like=x, n=2),
    ):
        with pytest.raises(TypeError, match=r"Expected tensors \[N, \.\.\.\].*as argument 1"):
            call()


def test_a_latent_of_a_single_value_has_no_dimension_to_traverse():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(k[..., None] * torch.ones(2), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.ones(len(x), 3)))

    with pytest.raises(ValueError, match="'k' is a single value for each datum"):
        pyrovae.traverse(model, guide, torch.zeros(4, 2), "k", 0, torch.tensor([0, 1]))


def test_the_warning_of_an_eager_run_points_at_its_caller(monkeypatch):
    monkeypatch.setattr("pyrovae.sampling.tile_size", lambda device: 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            scale = 1.0 if z.sum().item() > -1e9 else 2.0
            pyro.sample("x", dist.Normal(z[..., None], scale).to_event(1), obs=x)

    x = torch.zeros(7, 1)
    for call in (
        lambda: pyrovae.sample(model, like=x, n=7, compile=True),
        lambda: pyrovae.decode(model, {"z": torch.zeros(7)}, like=x, compile=True),
        lambda: pyrovae.reconstruct(model, normal_guide, x, compile=True),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert [warning.filename for warning in caught] == [__file__]


def test_a_model_that_reads_x_runs_eagerly_with_one_warning(monkeypatch):
    monkeypatch.setattr("pyrovae.sampling.tile_size", lambda device: 3)
    like = torch.zeros(1, STEPS)
    with pytest.warns(UserWarning, match="runs eagerly") as caught:
        found = pyrovae.sample(at_once, like=like, n=7, seed=0, compile=True)
    assert len(caught) == 1
    assert torch.equal(found, pyrovae.sample(at_once, like=like, n=7, seed=0, compile=False))
