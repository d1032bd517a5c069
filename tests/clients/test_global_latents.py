"""Pyro's examples lda.py and sparse_gamma_def.py, whose latents are shared by all data."""

import functools
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from clients import runs_captured, runs_eagerly, takes_the_steps_of_pyro
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, init_to_feasible
from pyro.optim import AdagradRMSProp, ClippedAdam
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import softplus

import pyrovae

SIZES = SimpleNamespace(num_topics=3, num_words=6, num_docs=10, num_words_per_doc=5)


def lda_model(data=None, args=None, batch_size=None):
    """Words of documents; the topic of each word is summed over."""
    with pyro.plate("topics", args.num_topics):
        topic_weights = pyro.sample("topic_weights", dist.Gamma(1.0 / args.num_topics, 1.0))
        concentration = torch.ones(args.num_words) / args.num_words
        topic_words = pyro.sample("topic_words", dist.Dirichlet(concentration))
    with pyro.plate("documents", args.num_docs) as ind:
        if data is not None:
            assert data.shape == (args.num_words_per_doc, args.num_docs)
            data = data[:, ind]
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
        with pyro.plate("words", args.num_words_per_doc):
            infer = {"enumerate": "parallel"}
            word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics), infer=infer)
            words = dist.Categorical(topic_words[word_topics])
            data = pyro.sample("doc_words", words, obs=data)
    return topic_weights, topic_words, data


def lda_guide(predictor, data, args, batch_size=None):
    """Conjugate for what is shared, and a network for the topics of a document."""
    topics = pyro.param(
        "topic_rates", lambda: torch.ones(args.num_topics), constraint=constraints.positive
    )
    words = pyro.param(
        "word_rates", lambda: torch.ones(args.num_topics, args.num_words),
        constraint=constraints.greater_than(0.5),
    )  # fmt: skip
    with pyro.plate("topics", args.num_topics):
        pyro.sample("topic_weights", dist.Gamma(topics, 1.0))
        pyro.sample("topic_words", dist.Dirichlet(words))
    pyro.module("predictor", predictor)
    with pyro.plate("documents", args.num_docs, batch_size) as ind:
        data = data[:, ind]
        counts = torch.zeros(args.num_words, ind.size(0))
        counts = counts.scatter_add(0, data, torch.ones(data.shape))
        doc_topics = predictor(counts.transpose(0, 1))
        pyro.sample("doc_topics", dist.Delta(doc_topics, event_dim=1))


def lda():
    layers = nn.Linear(SIZES.num_words, 4), nn.Sigmoid(), nn.Linear(4, SIZES.num_topics)
    predictor = nn.Sequential(*layers, nn.Sigmoid(), nn.Softmax(dim=-1))
    return lda_model, functools.partial(lda_guide, predictor)


def documents():
    shape = SIZES.num_words_per_doc, SIZES.num_docs
    return torch.randint(SIZES.num_words, shape, generator=torch.Generator().manual_seed(1))


WORDS = documents()
LDA_STEPS = [(WORDS, {"args": SIZES, "batch_size": 4})] * 4


def two_plates():
    return TraceEnum_ELBO(max_plate_nesting=2)


def test_steps_of_lda():
    takes_the_steps_of_pyro(lda, LDA_STEPS, two_plates, lambda: ClippedAdam({"lr": 0.01}))


@pytest.mark.usefixtures("recorded")
def test_lda_runs_eagerly():
    runs_eagerly(lda, LDA_STEPS, two_plates, "an argument is of the type SimpleNamespace")


def test_evidence_of_lda():
    model, guide = (functools.partial(each, args=SIZES) for each in lda())
    with pytest.raises(pyrovae.InputError, match=r"'topic_weights' lies outside .* no datum"):
        pyrovae.log_likelihood(model, guide, WORDS, num_samples=2)


def test_samples_of_lda():
    model = functools.partial(lda_model, args=SIZES)
    x = pyrovae.sample(model, like=WORDS, n=len(WORDS), seed=0)
    assert x.shape == WORDS.shape


TOP, MID, BOTTOM, PIXELS = 4, 3, 2, 5
ALPHA, BETA_Z, BETA_W = torch.tensor(0.1), torch.tensor(0.1), torch.tensor(0.3)
LAYERS = {"top": (TOP, MID), "mid": (MID, BOTTOM), "bottom": (BOTTOM, PIXELS)}


