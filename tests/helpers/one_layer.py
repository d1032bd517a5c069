"""The programs with one latent layer, small, and what their tests share."""

import importlib

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import pyrovae

SHAPE, LATENT, N = (1, 8, 8), 3, 12
OPTIONS = {"latent": LATENT, "hidden": (12,)}
SMALL = {
    "categorical": {"features": 4},
    "discretized_logistic": {"components": 2},
    "mixture_prior": {"components": 4},
    "vamp_prior": {"components": 4},
    "flow_prior": {"steps": 2, "width": 8},
    "convolutional": {"channels": (3, 4)},
    "low_rank": {"rank": 2},
    "iaf": {"steps": 2, "width": 8},
    "flow": {"steps": 2, "width": 8},
    "mixture": {"components": 2},
}
MODELS = (
    "bernoulli",
    "continuous_bernoulli",
    "gaussian",
    "laplace",
    "categorical",
    "discretized_logistic",
    "poisson",
    "negative_binomial",
    "mixture_prior",
    "vamp_prior",
    "flow_prior",
    "convolutional",
)
GUIDES = (
    "mean_field",
    "convolutional",
    "full_covariance",
    "low_rank",
    "iaf",
    "flow",
    "mixture",
    "autoencoder",
)
PRIORS = ("mixture_prior", "vamp_prior", "flow_prior")
FLOWS = ("iaf", "flow")
EACH = [(m, "mean_field") for m in MODELS] + [("bernoulli", g) for g in GUIDES[1:]]
each_pair = pytest.mark.parametrize(("model", "guide"), EACH, ids=["-".join(e) for e in EACH])


def build(kind, name, shape=SHAPE, **options):
    module = importlib.import_module(f"pyrovae.{kind}.{name}")
    (attribute,) = module.__all__
    return getattr(module, attribute)(shape, **OPTIONS | SMALL.get(name, {}) | options)


def pair(model, guide, shape=SHAPE, *, levels=17, **options):
    guide = build("guides", guide, shape, **options)
    if model == "vamp_prior":
        options["guide"] = guide
    if model in ("categorical", "discretized_logistic"):
        options["levels"] = levels
    return build("models", model, shape, **options), guide


def edited(folder, name, old, new):
    """The class of a shipped file with one of its lines edited, as a person would."""
    module = importlib.import_module(f"pyrovae.{folder}.{name}")
    with open(module.__file__, encoding="utf-8") as file:
        source = file.read()
    assert source.count(old) == 1
    scope = {"__name__": "edited"}
    exec(compile(source.replace(old, new), f"my_{name}.py", "exec"), scope)
    return scope[module.__all__[0]]


def data(model, n=N):
    u = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))
    if model in ("continuous_bernoulli", "gaussian", "laplace"):
        return u
    if model in ("categorical", "discretized_logistic"):
        return (16 * u).round() / 16
    if model in ("poisson", "negative_binomial"):
        return (6 * u).floor()
    return (u > 0.6).float()


def svi_of(model, guide, lr=0.02, **options):
    optim = pyro.optim.Adam({"lr": lr})
    return pyrovae.SVI(model, guide, optim, Trace_ELBO(**options), compile=False)


def grid(size=161, reach=8.0):
    """Points ``[G, 2]`` of the plane and the area of a cell."""
    line = torch.linspace(-reach, reach, size, dtype=torch.float64)
    return torch.cartesian_prod(line, line), (2 * reach / (size - 1)) ** 2


def double(*programs):
    return [program.double() for program in programs]


def prior_of(model, x):
    trace = poutine.trace(poutine.uncondition(model)).get_trace(x)
    return trace.nodes["z"]["fn"]


def posterior_of(guide, x):
    return poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
