"""Generation is unconditioning, reconstruction is replay."""

import pyro
import pytest
import torch

import pyrovae
from pairs import binary, discrete, shipped_bernoulli, two_latents
from pyrovae.guides.linear_gaussian import LinearGaussian as ExactGuide
from pyrovae.models.linear_gaussian import LinearGaussian

X = binary()


def test_samples_have_the_moments_of_the_model():
    model = LinearGaussian((3,), 2, scale=0.7)
    x = pyrovae.sample(model, like=torch.zeros(1, 3), n=20_000, seed=0)
    weight, bias = model.decoder.layers[0].weight, model.decoder.layers[0].bias
    covariance = weight @ weight.T + model.scale**2 * torch.eye(3)
    spread = covariance.diagonal().sqrt()
    assert ((x.mean(0) - bias).abs() < 4 * spread / 20_000**0.5).all()
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0.08, atol=0.02)


def test_samples_do_not_depend_on_the_template():
    model, _ = shipped_bernoulli()
    one = pyrovae.sample(model, like=X, n=9, seed=4)
    assert torch.equal(one, pyrovae.sample(model, like=1 - X[:1], n=9, seed=4))
    assert set(one.unique().tolist()) == {0.0, 1.0}
    mean = pyrovae.sample(model, like=X, n=9, seed=4, mean=True)
    assert ((mean > 0) & (mean < 1)).all()


def test_reconstruction_is_the_decoded_posterior():
    model, _ = LinearGaussian((5,), 2, scale=0.1), None
    guide = ExactGuide((5,), 2).match(model)
    x = pyrovae.sample(model, like=torch.zeros(1, 5), n=4, seed=0)
    drawn = torch.stack([pyrovae.reconstruct(model, guide, x, seed=s) for s in range(400)])
    expected = model.decoder(model.posterior(x).mean.to(x))
    error = drawn.std(0) / 400**0.5
    assert ((drawn.mean(0) - expected.reshape(4, 5)).abs() < 4.5 * error).all()
    torch.testing.assert_close(pyrovae.encode(guide, x)["z"], model.posterior(x).mean.to(x))


def test_interpolations_begin_and_end_at_the_encodings():
    model, guide = shipped_bernoulli()
    path = pyrovae.interpolate(model, guide, X[:3], X[3:6], steps=5)
    for end, x in ((0, X[:3]), (-1, X[3:6])):
        decoded = pyrovae.decode(model, pyrovae.encode(guide, x), like=X)
        torch.testing.assert_close(path[:, end], decoded)
    assert path.shape == (3, 5, *X.shape[1:])


def test_discrete_latents_are_encoded_and_not_interpolated():
    model, guide = discrete()
    assert pyrovae.encode(guide, X)["y"].sum(-1).tolist() == pytest.approx([1.0] * 12)
    rounded = _rounded(guide)
    assert pyrovae.encode(rounded, X)["y"].shape == (12,)
    with pytest.raises(ValueError, match="'y' is discrete"):
        pyrovae.interpolate(model, rounded, X[:2], X[2:4])


def _rounded(guide):
    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", pyro.distributions.Categorical(logits=guide.net(x)))

    return program


def test_traversals_move_one_dimension():
    model, guide = shipped_bernoulli()
    z = pyrovae.encode(guide, X[:2])["z"]
    found = pyrovae.traverse(model, guide, X[:2], "z", 1, torch.tensor([-1.0, 2.0]))
    for i, value in enumerate((-1.0, 2.0)):
        moved = z.clone()
        moved[:, 1] = value
        torch.testing.assert_close(found[:, i], pyrovae.decode(model, {"z": moved}, like=X))
    with pytest.raises(ValueError, match=r"No latent site 'w'.*'z'"):
        pyrovae.traverse(model, guide, X, "w", 0, torch.zeros(1))


def test_several_sites_come_by_name():
    model, guide = two_latents()
    assert pyrovae.encode(guide, X).keys() == {"top", "low"}
    drawn = pyrovae.sample(model, like=X, n=3, seed=0)
    assert drawn["x"].shape == (3, *X.shape[1:])
    assert drawn["total"].shape == (3,)


def test_bad_input_is_named():
    model, _ = shipped_bernoulli()
    with pytest.raises(ValueError, match="n >= 1"):
        pyrovae.sample(model, like=X, n=0)
    with pytest.raises(ValueError, match=r"No latent sites \['w'\]"):
        pyrovae.decode(model, {"w": torch.zeros(2, 3)}, like=X)


def test_reconstructions_and_encodings_are_made_in_eval_mode():
    model, guide = shipped_bernoulli()
    seen = []
    for net in (model.decoder, guide.encoder):
        net.register_forward_hook(lambda net, *_: seen.append(net.training))
    pyrovae.reconstruct(model, guide, X)
    pyrovae.encode(guide, X)
    assert seen
    assert not any(seen)
    assert model.decoder.training
    assert guide.encoder.training


def test_seeds_are_repeatable_and_leave_the_global_stream_alone():
    model, guide = two_latents()
    for call in (
        lambda seed: pyrovae.reconstruct(model, guide, X, seed=seed)["x"],
        lambda seed: pyrovae.encode(guide, X, seed=seed)["low"],
    ):
        before = torch.get_rng_state()
        one, two, other = call(1), call(1), call(2)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


def test_context_and_deterministic_sites_go_through():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = pyro.deterministic("loc", z + y, event_dim=1)
            pyro.sample("x", pyro.distributions.Normal(loc, 0.1).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", pyro.distributions.Normal(0.0, 1e-3), infer={"is_auxiliary": True})
            scale = 1e-3 + 0 * a[..., None]
            pyro.sample("z", pyro.distributions.Normal(x - y, scale).to_event(1))

    y = 100.0 * torch.arange(1.0, 5)[:, None]
    drawn = pyrovae.sample(model, y, like=torch.zeros(1, 2), n=4, seed=0)
    assert ((drawn - y).abs() < 10).all()
    x = drawn + 50
    assert pyrovae.encode(guide, x, y).keys() == {"z"}
    torch.testing.assert_close(pyrovae.encode(guide, x, y)["z"], x - y)
    torch.testing.assert_close(pyrovae.reconstruct(model, guide, x, y), x, atol=0.02, rtol=0)
    decoded = pyrovae.decode(model, {"z": x - y}, y, like=x)
    torch.testing.assert_close(decoded, x, atol=1e-3, rtol=0)


def test_a_dimension_that_a_site_lacks_is_named():
    for dim in (3, -4):
        with pytest.raises(ValueError, match=f"3 dimensions, so there is no dimension {dim}"):
            pyrovae.traverse(*shipped_bernoulli(), X, "z", dim, torch.zeros(1))
