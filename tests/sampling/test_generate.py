"""Generation is unconditioning, reconstruction is replay."""

import random

import pyro
import pytest
import torch
from structures import MAKE

import pyrovae
from pairs import binary, discrete, shipped_bernoulli, two_latents
from pyrovae.guides.linear_gaussian import LinearGaussian as ExactGuide
from pyrovae.models.linear_gaussian import LinearGaussian

X = binary()


def test_samples_have_the_moments_of_the_model():
    model = LinearGaussian((3,), 2, scale=0.7)
    x = pyrovae.sample(model, like=torch.zeros(1, 3), n=20_000, seed=0)
    weight, bias = model.decoder.layers[0].weight, model.decoder.layers[0].bias
    covariance = weight @ weight.T + model.scale**2 * torch.eye(3)
    spread = covariance.diagonal().sqrt()
    assert ((x.mean(0) - bias).abs() < 4 * spread / 20_000**0.5).all()
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0.08, atol=0.02)


def test_samples_do_not_depend_on_the_template():
    model, _ = shipped_bernoulli()
    one = pyrovae.sample(model, like=X, n=9, seed=4)
    assert torch.equal(one, pyrovae.sample(model, like=1 - X[:1], n=9, seed=4))
    assert set(one.unique().tolist()) == {0.0, 1.0}
    mean = pyrovae.sample(model, like=X, n=9, seed=4, mean=True)
    assert ((mean > 0) & (mean < 1)).all()


def test_reconstruction_is_the_decoded_posterior():
    model, _ = LinearGaussian((5,), 2, scale=0.1), None
    guide = ExactGuide((5,), 2).match(model)
    x = pyrovae.sample(model, like=torch.zeros(1, 5), n=4, seed=0)
    drawn = pyrovae.reconstruct(model, guide, x.repeat(400, 1), seed=0).reshape(400, 4, 5)
    expected = model.decoder(model.posterior(x).mean.to(x))
    error = drawn.std(0) / 400**0.5
    assert ((drawn.mean(0) - expected.reshape(4, 5)).abs() < 4.5 * error).all()
    torch.testing.assert_close(pyrovae.encode(guide, x)["z"], model.posterior(x).mean.to(x))


def test_interpolations_begin_and_end_at_the_encodings():
    model, guide = shipped_bernoulli()
    path = pyrovae.interpolate(model, guide, X[:3], X[3:6], steps=5)
    for end, x in ((0, X[:3]), (-1, X[3:6])):
        decoded = pyrovae.decode(model, pyrovae.encode(guide, x), like=X)
        torch.testing.assert_close(path[:, end], decoded)
    assert path.shape == (3, 5, *X.shape[1:])


def test_discrete_latents_are_encoded_and_not_interpolated():
    model, guide = discrete()
    assert pyrovae.encode(guide, X)["y"].sum(-1).tolist() == pytest.approx([1.0] * 12)
    rounded = _rounded(guide)
    assert pyrovae.encode(rounded, X)["y"].shape == (12,)
    with pytest.raises(ValueError, match="'y' is discrete"):
        pyrovae.interpolate(model, rounded, X[:2], X[2:4])


