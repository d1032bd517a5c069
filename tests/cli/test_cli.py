"""The path that a newcomer walks: train, evaluate, sample, report, list, and edit a program."""

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
from commands import DIGITS, SIZES, TRAIN, config, history, outcome, run, snapshot
from safetensors import safe_open

import pyrovae
from pyrovae.data import DATASETS
from pyrovae.objectives import OBJECTIVES
from pyrovae.objectives.elbo import ESTIMATORS
from pyrovae.reporting.posterior_figures import FINDING_PICTURES
from pyrovae.runs import experiment
from pyrovae.runs.beside import Sources
from pyrovae.runs.programs import warn_of_uncopied

PRIOR = "dist.Normal(self.zero, 1.0).to_event(1)"
LIKELIHOOD = "dist.Bernoulli(logits=logits)"
TWO = "torch.stack([self.zero - 1, self.zero + 1])"
SWAPS = {
    "laplace": (PRIOR, "dist.Laplace(self.zero, 1.0).to_event(1)", "dynamic"),
    "student": (PRIOR, "dist.StudentT(5.0, self.zero, 1.0).to_event(1)", "dynamic"),
    "mixture": (
        PRIOR,
        f"dist.MixtureSameFamily(dist.Categorical(self.zero.new_ones(2)), "
        f"dist.Normal({TWO}, 1.0).to_event(1))",
        "dynamic",
    ),
    "gaussian": (LIKELIHOOD, "dist.Normal(logits, 0.3)", "none"),
    "continuous_bernoulli": (LIKELIHOOD, "dist.ContinuousBernoulli(logits=logits)", "none"),
}


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})


