"""The numbers of a split in tables, with their errors and with what lies behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pyrovae.report.html import flatten, table

__all__ = ["BOUNDS", "behind_table", "number_tables"]

BOUNDS = {
    "trace_elbo": "ELBO, estimator A (Trace_ELBO)",
    "trace_mean_field_elbo": "ELBO, estimator B (TraceMeanField_ELBO)",
}
BEHIND = {
    "num_samples": "samples per datum for log p(x), K",
    "ess_median": "effective sample size of those K, median",
    "khat_median": "Pareto k-hat, median",
    "khat_over_0.7": "data with Pareto k-hat above 0.7",
    "mean_bias": "bias of the mean to the second order, nats per datum",
    "smoothed_mean": "log p(x), Pareto-smoothed, nats per datum",
    "uncovered": "prior's draws that the guide gives no density",
    "method": "how log p(x) was estimated",
    "seed": "seed",
    "reconstruction": "E_q[ln p(x|z)], nats per datum",
    "kl": "KL(q(z|x) ‖ p(z)), nats per datum",
    "binarize": "binarization",
    "data": "digest of the data",
    "weights": "digest of the weights",
}
POSTERIOR = {
    "rate": "rate, KL(q(z|x) ‖ p(z))",
    "distortion": "distortion, −E_q[ln p(x|z)]",
    "mutual_information": "mutual information of x and z under q",
    "marginal_kl": "KL(q(z) ‖ p(z)) of the aggregate posterior",
}
SHARES = ("khat_over_0.7", "uncovered")
HEADED = "mean", "standard_error", "data_standard_error"
HEAD = "nats per datum", "mean", "± Monte Carlo", "± over data"
APART = (
    "verdict",
    "units",
    "num_data",
    "num_data_of_split",
    "elbo",
    "log_likelihood",
    "annealed",
    "bidirectional",
    "amortization_gap",
    "diagnostics",
)


def number_tables(found: Mapping[str, Any]) -> str:
    """The numbers to report of a split, and those of each latent."""
    seen = found.get("diagnostics") or {}
    parts = [
        table([*_bounds(found), *_evidence(found)], f"{HEAD[0]}, higher is better", *HEAD[1:]),
        table(list(_posterior(seen)), *HEAD),
        table(list(_sites(seen)), "latent", "KL, nats per datum", "active", "of"),
    ]
    return "\n".join(filter(None, parts))


def behind_table(found: Mapping[str, Any]) -> str:
    """How the numbers of a split were got, and what else is known of them."""
    ll = dict(found.get("log_likelihood") or {})
    curve = ll.pop("curve", None) or {}
    for key in HEADED:
        ll.pop(key, None)
    others = {key: found[key] for key in found if key not in APART}
    rows = [[BEHIND.get(key, key), _share(key, value)] for key, value in flatten(ll | others)]
    rows += [[f"bound with {int(k):,} samples, nats per datum", v] for k, v in curve.items()]
    rows += list(_beside(found))
    return table([row for row in rows if row[1] is not None])


def _bounds(found: Mapping[str, Any]) -> Iterator[list[Any]]:
    for name, bound in (found.get("elbo") or {}).items():
        title = BOUNDS.get(name, f"ELBO, {name}")
        yield [title, bound.get("mean"), None, bound.get("standard_error")]


def _evidence(found: Mapping[str, Any]) -> Iterator[list[Any]]:
    names, ll = HEADED, found.get("log_likelihood") or {}
    if ll.get("mean") is not None:
        yield ["log p(x)", *(ll.get(name) for name in names)]
    if ais := found.get("annealed"):
        yield [
            f"log p(x), annealed, {ais.get('num_data')} data",
            *(ais.get(name) for name in names),
        ]
        if over := ais.get("over_importance_sampling"):
            over = over.get("mean"), over.get("standard_error"), None
            yield ["annealed less importance sampling, same data", *over]
    if gap := found.get("amortization_gap"):
        yield ["amortization gap", gap.get("mean"), None, gap.get("standard_error")]


def _posterior(seen: Mapping[str, Any]) -> Iterator[list[Any]]:
    for key, title in POSTERIOR.items():
        value = seen.get(key)
        if isinstance(value, Mapping):
            yield [title, value.get("mean"), None, value.get("standard_error")]
        elif value is not None:
            yield [title, value, None, None]


def _sites(seen: Mapping[str, Any]) -> Iterator[list[Any]]:
    for name, site in (seen.get("sites") or {}).items():
        yield [name, site.get("kl_total"), site.get("active_units"), site.get("units")]


def _beside(found: Mapping[str, Any]) -> Iterator[list[Any]]:
    """What else annealing and diagnostics found."""
    gap = (found.get("bidirectional") or {}).get("gap") or {}
    if gap.get("mean") is not None:
        yield ["bidirectional gap, nats per datum", gap["mean"]]
        yield ["its standard error", gap.get("standard_error")]
    seen = found.get("diagnostics") or {}
    for site, probe in (seen.get("probe") or {}).items():
        for kind in ("linear", "knn", "chance"):
            if probe.get(kind) is not None:
                title = {"linear": "linear probe", "knn": "nearest neighbours"}.get(kind, kind)
                yield [f"accuracy of labels from {site}, {title}", f"{probe[kind]:.1%}"]
    if seen.get("bits_per_dimension") is not None:
        yield ["bits per dimension of the negative ELBO, nothing added", seen["bits_per_dimension"]]
    known = (*POSTERIOR, "sites", "probe", "calibration", "verdict", "num_data")
    known += ("bits_per_dimension",)
    yield from flatten({key: seen[key] for key in seen if key not in known})


def _share(key: str, value: Any) -> Any:
    return f"{value:.1%}" if key in SHARES and value is not None else value
