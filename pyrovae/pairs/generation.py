"""Simulate latents and data from a model, in the order in which each depends on the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from pyrovae._tools import InputError
from pyrovae._tools.seeding import draw_seed, seeded, undone
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import Site, Values, is_bookkeeping, samples

# Wrappers that leave the distribution of each element as it is.
WRAPPERS = (Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
# What a program says of values that it cannot take.
REFUSALS = (ArithmeticError, LookupError, RuntimeError, ValueError)
# Scores that differ by less, in nats and relatively, differ by rounding.
ROUNDING = 1e-5
# A continuous value is changed to the farthest of so many draws: with one in 100,000 of a single
# draw, the difference is as small as rounding.
CANDIDATES = 4

Rows = tuple[Tensor, ...]


class Source(NamedTuple):
    """What a site observes: the arguments that its value follows, by their places.

    ``copied`` is the argument whose elements it repeats, and ``places`` their flat places there,
    in the shape of the value; None where the value is made of its arguments in another way.
    """

    arguments: tuple[int, ...]
    copied: int | None = None
    places: Tensor | None = None


Known = dict[str, tuple[Tensor, Tensor | None]]


class _Freed(Messenger):
    """Draws what a model observes but for sites that are kept, and holds what is known.

    ``known`` has a site's value and where it is known, or None for everywhere. ``indices`` are the
    subsamples that were drawn, as known values.
    """

    def __init__(self, kept: frozenset[str], known: Known) -> None:
        super().__init__()
        self.kept, self.known, self.indices = kept, known, Known()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"] and name not in self.kept and not is_bookkeeping(msg):
            msg["infer"] = msg["infer"] | {"was_observed": True, "obs": msg["value"]}
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        value, where = self.known.get(name, (None, None))
        if value is not None and where is None and not msg["is_observed"]:
            msg["value"] = value

    def _pyro_post_sample(self, msg: Any) -> None:
        value, where = self.known.get(msg["name"], (None, None))
        if value is not None and where is not None:
            msg["value"] = torch.where(where, value, msg["value"])
        if site_is_subsample(msg):
            self.indices[msg["name"]] = msg["value"], None


class _Disturbed(_Freed):
    """Runs a model once more, with other values wherever nothing is known.

    ``same`` is, by site, where its distribution came out as in the run before, ``sites``. Such
    elements keep that run's values at once, so that what they alone decide is found as well.
    """

    def __init__(self, kept: frozenset[str], known: Known, sites: dict[str, Site]) -> None:
        super().__init__(kept, known)
        self.sites = sites
        self.same = {name: torch.zeros_like(s["value"]).bool() for name, s in sites.items()}

    def _pyro_post_sample(self, msg: Any) -> None:
        before = self.sites.get(msg["name"])
        if before is None or msg["fn"].shape() != before["fn"].shape():
            return
        value = before["value"]
        with undone((), value.device):
            other = _other(before["fn"], value)
            possible = bool(before["fn"].support.check(other).all())
            another = other if possible and before["fn"].support.is_discrete else before["fn"]()
        same = _agree(before["fn"], msg["fn"], value) & _agree(before["fn"], msg["fn"], another)
        where = self.known.get(msg["name"], (None, None))[1]
        self.same[msg["name"]] = same if where is None else same | where
        msg["value"] = torch.where(self.same[msg["name"]], value, other)


class Simulator:
    """Draws latents and data from a pair's model: z ~ p(z), x ~ p(x | z).

    Args:
        pair: The pair, in eval mode.
        keep: Whether sites that observe further arguments alone stay observed; they are drawn
            anew otherwise, as x is.

    Which argument a site observes is told by shared storage, or else by whether its value follows
    when the argument is changed. Whether the model reads what it observes is told by whether any
    distribution changes with the values of x. Where it does, elements are drawn one after
    another: those whose distribution depends on nothing that is not known, and again with these
    fed back, until all are known; T times for a model that is autoregressive over T. The draw is
    right if the model, run on it, has the distributions again that it was drawn from.
    """

    def __init__(self, pair: Pair, keep: bool = True) -> None:
        self.pair, self.keep = pair, keep
        self.kept: frozenset[str] = frozenset()
        self.reads: bool | None = None

    def draw(self, rows: Rows, given: Values | None = None) -> tuple[dict[str, Site], Rows]:
        """The sites of a run in which everything but ``given`` latents is drawn, and arguments.

        In these, what is observed is replaced by what was drawn, where nothing is kept. The first
        call looks at the model; its random stream is left alone.

        Raises:
            ValueError: If the model reads the values that it observes and no order is found to
                draw them in, or what is kept depends on what is drawn.
        """
        known = _whole(given or {})
        if self.reads is None:
            self.look(rows, given)
        if self.reads:
            return self._in_order(rows, known)
        sites = self._run(rows, _Freed(self.kept, known))
        return sites, rows if self.keep else self._fed(rows, find_sources(self.pair, rows), sites)

    def look(self, rows: Rows, given: Values | None = None) -> None:
        """Find what is kept, and whether the model reads the values that it observes."""
        with seeded(0, rows[0].device):
            sources = find_sources(self.pair, rows)
            if self.keep:
                further = {n for n, s in sources.items() if s.arguments and 0 not in s.arguments}
                self.kept = frozenset(further)
            known = _whole(given or {})
            self._check_kept(rows, known)
            _, _, same, noise = self._compare(rows, sources, known, control=True)
            self.reads = not all(bool((same[n] | noise[n]).all()) for n in same)

    def _check_kept(self, rows: Rows, known: Known) -> None:
        """Refuse to keep what depends on what is drawn: draws before it would not agree with it."""
        if not self.kept:
            return
        one, other = (self._run(rows, _Freed(self.kept, known)) for _ in range(2))
        for name in sorted(self.kept & one.keys() & other.keys()):
            if not bool(_agree(one[name]["fn"], other[name]["fn"], one[name]["value"]).all()):
                raise InputError(
                    f"Site {name!r} observes a further argument and depends on what is drawn "
                    f"before it, so that data drawn forward do not agree with that argument: draw "
                    f"from a model that does not observe it."
                )

    def _in_order(self, rows: Rows, known: Known) -> tuple[dict[str, Site], Rows]:
        """Draw element after element, each given those that its distribution depends on."""
        sources, scores, found = find_sources(self.pair, rows), Values(), -1
        for _ in range(self._most_passes(rows, known)):
            sites, indices, same, _ = self._compare(rows, sources, known)
            rows, before, stale = self._fed(rows, sources, sites), found, 0
            for name in same:
                score, where = _score(sites[name]), known.get(name, (None, None))[1]
                if where is not None:
                    # By chance an element may have seemed to depend on nothing unknown, as where a
                    # probability is saturated: it is drawn anew when its distribution moves.
                    moved = where & ~_close(scores[name], score)
                    stale, same[name] = stale + int(moved.sum()), same[name] & ~moved
                    score = torch.where(where & ~moved, scores[name], score)
                scores[name] = score
            found = sum(int(each.sum()) for each in same.values())
            known = known | indices | {n: (sites[n]["value"], each) for n, each in same.items()}
            if stale == 0 and found in (before, sum(each.numel() for each in same.values())):
                break
        held = known | _whole({name: sites[name]["value"] for name in same})
        again = self._run(rows, _Freed(self.kept, held))
        for name in same:
            same[name] = same[name] & _close(scores[name], _score(again[name]))
        if not all(bool(each.all()) for each in same.values()):
            names = sorted(name for name, each in same.items() if not bool(each.all()))
            raise InputError(
                f"The distributions of sites {names} depend on the values that the model observes, "
                f"and no order was found in which these can be drawn one after another, so no data "
                f"can be drawn from this model: let it read only what precedes a value."
            )
        return again, rows

    def _most_passes(self, rows: Rows, known: Known) -> int:
        """Two for each element of a datum, and one that finds all of them right."""
        with undone((), rows[0].device):
            sites = self._run(rows, _Freed(self.kept, known))
        return 2 + 2 * sum(site["value"].numel() for site in sites.values()) // len(rows[0])

    def _compare(
        self, rows: Rows, sources: dict[str, Source], known: Known, control: bool = False
    ) -> tuple[dict[str, Site], Known, dict[str, Tensor], dict[str, Tensor]]:
        """A run, its subsamples, and where distributions depend on nothing that is not known.

        ``control`` finds, last, where they change without a reason, as a program may draw numbers
        of its own.
        """
        stream, device = draw_seed(None), rows[0].device
        first = _Freed(self.kept, known)
        with seeded(stream, device):
            sites = self._run(rows, first)
        with undone((), device):
            others = self._disturbed(rows, sources, sites, known)
        held = known | first.indices
        names = [n for n, s in sites.items() if not s["is_observed"] and n not in _given(known)]
        drawn = {name: sites[name] for name in names}
        second = _Disturbed(self.kept, held, drawn)
        with seeded(stream, device), pyro.validation_enabled(False), suppress(*REFUSALS):
            self._run(others, second)
        noise = {name: torch.zeros_like(each) for name, each in second.same.items()}
        if control and not all(bool(each.all()) for each in second.same.values()):
            third = _Disturbed(self.kept, held, drawn)
            with seeded(stream, device):
                self._run(rows, third)
            noise = {name: ~each for name, each in third.same.items()}
        return sites, first.indices, second.same, noise

    def _disturbed(
        self, rows: Rows, sources: dict[str, Source], sites: dict[str, Site], known: Known
    ) -> Rows:
        """The arguments with other values in place of all that is observed and not known."""
        placed = self._placed(sources, sites)
        others = list(rows)
        for name in sources.keys() - placed.keys() - self.kept:
            for i in sources[name].arguments:
                others[i] = next(_changes(rows[i]), rows[i])
        for name, (i, index) in placed.items():
            site, where = sites[name], known.get(name, (None, None))[1]
            seen = site["infer"]["obs"].reshape(site["value"].shape)
            other = _other(site["fn"], seen)
            if other.is_floating_point():
                other = torch.where(other.isnan(), site["value"], other)
            other = other if where is None else torch.where(where, seen, other)
            others[i] = _written(others[i], index, other)
        return tuple(others)

    def _fed(self, rows: Rows, sources: dict[str, Source], sites: dict[str, Site]) -> Rows:
        """The arguments with what was drawn in place of what is observed."""
        fed = list(rows)
        for name, (i, index) in self._placed(sources, sites).items():
            fed[i] = _written(fed[i], index, sites[name]["value"])
        return tuple(fed)

    def _placed(
        self, sources: dict[str, Source], sites: dict[str, Site]
    ) -> dict[str, tuple[int, Tensor]]:
        """Where in which argument the draws of each site belong, for those that repeat one."""
        return {
            name: (source.copied, source.places)
            for name, source in sources.items()
            if source.copied is not None
            and source.places is not None
            and name in sites
            and name not in self.kept
            and source.places.numel() == sites[name]["value"].numel()
        }

    def _run(self, rows: Rows, handler: _Freed) -> dict[str, Site]:
        """The sample sites of a run, but for bookkeeping."""
        with handler:
            trace = poutine.trace(self.pair.run_model).get_trace(*rows)
        return {n: s for n, s in samples(trace).items() if not is_bookkeeping(s)}


def find_sources(pair: Pair, rows: Rows) -> dict[str, Source]:
    """Which arguments each observed site of the model follows, found in runs of their own.

    Raises:
        ValueError: If a site observes what is made of x and of further arguments.
    """
    # Contiguous copies, so that a place in the storage is a flat index, and no two arguments
    # share theirs.
    own = tuple(row.clone(memory_format=torch.contiguous_format) for row in rows)
    before = _observed(pair, own)
    found = {name: _shared(value, own) for name, value in before.items()}
    if None not in found.values():
        return {name: source for name, source in found.items() if source}
    runs = [_changed(pair, own, i) for i in range(len(own))]
    return {
        name: source or _followed(pair, name, before[name], own, runs)
        for name, source in found.items()
    }


def _followed(
    pair: Pair, name: str, value: Tensor, own: Rows, runs: list[tuple[Tensor, Values]]
) -> Source:
    """The source of a value that follows arguments when they are changed, one in each run."""
    follows, copied = [], None
    for i, (changed, after) in enumerate(runs):
        other = after.get(name)
        if other is not None and _equal(value, other):
            continue
        follows.append(i)
        if other is not None and _repeats((value, other), (own[i], changed)):
            copied = i
    if copied is not None:
        places = torch.arange(value.numel(), device=value.device).reshape(value.shape)
        return Source(tuple(follows), copied, places)
    for i in follows:
        chosen = _chosen(pair, name, value, own, i)
        if chosen is not None:
            return Source(tuple(follows), i, chosen)
    if 0 in follows and len(follows) > 1:
        raise InputError(
            f"Site {name!r} observes what is made of x and of further arguments, {follows}, so "
            f"that it cannot be told what a draw of it is: let it observe x itself, and its "
            f"distribution depend on the others."
        )
    return Source(tuple(follows))


def _chosen(pair: Pair, name: str, value: Tensor, rows: Rows, i: int) -> Tensor | None:
    """Which elements of an argument a value has, as where a mask chooses them, each one once.

    The elements' numbers are spelled in two values that the argument has, a run for each digit,
    and read off what the site then observes: a program may refuse values that are not its own.
    """
    row = rows[i]
    if row.is_complex() or not row.numel() or bool((row == row.view(-1)[0]).all()):
        return None
    low, high = row.min(), row.max()
    places = torch.zeros(value.shape, dtype=torch.long, device=row.device)
    numbers = torch.arange(row.numel(), device=row.device).reshape(row.shape)
    for digit in range((row.numel() - 1).bit_length()):
        spelled = torch.where(numbers.bitwise_right_shift(digit) % 2 == 1, high, low)
        try:
            with pyro.validation_enabled(False):
                seen = _observed(pair, (*rows[:i], spelled, *rows[i + 1 :])).get(name)
        except REFUSALS:
            return None
        if seen is None or seen.shape != value.shape:
            return None
        places += (seen == high).long() << digit
    if bool((places >= row.numel()).any()) or len(places.unique()) < places.numel():
        return None
    return places if _equal(row.view(-1)[places].to(value), value) else None


def _observed(pair: Pair, rows: tuple) -> Values:
    """What the model's sites observe."""
    with seeded(0, rows[0].device):
        sites = samples(pair.trace_given(pair.run_model, rows))
    return {n: s["value"] for n, s in sites.items() if s["is_observed"] and not is_bookkeeping(s)}


