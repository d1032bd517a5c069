# %% [markdown]
# # Tables with gaps
#
# Measurements of 569 tumours, eleven columns of two kinds, of which 30% of all cells are hidden
# at random, in training as in the end. The pair `table` × `table` gives each column a likelihood
# of its own in its own units; [models/table.py](../../models/table.py) has one function for each
# kind.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, SimpleImputer

import pyrovae
from pyrovae.guides.table import Table as Guide
from pyrovae.models.table import Table as Model

source = load_breast_cancer(as_frame=True)
frame = source.data.iloc[:, :10].rename(columns=lambda name: name.removeprefix("mean "))
frame = frame.drop(columns=["concavity", "concave points"])  # some of these are 0
frame["benign"] = source.target.astype(float)
holes = frame.mask(np.random.default_rng(0).random(frame.shape) < 0.3)
print(holes.head(4).round(2).to_string())

# %% [markdown]
# A gap is NaN. `missing="mask"` says that this is what it means, and hands both programs a mask.
# The numbers are all positive, and some have long tails, so their columns are said to be
# `positive`, log-normal given z.

# %%
kinds = dict.fromkeys(frame.columns[:-1], "positive") | {"benign": "binary"}
data = pyrovae.load_data(holes, missing="mask", columns=kinds)
pyro.set_rng_seed(0)
networks = {"latent": 6, "hidden": (64,), "activation": "Tanh"}
model = Model(data.shape, data.columns, **networks)
guide = Guide(data.shape, data.columns, **networks)
fit = pyrovae.fit(
    model, guide, data, objective="iwae", particles=5, epochs=150, batch_size=64, lr=1e-2,
    schedule="cosine", seed=0, compile=False,
)  # fmt: skip
ll = pyrovae.log_likelihood(model, guide, *data.split("test"), num_samples=1000, seed=0)
print(f"log p(x observed) {ll.mean:.3f} ± {ll.mean_standard_error:.3f} nats per row, test rows")

# %% [markdown]
# ## Fill the gaps
#
# `impute` draws from p(x missing | x observed) by importance sampling: best guesses, means with
# errors, quantiles and whole completed tables.

# %%
x = torch.tensor(holes.to_numpy()).float()
found = pyrovae.impute(model, guide, x, num_samples=1000, quantiles=(0.05, 0.5, 0.95), seed=0)
print(f"{x.isnan().sum()} cells filled, median ESS {found.ess.median():.0f} of 1,000")

# %% [markdown]
# Are its intervals honest? Nine in ten of the numbers that were hidden have to lie between the 5%
# and the 95% quantile.

# %%
truth, hidden = torch.tensor(frame.to_numpy()).float(), x.isnan()
hidden[:, -1] = False  # numbers alone
low, middle, high = found.quantiles
inside = ((truth >= low) & (truth <= high))[hidden].float().mean()
print(f"{inside:.1%} of {hidden.sum()} hidden numbers lie in their 90% intervals")

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3.4))
for axes, name in zip(panels, ("area", "smoothness"), strict=True):
    column = frame.columns.get_loc(name)
    at = hidden[:, column]
    spread = torch.stack([middle - low, high - middle])[:, at, column]
    axes.errorbar(
        truth[at, column], middle[at, column], spread, fmt=".", lw=0.5, alpha=0.6, label="hidden"
    )
    axes.axline((truth[:, column].mean(), truth[:, column].mean()), slope=1, color="gray", lw=0.8)
    axes.set(title=name, xlabel="what was hidden", ylabel="median and 90% interval")
figure.tight_layout()

# %% [markdown]
# ## Beside scikit-learn
#
# `IterativeImputer` regresses each column on the others, in turns; it is given the same
# knowledge, the logarithms of the positive columns. The error is the root mean square of those
# logarithms over their standard deviation; the column mean has about 1.


# %%
def errors(filled):
    """Of the positive columns, and the share of wrong guesses of the binary one."""
    wrong = (filled[:, -1].round() != truth[:, -1])[x[:, -1].isnan()].float().mean()
    scaled = (filled[:, :-1].log() - truth[:, :-1].log()) / truth[:, :-1].log().std(0)
    return scaled[hidden[:, :-1]].square().mean().sqrt(), wrong


logs = torch.cat([x[:, :-1].log(), x[:, -1:]], 1).double().numpy()
ways = {"table × table": found.quantiles[1].where(hidden, found.filled)}
for name, imputer in (
    ("IterativeImputer", IterativeImputer(max_iter=30, tol=1e-2, random_state=0)),
    ("column mean", SimpleImputer()),
):
    filled = torch.tensor(imputer.fit_transform(logs)).float()
    ways[name] = torch.cat([filled[:, :-1].exp(), filled[:, -1:]], 1)
for name, filled in ways.items():
    error, wrong = errors(filled)
    print(f"{name:17} error {error:.3f}, {wrong:.1%} of the diagnoses wrong")

# %% [markdown]
# A regression of each column on the others is hard to beat in a table as linear as this one (in
# logarithms). What the pair adds are the intervals above, draws that belong together, and a
# log p(x) to compare models by. [Missing values](../imputation.md) has harder tables.
