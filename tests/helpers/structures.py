"""Small pairs of every structure that is shipped, with their arguments."""

import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pairs import SHAPE, binary
from pyrovae.guides.conditional import Conditional as ConditionalGuide
from pyrovae.guides.gmvae import GMVAE as GMVAEGuide
from pyrovae.guides.ladder import Ladder as LadderGuide
from pyrovae.guides.semi_supervised import SemiSupervised as SemiSupervisedGuide
from pyrovae.guides.two_layer import TwoLayer as TwoLayerGuide
from pyrovae.models.conditional import Conditional
from pyrovae.models.gmvae import GMVAE
from pyrovae.models.ladder import Ladder
from pyrovae.models.semi_supervised import SemiSupervised
from pyrovae.models.two_layer import TwoLayer

X = binary()
Y = torch.arange(12) % 3
PARTLY = torch.where(torch.arange(12) < 7, Y, -1)


def two_layer():
    settings = {"latent": (3, 2), "hidden": (8,), "hidden_top": (6,)}
    return TwoLayer(SHAPE, **settings), TwoLayerGuide(SHAPE, **settings), (X,)


def ladder():
    settings = {"latent": (4, 3, 2), "hidden": (8, 7, 6)}
    return Ladder(SHAPE, **settings), LadderGuide(SHAPE, **settings), (X,)


def gmvae(latent=3):
    settings = {"latent": latent, "components": 3, "hidden": (8,)}
    return GMVAE(SHAPE, **settings), GMVAEGuide(SHAPE, **settings), (X,)


def conditional():
    settings = {"latent": 3, "classes": 3, "hidden": (8, 6)}
    return Conditional(SHAPE, **settings), ConditionalGuide(SHAPE, **settings), (X, Y)


def semi_supervised(latent=3, **options):
    settings = {"latent": latent, "classes": 3, "hidden": (8,)}
    model, guide = SemiSupervised(SHAPE, **settings), SemiSupervisedGuide(SHAPE, **settings)
    guide.alpha = options.get("alpha", 0.0)
    return model, guide, (X, PARTLY)


MAKE = {m.__name__: m for m in (two_layer, ladder, gmvae, conditional, semi_supervised)}
LATENTS = {
    "two_layer": ("z2", "z1"),
    "ladder": ("z3", "z2", "z1"),
    "gmvae": ("y", "z"),
    "conditional": ("z",),
    "semi_supervised": ("y", "z"),
}


def objective(name, **options):
    """The ELBO of a structure, summed over its discrete latents."""
    kind = TraceEnum_ELBO if "y" in LATENTS[name] else Trace_ELBO
    return kind(max_plate_nesting=1, **options)
