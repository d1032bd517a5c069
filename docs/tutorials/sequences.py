# %% [markdown]
# # Sequences
#
# Sequences of different lengths, from a process that we know: a hidden state goes round a ring of
# five, and each state sounds its own chord of ten notes, with mistakes. Its log p(x) can be
# computed exactly, and no model can do better on average, so the shipped pair `sequence` ×
# `sequence`, the deep Markov model, can be told how far off it is. (Real music:
# [Sequences](../sequences.md).)

# %%
import matplotlib.pyplot as plt
import pyro
import torch

import pyrovae
from pyrovae.data import Dataset, Splits
from pyrovae.guides.sequence import Sequence as Guide
from pyrovae.models.sequence import Sequence as Model

STATES, NOTES, STEPS = 5, 10, 12
generator = torch.Generator().manual_seed(0)
chords = torch.where(torch.rand(STATES, NOTES, generator=generator) < 0.4, 0.9, 0.05)
stay, advance = 0.3 * torch.eye(STATES), 0.7 * torch.eye(STATES).roll(1, 1)
move = stay + advance


def play(n):
    """n sequences, and how long each is."""
    states = [torch.randint(STATES, (n,), generator=generator)]
    for _ in range(STEPS - 1):
        states.append(move[states[-1]].multinomial(1, generator=generator)[:, 0])
    x = torch.bernoulli(chords[torch.stack(states, 1)], generator=generator)
    return x, torch.randint(STEPS // 2, STEPS + 1, (n,), generator=generator)


def exact(x, lengths):
    """log p(x) of each sequence by the forward recursion, nats."""
    step = torch.distributions.Bernoulli(chords).log_prob(x[:, :, None]).sum(-1)
    forward = step[:, 0] - torch.tensor(float(STATES)).log()
    for t in range(1, STEPS):
        ahead = torch.logsumexp(forward[:, :, None] + move.log(), 1) + step[:, t]
        forward = torch.where((t < lengths)[:, None], ahead, forward)
    return forward.logsumexp(-1)


# %% [markdown]
# Sequences are padded at their end, and a mask, true where x was observed, is the second argument
# of both programs. What stands behind the end is never looked at.

# %%
x, lengths = play(1600)
mask = (torch.arange(STEPS) < lengths[:, None])[..., None].expand_as(x)
(train, valid, test), masks = x.split([1000, 200, 400]), mask.split([1000, 200, 400])
data = Dataset("ring", x.shape[1:], train, valid, test, context=Splits(*((m,) for m in masks)))
print(data)

# %%
pyro.set_rng_seed(0)
model = Model(data.shape, latent=6, hidden=(32,), transition=32)
guide = Guide(data.shape, latent=6, hidden=48)
fit = pyrovae.fit(
    model, guide, data, epochs=50, batch_size=100, lr=1e-2, schedule="cosine", seed=0,
    compile=False,
)  # fmt: skip
print(f"bound {fit.history[-1]['valid_elbo']:.2f} nats per validation sequence")

# %%
figure, panels = plt.subplots(
    2, 4, figsize=(8, 3.2), sharex=True, sharey=True, layout="constrained"
)
music = pyrovae.sample(model, masks[2][:4], like=test, n=4, seed=0)
for row, rolls, what in zip(panels, (test, music), ("data", "sample"), strict=True):
    for axes, roll, seen in zip(row, rolls, masks[2], strict=False):
        axes.imshow((roll * seen).T, cmap="gray_r", aspect="auto", origin="lower")
        axes.set_title(what, fontsize=8)
figure.supxlabel("step")
figure.supylabel("note")

# %% [markdown]
# ## How far from the truth
#
# log p(x) of the test sequences by importance sampling, and the truth's own by its recursion. The
# difference of the two, per step, estimates the KL divergence from the truth to the model: it is
# 0 for a perfect model, and never less but for noise.

# %%
ll = pyrovae.log_likelihood(model, guide, test, masks[2], num_samples=300, seed=0)
truth, steps = exact(test, lengths[-400:]), lengths[-400:].sum()
gap = truth - ll.log_prob
error = gap.std() * len(gap) ** 0.5 / steps
print(f"the truth     {truth.sum() / steps:.3f} nats per step")
print(f"the model     {ll.log_prob.sum() / steps:.3f}")
print(f"the gap       {gap.sum() / steps:.3f} ± {error:.3f}")

# %% [markdown]
# What there was to learn: with every note on its own, sounding as often as in the training data,
# a step costs

# %%
rates = torch.distributions.Bernoulli(train[masks[0][..., 0]].mean(0))
apart = rates.log_prob(test).sum(-1)[masks[2][..., 0]].sum() / steps
print(f"independent notes {apart:.3f} nats per step")
learned = (ll.log_prob.sum() / steps - apart) / (truth.sum() / steps - apart)
print(f"of what there is to learn, learned: {learned:.0%}")
