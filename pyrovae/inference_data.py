"""A pair and its data for ArviZ: draws, importance weights, predictions, and their provenance.

The groups are xarray data sets with the datum as a coordinate. With ArviZ 0.x they come as an
:class:`arviz.InferenceData`, with ArviZ 1.x as an :class:`xarray.DataTree`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.files import write_atomic
from pyrovae._tools.seeding import draw_seed, seeded, subseed
from pyrovae.data.given import takes_data
from pyrovae.evidence.importance import log_likelihood as estimate
from pyrovae.evidence.pareto import systematic
from pyrovae.evidence.proposals import joint_density, refuse_nan, require_density, total
from pyrovae.evidence.result import LogLikelihood
from pyrovae.evidence.tiles import DATA_TILE, Evaluation, Found, digest
from pyrovae.pairs.contract import argument_names, warn_of_factors
from pyrovae.pairs.pair import Given, Pair
from pyrovae.pairs.support import counted, element
from pyrovae.pairs.traces import Site, Values, is_bookkeeping, samples

if TYPE_CHECKING:
    import xarray

    # arviz.InferenceData of ArviZ 0.x, xarray.DataTree of 1.x; no release has both.
    InferenceData: TypeAlias = Any

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
PER_DATUM = ("log_prob", "standard_error", "ess", "khat", "smoothed", "acceptance")
UNITLESS = {"ess", "khat", "acceptance"}
# What xarray would take for a coordinate of ours.
RESERVED = {"chain", "draw", "datum", "label"}
# Random streams beside those of log_likelihood, whose draws of latents are the same.
SUMMED_STREAM, RESAMPLED_STREAM, POSTERIOR_STREAM, PRIOR_STREAM = 11, 12, 13, 14
BITS = (type(constraints.boolean), type(constraints.one_hot))
COUNTS = (
    constraints.integer_interval,
    constraints.multinomial,
    type(constraints.nonnegative_integer),
)


@takes_data
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
    r"""Draw posterior, prior and predictions, with weights and likelihoods, for ArviZ.

    .. math:: z_k \sim q(z \mid x), \qquad \ln w_k = \ln p(x, z_k) - \ln q(z_k \mid x), \qquad
              \tilde x_k \sim p(x \mid z_k)

    Draws have the dimensions ``chain`` (of size 1: they are independent, so that R-hat says
    nothing), ``draw`` and ``datum``, then ``<site>_dim_0`` and so on. A latent that the model
    sums over is drawn from its exact posterior given the others; what is masked out is NaN.

    Args:
        model: The model program.
        guide: The guide program, with a density.
        x: Data ``[N, ...]``; ``context`` are further arguments of both programs, ``[N, ...]``.
        num_samples: The number of draws K of each datum's latents.
        labels: Labels ``[N]`` of the data, for a coordinate ``label``.
        log_likelihood: An estimate of log p(x) of these data, or of all data of which these
            follow ``first`` others (which is taken as it is said), from more draws; by default
            the K draws give it.
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
    if num_samples < 1 or num_prior < 0 or first < 0:
        raise InputError(
            f"Expected num_samples >= 1, num_prior >= 0 and first >= 0, got {num_samples}, "
            f"{num_prior} and {first}."
        )
    if labels is not None and len(labels) != len(x):
        raise InputError(f"Expected a label for each of {len(x)} data points, got {len(labels)}.")
    seed, start = draw_seed(seed), 0
    if log_likelihood is None:
        options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "compile": False}
        log_likelihood = estimate(model, guide, x, *context, **options)
    else:
        start = _place(log_likelihood, digest(x, *context), len(x), first)
    with Evaluation(model, guide, (x, *context), seed).opened() as task:
        require_density(task.pair.known)
        for index, rows in task.tiles():
            task.keep(index, _draws(task, index, rows, num_samples, num_prior, resample))
        found = task.found()
    for name in PER_DATUM:
        if (each := getattr(log_likelihood, name)) is not None:
            found[f"sample_stats/{name}"] = each[start : start + len(x)]
    names = argument_names(model, (x, *context))[1:]
    found |= {f"constant_data/{n}": rows for n, rows in zip(names, context, strict=True)}
    about = {
        "model": getattr(model, "__qualname__", type(model).__name__),
        "guide": getattr(guide, "__qualname__", type(guide).__name__),
        "seed": seed,
        "data": task.data,
        "num_samples": num_samples,
        "num_prior": num_prior,
        "units": "nats",
        "draws": RESAMPLED if resample else PROPOSED,
        "log_prob_method": log_likelihood.method,
        "log_prob_num_samples": log_likelihood.num_samples,
    }
    coords: dict[str, Any] = {"datum": np.arange(first, first + len(x))}
    if labels is not None:
        known = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
        coords["label"] = ("datum", known if known.dtype.kind in "iufU" else known.astype(str))
    return _tree(found, coords, about | dict(attrs or {}))


