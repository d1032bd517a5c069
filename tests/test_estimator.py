"""pyrovae.VAE keeps scikit-learn's rules, and its threshold the false-alarm rate that it states."""

import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import affine_autoregressive
from pyro.nn import PyroModule
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Binarizer, FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

import pyrovae
from pyrovae.models.linear_gaussian import LinearGaussian

PLACE = (
    "score_samples() is a Monte Carlo estimate, and the draws of a datum are seeded by its place "
    "in X: in another place its score differs within its stated error"
)
EXPECTED = {
    "check_methods_sample_order_invariance": PLACE,
    "check_methods_subset_invariance": PLACE,
}
SMALL = {"hidden": (16,), "activation": "Tanh"}


def small(**options):
    given = {"latent": 2, "epochs": 2, "num_samples": 8, "random_state": 0}
    settings = {"model_settings": SMALL, "guide_settings": SMALL}
    return pyrovae.VAE("gaussian", **given | settings | options)


@pytest.fixture(scope="module")
def normal():
    """Data of a linear-Gaussian model, whose log p(x) is known, and the estimator fitted to it."""
    z = np.random.default_rng(0).normal(size=(2000, 2))
    x = z @ np.random.default_rng(1).normal(size=(2, 4))
    x = (x + 0.3 * np.random.default_rng(2).normal(size=x.shape)).astype(np.float32)
    how = {"latent": 2, "epochs": 20, "lr": 1e-2, "random_state": 0}
    return x, pyrovae.VAE("linear_gaussian", "linear_gaussian", **how).fit(x[:1000])


def test_scikit_learns_checks_pass_but_for_those_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny, how = small(epochs=1, num_samples=2), {"on_skip": None, "on_fail": None}
        found = check_estimator(tiny, expected_failed_checks=EXPECTED, **how)
    assert len(found) > 40
    failed = [(f["check_name"], f["exception"]) for f in found if f["status"] == "failed"]
    assert not failed
    assert {each["check_name"] for each in found if each["status"] == "xfail"} == EXPECTED.keys()


def test_scores_are_log_likelihoods_with_their_errors(normal):
    x, vae = normal
    score, error = vae.score_samples(x[1000:], return_error=True)
    assert isinstance(vae.model_, LinearGaussian)
    exact = vae.model_.log_prob(torch.tensor(x[1000:])).detach().numpy()
    assert np.abs(score - exact).mean() < 3 * error.mean() + 1e-3
    assert vae.score(x[1000:]) == pytest.approx(score.mean())
    other = vae.score_samples(x[1000:][::-1])[::-1]
    assert 0 < np.abs(other - score).mean() < 3 * error.mean()


def test_codes_are_posterior_means_and_decode(normal):
    x, vae = normal
    codes = vae.transform(x)
    z = pyrovae.encode(vae.guide_, torch.tensor(x))["z"]
    assert np.array_equal(codes, z.detach().numpy())
    assert list(vae.get_feature_names_out()) == ["z_0", "z_1"]
    # The mean of p(x|z) at the posterior mean leaves little but the noise.
    residual = vae.inverse_transform(codes) - x
    assert residual.std() < 0.5 < x.std()
    with pytest.raises(ValueError, match=r"Expected codes \[N, 2\]"):
        vae.inverse_transform(x)


def test_samples_have_the_covariance_of_the_model(normal):
    _, vae = normal
    drawn = vae.sample(4000, random_state=0)
    assert drawn.shape == (4000, 4)
    assert np.array_equal(drawn, vae.sample(4000, random_state=0))
    assert not np.array_equal(drawn, vae.sample(4000, random_state=1))
    with torch.no_grad():
        weight, _, scale = vae.model_._exact()
        exact = (weight @ weight.mT + scale.square() * torch.eye(4)).numpy()
    # The error of a sample variance v is v sqrt(2 / 4000), 0.022 v.
    assert np.abs(np.cov(drawn.T) - exact).max() < 4 * 0.022 * exact.max()


def test_images_and_pipelines_and_clones_and_pickles():
    digits = load_digits().data / 16
    how = {"shape": (1, 8, 8), "latent": 2, "epochs": 1, "patience": 1, "random_state": 0}
    vae = pyrovae.VAE("convolutional", "convolutional", **how)
    pipe = make_pipeline(Binarizer(threshold=0.5), vae).fit(digits[:200])
    again = clone(pipe).fit(digits[:200])
    codes = pipe.transform(digits[200:220])
    assert codes.shape == (20, 2)
    assert np.array_equal(codes, again.transform(digits[200:220]))
    back = pickle.loads(pickle.dumps(pipe))
    assert np.array_equal(codes, back.transform(digits[200:220]))
    assert pipe.score(digits[200:220]) == back.score(digits[200:220])
    assert vae.inverse_transform(codes).shape == (20, 64)


def test_programs_are_classes_and_copies(normal):
    x, _ = normal
    from pyrovae.guides.linear_gaussian import LinearGaussian as Guide

    model, guide = LinearGaussian((4,), 2), Guide((4,), 2)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    by_copy = pyrovae.VAE(model, guide, epochs=1, random_state=0).fit(x[:200])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert by_copy.model_ is not model
    by_class = pyrovae.VAE(LinearGaussian, Guide, latent=3, epochs=1, random_state=0).fit(x[:200])
    assert by_class.transform(x[:5]).shape == (5, 3)
    pipe = make_pipeline(FunctionTransformer(), by_class)
    assert pipe.transform(x[:5]).shape == (5, 3)


