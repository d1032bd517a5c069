"""The examples in docstrings run, and print what they say.

An example may use the names of its module, ``pyrovae``, ``pyro`` and ``torch``, the digits as
``data``, a batch ``x`` of them, and a small pair ``model`` and ``guide`` trained for a few epochs.
Three dots stand for what changes from one version of a library to the next.
"""

import copy
import doctest
import importlib

import pyro
import pytest
import torch
from tree import FILES

import pyrovae
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules():
    """The files with an example in a docstring."""
    return [name for name, path in FILES.items() if ">>> " in path.read_text(encoding="utf-8")]


def examples(name):
    module = importlib.import_module("pyrovae" if name == "__init__" else f"pyrovae.{name}")
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.fixture(scope="module")
def ready():
    """What every example finds ready."""
    with pyro.settings.context(module_local_params=False):
        pyro.set_rng_seed(0)
        data = pyrovae.load_data("digits", binarize="dynamic")
        shape, small = data.shape, {"latent": 4, "hidden": (32,)}
        model, guide = Bernoulli(shape, **small), MeanField(shape, **small)
        pyrovae.fit(model, guide, data, epochs=20, lr=3e-3, seed=0)
    names = {"pyrovae": pyrovae, "pyro": pyro, "torch": torch, "data": data, "x": data.train[:128]}
    return names | {"model": model, "guide": guide}


@pytest.mark.parametrize("name", modules())
def test_examples_print_what_they_say(name, ready, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    runner, said = doctest.DocTestRunner(optionflags=OPTIONS), []
    for test in examples(name):
        test.globs |= ready | copy.deepcopy({key: ready[key] for key in ("model", "guide")})
        runner.run(test, out=said.append, clear_globs=False)
        assert any(example.want for example in test.examples), f"{test.name} shows nothing"
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


def test_every_example_is_in_a_docstring_that_is_run():
    lines = {name: FILES[name].read_text(encoding="utf-8").count(">>> ") for name in modules()}
    found = {name: sum(len(test.examples) for test in examples(name)) for name in modules()}
    assert lines == found