def _switched(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", pyro.distributions.Bernoulli(0.5))
        z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = torch.tensor([-10.0, 10.0])[k.long()] + z.sum(-1)
        pyro.sample("x", pyro.distributions.Normal(loc, 1.0), obs=x)


def _switch(x):
    with pyro.plate("data", len(x)):
        pyro.sample("k", pyro.distributions.Bernoulli(0.9))
        pyro.sample("z", pyro.distributions.Normal(x[:, None].expand(-1, 2), 1.0).to_event(1))


def test_discrete_latents_of_real_numbers_are_not_set_to_their_mean():
    x = torch.zeros(400)
    found = pyrovae.traverse(_switched, _switch, x, "z", 0, torch.tensor([0.0, 2.0]), seed=0)
    assert torch.equal(found[:, 1] - found[:, 0], torch.full((400,), 2.0))
    assert (found[:, 0] == 10).float().mean() == pytest.approx(0.9, abs=0.06)
    assert set(found[:, 0].tolist()) == {-10.0, 10.0}
    with pytest.raises(pyrovae.InputError, match="'k' is discrete"):
        pyrovae.interpolate(_switched, _switch, x[:2], x[2:4])


def _rounded(guide):
    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", pyro.distributions.Categorical(logits=guide.net(x)))

    return program


def test_traversals_move_one_dimension():
    model, guide = shipped_bernoulli()
    z = pyrovae.encode(guide, X[:2])["z"]
    found = pyrovae.traverse(model, guide, X[:2], "z", 1, torch.tensor([-1.0, 2.0]))
    for i, value in enumerate((-1.0, 2.0)):
        moved = z.clone()
        moved[:, 1] = value
        torch.testing.assert_close(found[:, i], pyrovae.decode(model, {"z": moved}, like=X))
    with pytest.raises(ValueError, match=r"No latent site 'w'.*'z'"):
        pyrovae.traverse(model, guide, X, "w", 0, torch.zeros(1))
    listed = pyrovae.traverse(model, guide, X[:2], "z", 1, [-1.0, 2.0])
    assert torch.equal(listed, found)


def test_a_way_that_is_none_is_refused_in_a_sentence():
    model, guide = shipped_bernoulli()
    for values in (torch.zeros(0), torch.zeros(2, 2), 1.0):
        with pytest.raises(pyrovae.InputError, match=r"values \[V\]"):
            pyrovae.traverse(model, guide, X, "z", 0, values)
    with pytest.raises(pyrovae.InputError, match=r"no dimension 0\.5"):
        pyrovae.traverse(model, guide, X, "z", 0.5, torch.zeros(1))
    for steps in (0, -1, 2.5):
        with pytest.raises(pyrovae.InputError, match="integer steps >= 1"):
            pyrovae.interpolate(model, guide, X[:2], X[2:4], steps=steps)
    with pytest.raises(pyrovae.InputError, match="as many data to go to"):
        pyrovae.interpolate(model, guide, X[:2], X[2:5])


def test_several_sites_come_by_name():
    model, guide = two_latents()
    assert pyrovae.encode(guide, X).keys() == {"top", "low"}
    drawn = pyrovae.sample(model, like=X, n=3, seed=0)
    assert drawn["x"].shape == (3, *X.shape[1:])
    assert drawn["total"].shape == (3,)


def test_bad_input_is_named():
    model, _ = shipped_bernoulli()
    with pytest.raises(ValueError, match="n >= 1"):
        pyrovae.sample(model, like=X, n=0)
    with pytest.raises(ValueError, match=r"No latent sites \['w'\]"):
        pyrovae.decode(model, {"w": torch.zeros(2, 3)}, like=X)


def test_reconstructions_and_encodings_are_made_in_eval_mode():
    model, guide = shipped_bernoulli()
    seen = []
    for net in (model.decoder, guide.encoder):
        net.register_forward_hook(lambda net, *_: seen.append(net.training))
    pyrovae.reconstruct(model, guide, X)
    pyrovae.encode(guide, X)
    assert seen
    assert not any(seen)
    assert model.decoder.training
    assert guide.encoder.training


def test_seeds_are_repeatable_and_leave_the_global_stream_alone():
    model, guide = two_latents()
    for call in (
        lambda seed: pyrovae.reconstruct(model, guide, X, seed=seed)["x"],
        lambda seed: pyrovae.encode(guide, X, seed=seed)["low"],
    ):
        before = torch.get_rng_state()
        one, two, other = call(1), call(1), call(2)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


def test_context_and_deterministic_sites_go_through():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = pyro.deterministic("loc", z + y, event_dim=1)
            pyro.sample("x", pyro.distributions.Normal(loc, 0.1).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", pyro.distributions.Normal(0.0, 1e-3), infer={"is_auxiliary": True})
            scale = 1e-3 + 0 * a[..., None]
            pyro.sample("z", pyro.distributions.Normal(x - y, scale).to_event(1))

    y = 100.0 * torch.arange(1.0, 5)[:, None]
    drawn = pyrovae.sample(model, y, like=torch.zeros(1, 2), n=4, seed=0)
    assert ((drawn - y).abs() < 10).all()
    x = drawn + 50
    assert pyrovae.encode(guide, x, y).keys() == {"z"}
    torch.testing.assert_close(pyrovae.encode(guide, x, y)["z"], x - y)
    torch.testing.assert_close(pyrovae.reconstruct(model, guide, x, y), x, atol=0.02, rtol=0)
    decoded = pyrovae.decode(model, {"z": x - y}, y, like=x)
    torch.testing.assert_close(decoded, x, atol=1e-3, rtol=0)


def test_a_dimension_that_a_site_lacks_is_named():
    for dim in (3, -4):
        with pytest.raises(ValueError, match=f"3 dimensions, so there is no dimension {dim}"):
            pyrovae.traverse(*shipped_bernoulli(), X, "z", dim, torch.zeros(1))


SIZE = 5


@pytest.fixture
def _small_tiles(monkeypatch):
    monkeypatch.setattr("pyrovae.sampling.tile_size", lambda device: SIZE)


@pytest.fixture
def runs(monkeypatch):
    """Runs of the record itself, in place of what Inductor makes of it."""
    made = []

    def recorded(graph, inputs):
        return lambda *args: made.append(len(args[-1])) or graph(*args)

    monkeypatch.setattr("pyrovae.compiling.graph._compile", recorded)
    return made


def calls(model, guide, x, *context):
    """Everything that is drawn or read off, by name, as a function of the options."""
    codes = pyrovae.encode(guide, x, *context, seed=3)
    return {
        "sample": lambda **o: pyrovae.sample(model, *context, like=x, n=len(x), **o),
        "mean": lambda **o: pyrovae.sample(model, *context, like=x, n=len(x), mean=True, **o),
        "decode": lambda **o: pyrovae.decode(model, codes, *context, like=x, **o),
        "reconstruct": lambda **o: pyrovae.reconstruct(model, guide, x, *context, **o),
        "draw": lambda **o: pyrovae.reconstruct(model, guide, x, *context, mean=False, **o),
        "encode": lambda **o: pyrovae.encode(guide, x, *context, **o),
    }


def assert_same(one, other, **tolerance):
    one, other = ({"x": f} if isinstance(f, torch.Tensor) else f for f in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **tolerance, msg=name)


def test_a_small_call_is_one_run_under_the_seed():
    model, guide = shipped_bernoulli()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        drawn = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(X).nodes["x"]
    assert torch.equal(pyrovae.sample(model, like=X, n=12, seed=4), drawn["value"])
    assert torch.equal(pyrovae.sample(model, like=X, n=12, seed=4, mean=True), drawn["fn"].mean)
    with torch.no_grad():
        loc = guide.encoder(X).unbind(-2)[0]
    assert torch.equal(pyrovae.encode(guide, X)["z"], loc)


@pytest.mark.usefixtures("_small_tiles")
def test_no_more_than_a_tile_is_run_at_once():
    model, guide = shipped_bernoulli()
    seen = []
    for net in (model.decoder, guide.encoder):
        net.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    for call in calls(model, guide, X).values():
        seen.clear()
        call()
        assert sum(seen) >= 12
        assert max(seen) == SIZE


@pytest.mark.parametrize("make", [shipped_bernoulli, two_latents, discrete])
def test_tiles_change_what_is_drawn_and_nothing_else(make, monkeypatch):
    model, guide = make()
    whole = {name: call(seed=1) for name, call in calls(model, guide, X).items()}
    monkeypatch.setattr("pyrovae.sampling.tile_size", lambda device: SIZE)
    tiled = {name: call(seed=1) for name, call in calls(model, guide, X).items()}
    if make is not two_latents:
        for name in ("decode", "encode"):
            assert_same(tiled[name], whole[name])
    few = pyrovae.sample(model, like=X, n=SIZE, seed=1)
    for drawn in (tiled["sample"], pyrovae.sample(model, like=X, n=4 * SIZE, seed=1)):
        drawn, first = (d["x"] if isinstance(d, dict) else d for d in (drawn, few))
        assert torch.equal(drawn[:SIZE], first)
        assert not torch.equal(drawn[SIZE : 2 * SIZE], first)


@pytest.mark.usefixtures("_small_tiles")
def test_tiles_without_a_seed_continue_the_global_stream():
    model, _ = shipped_bernoulli()
    torch.manual_seed(1)
    one, two = (pyrovae.sample(model, like=X, n=12) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(pyrovae.sample(model, like=X, n=12), one)
    assert not torch.equal(one, two)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("name", ["shipped", "two_latents", "discrete", "conditional", "gmvae"])
def test_compiled_draws_are_the_eager_ones(name, runs):
    makes = {"shipped": shipped_bernoulli, "two_latents": two_latents, "discrete": discrete}
    model, guide, args = (*makes[name](), (X,)) if name in makes else MAKE[name]()
    for key, call in calls(model, guide, *args).items():
        expected = call(seed=2, compile=False)
        runs.clear()
        state = torch.get_rng_state()
        found = call(seed=2, compile=True)
        assert torch.equal(state, torch.get_rng_state())
        assert len(runs) == 2, key  # when it is audited, and the second tile
        assert_same(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.inductor
@pytest.mark.usefixtures("_small_tiles")
def test_what_the_compiler_makes_of_it_is_the_eager_run():
    model, guide = shipped_bernoulli()
    for call in (
        lambda **options: pyrovae.sample(model, like=X, n=12, seed=2, **options),
        lambda **options: pyrovae.reconstruct(model, guide, X, seed=2, **options),
    ):
        assert_same(call(compile=True), call(compile=False), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_small_tiles")
def test_auto_compiles_many_rows_alone(runs, monkeypatch):
    model, _ = shipped_bernoulli()
    pyrovae.sample(model, like=X, n=12, seed=0)
    assert not runs
    monkeypatch.setattr("pyrovae.sampling.PAYS_AFTER", 12)
    pyrovae.sample(model, like=X, n=11, seed=0)
    assert not runs
    pyrovae.sample(model, like=X, n=12, seed=0)
    assert runs
    with pytest.raises(ValueError, match="compile='auto'"):
        pyrovae.sample(model, like=X, n=12, compile="yes")


def edited(change):
    """A model whose logits are changed by a function."""
    model, guide = shipped_bernoulli()

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))
            logits = change(model.decoder(z))
            pyro.sample("x", pyro.distributions.Bernoulli(logits=logits).to_event(3), obs=x)

    return program, guide


@pytest.mark.usefixtures("_small_tiles", "runs")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y if y.sum().item() > -1e9 else 2 * y, "reads a value back"),
        (lambda y: y + random.random(), "changes from call to call|came out otherwise"),
    ],
)
def test_what_cannot_be_compiled_runs_eagerly_with_one_warning(change, words):
    model, _ = edited(change)
    with pytest.warns(UserWarning, match=words) as caught:
        found = pyrovae.sample(model, like=X, n=4 * SIZE, seed=0, compile=True)
    assert len(caught) == 1
    assert len(found) == 4 * SIZE


