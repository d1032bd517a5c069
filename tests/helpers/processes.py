"""What several processes do: tests start it under torchrun, and train alone to compare.

``processes.py FOLDER`` trains in every way of ``SAME`` and leaves what each rank found in FOLDER;
``processes.py COMMAND ... -- COMMAND ...`` runs commands of the command line, one after another.
"""

import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from commands import TRAIN
from forks import Fork
from torch import nn

import pyrovae
from pairs import LATENT, SHAPE, discrete, functions, shipped_bernoulli, two_latents
from pyrovae import reporting, runs
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.cli import main
from pyrovae.data import Dataset
from pyrovae.guides.mean_field import MeanField
from pyrovae.nn import MLP
from pyrovae.training.distributed import Diverged, join

COMMAND = [*TRAIN, "--batch-size", "100"]


class Convolved(nn.Module):
    """Particles and data in one dimension, channels last, dropped by channel and by pixel."""

    def __init__(self):
        super().__init__()
        self.net = nn.ConvTranspose2d(LATENT, 1, 4)
        self.channels, self.pixels = nn.Dropout2d(0.3), nn.Dropout(0.3)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            flat = z.reshape(-1, LATENT, 1, 1).to(memory_format=torch.channels_last)
            image = self.pixels(self.net(self.channels(flat)).to(memory_format=torch.channels_last))
            logits = image.reshape(*z.shape[:-1], *SHAPE)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)


def convolved():
    return Convolved(), MeanField(SHAPE, LATENT, (8,))


class Subsampled(nn.Module):
    """A plate that stands for more data than it is shown, and one more weight by their number."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes
        self.net = MLP(SHAPE, (2, LATENT), (8,)) if encodes else MLP(LATENT, SHAPE, (8,))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        with pyro.plate("data", 1000, subsample=x), pyro.poutine.scale(scale=0.5):
            if self.encodes:
                loc, log_scale = self.net(self.dropout(x)).unbind(-2)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(3), obs=x)


def subsampled():
    return Subsampled(False), Subsampled(True)


def divided():
    """Programs whose scale is a number over that of the rows at hand."""
    model, guide = shipped_bernoulli()
    return tuple(
        lambda x, program=program: pyro.poutine.scale(program, scale=100 / len(x))(x)
        for program in (model, guide)
    )


class Normalized(nn.Module):
    """Batch normalization, which sees the rows of its own process."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT, 16), nn.BatchNorm1d(16))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            logits = self.net(z.reshape(-1, LATENT)).reshape(*z.shape[:-1], 16)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x.flatten(1))


def normalized():
    return Normalized(), MeanField(SHAPE, LATENT, (8,))


def change(fit):
    """A callback, which rank 0 alone calls, that changes what a step does."""
    if len(fit.history) == 1:
        fit.svi.optimizer.param_groups[0]["lr"] /= 4
        fit.guide.encoder.layers[0].requires_grad_(False)


SAME = {
    "dynamic": (
        shipped_bernoulli,
        {"patience": 2, "schedule": torch.optim.lr_scheduler.ReduceLROnPlateau},
    ),
    "dropout": (
        convolved,
        {"particles": 3, "clip_norm": 5.0, "objective": "trace_mean_field_elbo"},
    ),
    "subsampled": (subsampled, {}),
    "divided": (divided, {}),
    "discrete": (discrete, {"particles": 2}),
    "functions": (functions, {"optimizer": pyro.optim.ClippedAdam({"lr": 0.01, "clip_norm": 1.0})}),
    "importance": (two_latents, {"objective": "iwae", "particles": 4}),
    "changed": (shipped_bernoulli, {"on_epoch": [change]}),
}


def data(rows=65):
    """Grey levels to draw from; in batches of 16 the last one is a single datum."""
    levels = torch.randint(0, 256, (rows, *SHAPE), generator=torch.Generator().manual_seed(1))
    drawn = (levels > 127).float()
    return Dataset(
        "levels", torch.Size(SHAPE), drawn, drawn[:20], drawn[:20],
        binarize="dynamic", intensities=levels.to(torch.uint8), scale=255.0,
    )  # fmt: skip


