"""Sequences: chains in one piece, padding that does not count, and a filter's exact log p(x)."""

import json
import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae
from pyrovae.distributions import MarkovNormal, _unrolled
from pyrovae.guides.sequence import Sequence as Guide
from pyrovae.models.sequence import Sequence as Model
from pyrovae.nn import BackwardGRU, _read, lasting, whole

# A walk that forgets: z_t = A z_{t-1} + S ε, and x_t = C z_t + R ε.
A, S, R = 0.8, 0.6, 0.5
C = torch.tensor([1.0, -0.5])
N, T = 6, 7
LENGTHS = torch.tensor([7, 1, 4, 7, 2, 6])


def batch():
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(T) < LENGTHS[:, None])[..., None].expand(N, T, 2)
    return torch.randn(N, T, 2, generator=generator), mask


def filtered(x, length):
    """log p(x) by the Kalman filter, in float64."""
    slope, mean, variance, total = C.double(), 0.0, 0.0, 0.0
    for step in x[:length].double():
        mean, variance = A * mean, A**2 * variance + S**2
        spread = variance * torch.outer(slope, slope) + R**2 * torch.eye(2).double()
        total += dist.MultivariateNormal(slope * mean, spread).log_prob(step)
        gain = variance * torch.linalg.solve(spread, slope)
        mean = mean + gain @ (step - slope * mean)
        variance = variance * (1 - gain @ slope)
    return total


class Walk(nn.Module):
    def forward(self, z):
        return A * z, torch.full_like(z, S)


class Filtered(nn.Module):
    """q(z_t | z_{t-1}, x_t, …, x_T) in closed form, from precisions and shifts to come."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, z, h):
        precision = 1 / S**2 + h[..., :1]
        return (A * z / S**2 + h[..., 1:]) / precision, self.width * precision.rsqrt()


def linear(width=1.0):
    """A linear-Gaussian state-space model and its posterior, or one that is wider."""
    walk, backward, start = Walk(), Filtered(width), torch.zeros(1)

    def model(x, mask):
        with pyro.plate("data", len(x)):
            prior = MarkovNormal(walk, start, x.shape[:2])
            z = pyro.sample("z", prior.mask(lasting(mask)).to_event(1))
            pyro.sample("x", dist.Normal(z * C, R).mask(mask).to_event(2), obs=x)

    def guide(x, mask):
        weight = mask[..., 0] * (C @ C) / R**2
        shift = mask[..., 0] * (x @ C) / R**2
        precision, pull, found = torch.zeros(len(x)), torch.zeros(len(x)), []
        for t in reversed(range(x.shape[1])):
            less = 1 + S**2 * precision
            precision, pull = weight[:, t] + A**2 * precision / less, shift[:, t] + A * pull / less
            found.append(torch.stack([precision, pull], -1))
        with pyro.plate("data", len(x)):
            chain = MarkovNormal(backward, start, x.shape[:2], torch.stack(found[::-1], 1))
            pyro.sample("z", chain.mask(lasting(mask)).to_event(1))

    return model, guide


@pytest.fixture(scope="module")
def exact():
    x, _ = batch()
    return torch.stack([filtered(*row) for row in zip(x, LENGTHS, strict=True)])


def test_the_exact_posterior_has_equal_weights(exact):
    found = pyrovae.log_likelihood(*linear(), *batch(), num_samples=20, seed=0)
    torch.testing.assert_close(found.log_prob, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("estimate", ["importance", "refined", "annealed", "filtered"])
def test_every_estimate_is_the_filters_within_its_error(exact, estimate):
    model, guide = linear(1.3)
    if estimate == "annealed":
        chains = {"num_chains": 64, "num_temperatures": 6}
        found = pyrovae.annealed_log_likelihood(model, guide, *batch(), **chains, seed=1)
    elif estimate == "filtered":
        few = {"num_filters": 20, "num_particles": 100}
        found = pyrovae.filtered_log_likelihood(model, guide, *batch(), **few, seed=1)
    else:
        steps = 20 if estimate == "refined" else 0
        found = pyrovae.log_likelihood(
            model, guide, *batch(), num_samples=4000, refine_steps=steps, seed=1
        )
    z = (found.log_prob - exact) / found.standard_error.clamp(min=1e-4)
    assert z.square().mean().sqrt() < 2
    assert (found.log_prob - exact).abs().max() < 0.3


def test_a_filter_refuses_what_is_no_chain_and_what_looks_back():
    x, mask = batch()

    def other(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., None, :] * C, R).mask(mask).to_event(2), obs=x)

    def encoder(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    with pytest.raises(pyrovae.InputError, match=r"one latent that is a chain.* got Normal"):
        pyrovae.filtered_log_likelihood(other, encoder, x, mask)

    def looking_back(x, mask):
        with pyro.plate("data", len(x)):
            prior = MarkovNormal(Walk(), torch.zeros(1), x.shape[:2])
            z = pyro.sample("z", prior.mask(lasting(mask)).to_event(1))
            pyro.sample("x", dist.Normal(z.cumsum(-2) * C, R).mask(mask).to_event(2), obs=x)

    with pytest.raises(pyrovae.InputError, match=r"x_t to depend on z_t alone.*log_likelihood"):
        pyrovae.filtered_log_likelihood(looking_back, linear()[1], x, mask)

    def undefined(x, mask):
        with pyro.plate("data", len(x)):
            prior = MarkovNormal(Walk(), torch.zeros(1), x.shape[:2])
            z = pyro.sample("z", prior.mask(lasting(mask)).to_event(1))
            likelihood = dist.Bernoulli(logits=z * C - torch.inf).mask(mask).to_event(2)
            pyro.sample("x", likelihood, obs=0 * x)

    with pytest.raises(pyrovae.InputError, match=r"weight is NaN: pyrovae\.check says which"):
        pyrovae.filtered_log_likelihood(undefined, linear()[1], x, mask)


class Rigid(nn.Module):
    """A walk that goes nowhere near the guide's."""

    def forward(self, z):
        return A * z + 5, torch.full_like(z, 1e-30)


