"""A training in Python is a run directory: it is loaded, evaluated, reported and gone on with."""

import importlib
import linecache
import os
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import config, outcome, run
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import TensorDataset

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.objectives import make_objective
from pyrovae.runs.programs import find_program
from pyrovae.runs.recovered import recover

SHORT = {"samples": 4, "no_diagnostics": True}
CELLS = [
    """
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn
SCALE = 1.0
RANGE = torch.arange(3)
""",
    """
%matplotlib inline
def squash(x):
    return torch.tanh(x)
""",
    """
class Decoder(nn.Module):
    def __init__(self, latent, hidden, pixels):
        super().__init__()
        self.first, self.last = nn.Linear(latent, hidden), nn.Linear(hidden, pixels)

    def forward(self, z):
        return self.last(squash(self.first(z)))

class Model(PyroModule):
    def __init__(self, shape, latent=2, hidden=16):
        super().__init__()
        self.latent, self.decoder = latent, Decoder(latent, hidden, shape[-1] * shape[-2])

    def forward(self, x):
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(self.latent), SCALE)
            z = pyro.sample("z", prior.to_event(1))
            logits = self.decoder(z).reshape(*z.shape[:-1], 1, 8, 8)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

def lost(x):
    return RANGE
""",
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})


@pytest.fixture(scope="module")
def data():
    return pyrovae.load_data("digits", binarize="dynamic")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What an unbroken training of three epochs comes to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    pyro.set_rng_seed(0)
    train(*pair(data), data, epochs=3, out=out)
    return outcome(out)


@pytest.fixture
def notebook():
    """What the cells of a notebook define."""
    found = {"__name__": "__main__"}
    for number, cell in enumerate(CELLS):
        name = f"<ipython-input-{number}>"
        linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
        exec(compile(cell.replace("%matplotlib", "#"), name, "exec"), found)
    yield found
    for number in range(len(CELLS)):
        linecache.cache.pop(f"<ipython-input-{number}>")


def pair(data, latent=3):
    small = {"latent": latent, "hidden": (8,)}
    return Bernoulli(data.shape, **small), MeanField(data.shape, **small)


def train(model, guide, data, epochs=2, **more):
    options = {"seed": 0, "progress": False, "lr": 0.01} | more
    return pyrovae.fit(model, guide, data, epochs=epochs, **options)


def same(one, two):
    """Whether two opened runs, or pairs, have the same numbers."""
    states = [pyrovae.elbo(each.model, each.guide, X, seed=1).elbo for each in (one, two)]
    return torch.equal(*states)


