"""What a guide says of a discrete latent: the probability of each of its values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.seeding import seeded
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import samples

__all__ = ["classify"]


@torch.no_grad()
def classify(
    guide: Callable, x: Tensor, *context: Tensor, site: str | None = None, seed: int | None = None
) -> Tensor:
    """The posterior probabilities q(y|x) of a discrete latent, as the guide has them.

    Args:
        guide: The guide program.
        x: Data ``[N, ...]``; ``context`` are further arguments of the guide, ``[N, ...]``.
        site: The latent; it may be left out where the guide has one that is discrete.
        seed: Seeds the draws of latents that it depends on; None continues torch's global stream.

    Returns:
        ``[N, C]``, in the order of the distribution's ``enumerate_support()``.

    Raises:
        ValueError: If the guide has no such latent, or several and none is named.

    Example:
        >>> from pyrovae.guides.semi_supervised import SemiSupervised
        >>> data = pyrovae.load_data("digits", binarize="dynamic", context="labels")
        >>> q = pyrovae.classify(SemiSupervised(data.shape), *data.split("test"))
        >>> q.shape
        torch.Size([359, 10])
        >>> accuracy = (q.argmax(-1) == data.labels.test).float().mean()
    """
    pair = Pair(None, guide)
    rows = [tensor.to(pair.device) for tensor in (x, *context)]
    with pair.mode(training=False), seeded(seed, rows[0].device):
        trace = pair.trace_guide(*rows)
    found = {
        name: node["fn"]
        for name, node in samples(trace).items()
        if not node["is_observed"] and node["fn"].has_enumerate_support
    }
    if site is None and len(found) == 1:
        (site,) = found
    if site not in found:
        raise InputError(
            f"Expected the name of one discrete latent of the guide, got {site!r}; it has "
            f"{sorted(found) or 'none'}."
        )
    log_prob = found[site].log_prob(found[site].enumerate_support())
    return log_prob.exp().movedim(0, -1).to(x.device)
