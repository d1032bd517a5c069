"""What goes wrong silently in Pyro 1.9: here it works, or an error names the mend."""

import copy
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from torch.utils._python_dispatch import TorchDispatchMode

import pyrovae
from pairs import (
    LATENT,
    SHAPE,
    PlainModel,
    SameNames,
    binary,
    functions,
    plain_modules,
    published_example,
    same_names,
    shipped_bernoulli,
)
from pyrovae.guides.mean_field import MeanField
from pyrovae.models.bernoulli import Bernoulli
from pyrovae.nn import MLP

X = binary()


def _svi(pair, loss=None, optim=None):
    optim = optim or pyro.optim.Adam({"lr": 0.05})
    return pyrovae.SVI(*pair, optim, loss=loss or Trace_ELBO())


def _gain(pair, loss=None, steps=60):
    before = pyrovae.log_likelihood(*pair, X, num_samples=256, seed=0).mean
    svi = _svi(pair, loss)
    for _ in range(steps):
        svi.step(X)
    return pyrovae.log_likelihood(*pair, X, num_samples=256, seed=0).mean - before


def test_plain_modules_train():
    assert _gain(plain_modules()) > 0.5


def test_nets_of_the_same_name_both_train():
    pair = same_names()
    before = [[p.clone() for p in program.parameters()] for program in pair]
    assert _gain(pair) > 0.5
    for program, old in zip(pair, before, strict=True):
        assert not any(torch.equal(p, q) for p, q in zip(program.parameters(), old, strict=True))


@pytest.mark.parametrize("make", [same_names, published_example, functions])
def test_a_second_pair_is_not_tied_to_the_first(make):
    first = make()
    _gain(first)
    frozen = pyrovae.SVI(*first, torch.optim.Adam, loss=Trace_ELBO()).pair.state_dict()
    second = make()
    assert _gain(second) > 0.5
    after = pyrovae.SVI(*first, torch.optim.Adam, loss=Trace_ELBO()).pair.state_dict()
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)


def test_stale_entries_of_the_store_do_not_reach_a_module():
    stale = SameNames(False)
    with torch.no_grad():
        stale.scale = torch.tensor(7.0)
        stale(X)
    assert pyro.get_param_store()["scale"].item() == pytest.approx(7.0)
    model, guide = same_names()
    _svi((model, guide)).step(X)
    assert model.scale.item() != pytest.approx(7.0, abs=0.5)
    assert pyro.get_param_store()["scale"].item() == pytest.approx(7.0)


def test_a_store_entry_of_another_shape_names_the_mend():
    pyro.param("noise", torch.ones(5))
    with pytest.raises(ValueError, match=r"clear_param_store"):
        _svi(functions()).step(X)


def test_a_latent_missing_or_misspelt_in_the_guide_is_an_error():
    model, _ = shipped_bernoulli()

    def misspelt(x):
        with pyro.plate("data", len(x)):
            pyro.sample("zz", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))

    def empty(x):
        pass

    for guide, words in ((misspelt, r"'z'.*missing.*did you mean 'zz'\?"), (empty, "'z'.*missing")):
        for call in (pyrovae.elbo, pyrovae.log_likelihood, pyrovae.reconstruct):
            with pytest.raises(ValueError, match=words):
                call(model, guide, X)
        with pytest.raises(ValueError, match=words):
            pyrovae.fit(model, guide, X, epochs=1, batch_size=4)


def test_a_latent_too_many_in_the_guide_is_an_error():
    model, guide = shipped_bernoulli()

    def more(x):
        guide(x)
        with pyro.plate("again", len(x)):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'w'.*no latent site of the model.*is_auxiliary"):
        pyrovae.elbo(model, more, X)


@pytest.mark.parametrize("make", [same_names, plain_modules, published_example])
def test_module_local_params_work(make):
    with pyro.settings.context(module_local_params=True):
        assert _gain(make()) > 0.5
        assert pyro.settings.get("module_local_params") is True


