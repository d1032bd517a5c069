"""The result of a diagnosis: numbers, and the same in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae._tools import standard_error
from pyrovae._tools.shown import Shown, Told, figures, mean, number, plus_minus
from pyrovae.diagnostics.aggregate import Aggregate
from pyrovae.diagnostics.calibration import Calibration, Probe
from pyrovae.evidence.result import Kind, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The threshold of Burda et al. (arXiv 1509.00519) on the variance of a unit's posterior mean.
ACTIVE = 0.01
# A rate below this, in nats, is told as none at all.
NOTHING = 0.05
# What the parts of a calibration are called in JSON.
COVERED = ("levels", "coverage", "standard_error")


@dataclass(frozen=True)
class SiteDiagnosis:
    """The posterior of one latent site over N data.

    Attributes:
        kl: The mean over data of the divergence of each of D coordinates, in nats, ``[D]``; the
            site's total, ``[1]``, where posterior or prior are no product over coordinates.
        kl_standard_error: Its standard error over data.
        posterior_mean_variance: The variance over data of E_q[z | x], ``[U]``: of each coordinate,
            or, of a categorical variable, the sum over the probabilities of its values.
        active: Where that is above 0.01, ``[U]``.
        factorized: Whether ``kl`` is by coordinate.
    """

    kl: Tensor
    kl_standard_error: Tensor
    posterior_mean_variance: Tensor
    active: Tensor
    factorized: bool

    @property
    def kl_total(self) -> float:
        """The mean over data of the site's divergence, in nats."""
        return self.kl.sum().item()

    @property
    def active_units(self) -> int:
        """How many units are active."""
        return int(self.active.sum())

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.active)

    def summary(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        names = "kl", "kl_total", "active_units", "units", "posterior_mean_variance", "factorized"
        return _known({name: getattr(self, name) for name in names})


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    r"""What the posterior of a pair does on N data, in nats.

    .. math:: \text{ELBO} = -\text{rate} - \text{distortion}, \qquad
              \overline{\text{rate}} = \text{information} + \text{marginal KL} + \text{remainder}

    Rate, distortion and ELBO are means over the same draws, so that they add up exactly. The two
    parts of the mean rate come from draws of their own, and the remainder is the Monte Carlo error
    of splitting.

    Attributes:
        num_data: N.
        rate: :math:`E_q[\ln q(z|x) - \ln p(z)]`, ``[N]``.
        distortion: :math:`-E_q[\ln p(x|z)]`, ``[N]``.
        sites: The posterior of each latent site that the guide samples.
        aggregate: The two parts of the mean rate; None where the guide cannot score other data's
            draws.
        calibration: The coverage of the likelihood's intervals, if it was asked for.
        probe: The accuracy of classifiers on each site's posterior means, if there are labels.
        bits_per_dimension: The negative ELBO over D ln 2, of a likelihood that gives masses to 256
            levels. It is an upper bound on −ln p(x) / (D ln 2), and holds no constant: nothing was
            dequantized. None for any other likelihood.
        remarks: What could not be measured, and why.
    """

    num_data: int
    rate: Tensor
    distortion: Tensor
    sites: dict[str, SiteDiagnosis]
    aggregate: Aggregate | None = None
    calibration: Calibration | None = None
    probe: dict[str, Probe] | None = None
    bits_per_dimension: float | None = None
    remarks: tuple[str, ...] = ()

    @property
    def elbo(self) -> Tensor:
        """The ELBO of each datum, −rate − distortion, ``[N]``."""
        return -self.rate - self.distortion

    @property
    def mutual_information(self) -> float:
        """I(n; z) of latents and data, at most ln N; NaN where it is not known."""
        return self.aggregate.mutual_information if self.aggregate else math.nan

    @property
    def mutual_information_error(self) -> float:
        """Its standard error."""
        return self.aggregate.standard_error if self.aggregate else math.nan

    @property
    def marginal_kl(self) -> float:
        """KL(q(z) ‖ p(z)), the misfit of the aggregate posterior; NaN where it is not known."""
        return self.aggregate.marginal_kl if self.aggregate else math.nan

    @property
    def remainder(self) -> float:
        """Mean rate − information − marginal KL: the Monte Carlo error of the split, or NaN."""
        return self.rate.double().mean().item() - self.mutual_information - self.marginal_kl

    def _told(self) -> Told:
        rows = [
            (name, f"{mean(getattr(self, name.lower()))} nats per datum")
            for name in ("ELBO", "rate", "distortion")
        ]
        if self.aggregate:
            error = plus_minus(self.mutual_information_error)
            rows.append(("information", f"{number(self.mutual_information)}{error} nats"))
            rows.append(("marginal KL", f"{number(self.marginal_kl)} nats"))
        for name, site in self.sites.items():
            used = f"{site.active_units} of {site.units} units active"
            rows.append((f"latent {name}", f"KL {site.kl_total:.3f} nats, {used}"))
        return Told(f"Diagnosis of {self.num_data} data (± over data)", rows, self.verdict)

    def plot(self) -> Figure:
        """Draw the KL of each latent dimension, those that are active in blue."""
        return figures().latent_kl(self)

    @property
    def verdict(self) -> Verdict:
        """In words: whether the latents are used, what the KL is spent on, and calibration."""
        found = [*self._about_units(), self._about_rate()]
        if self.calibration is not None:
            found.append(self.calibration.verdict)
        return Verdict(self._kind(), " ".join([*found, *self.remarks]))

    def _kind(self) -> Kind:
        """Doubtful where latents are unused or intervals off, fair where a part is unknown."""
        sites = self.sites.values()
        few = 2 * sum(site.active_units for site in sites) < sum(site.units for site in sites)
        unused = any(site.units and not site.active_units for site in sites)
        if few or unused or (self.calibration is not None and self.calibration.off):
            return "doubtful"
        whole = self.aggregate is not None and not self.aggregate.capped and not self.remarks
        return "good" if whole else "fair"

    def summary(self) -> dict[str, Any]:
        """The numbers and the verdict, ready for JSON: None where there is no number."""
        covered, probe = self.calibration, self.probe
        found: dict[str, Any] = {
            "num_data": self.num_data,
            "elbo": _mean(self.elbo),
            "rate": _mean(self.rate),
            "distortion": _mean(self.distortion),
            "sites": {name: site.summary() for name, site in self.sites.items()},
            "mutual_information": {
                "mean": self.mutual_information,
                "standard_error": self.mutual_information_error,
            },
            "marginal_kl": self.marginal_kl,
            "remainder": self.remainder,
            "calibration": covered and dict(zip(COVERED, covered, strict=True)),
            "probe": probe and {name: each._asdict() for name, each in probe.items()},
            "bits_per_dimension": self.bits_per_dimension,
            "verdict": str(self.verdict),
            "verdict_kind": self.verdict.kind,
        }
        return _known(found)

    def _about_units(self) -> list[str]:
        if not self.sites:
            return ["The guide samples no latent."]
        active = sum(site.active_units for site in self.sites.values())
        units = sum(site.units for site in self.sites.values())
        if active == 0:
            what = "is the prior" if self.rate.mean() < NOTHING else "hardly differs between data"
            return [
                f"The posterior has collapsed: 0 of {units} units are active, and the guide's "
                f"distribution of the latents {what}."
            ]
        each = ", ".join(f"{n} {s.active_units} of {s.units}" for n, s in self.sites.items())
        detail = f" ({each})" if len(self.sites) > 1 else ""
        found = [
            f"{active} of {units} units {'is' if active == 1 else 'are'} active{detail}: the "
            f"posterior mean varies by more than {ACTIVE} over data{self._about_each()}."
        ]
        for name, site in self.sites.items():
            if site.active_units == 0:
                found.append(
                    f"Site {name} is unused: no unit of it depends on the data (its KL is "
                    f"{site.kl_total:.2g} nats)."
                )
        return found

    def _about_each(self) -> str:
        """What single units carry, where that is known."""
        each = [site.kl for site in self.sites.values() if site.factorized]
        if len(each) < len(self.sites) or (kl := torch.cat(each)).numel() < 2:
            return ""
        little = int((kl < NOTHING).sum())
        few = f", and less than {NOTHING} nats in {little} of them" if little else ""
        return f"; the KL of a unit is {kl.min():.2g} to {kl.max():.2g} nats{few}"

    def _about_rate(self) -> str:
        rate, parts = self.rate.double().mean().item(), self.aggregate
        if parts is None:
            return f"The rate is {rate:.4g} nats."
        split = (
            f"Of the rate of {number(rate)} nats, {number(parts.mutual_information)}"
            f"{plus_minus(parts.standard_error)} are information about the data and "
            f"{number(parts.marginal_kl)}{plus_minus(parts.marginal_kl_error)} the divergence of "
            f"the aggregate posterior from the prior; the remainder, {number(self.remainder)}, is "
            f"the Monte Carlo error of this split."
        )
        if not parts.capped or self.num_data == 1:
            return split
        return (
            f"{split} {self.num_data} data cannot show more than ln N = "
            f"{math.log(self.num_data):.3g} nats of information: the true information may be "
            f"larger, and the divergence smaller by as much."
        )


def _mean(each: Tensor) -> dict[str, float]:
    each = each.double()
    return {"mean": each.mean().item(), "standard_error": standard_error(each).item()}


def _known(value: Any) -> Any:
    """A value as JSON has it: None for NaN and infinity."""
    if isinstance(value, Tensor):
        return _known(value.tolist())
    if isinstance(value, dict):
        return {name: _known(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_known(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