class Near(dist.Normal):
    """A normal that gives no density to what is more than 9 off."""

    def log_prob(self, value):
        return super().log_prob(value).where((value - self.loc).abs() < 9, -torch.inf)

    def expand(self, shape, _instance=None):
        return super().expand(shape, _instance=self._get_checked_instance(Near, _instance))


def test_a_sequence_that_no_particle_makes_has_log_p_of_minus_infinity():
    """As importance sampling says it; the other sequences are untouched."""
    x, mask = batch()
    impossible = x.clone()
    impossible[2, 1] = 1e3

    def pair(walk):
        def model(x, mask):
            with pyro.plate("data", len(x)):
                prior = MarkovNormal(walk, torch.zeros(1), x.shape[:2])
                z = pyro.sample("z", prior.mask(lasting(mask)).to_event(1))
                pyro.sample("x", Near(z * C, R).mask(mask).to_event(2), obs=x)

        return model, linear(1.3)[1]

    few = {"num_filters": 10, "num_particles": 20, "seed": 0}
    before, after = (
        pyrovae.filtered_log_likelihood(*pair(Walk()), each, mask, **few)
        for each in (x, impossible)
    )
    assert after.log_prob[2] == -torch.inf
    assert after.ess[2] == 0
    others = torch.arange(N) != 2
    assert torch.equal(after.log_prob[others], before.log_prob[others])
    assert before.log_prob.isfinite().all()
    # Neither where the steps behind the end, which do not count, are impossible too.
    for found in (
        pyrovae.filtered_log_likelihood(*pair(Rigid()), x, mask, **few),
        pyrovae.log_likelihood(*pair(Rigid()), x, mask, num_samples=10, seed=0),
    ):
        assert torch.equal(found.log_prob, torch.full((N,), -torch.inf).double())


def test_a_guide_with_flows_is_within_its_error_of_the_filter():
    """Two walks at once, for a flow has two dimensions at least."""
    x, mask = (torch.cat([each, each], -1)[:, :3] for each in batch())
    exact = torch.stack([2 * filtered(*row) for row in zip(x[..., :2], LENGTHS, strict=True)])
    walk, start, slope = Walk(), torch.zeros(2), torch.block_diag(C[None], C[None])

    def model(x, mask):
        with pyro.plate("data", len(x)):
            prior = MarkovNormal(walk, start, x.shape[:2])
            z = pyro.sample("z", prior.mask(lasting(mask)).to_event(1))
            pyro.sample("x", dist.Normal(z @ slope, R).mask(mask).to_event(2), obs=x)

    guide = Guide((3, 4), 2, 16, flows=2, width=8)
    optim, loss = pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO()
    svi = pyrovae.SVI(model, guide, optim, loss, compile=False)
    for _ in range(50):
        svi.step(x, mask)
    chains = {"num_chains": 64, "num_temperatures": 3, "seed": 1}
    for found in (
        pyrovae.log_likelihood(model, guide, x, mask, num_samples=4000, seed=1),
        pyrovae.annealed_log_likelihood(model, guide, x, mask, **chains),
        pyrovae.filtered_log_likelihood(model, guide, x, mask, num_filters=20, seed=1),
    ):
        error = (found.log_prob - exact) / found.standard_error
        assert error.square().mean().sqrt() < 2
        assert found.standard_error.max() < 0.2


