"""Read the JSB chorales: sequences of different lengths, padded, with a mask of what is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from pyrovae._tools import InputError
from pyrovae.data.files import Arrays

# The lowest and the highest note of a piano, as MIDI numbers them.
NOTES = 21, 108
PARTS = "train", "valid", "test"
FILE = "JSB/jsb-chorales-quarter.json"


def read_chorales(root: str | Path | None) -> Arrays:
    """Bach's chorales as uint8 ``[382, 160, 88]``: which keys of a piano sound in each quarter.

    The file has a list of sequences for each split, and each sequence lists the MIDI numbers of
    the notes of its steps. Those behind a sequence's end are masked.

    Args:
        root: The folder that has :data:`FILE`; by default the one that ``PYROVAE_DATA`` names.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it is another one.

    References:
        Boulanger-Lewandowski et al. (arXiv 1206.6392), whose splits these are.
    """
    folder = Path(root or os.environ.get("PYROVAE_DATA") or ".").expanduser()
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected {FILE} in {folder}, got no such file; put it there (czhuang/JSB-Chorales-"
            f"dataset on GitHub has it), or name another folder with --data-root, root= or the "
            f"environment variable PYROVAE_DATA."
        )
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        sequences = [each for part in PARTS for each in parts[part]]
        sizes = [len(parts[part]) for part in PARTS]
        low, high = NOTES
        x = np.zeros((len(sequences), max(map(len, sequences)), high - low + 1), np.uint8)
        mask = np.zeros(x.shape, bool)
        for row, steps in enumerate(sequences):
            mask[row, : len(steps)] = True
            for step, notes in enumerate(steps):
                keys = np.asarray(notes, int) - low
                if ((keys < 0) | (keys > high - low)).any():
                    raise ValueError(f"note {notes}")
                x[row, step, keys] = 1
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"Expected chorales in {path}, lists of notes from {NOTES[0]} to {NOTES[1]} under "
            f"{', '.join(PARTS)}, got another file ({error})."
        ) from error
    return Arrays(x, None, (sizes[0], sizes[1], sizes[2]), mask=mask, sequences=True)
