"""The command ``evaluate``: what it is asked for, and what it says at its end."""

from __future__ import annotations

import argparse
import json

from pyrovae._tools import InputError
from pyrovae.report.text import summarize
from pyrovae.runs import Run
from pyrovae.training.distributed import ProcessLost

__all__ = ["evaluate_command"]


def evaluate_command(options: argparse.Namespace) -> None:
    """Measure a run on a split."""
    try:
        _evaluate(options)
    except (KeyboardInterrupt, ProcessLost, ConnectionError) as error:
        kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ProcessLost
        again = f"what is finished is kept; go on with: {options.command_line}"
        raise kind(f"stopped; {again}") from None


def _evaluate(options: argparse.Namespace) -> None:
    from pyrovae.runs import experiment
    from pyrovae.runs.evaluate import evaluate

    run, world = Run.open(options.run), options.world
    _require_sizes(options)
    with world.in_turn():
        made = experiment.load_experiment(run, options.device, options.data_root)
    found = evaluate(
        run,
        made,
        split=options.split,
        num_samples=options.samples,
        images=options.images,
        refine_steps=options.refine,
        defensive=options.defensive,
        num_chains=options.annealed,
        num_temperatures=options.temperatures,
        diagnostics=not options.no_diagnostics,
        fresh=options.fresh,
    )
    if world.first:
        print(json.dumps(found, indent=2) if options.json else summarize(found, options.split))


def _require_sizes(options: argparse.Namespace) -> None:
    wanted = {"samples": 1, "images": 1, "refine": 0, "annealed": 0, "temperatures": 0}
    for name, least in wanted.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"Expected --{name} >= {least}, got {value}.")