@pytest.mark.parametrize("flows", [0, 2])
def test_what_stands_behind_the_end_changes_nothing(flows):
    x, mask = batch()
    model, guide = Model((T, 2), 3, (5,), 4), Guide((T, 2), 3, 6, flows, 4)
    x = (x > 0).float()
    rubbish = torch.where(mask, x, 1 - x)
    found = [pyrovae.log_likelihood(model, guide, d, mask, num_samples=50, seed=0).log_prob
             for d in (x, rubbish)]  # fmt: skip
    assert torch.equal(*found)
    longer = [torch.nn.functional.pad(each, (0, 0, 0, 3)) for each in (x, mask)]
    with torch.no_grad():
        seen = [
            guide.encoder(each.masked_fill(~there, 0.0), LENGTHS)
            for each, there in ((rubbish, mask), longer)
        ]
    for n, length in enumerate(LENGTHS):
        torch.testing.assert_close(seen[1][n, :length], seen[0][n, :length])


def test_a_backward_network_reads_from_the_last_step_on():
    network, x = BackwardGRU(2, 3), batch()[0]
    with torch.no_grad():
        found = network(x, LENGTHS)
        for n, length in enumerate(LENGTHS):
            alone = network.gru(x[n : n + 1, :length].flip(1)).flip(1)[0]
            torch.testing.assert_close(found[n, :length], alone)
        # What a compiler is told of the memory holds for a cut batch as for a full one.
        for steps in (T, 3):
            assert whole(_read, network.gru, x, torch.tensor([float(steps)])).is_contiguous()


def test_a_chain_scores_each_step_given_the_one_before():
    chain = MarkovNormal(Walk(), torch.tensor([0.5]), (N, T))
    z = batch()[0][..., :1]
    before = torch.cat([torch.full((N, 1, 1), 0.5), z[:, :-1]], 1)
    expected = dist.Normal(A * before, S).log_prob(z)[..., 0]
    torch.testing.assert_close(chain.log_prob(z), expected)
    pyro.set_rng_seed(0)
    drawn = chain.expand((4000, T)).rsample()[..., 0]
    variance = [S**2 * (1 - A ** (2 * t)) / (1 - A**2) for t in range(1, T + 1)]
    mean = [0.5 * A**t for t in range(1, T + 1)]
    torch.testing.assert_close(drawn.mean(0), torch.tensor(mean), atol=0.07, rtol=0)
    torch.testing.assert_close(drawn.var(0), torch.tensor(variance), rtol=0.12, atol=0)


