"""Pairs with one mistake each, the row of the check that is meant to find it, and its mend."""

import random
import weakref
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn
from torch.distributions.kl import register_kl
from torch.nn.functional import softplus

from pairs import LATENT, SHAPE, PlainGuide, PlainModel, binary
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.poisson import Poisson
from pyrovae.nn import MLP

BROKEN = {}
KEPT = []  # what no program refers to
N = len(binary())


class Broken(NamedTuple):
    make: object
    row: str
    words: str
    line: str
    data: object
    also: tuple
    fit: str


def broken(row, words, line="", data=binary, also=(), fit="refuses"):
    """Files a pair under its name: the row that fails, a pattern in it, a piece of its line.

    ``fit`` is what training does, with the same words: "refuses", "warns" or "trains" silently.
    """

    def file(make):
        BROKEN[make.__name__] = Broken(make, row, words, line, data, also, fit)
        return make

    return file


def decoder(out=SHAPE):
    return MLP(LATENT, out, (8,))


def encoder(out=(2, LATENT)):
    return MLP(SHAPE, out, (8,))


def standard():
    return dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)


def real():
    return torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(1))


def column():
    return real().flatten(1)[:, :1]


def grey():
    return 0.9 * binary()


def pixels(net, z, x):
    pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(3), obs=x)


def posterior(net, x, name="z"):
    loc, log_scale = net(x).unbind(-2)
    return pyro.sample(name, dist.Normal(loc, log_scale.exp()).to_event(1))


def with_model(likelihood, prior=standard, net=None):
    """A pair of PlainGuide and a model that goes on from z as it is told."""
    net = net or decoder()

    def model(x):
        with pyro.plate("data", len(x)):
            likelihood(net, pyro.sample("z", prior()), x)

    return model, PlainGuide()


@broken("runs", r"The model fails with InputError: Expected events of shape \[3\]", "net(top)")
def network_of_another_size():
    net = decoder()

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            logits = net(top)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    return model, PlainGuide()


@broken("sites", r"'z' is missing in the guide.*sample every latent there", '"z", standard()')
def latent_missing_in_the_guide():
    net = decoder()

    def model(x):
        with pyro.plate("data", len(x)):
            pixels(net, pyro.sample("z", standard()), x)

    return model, lambda x: None


@broken("sites", r"'z' is missing.*did you mean 'zz'\?", '"zz", standard()')
def misspelt_latent():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("zz", standard())

    return PlainModel(), guide


@broken("sites", r"observes nothing.*obs=x", "pyro.sample")
def forgotten_observation():
    return with_model(
        lambda net, z, x: pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(3))
    )[0], lambda x: both_latents(x)


def both_latents(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", standard())
        pyro.sample("x", dist.Bernoulli(torch.full(SHAPE, 0.5)).to_event(3))


@broken("plates and events", r"Site 'x' has batch shape \[11, 1, 4, 4\].*\.to_event\(3\)", "obs=x")
def likelihood_without_to_event():
    def likelihood(net, z, x):
        pyro.sample("x", dist.Bernoulli(logits=net(z)), obs=x)

    return with_model(likelihood)


@broken("plates and events", r"'x'.*\.to_event\(3\)", "obs=x")
def likelihood_with_too_few_event_dimensions():
    def likelihood(net, z, x):
        pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    return with_model(likelihood)


@broken("plates and events", r"Site 'z' has batch shape \[3\].*\.to_event\(1\)", '"z", prior()')
def prior_without_to_event():
    return with_model(pixels, prior=lambda: dist.Normal(torch.zeros(LATENT), 1.0))


@broken("plates and events", r"Site 'z' has batch shape \[11, 3\].*\.to_event\(1\)", '"z", dist')
def guide_without_to_event():
    net = encoder()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc, log_scale = net(x).unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return PlainModel(), guide


@broken(
    "plates and events", r"'z' has 0 event.*model's lacks.*\.expand\(\[3\]\)\.to_event\(1\)", "z"
)
def scalar_prior():
    net = MLP((), SHAPE, (8,))
    return with_model(pixels, prior=lambda: dist.Normal(0.0, 1.0), net=net)


@broken(
    "plates and events", r"'x' has batch shape \[11, 11\].*\.to_event\(1\)", "obs=x", data=column
)
def one_column_without_to_event():
    net, other = MLP(LATENT, 1, ()), MLP(1, (2, LATENT), ())

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal(net(z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            posterior(other, x)

    return model, guide


@broken("plates and events", r"\[2, 11\] in the model and \[11\] in the guide", "standard()")
def plate_of_the_model_alone():
    net = decoder()

    def model(x):
        with pyro.plate("data", len(x)):
            with pyro.plate("part", 2):
                z = pyro.sample("z", standard())
            pixels(net, z.mean(0), x)

    return model, PlainGuide()


@broken("plates and events", r"with the guide's it fails, .*one dtype", "net(z)")
def latents_of_another_dtype():
    net = encoder()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc, log_scale = net(x).double().unbind(-2)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return PlainModel(), guide


@broken("plates and events", r"event shape \[4\] in the model and \[3\] in the guide", '"z", prior')
def latents_of_two_sizes():
    def prior():
        return dist.Normal(torch.zeros(4), 1.0).to_event(1)

    return with_model(pixels, prior=prior, net=MLP(4, SHAPE, (8,)))


@broken("plates and events", r"swallows the batch, end it in \.to_event\(3\)", "to_event(4)")
def event_that_swallows_the_batch():
    def likelihood(net, z, x):
        pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(4), obs=x)

    return with_model(likelihood)


@broken(
    "plates and events",
    r"batch of 11 around site 'z', got plates \[\].*pyro\.plate\('data', len\(x\)\)",
)
def no_plate():
    net, other = decoder(), encoder()

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(2))
        pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(4), obs=x)

    def guide(x):
        loc, log_scale = other(x).unbind(-2)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(2))

    return model, guide


