"""Importance weights that pass by once: their mean, its error, their tail, and the bound for fewer.

Sums and the largest few of K weights are kept, in float64: a float32 loses the small weights
beside a large one, and log-weights of images are in the hundreds of nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae.evidence.pareto import pareto_smooth, tail_length


def curve_points(num_samples: int, asked: Sequence[int] = ()) -> list[int]:
    """The numbers of samples to report the bound for: those asked for or 1, 10, 100, …, and K."""
    points = list(asked) or [10**n for n in range(len(str(num_samples)))]
    if not all(isinstance(k, int) and 1 <= k <= num_samples for k in points):
        raise InputError(f"Expected a curve over 1 to num_samples={num_samples}, got {points}.")
    return sorted({*points, num_samples})


class Sums:
    """The mean of K importance weights of each of N data, its error, and what their tail says.

    ``points`` are the numbers of samples to report the bound for; ``like`` is ``[N, ...]``.
    """

    def __init__(self, num_samples: int, points: list[int], like: Tensor) -> None:
        self.num_samples = num_samples
        self.top = like.new_full((len(like),), -math.inf, dtype=torch.float64)
        self.first, self.second = torch.zeros_like(self.top), torch.zeros_like(self.top)
        self.tail = Tail(num_samples, self.top)
        self.groups = [_Groups(k, self.top) for k in points]

    def add(self, log_weight: Tensor) -> None:
        """Add some log-weights, ``[k, N]`` in nats."""
        peak = torch.maximum(self.top, log_weight.amax(0))
        # Where all weights so far are zero, -inf - -inf would be NaN.
        shift = torch.where(peak.isinf(), 0.0, peak)
        decay, weight = (self.top - shift).exp(), (log_weight - shift).exp()
        self.first = self.first * decay + weight.sum(0)
        self.second = self.second * decay.square() + weight.square().sum(0)
        self.top = peak
        self.tail.add(log_weight)
        for group in self.groups:
            group.add(log_weight)

    def result(self) -> dict[str, Tensor]:
        """Fields of :class:`~pyrovae.evidence.result.LogLikelihood`, and ``curve`` ``[N, P]``."""
        k = self.num_samples
        ess = (self.first.square() / self.second).nan_to_num(nan=0.0)
        # The delta method: var(w) / K / mean(w)^2, in terms of the effective sample size.
        error = ((k / ess - 1).clamp(min=0) / (k - 1)).sqrt() if k > 1 else ess * math.nan
        tail = self.tail.ascending()
        khat, smoothed = pareto_smooth(tail, k)
        top = torch.where(self.top.isinf(), 0.0, self.top)[:, None]
        gain = (smoothed - top).exp().sum(1) - (tail[:, 1:] - top).exp().sum(1)
        return {
            "log_prob": self._log_mean(self.first),
            "standard_error": error,
            "ess": ess,
            "khat": khat,
            "smoothed": self._log_mean(self.first + gain),
            "curve": torch.stack([group.bound() for group in self.groups], 1),
        }

    def _log_mean(self, total: Tensor) -> Tensor:
        return torch.where(self.top.isinf(), self.top, self.top + (total / self.num_samples).log())


class _Groups:
    """The mean over groups of k samples of the logarithm of their mean weight."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.size, self.total, self.count = size, torch.zeros_like(like), 0
        self.part, self.filled = torch.full_like(like, -math.inf), 0

    def add(self, log_weight: Tensor) -> None:
        missing = (self.size - self.filled) % self.size
        self._fill(log_weight[:missing])
        rest = log_weight[missing:]
        whole = len(rest) // self.size
        if whole:
            groups = rest[: whole * self.size].unflatten(0, (whole, self.size))
            self.total = self.total + groups.logsumexp(1).sum(0)
            self.count += whole
        self._fill(rest[whole * self.size :])

    def _fill(self, log_weight: Tensor) -> None:
        if not len(log_weight):
            return
        self.part = torch.logaddexp(self.part, log_weight.logsumexp(0))
        self.filled += len(log_weight)
        if self.filled == self.size:
            self.total, self.count = self.total + self.part, self.count + 1
            self.part, self.filled = torch.full_like(self.part, -math.inf), 0

    def bound(self) -> Tensor:
        return self.total / self.count - math.log(self.size)


class Tail:
    """The largest of K log-weights of each of N data ``like``, kept while the others pass by."""

    def __init__(self, num_samples: int, like: Tensor) -> None:
        self.keep = tail_length(num_samples) + 1
        self.waiting = [like.new_empty(0, len(like))]

    def add(self, log_weight: Tensor) -> None:
        """Look at some more log-weights, ``[k, N]``."""
        self.waiting.append(log_weight)
        # topk costs as much for few as for many, so it waits until there are some.
        if sum(map(len, self.waiting)) > 4 * self.keep:
            self.waiting = [self._largest()]

    def ascending(self) -> Tensor:
        """The :func:`tail_length` + 1 largest, ``[N, M + 1]``; fewer if there are fewer."""
        return self._largest().flip(0).T

    def _largest(self) -> Tensor:
        seen = torch.cat(self.waiting)
        return seen.topk(min(self.keep, len(seen)), dim=0).values
