"""The test NLLs that VAEs are judged by, each with its error, its bounds and its cost.

    PYROVAE_DATA=folder python benchmarks/literature.py [--only ROW ...] [--seed 0] [--epochs E]

MNIST, binarized anew at each use in training, the test images binarized once. Batch 100, Adam, one
cosine of the learning rate with an epoch of warm-up, averaged weights, and the logits' bias set
from the pixels' means; literature_rows.py says what else, and which row another begins with. Each
row trains into a run directory under runs/literature, with a checkpoint after each epoch, and is
then evaluated part by part: a stopped run goes on where it was. Writes results/literature.json row
by row, in nats per datum.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from literature_rows import ROWS, Row
from tables import machine, show, write
from torch import Tensor, nn

import pyrovae
from pyrovae.runs import Run
from pyrovae.runs.config import RunConfig
from pyrovae.runs.experiment import Experiment, resolve
from pyrovae.runs.experiment import train as train_run

HOME = Path(__file__).resolve().parent
RESULTS = HOME / "results" / "literature.json"
RUNS = HOME.parent / "runs" / "literature"
# An evaluation's draws are those of every row and seed.
SEED = 0
POINTS = 40
FIRST = (2000, 5000)
REFINED = {"num_samples": 100, "refine_steps": 200}


def main() -> None:
    options = _options().parse_args()
    for name in options.only or [row.name for row in ROWS]:
        row = _asked(name, options)
        print(f"{row.name}, seed {options.seed}: {row.model} and {row.guide}", flush=True)
        found = run(row, options)
        rows = _add(options.out, f"{row.name}/{options.seed}", found)
    names = ("published", "aim", "NLL", "±", "annealed NLL", "ELBO", "epochs", "hours")
    show([{"row": key} | {n: r[n] for n in names} for key, r in rows.items()], ".2f")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [row.name for row in ROWS]
    parser.add_argument("--only", nargs="*", metavar="ROW", choices=names, help=", ".join(names))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="instead of the row's own")
    parser.add_argument("--before", nargs="*", metavar="EPOCHS", help="of what it begins with, as "
                        "800 or, in two cosines, 800,1200; then of its own")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="train on 60,000 images, 50,000 if not")
    parser.add_argument("--test", type=int, help="so many test images, all if not given")
    parser.add_argument("--samples", type=int, default=5000, help="of log p(x)")
    parser.add_argument("--images", type=int, default=1000, help="to anneal and to refine")
    parser.add_argument("--simulated", type=int, default=100, help="images for the sandwich")
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--temperatures", type=int, default=500)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="narrow networks on digits, a trial")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def run(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Train a row and measure it, or go on with that."""
    folder = _folder(row, options)
    made, history = train(row, folder, options)
    steps = -(-len(made.data.train) // 100)
    return {
        "title": row.title,
        "published": row.published,
        "best reimplementation": row.best,
        "aim": row.aim,
        "source": row.source,
        "programs": [row.model, row.guide],
        "settings": {key: list(v) if isinstance(v, tuple) else v for key, v in row.options.items()},
        "objective": row.objective,
        "particles": row.particles,
        "particles with a gradient": row.backward or row.particles,
        "KL warm-up": _warm_up(row),
        "learning rate": row.lr,
        "data": f"{made.data.name}, {len(made.data.train)} to train on",
        "seed": options.seed,
        "begins with": (row.begins or row.name) if row.before else None,
        "epochs before": _numbers(row.before),
        "epochs": row.epochs,
        "steps": (sum(_numbers(row.before)) + row.epochs) * steps,
        "parameters": _parameters(made.model, made.guide),
        "hours": _spent(row, folder, options, "clock") / 3600,
        "CPU hours": _spent(row, folder, options, "cpu") / 3600,
        "curve of training": _thinned(history),
        **measure(made, folder, options),
        "NLL of the first images": firsts(folder),
    }


def train(row: Row, folder: Run, options: argparse.Namespace) -> tuple[Experiment, list[dict]]:
    """Train a row into its run directory, from its last checkpoint if there is one."""
    resumed = folder.exists()
    given: dict[str, Any] = {
        "model": row.model,
        "guide": row.guide,
        "data": "digits" if options.small else "mnist",
        "binarize": "dynamic",
        "device": options.device,
        "seed": options.seed,
        "settings": [f"{name}={value!r}" for name, value in _settings(row).items()],
        "objective": row.objective,
        "particles": row.particles,
        "epochs": row.epochs,
        "batch_size": 100,
        "lr": row.lr,
        "recipe": "long",
        "lr_warm_up": min(1, row.epochs - 1),
    }
    asked = RunConfig.of(given)
    made = resolve(asked, " ".join(sys.argv), folder if resumed else None)
    data = _all(made.data) if options.all else made.data
    if row.warm_up:
        steps = -(-len(data.train) // 100) * _warm_up(row)
        config = replace(made.config, objective_settings={"warm_up": steps})
        made = made._replace(config=config)
    if row.before and not resumed:
        begin(made, data.train, row, options)
    elif not resumed:
        # The pixels start at their means: one visible line.
        made.model.decoder.last.bias.data = data.train.mean(0).flatten().logit(eps=1e-3)
    made = made._replace(data=data)
    before, started = _cost(folder), time.process_time()

    def after(fit: pyrovae.Fit) -> None:
        last, clock = fit.history[-1], sum(each["seconds"] for each in fit.history)
        spent = before + time.process_time() - started
        folder.write_json("cost.json", {"epochs": len(fit.history), "cpu": spent, "clock": clock})
        print(f"epoch {last['epoch']}/{row.epochs}  loss {last['train_loss']:.2f}  "
              f"ELBO {fit.elbo:.2f}  {last['seconds']:.1f} s", flush=True)  # fmt: skip

    fit = train_run(folder, made, resume=resumed, on_epoch=after)
    return made, fit.history


def begin(made: Experiment, x: Tensor, row: Row, options: argparse.Namespace) -> None:
    """Give a pair the networks of the row that it begins with, trained if need be."""
    other = _begun(row, options)
    print(f"begins with {other.name}, {other.epochs} epochs", flush=True)
    found, _ = train(other, _folder(other, options), options)
    if row.guide == other.guide:
        made.guide.load_state_dict(found.guide.state_dict())
    else:
        _flow_from(found.guide, made.guide)
    made.model.decoder.load_state_dict(found.model.decoder.state_dict())
    if row.model != other.model:
        # Pseudo-inputs start at images, as in the paper's code.
        made.model.pseudo = x[: len(made.model.pseudo)].clamp(0.01, 0.99)
    else:
        made.model.load_state_dict(found.model.state_dict())


@torch.no_grad()
def _flow_from(normal: Any, flow: Any) -> None:
    """Let a flow begin as a normal posterior, which its couplings leave as it is."""
    own = flow.state_dict()
    for name, value in normal.state_dict().items():
        own[name][: len(value)] = value  # its last layer has a third head, of features
    for coupling in flow.couplings:
        last = coupling.nn.layers[-1]
        last.weight.zero_()
        last.bias.zero_()


def measure(made: Experiment, folder: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Every part of an evaluation; those that are finished are kept in the run directory."""
    pair, x = (made.model, made.guide), made.data.test[: options.test]
    few = x[: options.images]
    chains = {"num_chains": options.chains, "num_temperatures": options.temperatures}
    parts: dict[str, tuple[Callable[[Path], dict], list[int]]] = {
        "bound": (lambda _: bound(pair, x), [len(x)]),
        "sampled": (
            lambda path: sampled(pair, x, options.samples, path),
            [len(x), options.samples],
        ),
        "annealed": (lambda path: annealed(pair, few, chains, path), [len(few), *chains.values()]),
        "sandwich": (
            lambda _: sandwich(pair, few, options.simulated, chains),
            [options.simulated, *chains.values()],
        ),
        "refined": (lambda path: refined(pair, few, path), [len(few)]),
    }
    weights, found = folder.weights_checksum(), {}
    for name, (part, protocol) in parts.items():
        about = {"weights": weights, "protocol": protocol}
        file = f"literature-{name}.json"
        kept = folder.read_json(file) if (folder.path / file).exists() else {}
        if kept.get("about") != about:
            started, cpu = time.perf_counter(), time.process_time()
            print(f"  {name} …", flush=True)
            key = "-".join(map(str, [name, weights, *protocol]))
            kept = {"about": about, "found": part(folder.path / f"{key}.checkpoint")}
            kept["found"][f"{name}: seconds"] = time.perf_counter() - started
            kept["found"][f"{name}: CPU seconds"] = time.process_time() - cpu
            folder.write_json(file, kept)
        found |= kept["found"]
    return found


def bound(pair: tuple, x: Tensor) -> dict[str, Any]:
    """The ELBO with its two parts, and how many latents are used."""
    found = pyrovae.diagnose(*pair, x, intervals=False, seed=SEED)
    return {
        "ELBO": found.elbo.double().mean().item(),
        "rate": found.rate.double().mean().item(),
        "distortion": found.distortion.double().mean().item(),
        "active units": {name: site.active_units for name, site in found.sites.items()},
    }


def sampled(pair: tuple, x: Tensor, samples: int, checkpoint: Path) -> dict[str, Any]:
    """Importance sampling from the guide, the estimate that is published."""
    found = pyrovae.log_likelihood(
        *pair, x, num_samples=samples, seed=SEED, checkpoint=checkpoint, progress=True
    )
    # For differences that are paired image by image.
    torch.save(found.log_prob, checkpoint.with_name("literature-log-prob.pt"))
    assert found.curve is not None
    points = found.curve.mean
    return {
        "NLL": -found.mean,
        "±": found.mean_standard_error,
        "± over data": found.data_standard_error,
        "samples": samples,
        "test images": len(x),
        "k-hat > 0.7": found.khat.gt(0.7).double().mean().item(),
        "curve": {"samples": list(points), "NLL": [-value for value in points.values()]},
    }


def firsts(folder: Run) -> dict[str, float]:
    """The NLL of the first test images, beside which rows stand that were measured on these."""
    each = torch.load(folder.path / "literature-log-prob.pt", weights_only=True).double()
    return {f"{n}": -each[:n].mean().item() for n in FIRST if n <= len(each)}


def annealed(pair: tuple, x: Tensor, chains: dict[str, int], checkpoint: Path) -> dict[str, Any]:
    """Annealed importance sampling, beside importance sampling of the same images."""
    found = pyrovae.annealed_log_likelihood(
        *pair, x, **chains, seed=SEED, checkpoint=checkpoint, progress=True
    )
    # Of the same images, to compare with.
    sampled = torch.load(checkpoint.with_name("literature-log-prob.pt"), weights_only=True)
    return {
        "annealed NLL": -found.mean,
        "annealed ±": found.mean_standard_error,
        "NLL of these images": -sampled[: len(x)].double().mean().item(),
        "annealed images": len(x),
        **chains,
    }


def sandwich(pair: tuple, x: Tensor, n: int, chains: dict[str, int]) -> dict[str, Any]:
    """How far annealing may be too low, on images of the model's own."""
    found = pyrovae.bidirectional(*pair, like=x, n=n, **chains, seed=SEED, progress=True)
    return {
        "bidirectional gap": found.mean_gap,
        "bidirectional gap ±": found.mean_gap_standard_error,
        "simulated images": n,
    }


def refined(pair: tuple, x: Tensor, checkpoint: Path) -> dict[str, Any]:
    """What a guide loses by being one network for all images."""
    found = pyrovae.log_likelihood(
        *pair, x, **REFINED, seed=SEED, checkpoint=checkpoint, progress=True
    )
    assert found.amortization_gap is not None
    gap = found.amortization_gap.double()
    return {
        "amortization gap": gap.mean().item(),
        "amortization gap ±": gap.std().item() / len(gap) ** 0.5,
    }


def _all(data: pyrovae.Dataset) -> pyrovae.Dataset:
    """The validation images among those to train on."""
    grey = pyrovae.load_data(data.name, binarize="none")
    both = torch.cat([grey.train, grey.valid]).to(data.train.device)
    levels = (both * data.scale).round().to(torch.uint8)
    return replace(data, train=torch.cat([data.train, data.valid]), valid=None, intensities=levels)


def _settings(row: Row) -> dict[str, Any]:
    """The programs' settings, and the objective's."""
    return row.options | ({"objective.backward": row.backward} if row.backward else {})


def _warm_up(row: Row) -> int:
    """Epochs in which the weight of the KL rises, at most a quarter, none of a row's going on."""
    begun = len(row.before) > bool(row.begins)
    return 0 if begun else min(row.warm_up, row.epochs // 4)


def _folder(row: Row, options: argparse.Namespace) -> Run:
    epochs = "+".join(map(str, [*row.before, row.epochs]))
    split = "all" if options.all else "split"
    return Run(options.runs / f"{row.name}-{split}-{epochs}-{options.seed}")


def _begun(row: Row, options: argparse.Namespace) -> Row:
    """What a row begins with: itself after fewer epochs, or another row."""
    if len(row.before) == 1 and row.begins:
        other = next(each for each in ROWS if each.name == row.begins)
        other = _small(other) if options.small else other
        *first, last = row.before[0].split(",")
    else:
        other, (*first, last) = row, row.before
    return replace(other, epochs=int(last), before=tuple(first))


def _numbers(before: Iterable[str]) -> list[int]:
    return [int(epochs) for each in before for epochs in each.split(",")]


def _spent(row: Row, folder: Run, options: argparse.Namespace, what: str) -> float:
    """Seconds of all epochs, with those of the row that it begins with."""
    first = 0.0
    if row.before:
        other = _begun(row, options)
        first = _spent(other, _folder(other, options), options, what)
    return first + folder.read_json("cost.json")[what]


def _cost(folder: Run) -> float:
    """CPU seconds of the epochs that are in the checkpoint."""
    path = folder.path / "cost.json"
    return folder.read_json("cost.json")["cpu"] if path.exists() else 0.0


def _parameters(*programs: nn.Module) -> int:
    return sum({id(p): p.numel() for each in programs for p in each.parameters()}.values())


def _thinned(history: list[dict]) -> dict[str, list]:
    """Some epochs of the history, the last among them."""
    chosen = [r for i, r in enumerate(reversed(history)) if i % -(-len(history) // POINTS) == 0]
    names = ("epoch", "train_loss", "valid_elbo")
    return {name: [row[name] for row in reversed(chosen)] for name in names}


def _add(path: Path, key: str, found: dict[str, Any]) -> dict[str, dict]:
    """Write a row beside those that others have written meanwhile, in the order of the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
        rows[key] = found | {"machine": machine()}
        order = [row.name for row in ROWS]
        rows = dict(sorted(rows.items(), key=lambda each: _place(each[0], order)))
        write(path, {"rows": rows})
    return rows


def _place(key: str, order: Iterable[str]) -> tuple[int, int]:
    name, _, seed = key.rpartition("/")
    return list(order).index(name), int(seed)


def _asked(name: str, options: argparse.Namespace) -> Row:
    """A row for the epochs that are asked for."""
    row = next(row for row in ROWS if row.name == name)
    row = _small(row) if options.small else row
    before = row.before if options.before is None else tuple(options.before)
    return replace(row, epochs=options.epochs or row.epochs, before=before)


def _small(row: Row) -> Row:
    """The same row with narrow networks and few samples."""

    def narrow(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(narrow, value))
        return min(value, 4) if isinstance(value, int) else value

    options = {name: narrow(value) for name, value in row.options.items()}
    backward = row.backward and min(row.backward, 2)
    return replace(row, options=options, particles=min(row.particles, 3), backward=backward,
                   epochs=2, before=("1",) * len(row.before))  # fmt: skip


if __name__ == "__main__":
    main()
