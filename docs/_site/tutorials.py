"""Run the tutorials, and write each as a page with what its cells print and draw.

    python docs/_site/tutorials.py FILE.py FOLDER

A tutorial is a program in the percent format, which Jupyter (by jupytext), VS Code and PyCharm open
as a notebook: ``# %% [markdown]`` begins text in comments, and ``# %%`` a cell of code.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory

CELL = re.compile(r"^# %%(?: \[(markdown)\])?\n", re.MULTILINE)


def cells(text: str) -> list[tuple[str, str]]:
    """The cells of a program in turn, each ``"markdown"`` or ``"code"`` with its text."""
    first, *rest = CELL.split(text)
    if first.strip():
        raise ValueError("Expected a tutorial to begin with '# %% [markdown]' or '# %%'.")
    found = []
    for kind, body in zip(rest[::2], rest[1::2], strict=True):
        if kind == "markdown":
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip("\n")
        found.append((kind or "code", body.rstrip("\n")))
    return found


def page(path: Path, folder: Path) -> None:
    """Run a tutorial, and write ``NAME.md`` and its figures ``NAME-1.png`` … into a folder.

    Raises:
        Exception: Whatever a cell raises, with its line in the file.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    text = path.read_text(encoding="utf-8")
    names, lines, figures, written = {"__name__": "__main__"}, 0, 0, []
    for (kind, body), start in zip(cells(text), CELL.finditer(text), strict=True):
        if kind == "markdown":
            written.append(body)
            continue
        lines = text.count("\n", 0, start.end())
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * lines + body, str(path), "exec"), names)
        written.append(f"```python\n{body.lstrip()}\n```")
        if printed.getvalue().strip():
            written.append(f"```text\n{printed.getvalue().rstrip()}\n```")
        for number in pyplot.get_fignums():
            name = f"{path.stem}-{(figures := figures + 1)}.png"
            figure = pyplot.figure(number)
            figure.savefig(folder / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
            written.append(f"![{_title(figure, path.stem)}]({name})")
        pyplot.close("all")
    source = f"[{path.name}](../../docs/tutorials/{path.name})"
    written.append(f"*This page is what {source} prints and draws.*")
    (folder / f"{path.stem}.md").write_text("\n\n".join(written) + "\n", encoding="utf-8")


def pages(paths: list[Path]) -> dict[str, bytes]:
    """What every tutorial writes, by the name of the file; each runs in a process of its own.

    Raises:
        RuntimeError: If a cell fails, with its traceback.
    """
    server = multiprocessing.get_context("forkserver")
    # MkDocs takes a hook's folder off the path again, and a process of the server looks there.
    if (here := str(Path(__file__).parent)) not in sys.path:
        sys.path.append(here)
    # Imports take longer than most tutorials, so the processes are forks of one that has done them.
    server.set_forkserver_preload(["pyrovae.cli", "torch._dynamo", "matplotlib.pyplot", "sklearn"])
    options = {"mp_context": server, "max_tasks_per_child": 1}
    with TemporaryDirectory() as folder, ProcessPoolExecutor(os.cpu_count(), **options) as pool:
        done = list(pool.map(_run, paths, repeat(Path(folder))))
        if failed := [said for said in done if said]:
            raise RuntimeError("\n".join(failed))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _run(path: Path, folder: Path) -> str:
    """What went wrong with a tutorial, nothing if it ran."""
    import torch

    torch.set_num_threads(1)
    path, said = path.resolve(), io.StringIO()
    with TemporaryDirectory() as empty, contextlib.chdir(empty), contextlib.redirect_stderr(said):
        try:
            page(path, folder)
        except Exception:
            return f"{path.name} failed:\n{said.getvalue()}{traceback.format_exc()}"
    return ""


def _title(figure, otherwise: str) -> str:
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    return next((title for title in titles if title), otherwise)


if __name__ == "__main__":
    page(Path(sys.argv[1]), Path(sys.argv[2]))
