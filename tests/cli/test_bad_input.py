"""Bad input: one sentence, exit code 2, and everything on disk as it was."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from commands import DIGITS, PAIR, SIZES, TRAIN, refusal, run, snapshot

SITE = 'pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))'
MODULE = "import pyro.nn\nclass {}(pyro.nn.PyroModule):\n    pass\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
        assert run(*TRAIN, "--out", folder / "run") == 0
        assert run("evaluate", folder / "run", "--samples", "2", "--no-diagnostics") == 0
    return folder / "run"


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    """A working folder with one finished run in it; no command draws pictures."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    return tmp_path


@pytest.fixture
def refused(workspace, capsys):
    def check(*arguments, says=(), code=2):
        error = refusal(capsys, *arguments, code=code)
        for words in says:
            assert words in error

    return check


OPTIONS = {
    "--model bernouli": ["No model 'bernouli'", "did you mean 'bernoulli'?", "linear_gaussian"],
    "--guide meanfield": ["No guide 'meanfield'", "did you mean 'mean_field'?"],
    "--guide bernoulli": ["No guide 'bernoulli'", "linear_gaussian", "mean_field"],
    "--objective trace_elb": ["No objective 'trace_elb'", "did you mean 'trace_elbo'?"],
    "--data digit": ["got 'digit'", "did you mean 'digits'?", ".npy"],
    "--data missing.npy": ["missing.npy"],
    "--data run": ["Expected images in run"],
    "--binarize dynmic": ["'dynmic'", "did you mean 'dynamic'?"],
    "--binarize none": ["outside the support of Bernoulli", "--binarize threshold"],
    "--device tpu": ["'auto', 'cpu' or 'cuda'", "'tpu'"],
    "--device cpu:x": ["'auto', 'cpu' or 'cuda'", "'cpu:x'"],
    "--batch-size 0": ["between 1 and the 1258 training data, got 0"],
    "--batch-size 1259": ["between 1 and the 1258 training data, got 1259"],
    "--epochs 0": ["epochs >= 1, got 0"],
    "--particles 0": ["particles >= 1, got 0"],
    "--particles 2147483648": ["2147483648 particles of each of 64 data would take", "GiB"],
    "--objective miwae --particles 2147483648": ["10737418240 particles", "ask for fewer"],
    "--patience 0": ["patience >= 1, got 0"],
    "--lr 0": ["learning rate > 0, got 0"],
    "--lr nan": ["learning rate > 0, got nan"],
    "--set latent": ["--set model.NAME=VALUE", "'latent'"],
    "--set hidden=": ["--set model.NAME=VALUE", "'hidden='"],
    "--set prior.scale=2": ["--set model.NAME=VALUE", "'prior.scale=2'"],
    "--set hiden=8": ["takes no setting 'hiden'", "did you mean 'hidden'?", "latent, hidden"],
    "--set guide.scale=8": ["guide 'mean_field' takes no setting 'scale'"],
    "--set model.latent=3": ["'z'", "[3] in the model", "[2] in the guide"],
    "--set latent=0": ["model 'bernoulli' cannot be built", "positive width"],
    "--set latent=5.5": ["model 'bernoulli' cannot be built", "whole numbers", "got 5.5"],
    "--set hidden=[8,2.5]": ["whole numbers for the sizes of a network, got [8, 2.5]"],
    "--set latent=b'1'": ["model 'bernoulli' cannot be built with latent="],
    "--set latent=five": ["model 'bernoulli' cannot be built with latent='five'"],
    "--set hidden={8,9}": ["model 'bernoulli' cannot be built"],
    "--set activation=Relu": ["activation of torch.nn", "'Relu'"],
    "--model vamp_prior --guide flow": ["got a flow for 'z'"],
    "--model gone.py": ["No file 'gone.py'", "model"],
    "--model run/weights.safetensors": ["No model 'run/weights.safetensors'"],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options(refused, options):
    refused(*TRAIN, *options.split(), "--out", "new", says=OPTIONS[options])


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], [*TRAIN, "--epochs", "many", "--out", "new"], ["evaluate"]],
    ids=" ".join,
)
def test_commands_that_cannot_be_parsed(workspace, capsys, arguments):
    before = snapshot(workspace)
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert snapshot(workspace) == before


def test_a_pair_and_data_are_needed(refused):
    refused("train", "--out", "new", says=["--model, --guide, --data"])
    refused("train", *PAIR, "--out", "new", "--resume", says=["--data"])
    refused("train", "--out", "gone", "--resume", says=["gone holds no run to go on with"])


