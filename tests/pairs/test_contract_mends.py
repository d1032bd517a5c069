"""What a pair that fails at first sight is told to change."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae
from pyrovae.checking import quick
from pyrovae.guides.counts import Counts
from pyrovae.models.poisson import Poisson
from pyrovae.pairs.contract import check_arguments, check_support, inspect_pair
from pyrovae.pairs.pair import Pair


class _Programs(nn.Module):
    def __init__(self, event: int = 1) -> None:
        super().__init__()
        self.net, self.event = nn.Linear(3, 2), event

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, True).expand(-1, 3), 1.0).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = self.net(x)
            pyro.sample("z", dist.Normal(loc, loc.exp(), validate_args=True).to_event(self.event))


@pytest.mark.parametrize("look", [lambda *a: inspect_pair(Pair(*a[:2]), a[2]), quick])
@pytest.mark.parametrize(
    ("event", "x", "found"),
    [
        (1, torch.zeros(5, 3, dtype=torch.float64), "The data are torch.float64: convert them"),
        (0, torch.zeros(5, 3), r"to_event\(1\)|\.to_event\(n\)"),
    ],
    ids=["dtype", "event"],
)
def test_mends(look, event, x, found):
    torch.manual_seed(0)
    programs = _Programs(event)
    nn.init.constant_(programs.net.weight, 0.5)
    with pyro.validation_enabled(True), pytest.raises(ValueError, match=found):
        look(programs.model, programs.guide, x)


def test_parameters_out_of_range():
    programs = _Programs()
    nn.init.constant_(programs.net.weight, 0.5)
    found = "Expected parameter loc of Normal, of shape .5, 3.*The data run from 1e.38"
    with pyro.validation_enabled(True), pytest.raises(ValueError, match=found):
        inspect_pair(Pair(programs.model, programs.guide), torch.full((5, 3), 1e38))


def test_counts_below_0_are_told_where_a_guide_takes_their_logarithm():
    model, guide = Poisson((3,), latent=2), Counts((3,), latent=2)
    x = torch.tensor([[1.0, 2.0, -3.0]])
    with pyro.validation_enabled(True), pytest.raises(ValueError, match=r"down to -3: .* from 0"):
        pyrovae.elbo(model, guide, x)


def test_counts_of_a_multinomial_are_told_by_their_sum():
    programs = _Programs()

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            logits = z.sum(-1, True).expand(-1, 3)
            pyro.sample("x", dist.Multinomial(1, logits=logits, validate_args=False), obs=x)

    found = "counts that sum to 6, outside the support of Multinomial: .* total_count .*, not 1"
    with pytest.raises(ValueError, match=found):
        inspect_pair(Pair(model, programs.guide), torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 3.0]]))


@pytest.mark.parametrize("context", [0, 1])
def test_a_signature_is_told_with_all_that_is_given(context):
    def model(x: torch.Tensor, mask: bool = True) -> None:
        pass

    def short(x: torch.Tensor) -> None:
        pass

    rows = [torch.zeros(5, 3)] * (1 + context)
    found = re.escape(f"forward(self, {'x, y1' if context else 'x'}, mask=True)")
    with pytest.raises(ValueError, match=found):
        check_arguments(Pair(model if context else short, short), *rows, torch.ones(5).bool())


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.zeros(3), r"'x' observes all of x, \[3\], as one datum: give a batch"),
        (torch.zeros(0, 3), "at least one datum"),
    ],
)
@pytest.mark.parametrize("ask", [pyrovae.elbo, pyrovae.log_likelihood])
def test_one_datum_is_no_batch_and_none_is_none(ask, x, found):
    """Each of the three values of a datum would stand for a datum, scored by all of them."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    with pytest.raises(ValueError, match=found):
        ask(model, guide, x, seed=0)
    found = ask(model, guide, torch.zeros(3)[None], seed=0)
    assert (found.elbo if ask is pyrovae.elbo else found.log_prob).shape == (1,)


def test_other_errors_keep_their_text():
    """Data of another dtype are not blamed for an error that lies elsewhere."""
    programs = _Programs()

    def guide(x: torch.Tensor) -> None:
        raise RuntimeError("They must have the same dtype, and Shape mismatch inside plate.")

    with pytest.raises(ValueError, match=r"inside plate\.$"):
        inspect_pair(Pair(programs.model, guide), torch.zeros(5, 3, dtype=torch.float64))


def test_a_full_device_is_nobodys_mistake():
    """Memory that ran out comes through as torch raised it, and not as an error of the data."""

    def guide(x: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for look in (inspect_pair, check_support):
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory"):
            look(Pair(_Programs().model, guide), torch.zeros(5, 3))
