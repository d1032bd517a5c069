"""Data as people have them give the numbers that the same tensors give."""

import functools
import inspect
import re

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import run
from scipy import sparse
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

import pyrovae
from pyrovae.data.given import as_tensors
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.gaussian import Gaussian
from pyrovae.objectives import make_objective


class Conditional(nn.Module):
    """A model of x given a covariate and a site."""

    def __init__(self):
        super().__init__()
        self.net, self.site = nn.Linear(2, 3), nn.Embedding(3, 3)

    def model(self, x, age, site):
        pyro.module("given", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            loc = self.net(z) + self.site(site) + age[..., None]
            pyro.sample("x", dist.Normal(loc, 1).to_event(1), obs=x)

    def guide(self, x, age, site):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[..., :2], 1).to_event(1))


class Items(Dataset):
    """A map-style data set of x alone, of tuples or of dicts."""

    def __init__(self, x, kind="x"):
        self.x, self.kind = x, kind

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        datum = self.x[i]
        return {"x": datum, "pair": (datum, i), "dict": {"number": i, "x": datum}}[self.kind]


@pytest.fixture
def x():
    return torch.randint(0, 9, (40, 3), generator=torch.Generator().manual_seed(0)).float()


def polars_frame(values):
    polars = pytest.importorskip("polars")
    return polars.DataFrame({f"c{j}": values[:, j].numpy() for j in range(3)})


