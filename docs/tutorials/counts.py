# %% [markdown]
# # Counts with size factors
#
# Cells in which the transcripts of genes are counted: some cells are read more deeply than others
# (their size factors), in batches that differ, and what is of interest is neither. scVI (Lopez et
# al., Nature Methods 15, 2018) is a VAE for such tables; here it is in forty lines, on counts
# whose truth is known, so that it can be told how much of it was found.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

import pyrovae
from pyrovae.data import Dataset, Splits
from pyrovae.nn import MLP

# %% [markdown]
# ## The counts
#
# Two thousand cells, forty genes, two batches. A cell's state z has two dimensions, shares of
# genes are softmax(Wz + b + batch), and counts are negative binomial about size × share.

# %%
CELLS, GENES = 2000, 40
draw = torch.Generator().manual_seed(0)
weight = 0.8 * torch.randn(2, GENES, generator=draw)
bias = torch.randn(GENES, generator=draw)
shift = 0.5 * torch.randn(2, GENES, generator=draw)
r = 2 + 8 * torch.rand(GENES, generator=draw)

z = torch.randn(CELLS, 2, generator=draw)
batch = torch.randint(2, (CELLS,), generator=draw)
size = (4.8 + 0.4 * torch.randn(CELLS, generator=draw)).exp()


def shares(z, batch):
    """The truth's shares of the genes."""
    return (z @ weight + bias + shift[batch]).softmax(-1)


rate = size[:, None] * shares(z, batch)
gamma = torch.from_numpy(np.random.default_rng(0).gamma(r.expand(CELLS, -1)) / r.numpy()).float()
x = torch.poisson(rate * gamma, generator=draw)
print(
    f"{x.sum(1).mean():.0f} transcripts a cell, from {x.sum(1).min():.0f} to {x.sum(1).max():.0f}"
)
print(f"{(x == 0).float().mean():.0%} of the counts are 0")

# %% [markdown]
# ## The model and the guide


# %%
class ScVI(PyroModule):
    """Counts of genes given a code, the size factor, and the batch of each cell."""

    def __init__(self, genes, batches=2, latent=2, hidden=64):
        super().__init__()
        self.latent = latent
        self.code, self.batch = nn.Linear(latent, hidden), nn.Embedding(batches, hidden)
        self.decoder = MLP(hidden, (2, genes), hidden=())
        self.r = PyroParam(torch.ones(genes), constraint=constraints.positive)

    def forward(self, x, size, batch):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            h = (self.code(z) + self.batch(batch)).relu()
            share, dropout = self.decoder(h).unbind(-2)
            mean = size[:, None] * share.softmax(-1)
            counts = dist.ZeroInflatedNegativeBinomial(
                self.r, logits=mean.log() - self.r.log(), gate_logits=dropout
            )
            pyro.sample("x", counts.to_event(1), obs=x)


class Encoder(PyroModule):
    """q(z | x, size, batch): the network sees ln(1 + x), and the depth apart from it."""

    def __init__(self, genes, batches=2, latent=2, hidden=64):
        super().__init__()
        self.genes, self.batch = nn.Linear(genes + 1, hidden), nn.Embedding(batches, hidden)
        self.posterior = MLP(hidden, (2, latent), hidden=(hidden,))

    def forward(self, x, size, batch):
        with pyro.plate("data", len(x)):
            seen = torch.cat([x.log1p(), size.log()[:, None]], -1)
            loc, log_scale = self.posterior((self.genes(seen) + self.batch(batch)).relu()).unbind(
                -2
            )
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


# %% [markdown]
# Size and batch are context: they travel with the data, and both programs get them after x. (scVI
# infers the size, too, as a log-normal latent; the edit is a second `pyro.sample`.)

# %%
(train, valid, test), *context = (t.split([1400, 200, 400]) for t in (x, size, batch))
data = Dataset("cells", (GENES,), train, valid, test, context=Splits(*zip(*context, strict=True)))
pyro.set_rng_seed(0)
model, guide = ScVI(GENES), Encoder(GENES)
assert pyrovae.check(model, guide, *data.head(64), seed=0).passed
pyrovae.fit(
    model, guide, data, objective="trace_mean_field_elbo", epochs=60, lr=5e-3, schedule="cosine",
    seed=0, compile=False,
)  # fmt: skip
told = data.split("test")
ll = pyrovae.log_likelihood(model, guide, *told, num_samples=500, seed=0)
print(f"log p(x) {ll.mean:.3f} ± {ll.mean_standard_error:.3f} nats per cell")

# %% [markdown]
# ## What it has learned
#
# Codes of cells, which lie by state and not by batch; and each cell's shares of genes, the noise
# of counting and the batch's depth taken off, beside the truth's.

# %%
with torch.no_grad():
    code = pyrovae.encode(guide, *told, seed=0)["z"]
    h = (model.code(code) + model.batch(told[2])).relu()
    found = model.decoder(h)[:, 0].softmax(-1)
true, counted = shares(z[-400:], told[2]), told[0] / told[1][:, None]
figure, panels = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained")
panels[0].scatter(*code.T, c=z[-400:, 0], s=8)
panels[0].set(title="codes, coloured by the true state", xlabel="z[0]", ylabel="z[1]")
panels[1].scatter(*code.T, c=told[2], cmap="coolwarm", s=8)
panels[1].set(title="the same, by batch", xlabel="z[0]", ylabel="z[1]")
panels[2].scatter(true.flatten(), counted.flatten(), s=1, color="silver", label="counts / size")
panels[2].scatter(true.flatten(), found.flatten(), s=1, label="the model")
panels[2].set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1))
panels[2].set(title="shares of genes", xlabel="the truth")
panels[2].legend(frameon=False, markerscale=6)

# %% [markdown]
# ## How much of the truth
#
# z has two dimensions, so the truth's own log p(x) of a cell is an integral over a plane, done
# here on a grid.


# %%
def exact(x, size, batch, side=90):
    """The truth's log p(x) by the trapezoidal rule over z, nats per cell."""
    axis = torch.linspace(-4.5, 4.5, side)
    grid = torch.cartesian_prod(axis, axis)
    prior = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1) + 2 * (axis[1] - axis[0]).log()
    found = torch.empty(len(x))
    for s in (0, 1):
        share = shares(grid, torch.tensor(s))
        for n in (batch == s).nonzero()[:, 0]:
            mean = size[n] * share
            counts = x[n] * mean.log() - (x[n] + r) * (mean + r).log()
            rest = (x[n] + r).lgamma() - r.lgamma() - (x[n] + 1).lgamma() + r * r.log()
            found[n] = (counts.sum(-1) + prior).logsumexp(0) + rest.sum()
    return found


truth = exact(*told)
gap = truth - ll.log_prob
print(f"the truth    {truth.mean():.2f} nats per cell")
print(f"the model    {ll.mean:.2f}")
print(f"the gap      {gap.mean():.2f} ± {gap.std() / len(gap) ** 0.5:.2f}")

# %% [markdown]
# scvi-tools on the same cells, by its own estimate: [beside the truth and this
# model](../benchmarks.md#counts-beside-scvi-tools).