def save(idata: InferenceData, path: str | Path) -> None:
    """Write a compressed netCDF file: all of it, or nothing.

    Args:
        idata: What :func:`to_inference_data` returned.
        path: The file; its folder must exist.

    Raises:
        OSError: If the file cannot be written; one that was there stays.
    """
    tree: Any = idata if hasattr(idata, "children") else idata.to_datatree()
    encoding = {
        f"/{group}": {n: {"zlib": True} for n, v in data.variables.items() if v.dtype.kind in "if"}
        for group, data in tree.children.items()
    }
    write_atomic(Path(path), tree.to_netcdf(engine="h5netcdf", encoding=encoding))


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
        return _container(xarray.load_datatree(path, engine="h5netcdf"))
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
    stats: Any = idata["sample_stats"]
    terms: Any = idata["log_likelihood"]
    weight, each, khat = torch.as_tensor(stats.log_weight.values), stats.log_prob, stats.khat
    likelihood = sum(torch.as_tensor(terms[name].values) for name in terms.data_vars)
    lppd = (weight + likelihood).logsumexp((0, 1)) - weight.logsumexp((0, 1))
    elpd, error = float(each.sum()), float(np.sqrt(each.size * each.values.var()))
    extra, k = float(lppd.sum() - elpd), int(idata.attrs["log_prob_num_samples"])
    good = min(1 - 1 / np.log10(k), 0.7) if k > 1 else 0.0
    about = {
        "n_samples": k,
        "n_data_points": each.size,
        "warning": bool((khat > good).any()),
        "pareto_k": khat,
        "scale": "log",
        "good_k": good,
    }
    arviz, old = _arviz()
    if not old:
        return arviz.ELPDDataLOO(elpd=elpd, se=error, p=extra, elpd_i=each, **about)
    return arviz.ELPDData({"elpd_loo": elpd, "se": error, "p_loo": extra, **about, "loo_i": each})


def _arviz() -> tuple[Any, bool]:
    """ArviZ, and whether it is 0.x."""
    # 0.x (0.23 is the last for Python 3.11) has a container of its own and a pandas Series for
    # what loo finds; 1.x takes xarray's DataTree and has a dataclass, with other names.
    import arviz

    return arviz, arviz.__version__.startswith("0.")


def _container(tree: xarray.DataTree) -> InferenceData:
    arviz, old = _arviz()
    return arviz.InferenceData.from_datatree(tree) if old else tree


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
    attrs = {name: _attribute(value) for name, value in (stamp | versions | about).items()}
    groups: dict[str, Any] = {"/": xarray.Dataset(attrs=attrs)}
    for group, description in GROUPS.items():
        inside = {k.partition("/")[2]: v for k, v in found.items() if k.startswith(f"{group}/")}
        if inside:
            text = {"description": description.format(draws=about["draws"])}
            groups[group] = _dataset(group, inside, coords, text | stamp)
    return _container(xarray.DataTree.from_dict(groups))


def _dataset(group: str, inside: Found, coords: dict, attrs: dict) -> xarray.Dataset:
    import xarray

    variables, coords = {}, dict(coords)
    for site, tensor in inside.items():
        # A slash would be a path in the file, and a coordinate's name is taken.
        name, value = site.replace("/", ".") + "_" * (site in RESERVED), _array(tensor)
        per_datum = group.endswith("_data") or (group == "sample_stats" and site in PER_DATUM)
        leading = ["datum"] if per_datum else ["chain", "draw", "datum"]
        if not per_datum:
            value = np.moveaxis(value, 1, 0)[None]
        dims = leading + [f"{name}_dim_{i}" for i in range(value.ndim - len(leading))]
        nats = group == "log_likelihood" or (group == "sample_stats" and site not in UNITLESS)
        units = {"units": "nats"} if nats else {}
        variables[name] = (dims, np.ascontiguousarray(value), units)
        sizes = zip(dims, value.shape, strict=True)
        coords = {dim: np.arange(size) for dim, size in sizes} | coords
    return xarray.Dataset(variables, coords, attrs)


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


