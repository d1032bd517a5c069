"""The latent explorer of a report: what a pair decodes over two axes, and the data on their map.

All that needs the programs is worked out at once, when the run's pictures are drawn, and kept as
tensors in ``explorer.safetensors``. A report is made from those alone.
"""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from math import ceil, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from pyrovae._tools.files import pack_tensors, reading, unpack_tensors
from pyrovae._tools.seeding import seeded, subseed
from pyrovae._tools.shown import number
from pyrovae.data import Dataset
from pyrovae.evidence.result import HEAVY, LogLikelihood
from pyrovae.objectives.elbo import elbo
from pyrovae.pairs.pair import Pair
from pyrovae.pairs.traces import samples
from pyrovae.reporting.figures import principal_axes
from pyrovae.runs import EXPLORER, Run
from pyrovae.sampling import decode, encode_sites, reconstruct

if TYPE_CHECKING:
    from pyrovae.runs.results import Finding

SIDE = 17  # decodings along an axis; odd, so that the middle is one of them
DRAWS = 4
PARTS = 2 + DRAWS  # pictures of a datum: itself, its reconstruction and its draws
MOST, LEAST = 200, 12  # data on the map
LARGEST = 48  # pixels; what is larger is shown smaller, each pixel a mean
TALLEST = 64  # numbers in an event that is no image; a longer one has no explorer
RAW, PACKED = 2_400_000, 1_400_000  # bytes of pixels, and of PNG: two thirds of 2 MB in base64
REACH = 2.5  # standard deviations of the prior that the map of a plane shows at least


