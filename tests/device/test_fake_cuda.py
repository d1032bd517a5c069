"""What needs no GPU to be found out: whether tensors of two devices meet, and what is read back.

torch's fake tensors have a shape and a device and no values. An operator on tensors of two devices
is refused as on a GPU, and so is what waits for a value.
"""

import pyro
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo import ZOO

from pyrovae.compiling.graph import _replayed
from pyrovae.evidence.proposals import Sampler
from pyrovae.objectives import estimate, make_objective
from pyrovae.optim import place_counts
from pyrovae.pairs.contract import inspect_pair
from pyrovae.pairs.pair import Pair

# Written without a device, as people do on a CPU: their tensors or weights stay there.
CPU_ALONE = {"functions", "published_example", "plain_modules", "same_names", "two_latents"}
CPU_ALONE |= {"discrete", "mixed"}
PLACED = sorted(ZOO.keys() - CPU_ALONE)
each = pytest.mark.parametrize("name", PLACED)


@pytest.fixture
def placed():
    """A pair of the zoo with its batch, on a GPU that is not there."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def placed(name, *objectives):
        model, guide, args = ZOO[name].make()
        pair = Pair(model, guide)
        with pair.mode(training=False):
            inspect_pair(pair, *args)
            for objective in objectives:
                estimate(objective, pair, *args)
        mode.__enter__()
        pair.to("cuda")
        return pair, tuple(arg.to("cuda") for arg in args)

    with pyro.validation_enabled(False):
        yield placed
    if torch.utils._python_dispatch._get_current_dispatch_mode() is mode:
        mode.__exit__(None, None, None)
    torch.__future__.set_overwrite_module_params_on_conversion(before)


@each
def test_a_loss_stays_on_its_device_and_reads_nothing(placed, name):
    """Each pair with its divergences, and every second one as an ELBO or as an IWAE of its own."""
    scored = ("trace_elbo", "iwae")[PLACED.index(name) % 2]
    fitting = {scored, "trace_mean_field_elbo"} & {*ZOO[name].objectives} or {"trace_elbo"}
    objectives = [make_objective(each) for each in fitting]
    pair, rows = placed(name, *objectives)
    for objective in objectives:
        found = estimate(objective, pair, *rows)
        assert found.loss.device.type == found.surrogate.device.type == "cuda"


@each
def test_importance_weights_stay_on_their_device_and_read_nothing(placed, name):
    pair, rows = placed(name)
    with torch.no_grad(), pair.mode(training=False):
        parts = Sampler(pair, tile=8, chunk=4).weigh(rows, 8)
    assert {(part.device.type, part.dtype) for part in parts} == {("cuda", torch.float64)}


def test_what_a_cuda_graph_would_not_replay_is_kept_out_of_it():
    """Counts of steps move to their weights, and a tensor on the CPU that is read is told."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.nn.Parameter(torch.zeros(3, device="cuda"))
        optimizer = torch.optim.RMSprop([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert optimizer.state[weight]["step"].device.type == "cpu"
        place_counts(optimizer)
        assert {v.device.type for v in optimizer.state[weight].values()} == {"cuda"}
    with pytest.warns(UserWarning, match="kernel by kernel: it reads a tensor on the CPU"):
        assert _replayed(print, [torch.ones(())], (torch.ones(2),), None) is print