def test_modules_made_before_module_local_params_was_set_work():
    pair = same_names()
    with pyro.settings.context(module_local_params=True):
        assert _gain(pair) > 0.5


def test_threads_take_turns():
    """Handlers of Pyro's that several threads enter at once see each other's sites."""
    pairs = [shipped_bernoulli(), same_names()]

    def bounds(pair):
        pyrovae.fit(*pair, X, epochs=1, seed=0)
        return pyrovae.elbo(*pair, X, particles=8, seed=0).elbo

    expected = [bounds(copy.deepcopy(pair)) for pair in pairs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(bounds, pairs))
    finally:
        sys.setswitchinterval(interval)
    assert all(map(torch.equal, found, expected))


def test_renyi_refuses_scales_and_subsampling():
    model, guide = shipped_bernoulli()
    scaled = pyro.poutine.scale(model, scale=2.0)
    with pytest.raises(ValueError, match=r"RenyiELBO.*scale"):
        _svi((scaled, guide), RenyiELBO(num_particles=2)).step(X)


@pytest.mark.parametrize(
    "loss",
    [
        RenyiELBO(alpha=0.0, num_particles=4, vectorize_particles=True),
        RenyiELBO(alpha=0.5, num_particles=3),
        ReweightedWakeSleep(num_particles=4, vectorize_particles=True),
        lambda model, guide, x: Trace_ELBO().differentiable_loss(model, guide, x),
    ],
    ids=["iwae", "renyi", "rws", "function"],
)
@pytest.mark.parametrize("make", [plain_modules, shipped_bernoulli])
def test_losses_without_differentiable_loss_train(loss, make):
    assert _gain(make(), loss) > 0.5


def test_importance_weights_are_per_datum_and_do_not_depend_on_the_batch():
    pair = shipped_bernoulli()
    whole = pyrovae.log_likelihood(*pair, X, num_samples=4000, seed=0)
    alone = pyrovae.log_likelihood(*pair, X[3:4], num_samples=4000, seed=1)
    assert whole.log_prob.shape == whole.khat.shape == whole.ess.shape == (len(X),)
    error = (whole.standard_error[3] ** 2 + alone.standard_error[0] ** 2).sqrt()
    assert (whole.log_prob[3] - alone.log_prob[0]).abs() < 4 * error
    assert (whole.khat[3] - alone.khat[0]).abs() < 0.5


class _Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("make", [shipped_bernoulli, published_example, same_names])
def test_an_update_reads_nothing_back_from_the_device(loss, make):
    svi = _svi(make(), loss(), lambda p: torch.optim.Adam(p, lr=1e-3, fused=True))
    svi.step(X)
    with pyro.validation_enabled(False):
        with _Reads() as reads:
            svi.update(X)
        with _Reads() as theirs:
            loss().loss(svi.pair.run_model, svi.pair.run_guide, X)
    assert reads.count == 0
    assert theirs.count > 0


@pytest.mark.parametrize("validate", [True, False])
def test_grey_pixels_under_a_bernoulli_are_refused(validate):
    pair = published_example()
    grey = X.clone()
    grey[-1, 0, 0, 0] = 0.25
    with pyro.validation_enabled(validate):
        for call in (pyrovae.elbo, pyrovae.log_likelihood):
            with pytest.raises(ValueError, match=r"'obs' observes 0.25.*Bernoulli.*binarize"):
                call(*pair, grey)
        with pytest.raises(ValueError, match=r"'obs' observes 0.25.*Bernoulli.*binarize"):
            pyrovae.fit(*pair, grey, epochs=1, batch_size=4)


def test_parameters_that_nobody_owns_are_refused():
    decoder = MLP(LATENT, SHAPE, (8,))
    hidden = weakref.ref(decoder)
    _, guide = shipped_bernoulli()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=hidden()(z)).to_event(3), obs=x)

    with pytest.raises(ValueError, match=r"\[16\].*pyro.module"):
        _svi((model, guide)).step(X)
    with pytest.raises(ValueError, match=r"\[16\].*pyro.module"):
        pyrovae.fit(model, guide, X, epochs=1, batch_size=4)
    decoder.requires_grad_(False)
    assert _gain((model, guide), steps=5) > -1


