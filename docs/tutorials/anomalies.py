# %% [markdown]
# # Anomalies
#
# A model of normal data scores each new datum by its log p(x), and calls it an anomaly below a
# threshold. How many normal data lie below it, the false alarms, can be promised: the threshold
# is an order statistic of validation scores, and the promise holds whatever the model is worth.
# Here the digits 0 to 8 are normal, and 9 is what nobody has seen.

# %%
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import betabinom
from sklearn.datasets import load_digits
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score

import pyrovae

digits = load_digits()
X, label = digits.data / 16, digits.target
order = np.random.default_rng(0).permutation(np.flatnonzero(label < 9))
train, valid, normal = (X[rows] for rows in np.split(order, [800, 1200]))
strange = X[label == 9]
sizes = f"{len(train)} to train on, {len(valid)} for the threshold, {len(normal)} normal"
print(f"{sizes}, {len(strange)} strange")

# %% [markdown]
# `pyrovae.VAE` is a pair with scikit-learn's interface.

# %%
vae = pyrovae.VAE(
    "gaussian", "mean_field", latent=8, epochs=60, batch_size=32, lr=3e-3, random_state=0
).fit(train)
scores, errors = vae.score_samples(normal, return_error=True)
print(f"log p(x) {scores.mean():.1f} nats, Monte Carlo error of one score {np.median(errors):.2f}")

# %% [markdown]
# ## A threshold with a promise
#
# At most 5% of normal data are to be called anomalies. The k-th smallest of N validation scores,
# with k = ⌊0.05 (N + 1)⌋, has a share of normal data below it that is Beta(k, N + 1 − k), over
# the draw of the validation data and whatever the scores' distribution.

# %%
vae.fit_threshold(valid, false_alarm=0.05, confidence=0.95)
low, high = vae.false_alarm_interval_
print(f"an anomaly lies below {vae.threshold_:.1f} nats")
print(f"promised: {vae.false_alarm_:.1%} false alarms, between {low:.1%} and {high:.1%}")

# %%
flags = vae.predict(normal) == -1
print(f"found:    {flags.mean():.1%} of {len(normal)} new normal digits")

# %% [markdown]
# What was found is a share of so many digits, with a spread of its own. Both together: the number
# of flags is beta-binomial, and lies in its central 95% with that probability.

# %%
rank = round(vae.false_alarm_ * (len(valid) + 1))
law = betabinom(len(normal), rank, len(valid) + 1 - rank)
first, last = law.ppf([0.025, 0.975])
print(f"{flags.sum()} flags; 95% of such experiments have {first:.0f} to {last:.0f}")

# %%
figure, axes = plt.subplots(figsize=(6, 3))
unseen = vae.score_samples(strange)
bins = np.linspace(*np.quantile(np.concatenate([scores, unseen]), [0.005, 1]), 40)
axes.hist(scores, bins, alpha=0.6, density=True, label="normal digits")
axes.hist(unseen, bins, alpha=0.6, density=True, label="nines")
axes.axvline(vae.threshold_, color="black", lw=1, label="threshold")
axes.set(xlabel="log p(x), nats", title="Scores of digits that nobody has seen")
axes.legend(frameon=False)

# %% [markdown]
# ## Beside an isolation forest
#
# The promise says nothing about how many anomalies are found; a better model finds more. The
# forest gets a threshold by the same rule from the same digits.

# %%
forest = IsolationForest(n_estimators=300, random_state=0).fit(train)
limit = np.sort(forest.score_samples(valid))[rank - 1]
for name, ordinary, odd, at in (
    ("VAE", scores, unseen, vae.threshold_),
    ("isolation forest", forest.score_samples(normal), forest.score_samples(strange), limit),
):
    order = roc_auc_score(np.r_[np.zeros(len(odd)), np.ones(len(ordinary))], np.r_[odd, ordinary])
    found, false = (odd < at).mean(), (ordinary < at).mean()
    print(
        f"{name:17} finds {found:5.1%} at {false:.1%} false alarms, area under the ROC {order:.3f}"
    )

# %% [markdown]
# Both keep the promise, as every score does; what differs is how much of the unknown they find.