def gamma_model(x):
    """Three layers of Gamma latents of each datum, and of weights that all data share."""
    weights = {}
    for name, (above, below) in LAYERS.items():
        with pyro.plate(f"w_{name}_plate", above * below):
            weight = pyro.sample(f"w_{name}", dist.Gamma(ALPHA, BETA_W))
        several = () if weight.dim() == 1 else (-1,)
        weights[name] = weight.reshape(*several, above, below)
    with pyro.plate("data", x.size(0)):
        mean, rate = None, BETA_Z.expand(TOP)
        for name in LAYERS:
            rate = rate if mean is None else BETA_Z / mean
            z = pyro.sample(f"z_{name}", dist.Gamma(ALPHA, rate).to_event(1))
            mean = torch.matmul(z, weights[name])
        pyro.sample("obs", dist.Poisson(mean).to_event(1), obs=x)


def random(shape, mean=0.5):
    return mean * torch.ones(shape) + 0.1 * torch.randn(shape)


def gamma_guide(x):
    """Gammas of their own for every latent of every datum."""

    def latent(name, shape):
        alpha = softplus(pyro.param(f"alpha_{name}", lambda: random(shape)))
        mean = softplus(pyro.param(f"mean_{name}", lambda: random(shape, 0.0)))
        return dist.Gamma(alpha, alpha / mean)

    for name, (above, below) in LAYERS.items():
        with pyro.plate(f"w_{name}_plate", above * below):
            pyro.sample(f"w_{name}", latent(f"w_{name}", (above * below,)))
    with pyro.plate("data", x.size(0)):
        for name, (above, _) in LAYERS.items():
            pyro.sample(f"z_{name}", latent(f"z_{name}", (x.size(0), above)).to_event(1))


class Easy(EasyGuide):
    """Normals of the weights together, and of the latents of a datum together."""

    def guide(self, x):
        shared = self.group(match=r"w_.*")
        mean = pyro.param("w_mean", lambda: random(shared.event_shape))
        scale = softplus(pyro.param("w_scale", lambda: random(shared.event_shape, 0.0)))
        shared.sample("ws", dist.Normal(mean, scale).to_event(1))
        own = self.group(match=r"z_.*")
        shape = x.shape[:1] + own.event_shape
        with self.plate("data", x.size(0)):
            mean = pyro.param("z_mean", lambda: random(shape))
            scale = softplus(pyro.param("z_scale", lambda: random(shape, 0.0)))
            own.sample("zs", dist.Normal(mean, scale).to_event(1))


def auto(model):
    return AutoDiagonalNormal(model, init_loc_fn=init_to_feasible)


GUIDES = {"custom": lambda model: gamma_guide, "auto": auto, "easy": Easy}
FACES = torch.poisson(torch.full((6, PIXELS), 3.0), generator=torch.Generator().manual_seed(1))


def gammas(kind="custom"):
    return gamma_model, GUIDES[kind](gamma_model)


@pytest.mark.parametrize("kind", GUIDES)
def test_steps_of_sparse_gammas(kind):
    optim = functools.partial(AdagradRMSProp, {"eta": 0.1, "t": 0.1})
    make = functools.partial(gammas, kind)
    takes_the_steps_of_pyro(make, [(FACES,)] * 4, TraceMeanField_ELBO, optim)


@pytest.mark.usefixtures("recorded")
def test_sparse_gammas_compiled():
    runs_captured(gammas, [(FACES,)] * 4, TraceMeanField_ELBO)


def test_evidence_of_sparse_gammas():
    with pytest.raises(pyrovae.InputError, match=r"'w_top' lies outside .* no datum"):
        pyrovae.log_likelihood(*gammas(), FACES, num_samples=2)


def test_fit_of_sparse_gammas():
    with pytest.raises(pyrovae.InputError, match=r"'w_top' lies outside .* no datum"):
        pyrovae.fit(*gammas(), FACES, epochs=1, batch_size=6, objective=TraceMeanField_ELBO())


def test_samples_of_sparse_gammas():
    assert pyrovae.sample(gamma_model, like=FACES, n=9, seed=0).shape == (9, PIXELS)
