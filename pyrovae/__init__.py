"""Variational autoencoders as Pyro programs.

A model p(z)p(x|z) and a guide q(z|x) are ordinary Pyro programs; everything here consumes their
traces. All log-probabilities are in nats per datum.
"""

from pyrovae._tools import InputError
from pyrovae.checking import Report, check
from pyrovae.data import Dataset, load_data
from pyrovae.diagnostics import Diagnosis, PosteriorCalibration, calibrate, diagnose
from pyrovae.distributions import kl_standard_normal
from pyrovae.evidence.annealing import annealed_log_likelihood
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.imputation import Imputation, impute
from pyrovae.evidence.result import Comparison, Curve, LogLikelihood, compare_log_likelihood
from pyrovae.evidence.sandwich import Bidirectional, bidirectional
from pyrovae.inference_data import to_inference_data
from pyrovae.objectives import make_objective
from pyrovae.objectives.elbo import ElboResult, elbo
from pyrovae.sampling import classify, decode, encode, interpolate, reconstruct, sample, traverse
from pyrovae.training.loop import fit
from pyrovae.training.monitor import Fit, NonFiniteLoss
from pyrovae.training.svi import SVI

__version__ = "0.1.0"

__all__ = [
    "Bidirectional",
    "Comparison",
    "Curve",
    "Dataset",
    "Diagnosis",
    "ElboResult",
    "Fit",
    "Imputation",
    "InputError",
    "LogLikelihood",
    "NonFiniteLoss",
    "PosteriorCalibration",
    "Report",
    "SVI",
    "annealed_log_likelihood",
    "bidirectional",
    "calibrate",
    "check",
    "classify",
    "compare_log_likelihood",
    "decode",
    "diagnose",
    "elbo",
    "encode",
    "fit",
    "impute",
    "interpolate",
    "kl_standard_normal",
    "load_data",
    "log_likelihood",
    "make_objective",
    "reconstruct",
    "sample",
    "to_inference_data",
    "traverse",
]
