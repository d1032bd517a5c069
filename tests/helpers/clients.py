"""What holds for every example of Pyro's: steps as Pyro takes them, and log p(x) by hand."""

import math
import warnings
from functools import partial
from pathlib import Path

import pyro
import pytest
from pyro.contrib.examples import util
from pyro.infer import SVI as PyroSVI

import pyrovae
from pyrovae.data import Dataset, Splits

WHY_EAGER = "The pair runs eagerly"

# A loader of Pyro's makes this folder when it is imported, and fails if another worker of pytest
# does so at that moment (1.9.2).
Path(util.get_data_directory(util.__file__)).mkdir(parents=True, exist_ok=True)


def take(kind, make, batches, loss, optim=None, **options):
    """The losses of steps from one seed, and the SVI that took them.

    ``make`` returns a model and a guide, ``batches`` are arguments of each step, or those and
    keywords, and ``loss`` makes an objective.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim = pyro.optim.Adam({"lr": 0.01}) if optim is None else optim()
    svi = kind(*make(), optim, loss(), **options)
    losses = []
    for step, args in enumerate(batches):
        *args, keywords = args if isinstance(args[-1], dict) else (*args, {})
        pyro.set_rng_seed(step)
        losses.append(svi.step(*args, **keywords))
    return losses, svi


def takes_the_steps_of_pyro(make, batches, loss, optim=None):
    """Eager steps have the losses that Pyro's have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pyro's own, which says the same in both
        theirs, _ = take(PyroSVI, make, batches, loss, optim)
        ours, _ = take(pyrovae.SVI, make, batches, loss, optim, compile=False)
    assert len(set(theirs)) == len(theirs)
    assert ours == pytest.approx(theirs, rel=2e-5)


def runs_captured(make, batches, loss):
    """Steps that run as one graph have the losses of eager ones."""
    optim = partial(pyro.optim.SGD, {"lr": 0.001})  # recorded in half the time of Adam
    eager, _ = take(pyrovae.SVI, make, batches, loss, optim, compile=False)
    found, svi = take(pyrovae.SVI, make, batches, loss, optim, compile=True)
    assert found == pytest.approx(eager, rel=2e-5)
    (capture,) = svi.compiled.captures.values()
    assert capture.calls == len(batches) - 1


def runs_eagerly(make, batches, loss, why):
    """Steps that cannot be captured are taken eagerly, with one warning that says why."""
    eager, _ = take(pyrovae.SVI, make, batches, loss, compile=False)
    with pytest.warns(UserWarning, match=WHY_EAGER) as seen:
        found, _ = take(pyrovae.SVI, make, batches, loss, compile=True)
    assert found == pytest.approx(eager, rel=2e-5)
    assert len(seen) == 1
    assert why in str(seen[0].message)


def fits(model, guide, rows, loss="trace_elbo", **options):
    """Training improves the bound, by ``rows`` as data and the programs' further arguments."""
    x, *context = rows
    data = Dataset("rows", x.shape[1:], x, context=Splits(tuple(context), (), ()))
    options = {"epochs": 20, "batch_size": len(x) // 2, "lr": 0.02, "seed": 0} | options
    history = pyrovae.fit(model, guide, data, objective=loss, progress=False, **options).history
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def average(log_weights):
    """The logarithm of a mean weight over the first dimension, and its standard error."""
    log_weights = log_weights.double()
    mean = log_weights.logsumexp(0) - math.log(len(log_weights))
    spread = (log_weights - mean).exp().std(0) / math.sqrt(len(log_weights))
    return mean, spread


def agrees(found, log_weights):
    """An estimate of log p(x) is that of weights ``[K, N]`` made by hand, within the errors."""
    mean, error = average(log_weights)
    both = (error**2 + found.standard_error.double() ** 2).sqrt()
    assert both.max() < 0.2
    assert ((found.log_prob.double() - mean).abs() < 4 * both + 1e-3).all()


def has_no_false_alarm(report, **says):
    """These rows of the check alone may warn or fail, with these words, which are true."""
    rows = {row.name: row for row in report.rows if row.status in ("warned", "failed")}
    says = {name.replace("_", " "): words for name, words in says.items()}
    assert rows.keys() == says.keys(), str(report)
    assert all(says[name] in row.message for name, row in rows.items()), str(report)
