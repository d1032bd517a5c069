"""Where an evaluation of a run keeps its finished data, until its results are written."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyrovae.evidence.tiles import read_about
from pyrovae.runs import Run
from pyrovae.training.distributed import World

__all__ = ["Unfinished"]


class Unfinished:
    """Files of finished data in a run's folder ``evaluation/``, one for each kind of evaluation.

    Their names tell one evaluation from another, so that those of other settings, of other
    weights or of other numbers of processes stay where they are. Used as a context, it leaves no
    empty folder.

    Args:
        run: The run.
        split: The split that is evaluated.
        world: The processes that share the data; each has a file of its own.
        about: What all its evaluations depend on, ready for JSON.
        fresh: Begin anew, whatever is there.
    """

    def __init__(
        self, run: Run, split: str, world: World, about: dict[str, Any], *, fresh: bool = False
    ) -> None:
        self.run, self.split, self.world = run, split, world
        self.about, self.fresh = about | {"processes": world.size}, fresh
        self.files: list[Path] = []

    def __enter__(self) -> Unfinished:
        self.run.folder("evaluation")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            (self.run.path / "evaluation").rmdir()

    def file(self, **settings: Any) -> Path:
        """The file of an evaluation with these settings; one that cannot be read is put aside."""
        key = json.dumps(self.about | settings, sort_keys=True).encode()
        name = f"{self.split}-{hashlib.sha256(key).hexdigest()[:12]}.checkpoint"
        path = self.run.path / "evaluation" / name
        self.files.append(path)
        own = path if self.world.size == 1 else path.with_name(f"{name}.{self.world.rank}")
        if self.fresh:
            own.unlink(missing_ok=True)
        elif own.exists():
            try:
                read_about(own)
            except ValueError:
                own.replace(own.with_name(f"{own.name}.damaged"))
        return path

    def remove(self) -> None:
        """Remove the files of the evaluations that were asked for: all results are written."""
        for path in self.files:
            for each in (path, *path.parent.glob(f"{path.name}.[0-9]*")):
                each.unlink(missing_ok=True)