class Scalar(PyroModule):
    """A latent number of each datum, and two that the guide draws from a flow, which remembers."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes
        if encodes:
            self.flow = affine_autoregressive(2, hidden_dims=[4])
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        normal = dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            if self.encodes:
                pyro.sample("c", dist.Normal(x.mean(-1), self.scale.exp()))
                pyro.sample("w", dist.TransformedDistribution(normal, self.flow))
            else:
                c = pyro.sample("c", dist.Normal(x.new_zeros(len(x)), 1.0))
                w = pyro.sample("w", normal)
                loc = (c + w.sum(-1))[..., None].expand(*c.shape, 4)
                pyro.sample("x", dist.Normal(loc, self.scale.exp()).to_event(1), obs=x)


def test_programs_may_have_scalar_latents_and_have_been_used(normal):
    x, _ = normal
    model, guide = Scalar(False), Scalar(True)
    pyrovae.fit(model, guide, x[:40], epochs=1, seed=0, progress=False)
    vae = pyrovae.VAE(model, guide, objective="trace_elbo", epochs=1, random_state=0).fit(x[:40])
    assert list(vae.get_feature_names_out()) == ["c_0", "w_0", "w_1"]
    codes = vae.transform(x[:5])
    assert codes.shape == (5, 3)
    assert np.allclose(codes[:, 0], np.asarray(x[:5]).mean(1), atol=1e-6)
    assert np.allclose(vae.inverse_transform(codes)[:, 0], codes.sum(1), atol=1e-5)


def test_the_threshold_keeps_its_false_alarm_rate(normal):
    x, vae = normal
    rng = np.random.default_rng(3)
    vae = copy.deepcopy(vae).set_params(num_samples=10)
    normal_data = vae.sample(6000, random_state=5)
    assert not hasattr(vae, "predict")
    scores = vae.score_samples(normal_data[4000:])
    rates, inside = [], 0
    for part in normal_data[:4000].reshape(20, 200, 4):
        vae.fit_threshold(part, false_alarm=0.1)
        assert vae.false_alarm_ == pytest.approx(20 / 201)
        rates.append((scores < vae.threshold_).mean())
        low, high = vae.false_alarm_interval_
        inside += low < rates[-1] < high
    # The spread of a rate is that of Beta(20, 181), 0.021; 2,000 test data add 0.007 to all.
    assert np.mean(rates) == pytest.approx(20 / 201, abs=3 * (0.021**2 / 20 + 0.007**2) ** 0.5)
    flagged = vae.predict(normal_data[4000:]) == -1
    assert np.array_equal(flagged, vae.decision_function(normal_data[4000:]) < 0)
    assert flagged.mean() == rates[-1]
    assert inside >= 16
    far = rng.normal(scale=8, size=(200, 4))
    assert (vae.predict(far) == -1).mean() > 0.9
    with pytest.raises(
        ValueError, match=r"at least 19 data for a false-alarm rate of 0\.05, got 18"
    ):
        vae.fit_threshold(normal_data[:18])
    assert not hasattr(clone(vae).fit(x[:200]), "threshold_")


def test_a_wrong_shape_is_told_in_one_sentence(normal):
    x, _ = normal
    with pytest.raises(pyrovae.InputError, match="shape to hold the 4 features"):
        pyrovae.VAE("gaussian", shape=(3,)).fit(x)


def test_dir_shows_the_public_names_alone():
    assert dir(pyrovae) == sorted(pyrovae.__all__)
    assert all(hasattr(pyrovae, name) for name in dir(pyrovae))
    with pytest.raises(AttributeError, match="no attribute 'vae'"):
        pyrovae.vae  # noqa: B018


@pytest.mark.parametrize("patience", [None, 2])
def test_a_frame_gives_a_table_its_kinds_and_keeps_the_codes_of_its_categories(patience):
    n, rng = 60, np.random.default_rng(0)
    site = pd.Categorical.from_codes(rng.integers(0, 3, n), ["a", "b", "c"])
    frame = pd.DataFrame(
        {"site": site, "visits": rng.poisson(9, n) * 2, "y": rng.normal(size=n), "ill": site == "a"}
    )
    how = {"latent": 2, "epochs": 1, "num_samples": 4, "random_state": 0, "patience": patience}
    vae = pyrovae.VAE("table", "table", **how).fit(frame)
    kinds = {column.name: column.kind for column in vae.model_.columns}
    assert kinds == {"site": "categorical", "visits": "count", "y": "real", "ill": "binary"}
    assert vae.n_features_in_ == 4
    assert [*vae.feature_names_in_] == [*frame]

    some = frame.iloc[:9].query("site != 'a'")
    other = some.assign(site=some.site.cat.remove_unused_categories())
    torch.testing.assert_close(*(torch.from_numpy(vae.score_samples(x)) for x in (some, other)))
    with pytest.raises(
        ValueError, match=r"categories that fit\(\) has seen in column 'site'.*'new'"
    ):
        vae.transform(some.assign(site=pd.Categorical(["new"] * len(some))))
    with pytest.raises(ValueError, match="got words"):
        pyrovae.VAE("table", "table", **how).fit(frame.astype({"site": str}))
    objects = frame.assign(y=frame.y.astype(object))
    assert pyrovae.VAE("table", "table", **how).fit(objects).model_.columns == vae.model_.columns
    # Programs that ask for no columns take the same numbers.
    codes = frame.assign(site=site.codes, ill=frame.ill.astype(int)).to_numpy()
    with pytest.warns(UserWarning, match="takes the codes of 'site' for numbers"):
        small(epochs=1).fit(frame)
    plain = []
    for x in (frame, codes):
        with warnings.catch_warnings(action="ignore"):
            plain.append(small(epochs=1).fit(x).transform(x))
    np.testing.assert_array_equal(*plain)
