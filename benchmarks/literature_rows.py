"""The rows of the table of the literature: the network, how it is trained, what was published."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """A pair, how it is trained, and the test NLL in nats that was published for it.

    ``options`` are settings of both programs or of one (``model.components``), ``warm_up`` the
    epochs in which the weight of the KL rises, and ``best`` what a reimplementation has reached. Of
    many ``particles`` the gradient may go through a few alone (``backward``). A row takes the
    networks of the one that it ``begins`` with, trained for the first epochs of ``before``, as
    ``800`` or, in two cosines of the rate, ``800,1200``; the others are of its own, as are all
    without ``begins``.
    """

    name: str
    title: str
    published: float
    source: str
    best: float | None
    aim: float
    model: str = "bernoulli"
    guide: str = "mean_field"
    options: dict[str, Any] = field(default_factory=dict)
    objective: str = "trace_mean_field_elbo"
    particles: int = 1
    backward: int | None = None
    warm_up: int = 0
    epochs: int = 1000
    lr: float = 1e-3
    begins: str = ""
    before: tuple[str, ...] = ()


IWAE = "[1509.00519](https://arxiv.org/abs/1509.00519)"
EXEMPLAR = "[2004.04795](https://arxiv.org/abs/2004.04795)"
FLOWS = "[1905.13452](https://arxiv.org/abs/1905.13452)"
LADDER = "[1602.02282](https://arxiv.org/abs/1602.02282)"

ONE_LAYER = {"latent": 50, "hidden": (200, 200), "activation": "Tanh"}
TWO_LAYER = {"model": "two_layer", "guide": "two_layer"}
GATED = {"latent": 40, "hidden": (300, 300), "activation": "GLU"}
COUPLINGS = {"steps": 8, "width": 128}


def _importance(particles: int, backward: int | None = None) -> dict[str, Any]:
    """The bound of the IWAE paper, with the guide's doubly reparameterized gradient."""
    return {"objective": "iwae_dreg", "particles": particles, "backward": backward}


def _gated(name: str, title: str, **more: Any) -> Row:
    return Row(name, title, **{"options": GATED, "warm_up": 100} | more)


ROWS = (
    Row("vae", "784-200-200-50, VAE", 86.76, IWAE, 86.35, 86.1, options=ONE_LAYER),
    Row("iwae-5", "784-200-200-50, IWAE-5", 85.54, IWAE, 85.18, 85.0, options=ONE_LAYER,
        begins="vae", before=("1000",), epochs=200, **_importance(5)),
    Row("iwae-50", "784-200-200-50, IWAE-50", 84.78, IWAE, 84.32, 84.3, options=ONE_LAYER,
        begins="vae", before=("1000",), epochs=100, **_importance(50, backward=5)),
    Row("two-layer-vae", "two layers (100, 50), VAE", 85.33, IWAE, 84.83, 84.5, **TWO_LAYER,
        objective="warm_up_elbo", warm_up=100, epochs=800),
    Row("two-layer-iwae-50", "two layers (100, 50), IWAE-50", 82.90, IWAE, 82.82, 82.5, **TWO_LAYER,
        begins="two-layer-vae", before=("800",), epochs=80, **_importance(50, backward=5)),
    _gated("gated-vae", "gated 300-300, z = 40, VAE", published=84.45, source=EXEMPLAR, best=84.45,
           aim=84.2, objective="warm_up_elbo"),
    _gated("gated-vamp", "the same, VampPrior K = 500", published=82.43, source=EXEMPLAR,
           best=82.29, aim=82.1, begins="gated-vae", before=("1000",), epochs=200, warm_up=0,
           objective="trace_elbo", model="vamp_prior",
           options=GATED | {"model.components": 500}),
    _gated("gated-flow-prior", "the same, flow prior", published=80.43, source=FLOWS, best=None,
           aim=81.5, objective="warm_up_elbo", epochs=500, model="flow_prior",
           options=GATED | {f"model.{name}": value for name, value in COUPLINGS.items()}),
    _gated("gated-flow-both", "the same, flow prior and posterior", published=80.43, source=FLOWS,
           best=None, aim=80.4, begins="gated-flow-prior", before=("300",), epochs=100,
           warm_up=0, objective="trace_elbo", model="flow_prior", guide="flow",
           options=GATED | COUPLINGS),
    Row("ladder", "gated hierarchy of three layers (64, 32, 16)", 81.74, LADDER, None, 81.5,
        model="ladder", guide="ladder", options={"activation": "GLU"},
        objective="warm_up_elbo", warm_up=200, epochs=800),
)  # fmt: skip
