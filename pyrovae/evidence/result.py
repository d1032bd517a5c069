"""What an estimate of log p(x) says, how far it can be trusted, and how two of them compare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from pyrovae._tools import InputError, InputTypeError, standard_error
from pyrovae._tools.shown import Shown, Told, figures, html, number, plus_minus, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAVY, FEW = 0.7, 8.0
# A single heavy-tailed datum hardly moves a mean; one in twenty does.
HEAVY_SHARE = 0.05

Kind = Literal["good", "fair", "doubtful", "first", "second", "tied", "unknown"]


class Verdict(str):
    """A verdict: the text is for people, and ``kind`` is what programs decide by.

    Args:
        kind: Of an estimate ``"good"``, ``"fair"`` (nothing speaks against it, or too little is
            known) or ``"doubtful"``; of a comparison ``"first"`` or ``"second"`` for the better
            one, ``"tied"``, or ``"unknown"``.
        text: One or more sentences.
    """

    kind: Kind

    def __new__(cls, kind: Kind, text: str) -> Verdict:
        """A string that remembers its kind."""
        self = super().__new__(cls, text)
        self.kind = kind
        return self

    def __getnewargs__(self) -> tuple[Kind, str]:  # type: ignore[override]  # str has (text,)
        return self.kind, str(self)


class Curve(NamedTuple):
    """The importance-weighted bound for several numbers of samples, from one set of draws.

    ``num_samples`` are P numbers k; ``log_prob`` ``[P, N]`` is the mean, over the groups of k
    draws that the K draws hold, of the logarithm of a group's mean weight, in nats. For k = 1 it
    is the ELBO.
    """

    num_samples: tuple[int, ...]
    log_prob: Tensor

    @property
    def mean(self) -> dict[int, float]:
        """The mean over data by number of samples, nats per datum."""
        means = self.log_prob.double().mean(1).tolist()
        return dict(zip(self.num_samples, means, strict=True))


@dataclass(frozen=True, repr=False)
class LogLikelihood(Shown):
    """An estimate of log p(x) for each of N data, in nats.

    Attributes:
        log_prob: The estimate, ``[N]``; a lower bound in expectation.
        standard_error: Its Monte Carlo standard error by the delta method, ``[N]``; NaN for K = 1.
        ess: The effective sample size out of K, ``[N]``.
        khat: The Pareto shape of the weights' tail, ``[N]``; above 0.7 the error is not to be
            trusted and more samples or a better guide are needed. NaN for K too small to tell.
        num_samples: K, the number of samples or of annealed chains.
        smoothed: The estimate with the largest weights Pareto-smoothed, ``[N]``: less variable,
            no longer a bound.
        curve: The bound for fewer samples.
        method: How the estimate was made.
        seed: What its draws derive from.
        data: A digest of the data, by which two results are known to be of the same.
        uncovered: The share of the prior's draws to which the guide gives no density; NaN where
            that cannot be told.
        guide_elbo: With a refined guide: the ELBO of the guide before that, ``[N]``.
        acceptance: With annealing: the mean acceptance of its transitions, ``[N]``.
    """

    log_prob: Tensor
    standard_error: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int
    smoothed: Tensor | None = None
    curve: Curve | None = None
    method: str = "importance sampling"
    seed: int | None = None
    data: str = ""
    uncovered: float = math.nan
    guide_elbo: Tensor | None = None
    acceptance: Tensor | None = None

    @property
    def mean(self) -> float:
        """The mean over data, nats per datum."""
        return self.log_prob.double().mean().item()

    @property
    def mean_standard_error(self) -> float:
        """The Monte Carlo standard error of that mean: these data, other random draws."""
        return (self.standard_error.double().square().sum().sqrt() / len(self.log_prob)).item()

    @property
    def mean_bias(self) -> float:
        r"""By how much that mean is too low, to the second order of the delta method; negative.

        .. math:: E[\ln \hat p] - \ln p \approx -\tfrac12 \mathrm{se}^2

        It does not shrink with N as the standard error of the mean does.
        """
        return -0.5 * self.standard_error.double().square().mean().item()

    @property
    def data_standard_error(self) -> float:
        """The standard error of that mean over data: other data from the same source."""
        return standard_error(self.log_prob.double()).item()

    @property
    def smoothed_mean(self) -> float:
        """The mean over data of the smoothed estimate, nats per datum."""
        return math.nan if self.smoothed is None else self.smoothed.double().mean().item()

    @property
    def amortization_gap(self) -> Tensor | None:
        r"""What refining the guide won for each datum, ``[N]``; None if it was not refined.

        .. math:: \mathcal{L}(q^*_x; x) - \mathcal{L}(q(\cdot \mid x); x) \quad \text{in nats}

        References:
            Cremer et al., Inference Suboptimality in Variational Autoencoders (arXiv 1801.03558).
        """
        if self.guide_elbo is None or self.curve is None:
            return None
        return self.curve.log_prob[self.curve.num_samples.index(1)] - self.guide_elbo

    @property
    def verdict(self) -> Verdict:
        """Whether the numbers can be trusted, and what to do if not."""
        told = self._of_tails() if self.acceptance is None else self._of_chains()
        unsure, all_known, about = told
        n, found = len(self.log_prob), []
        if self.impossible:
            found.append(
                f"All weights are zero for {_share(self.impossible, n)}: every draw lies outside "
                f"the model's support there, or the model gives these data no density."
            )
        if self.uncovered > 0:
            found.append(
                f"The guide gives no density to {self.uncovered:.0%} of the prior's draws, so the "
                f"numbers miss what p(x) has there and more samples will not help: give the guide "
                f"the prior's support, or use defensive=0.1."
            )
        found.append(about)
        if self.biased:
            found.append(
                f"The mean is too low by about {-self.mean_bias:.2g} nats, or more where weights "
                f"are heavy, which its standard error does not contain."
            )
        if len(found) > 1 or unsure > HEAVY_SHARE * n:
            return Verdict("doubtful", " ".join(found))
        return Verdict("fair" if unsure or not all_known else "good", about)

    def _told(self) -> Told:
        errors = self.mean_standard_error, self.data_standard_error
        rows = [("log p(x)", headline(self.mean, *errors, bound=self.verdict.kind == "doubtful"))]
        rows.append(("effective samples", f"median {self.ess.median():.1f} of {self.num_samples}"))
        known = self.khat[~self.khat.isnan()]
        if len(known):
            heavy = f"above {HEAVY} for {int((known > HEAVY).sum())} of {len(known)} data"
            rows.append(("k-hat", f"median {known.median():.2f}, {heavy}"))
        if (gap := self.amortization_gap) is not None:
            rows.append(("amortization gap", f"{gap.double().mean():.3f} nats per datum"))
        n, verdict = len(self.log_prob), self.verdict
        return Told(
            f"LogLikelihood of {n} data by {self.method}, K = {self.num_samples}",
            rows,
            f"{verdict.kind}: {verdict}",
        )

    def plot(self) -> Figure:
        """Draw the bound by number of samples, and k-hat of each datum; or log p(x) of each."""
        return figures().estimate(self)

    @property
    def impossible(self) -> int:
        """The number of data for which every draw had zero weight."""
        return int((self.log_prob == -math.inf).sum())

    @property
    def biased(self) -> bool:
        """Whether the mean is too low by more than its standard error."""
        return -math.inf < self.mean_bias < -self.mean_standard_error

    def _of_tails(self) -> tuple[int, bool, str]:
        """The number of data with a heavy tail, whether all are known, and a sentence on them."""
        n, k, unknown = len(self.khat), self.num_samples, self.khat.isnan()
        heavy = int((self.khat > HEAVY).sum())
        if bool(unknown.all()):
            text = f"K = {k} is too few to tell whether the errors hold: take 100 or more."
        elif heavy == 0:
            text = (
                f"k-hat is at most {HEAVY} for all {n} data points: nothing in the weights speaks "
                f"against the stated errors. A part of the posterior that no draw has reached "
                f"would not show in them; annealed_log_likelihood with initial='prior' may find it."
            )
        else:
            refine = "" if "refined" in self.method else " refine the guide (refine_steps=200),"
            text = (
                f"Importance sampling is unreliable for {_share(heavy, n)}, where k-hat is above "
                f"{HEAVY}: a few of the {k} weights make up the sum, so the estimate is a lower "
                f"bound whose stated error is too small. Take more samples,{refine} or use "
                f"annealed_log_likelihood."
            )
        return heavy, not bool(unknown.any()), text

    def _of_chains(self) -> tuple[int, bool, str]:
        """The same of data whose sum few chains make up."""
        least = min(FEW, self.num_samples / 2)
        few = int((self.ess < least).sum())
        if few == 0 and self.num_samples < FEW:
            text = (
                f"{self.num_samples} {'chain is' if self.num_samples == 1 else 'chains are'} too "
                f"few to tell whether the errors hold: take 16 or more."
            )
        elif few == 0:
            text = (
                f"At least {self.ess.min():.1f} of {self.num_samples} chains count for every "
                f"datum. pyrovae.bidirectional says how far such a run is below log p(x)."
            )
        else:
            text = (
                f"Annealing is unreliable for {_share(few, len(self.ess))}, where fewer than "
                f"{least:g} of {self.num_samples} chains make up the sum: the stated errors are "
                f"too small. Take more temperatures, and check with pyrovae.bidirectional whether "
                f"they are enough."
            )
        return few, self.num_samples >= FEW, text


class Comparison(NamedTuple):
    """What one estimate of log p(x) has over another on the same data, in nats per datum.

    ``each`` ``[N]`` are the differences; ``monte_carlo_standard_error`` is what other random
    draws would change in their mean, ``data_standard_error`` what other data from the same source
    would, and ``standard_error`` both together. Draws of one seed, as of two evaluations, have
    much of their noise in common: then the first is less than is said, and the second more.
    """

    each: Tensor
    difference: float
    standard_error: float
    data_standard_error: float
    monte_carlo_standard_error: float
    __repr__, _repr_html_ = text, html  # type: ignore[misc]  # methods, no fields

    def plot(self) -> Figure:
        """Draw the differences of all data, and their mean with two standard errors."""
        return figures().differences(self)

    def _told(self) -> Told:
        parts = plus_minus(self.data_standard_error, "over data")
        parts += plus_minus(self.monte_carlo_standard_error, "Monte Carlo")
        rows = [
            ("difference", f"{number(self.difference)}{parts} nats per datum"),
            ("both errors", f"{number(self.standard_error)} nats per datum"),
            ("first is higher", f"for {int((self.each > 0).sum())} of {len(self.each)} data"),
        ]
        title = f"Comparison of log p(x) of {len(self.each)} data, the first less the second"
        return Told(title, rows, f"{self.verdict.kind}: {self.verdict}")

    @property
    def verdict(self) -> Verdict:
        """Which of the two is better, if that can be told."""
        return self.of("The first", "The second", "The two")

    def of(self, first: str, second: str, both: str) -> Verdict:
        """The verdict with names for the two.

        Args:
            first: What the first estimate is called at the beginning of a sentence.
            second: What the second one is called there.
            both: What the two together are called there.
        """
        from scipy.stats import t

        size, error = abs(self.difference), self.standard_error
        # Of few data the error is itself a rough estimate.
        most = max(2.0, float(t.ppf(0.975, len(self.each) - 1)))
        told = f"by {size:.3f} ± {error:.3f} nats per datum, paired over {len(self.each)} data."
        if not math.isfinite(error):
            text = f"the difference is {self.difference:.3f}, its standard error unknown."
            return Verdict("unknown", f"{both} cannot be told apart: {text}")
        if size <= most * error:
            return Verdict("tied", f"{both} cannot be told apart: they differ {told}")
        if self.difference > 0:
            return Verdict("first", f"{first} is better {told}")
        return Verdict("second", f"{second} is better {told}")


def compare_log_likelihood(a: LogLikelihood, b: LogLikelihood) -> Comparison:
    r"""Compare two estimates of log p(x) of the same data, datum by datum.

    .. math:: \bar d = \frac1N \sum_n d_n, \quad d_n = \ln p_a(x_n) - \ln p_b(x_n), \qquad
              \mathrm{se}^2 = \frac{\mathrm{var}(d)}{N} = \mathrm{se}_\text{data}^2
              + \mathrm{se}_\text{MC}^2, \quad
              \mathrm{se}_\text{MC}^2 = \frac{1}{N^2} \sum_n s_{a,n}^2 + s_{b,n}^2

    What makes one datum harder than another is common to both and cancels, which two means with
    an error each do not show.

    Args:
        a: One estimate.
        b: The other, of the same data in the same order.

    Raises:
        ValueError: If the two are of different data, or of fewer than two.
        TypeError: If one is no estimate of log p(x).
    """
    for given in (a, b):
        if not isinstance(given, LogLikelihood):
            raise InputTypeError(
                f"Expected two results of log_likelihood, got {type(given).__name__}."
            )
    n = len(a.log_prob)
    if len(b.log_prob) != n or (a.data and b.data and a.data != b.data):
        raise InputError(
            f"Expected two results for the same data, got {n} and {len(b.log_prob)} data"
            f"{' that differ' if len(b.log_prob) == n else ''}: evaluate both runs on one split, "
            f"binarized once."
        )
    if n < 2:
        raise InputError(f"Expected at least 2 data to compare on, got {n}.")
    each = a.log_prob.double() - b.log_prob.double()
    total = each.var() / n
    noise = (a.standard_error.double().square() + b.standard_error.double().square()).sum() / n**2
    parts = total, (total - noise).clamp(min=0), noise
    return Comparison(each, each.mean().item(), *(part.sqrt().item() for part in parts))


def headline(
    mean: float | None, monte_carlo: float | None, data: float | None, *, bound: bool
) -> str:
    """A mean log p(x) with both of its errors, and ≥ before it where it is but a lower bound."""
    errors = plus_minus(monte_carlo, "Monte Carlo") + plus_minus(data, "over data")
    return f"{'≥ ' if bound else ''}{number(mean)}{errors} nats per datum"


def _share(count: int, total: int) -> str:
    return f"{count} of {total} data points ({count / total:.{int(100 * count < total)}%})"