def _shared(value: Tensor, rows: tuple) -> Source | None:
    """The source of a value that is a view of an argument."""
    for i, row in enumerate(rows):
        if value.numel() and value.untyped_storage().data_ptr() == row.untyped_storage().data_ptr():
            if value.dtype != row.dtype:
                return Source((i,))
            flat = torch.arange(row.numel(), device=row.device)
            index = flat.as_strided(value.shape, value.stride(), value.storage_offset())
            unique = len(index.unique()) == index.numel()
            return Source((i,), i, index) if unique else Source((i,))
    return None


def _changed(pair: Pair, rows: tuple, i: int) -> tuple[Tensor, Values]:
    """One argument changed, and what the model then observes; as it is where it takes no other."""
    for changed in _changes(rows[i]):
        with pyro.validation_enabled(False):
            try:
                return changed, _observed(pair, (*rows[:i], changed, *rows[i + 1 :]))
            except REFUSALS:
                continue
    return rows[i], _observed(pair, rows)


def _changes(row: Tensor) -> Iterator[Tensor]:
    """An argument with other values, as near as can be to such as a program takes."""
    if row.dtype == torch.bool:
        yield ~row
        return
    if row.is_complex() or not row.numel():
        return
    finite = row.isfinite()
    seen = row[finite] if bool(finite.any()) else row.new_zeros(1)
    low, high = seen.min(), seen.max()
    if bool(low < high):
        other = low + high - row
        yield torch.where(finite & (other != row), other, low)
        yield row.roll(1, 0)
    else:
        steps = (-1, 1) if bool(low > 0) else (1, -1)
        yield from (torch.where(finite, row, low) + step for step in steps)