@pytest.mark.usefixtures("_small_tiles")
def test_a_wrong_graph_is_never_used(monkeypatch):
    def wrong(graph, inputs):
        for node in graph.graph.nodes:
            if "aten.sigmoid" in str(node.target):
                node.target = torch.ops.aten.tanh.default
        graph.recompile()
        return graph

    monkeypatch.setattr("pyrovae.compiling.graph._compile", wrong)
    model, guide = shipped_bernoulli()
    expected = pyrovae.reconstruct(model, guide, X, seed=0, compile=False)
    with pytest.warns(UserWarning, match="'x' came out otherwise"):
        found = pyrovae.reconstruct(model, guide, X, seed=0, compile=True)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("_small_tiles", "runs")
@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("row", [1, 7, 11])
def test_bad_data_are_named_wherever_they_lie(compile, row):
    model, guide = shipped_bernoulli()
    x = X.clone()
    x[row, 0, 0, 0] = 0.5
    with pytest.raises(ValueError, match=r"observes 0\.5, outside the support of Bernoulli"):
        pyrovae.reconstruct(model, guide, x, compile=compile)
    x[row, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"1 of 12 data hold NaN or infinity, first in row {row}"):
        pyrovae.reconstruct(model, guide, x, compile=compile)


@pytest.mark.usefixtures("_small_tiles", "runs")
@pytest.mark.parametrize("compile", [True, False])
def test_a_tile_without_means_is_drawn(compile):
    def model(x, df):
        with pyro.plate("data", len(x)):
            pyro.sample("x", pyro.distributions.StudentT(df, 3.0, 0.1), obs=x)

    df = torch.tensor([5.0] * 10 + [0.5] * 10)
    found = pyrovae.sample(model, df, like=torch.zeros(1), n=20, mean=True, seed=0, compile=compile)
    assert (found[:10] == 3.0).all()
    assert (found[10:] != 3.0).all()
    assert found.isfinite().all()