X = (torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def test_a_training_is_written_as_the_command_writes_it(data):
    fit = train(*pair(data), data, out="run", average=0.9)
    opened = pyrovae.load("run")
    stored = {"config.json", "checkpoint.pt", "metrics.csv", "weights.safetensors"}
    assert {p.name for p in Path("run").iterdir()} >= stored
    assert opened.history == fit.history
    assert opened.config.model.settings["latent"] == 3
    assert opened.config.command.startswith("pyrovae.fit(Bernoulli, MeanField, digits, epochs=2")
    assert same(opened, fit)
    assert torch.equal(opened.data.train, data.train)
    found = pyrovae.evaluate(opened, **SHORT)
    assert run("evaluate", "run", "--samples", "4", "--no-diagnostics") == 0
    assert pyrovae.load("run").results["test"] == found


@pytest.mark.parametrize("how", ["command", "python", "save"])
def test_going_on_comes_to_what_an_unbroken_training_does(data, whole, how):
    pyro.set_rng_seed(0)
    fit = train(*pair(data), data, out=None if how == "save" else "run")
    if how == "save":
        assert fit.save("run") == Path("run")
    if how == "python":
        opened = pyrovae.load("run")
        train(*pair(data), data, epochs=3, out="run", state=opened.state)
    else:
        assert run("train", "--out", "run", "--resume", "--epochs", "3") == 0
    assert outcome(Path("run")) == whole


def test_a_checkpoint_has_what_a_callback_did_after_the_epoch(data):
    def halve(fit):
        fit.svi.optimizer.param_groups[0]["lr"] /= 2

    fit = train(*pair(data), data.train[:64], epochs=2, out="run", on_epoch=halve)
    state = pyrovae.load("run", data=data.train[:64]).state
    ours, theirs = (each["optimizer"]["param_groups"] for each in (state, fit.state_dict()))
    assert ours[0]["lr"] == theirs[0]["lr"] == 0.01 / 4


def test_a_checkpoint_has_what_a_callback_did_before_the_next_one_raised(data):
    def halve(fit):
        fit.svi.optimizer.param_groups[0]["lr"] /= 2

    def stop(fit):
        if len(fit.history) == 2 and stops:
            raise stops.pop()

    torch.manual_seed(0)
    stops, x = [KeyboardInterrupt], data.train[:64]
    with pytest.raises(KeyboardInterrupt):
        train(*pair(data), x, epochs=4, out="run", on_epoch=[halve, stop])
    state = pyrovae.load("run", data=x).state
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.01 / 4
    torch.manual_seed(0)
    again = train(*pair(data), x, epochs=4, out="run", state=state, on_epoch=[halve, stop])
    torch.manual_seed(0)
    whole = train(*pair(data), x, epochs=4, out="whole", on_epoch=[halve, stop])
    for name, value in whole.svi.pair.state_dict().items():
        assert torch.equal(again.svi.pair.state_dict()[name], value), name


def test_a_run_says_what_its_objective_was_made_with(data, capsys):
    for name, more in (("few", {"backward": 2}), ("all", {})):
        objective = make_objective("iwae_dreg", particles=4, **more)
        train(*pair(data), data, out=name, objective=objective)
    settings = {"particles": 4, "gradient": "dreg"}
    assert config(Path("few"))["objective_settings"] == settings | {"backward": 2}
    assert config(Path("all"))["objective_settings"] == settings
    objective = make_objective("warm_up_elbo", beta=3, warm_up=2, schedule="cosine")
    train(*pair(data), data, out="rising", objective=objective)
    settings = {"beta": 3.0, "warm_up": 2, "schedule": "cosine"}
    assert config(Path("rising"))["objective_settings"] == settings


def test_a_pair_of_a_notebook_is_written_with_all_that_it_uses(data, notebook):
    model = notebook["Model"](data.shape, latent=3, hidden=5)
    fit = train(model, MeanField(data.shape, latent=3), data, out="run")
    opened = pyrovae.load("run")
    assert opened.config.unrecovered == ""
    assert opened.config.model.settings == {"latent": 3, "hidden": 5}
    source = Path("run/programs/model.py").read_text()
    for part in ("SCALE = 1.0", "def squash", "class Decoder", "from pyro.nn.module import"):
        assert part in source
    assert "lost" not in source
    assert same(opened, fit)
    assert run("evaluate", "run", "--samples", "4", "--no-diagnostics") == 0


def test_a_file_that_was_edited_and_reloaded_is_written_as_it_is(data, monkeypatch, tmp_path):
    """Python keeps the lines of a file that it has shown once."""
    monkeypatch.syspath_prepend(tmp_path)
    cells = CELLS[0] + CELLS[1].replace("%matplotlib inline", "") + CELLS[2]
    for number, prior in enumerate(("Normal", "Laplace")):
        file = tmp_path / "edited_model.py"
        file.write_text(cells.replace("dist.Normal", f"dist.{prior}"))
        os.utime(file, (number, number))
        importlib.invalidate_caches()
        module = importlib.reload(importlib.import_module("edited_model"))
        model, guide = module.Model(data.shape, latent=3), MeanField(data.shape, latent=3)
        train(model, guide, data, epochs=1, out=f"run{number}")
        assert pyrovae.load(f"run{number}").config.unrecovered == ""
        assert f"dist.{prior}(" in Path(f"run{number}/programs/model.py").read_text()


def test_functions_of_a_script_of_several_files_are_written(data, monkeypatch, tmp_path):
    Path("parts.py").write_text("import torch\n\ndef half(x):\n    return x / 2\n")
    Path("more.py").write_text("from parts import half\nfrom folder.deep import ONE\n")
    Path("folder").mkdir()
    Path("folder/deep.py").write_text("ONE = 1\n")
    Path("folder/table.csv").write_text("1,2\n")
    Path("script.py").write_text(
        "import pyro, pyro.distributions as dist, torch\nfrom parts import half\n"
        "from pathlib import Path\nimport more, folder.deep as deep\n\n"
        "def model(x):\n    w = pyro.param('w', torch.ones(1, 8, 8))\n"
        "    with pyro.plate('data', len(x)):\n"
        "        z = pyro.sample('z', dist.Normal(x.new_zeros(()), 1.0))\n"
        "        logits = more.half(half(w)) * deep.ONE * z[..., None, None, None]\n"
        "        assert (Path('folder') / 'table.csv').name\n"
        "        pyro.sample('x', dist.Bernoulli(logits=logits).to_event(3), obs=x)\n\n"
        "def guide(x):\n    loc = pyro.param('loc', torch.zeros(()))\n"
        "    with pyro.plate('data', len(x)):\n"
        "        pyro.sample('z', dist.Normal(loc.expand(len(x)), 1.0))\n\n"
        "raise_if_executed = print('training')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import script

    with pytest.warns(UserWarning, match=r"no copy of .*folder/table.csv, which model.py names: "):
        fit = train(script.model, script.guide, data, out="run")
    kept = {p.relative_to("run/programs").as_posix() for p in Path("run/programs").rglob("*.py")}
    assert kept == {
        "model.py", "guide.py", *(f"model/{n}.py" for n in ("parts", "more", "folder/deep"))
    }  # fmt: skip
    text = Path("run/programs/model.py").read_text()
    assert "def half" in text
    assert "raise_if_executed" not in text
    weights = pyrovae.load("run").run.load_weights()
    assert weights.keys() == fit.svi.pair.state_dict().keys()
    pyro.clear_param_store()
    assert run("evaluate", "run", "--samples", "4", "--no-diagnostics") == 0
    for name in ("script", "parts", "more", "folder", "folder.deep"):
        sys.modules.pop(name)


def test_data_that_a_script_finds_beside_it_are_the_runs_own_afterwards(
    data, monkeypatch, tmp_path, recwarn
):
    Path("bias.csv").write_text("0.5\n")
    Path("found.py").write_text(
        "import pyro, pyro.distributions as dist, torch\nfrom pathlib import Path\n\n"
        "def model(x):\n    bias = float((Path(__file__).parent / 'bias.csv').read_text())\n"
        "    with pyro.plate('data', len(x)):\n"
        "        z = pyro.sample('z', dist.Normal(x.new_zeros(()), 1.0))\n"
        "        logits = (bias + z)[..., None, None, None].expand(*z.shape, 1, 8, 8)\n"
        "        pyro.sample('x', dist.Bernoulli(logits=logits).to_event(3), obs=x)\n\n"
        "def guide(x):\n    loc = pyro.param('loc', torch.zeros(()))\n"
        "    with pyro.plate('data', len(x)):\n"
        "        pyro.sample('z', dist.Normal(loc.expand(len(x)), 1.0))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import found

    train(found.model, found.guide, data, out="run")
    assert not [each for each in recwarn if "no copy" in str(each.message)]
    x, before = data.test[:8], pyrovae.elbo(found.model, found.guide, data.test[:8], seed=0).elbo
    Path("bias.csv").write_text("9\n")
    Path("found.py").unlink()
    pyro.clear_param_store()
    opened = pyrovae.load("run")
    assert torch.equal(pyrovae.elbo(opened.model, opened.guide, x, seed=0).elbo, before)
    sys.modules.pop("found")


def local_model(shape):
    class Local(PyroModule):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(3, 64)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                logits = self.decoder(z).reshape(*z.shape[:-1], *shape)
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    return Local()


def test_programs_without_a_source_are_given_to_load(data, capsys):
    guide = MeanField(data.shape, latent=3)
    fit = train(local_model(data.shape), guide, data, out="run")
    opened = pyrovae.load("run")
    assert "Local is defined inside of another function" in opened.config.unrecovered
    with pytest.raises(pyrovae.InputError, match=r"no copy of it .*load\(DIR, model=..., guide="):
        _ = opened.model
    assert run("evaluate", "run") == 2
    assert "defined inside of another function" in capsys.readouterr().err
    parts = {"model": local_model(data.shape), "guide": MeanField(data.shape, latent=3)}
    given = pyrovae.load("run", **parts)
    assert given.model is parts["model"]
    assert same(given, fit)
    assert pyrovae.evaluate(given, **SHORT).num_data == 359
    parts["guide"] = MeanField(data.shape, latent=3, hidden=(9,))
    with pytest.raises(pyrovae.InputError, match="of other programs or settings"):
        _ = pyrovae.load("run", **parts).model


def test_data_in_memory_are_given_to_load(data, capsys):
    x = data.train[:200]
    train(*pair(data), x, out="run", batch_size=50)
    with pytest.raises(pyrovae.InputError, match="were in memory when it was trained"):
        _ = pyrovae.load("run").model
    assert run("evaluate", "run") == 2
    assert "as pyrovae.load(DIR, data=...) does" in capsys.readouterr().err
    for same_numbers in (x.numpy(), TensorDataset(x)):
        assert torch.equal(pyrovae.load("run", data=same_numbers).data.train, x)
    opened = pyrovae.load("run", data=x)
    assert pyrovae.evaluate(opened, split="train", **SHORT).num_data == 200
    with pytest.raises(pyrovae.InputError, match=r"data are not those of the run: sha256"):
        _ = pyrovae.load("run", data=1 - x).model
    again = train(*pair(data), x.numpy(), 3, out="run", batch_size=50, state=opened.state)
    assert len(again.history) == 3
    with pytest.raises(pyrovae.InputError, match=r"made with data.sha256"):
        train(*pair(data), 1 - x, 4, out="run", batch_size=50, state=opened.state)


def test_data_that_were_changed_after_loading_are_no_file(data):
    from dataclasses import replace

    train(*pair(data), replace(data, test=1 - data.test), out="run")
    assert config(Path("run"))["data"]["load"] == "data in memory"
    other = pyrovae.load_data("digits", binarize="dynamic", seed=3)
    train(*pair(data), other, out="other")
    assert torch.equal(pyrovae.load("other").data.valid, other.valid)


def test_what_no_option_can_say_goes_on_from_python_alone(data, capsys):
    slow = {"optimizer": torch.optim.SGD, "lr": 1e-5}
    train(*pair(data), data, out="run", **slow)
    assert config(Path("run"))["objects"] == {"optimizer": "SGD"}
    assert run("train", "--out", "run", "--resume", "--epochs", "3") == 2
    assert "trained from Python with optimizer=SGD" in capsys.readouterr().err
    state = pyrovae.load("run").state
    with pytest.warns(match="lr=1e-06 is not used: the state goes on from lr=1e-05"):
        train(*pair(data), data, epochs=2, out="other", state=state, **slow | {"lr": 1e-6})
    assert config(Path("other"))["lr"] == 1e-5
    again = train(*pair(data), data, 3, out="run", state=state, **slow)
    assert [row["epoch"] for row in pyrovae.load("run").history] == [1, 2, 3]
    assert len(again.history) == 3


def test_a_directory_in_use_is_refused_before_training(data):
    train(*pair(data), data, 1, out="run")
    with pytest.raises(pyrovae.InputError, match=r"choose another out, or go on .*load\('run'\)"):
        train(*pair(data), data, 1, out="run")
    Path("full").mkdir()
    Path("full/thesis.tex").touch()
    with pytest.raises(pyrovae.InputError, match="exists and is not empty"):
        train(*pair(data), data, 1, out="full")
    with pytest.raises(pyrovae.InputError, match="holds another run"):
        train(*pair(data), data, 1).save("run")


SETTINGS = {
    ("model", "gaussian"): {"latent": 7, "hidden": [33, 17], "scale": "pixel"},
    ("model", "discretized_logistic"): {"latent": 7, "levels": 16, "components": 3},
    ("model", "two_layer"): {"latent": [9, 4], "hidden_top": [7]},
    ("model", "ladder"): {"latent": [9, 5, 4], "hidden": [8, 7, 6], "activation": "ELU"},
    ("guide", "low_rank"): {"latent": 7, "hidden": [33, 17], "rank": 2},
    ("guide", "mixture"): {"latent": 7, "activation": "Tanh", "components": 3},
    ("guide", "semi_supervised"): {"latent": 7, "classes": 4, "alpha": 0.3},
    ("guide", "convolutional"): {"latent": 7, "channels": [4, 6], "hidden": [9]},
    ("guide", "flow"): {"latent": 3, "hidden": [9], "steps": 2, "width": 12},
}


@pytest.mark.parametrize(("kind", "name"), SETTINGS)
def test_settings_are_found_that_make_the_same_structure(kind, name):
    wanted = SETTINGS[kind, name]
    program = find_program(name, kind).build((1, 8, 8), wanted)
    found, settings = recover(kind, program, (1, 8, 8), {})
    assert (found.name, found.source) == (name, None)
    assert {each: settings[each] for each in wanted} == wanted


def test_what_a_program_uses_and_cannot_be_written_is_named(notebook):
    with pytest.raises(pyrovae.InputError, match="lost uses RANGE, a Tensor"):
        recover("model", notebook["lost"], (1, 8, 8), {})
    with pytest.raises(pyrovae.InputError, match="neither a module nor a function"):
        recover("model", notebook["Model"]((1, 8, 8)).forward, (1, 8, 8), {})
