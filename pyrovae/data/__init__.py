"""Data sets as tensors, with their splits, their labels and their provenance."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyrovae._tools import InputError, InputTypeError, physical_memory
from pyrovae._tools.seeding import subseed
from pyrovae._tools.shown import Told, html
from pyrovae.data.disk import MEMORY, Disk, is_on_disk, mapped, written
from pyrovae.data.files import MISSING, Arrays, as_events, fillers, finite
from pyrovae.data.given import as_tensors, frame_schema, is_torch_data, package_of, read_items
from pyrovae.data.large import open_large
from pyrovae.data.sources import (
    DATASETS,
    SPLIT_SEED,
    columns_left,
    find_source,
    split_end,
    split_rows,
    type_name,
    unknown,
)
from pyrovae.data.tables import LABELLED, Column, Context, Schema, measured, to_pandas

__all__ = [
    "BINARIZE",
    "CONTEXTS",
    "DATASETS",
    "MISSING",
    "SPLIT_SEED",
    "Dataset",
    "Splits",
    "choose_labelled",
    "draw_binary",
    "load_data",
]

# No class number, so that a program can tell a hidden label by its sign.
HIDDEN = -1
# Fixed, so that runs with different seeds are shown the same labels and can be compared.
LABEL_SEED = 0
BINARIZE = ("none", "threshold", "static", "dynamic")
CONTEXTS = ("none", "labels")

T = TypeVar("T")


class Splits(NamedTuple, Generic[T]):
    """One value for each split."""

    train: T
    valid: T
    test: T


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Train, validation and test data in the form that the likelihood sees.

    Args:
        name: What to call it.
        shape: The event shape, ``[D]`` or ``[C, H, W]``.
        train: float32 ``[N, *shape]``.
        valid, test: The same for these splits, or None where there are no such data.
        labels: int64 ``[N]`` where they are classes, float32 otherwise, for each split.
        provenance: Where the numbers come from, ready for JSON.
        binarize: How grey levels became these numbers, one of :data:`BINARIZE`.
        intensities: What ``"dynamic"`` draws training batches from, ``[N, *shape]``, uint8 or
            float32; the probability of a one is ``intensities / scale``.
        scale: The intensity of a certain one.
        context: What the programs take beside x, for each split a tuple of tensors ``[N, ...]``;
            the last of them is the mask where there is one.
        columns: The columns of a table, one for each of the D numbers of a datum.
        disk: Where the training data are on disk; :attr:`train` then is a view of them.
        loaded: What :func:`load_data` loaded them from, a name or a file, and its ``root``.
    """

    name: str
    shape: torch.Size
    train: Tensor
    valid: Tensor | None = None
    test: Tensor | None = None
    labels: Splits[Tensor] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    binarize: str = "none"
    intensities: Tensor | None = None
    scale: float = 1.0
    context: Splits[tuple[Tensor, ...]] | None = None
    columns: Schema | None = None
    loaded: tuple[str, str | None] | None = None
    disk: Disk | None = None

    @classmethod
    def of(cls, data: Any, memory: float | None = None) -> Dataset:
        """A data set as it is, or one of training data alone.

        Args:
            data: What :func:`pyrovae.data.given.as_tensors` takes, or a tuple ``(x, *context)``.
            memory: The GiB of a memmap, or of a torch data set, that are in memory at once: a data
                set of more, by default of half of the machine's memory, goes to a temporary file.
        """
        if isinstance(data, cls):
            return data
        given, *rest = data if isinstance(data, tuple) else (data,)
        name, columns = package_of(given) or "tensor", None
        arrays, stays = [given, *rest], is_on_disk(given)
        if is_torch_data(given):
            items = read_items(given, None if memory is None else int(memory * 2**30))
            arrays, stays = [*items, *rest], isinstance(items[0], np.memmap)
            given, *more = (mapped(e) if isinstance(e, np.memmap) else e for e in items)
            rest = [*more, *rest]
        if name in ("pandas", "polars") and hasattr(given, "columns"):
            given = to_pandas(given)
            numbers, columns = frame_schema(given)
            columns = measured(columns, torch.from_numpy(numbers), None)
        x, *context = as_tensors(given, *rest)
        if not isinstance(x, Tensor):
            raise InputTypeError(
                f"Expected a Dataset, or data [N, ...] as a tensor, an array, a frame or a torch "
                f"data set, got {type(x).__name__}"
                f"{' with context of its own' if isinstance(x, cls) else ''}: load a file with "
                f"pyrovae.load_data."
            )
        if any(not isinstance(each, Tensor) or len(each) != len(x) for each in context):
            raise InputTypeError(
                f"Expected a tensor or an array with a row for each of {len(x)} data points as "
                f"further argument of both programs, got another number of rows, or none."
            )
        data = x.detach()  # or else a training would leave a gradient at it
        if data.is_complex() or data.dtype == torch.bool:
            raise InputTypeError(f"Expected real data, got {data.dtype}: use .float().")
        told = Splits(tuple(context), (), ()) if context else None
        beside = [each for each in arrays[1:] if isinstance(each, np.memmap)]
        disk = Disk(arrays[0], memory or MEMORY, beside=beside) if stays else None
        return cls(name, data.shape[1:], data, context=told, columns=columns, disk=disk)

    @property
    def device(self) -> torch.device:
        """Where batches lie: the data too, but what is on disk."""
        return self.train.device if self.disk is None else self.disk.device

    @property
    def context_columns(self) -> Schema:
        """What is known by name of the context, as :attr:`columns`; the mask has none."""
        told = self.provenance
        names = told["context"].split(",") if self.context and told.get("context") else ()
        words = {LABELLED[0]: map(str, range(told.get("classes", 0)))}
        words |= told.get("context_categories", {})
        found: list[Column] = []
        for name, values in zip(names, self.context.train if self.context else (), strict=False):
            categories = tuple(words.get(name, ()))
            column = Column(name, "categorical" if categories else "real", categories)
            found += measured((column,), values.double()[:, None], None)
        return tuple(found)

    def __repr__(self) -> str:
        found = {name: getattr(self, name) for name in Splits._fields}
        sizes = ", ".join(f"{name}={0 if x is None else len(x)}" for name, x in found.items())
        return f"Dataset({self.name!r}, {list(self.shape)}, {sizes}, binarize={self.binarize!r})"

    def _told(self) -> Told:
        sizes = {name: len(x) for name in Splits._fields if (x := getattr(self, name)) is not None}
        rows = [(name, f"{count} data") for name, count in sizes.items()]
        rows.append(("shape", " × ".join(map(str, self.shape)) or "a number"))
        rows.append(("binarize", self.binarize))
        if self.columns:
            rows.append(("columns", ", ".join(each.name for each in self.columns)))
        called = [each.name for each in self.context_columns]
        called += ["mask"] * ("missing" in self.provenance)
        more = len(self.context.train) if self.context else 0
        rows.append(
            ("context", ", ".join(called) if len(called) == more > 0 else f"{more or 'none'}")
        )
        return Told(f"Dataset {self.name}", rows)

    def _repr_html_(self) -> str:
        return html(self)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""The training rows ``index`` ``[M]`` as float32 ``[M, *shape]`` on the data's device.

        Under ``"dynamic"`` each call draws them anew,

        .. math:: x_d \sim \mathrm{Bernoulli}(\mathrm{intensity}_d),

        from ``generator`` (on the data's device), or else from torch's global one.
        """
        if self.intensities is None:
            return self.train[index]
        return draw_binary(self.intensities[index], self.scale, generator)

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """The arguments of both programs for the training rows ``index`` ``[M]``.

        Returns:
            ``(x, *context)``, x as :meth:`batch` gives it.
        """
        context = self.context.train if self.context else ()
        return self.batch(index, generator), *(tensor[index] for tensor in context)

    def parts(
        self, batches: Sequence[Tensor]
    ) -> tuple[Callable[..., tuple[Tensor, ...]], Iterable[Sequence[Tensor]]]:
        """Bring batches of training rows to hand, some of them at a time.

        Args:
            batches: Numbers of rows ``[M]`` each, all of one size but the last.

        Returns:
            What makes the programs' arguments from numbers, and for each part in turn the numbers
            of its batches. Of data in memory that is :meth:`rows`, and all batches as they are.
        """
        if self.disk is None:
            return self.rows, [batches]
        context = self.context.train if self.context else ()
        size = len(batches[0])
        x, *more = self.disk.held(self.disk.batches_at_once(size) * size, context)
        if self.disk.at_hand is None or self.disk.at_hand.train is not x:
            # One for all epochs, as a compiled step is of the tensors that it gathers from.
            told = Splits(tuple(more), (), ()) if more else None
            drawn = None if self.intensities is None else x
            held = replace(self, train=x, intensities=drawn, context=told, disk=None)
            self.disk.at_hand = held
        return self.disk.at_hand.rows, self.disk.parts(batches, context)

    def head(self, n: int) -> tuple[Tensor, ...]:
        """The programs' arguments for the first n training data, on the data's device."""
        rows = tuple(tensor[:n] for tensor in self.split("train"))
        return tuple(each.to(self.device) for each in rows)

    def blocks(self) -> Iterator[tuple[Tensor, ...]]:
        """The programs' arguments for all data, in pieces that memory holds."""
        for name in Splits._fields:
            rows = self.split(name)
            if self.disk is not None and name == "train":
                yield from self.disk.blocks(*rows)
            elif rows:
                yield rows

    def split(self, name: str) -> tuple[Tensor, ...]:
        """The arguments of both programs for a whole split.

        Args:
            name: ``"train"``, ``"valid"`` or ``"test"``.

        Returns:
            ``(x, *context)``; nothing, ``()``, where there is no such split.

        Raises:
            ValueError: If the name is another.
        """
        if name not in Splits._fields:
            raise InputError(unknown("the split", str(name), Splits._fields))
        x = getattr(self, name)
        if x is None:
            return ()
        return x, *(getattr(self.context, name) if self.context else ())

    def to(self, device: torch.device | str | int | None) -> Dataset:
        """The same data on another device, but what is on disk; None leaves it where it is."""
        if device is None:
            return self
        names = ("valid", "test") if self.disk else ("train", "valid", "test", "intensities")
        moved: dict[str, Any] = {
            name: t.to(device) for name in names if (t := getattr(self, name)) is not None
        }
        labels = self.labels and Splits(*(y.to(device) for y in self.labels))
        context = self.context and Splits(*(tuple(t.to(device) for t in c) for c in self.context))
        if self.disk:
            moved["disk"] = self.disk.to(device)
            context = context and context._replace(train=self.split("train")[1:])
        return replace(self, labels=labels, context=context, **moved)


def load_data(
    name: Any,
    *,
    binarize: str = "none",
    root: str | Path | None = None,
    device: torch.device | str | int | None = None,
    seed: int = 0,
    context: str | Sequence[str] = "none",
    labelled: int | None = None,
    missing: str = "refuse",
    columns: Mapping[str, str] | None = None,
    memory: float | None = None,
    shape: str | Sequence[int] | None = None,
) -> Dataset:
    """Load a shipped data set or a file, split it, and binarize it as told.

    The official test set stays the test set, and one in six of the official training data, picked
    by a permutation with the fixed seed :data:`SPLIT_SEED`, is for validation. Data that come in
    one piece are permuted with the same seed and split 70/10/20. Splits never depend on ``seed``.

    Grey levels become binary data in one of four ways, recorded in ``provenance``: ``"none"``
    leaves them, ``"threshold"`` is x > 0.5, ``"static"`` draws x ~ Bernoulli(intensity) once, and
    ``"dynamic"`` draws once for ``.train``, ``.valid`` and ``.test`` and anew in every
    :meth:`Dataset.batch`. The fixed draws depend on ``seed`` and the split alone, on every device.

    Args:
        name: One of :data:`DATASETS`; a pandas or polars frame, an AnnData, an array, a SciPy
            sparse matrix, or a torch data set or loader, of x or of x and a label; or a ``.npy``,
            ``.npz``, ``.zarr``, ``.csv``, ``.arff``, ``.parquet`` or ``.h5ad`` file as
            :func:`pyrovae.data.files.read_arrays` has it. In a file, uint8 are
            intensities over 255 (or binary, where none is above 1), all else is taken as it is;
            ``[N, H, W]`` become ``[N, 1, H, W]`` and ``[N, H, W, C]`` with one or three channels
            ``[N, C, H, W]``, unless ``shape`` says otherwise. Or a folder of images, flat or with a
            folder for each class, as :func:`pyrovae.data.images.read_folder` has it.
        binarize: One of :data:`BINARIZE`.
        root: The folder of the torchvision sets; by default ``PYROVAE_DATA``, or else
            ``pyrovae/data`` in the user's cache. What is missing there is downloaded into it.
        device: Where the tensors go.
        seed: The seed of the fixed draws.
        context: ``"labels"`` hands the classes, int64 ``[N]``, to both programs beside x:
            ``model(x, y)``, ``guide(x, y)``. Names of columns, ``"age,site"`` or a list, take
            these out of x and hand them over in this order, ``[N]`` each: whole numbers as int64,
            categories and words as codes from 0 (``provenance["context_categories"]`` says of
            what), other numbers as float32. Of a ``.npz`` they are arrays, of any shape
            ``[N, ...]``; of a ``.h5ad``, columns of obs; of a ``.npy`` ``[N, D]``, numbers of
            columns, ``"0,-1"`` for the first and the last.
        labelled: How many training labels the programs are shown, as many of each class and the
            same ones for every ``seed``; all other labels of ``context`` are −1, those of
            validation and test data among them. ``.labels`` keeps every one.
        missing: ``"mask"`` takes NaN, or an empty field of a table, for a missing value: x is 0
            there (1 in positive columns), and a mask ``[N, *shape]``, true where x is observed, is
            the last argument of both programs: ``model(x, mask)``, ``guide(x, mask)``.
            ``"refuse"`` refuses.
        columns: The kind of some columns of a table, by name: real, positive, count, binary,
            categorical or ordinal; others are told by their dtype, as
            :func:`pyrovae.data.tables.read_table` says. ``.columns`` has all of them.
        memory: Data whose rows take more than so many GiB as float32, by default half of the
            machine's memory, stay on disk, and no more than that of them is in memory while
            :func:`pyrovae.fit` trains: a ``.npy``, ``.npz`` (of one ``x``), ``.zarr``, ``.parquet``
            or ``.h5ad`` file, a memmap, a torch data set, a sparse matrix, an AnnData whose X is
            sparse or on disk, an array of Zarr, h5py or xarray. Rows that are not mapped as they
            are go to a temporary file, as :func:`pyrovae.data.large.open_large` says: all but a
            ``.npy`` of float32 whose gaps are no mask, and which is not binarized for good. The
            last rows are for validation and test, a tenth and a fifth of them, 10,000 and 20,000 at
            most: shuffle what is sorted first. Dynamic draws are from float32 intensities, also
            where uint8 in memory are not.
        shape: The event shape, where it is not the one that a file's is read as: ``"129,88"`` or
            ``[129, 88]`` for sequences of 129 steps, which would be images, ``"28,28"`` for rows
            of 784 columns.

    Raises:
        ValueError: If an argument or the data cannot be used; the message names the mend.
        FileNotFoundError: If a file is missing and cannot be downloaded.

    Example:
        >>> load_data("digits", binarize="dynamic")
        Dataset('digits', [1, 8, 8], train=1258, valid=180, test=359, binarize='dynamic')
    """
    if binarize not in BINARIZE:
        raise InputError(unknown("binarize", str(binarize), BINARIZE))
    shown = _names(context)
    if labelled is not None and not {*LABELLED} & {*shown}:
        raise InputError(f"Expected context='labels' for labelled={labelled}, got {context!r}.")
    if missing not in MISSING:
        raise InputError(unknown("missing", str(missing), MISSING))
    events, named = _shape(shape), tuple(each for each in shown if each not in LABELLED)
    where = None if root is None else str(root)
    loaded = (str(name), where) if isinstance(name, str | Path) else None
    large = None
    if not isinstance(name, str) or name not in DATASETS:
        large = open_large(name, memory, physical_memory() // 2, named, columns)
    if large is not None:
        options: dict[str, Any] = {"binarize": binarize, "seed": seed, "missing": missing}
        data, index, masks = _on_disk(name, *large, events, columns or {}, memory, **options)
        if shown:
            data = _with_context(data, shown, large[0].context or {}, index, labelled)
        data = data if masks is None else _masked(data, masks)
        return replace(data, loaded=loaded).to(device)
    source = find_source(name, root, missing, columns, named, events)
    x = torch.from_numpy(source.arrays.x)
    if binarize != "none":
        _check_intensities(x, source.scale, binarize)
    rows, rule = split_rows(len(x), source.arrays.sizes, source.name)
    index = Splits(*rows)
    grey = (x[each].float() / source.scale for each in index)
    draws = _streams(seed)
    train, valid, test = (_binarize(x, binarize, next(draws)) for x in grey)
    labels, classes = _labels(source.arrays, index)
    drawn = binarize in ("static", "dynamic")
    provenance = {
        "name": source.name,
        **source.origin,
        "shape": list(x.shape[1:]),
        "sizes": {name: len(rows) for name, rows in index._asdict().items()},
        **rule,
        "scaling": source.scaling,
        "binarize": binarize,
        "binarize_seed": seed if drawn else None,
        **classes,
    }
    data = Dataset(source.name, x.shape[1:], train, valid, test, labels, provenance, binarize)
    mask = None if source.arrays.mask is None else torch.from_numpy(source.arrays.mask)
    if source.arrays.columns is not None:
        seen = None if mask is None else mask[index.train]
        found = source.arrays.columns
        found = measured(found, train, seen) if binarize == "none" else found
        data = replace(data, columns=found)
        provenance["columns"] = dict(columns or {})
    if binarize == "dynamic":
        data = replace(data, intensities=x[index.train], scale=source.scale)
    if shown:
        data = _with_context(data, shown, source.arrays.context or {}, index, labelled)
    if mask is not None:
        data.provenance.update(missing=missing, missing_share=1 - mask.float().mean().item())
        data = _masked(data, Splits(*(mask[rows] for rows in index)))
    return replace(data, loaded=loaded).to(device)


def _on_disk(
    source: Any,
    arrays: Arrays,
    scaling: str,
    shape: Sequence[int] | None,
    kinds: Mapping[str, str],
    memory: float | None,
    **options: Any,
) -> tuple[Dataset, Splits[Any], Splits[Tensor] | None]:
    """The data set of arrays that stay on disk, the rows of its splits, and their masks."""
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    title = f"the {type(source).__name__}" if path is None else str(path)
    shape = arrays.x.shape[1:] if shape is None and arrays.sequences else shape
    raw: Any = as_events(arrays.x, shape, title)
    columns = columns_left(arrays.columns, kinds, shape, arrays.x.shape[1:])
    sizes, rule = split_end(len(raw), title)
    filler = torch.from_numpy(fillers(arrays.columns))
    filler = filler.reshape(raw.shape[1:]) if filler.dim() else filler
    inside, gaps = arrays.mask, arrays.mask is not None or options["missing"] == "mask"
    digest, found = _prepared(raw, sizes, title, memory or MEMORY, filler, inside, **options)
    x, binarize = mapped(found[0]), options["binarize"]
    train, valid, test = x.split(sizes)
    index = Splits(slice(sizes[0]), slice(sizes[0], -sizes[2]), slice(sum(sizes[:2]), None))
    labels, classes = _labels(arrays, index)
    provenance: dict[str, Any] = {
        "name": "data" if path is None else path.stem,
        "source": type_name(source) if path is None else path.name,
        "sha256": digest,
        "shape": list(raw.shape[1:]),
        "sizes": dict(zip(Splits._fields, sizes, strict=True)),
        **rule,
        "scaling": scaling,
        "binarize": binarize,
        "binarize_seed": options["seed"] if binarize in ("static", "dynamic") else None,
        "memory": memory,
        **classes,
    }
    if columns is not None:
        provenance["columns"] = dict(kinds)
        if binarize != "none":
            columns = tuple(each._replace(loc=0.0, scale=1.0) for each in columns)
    masks = None
    if gaps:
        share = 1 - int(np.count_nonzero(found[-1])) / found[-1].size
        provenance.update(missing=options["missing"], missing_share=share)
        one, *others = mapped(found[-1]).split(sizes)
        masks = Splits(one, *(each.clone() for each in others))
    # What a new draw of each batch is from.
    levels = found[1] if binarize == "dynamic" else None
    first, *beside = found if levels is None else (levels, *found[:1], *found[2:])
    data = Dataset(
        provenance["name"], train.shape[1:], train, valid.clone(), test.clone(), labels,
        provenance=provenance, binarize=binarize, columns=columns,
        intensities=None if levels is None else mapped(levels)[: sizes[0]],
        disk=Disk(first, memory or MEMORY, beside=beside),
    )  # fmt: skip
    return data, index, masks


def _prepared(
    raw: np.memmap,
    sizes: Sequence[int],
    title: str,
    memory: float,
    filler: Tensor,
    inside: np.ndarray | None,
    *,
    binarize: str,
    seed: int,
    missing: str,
) -> tuple[str, list[np.memmap]]:
    """Check the rows of all splits, and write what programs see of them, if it is another thing.

    Returns:
        A digest of the rows; x, the intensities if a draw of them is to be new for each batch,
        and the mask if gaps are masked.
    """
    reader, digest = Disk(raw, memory / 4), hashlib.sha256()  # there are several of a block below
    gaps, dynamic = missing == "mask" or inside is not None, binarize == "dynamic"

    def blocks() -> Iterator[list[np.ndarray]]:
        row = 0
        for part, stream in zip(mapped(raw).split(list(sizes)), _streams(seed), strict=False):
            for (block,) in reader.blocks(part):
                digest.update(block.numpy().data)
                seen = torch.ones_like(block, dtype=torch.bool)
                if inside is not None:
                    ends = np.array(inside[row : row + len(block)])
                    seen = torch.from_numpy(ends).reshape(block.shape)
                    block = torch.where(seen, block, filler)
                finite(block.numpy(), title, missing, row)
                row, seen = row + len(block), seen & ~block.isnan()
                x = torch.where(seen, block, filler)
                if binarize != "none":
                    _check_intensities(x, 1.0, binarize)
                more = ([x] if gaps and dynamic else []) + ([seen] if gaps else [])
                yield [each.numpy() for each in (_binarize(x, binarize, stream), *more)]

    if not gaps and binarize == "none":
        deque(blocks(), maxlen=0)
        return digest.hexdigest(), [raw]
    found = written(blocks(), len(raw), title)
    return digest.hexdigest(), [*found, raw] if dynamic and not gaps else found


def _masked(data: Dataset, masks: Splits[Tensor]) -> Dataset:
    """The same data with masks as the last of their context."""
    told = Splits(*(data.context or ((), (), ())))
    both = zip(told, masks, strict=True)
    return replace(data, context=Splits(*((*rest, mask) for rest, mask in both)))


def _shape(shape: str | Sequence[int] | None) -> tuple[int, ...] | None:
    """A shape as it is written, ``"129,88"`` or a sequence."""
    try:
        parts = shape.split(",") if isinstance(shape, str) else shape
        return None if parts is None else tuple(int(each) for each in parts)
    except (TypeError, ValueError):
        raise InputError(
            f"Expected a shape like '129,88', whole numbers with commas between them, got "
            f"{shape!r}."
        ) from None


def draw_binary(
    intensities: Tensor, scale: float, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw ones with the probabilities that grey levels give.

    .. math:: x_d \sim \mathrm{Bernoulli}(\mathrm{intensity}_d / \mathrm{scale})

    Integer levels are compared with uniform 16-bit integers, four to a random word, which takes
    a third of the time of one float each: the probability is rounded up to a multiple of
    :math:`2^{-16}`, and 0 and 1 are exact.

    Args:
        intensities: Grey levels ``[M, *shape]``, uint8 or floating point.
        scale: The level of a certain one.
        generator: The stream to draw from, on the same device; torch's global one by default.

    Returns:
        float32 ``[M, *shape]``, zeros and ones.
    """
    stream: dict[str, Any] = {"generator": generator, "device": intensities.device}
    if intensities.is_floating_point() or scale != int(scale):
        p = intensities.float() / scale
        return (torch.rand(p.shape, dtype=p.dtype, **stream) < p).float()
    size, levels = intensities[0].numel(), 2**16
    words = torch.randint(-(2**63), 2**63 - 1, (len(intensities), (size + 3) // 4), **stream)
    # Viewed as signed, for torch draws and compares no unsigned 16-bit integers.
    uniform = words.view(torch.int16)[:, :size].reshape(intensities.shape)
    return ((uniform.int() + levels // 2) * int(scale) < intensities.int() * levels).float()


def choose_labelled(y: Tensor, count: int) -> Tensor:
    """Rows ``[count]`` to show the labels of: as many of each class, to within one, as there are.

    They are picked with the fixed seed :data:`LABEL_SEED`; more of them contain fewer of them.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(y):
        raise InputError(
            f"Expected labelled between 0 and the {len(y)} training labels, got {count!r}."
        )
    generator = torch.Generator().manual_seed(LABEL_SEED)
    order = torch.randperm(len(y), generator=generator)
    seen = torch.nn.functional.one_hot(y[order]).cumsum(0)
    turn = seen.gather(1, y[order][:, None])[:, 0]
    return order[turn.argsort(stable=True)[:count]]


def _names(context: str | Sequence[str]) -> tuple[str, ...]:
    """What is asked for beside x, by name and in its order."""
    given = context.split(",") if isinstance(context, str) else context
    names = tuple(each.strip() for each in given)
    if names == ("none",):
        return ()
    if "" in names or len(set(names)) < len(names):
        raise InputError(
            f"Expected context to be none, labels, or names of columns like 'age,site', each once, "
            f"got {context!r}."
        )
    return names


def _with_context(
    data: Dataset,
    names: tuple[str, ...],
    columns: Context,
    index: Splits[Any],
    labelled: int | None,
) -> Dataset:
    """The same data with labels and columns of these names as the programs' context."""
    found: list[Splits[Tensor]] = []
    told: dict[str, Any] = {"context": ",".join(names)}
    for name in names:
        if name in LABELLED:
            shown, seed = _shown_labels(data, labelled)
            told |= {"labelled": labelled, "label_seed": seed}
        else:
            values = torch.from_numpy(columns[name][0])
            shown = Splits(*(values[rows] for rows in index))
        found.append(shown)
    if words := {name: list(words) for name, (_, words) in columns.items() if words}:
        told["context_categories"] = words
    context = Splits(*zip(*found, strict=True))
    return replace(data, context=context, provenance=data.provenance | told)


def _shown_labels(data: Dataset, labelled: int | None) -> tuple[Splits[Tensor], int | None]:
    """The classes of data, or the chosen few of them, and the seed that chose them."""
    if data.labels is None:
        raise InputError(
            f"Expected labels in {data.name} for context='labels', got none; save them as y beside "
            f"x in a .npz file, or in a column 'label' of a .csv file."
        )
    if any(y.is_floating_point() for y in data.labels):
        raise InputError(
            f"Expected labels that are classes in {data.name} for context='labels', got real "
            f"numbers; save them as integers from 0."
        )
    found = torch.cat(list(data.labels)).unique()
    if not torch.equal(found, torch.arange(len(found))):
        raise InputError(
            f"Expected the classes 0 to {len(found) - 1} as labels in {data.name}, got "
            f"{found[0].item()} to {found[-1].item()}; number them from 0 without gaps."
        )
    shown, seed = data.labels, None
    if labelled is not None:
        shown, seed = Splits(*(torch.full_like(y, HIDDEN) for y in data.labels)), LABEL_SEED
        chosen = choose_labelled(data.labels.train, labelled)
        shown.train[chosen] = data.labels.train[chosen]
    return shown, seed


def _streams(seed: int) -> Iterator[torch.Generator]:
    """What the fixed draws of one split after another are from."""
    return (torch.Generator().manual_seed(subseed(seed, i)) for i in count())


def _binarize(x: Tensor, how: str, stream: torch.Generator) -> Tensor:
    if how == "none":
        return x
    if how == "threshold":
        return (x > 0.5).float()
    return torch.bernoulli(x, generator=stream)


def _check_intensities(x: Tensor, scale: float, how: str) -> None:
    low, high = x.min().item() / scale, x.max().item() / scale
    if low < 0 or high > 1:
        raise InputError(
            f"Expected intensities in [0, 1] for binarize={how!r}, got numbers from {low:g} to "
            f"{high:g}; rescale them, or take binarize='none'."
        )


def _labels(arrays: Arrays, index: Splits[Any]) -> tuple[Splits[Tensor] | None, dict[str, Any]]:
    if arrays.y is None:
        return None, {}
    y = torch.from_numpy(arrays.y)
    classes: dict[str, Any] = {} if y.is_floating_point() else {"classes": len(y.unique())}
    names = {} if arrays.classes is None else {"class_names": arrays.classes}
    return Splits(*(y[i] for i in index)), classes | names
