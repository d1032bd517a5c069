# %% [markdown]
# # Images
#
# A variational autoencoder of handwritten digits, 8×8 grey levels, that ends beside the one model
# of images whose likelihood can be written down: principal component analysis.

# %%
from textwrap import fill

import matplotlib.pyplot as plt
import pyro
import torch
from sklearn.decomposition import PCA

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.gaussian import Gaussian
from pyrovae.models.linear_gaussian import LinearGaussian

data = pyrovae.load_data("digits")
print(data)

# %% [markdown]
# The model draws a code z of eight numbers and a picture around what a network makes of it, with
# noise of one learned size; the guide goes the other way. Both are short programs to copy and
# edit, [models/gaussian.py](../../models/gaussian.py) and
# [guides/mean_field.py](../../guides/mean_field.py). (Black and white pixels go with `bernoulli`,
# colour with `residual`: [the gallery](../models.md).)
#
# Before training, ask what is wrong with the pair:

# %%
pyro.set_rng_seed(0)
model = Gaussian(data.shape, latent=8, hidden=(200,))
guide = MeanField(data.shape, latent=8, hidden=(200,))
model.scale = torch.tensor(0.3)  # where the noise starts: nearer to where it ends than 1
print(pyrovae.check(model, guide, data.train[:64], seed=0).passed)

# %%
how = {"objective": "trace_mean_field_elbo", "batch_size": 64, "lr": 3e-3, "seed": 0}
fit = pyrovae.fit(model, guide, data, epochs=50, **how)
for row in fit.history[9::10]:
    print(
        f"epoch {row['epoch']}  ELBO {row['train_elbo']:6.2f} train, {row['valid_elbo']:6.2f} valid"
    )

# %% [markdown]
# Grey levels between 0 and 1 have a density, which may exceed one: these logarithms are positive.
#
# ## What it has learned

# %%
figure, rows = plt.subplots(3, 10, figsize=(8, 2.6))
drawn = pyrovae.sample(model, like=data.test, n=10, mean=True, seed=0)
again = pyrovae.reconstruct(model, guide, data.test[:10], seed=0)
for row, images in zip(rows, (data.test[:10], again, drawn), strict=True):
    for axes, image in zip(row, images, strict=True):
        axes.imshow(image[0].detach(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_axis_off()
figure.suptitle("test digits, their reconstructions, and samples")

# %%
codes = pyrovae.encode(guide, data.test, seed=0)["z"].detach()
flat = PCA(2).fit_transform(codes)
figure, axes = plt.subplots(figsize=(5, 4))
shown = axes.scatter(*flat.T, c=data.labels.test, cmap="tab10", s=12)
figure.colorbar(shown, label="digit, which no program has seen")
axes.set_title("Posterior means of the test digits, two principal axes")

# %% [markdown]
# ## What it is worth
#
# The ELBO is a lower bound that depends on the guide. log p(x) does not, and comes with its Monte
# Carlo error and a diagnosis.

# %%
ll = pyrovae.log_likelihood(model, guide, data.test, num_samples=500, seed=0)
print(f"log p(x) {ll.mean:.3f} ± {ll.mean_standard_error:.3f} nats per digit")
print(fill(str(ll.verdict), 96))

# %% [markdown]
# Is the estimate right? With a linear decoder the model is probabilistic PCA, whose log p(x) is a
# formula. `fit_exact` starts it where the likelihood is largest, which is what scikit-learn's `PCA`
# finds as well; both programs are trained from there, and the same estimate is made as above:

# %%
pyro.set_rng_seed(0)
linear = LinearGaussian(data.shape, latent=8).fit_exact(data.train)
beside = MeanField(data.shape, latent=8, hidden=())
pyrovae.fit(linear, beside, data, epochs=30, **how | {"lr": 1e-2, "schedule": "cosine"})
estimate = pyrovae.log_likelihood(linear, beside, data.test, num_samples=1000, seed=0)
formula = linear.log_prob(data.test).mean()
pca = PCA(8).fit(data.train.flatten(1)).score(data.test.flatten(1))
print(f"linear, importance sampling  {estimate.mean:.3f} ± {estimate.mean_standard_error:.3f}")
print(f"linear, its formula          {formula:.3f}")
print(f"scikit-learn's PCA           {pca:.3f}")
print(f"the VAE                      {ll.mean:.3f}, {ll.mean - pca:.1f} nats per digit more")

# %% [markdown]
# The estimate is right where the answer is known, and the bent decoder is worth the rest.