def _other(fn: Any, value: Tensor) -> Tensor:
    """Another value of a distribution's support, different in every element where there is one."""
    base = element_of(fn)
    if not base.support.is_discrete:
        # Elements that depend on each other are a possible value only as they were drawn.
        drawn = torch.stack([fn() for _ in range(1 if base.event_dim else CANDIDATES)])
        far = (drawn - value).abs().argmax(0, keepdim=True)
        other = drawn.gather(0, far)[0]
        return torch.where(other == value, other + 1, other)
    if base.event_dim:
        return value.roll(1, -1)
    if base.has_enumerate_support:
        try:
            levels = base.enumerate_support(expand=False)
        except NotImplementedError:
            return value + 1  # A binomial whose counts differ.
        other = levels.min() + levels.max() - value
        return torch.where(other == value, levels.min().to(value.dtype), other)
    return value + 1


def element_of(fn: Any) -> Any:
    """The distribution of elements that are independent of each other."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def _agree(one: Any, other: Any, value: Tensor) -> Tensor:
    """Where two distributions of one shape agree about a value, element by element."""
    return _close(*(_log_prob(fn, value) for fn in (one, other)))


def _score(site: Site) -> Tensor:
    return _log_prob(site["fn"], site["value"])


def _log_prob(fn: Any, value: Tensor) -> Tensor:
    """Of each element of a value; elements that depend on each other have what all have."""
    base = element_of(fn)
    score = base.log_prob(value)
    return score.reshape(score.shape + (1,) * base.event_dim).broadcast_to(value.shape)


def _close(one: Tensor, other: Tensor) -> Tensor:
    return torch.isclose(one, other, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, 0.0, 0.0, equal_nan=True)


def _repeats(values: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]) -> bool:
    """Whether a value is an argument in another shape or type, wherever a change of it shows."""
    (before, after), (row, _) = values, rows
    if before.shape != after.shape or before.numel() != row.numel() or not before.dim():
        return False
    moved = (before != after).reshape(row.shape)
    pairs = zip(values, rows, strict=True)
    return all(_equal(v.reshape(row.shape)[moved].to(row.dtype), like[moved]) for v, like in pairs)


def _written(row: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """An argument with values at flat places of it."""
    row = row.clone(memory_format=torch.contiguous_format)
    row.view(-1)[index.reshape(-1)] = value.reshape(-1).to(row.dtype)
    return row


def _whole(given: Values) -> Known:
    return {name: (value, None) for name, value in given.items()}


def _given(known: Known) -> set[str]:
    return {name for name, (_, where) in known.items() if where is None}