@broken("plates and events", r"'w' lies outside the plate 'data'.*inside that plate", '"w"')
def site_outside_the_plate():
    model, guide = PlainModel(), PlainGuide()

    def outside(program):
        def run(x):
            pyro.sample("w", dist.Normal(0.0, 1.0))
            program(x)

        return run

    return outside(model), outside(guide)


@broken("plates and events", r"'data' of size 4, but the batch has 11.*'data', len\(x\)", "plate(")
def plate_of_another_size():
    net = decoder()

    def model(x):
        with pyro.plate("data", x.shape[-1]):
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[-1]):
            pyro.sample("z", dist.Normal(x.flatten(1)[:, :LATENT], 1.0).to_event(1))

    return model, guide


@broken(
    "plates and events", r"observes \[11, 1, 4, 4\].*draws \[11, 16\].*reshape the data", "obs=x"
)
def flat_likelihood():
    def likelihood(net, z, x):
        pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    return with_model(likelihood, net=decoder(16))


@broken("data in support", r"observes 0\.9, outside.*Bernoulli.*binarize", "obs=x", data=grey)
def grey_data():
    return PlainModel(), PlainGuide()


@broken("latents in support", r"the guide can draw -\d.*prior has no mass.*prior's support", '"z"')
def normal_guide_of_a_positive_latent():
    def prior():
        return dist.LogNormal(torch.zeros(LATENT), 1.0).to_event(1)

    return with_model(pixels, prior=prior)


@broken(
    "latents in support", r"the guide never draws -?\d.*Widen the guide", "Uniform", fit="warns"
)
def bounded_guide_of_a_normal_latent():
    net = encoder(LATENT)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = net(x)
            pyro.sample("z", dist.Uniform(loc - 1, loc + 1).to_event(1))

    return PlainModel(), guide


