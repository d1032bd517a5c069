"""The ELBO by hand against Pyro's: values, gradients, variances, training.

    python benchmarks/elbo.py [--data digits|mnist] [--quick]

Four tables, for estimators A (arXiv 1312.6114, equation 6; Trace_ELBO) and B (equations 7 and 10;
TraceMeanField_ELBO): (1) the same numbers from the same weights and noise; (2) the same
expectation, with errors that fall as 1/√L and 1/√M; (3) training at equal cost with many samples
or with many data; (4) the same training curves. Writes results/elbo.json and, beside the
documentation, figures/elbo.png, and exits with 1 where a number is not as promised. All values are
in nats per datum, for one Bernoulli and one Gaussian decoder (its scale learned).
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import torch
from elbo_figure import draw
from elbo_setting import DTYPES, LR, MODELS, PYRO, Setting, load
from elbo_spread import scaling, spread, standard_error
from tables import machine, show, write
from torch import nn

import pyrovae
from handwritten import VAE, adam, evaluate, pair_parameters, step
from pyrovae._tools.seeding import seeded
from pyrovae.objectives import estimate
from pyrovae.pairs.pair import Pair

HERE = Path(__file__).resolve().parent
SIZES_L, SIZES_M = (1, 2, 5, 10, 50), (16, 32, 64, 128, 256)
RACES = ((1, 128), (4, 32), (16, 8), (10, 128))
COUNTS = {
    "digits": {"pairs": 200, "steps": 2000, "seeds": 5, "curve": 200},
    "mnist": {"pairs": 25, "steps": 1000, "seeds": 3, "curve": 200},
}
QUICK = {"pairs": 25, "steps": 200, "seeds": 2, "curve": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=COUNTS, default="digits")
    parser.add_argument("--quick", action="store_true", help="fewer draws, steps and seeds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = QUICK if options.quick else COUNTS[options.data]
    setting = load(options.data, options.seed)
    started = time.perf_counter()
    results = {
        "about": vars(options) | counts | setting.sizes | {"lr": LR} | machine(),
        "exact": exact(setting),
        "variance": variance(setting, counts["pairs"]),
        "races": races(setting, counts["steps"], counts["seeds"], counts["pairs"]),
        "curves": curves(setting, counts["curve"]),
    }
    results["about"]["seconds"] = round(time.perf_counter() - started)
    results["broken promises"] = broken = broken_promises(results)
    name = "elbo" if options.data == "digits" else f"elbo_{options.data}"
    write(HERE / "results" / f"{name}.json", results)
    draw(results, HERE.parent / "docs" / "figures" / f"{name}.png")
    print(f"\n{results['about']['seconds']} s; written: results/{name}.json, figures/{name}.png")
    if broken:
        raise SystemExit("Not as promised: " + "; ".join(broken) + ".")


# (1) the same values and the same gradients


def exact(setting: Setting) -> list[dict]:
    print(
        "\n(1) Hand-written against Pyro's own loss and against pyrovae's: same weights and noise,"
        "\n64 data, L = 1 and 10. Relative differences: of a value, to the value; of a gradient's"
        "\nentry, to the largest entry of that parameter's gradient. Shown is the largest over both"
        "\nopponents, both L, parameters and entries; 'same z': every decoder met the same z, bit"
        "\nfor bit."
    )
    table = []
    for likelihood, estimator, dtype, particles in itertools.product(MODELS, PYRO, DTYPES, (1, 10)):
        case = {"decoder": likelihood, "estimator": estimator, "dtype": dtype}
        for against, found in _exact(setting, *case.values(), particles).items():
            table.append(case | {"L": particles, "against": against} | found)
    groups = itertools.groupby(table, key=lambda row: [row[k] for k in case])
    show([_worst(list(rows), drop=("L", "against")) for _, rows in groups], ".1e")
    return table


def _exact(setting: Setting, likelihood: str, estimator: str, dtype: str, particles: int) -> dict:
    torch.manual_seed(setting.seed)
    x = setting.rows(likelihood, 64).to(DTYPES[dtype])
    model, guide = setting.pair(likelihood, DTYPES[dtype])
    vae = setting.vae(likelihood, DTYPES[dtype])
    loss = PYRO[estimator](particles, max_plate_nesting=1, vectorize_particles=particles > 1)

    def by_hand():
        return -vae.elbo(x, vae.noise(x, particles), estimator).sum()

    def by_pyro():
        return loss.differentiable_loss(model, guide, x)

    def by_pyrovae():
        return estimate(loss, Pair(model, guide), x).surrogate

    theirs, seed = pair_parameters(model, guide), setting.seed + 1
    hand = _measure(by_hand, vae.decoder, dict(vae.named_parameters()), seed)
    programs = {"pyro": by_pyro, "pyrovae": by_pyrovae}
    found = {name: _measure(run, model.decoder, theirs, seed) for name, run in programs.items()}
    return {name: _differences(hand, other, len(x)) for name, other in found.items()}


def _measure(program: Callable, decoder: nn.Module, pair: dict, seed: int) -> tuple:
    """A loss, its gradients, and the z that the decoder met, under a seed."""
    met: list[torch.Tensor] = []
    hook = decoder.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0].detach()))
    torch.manual_seed(seed)
    loss = program()
    hook.remove()
    gradients = torch.autograd.grad(loss, list(pair.values()))
    return loss.item(), dict(zip(pair, gradients, strict=True)), met[-1]


def _differences(ours: tuple, theirs: tuple, num_data: int) -> dict:
    (value, gradients, z), (their_value, their_gradients, their_z) = ours, theirs
    apart = abs(value - their_value)
    largest = {n: (g - their_gradients[n]).abs().max().item() for n, g in gradients.items()}
    return {
        "value abs": apart / num_data,
        "value rel": apart / abs(value),
        "gradient abs": max(largest.values()) / num_data,
        "gradient rel": max(d / gradients[n].abs().max().item() for n, d in largest.items()),
        "same z": torch.equal(z, their_z.reshape(z.shape)),
    }


def _worst(rows: list[dict], drop: tuple[str, ...]) -> dict:
    """The first row with the largest of every number and the smallest of every truth."""
    worst = {key: value for key, value in rows[0].items() if key not in drop}
    for key, value in worst.items():
        if not isinstance(value, str):
            worst[key] = (min if isinstance(value, bool) else max)(row[key] for row in rows)
    return worst


# (2) the same expectation; the error against L and against M


def variance(setting: Setting, pairs: int) -> list[dict]:
    print(
        "\n(2) Standard error of the ELBO of a minibatch (its mean over data), and of its gradient"
        f"\n(root of the variances' sum over all entries), from {pairs} pairs of independent draws"
        "\nfor each of five L (16 fixed data) and five M (L = 1; data drawn anew with the noise)."
        "\nThe slope of ln(error) on ln(L) or ln(M) should be -1/2. 'A - B': the difference of the"
        "\ntwo expectations in standard errors, the largest of the five."
    )
    table = []
    for likelihood, weights in itertools.product(MODELS, ("untrained", "trained")):
        make = setting.trained_vae if weights == "trained" else setting.vae
        for against, spreads in _spreads(setting, likelihood, make(likelihood), pairs):
            case = {"decoder": likelihood, "weights": weights, "against": against}
            table += [case | {"of": of} | scaling(spreads, of) for of in ("value", "gradient")]
    show(table, "+.3f")
    return table


def _spreads(setting: Setting, likelihood: str, vae: VAE, pairs: int) -> list[tuple[str, dict]]:
    torch.manual_seed(setting.seed)
    fixed = setting.rows(likelihood, 16)
    by_l = {n: spread(vae, lambda: fixed, n, pairs) for n in SIZES_L}
    by_m = {n: spread(vae, lambda n=n: setting.rows(likelihood, n), 1, pairs) for n in SIZES_M}
    return [("L", by_l), ("M", by_m)]


# (3) L = 1 is enough if M is large


def races(setting: Setting, steps: int, seeds: int, pairs: int) -> list[dict]:
    print(
        f"\n(3) The Bernoulli decoder trained by B, {steps} steps of Adam ({LR}), at equal cost,"
        "\nL M = 128 rows through the decoder a step; and once at ten times that cost. Standard"
        "\nerror of a step's gradient at the trained weights of (2); test ELBO after the last step,"
        f"\nmean of {seeds} seeds with its standard error, and less that of (1, 128), seed by seed."
    )
    every, table, vae = max(1, steps // 20), [], setting.trained_vae("bernoulli")
    for particles, size in RACES:
        found = spread(vae, lambda n=size: setting.rows("bernoulli", n), particles, pairs)
        errors = {f"gradient {e}": math.sqrt(found[f"gradient {e}"].mean()) for e in PYRO}
        starts = [setting._replace(seed=setting.seed + n) for n in range(seeds)]
        traces = np.array([_race(start, particles, size, steps, every) for start in starts])
        last, first = traces[:, -1], np.array(table[0]["elbo"] if table else traces)[:, -1]
        ends = {"test ELBO": last.mean(), "±": standard_error(last)}
        ends |= {"difference": (last - first).mean(), "± of it": standard_error(last - first)}
        row = {"L": particles, "M": size, "rows a step": particles * size} | errors | ends
        table.append(row | {"steps": [*range(0, steps + 1, every)], "elbo": traces.tolist()})
    show(table, ".2f")
    return table


def _race(setting: Setting, particles: int, size: int, steps: int, every: int) -> list[float]:
    vae = setting.vae("bernoulli")
    optimizer, x, trace = adam(vae, LR), setting.data["bernoulli"].test[:1000], []
    for number in range(steps + 1):
        if number % every == 0:
            with seeded(0):
                trace.append(evaluate(vae, x, "B", particles=10).mean().item())
        step(vae, optimizer, setting.rows("bernoulli", size), "B", particles)
    return trace


# (4) the same training


def curves(setting: Setting, steps: int) -> list[dict]:
    print(
        f"\n(4) {steps} steps of Adam ({LR}) from the same weights with the same minibatches of 128"
        "\nand the same noise (L = 1): hand-written, Pyro's own SVI, pyrovae's SVI. The largest"
        "\ndifference of a step's loss to the hand-written one, in nats per datum."
    )
    table = []
    for likelihood, estimator, dtype in itertools.product(MODELS, PYRO, DTYPES):
        case = {"decoder": likelihood, "estimator": estimator, "dtype": dtype}
        losses = _losses(setting, *case.values(), steps)
        hand = losses["hand-written"]
        apart = {name: np.abs(theirs - hand) for name, theirs in losses.items()}
        row = case | {"first loss": hand[0], "last loss": hand[-1]}
        row |= {name: apart[name].max() for name in ("pyro", "pyrovae")}
        row["steps"] = [*range(0, steps, 5)]
        row |= {f"loss {name}": theirs[::5].tolist() for name, theirs in losses.items()}
        table.append(row | {f"apart {name}": d[::5].tolist() for name, d in apart.items()})
    show(table, ".3g")
    return table


def _losses(
    setting: Setting, likelihood: str, estimator: str, dtype: str, steps: int
) -> dict[str, np.ndarray]:
    torch.manual_seed(setting.seed)
    batches = [setting.rows(likelihood, 128).to(DTYPES[dtype]) for _ in range(steps)]
    vae = setting.vae(likelihood, DTYPES[dtype])
    optimizer = adam(vae, LR)
    curve = _curve(lambda x: step(vae, optimizer, x, estimator, 1).item(), batches)
    losses = {"hand-written": curve}
    for name, make in {"pyro": pyro.infer.SVI, "pyrovae": pyrovae.SVI}.items():
        model, guide = setting.pair(likelihood, DTYPES[dtype])
        svi = make(model, guide, pyro.optim.Adam({"lr": LR}), loss=PYRO[estimator]())
        losses[name] = _curve(svi.step, batches)
    return losses


def _curve(advance: Callable, batches: list[torch.Tensor]) -> np.ndarray:
    torch.manual_seed(0)
    return np.array([advance(x) / len(x) for x in batches])


# what was promised


def broken_promises(results: dict) -> list[str]:
    """Every number that is not as the page of this script says."""
    broken = []
    for r in results["exact"]:
        if not r["same z"] or (
            r["dtype"] == "float64" and max(r["value rel"], r["gradient rel"]) >= 1e-10
        ):
            broken.append(f"(1) {r}")
    for r in results["variance"]:
        off = max(abs(r[f"slope {e}"] + 0.5) / r[f"± {e}"] for e in PYRO)
        if max(off, abs(r["A - B"])) > 4.5:
            broken.append(f"(2) {r}")
    for r in results["curves"]:
        if r["dtype"] == "float64" and max(r["pyro"], r["pyrovae"]) >= 1e-8:
            broken.append(f"(4) {r['decoder']}, {r['estimator']}")
    return broken


if __name__ == "__main__":
    main()
