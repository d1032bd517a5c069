"""Labels as context: what the programs are shown, and what is drawn given them."""

import json

import numpy as np
import pyro
import pytest
import torch

import pyrovae
from pyrovae.data import Dataset, Splits, choose_labelled, load_data
from pyrovae.guides.conditional import Conditional as ConditionalGuide
from pyrovae.guides.semi_supervised import SemiSupervised as SemiSupervisedGuide
from pyrovae.models.conditional import Conditional
from pyrovae.models.semi_supervised import SemiSupervised

DIGITS = load_data("digits", context="labels")
FEW = load_data("digits", binarize="dynamic", context="labels", labelled=103)


def saved(folder, y, n=20):
    np.savez(folder / "mine.npz", x=np.arange(2.0 * n).reshape(n, 2), y=y)
    return folder / "mine.npz"


def test_every_label_is_shown_where_no_number_is_given():
    for name in Splits._fields:
        x, y = DIGITS.split(name)
        assert torch.equal(x, getattr(DIGITS, name))
        assert torch.equal(y, getattr(DIGITS.labels, name))
        assert y.dtype == torch.int64
    index = torch.tensor([7, 0, 7])
    x, y = DIGITS.rows(index)
    assert torch.equal(x, DIGITS.train[index])
    assert torch.equal(y, DIGITS.labels.train[index])
    assert DIGITS.provenance["context"] == "labels"
    assert DIGITS.provenance["labelled"] is None


def test_a_few_labels_are_shown_and_the_others_hidden():
    (y,) = FEW.context.train
    shown = y >= 0
    assert shown.sum() == 103
    assert torch.equal(y[shown], FEW.labels.train[shown])
    assert sorted(torch.bincount(y[shown]).tolist()) == [10] * 7 + [11] * 3
    for name in ("valid", "test"):
        assert (FEW.split(name)[1] == -1).all()
        assert (getattr(FEW.labels, name) >= 0).all()
    found = json.loads(json.dumps(FEW.provenance))
    assert (found["context"], found["labelled"], found["label_seed"]) == ("labels", 103, 0)


def test_the_labels_shown_depend_on_nothing_but_their_number():
    torch.manual_seed(3)
    other = load_data("digits", binarize="static", context="labels", labelled=103, seed=8)
    assert torch.equal(other.context.train[0], FEW.context.train[0])
    more = load_data("digits", context="labels", labelled=200).context.train[0]
    assert (more[FEW.context.train[0] >= 0] >= 0).all()
    none = load_data("digits", context="labels", labelled=0).context.train[0]
    assert (none == -1).all()


def test_classes_that_run_out_leave_their_share_to_the_others():
    y = torch.tensor([0] * 50 + [1] * 3 + [2] * 30)
    for count, expected in ((6, [2, 2, 2]), (23, [10, 3, 10]), (73, [40, 3, 30])):
        chosen = choose_labelled(y, count)
        assert len(chosen.unique()) == count
        assert torch.bincount(y[chosen]).tolist() == expected


def test_batches_keep_their_labels_and_are_drawn_as_before():
    index = torch.tensor([5, 0, 1257])
    generator = torch.Generator().manual_seed(0)
    x, y = FEW.rows(index, generator)
    assert torch.equal(x, FEW.batch(index, generator.manual_seed(0)))
    assert torch.equal(y, FEW.context.train[0][index])


def test_without_context_a_batch_is_x_alone():
    data = load_data("digits")
    assert "context" not in data.provenance
    assert data.context is None
    (x,) = data.rows(torch.tensor([2]))
    assert torch.equal(x, data.train[2:3])
    assert len(data.split("test")) == 1
    bare = Dataset("bare", torch.Size([2]), torch.zeros(3, 2), valid=None, test=None)
    assert bare.split("valid") == ()


def test_context_moves_with_its_data():
    moved = FEW.to("meta")
    assert all(y.device.type == "meta" for context in moved.context for y in context)
    assert FEW.to(None) is FEW
    assert load_data("digits").to("meta").context is None


@pytest.mark.parametrize(
    ("y", "options", "words"),
    [
        (np.arange(20) % 3 + 1, {}, "classes 0 to 2.*got 1 to 3.*number them from 0"),
        (np.arange(20) % 3 * 2, {}, "without gaps"),
        (np.linspace(0, 1, 20), {}, "labels that are classes.*real numbers"),
        (np.arange(20) % 3, {"labelled": 15}, "between 0 and the 14 training labels, got 15"),
        (np.arange(20) % 3, {"labelled": -1}, "got -1"),
        (np.arange(20) % 3, {"labelled": True}, "got True"),
        (np.arange(20) % 3, {"labelled": 2.0}, "got 2.0"),
        (np.arange(20) % 3, {"labelled": 3, "context": "none"}, "context='labels' for labelled=3"),
        (np.arange(20) % 3, {"context": "label"}, "did you mean 'labels'"),
    ],
)
def test_labels_that_cannot_be_context_are_refused(tmp_path, y, options, words):
    with pytest.raises(ValueError, match=words):
        load_data(saved(tmp_path, y), **{"context": "labels"} | options)


