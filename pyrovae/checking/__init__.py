"""``check``: look for common mistakes in a model and a guide, one row of a table each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from pyrovae._tools import InputError, require_memory, warn
from pyrovae._tools.shown import Shown, Told
from pyrovae._tools.source_lines import error_place
from pyrovae.checking import bounds, scores, structure, values
from pyrovae.checking.case import Case, Row, failed, skipped, untouched
from pyrovae.data.given import takes_data
from pyrovae.pairs.contract import check_arguments, sentence
from pyrovae.pairs.pair import Pair

__all__ = ["CHECKS", "Check", "Report", "Row", "check", "quick"]


class Check(NamedTuple):
    """One check: its row's name, its function, and the rows that have to pass before."""

    name: str
    function: Callable[[Case], Row]
    needs: tuple[str, ...]


FIT = ("sites", "plates and events")
SCORE = (*FIT, "data in support")
NUMBER = (*SCORE, "latents in support", "numbers")
CHECKS = (
    Check("runs", structure.programs_run, ()),
    Check("sites", structure.sites_match, ("runs",)),
    Check("plates and events", structure.plates_and_events, ()),
    Check("data in support", values.data_support, FIT),
    Check("latents in support", values.latent_support, FIT),
    Check("numbers", values.finite, (*SCORE, "latents in support")),
    Check("gradients", scores.gradients, NUMBER),
    Check("independent data", scores.independent_data, SCORE),
    Check("particles", scores.particles_broadcast, SCORE),
    Check("reparameterized", bounds.reparameterized, FIT),
    Check("analytic KL", bounds.analytic_kl, (*FIT, "latents in support")),
    Check("estimators agree", bounds.estimators_agree, (*NUMBER, "particles")),
    Check("ELBO below IWAE", bounds.bounds_are_ordered, (*NUMBER, "particles")),
    Check("samples", bounds.samples_are_data, NUMBER),
    Check("capture", bounds.capture_is_possible, (*NUMBER, "gradients")),
)


def _few_are_independent(case: Case) -> Row:
    return scores.independent_data(case.fewer, training=False, sizes=False)


