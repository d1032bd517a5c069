"""Products that change hands give the same numbers."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.compiling import kernels
from pyrovae.training.precision import matmul_precision


def _net(x, w, b):
    hidden = torch.addmm(b, x, w.t()).relu()
    return [hidden, hidden.t() @ x, hidden @ w]


def _record(*args):
    graph = make_fx(_net)(*args)
    return torch.fx.GraphModule({}, graph.graph)


@pytest.fixture
def args():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*s, generator=generator) for s in ((128, 300), (200, 300), (200,)))


@pytest.mark.parametrize("wins", [True, False])
def test_both_kernels_give_the_same_numbers(args, wins, monkeypatch):
    monkeypatch.setattr(kernels, "onednn_wins", lambda left, right: wins)
    graph = _record(*args)
    assert kernels.choose_kernels(graph, list(args)) == (3 if wins else 0)
    for found, expected in zip(graph(*args), _net(*args), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_small_and_double_products_stay_where_they_are(args, monkeypatch):
    monkeypatch.setattr(kernels, "onednn_wins", lambda left, right: True)
    small = tuple(a[:9] for a in args)
    double = tuple(a.double() for a in args)
    for each in ((small[0], small[1], small[2]), double):
        assert kernels.choose_kernels(_record(*each), list(each)) == 0


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w, b: torch.addmm(b.expand(len(x), -1).clone(), x, w.t()),
        lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2.0),
    ],
    ids=["matrix added", "factor"],
)
def test_what_the_other_kernel_cannot_do_stays_where_it_is(args, product, monkeypatch):
    monkeypatch.setattr(kernels, "onednn_wins", lambda left, right: True)
    graph = torch.fx.GraphModule({}, make_fx(product)(*args).graph)
    assert kernels.choose_kernels(graph, list(args)) == 0
    torch.testing.assert_close(graph(*args), product(*args))


def test_a_kernel_must_win_clearly(monkeypatch):
    shapes = ((64, 64), (64, 1)), ((64, 64), (64, 1))
    times = iter([1.0, 0.9] * 7 + [1.0, 0.5] * 7)
    monkeypatch.setattr(kernels, "_seconds", lambda product: next(times))
    kernels.onednn_wins.cache_clear()
    assert not kernels.onednn_wins(*shapes)
    kernels.onednn_wins.cache_clear()
    assert kernels.onednn_wins(*shapes)
    kernels.onednn_wins.cache_clear()


def test_precision_is_given_back_and_named():
    before = torch.get_float32_matmul_precision()
    convolves = torch.backends.cudnn.allow_tf32
    with matmul_precision("bf16"):
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
        with matmul_precision("float32"):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    assert torch.backends.cudnn.allow_tf32 == convolves
    with pytest.raises(ValueError, match="did you mean 'bf16'"), matmul_precision("bf61"):
        pass