@pytest.mark.usefixtures("_small_tiles")
def test_a_program_that_sees_all_rows_at_once_is_run_so():
    y = 100.0 * torch.arange(12.0)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", pyro.distributions.Normal(y, 0.1), obs=x)

    drawn = pyrovae.sample(model, like=torch.zeros(1), n=12, seed=0)
    assert ((drawn - y).abs() < 1).all()
    with pytest.raises(ValueError, match="Shape mismatch inside plate"):
        pyrovae.sample(model, like=torch.zeros(1), n=11)


def _parts(batch, inner, turned, kind=pyro.distributions.OneHotCategorical):
    """Three parts of a datum, each with a latent of its own, in a plate beside the batch's."""

    def across(x):
        return x.T if turned else x

    def model(x):
        with pyro.plate("rows", len(x), dim=batch), pyro.plate("parts", 3, dim=inner):
            u = pyro.sample("u", pyro.distributions.Normal(0.0, 5.0))
            pyro.sample("x", pyro.distributions.Normal(u, 1e-6), obs=across(x))

    def guide(x):
        with pyro.plate("rows", len(x), dim=batch), pyro.plate("parts", 3, dim=inner):
            pyro.sample("u", pyro.distributions.Normal(across(x), 1e-6))

    def classifier(x):
        with pyro.plate("rows", len(x), dim=batch), pyro.plate("parts", 3, dim=inner):
            logits = torch.stack([-across(x), across(x)], -1) / 2
            pyro.sample("y", kind(logits=logits))

    return model, guide, classifier