class Explorer(NamedTuple):
    """What the map shows, for n data and events of a shape.

    Images are uint8 ``[..., C, h, w]``, all other events float32 ``[..., D]``.

    Args:
        sheet: Events decoded at the crossings of a grid, ``[SIDE, SIDE, *shape]``; rows go along
            the second axis.
        events: Each datum, its reconstruction and its draws, ``[n, PARTS, *shape]``.
        means: Posterior means on the two axes, ``[n, 2]``.
        ends: The ends of the map on each axis, ``[2, 2]``.
        share: The share of the aggregate posterior's variance along each axis, ``[2]``; NaN where
            the axes are the latents themselves.
        kl: KL(q(z|x) ‖ p(z)) of each datum, in nats, ``[n]``.
        labels: The class of each datum, ``[n]``; −1 without one.
        columns: What the D numbers of an event are called, if they are columns of a table.
    """

    sheet: Tensor
    events: Tensor
    means: Tensor
    ends: Tensor
    share: Tensor
    kl: Tensor
    labels: Tensor
    columns: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it holds beside names."""
        return {name: each for name, each in self._asdict().items() if name != "columns"}

    @property
    def is_images(self) -> bool:
        """Whether events are images."""
        return self.sheet.dtype == torch.uint8

    def require_whole(self) -> None:
        """Refuse tensors that do not belong together, as a forged file may hold."""
        n, shape = len(self.means), self.sheet.shape[2:]
        kinds = (torch.uint8, 3) if self.is_images else (torch.float32, 1)
        expected = {
            "sheet": [SIDE, SIDE, *shape],
            "events": [n, PARTS, *shape],
            "means": [n, 2],
            "ends": [2, 2],
            "share": [2],
            "kl": [n],
            "labels": [n],
        }
        found = {name: list(value.shape) for name, value in self.tensors.items()}
        if found != expected:
            raise ValueError(f"expected shapes {expected}, got {found}")
        if (self.events.dtype, len(shape)) != kinds or self.sheet.dtype != self.events.dtype:
            raise ValueError(f"events are {self.events.dtype} {list(shape)}")
        if (
            not 1 <= n <= MOST
            or prod(shape) > 3 * LARGEST**2
            or (self.is_images and shape[0] not in (1, 3))
        ):
            raise ValueError(f"{n} events of shape {list(shape)} are none of an explorer")
        if not all(bool(each.isfinite().all()) for each in (self.means, self.ends)):
            raise ValueError("its map is not finite")
        if self.columns and len(self.columns) != shape[0]:
            raise ValueError(f"{len(self.columns)} names for events of shape {list(shape)}")
        if not bool((self.ends[:, 0] < self.ends[:, 1]).all()):
            raise ValueError("the ends of its map are out of order")


@torch.no_grad()
def explore(model: Any, guide: Any, data: Dataset, *, seed: int) -> Explorer | None:
    """Decode a plane of the latent space, and encode the first test data.

    The axes are the two latents themselves, or the leading principal axes of the aggregate
    posterior, :math:`q(z) = \\frac1N \\sum_n q(z|x_n)`, all other axes being at its mean.

    Returns:
        None for a pair of several latents, of one that is discrete or a single number, of events
        that are neither images nor at most 64 numbers, or that takes more than a mask beside x.
    """
    x, *others = data.split("test")
    # Anything but a mask, such as a label, would have to be chosen for the whole plane.
    masks = all(each.dtype == torch.bool and each.shape == x.shape for each in others)
    if len(others) > 1 or not masks or not _is_shown(data.shape) or len(x) < 2:
        return None
    n = _how_many(data.shape, len(x))
    rows = [x[:n], *(each[:n] for each in others)]
    means, discrete = encode_sites(guide, (x, *others), subseed(seed, 0))
    if len(means) != 1:
        return None
    ((site, z),) = means.items()
    if z.dim() != 2 or z.shape[1] < 2 or discrete:
        return None
    centre, axes, share = _axes(_draw(guide, [x, *others], site, subseed(seed, 1)))
    places = (z[:n] - centre) @ axes.mT
    reach = places.abs().amax(0).clamp(min=REACH if z.shape[1] == 2 else 1e-3) * 1.04
    ends = torch.stack([-reach, reach], -1)
    steps = torch.stack([torch.linspace(low, high, SIDE) for low, high in ends.tolist()]).to(z)
    across, down = torch.meshgrid(*steps, indexing="xy")
    plane = torch.stack([across, down], -1).reshape(-1, 2) @ axes + centre
    seen = [torch.ones(len(plane), *x.shape[1:], dtype=torch.bool, device=x.device)] * len(others)
    sheet = whole_events(decode(model, {site: plane}, *seen, like=x), 1, data.shape)
    datum = rows[0].masked_fill(~rows[1], torch.nan) if others else rows[0]
    decoded = decode(model, {site: z[:n]}, *map(torch.ones_like, rows[1:]), like=x)
    events = [datum, whole_events(decoded, 1, data.shape)]
    for i in range(DRAWS):
        drawn = reconstruct(model, guide, *rows, seed=subseed(seed, 2 + i))
        events.append(whole_events(drawn, 1, data.shape))
    known = data.labels is not None and not data.labels.test.is_floating_point()
    found = Explorer(
        sheet=sheet.reshape(SIDE, SIDE, *sheet.shape[1:]),
        events=torch.stack(events, 1),
        means=places,
        ends=ends,
        share=share,
        kl=elbo(model, guide, *rows, objective="trace_mean_field_elbo").kl,
        labels=data.labels.test[:n] if known and data.labels else torch.full((n,), -1),
        columns=tuple(each.name for each in data.columns or ()),
    )
    return _shown(found, x)


@torch.no_grad()
def respond(model: Any, guide: Any, data: Dataset) -> tuple[Tensor, Tensor, str] | None:
    """How the columns of a table respond to each latent axis.

    Dimension i goes from two standard deviations of the posterior means below their mean to two
    above, with the others at their mean.

    Returns:
        The values of at most nine dimensions ``[d, T]``, E[x | z] there in standard deviations of
        the data from their mean ``[d, T, D]``, and the name of the site; or None for events that
        are no table, and latents that are no vector.
    """
    x, *others = data.split("test")
    if len(data.shape) != 1 or not _is_shown(data.shape) or len(x) < 2 or len(others) > 1:
        return None
    if any(each.dtype != torch.bool or each.shape != x.shape for each in others):
        return None
    means, discrete = encode_sites(guide, (x, *others), 0)
    (site, z), *more = means.items()
    if more or z.dim() != 2 or discrete:
        return None
    kept, centre = min(z.shape[1], 9), z.mean(0)
    reach = 2 * z.std(0).clamp(min=1e-3)
    steps = torch.linspace(-1, 1, SIDE).to(z)
    shifts = torch.diag(reach)[:kept, None] * steps[:, None]
    grid = (centre + shifts).flatten(0, 1)
    seen = [torch.ones(len(grid), *x.shape[1:], dtype=torch.bool, device=x.device)] * len(others)
    decoded = whole_events(decode(model, {site: grid}, *seen, like=x), 1, data.shape)
    # Missing values are not counted: what stands there is no datum.
    known = others[0] if others else torch.ones_like(x, dtype=torch.bool)
    count = known.sum(0).clamp(min=1)
    mean = x.where(known, 0.0).sum(0) / count
    spread = ((x - mean).where(known, 0.0).square().sum(0) / count).sqrt()
    scaled = (decoded - mean) / spread.where(spread > 0, 1.0)
    values = centre[:kept, None] + reach[:kept, None] * steps
    return values.cpu(), scaled.unflatten(0, (kept, SIDE)).cpu(), site


def save(run: Run, found: Explorer | None) -> None:
    """Write it into a run, or remove what an earlier pair has left."""
    if found is None:
        run.file(EXPLORER).unlink(missing_ok=True)
    else:
        about = {"run": run.identity, "columns": json.dumps(found.columns)}
        run.write(EXPLORER, pack_tensors(found.tensors, about))


def load(run: Run) -> Explorer | None:
    """Read it; None where there is none."""
    path = run.file(EXPLORER)
    if not path.exists():
        return None
    tensors, about = unpack_tensors(path)
    run.require_own(path, about.get("run", ""))
    with reading(path):
        if tensors.keys() != {*Explorer._fields} - {"columns"}:
            raise ValueError(f"it holds {sorted(tensors)}")
        columns = msgspec.json.decode(about.get("columns", "[]"), type=tuple[str, ...])
        found = Explorer(**tensors, columns=columns)
        found.require_whole()
    return found


def view(
    found: Explorer,
    ll: LogLikelihood | None = None,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """What the template needs: the points of the map, the legend, and the data of the script.

    Args:
        found: The explorer.
        ll: log p(x) of the test data, if they were evaluated.
        names: What the classes are called.
    """
    from matplotlib import color_sequences
    from matplotlib.colors import to_hex

    axes = [
        f"z[{i}]" if share != share else f"principal axis {i + 1} ({share:.0%} of the variance)"
        for i, share in enumerate(found.share.tolist())
    ]
    content, n, side = _sprites(found) if found.is_images else _values(found)
    given: dict[str, Any] = {"axes": axes, "ends": found.ends.tolist(), "side": side, **content}
    # Up is more: in SVG, y grows downwards.
    low, high = found.ends.T
    on_map = (found.means[:n] - low) / (high - low)
    points = [(round(1000 * u), round(1000 - 1000 * v)) for u, v in on_map.tolist()]
    given |= {"points": points, "said": [_said(found, ll, names, i) for i in range(n)]}
    classes = sorted({*found.labels[:n].tolist()} - {-1})
    colours = [to_hex(each) for each in color_sequences["tab10"]]  # as the figures have it
    few = len(classes) <= len(colours)
    paint = dict(zip(classes, colours, strict=False)) if few else {}
    return {
        "given": given,
        "kind": "image" if found.is_images else "numbers",
        "parts": ("datum", "E[x | z] at the mean", *(f"draw {i + 1}" for i in range(DRAWS))),
        "principal": bool((found.share == found.share).all()),
        "axes": axes,
        "side": side,
        "dots": [
            (*place, paint.get(label, colours[0]))
            for place, label in zip(points, found.labels[:n].tolist(), strict=True)
        ],
        "legend": [(_called(names, label), colour) for label, colour in paint.items()],
    }


def summary(run: Run, config: Mapping[str, Any], finding: Finding | None) -> dict | None:
    """What a run's report shows of it, if the run has it; ``finding`` is of the test data."""
    found = load(run)
    ll = finding.log_likelihood if finding else None
    return None if found is None else view(found, ll, class_names(config.get("data")))


