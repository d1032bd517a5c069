"""The record of results: what is written is read again, from files of earlier versions too."""

import json
import math

import pytest
import torch

from pyrovae.evidence.result import Curve, LogLikelihood
from pyrovae.objectives.elbo import ElboResult
from pyrovae.runs import Run
from pyrovae.runs.results import (
    BOUND,
    Annealed,
    Evidence,
    Finding,
    Mean,
    Results,
    load_finding,
    load_results,
    save_finding,
)

# As it was written before the verdict had a kind.
EARLIER = {
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
    found = Results.of(ll, bounds(), weights="abc", annealed=Annealed.over_samples(ais, ll))
    assert Results.read(json.loads(json.dumps(found.write()))) == found
    assert found.log_likelihood.curve == {1: -3.5, 50: -3.0}
    assert found.annealed.over_importance_sampling.mean == pytest.approx(0.1)
    assert -(found.rate.mean + found.distortion.mean) == pytest.approx(found.bound.mean)
    run = Run(tmp_path)
    assert load_finding(run) is None
    save_finding(run, "valid", Finding(found, (), ll, ais, bounds()[BOUND].elbo, "abc"))
    again = load_finding(run)
    assert again.results == found
    assert again.weights == "abc"
    assert torch.equal(again.elbo, bounds()[BOUND].elbo)
    assert torch.equal(again.annealed.log_prob, ais.log_prob)
    assert again.log_likelihood.verdict == found.verdict


def test_numbers_that_json_does_not_know_are_none():
    found = Results(log_likelihood=Evidence(mean=math.nan, curve={1: -math.inf, 2: -1.0})).write()
    assert found["log_likelihood"]["mean"] is None
    assert found["log_likelihood"]["curve"] == {"1": None, "2": -1.0}
    assert "diagnostics" not in found
    assert "amortization_gap" not in found


def test_files_of_earlier_versions_are_read_and_keep_what_no_field_is_for():
    found = Results.read(EARLIER)
    assert found.verdict == EARLIER["verdict"]
    assert found.verdict.kind == "good"
    assert found.bound == Mean(mean=-3.5, standard_error=0.1)
    assert found.log_likelihood.curve == {1: -3.5, 10: -3.1, 50: -3.0}
    assert found.rate == Mean(mean=1.1, standard_error=0.1)
    assert found.distortion == Mean(mean=2.5)
    assert found.diagnostics.units == (1, 2)
    assert found.write()["of a later version"] == {"x": 1}
    assert found.write().keys() >= EARLIER.keys()


KINDS = {
    "fair": {"khat_over_0.7": None},
    "fair, one in twenty": {"khat_over_0.7": 0.05},
    "doubtful tails": {"khat_over_0.7": 0.06},
    "doubtful, biased": {"mean_bias": -0.02},
    "doubtful, uncovered": {"uncovered": 0.1},
    "doubtful, unknown": {"mean": None},
}


@pytest.mark.parametrize("case", KINDS)
def test_a_verdict_without_a_kind_has_that_of_its_numbers(case):
    ll = EARLIER["log_likelihood"] | KINDS[case]
    found = Results.read(EARLIER | {"log_likelihood": ll})
    assert found.verdict.kind == case.partition(",")[0].partition(" ")[0]
    assert Results.read(found.write() | {"verdict_kind": "good"}).verdict.kind == "good"


@pytest.mark.parametrize(
    "damage", ['{"test": 3}', '{"test": {"elbo": 3}}', '{"test": {"elbo": {"a": 1}}}']
)
def test_a_damaged_record_is_refused(tmp_path, damage):
    (tmp_path / "results.json").write_text(damage)
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        load_results(Run(tmp_path))