def train(name, epochs=2, seed=7):
    """One of the trainings: its history without the seconds, and its weights."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    make, options = SAME[name]
    told, calls = [], options.get("on_epoch", [])
    options = options | {"on_epoch": [lambda fit: told.append(len(fit.history)), *calls]}
    result = pyrovae.fit(
        *make(), data(), epochs=epochs, batch_size=16, lr=0.01, seed=seed, compile=False,
        progress=False, **options,
    )  # fmt: skip
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
    return {"history": history, "weights": result.svi.pair.state_dict(), "told": told}


def trained():
    """The loss of the last of some epochs, nats per datum, for pairs and seeds ``[P, S]``."""
    losses = [
        [train(name, 3, seed)["history"][-1]["train_loss"] for seed in range(5)]
        for name in ("dynamic", "subsampled")
    ]
    return torch.tensor(losses)


def torchrun(*arguments):
    """Start two processes of this file; the exit code and what was printed.

    torchrun is a fork, and its processes are forks of it: none imports torch again.
    """
    return Fork(_torchrun, [str(argument) for argument in arguments]).end()


def _torchrun(arguments):
    from torch.distributed.run import main

    how = ["--nproc-per-node", "2", "--start-method", "fork", "--run-path"]
    main([*how, __file__, *arguments])


def _normalize(found):
    """Batch statistics differ by process in an epoch, and are those of rank 0 after it."""
    pyro.set_rng_seed(join().rank)
    result = pyrovae.fit(*normalized(), data(70), epochs=1, batch_size=16, seed=1, progress=False)
    found["norm"] = result.svi.pair.state_dict()
    try:
        with torch.no_grad():
            next(result.guide.parameters()).add_(0.1 * join().rank)
        result.world.settle(result.svi.pair)
    except Diverged as error:
        found["diverged"] = str(error)


def _command(found, folder):
    """The command line: which files each process writes, and what it says."""
    written, write = [], runs.write_atomic
    runs.write_atomic = lambda path, content: (written.append(path.name), write(path, content))
    words = io.StringIO()
    with redirect_stdout(words), redirect_stderr(words):
        found["code"] = main([*COMMAND, "--out", str(folder / "run")])
    found["written"], found["said"] = written, words.getvalue()
    for name, wrong in (("usage", ["--lr", "fast"]), ("refusal", ["--lr", "-1"])):
        words = io.StringIO()
        with redirect_stdout(words), redirect_stderr(words), suppress(SystemExit):
            main([*COMMAND, "--out", str(folder / name), *wrong])
        found[name] = words.getvalue()


def commands(arguments):
    """Commands of the command line, until one fails."""
    while arguments:
        at = arguments.index("--") if "--" in arguments else len(arguments)
        code = main(arguments[:at])
        arguments = arguments[at + 1 :]
        if code:
            return code
    return 0


def _noise(world):
    """The order of an epoch's data and the noise after it, as the loop draws them."""
    with seeded(subseed(7, 1)):
        order = torch.randperm(1000)
        with world.stream(7, 1, torch.device("cpu")):
            return order, torch.randn(1000)


def checks(folder):
    """Train in every way, and leave what this process found in a file."""
    found = {name: train(name) for name in SAME}
    found["trained"] = trained()
    _normalize(found)
    _command(found, folder)
    world = join()
    found["shared"] = world.share({"rank": world.rank, "x": [float(world.rank), None]})
    found["noise"] = _noise(world)
    torch.save(found, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*was not registered in the param store")
    torch.set_num_threads(1)
    reporting.draw_run = lambda *arguments: {}
    if len(sys.argv) > 2:
        sys.exit(commands(sys.argv[1:]))
    checks(Path(sys.argv[1]))
