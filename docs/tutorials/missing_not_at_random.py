# %% [markdown]
# # Missing not at random
#
# A sensor that goes blank above its range, an income that is not told because it is high: being
# missing says something about the value. A model of the observed values alone takes what it sees
# for the whole, and fills gaps with values that are too low. The mend is to write down how values
# go missing, and to observe the mask as data (not-MIWAE,
# [2006.12871](https://arxiv.org/abs/2006.12871)). It is an edit of four lines.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import softplus

import pyrovae
from pyrovae.data import Dataset, Splits
from pyrovae.models.linear_gaussian import LinearGaussian
from pyrovae.nn import MLP

# %% [markdown]
# ## Data with a known truth
#
# Eight columns that a code of two numbers explains. The first four lose values: the probability
# that x is missing is sigmoid(4x), about one half in all, and high values are gone.

# %%
N, D, LATENT, SLOPE, NOISE = 2000, 8, 2, 4.0, 0.5
pyro.set_rng_seed(0)
truth = LinearGaussian((D,), LATENT, scale=NOISE)
nn.init.normal_(truth.decoder.last.weight)
nn.init.zeros_(truth.decoder.last.bias)
whole = pyrovae.sample(truth, like=torch.zeros(1, D), n=N, seed=0).detach()
mask = torch.rand(N, D) > (SLOPE * whole).sigmoid()
mask[:, D // 2 :] = True
holes = torch.where(mask, whole, torch.nan)
above = (whole[~mask] > 0).float().mean()
print(f"{(~mask).float().mean():.0%} missing, of these {above:.0%} above 0")

# %% [markdown]
# ## As if missing at random
#
# `linear_gaussian` with a mask is probabilistic PCA of what is observed.

# %%
data = Dataset("blank", (D,), holes.nan_to_num(0), context=Splits((mask,), (), ()))
how = {"objective": "iwae", "particles": 10, "epochs": 40, "lr": 1e-2, "schedule": "cosine"}


class Seeing(PyroModule):
    """q(z | x observed, mask): the network is told what is missing, too."""

    def __init__(self):
        super().__init__()
        self.encoder = MLP(2 * D, (2, LATENT), hidden=(64,))

    def code(self, x, mask):
        seen = torch.cat([x.masked_fill(~mask, 0.0), mask.to(x)], -1)
        loc, log_scale = self.encoder(seen).unbind(-2)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def forward(self, x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.code(x, mask))


def error(found):
    """The root mean square error of the missing values."""
    return (found.mean - whole)[~mask].square().mean().sqrt()


pyro.set_rng_seed(0)
at_random, guide = LinearGaussian((D,), LATENT), Seeing()
pyrovae.fit(at_random, guide, data, **how, batch_size=100, seed=0, compile=False)
naive = pyrovae.impute(at_random, guide, holes, num_samples=500, seed=0)
print(f"root mean square error {error(naive):.3f}")

# %% [markdown]
# ## With the mask observed
#
# Four lines are new. Where x is missing it is a latent, `hidden`, with the likelihood as its
# prior; `seen` observes the mask given the completed x, a logistic curve for each column whose
# direction we say (high values go) and whose steepness is learned. The guide proposes what the
# decoder says, so it shares it: one class holds both programs.


# %%
class NotAtRandom(PyroModule):
    """Probabilistic PCA whose values go missing by themselves: p(z) p(x | z) p(mask | x)."""

    def __init__(self):
        super().__init__()
        self.decoder, self.proposal = MLP(LATENT, D, hidden=()), Seeing()
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)
        self.slope, self.offset = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))

    def model(self, x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            p = dist.Normal(self.decoder(z), self.scale)
            pyro.sample("x", p.mask(mask).to_event(1), obs=x)
            hidden = pyro.sample("hidden", p.mask(~mask).to_event(1))
            full = torch.where(mask, x, hidden)
            seen = dist.Bernoulli(logits=self.offset - softplus(self.slope) * full)
            pyro.sample("seen", seen.to_event(1), obs=mask.to(x))

    def guide(self, x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.proposal.code(x, mask))
            p = dist.Normal(self.decoder(z), self.scale)
            pyro.sample("hidden", p.mask(~mask).to_event(1))


pyro.set_rng_seed(0)
pair = NotAtRandom()
pyrovae.fit(pair.model, pair.guide, data, **how, batch_size=100, seed=0, compile=False)

# %% [markdown]
# `impute` weighs the guide's draws by p(x observed, mask, hidden, z) / q(hidden, z); `site` names
# the latent that is x where x is missing.

# %%
found = pyrovae.impute(pair.model, pair.guide, holes, site="hidden", num_samples=500, seed=0)
print(f"root mean square error {error(found):.3f}")
slopes = softplus(pair.slope[: D // 2]).tolist()
print(f"slopes {', '.join(f'{slope:.1f}' for slope in slopes)}; the truth's are {SLOPE}")

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), sharex=True, sharey=True)
gone = ~mask[:, 0]
for axes, name, filled in zip(
    panels, ("mask ignored", "mask observed"), (naive, found), strict=True
):
    axes.scatter(whole[gone, 0], filled.mean[gone, 0].detach(), s=4)
    axes.axline((0, 0), slope=1, color="gray", lw=0.8)
    axes.set(title=name, xlabel="what is missing", ylabel="imputed")

# %% [markdown]
# ## The best that can be done
#
# Whoever knows the truth fills a gap with E[x | x observed, mask]. z has two dimensions, and
# given z the columns are independent, so that this is a sum over a grid of z and, within it, of
# x.

# %%
axis = torch.linspace(-4.5, 4.5, 61)
z = torch.cartesian_prod(axis, axis)
with torch.no_grad():
    mean = truth.decoder(z)
normal = torch.linspace(-4, 4, 101)
values = mean[..., None] + NOISE * normal
joint = (-(normal**2) / 2).softmax(0) * (SLOPE * values).sigmoid()  # of x and its being missing
lost = joint.sum(-1)
filled = (joint * values).sum(-1) / lost

seen = mask.float()
log_weight = seen * whole @ (mean / NOISE**2).T - seen @ (mean / NOISE).square().T / 2
log_weight += (1 - seen) @ lost.log().T - z.square().sum(-1) / 2
best = log_weight.softmax(-1) @ filled
least = (best - whole)[~mask].square().mean().sqrt()
print(f"as if missing at random  {error(naive):.3f}")
print(f"with the mask observed   {error(found):.3f}")
print(f"whoever knows the truth  {least:.3f}")

# %% [markdown]
# Nearly all that ignoring the mask costs is won back. It rests on what was said of the mask: data
# alone cannot tell whether high values or low ones went missing.
