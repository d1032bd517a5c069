"""A pair and its data as ArviZ knows them: draws, weights, predictions, and where they came from.

The groups are xarray data sets with the datum as a coordinate. With ArviZ 0.x they come as an
:class:`arviz.InferenceData`, with ArviZ 1.x as an :class:`xarray.DataTree`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyrovae._predictive import Draws
from pyrovae._tools import InputError
from pyrovae._tools.files import write_atomic
from pyrovae._tools.seeding import seeded
from pyrovae.evidence.estimation import Evaluation
from pyrovae.evidence.importance import log_likelihood as estimate
from pyrovae.evidence.proposals import require_density
from pyrovae.evidence.result import LogLikelihood
from pyrovae.evidence.tiles import Found, digest, run_tiles

if TYPE_CHECKING:
    import arviz
    import xarray

    InferenceData = arviz.InferenceData | xarray.DataTree

__all__ = ["load", "loo", "save", "to_inference_data"]

GROUPS = {
    "posterior": "Latents of each datum: {draws}.",
    "sample_stats": "log_weight: ln p(x, z) - ln q(z|x) of each draw; log_prob: ln p(x) of each "
    "datum, with its standard error, effective sample size and Pareto k-hat.",
    "log_likelihood": "ln p(x|z) of each draw, summed over the dimensions of an event.",
    "posterior_predictive": "New data from p(x|z) at the latents in posterior.",
    "prior": "Latents from p(z).",
    "prior_predictive": "Data from p(x|z) at the latents in prior.",
    "observed_data": "What the model observed.",
    "constant_data": "Further arguments of the programs.",
}
PROPOSED = "drawn from the guide q(z|x), to be weighted by sample_stats.log_weight"
RESAMPLED = "drawn from the guide and resampled by weight, so that they stand for p(z|x)"
EVIDENCE = ("log_prob", "standard_error", "ess", "khat", "smoothed", "acceptance")
UNITLESS = {"ess", "khat", "acceptance"}
RESERVED = {"chain", "draw", "datum", "label"}


def to_inference_data(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *context: Tensor,
    num_samples: int = 100,
    labels: Tensor | Sequence | None = None,
    log_likelihood: LogLikelihood | None = None,
    num_prior: int = 100,
    first: int = 0,
    seed: int | None = None,
    attrs: Mapping[str, Any] | None = None,
    resample: bool = False,
) -> InferenceData:
    r"""Draw all that ArviZ looks at: posterior, prior, predictions, weights and likelihoods.

    .. math:: z_k \sim q(z \mid x), \qquad \ln w_k = \ln p(x, z_k) - \ln q(z_k \mid x), \qquad
              \tilde x_k \sim p(x \mid z_k)

    Draws have the dimensions ``chain`` (of size 1: they are independent, so that R-hat says
    nothing), ``draw`` and ``datum``, then ``<site>_dim_0`` and so on. A latent that the model
    sums over is drawn from its exact posterior given the others; one that is masked out is NaN.

    Args:
        model: The model program.
        guide: The guide program, with a density.
        x: Data ``[N, ...]``; ``context`` are further arguments of both programs, ``[N, ...]``.
        num_samples: The number of draws K of each datum's latents.
        labels: What is known of the data, ``[N]``, for a coordinate ``label``.
        log_likelihood: An estimate of log p(x) of these data, or of all data of which these
            follow ``first`` others, from more draws; by default the K draws give it.
        num_prior: The number of draws from the prior for each datum; 0 leaves its groups out.
        first: The number of the first datum in its data set.
        seed: Seeds the draws; None takes one from torch's global stream. The draws of latents
            are those of :func:`pyrovae.log_likelihood` with this seed.
        attrs: Further attributes of the whole.
        resample: Replace the guide's draws by K resampled with their weights, which stand for
            p(z | x); the weight of each is then the average.

    Returns:
        With ArviZ 0.x an :class:`arviz.InferenceData`, with 1.x an :class:`xarray.DataTree`, in
        memory of about 4 N (K + ``num_prior``) bytes for each number of a datum.

    Raises:
        ValueError: If the pair breaks the contract, the guide has no density, a log-weight is
            NaN, or labels or estimate are not of these data.
    """
    _check(len(x), num_samples, num_prior, first, labels)
    task = Evaluation(model, guide, (x, *context), {"seed": seed})
    if log_likelihood is None:
        options = {"num_samples": num_samples, "seed": task.seed, "compile": False}
        log_likelihood, start = estimate(model, guide, x, *context, **options), 0
    else:
        start = _place(log_likelihood, digest(*task.rows), len(x), first)
    with task.opened() as joint:
        with seeded(task.seed, task.device):
            require_density(joint, task.first)
        counts = {"num_samples": num_samples, "num_prior": num_prior}
        draws = Draws(joint, task.first, task.seed, **counts, resample=resample)
        found = run_tiles(draws, task.rows)
    for name in EVIDENCE:
        if (each := getattr(log_likelihood, name)) is not None:
            found[f"sample_stats/{name}"] = each[start : start + len(x)]
    names = _arguments(model, len(context))
    found |= {f"constant_data/{n}": c for n, c in zip(names, context, strict=True)}
    about = {
        "model": _title(model),
        "guide": _title(guide),
        "seed": task.seed,
        "data": task.data,
        **counts,
        "units": "nats",
        "draws": RESAMPLED if resample else PROPOSED,
        "log_prob_method": log_likelihood.method,
        "log_prob_num_samples": log_likelihood.num_samples,
    }
    coords = {"datum": np.arange(first, first + len(x))}
    if labels is not None:
        coords["label"] = ("datum", _labels(labels))
    return _tree(found, coords, about | dict(attrs or {}))


def save(idata: InferenceData, path: str | Path) -> None:
    """Write a netCDF file, compressed: all of it, or nothing.

    Args:
        idata: What :func:`to_inference_data` returned.
        path: The file; its folder must exist.

    Raises:
        OSError: If the file cannot be written; one that was there stays.
    """
    tree = idata if hasattr(idata, "children") else idata.to_datatree()
    encoding = {
        f"/{group}": {n: {"zlib": True} for n, v in data.variables.items() if v.dtype.kind in "if"}
        for group, data in tree.children.items()
    }
    content = tree.to_netcdf(engine="h5netcdf", encoding=encoding)
    write_atomic(Path(path), content)


def load(path: str | Path) -> InferenceData:
    """Read what :func:`save` wrote, into memory.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or no netCDF file.
    """
    import xarray

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a netCDF file at {path}, found none there.")
    try:
        return _wrapped(xarray.load_datatree(path, engine="h5netcdf"))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged, or no netCDF file ({error}).") from error


def loo(idata: InferenceData) -> Any:
    r"""The leave-one-out density of each datum, as :func:`arviz.compare` takes it.

    .. math:: \ln p(x_n \mid x_{-n}) = \ln p(x_n) \quad \text{where weights are fixed and latents
              are per datum}

    so that no other estimate is asked for than that of log p(x), and its k-hat. The data must not
    be those that the weights were trained on.

    Args:
        idata: What :func:`to_inference_data` returned.

    Returns:
        ArviZ's ``ELPDData`` with pointwise values, on the log scale, in nats.
    """
    import arviz
    from scipy.special import logsumexp

    stats, terms = idata["sample_stats"], idata["log_likelihood"]
    likelihood = sum(terms[name].values for name in terms.data_vars)
    weight, each, khat = stats.log_weight.values, stats.log_prob, stats.khat
    lppd = logsumexp(weight + likelihood, (0, 1)) - logsumexp(weight, (0, 1))
    k, n = int(idata.attrs["log_prob_num_samples"]), each.size
    good = min(1 - 1 / np.log10(k), 0.7) if k > 1 else 0.0
    total, error = float(each.sum()), float(np.sqrt(n * each.values.var()))
    extra, warning = float(lppd.sum() - total), bool((khat > good).any())
    about = {"n_samples": k, "n_data_points": n, "warning": warning, "pareto_k": khat}
    about |= {"scale": "log", "good_k": good}
    if not _is_first(arviz):
        return arviz.ELPDDataLOO(elpd=total, se=error, p=extra, elpd_i=each, **about)
    about = {"elpd_loo": total, "se": error, "p_loo": extra} | about | {"loo_i": each}
    return arviz.ELPDData(list(about.values()), list(about))


def _tree(found: Found, coords: dict, about: dict[str, Any]) -> InferenceData:
    import arviz
    import xarray

    stamp = {
        "inference_library": "pyrovae",
        "inference_library_version": version("pyrovae"),
        "arviz_version": arviz.__version__,
        "created_at": datetime.now(UTC).isoformat(),
    }
    versions = {"torch_version": version("torch"), "pyro_version": version("pyro-ppl")}
    about = {name: _attribute(value) for name, value in (stamp | versions | about).items()}
    groups: dict[str, Any] = {"/": xarray.Dataset(attrs=about)}
    for group, description in GROUPS.items():
        inside = {k.partition("/")[2]: v for k, v in found.items() if k.startswith(f"{group}/")}
        if inside:
            text = {"description": description.format(draws=about["draws"])}
            groups[group] = _dataset(group, inside, coords, text | stamp)
    return _wrapped(xarray.DataTree.from_dict(groups))


def _dataset(group: str, inside: Found, coords: dict, attrs: dict) -> xarray.Dataset:
    import xarray

    variables, coords = {}, dict(coords)
    for site, tensor in inside.items():
        name, value = _variable(site), _array(tensor)
        per_datum = group.endswith("_data") or (group == "sample_stats" and site in EVIDENCE)
        leading = ["datum"] if per_datum else ["chain", "draw", "datum"]
        if not per_datum:
            value = np.moveaxis(value, 1, 0)[None]
        dims = leading + [f"{name}_dim_{i}" for i in range(value.ndim - len(leading))]
        variables[name] = (dims, np.ascontiguousarray(value), _units(group, site))
        sizes = zip(dims, value.shape, strict=True)
        coords = {dim: np.arange(size) for dim, size in sizes} | coords
    return xarray.Dataset(variables, coords, attrs)


def _wrapped(tree: xarray.DataTree) -> InferenceData:
    import arviz

    return arviz.InferenceData.from_datatree(tree) if _is_first(arviz) else tree


def _is_first(arviz: Any) -> bool:
    """Whether this is ArviZ 0.x."""
    return arviz.__version__.startswith("0.")


def _check(
    n: int, num_samples: int, num_prior: int, first: int, labels: Tensor | Sequence | None
) -> None:
    if num_samples < 1 or num_prior < 0 or first < 0:
        raise InputError(
            f"Expected num_samples >= 1, num_prior >= 0 and first >= 0, got {num_samples}, "
            f"{num_prior} and {first}."
        )
    if labels is not None and len(labels) != n:
        raise InputError(f"Expected a label for each of {n} data, got {len(labels)}.")


def _place(found: LogLikelihood, data: str, n: int, first: int) -> int:
    """Where these data begin in an estimate."""
    given = len(found.log_prob)
    if given == n and found.data in ("", data):
        return 0
    if given > n and given >= first + n:
        return first
    raise InputError(
        f"Expected an estimate of log p(x) of these {n} data, or of a data set that they are rows "
        f"{first} to {first + n - 1} of, got one of {given}{' others' if given == n else ''}: "
        f"evaluate them, or say with first=... where in the data set they begin."
    )


def _arguments(model: Callable, count: int) -> list[str]:
    """What a model calls its further arguments."""
    parameters = inspect.signature(getattr(model, "forward", model)).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = named[1 : count + 1]
    return named + [f"context_{i}" for i in range(len(named), count)]


def _title(program: Callable) -> str:
    return getattr(program, "__qualname__", type(program).__name__)


def _variable(site: str) -> str:
    """A site's name as that of a variable: no path in the file, and no coordinate."""
    return site.replace("/", ".") + "_" * (site in RESERVED)


def _units(group: str, site: str) -> dict[str, str]:
    in_nats = group == "log_likelihood" or (group == "sample_stats" and site not in UNITLESS)
    return {"units": "nats"} if in_nats else {}


def _labels(labels: Tensor | Sequence) -> np.ndarray:
    found = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    return found if found.dtype.kind in "iufU" else found.astype(str)


def _array(tensor: Tensor) -> np.ndarray:
    """An array of a type that files know."""
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.int8)
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()


def _attribute(value: Any) -> str | int | float:
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return value if plain else json.dumps(value, default=str)
