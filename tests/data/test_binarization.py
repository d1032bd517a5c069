"""Binary images drawn from grey levels have the frequencies that the levels say."""

import pytest
import torch

from pyrovae.data import draw_binary

N = 40_000


@pytest.mark.parametrize(
    ("scale", "dtype"), [(255.0, torch.uint8), (16.0, torch.uint8), (1.0, None)]
)
def test_every_level_comes_out_as_often_as_it_says(scale, dtype):
    levels = torch.linspace(0, scale, 17)
    levels = levels.round().to(dtype) if dtype else levels
    draws = draw_binary(levels.expand(N, 17), scale, torch.Generator().manual_seed(0))
    p = levels.double() / scale
    error = (p * (1 - p) / N).sqrt()
    deviation = (draws.double().mean(0) - p).abs()
    assert bool((deviation <= 4 * error).all())
    assert draws[:, 0].sum() == 0
    assert draws[:, -1].sum() == N


def test_pixels_are_independent_of_their_neighbours_and_rows():
    draws = draw_binary(torch.full((N, 7), 128, dtype=torch.uint8), 255.0,
                        torch.Generator().manual_seed(1)).double()  # fmt: skip
    correlation = torch.corrcoef(torch.cat([draws, draws.roll(1, 0)], 1).T) - torch.eye(14)
    assert correlation.abs().max() < 5 / N**0.5


@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_are_certain(level):
    draws = draw_binary(torch.full((1000, 4000), level, dtype=torch.uint8), 255.0)
    assert bool((draws == level / 255).all())


def test_a_scale_that_is_no_integer_counts_as_it_is():
    draws = draw_binary(torch.full((N, 1), 3, dtype=torch.uint8), 4.5)
    assert draws.mean().item() == pytest.approx(3 / 4.5, abs=4 * (2 / 9 / N) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_draws_follow_the_generator_and_keep_the_shape(dtype):
    x = torch.randint(0, 256, (3, 1, 5, 5)).to(dtype)
    one, same = (draw_binary(x, 255.0, torch.Generator().manual_seed(2)) for _ in range(2))
    assert one.shape == x.shape
    assert one.dtype == torch.float32
    assert torch.equal(one, same)
    assert not torch.equal(one, draw_binary(x, 255.0, torch.Generator().manual_seed(3)))