def _draws(
    task: Evaluation, index: int, rows: tuple, num_samples: int, num_prior: int, resample: bool
) -> Found:
    """Draw K latents of each datum of a tile, weight them, and predict new data from them.

    Returns ``[N, K, ...]`` by ``group/site``, and ``[N, ...]`` of what is observed.
    """
    pair, seed = task.pair, subseed(task.seed, index)
    with seeded(seed, task.device):
        sites = samples(pair.trace_given(pair.run_model, rows, 1))

    def forward(particles: int, values: Values, stream: int) -> dict[str, Site]:
        program = poutine.uncondition(pair.run_model)
        with seeded(seed, task.device, stream):
            return samples(pair.trace_given(program, rows, particles, Given(values)))

    seen = [n for n in pair.known.observed if not sites[n]["infer"].get("_deterministic")]
    data = [name for name in seen if not is_bookkeeping(sites[name])]
    values, scores, log_weight = _posterior(task, index, rows, num_samples)
    if resample:
        # Each draw that is kept weighs as much as the average.
        with seeded(seed, task.device, RESAMPLED_STREAM):
            kept = _resampled(log_weight)
        values = {n: _take(v, kept, _axis(pair, sites[n])) for n, v in values.items()}
        scores = {name: _take(score, kept, -1) for name, score in scores.items()}
        average = log_weight.logsumexp(0) - torch.tensor(num_samples).log()
        log_weight = average.expand_as(log_weight)
    found = {"sample_stats/log_weight": log_weight.T}
    found |= {f"log_likelihood/{name}": scores[name].double().T for name in seen}
    predicted = forward(num_samples, values, POSTERIOR_STREAM)
    groups = {
        "posterior": values,
        "posterior_predictive": {name: predicted[name]["value"] for name in data},
        "observed_data": {name: sites[name]["value"] for name in data},
    }
    if num_prior:
        if index == 0:
            warn_of_factors(pair, rows)
        imagined = forward(num_prior, {}, PRIOR_STREAM)
        groups["prior"] = {name: imagined[name]["value"] for name in values}
        groups["prior_predictive"] = {name: imagined[name]["value"] for name in data}
    for group, each in groups.items():
        masked = not group.endswith("predictive")
        for name, value in each.items():
            found[f"{group}/{name}"] = _plain(pair, value, sites[name], masked)
    return found


def _posterior(
    task: Evaluation, index: int, rows: tuple, num_samples: int
) -> tuple[Values, Values, Tensor]:
    """Latents, the model's scores ``[K, N]`` by site, and the log-weights ``[K, N]``."""
    pair, seed, parts = task.pair, subseed(task.seed, index), []
    # As many at once as log_likelihood draws, so that both have the same draws for a seed.
    for number in range(math.ceil(num_samples / task.tile)):
        with seeded(seed, task.device, number):
            parts.append(pair.draw(rows, task.tile))
    values, guide = (
        {name: torch.cat([part[name] for part in each])[:num_samples] for name in each[0]}
        for each in zip(*parts, strict=True)
    )
    scored = joint_density(pair, rows, num_samples, values)
    own = total(guide.values(), torch.zeros_like(scored.prior))
    log_weight = scored.prior + scored.likelihood - own
    if bool(log_weight.isnan().any()):
        refuse_nan(guide, scored.sites, index * DATA_TILE)
    if pair.known.enumerated:
        with seeded(seed, task.device, SUMMED_STREAM):
            drawn = samples(pair.trace_summed(values, *rows, particles=num_samples))
        values |= {name: drawn[name]["value"] for name in pair.known.enumerated}
    return values, scored.sites, log_weight


def _plain(pair: Pair, value: Tensor, site: Site, masked: bool) -> Tensor:
    """A site's value with the datum first and its particles second, without idle plates."""
    event_dim, mask = site["fn"].event_dim, counted(site)
    value = _typed(value, site["fn"])
    if masked and mask is not None and not bool(mask.all()):
        here = mask.reshape(mask.shape[-value.dim() :])  # data have no dimension of particles
        value = torch.where(here, value if value.is_floating_point() else value.float(), torch.nan)
    used = {f.dim for f in site["cond_indep_stack"] if f.vectorized}
    idle = [d - event_dim for d in range(event_dim - value.dim(), 0) if d not in used]
    axis = _axis(pair, site)
    kept = [axis, *(d for d in range(-value.dim(), 0) if d != axis and d not in idle)]
    return value.permute(*kept, *idle).reshape([value.shape[d] for d in kept])


def _axis(pair: Pair, site: Site) -> int:
    """Where the batch lies in a site's value, counted from the right."""
    return pair.known.dim - site["fn"].event_dim


def _resampled(log_weight: Tensor) -> Tensor:
    """Which draws to keep by log-weights ``[K, N]`` in nats, in random order, ``[K, N]``.

    Where all weights are zero, all count alike.
    """
    impossible = (log_weight == -torch.inf).all(0)
    weight = torch.where(impossible, 0.0, log_weight.double()).softmax(0)
    kept = systematic(weight, len(weight))
    return kept.gather(0, torch.rand(kept.shape, device=kept.device).argsort(0))


def _take(value: Tensor, index: Tensor, axis: int) -> Tensor:
    shape = [1] * value.dim()
    shape[0], shape[axis] = index.shape
    return value.take_along_dim(index.reshape(shape), 0)


def _typed(value: Tensor, fn: Any) -> Tensor:
    """Integers where a site's values count something."""
    support = element(fn.support)
    if isinstance(support, BITS):
        return value.to(torch.int8)
    if isinstance(support, COUNTS):
        return value.to(torch.int64)
    return value