FORMS = {
    "float64": lambda x: x.double().numpy(),
    "integers": lambda x: x.int().numpy(),
    "read-only": lambda x: np.broadcast_to(x.numpy(), x.shape),
    "pandas": lambda x: pd.DataFrame(x.numpy()),
    "polars": polars_frame,
    "csr": lambda x: sparse.csr_matrix(x.numpy()),
    "csc array": lambda x: sparse.csc_array(x.numpy()),
    "tensor data set": TensorDataset,
    "data set": Items,
    "loader": lambda x: DataLoader(Items(x), batch_size=7, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_tensor(x, form):
    (found,) = as_tensors(FORMS[form](x))
    assert found.dtype == torch.float32
    assert torch.equal(found, x)


def test_every_function_gives_the_same_numbers(x):
    model, guide = Gaussian((3,), latent=2), MeanField((3,), latent=2)
    given = x.double().numpy()
    calls = {
        "log_likelihood": functools.partial(pyrovae.log_likelihood, num_samples=5),
        "annealed": functools.partial(
            pyrovae.annealed_log_likelihood, num_chains=2, num_temperatures=3
        ),
        "elbo": pyrovae.elbo,
        "encode": pyrovae.encode,
        "diagnose": functools.partial(pyrovae.diagnose, intervals=False),
        "check": pyrovae.check,
        "fit": functools.partial(pyrovae.fit, epochs=1, batch_size=20, lr=1e-9),
    }
    named = pyrovae.elbo(x=given, guide=guide, model=model, seed=0)
    assert str(named) == str(pyrovae.elbo(model, guide, x, seed=0))
    for name in ("annealed", "elbo", "diagnose", "check"):
        one, two = (str(calls[name](model, guide, each, seed=0)) for each in (given, x))
        assert one == two, name
    one, two = (calls["log_likelihood"](model, guide, each, seed=0) for each in (given, x))
    assert torch.equal(one.log_prob, two.log_prob)
    one, two = (pyrovae.encode(guide, x=each, seed=0)["z"] for each in (given, x))
    assert torch.equal(one, two)
    assert torch.equal(*(pyrovae.sample(model, like=each, n=3, seed=0) for each in (given, x)))
    z = torch.ones(2, 2)
    for latent, each in ((z.double().numpy(), given), (z, x)):
        found = pyrovae.decode(model, {"z": latent}, like=each)
        assert torch.equal(found, pyrovae.decode(model, {"z": z}, like=x))
    options = {"n": 50, "num_samples": 3, "corrected": False, "seed": 0}
    ranks = [pyrovae.calibrate(model, guide, each, **options).ranks["z"] for each in (given, x)]
    ranks.append(pyrovae.calibrate(model, guide, like=given, **options).ranks["z"])
    assert all(torch.equal(each, ranks[0]) for each in ranks)
    few = {"n": 3, "num_chains": 1, "num_temperatures": 0, "seed": 0, "compile": False}
    one, two = (pyrovae.bidirectional(model, guide, like=each, **few) for each in (given, x))
    assert torch.equal(one.upper, two.upper)
    whole = x.int().numpy()
    one, two = (pyrovae.interpolate(model, guide, each[:2], each[2:4]) for each in (whole, x))
    assert torch.equal(one, two)
    values = np.linspace(-1, 1, 3)
    one = pyrovae.traverse(model, guide, given[:2], "z", 0, values)
    assert torch.equal(one, pyrovae.traverse(model, guide, x[:2], "z", 0, torch.tensor(values)))
    one, two = (calls["fit"](model, guide, each, seed=0) for each in (given, x))
    assert one.history[0]["train_loss"] == pytest.approx(two.history[0]["train_loss"], rel=1e-6)


def takes_a_pair(name):
    """Whether a public function takes a model and a guide, or a guide after a model."""
    function = getattr(pyrovae, name)
    first = [*inspect.signature(function).parameters][:2] if inspect.isfunction(function) else []
    return first in (["model", "guide"], ["guide", "x"])


PAIRED = [name for name in pyrovae.__all__ if takes_a_pair(name)]


@pytest.mark.parametrize("name", PAIRED)
def test_a_guide_before_its_model_is_refused_by_one_sentence(x, name):
    model, guide = Gaussian((3,), latent=2), MeanField((3,), latent=2)
    data = {"interpolate": (x[:2], x[2:4]), "traverse": (x, "z", 0, torch.ones(2))}.get(name, (x,))
    more = {"calibrate": {"n": 50}, "bidirectional": {"like": x}}.get(name, {})
    data = () if "like" in more else data
    sentence = r"^Expected the model before the guide, got a guide that observes 'x', as a model"
    if name == "check":
        row = pyrovae.check(guide, model, x)["sites"]
        assert row.status == "failed"
        assert re.match(sentence, row.message)
        return
    with pytest.raises(pyrovae.InputError, match=sentence):
        getattr(pyrovae, name)(guide, model, *data, **more)


@pytest.mark.filterwarnings("ignore:Found non-auxiliary vars in guide:UserWarning")
def test_a_guide_before_its_model_is_not_trained(x):
    model, guide = Gaussian((3,), latent=2), MeanField((3,), latent=2)
    svi = pyrovae.SVI(guide, model, pyro.optim.Adam({"lr": 1e-3}), loss=pyro.infer.Trace_ELBO())
    with pytest.raises(pyrovae.InputError, match="Expected the model before the guide"):
        svi.step(x)


def test_a_guide_alone_draws_no_data(x):
    with pytest.raises(pyrovae.InputError, match=r"a program that samples \['z'\] alone"):
        pyrovae.sample(MeanField((3,), latent=2), like=x)


def test_what_stands_in_the_wrong_place_is_named(x):
    model, guide = Gaussian((3,), latent=2), MeanField((3,), latent=2)
    with pytest.raises(TypeError, match=r"encode\(guide, x, .*argument 1: x comes after the guide"):
        pyrovae.encode(x.numpy(), guide)
    with pytest.raises(TypeError, match=r"elbo\(model, guide, x, .*Tensor as argument 2"):
        pyrovae.elbo(model, x, guide)
    with pytest.raises(TypeError, match=r"'x'"):
        pyrovae.encode(model, guide)
    # A program in the place of data, or behind them, whatever comes before it.
    for name in ("encode", "elbo", "log_likelihood", "check", "diagnose", "impute", "reconstruct"):
        for wrong in ((model, x, guide), (guide, x, model), (model, guide, x, guide)):
            with pytest.raises(TypeError, match=rf"^Expected {name}\(.*and no program after x\.$"):
                getattr(pyrovae, name)(*wrong)
    with pytest.raises(TypeError, match=r"classify\(guide, x, .*MeanField as argument 3"):
        pyrovae.classify(guide, guide, guide)
    data = pyrovae.load_data(x.numpy())
    for call in (
        lambda: pyrovae.log_likelihood(model, guide, data),
        lambda: pyrovae.encode(guide, data),
        lambda: pyrovae.sample(model, like=data),
        lambda: pyrovae.bidirectional(model, guide, like=data),
    ):
        with pytest.raises(TypeError, match=r"got Dataset: .* \*data.split\('test'\)"):
            call()


def test_categories_of_polars(x):
    """An Enum keeps its order; a Categorical is sorted, and only where all of its words are."""
    polars = pytest.importorskip("polars")
    words = ["v", "u", "w", "u"] * 10
    kinds = {"e": polars.Enum(["w", "v", "u", "t"]), "c": polars.Categorical}
    columns = {name: polars.Series(words, dtype=kind) for name, kind in kinds.items()}
    frame = polars.DataFrame({"a": x[:, 0].numpy(), **columns})
    categories = [("w", "v", "u", "t"), ("u", "v", "w")]
    for data in (pyrovae.load_data(frame), pyrovae.Dataset.of((frame, x))):
        assert [column.categories for column in data.columns[1:]] == categories
        codes = data.train[:, 1:].long().tolist()
        assert all(categories[0][e] == categories[1][c] for e, c in codes)
    part = frame[:1]
    assert [each.tolist() for each in as_tensors(part[["e"]], part["e"])] == [[[1]], [1]]
    for each in (part, part["c"]):
        with pytest.raises(pyrovae.InputError, match=r"'c' of the frame, .* polars\.Enum"):
            as_tensors(x, each)


def test_a_datum_brings_its_context(x):
    ages, sites = torch.rand(40), torch.arange(40) % 3
    pair = Conditional()
    expected = pyrovae.elbo(pair.model, pair.guide, x, ages, sites, seed=0).elbo
    for given in (
        (TensorDataset(x, ages, sites),),
        (DataLoader(TensorDataset(x, ages, sites)),),
        (x.numpy(), ages.double().numpy(), pd.Series(sites.numpy())),
        (x.numpy(), ages, pd.Series(pd.Categorical(np.array(["a", "b", "c"])[sites.numpy()]))),
    ):
        found = pyrovae.elbo(pair.model, pair.guide, *given, seed=0).elbo
        torch.testing.assert_close(found, expected)
    once = {"epochs": 1, "batch_size": 8, "seed": 0}
    losses = []
    for given in ((x, ages, sites.numpy()), ((x, ages, sites.numpy()),)):
        torch.manual_seed(0)
        pair = Conditional()
        losses.append(pyrovae.fit(pair.model, pair.guide, *given, **once).history[0]["train_loss"])
    assert losses[0] == losses[1] > 0
    with pytest.raises(pyrovae.InputError, match="Dataset with context of its own"):
        pyrovae.fit(pair.model, pair.guide, pyrovae.load_data("digits"), ages, **once)
    assert as_tensors(Items(x, "pair"))[1].tolist() == list(range(40))
    named = as_tensors(Items(x, "dict"))
    assert torch.equal(named[0], x)
    assert named[1].tolist() == list(range(40))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (np.zeros((2, 2), np.uint8), "divided by 255"),
        (np.full((2, 2), 2**24 + 1), "up to 2\\^24"),
        (np.zeros((2, 2), complex), "dtype complex128"),
        (pd.DataFrame({"a": ["u", "v"], "b": [1.0, 2.0]}), "pandas.Categorical"),
        (sparse.csr_matrix((2**31, 2**20)), "GiB of memory"),
        (
            DataLoader(Items(torch.ones(4, 1)), sampler=WeightedRandomSampler([1.0] * 4, 4)),
            "takes each datum once, got WeightedRandomSampler",
        ),
        (iter([1]), "as a tensor, an array, a frame"),
        ((torch.ones(4, 2), torch.ones(3)), "a row for each of 4"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_a_sentence(given, sentence):
    with pytest.raises(pyrovae.InputError, match=sentence):
        pyrovae.Dataset.of(given)


def test_context_is_named(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(60, 3)), columns=list("abc"))
    frame["age"], frame["site"] = rng.normal(size=60), np.array(["u", "v", "w"])[np.arange(60) % 3]
    frame.to_csv(tmp_path / "a.csv", index=False)
    codes = np.arange(60) % 3
    arrays = {"x": frame[list("abc")].to_numpy(np.float32), "age": frame["age"].to_numpy()}
    np.savez(tmp_path / "a.npz", **arrays, site=frame["site"].to_numpy(dtype=str))
    split = {f"{n}_{part}": v[rows] for n, v in (arrays | {"site": codes}).items()
             for part, rows in (("train", slice(0, 40)), ("test", slice(40, 60)))}  # fmt: skip
    np.savez(tmp_path / "b.npz", **split)
    loaded = [
        pyrovae.load_data(source, context="age,site")
        for source in (frame, tmp_path / "a.csv", tmp_path / "a.npz", tmp_path / "b.npz")
    ]
    for data in loaded:
        assert data.shape == (3,)
        assert data.provenance["context"] == "age,site"
        age, site = data.context.test
        assert age.dtype == torch.float32
        assert site.dtype == torch.int64
        rows = [np.flatnonzero(np.isclose(frame["a"], value))[0] for value in data.test[:, 0]]
        torch.testing.assert_close(age, torch.tensor(frame["age"][rows].to_numpy()).float())
        assert site.tolist() == codes[rows].tolist()
    assert loaded[0].provenance["context_categories"] == {"site": ["u", "v", "w"]}
    for context, sentence in [
        ("agee", "did you mean 'age'"),
        ("age,age", "each once"),
        ("", "each once"),
    ]:
        with pytest.raises(pyrovae.InputError, match=sentence):
            pyrovae.load_data(frame, context=context)
    with pytest.raises(pyrovae.InputError, match="which names columns, got digits"):
        pyrovae.load_data("digits", context="age")
    frame.loc[3, "age"] = np.nan
    with pytest.raises(pyrovae.InputError, match="got none in row 3: fill it"):
        pyrovae.load_data(frame, context=["age"])


def test_labels_and_columns_go_together():
    frame = pd.DataFrame({"a": np.arange(30.0), "b": np.arange(30.0), "n": np.arange(30)})
    frame["label"] = np.arange(30) % 2
    data = pyrovae.load_data(frame, context="n,labels", labelled=4)
    n, y = data.context.train
    assert n.dtype == torch.int64
    assert (n.float() == data.train[:, 0]).all()
    assert (y >= 0).sum() == 4
    assert data.shape == (2,)


def write_h5ad(path, x):
    """A file as anndata 0.8 writes it."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        matrix = sparse.csr_matrix(x)
        for name, kind in (("X", "csr_matrix"), ("layers/counts", "array")):
            if kind == "array":
                file[name] = x * 2
                file[name].attrs["encoding-type"] = kind
                continue
            group = file.create_group(name)
            group.attrs["encoding-type"], group.attrs["shape"] = kind, x.shape
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(matrix, part)
        obs = file.create_group("obs")
        obs.attrs["column-order"] = ["batch", "size"]
        obs["size"] = np.arange(len(x), dtype=np.float64)
        batch = obs.create_group("batch")
        batch.attrs["encoding-type"], batch.attrs["ordered"] = "categorical", False
        batch["codes"], batch["categories"] = np.arange(len(x), dtype=np.int8) % 2, ["p", "q"]


def test_an_annotated_file(tmp_path, x):
    path = tmp_path / "cells.h5ad"
    write_h5ad(path, x.numpy())
    data = pyrovae.load_data(path, context="size,batch")
    layer = pyrovae.load_data(f"{path}:counts", context="size,batch")
    size, batch = data.context.train
    assert torch.equal(data.train, x[size.long()])
    assert torch.equal(layer.train, 2 * data.train)
    assert torch.equal(batch, size.long() % 2)
    assert data.provenance["context_categories"] == {"batch": ["p", "q"]}
    with pytest.raises(pyrovae.InputError, match=r"one of X, counts, got 'count' .did you mean"):
        pyrovae.load_data(f"{path}:count")


def test_anndata_itself(tmp_path, x):
    anndata = pytest.importorskip("anndata")
    obs = pd.DataFrame({"batch": pd.Categorical(["p", "q"] * 20), "size": np.arange(40.0)})
    obs.index = obs.index.astype(str)
    cells = anndata.AnnData(sparse.csr_matrix(x.numpy()), obs=obs)
    assert torch.equal(as_tensors(cells)[0], x)
    anndata.settings.allow_write_nullable_strings = True  # pandas 3 has no other words
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for source in (cells, tmp_path / "cells.h5ad"):
        size, batch = pyrovae.load_data(source, context="size,batch").context.test
        assert torch.equal(batch, size.long() % 2)


def test_loads_from_a_torch_data_set_with_labels(x):
    data = pyrovae.load_data(TensorDataset(x, torch.arange(40)))
    assert (x[data.labels.test] == data.test).all()


def test_columns_are_context_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(40, 3)), columns=list("abc"))
    frame["age"], frame["site"] = rng.normal(size=40), np.arange(40) % 3
    frame.to_csv("a.csv", index=False)
    for kind, body in (("model", MODEL), ("guide", GUIDE)):
        (tmp_path / f"{kind}.py").write_text(body)
    pair = ["--model", "model.py", "--guide", "guide.py", "--data", "a.csv"]
    assert run("train", *pair, "--context", "age,site", "--epochs", 1, "--out", "run") == 0
    assert run("evaluate", "run", "--samples", 5, "--no-diagnostics") == 0
    assert pyrovae.load("run").data.provenance["context"] == "age,site"


MODEL = """
import pyro, pyro.distributions as dist, torch
from pyro.nn import PyroModule
from torch import nn

class Model(PyroModule):
    def __init__(self, shape, latent=2):
        super().__init__()
        self.decoder, self.site = nn.Linear(latent, 3), nn.Embedding(3, 3)
        self.latent = latent

    def forward(self, x, age, site):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1).to_event(1))
            loc = self.decoder(z) + self.site(site) + age[..., None]
            pyro.sample("x", dist.Normal(loc, 1).to_event(1), obs=x)