def test_a_batch_without_a_plate_is_an_error():
    class NoPlate(PlainModel):
        def forward(self, x):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(2))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(4), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(2))

    with pytest.raises(
        ValueError, match=r"plate over the batch of 12.*pyro.plate\('data'.*AutoNormal"
    ):
        pyrovae.elbo(NoPlate(), guide, X)


def test_a_site_outside_the_plate_is_named():
    _, guide = shipped_bernoulli()
    bernoulli = Bernoulli(SHAPE, LATENT, (8,))

    def model(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        bernoulli(x)

    def both(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        guide(x)

    with pytest.raises(ValueError, match=r"'w' lies outside the plate 'data'"):
        pyrovae.elbo(model, both, X)


def test_event_shapes_that_disagree_are_named():
    model, _ = shipped_bernoulli()
    with pytest.raises(ValueError, match=r"'z'.*\[3\].*\[4\].*latent"):
        pyrovae.elbo(model, MeanField(SHAPE, LATENT + 1), X)


def _around(module):
    return lambda x: module(x)


class _Holder:
    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        self.module(x)

    def run(self, x):
        self.module(x)


@pytest.mark.parametrize(
    "wrap",
    [_around, _Holder, lambda m: _Holder(m).run, lambda m: _around(_around(m))],
    ids=["lambda", "object", "method", "nested"],
)
@pytest.mark.parametrize("make", [plain_modules, same_names])
def test_modules_behind_functions_and_objects_train(wrap, make):
    for _ in range(2):
        inner = make()
        before = [[p.clone() for p in program.parameters()] for program in inner]
        assert _gain(tuple(map(wrap, inner)), steps=30) > 0.1
        for program, old in zip(inner, before, strict=True):
            pairs = zip(program.parameters(), old, strict=True)
            assert not any(torch.equal(p, q) for p, q in pairs)


def test_modules_behind_functions_are_scored_in_eval_mode():
    class Noisy(PlainModel):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(self.training)
            super().forward(x)

    model, (_, guide) = Noisy(), plain_modules()
    pyrovae.elbo(_around(model), _around(guide), X)
    assert model.seen
    assert not any(model.seen)


def test_bounds_are_reported_without_the_scales_of_training():
    model, guide = shipped_bernoulli()
    plain = pyrovae.elbo(model, guide, X, particles=20, seed=0)
    history = pyrovae.fit(model, guide, X, epochs=1, batch_size=12, lr=1e-9, seed=0).history

    def subsampled(program):
        def run(x):
            with pyro.plate("rows", 600, subsample=torch.arange(len(x))):
                program(x)

        return run

    def body(inner):
        def run(x):
            if inner is guide:
                loc, log_scale = guide.encoder(x).unbind(-2)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=model.decoder(z)).to_event(3), obs=x)

        return run

    pair = subsampled(body(model)), subsampled(body(guide))
    found = pyrovae.elbo(*pair, X, particles=20, seed=0)
    torch.testing.assert_close(found.elbo, plain.elbo)
    row = pyrovae.fit(*pair, X, epochs=1, batch_size=12, lr=1e-9, seed=0).history[0]
    assert row["train_elbo"] == pytest.approx(history[0]["train_elbo"], rel=0.1)

    scaled = [pyro.poutine.scale(program, scale=0.1) for program in (model, guide)]
    found = pyrovae.elbo(*scaled, X, particles=20, seed=0)
    torch.testing.assert_close(found.elbo, plain.elbo)
    row = pyrovae.fit(*scaled, X, epochs=1, batch_size=12, lr=1e-9, seed=0).history[0]
    assert row["train_elbo"] is None
    assert row["train_loss"] == pytest.approx(-0.1 * history[0]["train_elbo"], rel=0.1)


