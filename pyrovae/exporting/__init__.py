"""Programs of a trained pair for other tools: its encoder, its decoder, and log p(x)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae._tools import InputError
from pyrovae._tools.files import plain_json, require_file, write_atomic
from pyrovae._tools.seeding import seeded
from pyrovae._tools.whole import unrolled
from pyrovae.compiling.graph import CaptureError
from pyrovae.data import Dataset
from pyrovae.data.given import takes_data
from pyrovae.evidence.proposals import require_density
from pyrovae.exporting.formats import FORMATS, require_format, trace
from pyrovae.exporting.programs import Decoder, Encoder, Evidence, Program, Task
from pyrovae.opening import OpenRun, load
from pyrovae.pairs.contract import inspect_evidence, inspect_pair
from pyrovae.pairs.pair import Pair
from pyrovae.runs.experiment import versions
from pyrovae.runs.programs import KINDS

__all__ = ["WHAT", "export"]

WHAT = ("encoder", "decoder", "log_likelihood")
# Data that a program is checked on, and by how much it may differ: of values above one, relatively.
CHECKED, TOLERANCE = 5, 1e-4
# What outputs are, by the ending of their names.
MEANINGS = {
    "mean": "the mean of the site's distribution, in the units of its values",
    "sd": "its standard deviation, in the same units",
    "logits": "its log-odds, or logarithms of probabilities up to a constant",
    "probs": "the probabilities of its categories",
    "draw": "a draw from it",
    "prob": "the estimate of log p(x), in nats per datum",
    "error": "the estimate's standard error by the delta method, in nats",
}
# What of a data set's provenance says how x came about.
PREPARED = ("scaling", "binarize", "context", "missing", "columns", "context_categories")


@takes_data
def export(
    source: OpenRun | str | Path | Callable,
    *pair: Any,
    what: str,
    format: str = "pt2",
    out: str | Path | None = None,
    samples: int = 64,
) -> Path:
    r"""Write a program of a trained pair that runs without Pyro and without this package.

    ``export(run, what=...)`` takes a run of :func:`pyrovae.load`, or its directory, and
    ``export(model, guide, x, *context, what=..., out=...)`` a pair with some data.

    The batch is of any size. Draws are made of an input ``noise`` of standard normal numbers, so
    that the program is a function: of independent ones, they are draws of the pair's. Inputs that
    the outputs do not depend on are left out.

    - ``"encoder"``: x to ``z_mean`` and ``z_sd`` of q(z | x), for each latent; ``z_probs`` of a
      categorical one, ``z_draw`` where moments are not known. A latent below others is conditioned
      on their draws, from ``noise`` ``[N, M]``; zeros stand for their medians.
    - ``"decoder"``: the latents to ``x_mean`` of p(x | z), for each observed site, and to what else
      its distribution was made of (``x_logits``, ``x_scale``); ``x_probs`` of a categorical one.
    - ``"log_likelihood"``: x and ``noise`` ``[N, K, M]`` to ``log_prob``, the estimate

      .. math:: \ln \frac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}

      in nats per datum, and its ``standard_error``, as :func:`pyrovae.log_likelihood` has them.

    The file is read back and run on data of one, two and five, where every output has to be that of
    the pair itself, run by its handlers with the same noise, to 1e-4 (of values above one,
    relatively).

    Args:
        source: A run, its directory, or a model.
        pair: With a model: its guide, and data ``[N, ...]`` with their context, or a
            :class:`pyrovae.Dataset`.
        what: One of the three.
        format: ``"pt2"``, which :func:`torch.export.load` reads, or ``"onnx"``; the latter needs
            ``pip install 'pyrovae[export]'``.
        out: The file; None is ``exports/`` of a run.
        samples: K of the estimate of log p(x).

    Returns:
        The file. Its metadata, ``pyrovae.json``, say what inputs and outputs are.

    Raises:
        InputError: If an argument is refused, a package is missing, or the pair cannot be exported,
            with the reason; nothing is written.

    References:
        Burda et al., Importance Weighted Autoencoders (arXiv 1509.00519), equation 8.
    """
    for name, value, known in (("what", what, WHAT), ("format", format, FORMATS)):
        if value not in known:
            raise InputError(f"Expected {name} of {', '.join(known)}, got {value!r}.")
    if samples < 1:
        raise InputError(f"Expected samples >= 1, got {samples}.")
    require_format(format)
    run = None
    if callable(source):
        programs, rows, about = _given(source, pair)
        if out is None:
            raise InputError(f"Expected a file to write to, as out={f'{what}.{format}'!r}.")
    else:
        run = source if isinstance(source, OpenRun) else load(source)
        programs, rows, about = _opened(run)
    path = run.run.file(f"exports/{what}.{format}") if run and out is None else Path(out or "")
    path = path.expanduser()
    require_file(path)
    try:
        content = _content(Pair(*programs), rows, what, format, samples, about)
    except CaptureError as error:
        # Pyro lists all sites below what went wrong in a program.
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"The {what} of this pair cannot be exported: {reason}.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return path


def _given(model: Callable, pair: tuple) -> tuple[tuple[Callable, Callable], tuple, dict]:
    """A pair, some data of its, and what is known of them."""
    if len(pair) < 2 or not callable(pair[0]):
        raise InputError(
            "Expected export(model, guide, x, *context, what=...), or export(run, ...)."
        )
    guide, data, *context = pair
    names = [getattr(each, "__name__", type(each).__name__) for each in (model, guide)]
    about: dict[str, Any] = {"programs": dict(zip(KINDS, names, strict=True))}
    if isinstance(data, Dataset):
        about |= _prepared(data.provenance)
        return (model, guide), data.split("test") or data.head(CHECKED), about
    return (model, guide), (data, *context), about


def _opened(run: OpenRun) -> tuple[tuple[Callable, Callable], tuple, dict]:
    """A run's pair, some of its data, and what its configuration says of them."""
    made = run.experiment
    rows = made.data.split("test") or made.data.head(CHECKED)
    about = {
        "programs": {kind: plain_json(getattr(run.config, kind)) for kind in KINDS},
        "run": {"identity": run.run.identity, "weights": run.run.weights_checksum()},
    }
    return (made.model, made.guide), rows, about | _prepared(plain_json(run.config.data))