# What fit refuses, and what it warns of: that trains, though hardly to what is meant.
QUICK = (
    *CHECKS[:4],
    Check("latents in support", partial(values.latent_support, covering=False), FIT),
    Check("numbers", partial(values.finite, edges=False), (*SCORE, "latents in support")),
    Check("independent data", _few_are_independent, SCORE),
)
TOLD = (
    Check("gradients", partial(scores.gradients, training=False), ()),
    Check("latents in support", values.latent_support, ()),
    # Batch normalization is a choice that people make: the check alone says what it costs.
    Check("independent data", partial(scores.independent_data, training=False), ()),
    Check("samples", bounds.samples_are_data, ()),
)


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """The table of a check; ``report["sites"]`` is one of its rows."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(row.status == "failed" for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        return {row.name: row for row in self.rows}[name]

    def _told(self) -> Told:
        rank = ["failed", "warned", "skipped", "passed"]
        rows = sorted(self.rows, key=lambda row: rank.index(row.status))
        counts = [(k, sum(row.status == k for row in rows)) for k in rank]
        told = [(row.name, f"{row.status}: {row.message}".rstrip(": ")) for row in rows]
        verdict = "What failed is to be mended first; print() shows the lines of source."
        title = "Report: " + ", ".join(f"{count} {kind}" for kind, count in counts if count)
        return Told(title, told, "" if self.passed else verdict)

    def __str__(self) -> str:
        """The table, with the rows that wait for another one to pass on a line of their own."""
        shown = [str(row) for row in self.rows if not row.needs]
        for needed in dict.fromkeys(row.needs for row in self.rows if row.needs):
            names = ", ".join(row.name for row in self.rows if row.needs == needed)
            shown.append(str(Row("the rest", "skipped", f"needs {needed}: {names}")))
        statuses = [row.status for row in self.rows]
        kinds = [k for k in ("passed", "warned", "failed", "skipped") if k in statuses]
        return "\n".join([*shown, ", ".join(f"{statuses.count(k)} {k}" for k in kinds)])


@takes_data
def check(
    model: Callable, guide: Callable, x: Tensor, *context: Any, seed: int = 0, particles: int = 64
) -> Report:
    """Look for common mistakes in a pair, on some data, and say how to fix them.

    Args:
        model: The model program.
        guide: The guide program.
        x: Data ``[N, ...]``, as they are trained on; ``context`` are further arguments of both
            programs, ``[N, ...]``. The supports are checked on all of them, the rest on up to 61.
        seed: Seeds every draw.
        particles: The number of samples K of averages over draws.

    Returns:
        A table with a row for each of :data:`CHECKS`; print it. The pair, Pyro's store and the
        random streams are left as they were.

    Raises:
        TypeError: If x is no tensor.
        ValueError: If x is empty or ``particles`` is less than 2.

    Example:
        >>> grey = pyrovae.load_data("digits")
        >>> print(pyrovae.check(model, guide, grey.train))
        passed   runs                on 61 data...
        passed   sites               latents z; observed x
        passed   plates and events   plate 'data' at dim -1; z [4], x [1, 8, 8]
        FAILED   data in support     Site 'x' observes 0.6875, outside the support of Bernoulli...
        skipped  the rest            needs data in support: ...
        6 passed, 1 failed, 8 skipped
    """
    if particles < 2:
        raise InputError(f"Expected particles >= 2, got {particles}.")
    if isinstance(x, Tensor):
        require_memory(f"{particles} particles of each of {len(x[:61])} data", x[:61], particles)
    pair = Pair(model, guide)
    with untouched(pair):
        return Report(tuple(_rows(CHECKS, Case(pair, (x, *context), seed, particles))))


def quick(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Any,
    called: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Refuse a pair that cannot be trained to anything, judged by its first batch.

    And warn of one that trains, though hardly to what is meant, judged by a few data points.
    Costs a few evaluations of the programs and leaves everything as it was. The rest is left to
    :func:`check`.

    Args:
        model: The model program.
        guide: The guide program.
        x: The batch ``[N, ...]``; ``context`` are further arguments of both programs.
        called: What the context is called, if that is known.
        seed: Seeds every draw.

    Raises:
        ValueError: Saying how to fix it, with the line of source.
    """
    pair = Pair(model, guide)
    with untouched(pair):
        case = Case(pair, (x, *context), seed, particles=1, whole=True)
        check_arguments(pair, x, *context, called=called)
        for row in _rows(QUICK, case):
            if row.status == "failed":
                raise InputError(_sentence(row))
        told = [row for row in _rows(TOLD, case.fewer) if row.status == "failed"]
    if told:
        found = " ".join(map(_sentence, told))
        warn(f"{found} Trained as it is: run pyrovae.check for the rest.")


def _sentence(row: Row) -> str:
    return f"{row.message} ({'; '.join(row.where)})" if row.where else row.message


def _rows(checks: Iterable[Check], case: Case) -> Iterator[Row]:
    done: dict[str, Row] = {}
    for name, function, needs in checks:
        unmet = [done[n] for n in needs if done[n].status not in ("passed", "warned")]
        try:
            found = skipped(needs=unmet[0].needs or unmet[0].name) if unmet else function(case)
        except Exception as error:
            found = _raised(error, case)
        message, where = " ".join(found.message.split()), tuple(filter(None, found.where))
        done[name] = found._replace(name=name, message=message, where=where)
        yield done[name]


def _raised(error: Exception, case: Case) -> Row:
    """A check that raises has failed: the contract refuses the pair, or the pair's own code."""
    text, place = sentence(error), error_place(error)
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    # The errors of the contract and of the checks put the names of sites in quotes.
    where = [place] if place else case.where(*re.findall(r"(?<!\w)'([^']+)'", text))
    return failed(f"{kind}{text}", *where)
