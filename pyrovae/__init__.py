"""Variational autoencoders as Pyro programs.

A model p(z)p(x|z) and a guide q(z|x) are ordinary Pyro programs; everything here consumes their
traces. All log-probabilities are in nats per datum.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyrovae import _start  # noqa: F401  # before all that takes long to import
from pyrovae._tools import InputError
from pyrovae.checking import Report, check
from pyrovae.data import Dataset, load_data
from pyrovae.diagnostics import Diagnosis, PosteriorCalibration, calibrate, diagnose
from pyrovae.distributions import kl_standard_normal
from pyrovae.evidence.annealing import annealed_log_likelihood
from pyrovae.evidence.filtering import filtered_log_likelihood
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

if TYPE_CHECKING:
    from pyrovae.estimator import VAE
    from pyrovae.exporting import export
    from pyrovae.opening import OpenRun, evaluate, load, report

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
    "OpenRun",
    "PosteriorCalibration",
    "Report",
    "SVI",
    "VAE",
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
    "evaluate",
    "export",
    "filtered_log_likelihood",
    "fit",
    "impute",
    "interpolate",
    "kl_standard_normal",
    "load",
    "load_data",
    "log_likelihood",
    "make_objective",
    "reconstruct",
    "report",
    "sample",
    "to_inference_data",
    "traverse",
]

# What stands on packages that not every user needs is imported when it is first asked for.
_LATER = {
    "VAE": "pyrovae.estimator",
    "export": "pyrovae.exporting",
    **dict.fromkeys(("OpenRun", "evaluate", "load", "report"), "pyrovae.opening"),
}

if not TYPE_CHECKING:  # or else a type checker takes every name for one that is there

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module 'pyrovae' has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(_LATER[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted(__all__)
