"""Kill commands at random moments: one process imports, and each command is a fork of it.

Of a hundred trials or more, some are of whole processes, which are mostly killed while they import.

``python kills.py FOLDER COUNT SEED [KIND ...]`` prints as JSON what became of so many kills.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# What commands import where they use it is imported once, before they are forked.
import jinja2  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import numpy as np
import torch
import torch._dynamo
from safetensors.torch import save  # noqa: F401

from pyrovae import cli, reporting
from pyrovae._tools.files import checksum, unpack_tensors

PAIR = ["--model", "own.py", "--guide", "mean_field", "--set", "hidden=8", "--set", "latent=2"]
DATA = ["--data", "x.npy", "--batch-size", "20", "--lr", "0.01"]
TRAIN = ["train", *PAIR, *DATA, "--out", "run", "--epochs"]
RESUME = ["train", "--out", "run", "--resume"]
EVALUATE = ["evaluate", "run", "--samples", "20", "--images", "30", "--no-diagnostics"]
# By kind of trial: the command to kill, what the directory is before, the commands to go on with
# in place of it once it holds a run, and how often it is tried.
KINDS = {
    "train": ([*TRAIN, "3"], None, [RESUME], 5),
    "resume": ([*RESUME, "--epochs", "5"], "trained", [[*RESUME, "--epochs", "5"]], 3),
    "evaluate": (EVALUATE, "trained", [EVALUATE], 3),
    "report": (["report", "run"], "evaluated", [["report", "run"]], 1),
    "start-up": ([*TRAIN, "3"], None, [RESUME], 2),
}
MANY = 100  # trials from which on whole processes are started as well


def start(kind, command, delay=None):
    """Run a command of a kind: in a fork, or from its start-up on."""
    if kind != "start-up":
        return fork(command, delay)
    began = time.monotonic()
    with open("errors", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "pyrovae", *command], stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait(), time.monotonic() - began


def fork(command, delay=None):
    """Run a command in a fork, killed after a delay; its exit code and the seconds it took."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os._exit(cli.main(command))
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def outcome(kind):
    """What a kind of command is for, as it is on disk: equal for equal numbers."""
    if kind == "report":
        return Path("run/report.html").exists()
    if kind == "evaluate":
        values = unpack_tensors(Path("run/evaluation/test.safetensors"))[0]
        found = json.loads(Path("run/results.json").read_text())["test"]
        return checksum(values), {k: v for k, v in found.items() if k not in ("run", "sha256")}
    weights = unpack_tensors(Path("run/weights.safetensors"))[0]
    rows = [row.rsplit(",", 1)[0] for row in Path("run/metrics.csv").read_text().splitlines()]
    return checksum(weights), rows


def put(state):
    """Make the directory what it is before a kind of command."""
    shutil.rmtree("run", ignore_errors=True)
    if state:
        shutil.copytree(state, "run")


def prepare(kinds):
    """The state before each kind, and what it comes to without a kill, and in how many seconds."""
    shutil.copy(Path(__file__).parents[2] / "models" / "bernoulli.py", "own.py")
    np.save("x.npy", np.random.default_rng(0).integers(0, 2, (90, 6)))
    assert fork([*TRAIN, "2"])[0] == 0, Path("errors").read_text()
    shutil.copytree("run", "trained")
    assert fork(EVALUATE)[0] == 0, Path("errors").read_text()
    shutil.copytree("run", "evaluated")
    expected = {}
    for kind in kinds:
        command, state, _, _ = KINDS[kind]
        put(state)
        code, seconds = start(kind, command)
        assert code == 0, Path("errors").read_text()
        expected[kind] = outcome(kind), seconds
    return expected


def go_on(kind, rng):
    """The command to go on with after a kill: that of a new run where there is none yet."""
    command, _, again, _ = KINDS[kind]
    if kind in ("train", "start-up") and not Path("run/config.json").exists():
        return rng.choice([command, [*command, "--resume"]])
    return rng.choice(again)


def trials(count, seed, kinds=()):
    """Kill so many commands; the failures in words, and how many of each kind there were."""
    kinds = kinds or [kind for kind in KINDS if kind != "start-up" or count >= MANY]
    rng, expected = random.Random(seed), prepare(kinds)
    failures, counts = [], dict.fromkeys([*kinds, "finished before the kill"], 0)
    for number in range(count):
        kind = rng.choices(kinds, [KINDS[kind][-1] for kind in kinds])[0]
        command, state, _, _ = KINDS[kind]
        (result, seconds), moment = expected[kind], rng.random()
        put(state)
        code, _ = start(kind, command, moment * seconds)
        counts[kind] += 1
        counts["finished before the kill"] += code == 0
        again = go_on(kind, rng)
        code, _ = fork(again)
        what = f"{number}: {kind} killed at {moment:.3f}"
        if code != 0:
            failures.append(f"{what}: {again} ended with {code}: {Path('errors').read_text()}")
        elif outcome(kind) != result:
            failures.append(f"{what}: {again} came to something else")
        elif left := [p for p in Path("run").rglob(".*") if p.suffix in (".tmp", ".lock")]:
            failures.append(f"{what}: {again} left {[str(path) for path in left]}")
    return {"kills": count, "seed": seed, "kinds": counts, "failures": failures}


def main(folder, count, seed, *kinds):
    os.chdir(folder)
    torch.set_num_threads(1)
    reporting.draw_run = lambda *arguments: {}
    print(json.dumps(trials(int(count), int(seed), kinds)))


if __name__ == "__main__":
    main(*sys.argv[1:])