@broken("latents in support", r"the guide never draws 3", "Categorical", fit="warns")
def fewer_categories_in_the_guide():
    def choose(size):
        return pyro.sample("y", dist.Categorical(logits=torch.zeros(size)))

    net = nn.Embedding(4, 16)

    def model(x):
        with pyro.plate("data", len(x)):
            logits = net(choose(4))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x.flatten(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            choose(3)

    return model, guide


@broken("numbers", r"log-probability of site 'x' in the model is nan: look for a log of 0")
def logarithm_of_zero():
    def likelihood(net, z, x):
        probs = torch.sigmoid(net(z)) * (torch.arange(4) > 0)
        pyro.factor("x", (x * probs.log()).sum((-1, -2, -3)).where(x.sum((-1, -2, -3)) > 0, 0.0))

    return with_model(likelihood)


@broken("numbers", r"With these weights scale at site 'z' of the guide is -\d.*softplus")
def scale_that_may_be_negative():
    net = encoder()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc, scale = net(x).unbind(-2)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return PlainModel(), guide


@broken(
    "numbers",
    r"On data far \w+ their range, scale at site 'z' of the guide is 0, not > 0: bound it",
    data=real,
    fit="trains",
)
def scale_that_underflows():
    net = encoder(LATENT)

    def guide(x):
        with pyro.plate("data", len(x)):
            scale = torch.exp(-x.flatten(1).square().sum(-1, keepdim=True))
            pyro.sample("z", dist.Normal(net(x), scale).to_event(1))

    def likelihood(net, z, x):
        pyro.sample("x", dist.Normal(net(z), 1.0).to_event(3), obs=x)

    return with_model(likelihood)[0], guide


@broken(
    "gradients",
    r"No gradient goes from loc at site 'z' of the guide, scale .*net",
    "no_grad",
    fit="warns",
)
def detached_encoder():
    class Detached(PlainGuide):
        def forward(self, x):
            with torch.no_grad():
                loc, log_scale = self.net(x).unbind(-2)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return PlainModel(), Detached()


@broken(
    "gradients",
    r"No other site of the model depends on latent z.*detach",
    "z.detach()",
    fit="warns",
)
def detached_latent():
    def likelihood(net, z, x):
        pixels(net, z.detach(), x)

    return with_model(likelihood)


@broken(
    "gradients",
    r"No gradient reaches model\.extra\.weight, model\.extra\.bias: use it",
    fit="warns",
)
def unused_layer():
    model = PlainModel()
    model.extra = nn.Linear(2, 2)
    return model, PlainGuide()


@broken(
    "gradients",
    r"model\.tables holds parameters that no module owns.*nn\.ModuleList",
    "self.tables",
    fit="warns",
)
def tensors_in_a_list():
    class Listed(PlainModel):
        def __init__(self):
            super().__init__()
            self.tables = [torch.zeros(LATENT, requires_grad=True)]

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", standard())
                pixels(self.net, z + self.tables[0], x)

    return Listed(), PlainGuide()


@broken("gradients", r"shapes \[\[.*\]\] that neither the model nor the guide owns.*pyro\.module")
def network_behind_a_weak_reference():
    KEPT.append(decoder())
    hidden = weakref.ref(KEPT[-1])
    return with_model(lambda net, z, x: pixels(hidden(), z, x), net=lambda z: z)


@broken(
    "gradients", r"The gradient is NaN or infinite for model\.floor: look for a root", fit="trains"
)
def root_of_zero():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.floor = decoder(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", standard()) + (0 * self.floor).sqrt()
                pixels(self.net, z, x)

    return Root(), PlainGuide()


@broken(
    "independent data",
    r"in train mode: guide\.net\.1 normalizes over the batch.*LayerNorm",
    fit="trains",
)
def batch_normalization():
    guide = PlainGuide()
    guide.net = nn.Sequential(MLP(SHAPE, 8, ()), nn.BatchNorm1d(8), nn.ReLU(), MLP(8, (2, 3), ()))
    return PlainModel(), guide


@broken("independent data", r"'z' of the guide changes by .* no mean, sum or norm", ".mean(0)")
def centred_by_the_batch():
    net = encoder()

    def guide(x):
        with pyro.plate("data", len(x)):
            posterior(net, x - x.mean(0))

    return PlainModel(), guide


@broken(
    "independent data",
    r"'likelihood' of the model changes by .* per datum",
    ".sum()",
    also=("particles",),
)
def likelihood_summed_over_the_batch():
    def likelihood(net, z, x):
        fit = dist.Bernoulli(logits=net(z)).to_event(3).log_prob(x)
        pyro.factor("likelihood", fit.sum())

    return with_model(likelihood)


@broken("independent data", r"fails on a batch of 1,.*squeeze", "squeeze()", fit="warns")
def squeezed_batch():
    net = encoder()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc, log_scale = net(x).squeeze().unbind(1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return PlainModel(), guide


@broken(
    "particles",
    r"With 3 particles, as a plate .* fails, .*: take the size of the batch",
    fit="trains",
)
def rows_by_their_place():
    places = torch.zeros(N, LATENT)

    def likelihood(net, z, x):
        pixels(net, z.reshape(len(x), -1) + places[: len(x)], x)

    return with_model(likelihood)


@broken("estimators agree", r"A - B = .*do not belong to one distribution", "Wide(", fit="trains")
def draws_that_do_not_fit_their_density():
    class Wide(dist.Normal):
        def rsample(self, sample_shape=()):
            return self.loc + 2 * (super().rsample(torch.Size(sample_shape)) - self.loc)

        def expand(self, shape, _instance=None):
            return super().expand(shape, self._get_checked_instance(Wide, _instance))

    net = encoder()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc, log_scale = net(x).unbind(-2)
            pyro.sample("z", Wide(loc, 0.1 * log_scale.exp()).to_event(1))

    return PlainModel(), guide


@broken("ELBO below IWAE", r"different scales.*log p\(x\) is not defined", fit="trains")
def hidden_weight_on_the_divergence():
    net, guide = decoder(), PlainGuide()

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", standard())
            pixels(net, z, x)

    return model, poutine.scale(guide, scale=0.1)


@broken(
    "ELBO below IWAE",
    r"estimator B, .*, is above the bound of 64",
    also=("estimators agree",),
    fit="trains",
)
def divergence_that_is_no_divergence():
    class Own(dist.Normal):
        def expand(self, shape, _instance=None):
            return super().expand(shape, self._get_checked_instance(Own, _instance))

    register_kl(Own, dist.Normal)(lambda q, p: torch.zeros_like(q.loc))
    net = encoder()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc, log_scale = net(x).unbind(-2)
            pyro.sample("z", Own(loc, 0.1 * log_scale.exp()).to_event(1))

    return PlainModel(), guide


@broken(
    "samples",
    r"draws \{'x': 8\} numbers per datum and the data have 16.*obs=x",
    "obs=",
    fit="warns",
)
def half_of_the_data():
    def likelihood(net, z, x):
        pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(3), obs=x[..., :2, :])

    return with_model(likelihood, net=decoder((1, 2, 4)))


@broken("samples", r"'x' draws values outside its own support", "Soft(", fit="warns")
def draws_outside_the_support():
    class Soft(dist.Bernoulli):
        def sample(self, sample_shape=()):
            return self.probs.expand(self._extended_shape(sample_shape))

        def expand(self, shape, _instance=None):
            return super().expand(shape, self._get_checked_instance(Soft, _instance))

    def likelihood(net, z, x):
        pyro.sample("x", Soft(logits=net(z)).to_event(3), obs=x)

    return with_model(likelihood)


@broken("capture", r"reads a value back.*keep it on the device", ".item()", fit="trains")
def value_read_back():
    def likelihood(net, z, x):
        noise = 1.0 + softplus(z).mean().item() * 0.0
        pyro.sample("x", dist.Bernoulli(logits=net(z) * noise).to_event(3), obs=x)

    return with_model(likelihood)


@broken("capture", r"reads a value back.*if tensor", "if z.sum()", fit="trains")
def branch_on_a_tensor():
    def likelihood(net, z, x):
        if z.sum() > 1e9:
            z = z / 2
        pixels(net, z, x)

    return with_model(likelihood)


@broken("capture", r"gives another loss.*Draw with torch", "random.random()", fit="trains")
def random_control_flow():
    def likelihood(net, z, x):
        logits = net(z) if random.random() < 0.5 else net(z / 2)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    return with_model(likelihood)


def guide_by(draw):
    """A guide that goes on from the two outputs of its network as it is told."""
    net = encoder()

    def guide(x):
        loc, log_scale = net(x).unbind(-2)
        with pyro.plate("data", len(x)):
            draw(loc, log_scale, x)

    return guide


def normal(loc, scale):
    return pyro.sample("z", dist.Normal(loc, scale).to_event(1))


@broken(
    "gradients",
    r"from loc at site 'z' of the guide back to guide\.l.*detach",
    ".detach()",
    fit="warns",
)
def one_head_with_a_detached_mean():
    return PlainModel(), guide_by(lambda loc, log_scale, x: normal(loc.detach(), log_scale.exp()))


@broken("gradients", r"from scale at site 'z' of the guide back to .*NumPy", "numpy", fit="warns")
def numpy_behind_a_detach():
    def draw(loc, log_scale, x):
        scale = torch.from_numpy(np.exp(log_scale.detach().numpy()))
        normal(loc, scale)

    return PlainModel(), guide_by(draw)


@broken("runs", r"The guide fails .*NumPy sees no gradient.*use torch's function", "numpy")
def numpy_in_a_program():
    return PlainModel(), guide_by(
        lambda loc, log_scale, x: normal(loc, torch.from_numpy(np.exp(log_scale.numpy())))
    )


@broken(
    "gradients",
    r"from logits at site 'x' of the model back to latent z, model\.",
    "no_grad",
    fit="warns",
)
def decoder_without_gradients():
    def likelihood(net, z, x):
        with torch.no_grad():
            logits = net(z)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    return with_model(likelihood)


@broken("sites", r"observes nothing.*obs=x", "likelihood that forgets")
def forgotten_observation_alone():
    return with_model(
        lambda net, z, x: pyro.sample("x", forgetful(net(z)))  # likelihood that forgets
    )


def forgetful(logits):
    return dist.Bernoulli(logits=logits).to_event(3)


@broken("sites", r"'y' is missing in the guide.*obs=x if it is data", '"y"')
def one_of_two_observations_forgotten():
    def likelihood(net, z, x):
        pixels(net, z, x)
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1))

    return with_model(likelihood)