def _prepared(told: dict[str, Any]) -> dict[str, Any]:
    prepared = {name: told[name] for name in PREPARED if told.get(name) is not None}
    return {"data": told.get("name"), "preprocessing": prepared}


def _content(
    pair: Pair, rows: tuple, what: str, format: str, samples: int, about: dict[str, Any]
) -> bytes:
    """A file's content, checked."""
    home = pair.device
    # A few rows more than there are come twice.
    few = torch.arange(CHECKED) % len(rows[0])
    rows = tuple(each.cpu()[few] for each in rows)
    pair.to("cpu")
    try:
        with torch.no_grad(), pair.mode(training=False), seeded(0):
            task = _task(pair, rows, what, samples)
            with pyro.validation_enabled(False):
                program = Program(task)
                write, read = FORMATS[format]
                told = {"what": what} | about | _told(task, program)
                content = write(trace(program), program, told)
                _check(read(content, program), task, program)
    finally:
        pair.to(home)
    return content


def _task(pair: Pair, rows: tuple, what: str, samples: int) -> Task:
    if what == "log_likelihood":
        inspect_evidence(pair, *rows)
        if pair.layout.partial:
            raise CaptureError(f"plates {list(pair.layout.partial)} subsample within a datum")
        require_density(pair.known)
        return Evidence(pair, rows, samples)
    inspect_pair(pair, *rows)
    if what == "encoder":
        return Encoder(pair, rows)
    return Decoder(pair, rows)


def _check(run: Callable, task: Task, program: Program) -> None:
    """Refuse a file that gives other values than the pair, by its handlers with the same noise."""
    for size in (1, 2, CHECKED):
        with unrolled():  # as it was recorded
            expected = task.with_noise(*(each[:size] for each in task.inputs.values()))
        found = run(*(each[:size].clone() for each in program.inputs.values()))
        for name, value in expected.items():
            if bool(value.isnan().any()):
                raise CaptureError(f"{name!r} is no number, or depends on a draw that data share")
            one, two = found[name].double(), value.double()
            off = (one - two).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
            off = torch.where(one == two, 0.0, off / two.abs().clamp(min=1))
            if one.shape != two.shape or not bool((off <= TOLERANCE).all()):
                raise CaptureError(
                    f"{name!r} differs from the pair's own for {size} data by {off.max():.2g}, "
                    f"which is more than {TOLERANCE:g}"
                )


def _told(task: Task, program: Program) -> dict[str, Any]:
    """What a file says of its program."""

    def of(name: str, value: Tensor, meaning: str) -> dict[str, Any]:
        kind = str(value.dtype).removeprefix("torch.")
        shape = ["batch", *value.shape[1:]]
        return {"name": name, "shape": shape, "dtype": kind, "meaning": meaning}

    drawn = {"noise": "independent standard normal numbers"}
    drawn |= dict.fromkeys(task.latents, "a latent of the model")
    inputs = program.inputs.items()
    return {
        "inputs": [of(n, v, drawn.get(n, "an argument of both programs")) for n, v in inputs],
        "outputs": [of(n, v, _meaning(n)) for n, v in program(*program.inputs.values()).items()],
        "event_shape": list(task.rows[0].shape[1:]),
        "latents": {n: list(v.shape[1:]) for n, v in task.latents.items()},
        "samples": task.draws,
        "versions": versions(),
        "checked": f"against the pair on {CHECKED} data, to {TOLERANCE:g}",
    }


def _meaning(output: str) -> str:
    part = output.rpartition("_")[2]
    return MEANINGS.get(part, f"its parameter {part}")
