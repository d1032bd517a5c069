"""Inference gaps whose values are known."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae
from pyrovae.diagnostics import inference_gaps
from pyrovae.guides.linear_gaussian import LinearGaussian as FullGuide
from pyrovae.models.linear_gaussian import LinearGaussian


class Off(FullGuide):
    """The best product of normals, moved by so many of its standard deviations."""

    def __init__(self, model, shift):
        super().__init__(model.decoder.out_shape, model.decoder.in_shape[0])
        self.match(model)
        precision = torch.linalg.inv(self.scale_tril @ self.scale_tril.mT).detach()
        self.spread, self.shift = precision.diagonal().rsqrt(), shift
        product = precision.diagonal().log().sum()
        self.approximation = 0.5 * (product - precision.logdet()).item()
        delta = shift * self.spread
        self.amortization = 0.5 * (delta @ precision @ delta).item()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = self.encoder(x) + self.shift * self.spread
            pyro.sample("z", dist.Normal(loc, self.spread).to_event(1))


def test_gaps_of_a_linear_decoder():
    model = LinearGaussian((8,), 3, scale=0.4)
    x = pyrovae.sample(model, like=torch.zeros(1, 8), n=64, seed=1)
    guide = Off(model, 0.5)
    assert guide.approximation > 0.05
    found = inference_gaps(model, guide, x, num_samples=2000, seed=0)
    error = 4 * found.amortization_standard_error + 0.01
    assert found.amortization_mean == pytest.approx(guide.amortization, abs=error)
    error = 4 * found.approximation_standard_error + 0.01
    assert found.approximation_mean == pytest.approx(guide.approximation, abs=error)
    total = model.log_prob(x).double().mean() - pyrovae.elbo(model, guide, x, particles=500).mean
    assert found.total.mean().item() == pytest.approx(total.item(), abs=0.1)
    assert "because the guide is amortized" in found.verdict
    full = FullGuide((8,), 3).match(model)
    richer = inference_gaps(model, full, x, num_samples=2000, seed=0)
    assert richer.amortization_mean == pytest.approx(-guide.approximation, abs=error)
    assert "the guide is richer" in richer.verdict


def test_a_better_estimate_of_the_evidence_is_taken():
    model = LinearGaussian((8,), 3, scale=0.4)
    x = pyrovae.sample(model, like=torch.zeros(1, 8), n=16, seed=1)
    guide = Off(model, 0.5)
    ll = pyrovae.log_likelihood(model, FullGuide((8,), 3).match(model), x, num_samples=10, seed=0)
    found = inference_gaps(model, guide, x, num_samples=200, log_prob=ll, seed=0)
    own = inference_gaps(model, guide, x, num_samples=200, seed=0)
    moved = found.approximation - own.approximation
    torch.testing.assert_close(moved, ll.log_prob - own.log_prob.log_prob)
    assert found.log_prob is ll
    with pytest.raises(ValueError, match="of the same 16 data"):
        inference_gaps(model, guide, x + 1, num_samples=10, refine_steps=1, log_prob=ll)
    with pytest.raises(ValueError, match="refine_steps >= 1"):
        inference_gaps(model, guide, x, refine_steps=0)