def test_cuda_where_there_is_none(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0"):
        refused(*TRAIN, "--device", device, "--out", "new", says=["no CUDA device", "--device cpu"])
        refused("evaluate", "run", "--device", device, says=["no CUDA device"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(*TRAIN, "--device", "cuda:2", "--out", "new", says=["2 CUDA devices"])


PROGRAMS = {
    "no model": ("import torch\nx = 3\n", ["holds no model", "function called 'model'"]),
    "several": (MODULE.format("A") + MODULE.format("B"), ["several", "['A', 'B']", "own.py:A"]),
    "syntax": ("def model(x:\n    pass\n", ["own.py", "line 1", "SyntaxError"]),
    "empty": ("", ["holds no model"]),
    "binary": ("\0", ["own.py", "SyntaxError"]),
    "import": ("import torch\nimport no_such_thing\n", ["own.py:2", "no_such_thing"]),
    "exit": ("import sys\nsys.exit('said')\n", ["own.py:2", "SystemExit", "said"]),
    "shape": (
        "import pyro, torch, pyro.distributions as dist\n"
        "def model(x):\n"
        "    return x.reshape(-1, 784)\n",
        ["own.py:3", "784"],
    ),
    "bug": ("def model(x):\n    return {}['said']\n", ["own.py:2", "KeyError", "said"]),
    "argument": (
        MODULE.format("A").replace("pass", "def __init__(self, shape, width): pass"),
        ["cannot be built", "width"],
    ),
    "constructor": (
        MODULE.format("A").replace("pass", "def __init__(self): self.gone.x = 3"),
        ["cannot be built", "AttributeError"],
    ),
    "no plate": (
        "import torch, pyro, pyro.distributions as dist\n"
        "def model(x):\n"
        "    z = pyro.sample('z', dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))\n"
        "    pyro.sample('x', dist.Normal(torch.zeros_like(x), 1.0).to_event(3), obs=x)\n",
        ["outside the plate 'data'"],
    ),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_model_files(workspace, refused, case):
    source, says = PROGRAMS[case]
    (workspace / "own.py").write_text(source)
    data = ["--data", "digits", "--binarize", "dynamic", "--epochs", "1"]
    guide = ["--guide", "mean_field", "--set", "guide.latent=2"]
    refused("train", "--model", "own.py", *guide, *data, "--out", "new", says=says)


def test_classes_in_files(workspace, refused, repository):
    shutil.copy(repository / "models" / "bernoulli.py", "own.py")
    says = ["'Bernouli'", "did you mean 'Bernoulli'?"]
    refused(*TRAIN, "--model", "own.py:Bernouli", "--out", "new", says=says)
    refused(*TRAIN, "--guide", "own.py", "--set", "guide.latent=2", "--out", "new", says=["guide"])


GUIDES = {
    "missing": (SITE, "pass", ["'z' is missing in the guide"]),
    "misspelt": (SITE, SITE.replace('"z"', '"zz"'), ["'z' is missing", "did you mean 'zz'"]),
    "one too many": (
        SITE,
        f"{SITE}; " + SITE.replace('"z"', '"w"'),
        ["samples 'w'", "no latent site of the model"],
    ),
    "other event": (SITE, SITE.replace(".to_event(1)", ""), ["own.py", "Site 'z'", ".to_event(1)"]),
}


@pytest.mark.parametrize("case", GUIDES)
def test_guides_that_do_not_fit(workspace, refused, repository, case):
    old, new, says = GUIDES[case]
    source = (repository / "guides" / "mean_field.py").read_text()
    (workspace / "own.py").write_text(source.replace(old, new))
    assert (workspace / "own.py").read_text() != source
    refused(*TRAIN, "--guide", "own.py", "--out", "new", says=says)


@pytest.mark.filterwarnings("ignore:No gradient reaches model.weight")
def test_an_objective_that_the_pair_rules_out(workspace, refused):
    (workspace / "own.py").write_text(
        "import torch, pyro, pyro.distributions as dist\n"
        "net = torch.nn.Linear(64, 3)\n"
        "def sample(x, logits, **data):\n"
        "    with pyro.plate('data', len(x)):\n"
        "        pyro.sample('y', dist.OneHotCategorical(logits=logits))\n"
        "        for name in data:\n"
        "            pyro.sample(name, dist.Normal(0 * x, 1).to_event(3), obs=x)\n"
        "        return pyro.module('net', net)\n"
        "def guide(x):\n"
        "    sample(x, net(x.flatten(1)))\n"
        "def model(x):\n"
        "    sample(x, torch.zeros(3), seen=x)\n"
    )
    pair = ["--model", "own.py", "--guide", "own.py", "--objective", "trace_mean_field_elbo"]
    refused("train", *pair, "--data", "digits", "--out", "new", says=["reparam"])


def spoilt(value):
    x = np.ones((20, 4), np.float32)
    x[7, 2] = value
    return x


DATA = {
    "vector.npy": (lambda f: np.save(f, np.ones(20)), ["[20]"]),
    "deep.npy": (lambda f: np.save(f, np.ones((4, 1, 2, 2, 2))), ["[4, 1, 2, 2, 2]"]),
    "events.npz": (
        lambda f: np.savez(f, x_train=np.ones((9, 4)), x_test=np.ones((9, 5))),
        ["one event shape"],
    ),
    "nan.npy": (lambda f: np.save(f, spoilt(np.nan)), ["NaN or infinite", "row 7"]),
    "inf.npy": (lambda f: np.save(f, spoilt(np.inf)), ["NaN or infinite", "row 7"]),
    "nan.csv": (lambda f: np.savetxt(f, spoilt(np.nan), delimiter=","), ["NaN", "row 7"]),
    "nothing.npy": (lambda f: f.touch(), ["empty file"]),
    "nothing.csv": (lambda f: f.touch(), ["empty file"]),
    "rows.npy": (lambda f: np.save(f, np.ones((0, 4))), ["no rows"]),
    "few.npy": (lambda f: np.save(f, np.ones((2, 4))), ["at least 3 rows"]),
    "labels.npz": (
        lambda f: np.savez(f, x=np.ones((20, 4)), y=np.zeros(19)),
        ["20 labels", "[19]"],
    ),
    "words.npy": (lambda f: np.save(f, np.full((20, 4), "a")), ["real numbers"]),
    "objects.npy": (lambda f: np.save(f, np.full((9, 4), {}), allow_pickle=True), ["unpickled"]),
    "truncated.npy": (lambda f: (np.save(f, np.ones((20, 4))), os.truncate(f, 99)), ["damaged"]),
    "picture.jpg": (lambda f: f.touch(), ["picture.jpg", ".npy"]),
    "grey.npy": (lambda f: np.save(f, np.full((20, 4), 0.5)), ["0.5", "--binarize threshold"]),
    "large.npy": (lambda f: np.save(f, np.full((20, 4), 7.0)), ["7", "Bernoulli"]),
}


@pytest.mark.parametrize("name", DATA)
def test_data_files(workspace, refused, name):
    write, says = DATA[name]
    write(workspace / name)
    options = ["--epochs", "1", "--batch-size", "2", "--out", "new"]
    refused("train", *PAIR, *SIZES, "--data", name, *options, says=says)


def test_output_directories(workspace, refused):
    (workspace / "full").mkdir()
    (workspace / "full" / "thesis.tex").write_text("precious")
    refused(*TRAIN, "--out", "run", says=["holds another run", "--resume"])
    for resume in ([], ["--resume"]):
        refused(*TRAIN, "--out", "full", *resume, says=["full exists and is not empty"])
        refused(*TRAIN, "--out", "full/thesis.tex", *resume, says=["thesis.tex"])
        says = ["thesis.tex is no folder to write in"]
        refused(*TRAIN, "--out", "full/thesis.tex/new", *resume, says=says)
    for command in ("evaluate", "sample", "report"):
        refused(command, "full", says=["full holds no run"])
        refused(command, "new", says=["new holds no run"])


def test_runs_that_cannot_do_what_is_asked(workspace, refused):
    refused("evaluate", "run", "--samples", "0", says=["--samples >= 1, got 0"])
    refused("sample", "run", "-n", "0", says=["-n >= 1, got 0"])
    refused("sample", "run", "-n", "2147483648", says=["2147483648 samples would take", "GiB"])
    many = ["check", *PAIR, *DIGITS, *SIZES[:4], "--particles", "99999999999"]
    refused(*many, says=["99999999999 particles of each of 61 data would take", "ask for fewer"])
    long = ["--samples", "9999999999", "--no-diagnostics"]
    refused("evaluate", "run", *long, says=["days at 1,000,000 a second", "its time is not"])
    (workspace / "run" / "results.json").unlink()
    shutil.rmtree(workspace / "run" / "evaluation")
    refused("report", "run", says=["pyrovae evaluate run"])


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"model": {}}', "\xff"])
def test_damaged_configurations(workspace, refused, damage):
    (workspace / "run" / "config.json").write_text(damage, encoding="latin-1")
    for command in (["evaluate", "run"], ["sample", "run"], ["train", "--out", "run", "--resume"]):
        refused(*command, says=["config.json", "damaged"])


@pytest.mark.parametrize("part", ["model", "guide", "data"])
def test_configurations_with_a_part_missing(workspace, refused, part):
    path = workspace / "run" / "config.json"
    for fields in ({}, None, [], 3, "bernoulli", {"name": "bernoulli"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {part: fields}))
        refused("evaluate", "run", says=["config.json", "damaged"])


def test_data_that_changed_since(workspace, refused):
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.integers(0, 2, (60, 6)))
    command = ["train", *PAIR, *SIZES, "--data", "x.npy", "--batch-size", "20", "--epochs", "1"]
    assert run(*command, "--out", "r") == 0
    os.rename("x.npy", "y.npy")
    assert run("train", "--out", "r", "--resume", "--data", "y.npy", "--epochs", "2") == 0
    np.save("y.npy", rng.integers(0, 2, (60, 6)))
    refused("evaluate", "r", says=["not those of the run", "sha256"])
    refused("train", "--out", "r", "--resume", says=["data.sha256"])


def test_a_loss_that_is_no_number(workspace, refused, capsys):
    refused(*TRAIN, "--lr", "1e30", "--out", "new", says=["epoch 1, step 2", "site"], code=1)
