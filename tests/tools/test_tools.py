"""The small tools that every folder uses."""

import io
import math

import numpy as np
import pandas
import pytest
import torch

from pyrovae._tools import InputError, require_same, standard_error
from pyrovae._tools.seeding import undone
from pyrovae._tools.source_lines import error_place


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_standard_error_is_that_of_numpy(dim):
    values = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = values.numpy().std(dim, ddof=1) / math.sqrt(values.shape[dim])
    np.testing.assert_allclose(standard_error(values, dim), expected, rtol=1e-14)


@pytest.mark.parametrize("shape", [(1,), (1, 3), (0,)])
def test_fewer_than_two_values_have_no_standard_error(shape):
    found = standard_error(torch.zeros(shape, dtype=torch.float64))
    assert found.isnan().all()
    assert found.shape == shape[1:]
    assert found.dtype == torch.float64


def test_a_line_of_a_compiled_library_is_no_line_of_a_user():
    with pytest.raises(ValueError, match="Expected 2 fields") as found:
        pandas.read_csv(io.StringIO("a,b\n1,2\n1,2,3\n"), index_col=False, engine="c")
    assert "pyx" in str(found.traceback)
    assert "test_tools.py" in error_place(found.value)


def test_what_did_not_change_is_not_written_to():
    """A graph that waits for its backward pass may hold it."""
    module = torch.nn.BatchNorm1d(2)
    before = {name: buffer._version for name, buffer in module.named_buffers()}
    with undone([module], torch.device("cpu")):
        module(torch.randn(4, 2))
    assert module.num_batches_tracked == 0
    changed = {name for name, buffer in module.named_buffers() if buffer._version > before[name]}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    versions = [buffer._version for buffer in module.buffers()]
    with undone([module], torch.device("cpu")):
        module.eval()(torch.randn(4, 2))
    assert versions == [buffer._version for buffer in module.buffers()]


def test_an_entry_that_was_not_given_is_named_where_it_differs():
    before, now = {"seed": 0, "settings": {}}, {"seed": 0, "settings": {"backward": 5}}
    with pytest.raises(InputError, match=r"^settings\.backward: None, now 5$"):
        require_same(before, now, "{key}: {before}, now {now}")
    require_same(before, {"seed": 0}, "{key}")