def test_data_without_labels_and_unknown_splits_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((20, 2)))
    with pytest.raises(ValueError, match=r"labels in x for context='labels', got none"):
        load_data(tmp_path / "x.npy", context="labels")
    with pytest.raises(ValueError, match="did you mean 'train'"):
        DIGITS.split("trian")


def small(kind, labels=2, n=60):
    """Data whose label says which half of the pixels is on, and a pair for them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % labels
    half = (torch.arange(8) // 4 == y[:, None]).float()
    x = torch.bernoulli(0.05 + 0.9 * half, generator=generator)
    model, guide = {
        "conditional": (Conditional, ConditionalGuide),
        "semi_supervised": (SemiSupervised, SemiSupervisedGuide),
    }[kind]
    settings = {"shape": (8,), "latent": 1, "classes": labels, "hidden": (8,)}
    context = Splits(*((y[part],) for part in (slice(30), slice(30, 45), slice(45, n))))
    splits = x[:30], x[30:45], x[45:]
    data = Dataset("small", torch.Size([8]), *splits, context=context)
    return model(**settings), guide(**settings), data


@pytest.fixture(scope="module")
def trained():
    pyro.set_rng_seed(0)
    model, guide, data = small("conditional")
    svi = pyrovae.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    for _ in range(80):
        svi.step(*data.split("train"))
    return model, guide, data


def test_a_datum_is_drawn_for_each_label(trained):
    model, _, data = trained
    y = torch.tensor([0, 1, 0, 1, 1])
    x = pyrovae.sample(model, y, like=data.test, mean=True, seed=0)
    assert x.shape == (5, 8)
    assert torch.equal((x[:, :4].mean(-1) < x[:, 4:].mean(-1)).long(), y)
    assert torch.equal(x, pyrovae.sample(model, y, like=data.test, n=5, mean=True, seed=0))
    with pytest.raises(ValueError, match=r"context of 4 rows.*got 5"):
        pyrovae.sample(model, y, like=data.test, n=4)
    with pytest.raises(ValueError, match=r"context of 3 rows.*got 5"):
        pyrovae.decode(model, {"z": torch.zeros(3, 1)}, y, like=data.test)


def test_reconstructions_and_codes_are_given_the_label(trained):
    model, guide, data = trained
    x, y = data.split("test")
    right, wrong = (pyrovae.reconstruct(model, guide, x, label, seed=0) for label in (y, 1 - y))
    assert (right - x).square().mean() < 0.5 * (wrong - x).square().mean()
    assert not torch.equal(*(pyrovae.encode(guide, x, label)["z"] for label in (y, 1 - y)))


def test_paths_and_traversals_keep_their_label(trained):
    model, guide, data = trained
    x, y = data.test[:3], torch.tensor([1, 0, 0])
    path = pyrovae.interpolate(model, guide, x, data.test[3:6], y, steps=3)
    z = {end: pyrovae.encode(guide, rows, y) for end, rows in ((0, x), (-1, data.test[3:6]))}
    for end, code in z.items():
        torch.testing.assert_close(path[:, end], pyrovae.decode(model, code, y, like=x))
    walk = pyrovae.traverse(model, guide, x, "z", 0, torch.tensor([-1.0, 2.0]), y)
    for i, value in enumerate((-1.0, 2.0)):
        code = {"z": torch.full((3, 1), value)}
        torch.testing.assert_close(walk[:, i], pyrovae.decode(model, code, y, like=x))


def test_a_label_given_is_kept_and_one_hidden_is_drawn():
    model, _, data = small("semi_supervised")
    with torch.no_grad():
        model.label.weight.copy_(torch.tensor([-50.0, 50.0])[:, None].expand(2, 8))
        model.code.weight.zero_()
        model.decoder[1].layers[0].weight.fill_(1.0)
        model.decoder[1].layers[0].bias.fill_(-200.0)
    y = torch.tensor([0, 1] * 100 + [-1] * 200)
    x = pyrovae.sample(model, y, like=data.test, seed=0)
    assert x.shape == (400, 8)
    assert torch.equal(x[:200], y[:200, None].expand(200, 8).float())
    assert 70 < x[200:, 0].sum() < 130
    given = {"y": torch.ones(4, dtype=torch.int64)}
    decoded = pyrovae.decode(model, given, torch.full((4,), -1), like=data.test, mean=False)
    assert (decoded == 1).all()


def test_fit_hands_the_context_to_both_programs():
    model, guide, data = small("conditional")
    x, y = data.split("valid")
    result = pyrovae.fit(model, guide, data, epochs=60, batch_size=10, lr=0.02, seed=0)
    right, wrong = (pyrovae.elbo(model, guide, x, label, seed=0).mean for label in (y, 1 - y))
    assert result.elbo == pytest.approx(right, abs=0.5)
    assert right > wrong + 3


@pytest.mark.parametrize(
    ("kind", "y"), [("conditional", -1), ("conditional", 2), ("semi_supervised", 2)]
)
def test_labels_that_a_program_does_not_have_are_refused(kind, y):
    model, guide, data = small(kind)
    with pytest.raises(ValueError, match=r"as many classes as there are labels.*hidden \(-1\)"):
        pyrovae.elbo(model, guide, data.test, torch.full((15,), y))