@broken("sites", r"guide that observes 'x', as a model does: exchange the two", '"x"')
def model_and_guide_exchanged():
    return PlainGuide(), PlainModel()


@broken("sites", r"'x' has Independent of torch.*pyro\.distributions", "Independent(")
def distribution_of_torch():
    def likelihood(net, z, x):
        bernoulli = torch.distributions.Bernoulli(logits=net(z))
        pyro.sample("x", torch.distributions.Independent(bernoulli, 3), obs=x)

    return with_model(likelihood)


@broken("runs", r"Two sites are named 'x': give each a name", '"x"')
def one_name_for_two_sites():
    def likelihood(net, z, x):
        pixels(net, z, x)
        pixels(net, z, x)

    return with_model(likelihood)


@broken(
    "plates and events",
    r"in the plate 'batch', and others in the plate 'data'.*one name",
    '"batch"',
)
def plates_of_two_names():
    net = encoder()

    def guide(x):
        with pyro.plate("batch", len(x)):
            posterior(net, x)

    return PlainModel(), guide


@broken("plates and events", r"draws \[11, 1, 4, 5\].*network's output have the shape", "obs=x")
def decoder_of_another_shape():
    return with_model(pixels, net=decoder((1, 4, 5)))


@broken("runs", r"has shape \[11, 16\], fewer dimensions than \.to_event\(3\) takes", "to_event(3)")
def flat_decoder():
    return with_model(pixels, net=decoder(16))