def test_losses_of_several_parts_are_returned_as_pyro_returns_them():
    loss = ReweightedWakeSleep(num_particles=4, vectorize_particles=True)
    svi = _svi(shipped_bernoulli(), loss)
    for found in (svi.step(X), svi.evaluate_loss(X)):
        assert isinstance(found, tuple)
        assert len(found) == 2
        assert all(isinstance(part, float) for part in found)


def test_gradients_add_up_over_calls(monkeypatch):
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
    for compile in (False, True):
        svi = pyrovae.SVI(*shipped_bernoulli(), torch.optim.Adam, Trace_ELBO(), compile=compile)
        svi.step(X)
        total = None
        for seed in (1, 2):
            pyro.set_rng_seed(seed)
            svi.gradients(X)
            grads = [p.grad.clone() for p in svi.pair.named().values()]
            if total is None:
                total = grads
        pyro.set_rng_seed(2)
        svi.optimizer.zero_grad()
        svi.gradients(X)
        for whole, first, p in zip(grads, total, svi.pair.named().values(), strict=True):
            torch.testing.assert_close(whole, first + p.grad, rtol=1e-4, atol=1e-4)


def test_the_plate_of_the_batch_is_found_among_plates_of_its_size():
    n = 6

    class Pixels(torch.nn.Module):
        def __init__(self, encodes):
            super().__init__()
            self.encodes = encodes
            self.loc = torch.nn.Parameter(torch.linspace(-1, 1, n))

        def forward(self, x):
            with pyro.plate("batch", len(x), dim=-2), pyro.plate("a_pixel", n, dim=-1):
                if self.encodes:
                    pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
                else:
                    z = pyro.sample("z", dist.Normal(0.0, 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(n, n)
    found = pyrovae.log_likelihood(Pixels(False), Pixels(True), x, num_samples=30, seed=0)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1).double()
    torch.testing.assert_close(found.log_prob, exact, atol=1e-4, rtol=0)


def test_renyi_refuses_scales_of_either_program_and_of_each_datum():
    model, guide = shipped_bernoulli()
    each = torch.linspace(0.5, 2.0, len(X))
    for pair in (
        (model, pyro.poutine.scale(guide, scale=2.0)),
        (pyro.poutine.scale(model, scale=each), guide),
    ):
        with pytest.raises(ValueError, match=r"RenyiELBO.*scale"):
            _svi(pair, RenyiELBO(num_particles=2)).step(X)


def test_every_module_keeps_its_own_mode():
    model, guide = shipped_bernoulli()
    model.decoder.eval()
    pyrovae.elbo(model, guide, X)
    assert model.training
    assert guide.encoder.training
    assert not model.decoder.training


def test_data_outside_the_support_may_be_masked():
    model, guide = shipped_bernoulli()
    grey, keep = X.clone(), torch.arange(len(X)) != 4
    grey[4, 0, 0, 0] = 0.25

    def masked(program):
        def run(x):
            with pyro.poutine.mask(mask=keep):
                program(x)

        return run

    plain = pyrovae.elbo(model, guide, X, seed=0).elbo
    with pyro.validation_enabled(False):
        found = pyrovae.elbo(masked(model), masked(guide), grey, seed=0).elbo
    torch.testing.assert_close(found[keep], plain[keep])
    assert found[4] == 0


def test_parameters_that_appear_late_are_trained():
    model, guide = shipped_bernoulli()
    calls = []

    def late(x):
        calls.append(len(x))
        guide(x)
        if len(calls) > 2:
            pyro.factor("late", pyro.param("shift", torch.tensor(1.0)) ** 2, has_rsample=True)

    svi = pyrovae.SVI(model, late, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), compile=False)
    with pyro.validation_enabled(False):
        for _ in range(6):
            svi.step(X)
    assert pyro.param("shift").item() != 1.0
