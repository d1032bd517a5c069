"""Particles as further rows of the batch, for programs that take no dimension to the left of it.

A plate of K particles gives the networks tensors ``[K, N, ...]``. One that counts its dimensions
from the left (BatchNorm1d, ``softmax(dim=1)``, ``torch.cat(..., 1)``) fails on these, or silently
computes something else. Such programs run on K N rows, every argument repeated K times, and their
traces are read as if there had been the plate.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical, Independent, OneHotCategorical, Unit
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import kl_divergence, register_kl
from torch.distributions.constraints import Constraint

from pyrovae.pairs.traces import Layout, Site, samples


class Fold(Messenger):
    """Runs K particles of N data as a batch of K N rows: particle by particle, its data in order.

    ``joined`` are tensors of the program's, ``[..., K N, ...]``, and ``split`` those of a run with
    a plate of particles, ``[K, ..., N, ...]``. Messages are marked with the fold that they passed.
    """

    def __init__(self, layout: Layout, particles: int, num_data: int) -> None:
        super().__init__()
        self.layout, self.size = layout, (particles, num_data)
        self.frame = CondIndepStackFrame("particles", layout.particle_dim, particles, 0, particles)

    def rows(self, rows: tuple) -> tuple:
        """The programs' arguments, those of each datum repeated K times."""
        return tuple(
            row.repeat(self.size[0], *[1] * (row.dim() - 1))
            if isinstance(row, Tensor) and row.dim() and len(row) == self.size[1]
            else row
            for row in rows
        )

    def _pyro_sample(self, msg: Any) -> None:
        msg["fold"], (particles, num_data) = self, self.size
        if not site_is_subsample(msg):
            if isinstance(msg["value"], Tensor):
                msg["value"] = self.join(msg["value"], msg["fn"].event_dim)
        elif msg["value"] is None and msg["fn"].subsample_size == particles * num_data:
            # The particles share one subsample, which may be of nearly all data.
            every = torch.randperm(msg["fn"].size, device=msg["fn"].device)
            msg["value"] = every[:num_data].repeat(particles)

    def join(self, value: Tensor, event_dim: int) -> Tensor:
        """A tensor as the program has it; one of no datum stays."""
        rank = value.dim() - event_dim
        slot, batch = rank + self.layout.particle_dim, rank + self.layout.dim
        if slot < 0:
            shared = batch >= 0 and value.shape[batch] == self.size[1] != 1
            return torch.cat([value] * self.size[0], batch) if shared else value
        found = value.shape[slot], value.shape[batch]
        if found[0] == 1 and found[1] not in (1, self.size[1]):
            return value
        if found not in ((1, 1), self.size):
            sizes = [-1] * value.dim()
            sizes[slot], sizes[batch] = self.size
            value = value.expand(sizes)
        value = value.movedim(slot, batch - 1).flatten(batch - 1, batch)
        return value.unsqueeze(slot) if slot else value

    def split(self, tensor: Tensor, event_dim: int) -> Tensor:
        """A tensor of the program's as a run with a plate has it; one of no datum stays."""
        rank = tensor.dim() - event_dim
        if not self._varies(tensor.shape[: max(rank, 0)]):
            return tensor
        batch = rank + self.layout.dim
        parts = tensor.unflatten(batch, self.size)
        parts = parts.movedim(batch, max(rank + self.layout.particle_dim, 0))
        return parts.reshape(self.shape(tensor.shape[:rank]) + tensor.shape[rank:])

    def shape(self, batch: Size) -> Size:
        """The batch shape of a run with a plate."""
        if not self._varies(batch):
            return batch
        place = len(batch) + self.layout.dim
        left, right = [*batch[:place]], [self.size[1], *batch[place + 1 :]]
        slot = len(batch) + self.layout.particle_dim
        if slot < 0:
            return Size([self.size[0], *[1] * (-slot - 1), *left, *right])
        return Size([*left[:slot], self.size[0], *left[slot + 1 :], *right])

    def _varies(self, batch: Size) -> bool:
        dim = self.layout.dim
        return len(batch) >= -dim and batch[dim] == self.size[0] * self.size[1]

    def read(self, trace: Trace) -> Trace:
        """The same trace as if it had had a plate of particles."""
        for name, site in samples(trace).items():
            trace.nodes[name] = self._site(site)
        return trace

    def _site(self, site: Site) -> Site:
        fn, raw, scale, mask = site["fn"], site["value"], site["scale"], site["mask"]
        value = self.split(raw, fn.event_dim)
        fn = self._distribution(fn, (value, raw))
        frames, inside = [self.frame], False
        for frame in site["cond_indep_stack"]:
            inside = inside or frame.name == self.layout.plate
            if frame.name == self.layout.plate and frame.size > 0:
                whole = frame.full_size in (None, frame.size)
                scale = scale if whole else scale * self.size[0]
                full = self.size[1] if whole else frame.full_size
                frame = frame._replace(size=self.size[1], full_size=full)
            frames.append(frame)
        missing = -self.layout.particle_dim - len(fn.batch_shape) - 1
        if not inside and missing >= 0 and self.layout.dim + len(fn.batch_shape) < 0:
            # What lies outside the batch's plate counts once for every particle.
            fn = fn.expand([self.size[0], *[1] * missing, *fn.batch_shape])
        return site | {
            "value": value,
            "fn": fn,
            "scale": self.split(scale, 0) if isinstance(scale, Tensor) else scale,
            "mask": self.split(mask, 0) if isinstance(mask, Tensor) else mask,
            "cond_indep_stack": tuple(frames),
        }

    def _distribution(self, fn: Any, drawn: tuple[Tensor, Tensor], inside: int = 0) -> Any:
        """A distribution of the program's with K particles, inside so many events of another."""
        if isinstance(fn, Independent):
            n = fn.reinterpreted_batch_ndims
            return Independent(self._distribution(fn.base_dist, drawn, inside + n), n)
        if type(fn) in (Categorical, OneHotCategorical):
            return type(fn)(logits=self.split(fn.logits, inside + 1), validate_args=False)
        if type(fn) is Unit:
            log_factor = self.split(fn.log_factor, inside)
            return Unit(log_factor, has_rsample=vars(fn).get("has_rsample"), validate_args=False)
        return Folded(fn, self, drawn, inside)

    def constraint(self, constraint: Any, events: int) -> Any:
        """A support whose bounds may differ between rows, over values of so many dimensions."""
        found = copy.copy(constraint)
        for name, value in vars(constraint).items():
            if isinstance(value, Tensor):
                setattr(found, name, self.split(value, events))
            elif isinstance(value, Constraint):
                setattr(found, name, self.constraint(value, events))
        return found