@broken("runs", r"is given \[11, 1, 4, 4\].*flatten a datum", "layer(x)")
def images_into_a_layer():
    layer = nn.Linear(16, 2 * LATENT)

    def guide(x):
        loc, log_scale = layer(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            normal(loc, log_scale.exp())

    return PlainModel(), guide


@broken(
    "plates and events", r"one event \[1, 4, 4\] and no batch.*x\[None\]", data=lambda: binary()[0]
)
def one_datum_without_a_batch():
    return PlainModel(), PlainGuide()


@broken(
    "runs", r"data are torch\.float64: convert them", "self.net(x)", data=lambda: binary().double()
)
def data_of_another_precision():
    return PlainModel(), PlainGuide()


@broken(
    "runs", r"data are torch\.int64.*nn\.Embedding if", "self.net(x)", data=lambda: binary().long()
)
def integers_into_a_layer():
    return PlainModel(), PlainGuide()


@broken("data in support", r"12 of 12 data hold NaN.*clean them", data=lambda: binary() / 0)
def data_that_are_no_numbers():
    return PlainModel(), PlainGuide()


@broken("runs", r"The model takes \(x, y\), and it is given x alone")
def context_forgotten():
    class Conditional(PlainModel):
        def forward(self, x, y):
            super().forward(x + y)

    return Conditional(), PlainGuide()


@broken(
    "numbers", r"probs at site 'x' .*not between 0 and 1: .*sigmoid.*logits=", "Bernoulli(net(z))"
)
def logits_for_probabilities():
    def likelihood(net, z, x):
        pyro.sample("x", dist.Bernoulli(net(z)).to_event(3), obs=x)

    return with_model(likelihood)


def counted():
    return torch.poisson(torch.full((N, 16), 2000.0), torch.Generator().manual_seed(0))


@broken("numbers", r"The data are counts up to 2\d+: .*--guide counts", "Normal(loc", data=counted)
def counts_as_they_are():
    return Poisson((16,), LATENT, (8,)), MeanField((16,), LATENT, (8,))


@broken("gradients", r"that neither the model nor the guide owns.*requires_grad_\(False\)")
def network_made_in_the_program():
    return with_model(lambda net, z, x: pixels(decoder(), z, x))
