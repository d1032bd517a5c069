"""Read folders of image files, and draw a set of coloured shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyrovae._tools import InputError
from pyrovae.data.files import Arrays, check_memory, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

# torchvision's IMG_EXTENSIONS, without importing it for a list.
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)
GREY, COLOUR, PALETTE = ("1", "L"), ("RGB", "CMYK", "YCbCr"), ("P", "PA", "LA", "La", "RGBA")
SPLITS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
TURNED = 5  # from this EXIF orientation on, width and height are exchanged
ORIENTATION = 0x0112
SHAPES = ("disc", "square", "triangle")


def read_folder(folder: Path) -> tuple[Arrays, str]:
    """Read the images of a folder as uint8 ``[N, 1 or 3, H, W]``, and the digest of its files.

    Laid out as torchvision's ImageFolder has them, ``class/a.png``, the folders are the labels, in
    alphabetical order; files at the top have no labels. Above them may stand ``train/``, ``test/``
    and ``valid/`` (or ``val/``), which fix the splits. Files are taken in alphabetical order, and
    photographs turned as their EXIF orientation says. Where all images are grey there is one
    channel, else there are three.

    Args:
        folder: Where they are. Other files, and hidden ones, are passed over.

    Raises:
        ValueError: If there is no image, or one that is damaged, transparent, of more than 8 bits
            or of another size than the first one; the message names the file.
    """
    parts = _parts(folder)
    files = [(part, file) for part, top in parts for file in _files(top)]
    if not files:
        raise InputError(
            f"Expected images in {folder}, at its top or in a folder for each class, got no file "
            f"that ends in {', '.join(IMAGE_SUFFIXES)}."
        )
    tops = dict(parts)
    labels = _labels([file.relative_to(tops[part]).parts[:-1] for part, file in files], folder)
    x = _read([file for _, file in files])
    digest = hashlib.sha256()
    for _, file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    classes = None if labels is None else sorted(set(labels))
    y = None if classes is None else np.searchsorted(classes, labels or []).astype(np.int64)
    counts = [sum(part == name for part, _ in files) for name in ("train", "valid", "test")]
    sizes = None if len(parts) == 1 else (counts[0], counts[1], counts[2])
    return Arrays(x, y, sizes, classes), digest.hexdigest()


def draw_shapes(n: int = 3000, size: int = 16, seed: int = 0) -> Arrays:
    """Draw discs, squares and triangles of any colour, place and size on a dark ground.

    Args:
        n: How many.
        size: Height and width, in pixels.
        seed: The seed; the same one draws the same images everywhere.

    Returns:
        uint8 ``[n, 3, size, size]``, with the shape as its label ``[n]``.
    """
    rng = np.random.RandomState(seed)
    y = np.arange(n) % len(SHAPES)
    centre, radius = rng.uniform(0.35, 0.65, (2, n, 1, 1)), rng.uniform(0.16, 0.3, (n, 1, 1))
    hue, ground = rng.uniform(0, 1, (n, 1)), rng.uniform(0, 0.3, (n, 1, 1, 1))
    fine = 4 * size  # a pixel is the mean of 4 x 4 points, so that edges are smooth
    down, across = np.meshgrid(*2 * [(np.arange(fine) + 0.5) / fine], indexing="ij")
    v, u = (down - centre[0]) / radius, (across - centre[1]) / radius
    inside = [u**2 + v**2 < 1, np.maximum(abs(u), abs(v)) < 0.85, (v < 0.7) & (2 * abs(u) - v < 1)]
    drawn = np.select([(y == k)[:, None, None] for k in range(len(SHAPES))], inside)
    cover = drawn.reshape(n, 1, size, 4, size, 4).mean((3, 5))
    # Each channel is a bump around its own hue on the circle of hues.
    far = abs((hue - np.array([0, 1 / 3, 2 / 3]) + 0.5) % 1 - 0.5)
    colour = np.clip(2 - 6 * far, 0, 1)[:, :, None, None]
    x = np.rint(255 * (ground + cover * (colour - ground)))
    return Arrays(x.astype(np.uint8), y.astype(np.int64), classes=list(SHAPES))


def _parts(folder: Path) -> list[tuple[str, Path]]:
    """The folders of the splits in their order; the whole folder where there are none."""
    below = {path.name: path for path in _entries(folder) if path.is_dir()}
    found = sorted((SPLITS[n], path) for n, path in below.items() if n in SPLITS)
    names = [name for name, _ in found]
    if len(found) < len(below) or not {"train", "test"} <= {*names}:
        return [("", folder)]
    if len({*names}) < len(names) or any(path.is_file() for path in _images(folder)):
        raise InputError(
            f"Expected images in {folder} under train/, test/ and one of valid/ and val/ alone, "
            f"got {', '.join(sorted(path.name for path in _entries(folder)))}."
        )
    return sorted(found, key=lambda each: ("train", "valid", "test").index(each[0]))


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def _files(folder: Path) -> Iterator[Path]:
    for path in _entries(folder):
        if path.is_dir():
            yield from _files(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield path


def _labels(parents: Sequence[tuple[str, ...]], folder: Path) -> list[str] | None:
    """The class of each file, the first folder it lies in; None where they lie at the top."""
    names = [parent[0] if parent else None for parent in parents]
    classes = [name for name in names if name is not None]
    if not classes:
        return None
    if len(classes) < len(names):
        raise InputError(
            f"Expected images in {folder} either at its top or in a folder for each class, got "
            f"{len(names) - len(classes)} at the top beside the folder {classes[0]!r}."
        )
    return classes


def _read(files: Sequence[Path]) -> np.ndarray:
    """Images ``[N, C, H, W]``: their headers are looked at first, so that nothing is in vain."""
    modes, first = set(), None
    for file in files:
        with _opened(file) as image:
            size, mode = _size(image), image.mode
        first = first or size
        if size != first:
            raise InputError(
                f"Expected images of one size, got {first[0]}x{first[1]} in {files[0]} and "
                f"{size[0]}x{size[1]} in {file} (width x height): crop or resize them first."
            )
        if mode not in GREY + COLOUR + PALETTE:
            raise InputError(
                f"Expected images of 8 bits a channel, got mode {mode} in {file}: convert it, or "
                f"save an array of float32 as .npy."
            )
        modes.add(mode)
    grey = modes <= {*GREY, "LA"}
    width, height = first or (0, 0)
    check_memory(len(files) * (1 if grey else 3) * width * height, files[0].parent)
    x = np.empty((len(files), 1 if grey else 3, height, width), np.uint8)
    for row, file in zip(x, files, strict=True):
        row[:] = _pixels(file, grey)
    return x


def _pixels(file: Path, grey: bool) -> np.ndarray:
    from PIL import ImageOps

    with _opened(file) as found:
        image = ImageOps.exif_transpose(found)
        if image.has_transparency_data:
            image = image.convert("LA" if grey else "RGBA")
            if np.asarray(image)[..., -1].min() < 255:
                raise InputError(
                    f"Expected opaque images, got transparent pixels in {file}: lay it on a "
                    f"background first."
                )
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[None] if grey else np.moveaxis(pixels, -1, 0)


def _size(image: Image) -> tuple[int, int]:
    turned = image.getexif().get(ORIENTATION, 1) >= TURNED
    return image.size[::-1] if turned else image.size


@contextmanager
def _opened(file: Path) -> Iterator[Image]:
    """A file as an image, in a sentence that names it where it cannot be read."""
    from PIL import Image

    too_large = Image.DecompressionBombError, Image.DecompressionBombWarning
    try:
        with Image.open(file) as image:
            yield image
    except InputError:
        raise
    # Pillow says in all these ways that a file is broken.
    except (OSError, SyntaxError, ValueError, EOFError, *too_large) as error:
        raise InputError(
            f"Expected an image in {file}, got a file that is damaged, too large or of another "
            f"kind ({one_line(error)})."
        ) from error
