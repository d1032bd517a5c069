"""Write the tables that the documents quote from benchmarks/results/ into the documents.

    python benchmarks/quote.py [--check]

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; --check changes nothing and exits
with 1 where a document does not say what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import ablation_tables
import annealing_tables
import evaluation_tables
import few_backward
import gallery_tables
import imputation_tables
import literature_tables
import scaling_tables
import sequences_tables
import sources_tables
import speed_parts
import speed_tables
import subnormal
from tables import markdown

HOME = Path(__file__).resolve().parent
DOCUMENTS = tuple(
    HOME.parent / path
    for path in (
        "README.md",
        "docs/benchmarks.md",
        "docs/evaluation.md",
        "docs/imputation.md",
        "docs/literature.md",
        "docs/models.md",
        "docs/objectives.md",
        "docs/sequences.md",
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = quoted(before)
        if check and before != after:
            raise SystemExit(f"{path.name} does not quote the results: run benchmarks/quote.py")
        path.write_text(after, encoding="utf-8")


def quoted(text: str) -> str:
    """A document with every table as the results have it."""

    def fill(found: re.Match) -> str:
        return f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def mnist() -> str:
    rows = _results("mnist")["trained"]
    head = ["trained by", "test ELBO, A", "test ELBO, B", "log p(x), K = 1000", "k-hat > 0.7"]
    body = [
        [
            f"`{row['trained by']}`" if "." in row["trained by"] else "hand-written PyTorch",
            f"{row['test ELBO A']:.2f}",
            f"{row['test ELBO B']:.2f}",
            f"{row['log p(x)']:.2f} ± {row['±']:.3f}",
            f"{row['k-hat > 0.7']:.0%} of the images",
        ]
        for row in rows
    ]
    return markdown(head, body)


def exact() -> str:
    rows = _results("elbo")["exact"]
    head = ["decoder", "estimator", "dtype", "value, relative", "gradient, relative"]
    groups = {(row["decoder"], row["estimator"], row["dtype"]): [] for row in rows}
    for row in rows:
        groups[row["decoder"], row["estimator"], row["dtype"]].append(row)
    body = [
        [*key, *(f"{max(row[f'{of} rel'] for row in found):.1e}" for of in ("value", "gradient"))]
        for key, found in groups.items()
    ]
    return markdown(head, body)


def slopes() -> str:
    rows = _results("elbo")["variance"]
    head = ["decoder", "weights", "against", "of", "slope, A", "slope, B"]
    body = [
        [
            *(row[name] for name in ("decoder", "weights", "against", "of")),
            f"{row['slope A']:.3f} ± {row['± A']:.3f}",
            f"{row['slope B']:.3f} ± {row['± B']:.3f}",
        ]
        for row in rows
    ]
    return markdown(head, body)


def races() -> str:
    rows = _results("elbo")["races"]
    head = ["L", "M", "rows a step", "test ELBO after 2,000 steps", "against (1, 128)"]
    body = [
        [
            str(row["L"]),
            str(row["M"]),
            str(row["rows a step"]),
            f"{row['test ELBO']:.2f} ± {row['±']:.2f}",
            f"{row['difference']:+.2f} ± {row['± of it']:.2f}" if row["difference"] else "–",
        ]
        for row in rows
    ]
    return markdown(head, body)


def curves() -> str:
    rows = _results("elbo")["curves"]
    head = ["decoder", "estimator", "dtype", "`pyro.infer.SVI`", "`pyrovae.SVI`"]
    body = [
        [row["decoder"], row["estimator"], row["dtype"]]
        + [f"{row[name]:.1e}" for name in ("pyro", "pyrovae")]
        for row in rows
    ]
    return markdown(head, body)


def generation() -> str:
    found = _results("generate")
    about, images = found["about"], found["images"]
    names = ("eager", "compiled", "of it capture", "products alone")
    ratios = ("eager / products", "compiled / products")
    head = [f"{images:,} images", *(f"{name}, s" for name in names), *ratios, "pays after"]
    body = [
        [
            f"`{row['task']}`, {row['networks']}",
            *(f"{row[name]:#.3g}" for name in names),
            *(f"{row[name]:.2f}" for name in ratios),
            f"{row['pays after']:,.0f}" if row["pays after"] else "–",
        ]
        for row in found["seconds"]
    ]
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    return (
        f"{about['processor']}, {threads}, {about['dtype']}, {about['rounds']} rounds, torch "
        f"{about['versions']['torch']}:\n\n{markdown(head, body)}"
    )


def generation_memory() -> str:
    rows = _results("generate")["memory"]
    sizes = [name for name in rows[0] if name != "task"]
    body = [[f"`{row['task']}`", *(f"{row[name]:.0f}" for name in sizes)] for row in rows]
    return markdown(["784-400-20", *sizes], body)


def counts() -> str:
    found = _results("counts")
    levels = {"the truth, by quadrature": [found["truth"]]}
    levels["the tutorial's, 60 epochs"] = [found["tutorial"]]
    for name, shown in (
        ("pyrovae, zinb", "the same, 400 epochs"),
        ("scvi-tools, zinb", "`scvi-tools`, ZINB, 400 epochs"),
        ("scvi-tools, nb", "`scvi-tools`, NB, 400 epochs"),
    ):
        levels[shown] = [row["log p(x)"] for row in found[name]["seeds"]]
    body = [
        [name, f"{mean(each):.2f}", f"{found['truth'] - mean(each):.2f}", str(len(each))]
        for name, each in levels.items()
    ]
    body[0][2:] = ["", ""]
    return markdown(["model", "log p(x) of a test cell", "below the truth", "trainings"], body)


TABLES: dict[str, Callable[[], str]] = (
    {
        table.__name__: table
        for table in (mnist, exact, slopes, races, curves, generation, generation_memory, counts)
    }
    | speed_tables.TABLES
    | gallery_tables.TABLES
    | evaluation_tables.TABLES
    | few_backward.TABLES
    | ablation_tables.TABLES
    | annealing_tables.TABLES
    | imputation_tables.TABLES
    | literature_tables.TABLES
    | sequences_tables.TABLES
    | scaling_tables.TABLES
    | sources_tables.TABLES
    | speed_parts.TABLES
    | subnormal.TABLES
)


def _results(name: str) -> dict:
    return json.loads((HOME / "results" / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