@pytest.fixture
def copied(repository, tmp_path, no_pictures, monkeypatch):
    """The shipped Bernoulli model, copied into an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    own = tmp_path / "own.py"
    own.write_text((repository / "models" / "bernoulli.py").read_text())
    return own


def size_of(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def strict(text):
    def refuse(name):
        raise ValueError(f"JSON knows no {name}")

    return json.loads(text, parse_constant=refuse)


def evaluated(capsys, folder, *options):
    capsys.readouterr()
    short = "--samples", "50", "--no-diagnostics"
    assert run("evaluate", folder, "--json", *short, *options) == 0
    return strict(capsys.readouterr().out)


def test_the_whole_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*TRAIN, "--out", "deep/r", "--epochs", "10", "--patience", "9") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert [line.split()[1] for line in lines[:10]] == [f"{epoch}/10" for epoch in range(1, 11)]
    assert "nats per datum" in lines[10]
    assert "pyrovae evaluate deep/r" in lines[11]
    files = {name for name, content in snapshot(tmp_path / "deep/r").items() if content is not None}
    pictures = {"learning_curves", "samples", "reconstructions", "latent_space", "manifold"}
    pictures = {f"figures/{name}.png" for name in pictures | {"interpolations"}}
    stored = {"config.json", "checkpoint.pt", "metrics.csv", "weights.safetensors"}
    stored |= {"explorer.safetensors"}
    assert files == stored | pictures

    assert run("evaluate", "deep/r", "--samples", "100") == 0
    text = capsys.readouterr().out
    found = evaluated(capsys, "deep/r", "--split", "valid")
    results = strict((tmp_path / "deep/r/results.json").read_text())
    assert results["valid"] == found
    assert results.keys() == {"test", "valid"}
    for part in (results["test"], found):
        a, b = (part["elbo"][name]["mean"] for name in ESTIMATORS)
        ll = part["log_likelihood"]
        assert abs(a - b) < 0.3
        assert ll["mean"] > max(a, b) - 4 * ll["standard_error"]
        assert part["reconstruction"] - part["kl"] == pytest.approx(b, abs=1e-6)
    assert f"{results['test']['log_likelihood']['mean']:.3f}" in text
    assert float(history(tmp_path / "deep/r")[-1]["valid_elbo"]) == pytest.approx(
        found["elbo"]["trace_elbo"]["mean"], abs=0.5
    )

    before = (tmp_path / "deep/r/figures/samples.png").read_bytes()
    assert run("sample", "deep/r", "-n", "5", "--seed", "3") == 0
    after = (tmp_path / "deep/r/figures/samples.png").read_bytes()
    assert size_of(after) != size_of(before)

    assert run("report", "deep/r") == 0
    assert "deep/r/report.html" in capsys.readouterr().out
    page = (tmp_path / "deep/r/report.html").read_text()
    asked = [name for name in FINDING_PICTURES if name != "guide_calibration"]
    findings = {f"figures/{name}.png" for name in asked}
    assert set(snapshot(tmp_path / "deep/r")) >= findings
    assert page.count('src="data:image/png;base64,') == len(pictures | findings)
    assert page.count("src=") == len(pictures | findings)
    assert set(snapshot(tmp_path)) >= {"deep", "deep/r"}
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}


def test_list_names_everything_shipped(repository, capsys):
    assert run("list") == 0
    words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] == " "}
    files = {p.stem for kind in ("models", "guides") for p in (repository / kind).glob("[a-z]*.py")}
    assert words == files | OBJECTIVES.keys() | DATASETS.keys()


def test_settings_reach_the_programs(tmp_path, no_pictures):
    sizes = ["--set", "latent=3", "--set", "hidden=5,6", "--set", "guide.hidden=7"]
    assert run(*TRAIN, *sizes, "--set", "activation=Tanh", "--out", tmp_path / "r") == 0
    with safe_open(tmp_path / "r/weights.safetensors", framework="pt") as file:
        names = file.keys()
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    expected = [[5, 3], [6, 5], [64, 6]], [[7, 64], [6, 7]]
    for kind, net, sizes in zip(("model", "guide"), ("decoder", "encoder"), expected, strict=True):
        found = [v for k, v in shapes.items() if k.startswith(f"{kind}.{net}") and len(v) == 2]
        assert found == sizes
    settings = config(tmp_path / "r")["model"]["settings"]
    assert settings == {"latent": 3, "hidden": [5, 6], "activation": "Tanh", "mean": None}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_swap_is_one_edited_line(copied, capsys, swap):
    old, new, binarize = SWAPS[swap]
    source = copied.read_text()
    copied.write_text(source.replace(old, new))
    pairs = zip(source.splitlines(), copied.read_text().splitlines(), strict=True)
    assert sum(before != after for before, after in pairs) == 1
    options = ["--guide", "mean_field", *DIGITS, *SIZES, "--epochs", "2", "--binarize", binarize]
    assert run("train", "--model", "own.py", *options, "--out", "r") == 0
    first, last = (float(row["valid_elbo"]) for row in history(copied.parent / "r"))
    assert last > first + 0.1
    found = evaluated(capsys, "r")
    ll, bound = found["log_likelihood"], found["elbo"]["trace_elbo"]
    assert ll["mean"] > bound["mean"] - 4 * ll["standard_error"]


def test_a_run_keeps_the_programs_that_it_was_trained_with(copied, capsys, monkeypatch):
    loaded = copied.read_bytes()
    create = experiment.Run.create

    def edit_meanwhile(*arguments):
        copied.write_text("raise RuntimeError('edited while training')\n")
        create(*arguments)

    monkeypatch.setattr(experiment.Run, "create", edit_meanwhile)
    assert run(*TRAIN, "--model", "own.py:Bernoulli", "--out", "r") == 0
    folder = copied.parent
    assert (folder / "r/programs/model.py").read_bytes() == loaded
    found = evaluated(capsys, "r")
    copied.unlink()
    assert evaluated(capsys, "r") == found
    assert run("train", "--out", "r", "--resume", "--epochs", "3") == 0
    assert len(history(folder / "r")) == 3
    assert not list(folder.rglob("__pycache__"))


def test_what_a_run_cannot_copy_of_a_program_is_told(tmp_path):
    """Data that it finds by the working folder, and imports by names that are not written in it."""
    for name in ("table.csv", "parts/net.npy", "own.py", "named.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    text = (
        "import importlib\nfrom pathlib import Path\n\nNAME = 'named'\n"
        "TABLE = Path('table.csv'), Path('parts') / 'net.npy', '{}', 'no.csv', '..'\n"
        "importlib.import_module('named')\nimportlib.import_module(NAME)\n"
    )
    (tmp_path / "own.py").write_text(text.format(""))
    sources = Sources.read(tmp_path / "own.py", "model")
    assert [*sources.modules] == ["named.py"]
    assert sorted(sources.uncopied) == [
        f"{tmp_path}/parts/net.npy, which own.py names",
        f"{tmp_path}/table.csv, which own.py names",
        "what line 7 of own.py imports by a name that is made as it runs",
    ]
    with pytest.warns(UserWarning, match=r"no copy of .*; nor of .*: the model needs that where"):
        warn_of_uncopied(sources, "model")
    (tmp_path / "own.py").write_text(text.format("__file__"))
    sources = Sources.read(tmp_path / "own.py", "model")
    assert sources.modules.keys() == {"named.py", "table.csv", "parts/net.npy"}
    assert len(sources.uncopied) == 1


def test_programs_of_several_files_are_kept_whole(copied, capsys, monkeypatch):
    """Each folder has a helpers.py of its own, and a random.py that is not Python's."""
    model = copied.read_text().replace(
        "from pyrovae.nn import MLP", "from helpers import net as MLP"
    )
    sources = {
        "a/own.py": model.replace(PRIOR, "helpers.prior(self.zero)") + "import random, helpers\n",
        "a/helpers.py": "import importlib, nets.mlp\nfrom nets import prior\nnet = nets.mlp.MLP\n"
        "importlib.import_module('named').known\nimportlib.import_module('named')\n",
        "a/named.py": "from pathlib import Path\nknown = 1\n"
        "assert (Path(__file__).parent / 'nets' / 'table.txt').read_text() == 'numbers'\n",
        "a/nets/__init__.py": "from .priors import prior\n",
        "a/nets/mlp.py": "from pyrovae.nn import MLP\n",
        "a/nets/priors.py": "def prior(zero):\n    import late\n    return late.prior(zero)\n",
        "a/late.py": f"import pyro.distributions as dist\ndef prior(zero):\n    "
        f"return {PRIOR.replace('self.', '')}\n",
        "b/own.py": "from pyrovae.guides.mean_field import MeanField\nimport helpers as h\n"
        "class Guide(MeanField):\n    def __init__(self, shape):\n"
        "        super().__init__(shape, latent=h.LATENT, hidden=8)\n",
        "b/helpers.py": "LATENT = 2\n",
    }
    for name, source in sources.items():
        (copied.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (copied.parent / name).write_text(source)
    (copied.parent / "a/nets/table.txt").write_text("numbers")
    for folder in "ab":
        (copied.parent / folder / "random.py").write_text("raise SystemExit\n")
    pair = ["--model", "a/own.py", "--guide", "b/own.py"]
    before = [*sys.path]
    options = [*DIGITS, "--set", "model.hidden=8", "--set", "model.latent=2", *SIZES[-4:]]
    assert run("train", *pair, *options, "--epochs", "1", "--out", "r") == 0
    kept = {p.relative_to("r/programs").as_posix(): p.read_text() for p in Path("r").rglob("*.py")}
    renamed = {"a/own.py": "model.py", "b/own.py": "guide.py"}
    copies = {renamed.get(n, n.replace("a/", "model/").replace("b/", "guide/")) for n in sources}
    assert kept.keys() == copies
    assert kept["model/helpers.py"] == sources["a/helpers.py"]

    (copied.parent / "c").mkdir()
    monkeypatch.chdir("c")
    found = evaluated(capsys, "../r")
    for file in ("b/helpers.py", "a/late.py"):
        (copied.parent / file).write_text("edited = True\n")
        kind = {"a": "model", "b": "guide"}[file[0]]
        resume = ["train", "--out", "../r", "--resume", "--epochs", "2"]
        assert run(*resume, f"--{kind}", f"../{file[0]}/own.py") == 2
        assert f"{file} is not what the run was made with" in capsys.readouterr().err
    for folder in "ab":
        shutil.rmtree(copied.parent / folder)
    assert evaluated(capsys, "../r") == found
    assert type(pyrovae.load("../r").guide).__name__ == "Guide"
    assert run(*resume) == 0
    assert (sys.modules.keys() & {"helpers", "late", "nets"}, sys.path) == (set(), before)
    assert not list(copied.parent.rglob("__pycache__"))
    (copied.parent / "r/programs/model/late.py").write_text("")
    capsys.readouterr()
    assert run("evaluate", "../r") == 2
    assert "programs/model/late.py was edited since" in capsys.readouterr().err
    Path("own.py").write_text("import nothing_such\n")
    assert run("check", "--model", "own.py", "--guide", "mean_field", *DIGITS) == 2
    assert capsys.readouterr().err.count("own.py:1: ") == 1


def test_an_edit_counts_at_once(copied):
    text, one = copied.read_text(), "Normal(self.zero, 1.0)"
    texts = [text, text.replace(one, "Normal(self.zero, 2.0)")]
    times = copied.stat()
    for name, text in zip("ab", texts, strict=True):
        copied.write_text(text)
        os.utime(copied, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert run(*TRAIN, "--model", "own.py", "--out", name) == 0
    assert history(copied.parent / "a") != history(copied.parent / "b")


def test_networks_of_a_functional_program_follow_the_seed(copied):
    copied.write_text(
        "import pyro, torch, pyro.distributions as dist\n"
        "decoder = torch.nn.Linear(2, 64)\n"
        "def model(x):\n"
        "    pyro.module('decoder', decoder)\n"
        "    with pyro.plate('data', len(x)):\n"
        "        z = pyro.sample('z', dist.Normal(torch.zeros(2), 1.0).to_event(1))\n"
        "        logits = decoder(z).reshape(*z.shape[:-1], 1, 8, 8)\n"
        "        pyro.sample('x', dist.Bernoulli(logits=logits).to_event(3), obs=x)\n"
    )
    command = ["train", "--model", "own.py", "--guide", "mean_field", *DIGITS, "--epochs", "1"]
    command += ["--set", "guide.latent=2", "--set", "guide.hidden=8"]
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        assert run(*command, "--seed", seed, "--out", name) == 0
    one, same, other = (outcome(copied.parent / name) for name in "abc")
    assert one == same
    assert one[0] != other[0]


def test_defaults_that_json_does_not_know_stay_with_the_program(copied, capsys):
    text = copied.read_text()
    copied.write_text(text.replace('activation: str = "ReLU"', "activation=torch.nn.Tanh"))
    assert run(*TRAIN, "--model", "own.py", "--out", "r") == 0
    settings = config(copied.parent / "r")["model"]["settings"]
    assert settings == {"latent": 2, "hidden": 8, "mean": None}
    assert evaluated(capsys, "r")["num_data"] == 359
    assert run("train", "--out", "r", "--resume", "--epochs", "3") == 0


def test_one_sample_is_told_in_strict_json(tmp_path, no_pictures, capsys):
    assert run(*TRAIN, "--out", tmp_path / "r") == 0
    found = evaluated(capsys, tmp_path / "r", "--samples", "1")["log_likelihood"]
    assert found["standard_error"] is None
    assert found["mean"] < 0
    assert run("evaluate", tmp_path / "r", "--samples", "1", "--no-diagnostics") == 0
    assert "unknown Monte Carlo" in capsys.readouterr().out
    assert run("report", tmp_path / "r") == 0


def test_a_file_is_found_again_from_another_folder(tmp_path, no_pictures, monkeypatch, capsys):
    import numpy as np

    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    np.save("x.npy", np.random.default_rng(0).normal(size=(60, 3)))
    gaussian = ["--model", "gaussian", "--guide", "mean_field", "--data", "x.npy"]
    options = ["--batch-size", "40", "--epochs", "1", "--out", tmp_path / "r"]
    assert run("train", *gaussian, *options) == 0
    monkeypatch.chdir(tmp_path)
    assert evaluated(capsys, "r")["num_data"] == 12


def test_tensorboard_on_request(tmp_path, no_pictures):
    assert run(*TRAIN, "--tensorboard", "--out", tmp_path / "r") == 0
    (events,) = (tmp_path / "r/tensorboard").iterdir()
    assert b"valid/elbo" in events.read_bytes()
