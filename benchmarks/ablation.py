"""What each part of a recipe for long trainings is worth, in nats, at the same number of steps.

    PYROVAE_DATA=folder python benchmarks/ablation.py [--only NAME ...] [--epochs E] [--lr RATE]

784-200-200-50 on MNIST, 50,000 images binarized anew at each use, batch 100. Each variant differs
from the recipe (Adam, one cosine of the rate, averaged weights) in one thing, and trains from the
same seed in the same order of the data. log p(x) is estimated with 1,000 draws, the same for all,
on validation images, where every choice is made; test images are for the table alone. A stopped
variant goes on where it was. Writes results/ablation.json and its figure after each.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from ablation_figure import draw
from tables import machine, show, write

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.objectives import make_objective
from pyrovae.optim import muon

HOME = Path(__file__).resolve().parent
RESULTS = HOME / "results" / "ablation.json"
FIGURE = HOME.parent / "docs" / "figures" / "ablation.png"
RUNS = HOME.parent / "runs" / "ablation"
BATCH = 100
# The share of the training in which the weight of the KL rises.
WARM_UP = 1 / 5
# What another seed changes in an NLL, by its standard deviation in earlier runs (0.05 to 0.18).
SEED_SD = 0.12
# Draws of an evaluation are those of every variant.
SEED = 0
COSINE = {"schedule": "cosine", "lr_warm_up": 1}
AVERAGE = {"average": 0.999}
RECIPE = COSINE | AVERAGE
BASE = "recipe"


@dataclass(frozen=True)
class Variant:
    """How a pair is trained: arguments of ``fit``, and what else is other than in the recipe.

    ``options`` may be a function of the pair, the rate and the steps of an epoch. An ``addition``
    to the recipe may be a part of what helps ``together``.
    """

    title: str
    options: dict[str, Any] | Callable[..., dict[str, Any]] = field(default_factory=lambda: RECIPE)
    gated: bool = False
    mean: bool = False
    warm_up: bool = False
    addition: bool = False


def _muon(model: Bernoulli, guide: MeanField, lr: float, steps: int) -> dict[str, Any]:
    # Those that read and write the pixels are none of the hidden ones.
    outer = [guide.encoder.layers[0].weight, model.decoder.last.weight]
    return RECIPE | {"optimizer": partial(muon, lr=lr, others=outer)}


def _schedule_free(model: Bernoulli, guide: MeanField, lr: float, steps: int) -> dict[str, Any]:
    # It is instead of a schedule and of an average; its rate is its own default.
    from schedulefree import AdamWScheduleFree

    return {"optimizer": partial(AdamWScheduleFree, lr=2.5e-3, warmup_steps=steps)}


NORMALIZED = RECIPE | {"normalize_gradients": True}
VARIANTS = {
    BASE: Variant("the recipe: cosine and averaged weights"),
    "constant": Variant("constant rate, no average", {}),
    "cosine": Variant("cosine alone", COSINE),
    "mean": Variant("recipe + bias from the data's mean", mean=True, addition=True),
    "gated": Variant("recipe + gated layers", gated=True, addition=True),
    "kl": Variant("recipe + KL warm-up", warm_up=True, addition=True),
    "schedule-free": Variant("schedule-free AdamW instead", _schedule_free),
    "muon": Variant("recipe, Muon instead of Adam", _muon),
    "normalized": Variant("recipe + normalized gradients", NORMALIZED, addition=True),
    "adamw": Variant("recipe, AdamW instead of Adam", RECIPE | {"optimizer": torch.optim.AdamW}),
    "average": Variant("averaged weights alone", AVERAGE),
}
TOGETHER = "together"


def main() -> None:
    options = _options().parse_args()
    torch.set_num_threads(1)
    data = pyrovae.load_data("digits" if options.small else "mnist", binarize="dynamic")
    names = options.only or [*VARIANTS]
    cells = [_Cell(n, VARIANTS[n], seed, data, options) for seed in options.seeds for n in names]
    for cell in cells:
        cell.measured("valid")
        found = report(options)
    if not options.only and len(found["worth adding"]) > 1:
        joined = _joined({name: VARIANTS[name] for name in found["worth adding"]})
        cells.append(_Cell(TOGETHER, joined, options.seeds[0], data, options))
        cells[-1].measured("valid")
    for cell in cells:
        cell.measured("test")
        found = report(options)
    columns = ("validation NLL", "less the recipe", "±", "test NLL", "CPU minutes")
    rows = found["rows"].items()
    show([{"variant": key} | {n: r.get(n, "") for n in columns} for key, r in rows], ".3f")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=[*VARIANTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=2000, help="of each split")
    parser.add_argument("--samples", type=int, default=1000, help="of log p(x)")
    parser.add_argument("--small", action="store_true", help="narrow networks on digits, a trial")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    return parser


def _joined(chosen: dict[str, Variant]) -> Variant:
    """The recipe with all that was found to help."""
    given: dict[str, Any] = dict(RECIPE)
    for variant in chosen.values():
        given |= variant.options if isinstance(variant.options, dict) else {}
    flags = ("gated", "mean", "warm_up")
    on = {flag: any(getattr(v, flag) for v in chosen.values()) for flag in flags}
    return Variant(f"recipe + {' + '.join(chosen)}", given, **on)


class _Cell:
    """One variant from one seed: trained and measured where that is not done yet."""

    def __init__(
        self,
        name: str,
        variant: Variant,
        seed: int,
        data: pyrovae.Dataset,
        options: argparse.Namespace,
    ) -> None:
        self.variant, self.seed, self.data, self.options = variant, seed, data, options
        self.key = f"{name}/{seed}"
        options.runs.mkdir(parents=True, exist_ok=True)
        self.path = options.runs / f"{name}-{_budget(options)}-{seed}.pt"

    def measured(self, split: str) -> None:
        """Estimate log p(x) of the first images of a split, if that is not done yet."""
        if split in _kept(self.path):
            return
        pair, found = self.trained()
        x = self.data.split(split)[0][: self.options.images]
        started = time.process_time()
        each = pyrovae.log_likelihood(*pair, x, num_samples=self.options.samples, seed=SEED)
        assert each.khat is not None
        found[split] = {
            "log_prob": each.log_prob.double(),
            "standard_error": each.standard_error.double(),
            "k-hat > 0.7": each.khat.gt(0.7).double().mean().item(),
        }
        _keep(self.path, found)
        print(f"{self.key} {split} NLL {-each.mean:.3f}  {time.process_time() - started:.0f} CPU s",
              flush=True)  # fmt: skip

    def trained(self) -> tuple[tuple[Bernoulli, MeanField], dict[str, Any]]:
        """The trained pair, and what is kept of it; what is trained to its end comes as it is."""
        found, pair, options = _kept(self.path), self._pair(), self.options
        steps = -(-len(self.data.train) // BATCH)
        given = self.variant.options
        given = dict(given(*pair, options.lr, steps) if callable(given) else given)
        objective: Any = "trace_mean_field_elbo"
        if self.variant.warm_up:
            rising = max(1, round(WARM_UP * options.epochs)) * steps
            objective = make_objective("warm_up_elbo", warm_up=rising)
        found |= {"title": self.variant.title, "parameters": _parameters(*pair)}
        before, started = found.get("cpu", 0.0), time.process_time()

        def after(fit: pyrovae.Fit) -> None:
            found["state"] = fit.state_dict()
            found["cpu"] = before + time.process_time() - started
            _keep(self.path, found)
            row = fit.history[-1]
            print(f"{self.key} epoch {row['epoch']}/{options.epochs}  "
                  f"ELBO {row['valid_elbo']:.2f} (validation)  {row['seconds']:.1f} s",
                  flush=True)  # fmt: skip

        pyrovae.fit(
            *pair, self.data, objective=objective, epochs=options.epochs, batch_size=BATCH,
            lr=options.lr, seed=self.seed, state=found.get("state"), on_epoch=after,
            progress=False, **given,
        )  # fmt: skip
        return pair, found

    def _pair(self) -> tuple[Bernoulli, MeanField]:
        pyro.set_rng_seed(self.seed)
        width, latent = (8, 4) if self.options.small else (200, 50)
        settings: dict[str, Any] = {"latent": latent, "hidden": (width, width)}
        settings["activation"] = "GLU" if self.variant.gated else "Tanh"
        shape, mean = tuple(self.data.shape), self.data.train.mean(0)
        model = Bernoulli(shape, mean=mean if self.variant.mean else None, **settings)
        return model, MeanField(shape, **settings)


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Write what is known of all variants, each beside the recipe from the same seed."""
    known: dict[str, dict[str, Any]] = {}
    for name in (*VARIANTS, TOGETHER):
        for path in sorted(options.runs.glob(f"{name}-{_budget(options)}-*.pt")):
            if "valid" in (kept := _kept(path)):
                known[f"{name}/{path.stem.rpartition('-')[2]}"] = kept
    rows = {}
    for key, kept in known.items():
        base = known.get(f"{BASE}/{key.rpartition('/')[2]}")
        history = kept["state"]["history"]
        rows[key] = {
            "title": kept["title"],
            "parameters": kept["parameters"],
            "validation ELBO": history[-1]["valid_elbo"],
            **_split(kept, base, "valid", "validation NLL", ""),
            **_split(kept, base, "test", "test NLL", "test: "),
            "CPU minutes": kept["cpu"] / 60,
            "curve": [row["valid_elbo"] for row in history],
        }
    first = {key.partition("/")[0]: row for key, row in rows.items() if key.endswith("/0")}
    worth = [n for n, r in first.items() if n in VARIANTS and VARIANTS[n].addition and _beyond(r)]
    found = {
        "epochs": options.epochs,
        "batch": BATCH,
        "learning rate": options.lr,
        "images": options.images,
        "samples": options.samples,
        "seed sd": SEED_SD,
        "rows": rows,
        "worth adding": worth,
        "machine": machine(),
    }
    write(options.out, found)
    draw(found, options.figure)
    return found