class Folded(TorchDistribution):
    """A distribution over K N rows as one over K particles of N data.

    ``drawn`` is the value that was drawn from it, split, and as it was drawn: a flow knows its
    density at that very tensor. ``inside`` is how many dimensions of its batch are events of an
    Independent around it.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, base: Any, fold: Fold, drawn: tuple[Tensor, Tensor], inside: int) -> None:
        self.base_dist, self.fold, self.drawn, self.inside = base, fold, drawn, inside
        self.has_rsample = base.has_rsample
        end = len(base.batch_shape) - inside
        batch = fold.shape(base.batch_shape[:end]) + base.batch_shape[end:]
        super().__init__(batch, base.event_shape, validate_args=False)

    @property
    def events(self) -> int:
        """How many dimensions of a value lie to the right of the plates."""
        return self.inside + self.base_dist.event_dim

    @property
    def support(self) -> Any:
        """Where values lie, with the bounds of each row."""
        return self.fold.constraint(self.base_dist.support, self.events)

    @property
    def mean(self) -> Tensor:
        """The mean, with the dimensions of a value."""
        return self.fold.split(self.base_dist.mean, self.events)

    @property
    def variance(self) -> Tensor:
        """The variance, with the dimensions of a value."""
        return self.fold.split(self.base_dist.variance, self.events)

    def entropy(self) -> Tensor:
        """The entropy in nats, with the dimensions of the batch."""
        return self.fold.split(self.base_dist.entropy(), self.inside)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density in nats, with the dimensions of the batch."""
        return self.fold.split(self.base_dist.log_prob(self._raw(value)), self.inside)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """What Pyro's estimators of a gradient take of a site."""
        parts = self.base_dist.score_parts(self._raw(x), *args, **kwargs)
        split = self.fold.split
        return ScoreParts(*(split(p, self.inside) if isinstance(p, Tensor) else p for p in parts))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws that carry a gradient."""
        return self._several(self.base_dist.rsample, sample_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without a gradient."""
        return self._several(self.base_dist.sample, sample_shape)

    def _several(self, draw: Any, sample_shape: Any) -> Tensor:
        number = Size(sample_shape).numel()
        draws = [self.fold.split(draw(), self.events) for _ in range(number)]
        return torch.stack(draws).reshape(Size(sample_shape) + self.shape())

    def _raw(self, value: Tensor) -> Tensor:
        own, raw = self.drawn
        return raw if value is own else self.fold.join(value, self.events)


@register_kl(Folded, Folded)
@register_kl(Folded, Independent)
@register_kl(Independent, Folded)
def _kl_folded(p: Any, q: Any) -> Tensor:
    folded = p if isinstance(p, Folded) else q
    return folded.fold.split(kl_divergence(_joined(p), _joined(q)), folded.inside)


def _joined(fn: Any) -> Any:
    """The distribution as the program has it."""
    if isinstance(fn, Independent):
        return Independent(_joined(fn.base_dist), fn.reinterpreted_batch_ndims)
    return fn.base_dist if isinstance(fn, Folded) else fn
