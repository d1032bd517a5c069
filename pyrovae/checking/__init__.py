"""check(): the mistakes that people make in a model and a guide, looked for one by one."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from pyrovae._tools import InputError, InputTypeError
from pyrovae._tools.source_lines import error_place
from pyrovae.checking.bounds import (
    analytic_kl,
    bounds_are_ordered,
    capture_is_possible,
    estimators_agree,
    reparameterized,
    samples_are_data,
)
from pyrovae.checking.case import Case, Finding, failed, sentence, untouched
from pyrovae.checking.scores import gradients, independent_data, particles_broadcast
from pyrovae.checking.structure import plates_and_events, programs_run, sites_match
from pyrovae.checking.values import data_support, finite, latent_support

__all__ = ["CHECKS", "Check", "Report", "Row", "check", "quick"]

WIDTH, NEEDS = 100, "needs "


class Check(NamedTuple):
    """A row of the table: its name, what fills it, and the rows that have to pass before."""

    name: str
    function: Callable[[Case], Finding]
    needs: tuple[str, ...]


RUN = ("runs",)
FIT = ("sites", "plates and events")
SCORE = (*FIT, "data in support")
NUMBER = (*SCORE, "latents in support", "numbers")
CHECKS = (
    Check("runs", programs_run, ()),
    Check("sites", sites_match, RUN),
    Check("plates and events", plates_and_events, ()),
    Check("data in support", data_support, FIT),
    Check("latents in support", latent_support, FIT),
    Check("numbers", finite, (*SCORE, "latents in support")),
    Check("gradients", gradients, NUMBER),
    Check("independent data", independent_data, SCORE),
    Check("particles", particles_broadcast, SCORE),
    Check("reparameterized", reparameterized, FIT),
    Check("analytic KL", analytic_kl, (*FIT, "latents in support")),
    Check("estimators agree", estimators_agree, (*NUMBER, "particles")),
    Check("ELBO below IWAE", bounds_are_ordered, (*NUMBER, "particles")),
    Check("samples", samples_are_data, FIT),
    Check("capture", capture_is_possible, (*NUMBER, "gradients")),
)
QUICK = (
    *CHECKS[:4],
    Check("latents in support", partial(latent_support, covering=False), FIT),
    Check("independent data", partial(independent_data, training=False, sizes=False), SCORE),
)


class Row(NamedTuple):
    """What one check found.

    ``status`` is ``"passed"``, ``"warned"`` (the pair works, within limits), ``"failed"`` or
    ``"skipped"``; ``where`` holds the lines of source to look at, as ``file:line: source``.
    """

    name: str
    status: str
    message: str
    where: tuple[str, ...] = ()

    def __str__(self) -> str:
        mark = "FAILED" if self.status == "failed" else self.status
        return _lines(mark, self.name, self.message, self.where)


@dataclass(frozen=True)
class Report:
    """The table of a check; ``report["sites"]`` is one of its rows."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(row.status == "failed" for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        return {row.name: row for row in self.rows}[name]

    def __str__(self) -> str:
        """The table, with the rows that wait for another one to pass on a line of their own."""
        shown, waiting = [], {}
        for row in self.rows:
            if row.status == "skipped" and row.message.startswith(NEEDS):
                waiting.setdefault(row.message, []).append(row.name)
            else:
                shown.append(str(row))
        for why, names in waiting.items():
            shown.append(_lines("skipped", "the rest", f"{why}: {', '.join(names)}"))
        statuses = [row.status for row in self.rows]
        kinds = [k for k in ("passed", "warned", "failed", "skipped") if k in statuses]
        return "\n".join([*shown, ", ".join(f"{statuses.count(k)} {k}" for k in kinds)])


def _lines(mark: str, name: str, message: str, where: tuple[str, ...] = ()) -> str:
    lead = f"{mark:<8} {name:<19} "
    lines = textwrap.wrap(message, WIDTH - len(lead), break_on_hyphens=False) or [""]
    return f"\n{' ' * len(lead)}".join([lead + lines[0], *lines[1:], *where]).rstrip()


def check(
    model: Callable, guide: Callable, x: Tensor, *context: Any, seed: int = 0, particles: int = 64
) -> Report:
    """Look for the mistakes that people make in a pair, on some data, and say how to mend them.

    Args:
        model: The model program.
        guide: The guide program.
        x: Data ``[N, ...]``, as they are trained on; ``context`` are further arguments of both
            programs, ``[N, ...]``. All are held against the supports, up to 61 are used beside.
        seed: Seeds every draw.
        particles: The number of samples K behind averages over draws.

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
        7 passed, 1 failed, 7 skipped
    """
    _require_data(x)
    if particles < 2:
        raise InputError(f"Expected particles >= 2, got {particles}.")
    rows: dict[str, Row] = {}
    with untouched(model, guide):
        case = Case(model, guide, (x, *context), seed, particles)
        for each in CHECKS:
            rows[each.name] = _row(each, case, rows)
    return Report(tuple(rows.values()))


def quick(model: Callable, guide: Callable, x: Tensor, *context: Any, seed: int = 0) -> None:
    """Look for mistakes that make training meaningless, on its first batch; leave no trace.

    It costs a few evaluations of the programs. What only limits a pair, or shows in training
    itself, is left to :func:`check`.

    Args:
        model: The model program.
        guide: The guide program.
        x: The batch ``[N, ...]``; ``context`` are further arguments of both programs.
        seed: Seeds every draw.

    Raises:
        ValueError: With the mend and the line of source.
    """
    _require_data(x)
    rows: dict[str, Row] = {}
    with untouched(model, guide):
        case = Case(model, guide, (x, *context), seed, particles=1, whole=True)
        for each in QUICK:
            row = rows[each.name] = _row(each, case, rows)
            if row.status == "failed":
                where = f" ({'; '.join(row.where)})" if row.where else ""
                raise InputError(f"{row.message}{where}")


def _require_data(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise InputTypeError(
            f"Expected a tensor [N, ...], got {type(x).__name__}: a data set's are .train, .valid "
            f"and .test."
        )
    if x.dim() == 0 or len(x) == 0:
        raise InputError("Expected at least one datum, got an empty tensor.")


def _row(each: Check, case: Case, done: dict[str, Row]) -> Row:
    unmet = [name for name in each.needs if done[name].status not in ("passed", "warned")]
    if unmet:
        first = done[unmet[0]]
        waits = first.status == "skipped" and first.message.startswith(NEEDS)
        return Row(each.name, "skipped", first.message if waits else NEEDS + first.name)
    try:
        found = each.function(case)
    except Exception as error:
        found = _broken(error, case)
    return Row(
        each.name, found.status, " ".join(found.message.split()), tuple(filter(None, found.where))
    )


def _broken(error: Exception, case: Case) -> Finding:
    text = sentence(error)
    named = case.where(*re.findall(r"(?<!\w)'([^']+)'", text))
    place = error_place(error)
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return failed(f"{kind}{text}", *([place] if place else named))