def _split(
    kept: dict[str, Any], base: dict[str, Any] | None, split: str, name: str, prefix: str
) -> dict[str, float]:
    """The NLL of a split's images, and what it is less than the recipe's, image by image."""
    if split not in kept:
        return {}
    own = kept[split]["log_prob"]
    found = {
        name: -own.mean().item(),
        f"{prefix}± over data": own.std().item() / len(own) ** 0.5,
        f"{prefix}± Monte Carlo": kept[split]["standard_error"].square().sum().sqrt().item()
        / len(own),
        f"{prefix}k-hat > 0.7": kept[split]["k-hat > 0.7"],
    }
    if base is None or split not in base:
        return found
    each = base[split]["log_prob"] - own
    return found | {
        f"{prefix}less the recipe": each.mean().item(),
        f"{prefix}±": each.std().item() / len(own) ** 0.5,
    }


def _beyond(row: dict[str, Any]) -> bool:
    """Whether a variant is better than the recipe by more than twice what its noise is."""
    if "±" not in row:
        return False
    noise = math.hypot(row["±"], math.sqrt(2) * SEED_SD)
    return row["less the recipe"] < -2 * noise


def _budget(options: argparse.Namespace) -> str:
    return f"{options.epochs}x{options.lr:g}"


def _kept(path: Path) -> dict[str, Any]:
    """A variant's training state, title and results by split, as far as they are there."""
    return torch.load(path, weights_only=True) if path.exists() else {}


def _keep(path: Path, found: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(found, part)
    part.replace(path)


def _parameters(*programs: torch.nn.Module) -> int:
    return sum(p.numel() for each in programs for p in each.parameters())


if __name__ == "__main__":
    main()