@pytest.mark.usefixtures("_small_tiles", "runs")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("n", [1, 3, 14])
@pytest.mark.parametrize("dims", [(-1, -2, True), (-2, -1, False)], ids=["right", "left"])
def test_the_batch_comes_first_wherever_its_plate_lies(dims, n, compile):
    model, guide, classifier = _parts(*dims)
    x, how = torch.arange(3.0 * n).reshape(n, 3), {"compile": compile, "seed": 0}
    z = pyrovae.encode(guide, x, **how)
    for found in (
        z["u"],
        pyrovae.reconstruct(model, guide, x, **how),
        pyrovae.decode(model, z, like=x, mean=False, **how),
        pyrovae.interpolate(model, guide, x, x + 5, steps=2, **how)[:, 0],
    ):
        torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)
    set_to = pyrovae.traverse(model, guide, x, "u", 1, [-7.0], **how)[:, 0]
    torch.testing.assert_close(set_to, x.index_fill(1, torch.tensor(1), -7.0), rtol=1e-3, atol=1e-3)
    assert pyrovae.sample(model, like=x, n=n, **how).shape == (n, 3)
    assert pyrovae.sample(model, like=x, n=17, **how).shape == (17, 3)
    for each in (classifier, _parts(*dims, pyro.distributions.Categorical)[2]):
        torch.testing.assert_close(pyrovae.classify(each, x)[..., 1], x.sigmoid())


def test_a_plate_that_is_no_batch_stays_where_it_is():
    def guide(x):
        with pyro.plate("parts", 3, dim=-1):
            pyro.sample("u", pyro.distributions.Normal(x, 1.0))

    x = torch.arange(9.0).reshape(3, 3)
    assert torch.equal(pyrovae.encode(guide, x)["u"], x)
