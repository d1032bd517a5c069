"""The record of results: what is written is read again, and what is no result is refused."""

import json
import math

import pytest
import torch

from pyrovae._tools.files import plain_json, sealed
from pyrovae.evidence.result import Curve, LogLikelihood
from pyrovae.objectives.elbo import ElboResult
from pyrovae.runs import Run
from pyrovae.runs.results import (
    BOUND,
    Finding,
    Mean,
    Results,
    load_finding,
    load_results,
    save_finding,
)

WRITTEN = {
    "verdict_kind": "good",
    "verdict": "k-hat is at most 0.7 for all 4 data: the stated errors hold.",
    "num_data": 4,
    "units": "nats per datum",
    "elbo": {"trace_elbo": {"mean": -3.5, "standard_error": 0.1}},
    "kl": 1.0,
    "reconstruction": -2.5,
    "log_likelihood": {
        "mean": -3.0,
        "standard_error": 0.01,
        "data_standard_error": None,
        "num_samples": 50,
        "khat_over_0.7": 0.0,
        "mean_bias": -0.001,
        "uncovered": 0.0,
        "curve": {"1": -3.5, "10": -3.1, "50": -3.0},
    },
    "diagnostics": {
        "rate": {"mean": 1.1, "standard_error": 0.1},
        "sites": {"z": {"kl": [1.0, None], "active_units": 1, "units": 2}},
        "verdict": "1 of 2 units is active.",
    },
    "of a later version": {"x": 1},
}


def estimate(**more):
    bounds = torch.tensor([[-3.5], [-3.0]]) + torch.zeros(2, 4)
    numbers = {"log_prob": bounds[1], "standard_error": torch.full((4,), 0.01)}
    numbers |= {"ess": torch.full((4,), 20.0), "khat": torch.zeros(4), "num_samples": 50}
    return LogLikelihood(**numbers | {"curve": Curve((1, 50), bounds), "seed": 3} | more)


def bounds():
    parts = torch.tensor([-2.0, -3.0, -2.5, -2.5]), torch.tensor([1.0, 0.5, 1.5, 1.0])
    found = ElboResult(parts[0] - parts[1], *parts)
    return {"trace_elbo": found, BOUND: found}


def test_what_is_written_is_read_again(tmp_path):
    ll = estimate(log_prob=torch.full((4,), -3.0))
    ais = estimate(log_prob=torch.full((4,), -2.9), acceptance=torch.full((4,), 0.7))
    found = Results.of(ll, bounds(), weights="abc", annealed=ais)
    assert Results.read(json.loads(json.dumps(plain_json(found)))) == found
    assert found.log_likelihood.curve == {1: -3.5, 50: -3.0}
    assert found.annealed.over_importance_sampling.mean == pytest.approx(0.1)
    assert -(found.rate.mean + found.distortion.mean) == pytest.approx(found.bound.mean)
    run = Run(tmp_path)
    assert load_finding(run) is None
    save_finding(run, "valid", Finding(found, (), ll, ais, bounds()[BOUND].elbo))
    again = load_finding(run)
    assert again.results == found
    assert again.results.weights == "abc"
    assert torch.equal(again.elbo, bounds()[BOUND].elbo)
    assert torch.equal(again.annealed.log_prob, ais.log_prob)
    assert again.log_likelihood.verdict == found.verdict


def test_numbers_that_json_does_not_know_are_none():
    bad = torch.full((4,), torch.nan)
    found = Results.of(estimate(khat=bad, uncovered=math.nan), bounds())
    assert found.heavy is None
    assert found.log_likelihood.uncovered is None
    assert found.diagnostics is None
    assert found.amortization_gap is None


def test_entries_are_attributes_and_what_is_missing_is_none():
    found = Results.read(WRITTEN)
    assert found.verdict == WRITTEN["verdict"]
    assert found.verdict.kind == "good"
    assert found.bound == Mean(mean=-3.5, standard_error=0.1)
    assert f"{found.bound}" == "-3.500 ± 0.100"
    assert found.heavy == 0.0
    assert found.rate == Mean(mean=1.1, standard_error=0.1)
    assert f"{found.distortion}" == "2.500"
    assert found.active_units == (1, 2)
    assert found.annealed is None
    with pytest.raises(AttributeError):
        found.anealed  # noqa: B018


def test_what_was_written_by_a_later_version_is_kept(tmp_path):
    run, ll = Run(tmp_path), estimate(log_prob=torch.full((4,), -3.0))
    run.write_json("results.json", {"test": sealed(WRITTEN)})
    found = Results.of(ll, bounds())
    save_finding(run, "valid", Finding(found, (), ll, None, bounds()[BOUND].elbo))
    assert load_results(run)["valid"] == found
    assert run.read_json("results.json")["test"]["of a later version"] == {"x": 1}


@pytest.mark.parametrize("digit", ["-3.0", "0.01", '"num_data": 4'])
def test_a_digit_that_changed_is_seen(tmp_path, digit):
    text = json.dumps({"test": sealed(WRITTEN)})
    (tmp_path / "results.json").write_text(text.replace(digit, digit[:-1] + "7"))
    with pytest.raises(ValueError, match=r"results\.json is damaged.*checksum"):
        load_results(Run(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        '{"test": 3}',
        '{"test": {"elbo": 3}}',
        '{"test": {"elbo": {"a": 1}}}',
        '{"test": {"diagnostics": {"sites": {"z": 1}}}}',
        '{"test": {"log_likelihood": {"curve": 3}}}',
        '{"test": {"log_likelihood": {"mean": "high"}}}',
        '{"test": {"verdict_kind": "splendid"}}',
        '{"test": {"annealed": {"num_data": "<script>"}}}',
        '{"a":' * 100_000,
        "[" * 100_000,
        '{"test": {"kl": 1e999}}',
        "",
        "\\udcff",
    ],
    ids=range(13),
)
def test_a_damaged_record_is_refused(tmp_path, damage):
    (tmp_path / "results.json").write_bytes(damage.encode())
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        load_results(Run(tmp_path))