"""
GUIDE = """
import pyro, pyro.distributions as dist
from pyro.nn import PyroModule
from torch import nn

class Guide(PyroModule):
    def __init__(self, shape, latent=2):
        super().__init__()
        self.encoder = nn.Linear(3, latent)

    def forward(self, x, age, site):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1).to_event(1))
"""


def test_numbers_of_numpy_are_taken_for_pythons(x):
    def found(kind):
        pyro.set_rng_seed(0)
        model, guide = Gaussian((3,), 2, (8,)), MeanField((3,), 2, (8,))
        sizes = {"epochs": kind(2), "batch_size": kind(7), "seed": kind(0)}
        sizes["objective"] = make_objective("iwae", particles=kind(4), backward=kind(2))
        fit = pyrovae.fit(model, guide, x, **sizes)
        bound = pyrovae.elbo(model, guide, x, particles=kind(3), seed=kind(1))
        ll = pyrovae.log_likelihood(model, guide, x, num_samples=kind(20), seed=kind(1))
        path = pyrovae.traverse(model, guide, x, "z", kind(1), [0.0])
        return fit.history[-1]["train_loss"], bound.mean, ll.mean, path.sum().item()

    assert found(np.int64) == found(int)


@pytest.mark.parametrize("seed", ["a", 1.5, [1]])
def test_a_seed_that_is_no_integer_is_refused(x, seed):
    pair = Gaussian((3,), 2, (8,)), MeanField((3,), 2, (8,))
    for call in (
        functools.partial(pyrovae.fit, *pair, x, epochs=1),
        functools.partial(pyrovae.elbo, *pair, x),
        functools.partial(pyrovae.check, *pair, x),
        functools.partial(pyrovae.log_likelihood, *pair, x, num_samples=20),
        functools.partial(
            pyrovae.annealed_log_likelihood, *pair, x, num_chains=2, num_temperatures=3
        ),
        functools.partial(pyrovae.sample, pair[0], like=x, n=2),
        functools.partial(pyrovae.reconstruct, *pair, x),
        functools.partial(pyrovae.diagnose, *pair, x),
    ):
        with pytest.raises(pyrovae.InputError, match=r"an integer seed or None, got"):
            call(seed=seed)