def script() -> dict[str, Any]:
    """The script of the page as it stands there, and the hash by which the policy lets it run."""
    from markupsafe import Markup

    text = files("pyrovae.reporting").joinpath("templates/explorer.js").read_text(encoding="utf-8")
    digest = b64encode(sha256(text.encode()).digest()).decode()
    return {"script": Markup(text), "script_hash": Markup(f"sha256-{digest}")}


def _sprites(found: Explorer) -> tuple[dict[str, Any], int, int]:
    """Images as two PNG, with how many data and how fine a grid they have room for."""
    n, step = len(found.means), 1
    while True:
        sheet = _sprite(found.sheet[::step, ::step].flatten(0, 1), ceil(SIDE / step))
        events = _sprite(found.events[:n].flatten(0, 1), PARTS)
        if len(sheet) + len(events) <= PACKED or (n <= LEAST and step == 2):
            break
        n, step = (max(LEAST, n // 2), 1) if n > LEAST else (n, 2)
    encoded = {"sheet": b64encode(sheet).decode(), "events": b64encode(events).decode()}
    return {"tile": [*found.sheet.shape[-2:]], **encoded}, n, ceil(SIDE / step)


def _values(found: Explorer) -> tuple[dict[str, Any], int, int]:
    """Numbers as they are, with their names, and the least and the most of the data."""
    seen = found.events[:, 0]
    low = seen.nan_to_num(nan=torch.inf).amin(0)
    high = seen.nan_to_num(nan=-torch.inf).amax(0)
    content = {
        "columns": found.columns or [f"x[{i}]" for i in range(seen.shape[1])],
        "spread": [_rounded(each.tolist()) for each in (low, high)],
        "sheet": _rounded(found.sheet.flatten(0, 1).tolist()),
        "events": _rounded(found.events.flatten(0, 1).tolist()),
    }
    return content, len(found.means), SIDE


def _said(found: Explorer, ll: LogLikelihood | None, names: Sequence[str], i: int) -> str:
    """What is known of a datum, in a sentence."""
    label = int(found.labels[i])
    parts = [f"Test datum {i}" + (f", label {_called(names, label)}" if label >= 0 else "")]
    if ll is not None and i < len(ll.log_prob):
        khat = ll.khat[i].item()
        sign = "≥" if khat > HEAVY else "="
        parts.append(f"log p(x) {sign} {number(ll.log_prob[i].item())} nats")
        parts.append(f"k-hat {khat:.2f}" if khat == khat else "k-hat unknown")
    return "; ".join([*parts, f"KL(q(z|x) ‖ p(z)) = {number(found.kl[i].item())} nats"]) + "."


def _called(names: Sequence[str], label: int) -> str:
    return str(names[label]) if 0 <= label < len(names) else str(label)


def _is_shown(shape: Sequence[int]) -> bool:
    return (len(shape) == 1 and 1 < shape[0] <= TALLEST) or _is_image(shape)


def _is_image(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def _how_many(shape: Sequence[int], rows: int) -> int:
    """How many data the map has: as many as the bytes of their pixels allow."""
    if not _is_image(shape):
        return min(rows, MOST)
    size = shape[0] * prod(min(each, LARGEST) for each in shape[1:])
    return min(rows, max(LEAST, min(MOST, int(RAW / size - SIDE**2) // PARTS)))


def _draw(guide: Any, rows: Sequence[Tensor], site: str, seed: int) -> Tensor:
    """A draw of the latent for each datum, together a sample of the aggregate posterior."""
    pair = Pair(None, guide)
    moved = [each.to(pair.device) for each in rows]
    with pair.mode(training=False), seeded(seed, moved[0].device):
        drawn: Tensor = samples(pair.trace_guide(*moved))[site]["value"]
    return drawn.to(rows[0].device)


def _axes(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centre ``[d]`` of a plane, its two axes ``[2, d]``, and their shares of the variance."""
    if z.shape[1] == 2:
        return torch.zeros_like(z[0]), torch.eye(2).to(z), torch.full((2,), torch.nan)
    centre = z.mean(0)
    axes, share = principal_axes(z - centre)
    return centre, axes.to(z), share


def whole_events(found: Tensor | dict[str, Tensor], batch: int, shape: Sequence[int]) -> Tensor:
    """Data of a shape: the only site, sites that together make it up, or the first."""
    parts = [found] if isinstance(found, Tensor) else list(found.values())
    lead = parts[0].shape[:batch]
    whole = torch.cat([part.reshape(*lead, -1).float() for part in parts], -1)
    whole = whole if whole.shape[-1] == prod(shape) else parts[0]
    return whole.reshape(*lead, *shape)


def _shown(found: Explorer, x: Tensor) -> Explorer:
    """As it is kept: images as bytes of the data's range, small enough, on the CPU."""
    parts = {name: each.detach().cpu() for name, each in found.tensors.items()}
    for name in ("sheet", "events"):
        values = parts[name].float()
        if _is_image(values.shape[2:]):
            low, high = min(0.0, x.min().item()), max(1.0, x.max().item())
            factor = ceil(max(values.shape[-2:]) / LARGEST)
            flat = values.flatten(0, 1)
            size = max(1, flat.shape[-2] // factor), max(1, flat.shape[-1] // factor)
            flat = torch.nn.functional.adaptive_avg_pool2d(flat, size)
            levels = (255 * (flat - low) / (high - low)).round().clamp(0, 255)
            values = levels.to(torch.uint8).unflatten(0, values.shape[:2])
        parts[name] = values
    parts |= {name: parts[name].float() for name in ("means", "ends", "share", "kl")}
    parts["labels"] = parts["labels"].long()
    return Explorer(**parts, columns=found.columns)


def _sprite(images: Tensor, columns: int) -> bytes:
    """Images ``[n, C, h, w]`` in rows of so many, as one PNG."""
    from PIL import Image

    n, channels, height, width = images.shape
    rows = n // columns
    grid = images.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = grid.reshape(rows * height, columns * width, channels)
    pixels = pixels[..., 0] if channels == 1 else pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _rounded(values: Any) -> Any:
    """Nested numbers to four digits, with None for what JSON does not know."""
    if isinstance(values, list):
        return [_rounded(each) for each in values]
    return float(f"{values:.4g}") if abs(values) < float("inf") else None


def class_names(data: Any) -> Sequence[str]:
    """What a configuration calls the classes of its data."""
    names = data.get("class_names") if isinstance(data, Mapping) else None
    return names if isinstance(names, list) else ()
