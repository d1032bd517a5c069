"""Pyro's tutorial prodlda: topics of documents, with batch normalization and dropout."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from clients import agrees, fits, has_no_false_alarm, runs_eagerly, takes_the_steps_of_pyro
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.nn.functional import softmax, softplus

import pyrovae

WORDS, TOPICS, HIDDEN = 7, 3, 6


class Encoder(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.first, self.second = nn.Linear(WORDS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.loc, self.log_variance = nn.Linear(HIDDEN, TOPICS), nn.Linear(HIDDEN, TOPICS)
        self.norm_loc = nn.BatchNorm1d(TOPICS, affine=False)
        self.norm_log_variance = nn.BatchNorm1d(TOPICS, affine=False)

    def forward(self, inputs):
        h = self.drop(softplus(self.second(softplus(self.first(inputs)))))
        log_variance = self.norm_log_variance(self.log_variance(h))
        return self.norm_loc(self.loc(h)), (0.5 * log_variance).exp()


class Decoder(nn.Module):
    """Probabilities of words; the softmax counts its dimensions from the left."""

    def __init__(self, dropout):
        super().__init__()
        self.beta = nn.Linear(TOPICS, WORDS, bias=False)
        self.norm, self.drop = nn.BatchNorm1d(WORDS, affine=False), nn.Dropout(dropout)

    def forward(self, inputs):
        return softmax(self.norm(self.beta(self.drop(inputs))), dim=1)


class ProdLDA(nn.Module):
    def __init__(self, dropout=0.2):
        super().__init__()
        self.encoder, self.decoder = Encoder(dropout), Decoder(dropout)

    def model(self, docs):
        pyro.module("decoder", self.decoder)
        with pyro.plate("documents", docs.shape[0]):
            loc, scale = docs.new_zeros(len(docs), TOPICS), docs.new_ones(len(docs), TOPICS)
            logtheta = pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1))
            words = self.decoder(softmax(logtheta, -1))
            # The density needs no count, and torch's Multinomial takes one for all documents.
            total_count = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total_count, words), obs=docs)

    def guide(self, docs):
        pyro.module("encoder", self.encoder)
        with pyro.plate("documents", docs.shape[0]):
            pyro.sample("logtheta", dist.Normal(*self.encoder(docs)).to_event(1))


def documents(n=12):
    rate = torch.full((n, WORDS), 1.5)
    return torch.poisson(rate, generator=torch.Generator().manual_seed(1)) + torch.eye(WORDS)[0]


DOCS = documents()


def programs(dropout=0.2):
    lda = ProdLDA(dropout)
    return lda.model, lda.guide


def test_steps():
    takes_the_steps_of_pyro(programs, [(DOCS[:8],), (DOCS[4:],)] * 3, TraceMeanField_ELBO)


@pytest.mark.usefixtures("recorded")
def test_eager():
    """The model reads a count back, so that no graph holds for other documents."""
    runs_eagerly(programs, [(DOCS,)] * 3, TraceMeanField_ELBO, "reads a value back")


def test_fit_and_evidence():
    lda = ProdLDA()
    fits(lda.model, lda.guide, (DOCS,), TraceMeanField_ELBO())
    found = pyrovae.log_likelihood(lda.model, lda.guide, DOCS, num_samples=2000, seed=0)
    with torch.no_grad():
        lda.eval()
        q = dist.Normal(*lda.encoder(DOCS)).to_event(1)
        z = q.sample((2000,))
        weights = dist.Normal(torch.zeros(TOPICS), 1.0).to_event(1).log_prob(z) - q.log_prob(z)
        words = lda.decoder(softmax(z, -1).reshape(-1, TOPICS)).reshape(*z.shape[:-1], WORDS)
        log_count = (DOCS.sum(-1) + 1).lgamma() - (DOCS + 1).lgamma().sum(-1)
        agrees(found, weights + (words.log() * DOCS).sum(-1) + log_count)


def test_samples():
    x = pyrovae.sample(programs()[0], like=DOCS, n=20, seed=0)
    assert (x.sum(-1) == DOCS[0].sum()).all()


def test_diagnosis():
    found = pyrovae.diagnose(*programs(), DOCS, seed=0)
    assert found.bits_per_dimension is None


def test_check():
    says = {"independent_data": "normalizes over the batch", "capture": "reads a value back"}
    has_no_false_alarm(pyrovae.check(*programs(), DOCS), **says)
