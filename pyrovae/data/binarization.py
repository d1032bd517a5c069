"""Binary images from grey ones, drawn anew for every batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_binary"]

LEVELS = 2**16


def draw_binary(
    intensities: Tensor, scale: float, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw ones with the probabilities that grey levels give.

    .. math:: x_d \sim \mathrm{Bernoulli}(\mathrm{intensity}_d / \mathrm{scale})

    Integer levels are compared with uniform 16-bit integers, four to a random word, which takes
    a third of the time of one float each: the probability is rounded up to a multiple of
    :math:`2^{-16}`, and 0 and 1 are exact.

    Args:
        intensities: Grey levels ``[M, *shape]``, uint8 or floating point.
        scale: The level of a certain one.
        generator: The stream to draw from, on the same device; torch's global one by default.

    Returns:
        float32 ``[M, *shape]``, zeros and ones.
    """
    if intensities.is_floating_point() or scale != int(scale):
        p = intensities.float() / scale
        uniform = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        return (uniform < p).float()
    size = intensities[0].numel()
    words = torch.randint(
        -(2**63),
        2**63 - 1,
        (len(intensities), (size + 3) // 4),
        generator=generator,
        device=intensities.device,
    )
    uniform = words.view(torch.int16)[:, :size].reshape(intensities.shape)
    return ((uniform.int() + LEVELS // 2) * int(scale) < intensities.int() * LEVELS).float()
