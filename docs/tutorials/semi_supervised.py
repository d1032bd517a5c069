# %% [markdown]
# # Few labels
#
# 1,258 digits of which 50 have a label, five of each class. The model M2
# ([1406.5298](https://arxiv.org/abs/1406.5298)) explains a digit by its class y and by a code z
# for the rest; where the label is missing y is a latent variable, and the bound sums over it. At
# the end its classifier stands beside one that sees the fifty labelled digits alone.

# %%
import matplotlib.pyplot as plt
import pyro
import torch
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

import pyrovae
from pyrovae.guides.semi_supervised import SemiSupervised as Guide
from pyrovae.models.semi_supervised import SemiSupervised as Model

data = pyrovae.load_data("digits", binarize="threshold", context="labels", labelled=50)
x, y = data.split("train")
print(data)
print(f"{(y >= 0).sum()} labels, and {(y < 0).sum()} where y is -1")

# %% [markdown]
# Both programs are called as `model(x, y)` and `guide(x, y)`. `trace_enum_elbo` sums over the
# hidden labels exactly, and `alpha` is the weight of the classifier's own loss on the labels that
# are known.

# %%
pyro.set_rng_seed(0)
model = Model(data.shape, latent=5, hidden=(100,))
guide = Guide(data.shape, latent=5, hidden=(100,), alpha=50.0)
fit = pyrovae.fit(
    model, guide, data, objective="trace_enum_elbo", epochs=40, lr=5e-3, schedule="cosine", seed=0,
    compile=False,
)  # fmt: skip
print(f"bound of the validation digits {fit.history[-1]['valid_elbo']:.2f} nats per digit")

# %% [markdown]
# ## Class and style
#
# Four styles z, each drawn as every digit:

# %%
figure, grid = plt.subplots(4, 10, figsize=(8, 3.4))
pyro.set_rng_seed(1)
style = torch.randn(4, 1, 5).expand(4, 10, 5)
digit = torch.arange(10).expand(4, 10)
latents = {"z": style.reshape(40, 5)}
images = pyrovae.decode(model, latents, digit.reshape(40), like=x, seed=0)
for axes, image in zip(grid.flat, images, strict=True):
    axes.imshow(image[0].detach(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()
figure.suptitle("rows share a style, columns a label")

# %% [markdown]
# ## How many it gets right
#
# `classify` gives q(y | x). The other classifier is logistic regression on the same fifty digits,
# with whichever of three penalties suits the test digits best.

# %%
test, labels = data.test, data.labels.test
hidden = torch.full((len(test),), -1)
found = pyrovae.classify(guide, test, hidden, seed=0).argmax(-1)
known = y >= 0


def logistic(c):
    """Whether logistic regression is right, for each test digit."""
    fitted = LogisticRegression(C=c, max_iter=2000).fit(x[known].flatten(1), y[known])
    return torch.tensor(fitted.predict(test.flatten(1))) == labels


right, peers = found == labels, max((logistic(c) for c in (0.1, 1.0, 10.0)), key=torch.sum)
print(f"M2, 50 labels and 1,208 digits without: {right.float().mean():.1%}")
print(f"logistic regression, 50 labels:         {peers.float().mean():.1%}")
won, lost = (right & ~peers).sum().item(), (peers & ~right).sum().item()
chance = binomtest(won, won + lost).pvalue
print(
    f"where they differ, M2 is right {won} times of {won + lost}: by chance with p = {chance:.3f}"
)

# %% [markdown]
# What the digits without a label are worth is the difference of the two, on the same test digits.
