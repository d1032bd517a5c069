"""What the gallery shows: one row a program, in groups of comparable data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["GROUPS", "ROWS", "Row"]

GROUPS = {
    "binary": "Binary pixels, drawn anew from the grey levels in every epoch",
    "grey": "Grey levels between 0 and 1 as real numbers: densities, which may exceed one",
    "levels": "Grey levels as whole numbers: probabilities, in bits per dimension as well",
    "colour": "Coloured shapes, 3x16x16",
    "counts": "Grey levels from 0 to 15 as counts",
    "labels": "Binary pixels with their labels",
}


@dataclass(frozen=True)
class Row:
    """A pair, how it is trained, and what the gallery says of it.

    ``epochs``, ``limit`` (training images), ``images`` and ``samples`` (of log p(x)) replace the
    protocol's where a program is too heavy for it; ``heavy`` rows are trained last. A row is held
    against the row named ``base``, or the first of its group.
    """

    name: str
    group: str
    model: str
    guide: str
    lines: tuple[str, str]
    paper: str
    latent: Any = 20
    objective: str = "trace_elbo"
    particles: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: str = "mnist"
    binarize: str = "dynamic"
    data: dict[str, Any] = field(default_factory=dict)
    counts: int = 0
    bits: bool = False
    base: str | None = None
    comparable: bool = True
    heavy: bool = False
    lr: float = 1e-3
    epochs: int | None = None
    limit: int | None = None
    images: int | None = None
    samples: int | None = None

    @property
    def model_settings(self) -> dict[str, Any]:
        return self._settings("model")

    @property
    def guide_settings(self) -> dict[str, Any]:
        return self._settings("guide")

    def _settings(self, kind: str) -> dict[str, Any]:
        latent = {} if self.latent is None else {"latent": self.latent}
        return latent | self.settings.get(kind, {})


def _arxiv(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})"


PRIOR = "z ~ Normal(0, I)"
NORMAL = "q(z|x) = Normal(μ(x), diag σ²(x))"
PIXELS = "x ~ Bernoulli(f(z))"
VAE, IWAE, MODERN = _arxiv("1312.6114"), _arxiv("1509.00519"), "mean_field"


def _binary(name: str, model: str, guide: str, lines: tuple[str, str], paper: str, **more) -> Row:
    return Row(name, "binary", model, guide, lines, paper, **more)


RELU = {"model": {"activation": "ReLU"}, "guide": {"activation": "ReLU"}}


def _grey(name: str, model: str, line: str, paper: str, **more) -> Row:
    options = {"group": "grey", "binarize": "none", "guide": MODERN} | more
    return Row(name, model=model, lines=(PRIOR, line), paper=paper, **options)


def _colour(name: str, pair: tuple[str, str], line: str, paper: str, **more) -> Row:
    options = {"group": "colour", "source": "shapes", "binarize": "none", "latent": 16}
    effort = {"epochs": 150, "images": 200, "samples": 200, "comparable": False} | more
    return Row(name, model=pair[0], guide=pair[1], lines=(PRIOR, line), paper=paper,
               **options, **effort)  # fmt: skip


# A scale that starts wide explains the shapes away before z does: the KL's weight rises slowly.
SLOWLY = {"lr": 2e-3, "objective": "beta_elbo", "options": {"warm_up": 600}}
ROWS = (
    _binary("standard", "bernoulli", MODERN, (PRIOR, NORMAL), VAE),
    _binary("iwae-50", "bernoulli", MODERN, (PRIOR, NORMAL), IWAE, objective="iwae", particles=50,
            heavy=True),
    _binary("iwae-dreg-10", "bernoulli", MODERN, (PRIOR, NORMAL), _arxiv("1810.04152"),
            objective="iwae_dreg", particles=10),
    _binary("stl", "bernoulli", MODERN, (PRIOR, NORMAL), _arxiv("1703.09194"), objective="stl"),
    _binary("beta-4", "bernoulli", MODERN, (PRIOR, NORMAL), "Higgins et al., ICLR 2017",
            objective="beta_elbo", options={"beta": 4.0}),
    _binary("mixture-prior", "mixture_prior", MODERN, ("z ~ Σ πₖ Normal(μₖ, σₖ)", NORMAL),
            _arxiv("1611.02648")),
    _binary("vamp-prior", "vamp_prior", MODERN, ("z ~ ¹⁄ₖ Σ q(z|uₖ)", NORMAL),
            _arxiv("1705.07120")),
    _binary("flow-prior", "flow_prior", MODERN, ("z = T(ε), ε ~ Normal(0, I)", NORMAL),
            _arxiv("1605.08803")),
    _binary("full-covariance", "bernoulli", "full_covariance",
            (PRIOR, "q(z|x) = Normal(μ(x), L(x) L(x)ᵀ)"), _arxiv("1906.02691")),
    _binary("low-rank", "bernoulli", "low_rank",
            (PRIOR, "q(z|x) = Normal(μ(x), diag σ²(x) + W(x) W(x)ᵀ)"), _arxiv("1711.09268")),
    _binary("flow", "bernoulli", "flow", (PRIOR, "q(z|x): affine couplings of Normal(μ(x), σ(x))"),
            _arxiv("1505.05770")),
    _binary("iaf", "bernoulli", "iaf", (PRIOR, "q(z|x): autoregressive flow of Normal(μ(x), σ(x))"),
            _arxiv("1606.04934")),
    _binary("mixture-guide", "bernoulli", "mixture",
            (PRIOR, "q(z|x) = Σ πₖ(x) Normal(μₖ(x), σₖ(x))"), _arxiv("1805.07243")),
    _binary("flow-both", "flow_prior", "flow",
            ("z = T(ε), ε ~ Normal(0, I)", "q(z|x): affine couplings of Normal(μ(x), σ(x))"),
            _arxiv("1605.08803")),
    _binary("convolutional", "convolutional", "convolutional",
            (PRIOR, NORMAL + " by convolutions"), _arxiv("1511.06434"), heavy=True),
    _binary("one-layer-200", "bernoulli", MODERN, (PRIOR, NORMAL + ", 784-200-200-50"), IWAE,
            latent=50, epochs=20, images=2000,
            settings={"model": {"hidden": (200, 200)}, "guide": {"hidden": (200, 200)}}),
    _binary("two-layer", "two_layer", "two_layer",
            ("z₂ ~ Normal(0, I), z₁ ~ Normal(g(z₂))", "q(z₁|x) q(z₂|z₁)"), IWAE, latent=None,
            base="one-layer-200", epochs=20, images=2000, settings=RELU),
    _binary("ladder", "ladder", "ladder",
            ("z₃, z₂|z₃, z₁|z₂", "q(z₃|x) q(z₂|z₃, x) q(z₁|z₂, x)"), _arxiv("1602.02282"),
            latent=None),
    _binary("gmvae", "gmvae", "gmvae", ("y ~ Categorical, z|y ~ Normal", "q(y|x) q(z|x, y)"),
            _arxiv("1611.05148"), objective="trace_enum_elbo"),
    _binary("autoencoder", "bernoulli", "autoencoder",
            (PRIOR, "q(z|x) = Normal(μ(x), 0.01²)"), "Hinton and Salakhutdinov, Science 313 (2006)",
            objective="beta_elbo", options={"beta": 0.0}),
    _grey("continuous-bernoulli", "continuous_bernoulli", "x ~ ContinuousBernoulli(f(z))",
          _arxiv("1907.06845")),
    _grey("gaussian", "gaussian", "x ~ Normal(f(z), σ)", VAE),
    _grey("laplace", "laplace", "x ~ Laplace(f(z), b)", VAE),
    _grey("discretized-logistic", "discretized_logistic", "x ~ Σ πₖ DiscretizedLogistic(f(z))",
          _arxiv("1701.05517"), group="levels", bits=True, images=200, samples=200),
    _grey("categorical", "categorical", "x ~ Categorical over 256 levels", _arxiv("1601.06759"),
          group="levels", bits=True, epochs=1, limit=12_800, images=50, samples=50,
          heavy=True),
    _colour("residual", ("residual", "residual"),
            "x ~ DiscretizedLogistic(f(z), s of the channel), by residual blocks",
            _arxiv("1606.04934"), bits=True, lr=2e-3, epochs=80,
            objective="trace_mean_field_elbo"),
    _colour("convolutional-gaussian", ("convolutional_gaussian", "convolutional"),
            "x ~ Normal(f(z), σ of the channel)", _arxiv("2006.13202"), **SLOWLY),
    _colour("convolutional-continuous", ("convolutional_continuous", "convolutional"),
            "x ~ ContinuousBernoulli(f(z))", _arxiv("1907.06845"), lr=3e-3),
    _grey("poisson", "poisson", "x ~ Poisson(f(z))", _arxiv("1905.00616"),
          group="counts", guide="counts", counts=15),
    _grey("negative-binomial", "negative_binomial", "x ~ NegativeBinomial(f(z))",
          _arxiv("1905.00616"), group="counts", guide="counts", counts=15),
    Row("conditional", "labels", "conditional", "conditional", ("p(z) p(x|z, y)", "q(z|x, y)"),
        "Sohn et al., NIPS 2015", data={"context": "labels"}, comparable=False),
    Row("semi-supervised", "labels", "semi_supervised", "semi_supervised",
        ("p(y) p(z) p(x|z, y), 1,000 of the y shown", "q(y|x) q(z|x, y)"), _arxiv("1406.5298"),
        data={"context": "labels", "labelled": 1000}, objective="trace_enum_elbo",
        comparable=False),
)  # fmt: skip