class Bent(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(2, 2)

    def forward(self, z, h):
        return (self.map(z) + h).tanh(), h.exp()


def test_one_piece_has_the_gradient_of_its_steps():
    network, start = Bent().double(), torch.zeros(2).double().requires_grad_()
    noise, h = torch.randn(2, 3, T, 2).double(), torch.randn(3, T, 2).double().requires_grad_()
    wanted, lengths = [start, h, *network.parameters()], torch.tensor([T - 2.0, 1.0, 3.0])
    weight = torch.randn(2, 3, T - 2, 2).double()
    found = [
        torch.autograd.grad((weight * values).sum(), wanted)
        for values in (
            _unrolled(network, noise, start, lengths * 9, h)[..., : T - 2, :],
            whole(_unrolled, network, noise, start, lengths, h)[..., : T - 2, :],
        )
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    drawn = _unrolled(network, noise, start, lengths, h)
    assert drawn.shape == noise.shape
    assert drawn[..., T - 3, :].all()
    assert not drawn[..., T - 2 :, :].any()


@pytest.mark.parametrize("flows", [0, 1])
def test_a_captured_step_does_not_unroll_time(monkeypatch, flows):
    """Its record is what is run here, without Inductor."""
    called = []

    def kept(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes]
        called.extend(sorted(name for name in names if name.startswith("pyrovae")))
        assert len(names) < 1700
        return graph

    monkeypatch.setattr("pyrovae.compiling.graph._compile", kept)
    x = (torch.rand(4, 40, 2, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    losses = []
    for compile in (False, True):
        pyro.set_rng_seed(0)
        pair = Model((40, 2), 3, (5,), 4), Guide((40, 2), 3, 6, flows, 4)
        optim = pyro.optim.SGD({"lr": 1e-4})
        svi = pyrovae.SVI(*pair, optim, pyro.infer.Trace_ELBO(), compile=compile, steps=10)
        losses.append([svi.step(x) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    pieces = ["pyrovae.whole.default"] * 2 + ["pyrovae.whole_backward.default"] * 2
    assert called == pieces


@pytest.mark.inductor
def test_what_inductor_makes_of_cut_sequences_is_the_eager_run():
    """It writes strides down; where a piece has others, the pair runs eagerly, with a warning."""
    x, losses = torch.rand(3, 6, 2, generator=torch.Generator().manual_seed(0)).round(), []
    mask = (torch.arange(6) < torch.tensor([4, 1, 3])[:, None])[..., None].expand_as(x)
    for compile in (False, True):
        pyro.set_rng_seed(0)
        pair = Model((6, 2), 2, (), 2), Guide((6, 2), 2, 3)
        optim = pyro.optim.SGD({"lr": 0.01})
        svi = pyrovae.SVI(*pair, optim, pyro.infer.Trace_ELBO(), compile=compile, steps=10)
        losses.append([svi.step(x, mask) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_generation_starts_at_the_beginning():
    x, mask = batch()
    model = Model((T, 2), 3, (5,), 4)
    drawn = [pyrovae.sample(model, mask, like=d, n=N, seed=3) for d in (x * 0, x * 0 + 1)]
    assert torch.equal(*drawn)
    assert set(drawn[0].unique().tolist()) <= {0.0, 1.0}


def chorales(tmp_path, **parts):
    folder = tmp_path / "JSB"
    folder.mkdir()
    (folder / "jsb-chorales-quarter.json").write_text(json.dumps(parts))
    return tmp_path


def test_chorales_are_padded_and_masked(tmp_path):
    one, two = [[21], [60, 64], []], [[108]]
    root = chorales(tmp_path, train=[one, two], valid=[two], test=[one])
    data = pyrovae.load_data("jsb", root=root)
    assert (list(data.shape), len(data.train), len(data.valid)) == ([3, 88], 2, 1)
    assert data.train[0].nonzero().tolist() == [[0, 0], [1, 39], [1, 43]]
    (mask,) = data.context.train
    assert mask[..., 0].tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize("parts", [{"train": []}, {"train": [[[200]]], "valid": [], "test": []}])
def test_another_file_is_no_chorales(tmp_path, parts):
    with pytest.raises(pyrovae.InputError, match="got another file"):
        pyrovae.load_data("jsb", root=chorales(tmp_path, **parts))


def test_where_chorales_belong(tmp_path, monkeypatch):
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="PYROVAE_DATA"):
        pyrovae.load_data("jsb")


def test_the_programs_of_its_page(repository, tmp_path, monkeypatch):
    text = (repository / "docs" / "sequences.md").read_text(encoding="utf-8")
    first, second, third = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    one = [[60, 64], [62], [64]]
    root = chorales(tmp_path, train=[one, one[:2]], valid=[one], test=[one, one[1:]])
    monkeypatch.setenv("PYROVAE_DATA", str(root))
    for long, short in {"=400": "=2", "=20)": "=2)", "=64": "=3", "=1000": "=20"}.items():
        assert long in first
        first = first.replace(long, short)
    names = {}
    exec(first, names)
    assert names["per_step"] < 0
    assert names["music"].shape == (2, 3, 88)
    exec(third.replace("=100", "=2").replace("=64", "=3"), names)
    assert names["ll"].log_prob.isfinite().all()
    monkeypatch.chdir(tmp_path)
    x, lengths = torch.rand(20, 4, 2).round(), torch.arange(20) % 4 + 1
    there = (torch.arange(4) < lengths[:, None])[..., None]
    np.save("padded.npy", x.masked_fill(~there, math.nan).numpy())
    rows = {"pyrovae": pyrovae, "x": x.numpy(), "T": 4, "D": 2, "lengths": lengths.numpy()}
    for line in second.splitlines():
        exec(line, rows)
        if line.startswith("data"):
            masks = [split[0] for split in rows["data"].context]
            assert sum(int(mask.sum()) for mask in masks) == 2 * lengths.sum()
            assert rows["data"].shape == (4, 2)
