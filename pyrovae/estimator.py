"""A pair as a scikit-learn estimator: codes, log p(x) as a score, and anomalies by a threshold."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyrovae._tools import InputError
from pyrovae._tools.seeding import seeded, subseed
from pyrovae.data import Dataset
from pyrovae.data.given import package_of, wordless
from pyrovae.data.tables import Column, measured, read_column
from pyrovae.evidence.importance import log_likelihood
from pyrovae.evidence.result import LogLikelihood
from pyrovae.runs.experiment import PROGRAM_STREAM, build_pair
from pyrovae.runs.programs import KINDS, Program, find_program
from pyrovae.sampling import decode, encode, sample
from pyrovae.training.loop import fit

__all__ = ["VAE"]

VALID_STREAM, THRESHOLD_STREAM = 1_000_005, 1_000_006


class VAE(TransformerMixin, BaseEstimator):
    r"""A variational autoencoder with scikit-learn's interface.

    ``transform`` gives :math:`E_q[z \mid x]`, ``score_samples`` :math:`\ln p(x)` of each datum in
    nats by importance sampling, and after ``fit_threshold`` ``predict`` tells anomalies. X is
    ``[N, D]``, as the model's likelihood needs it: grey levels or counts are binarized or left as
    they are by a step before this one in a pipeline. Of a frame, categories are taken by their
    codes, and programs that ask for columns, such as ``"table"``, get each with its kind.

    Args:
        model: A shipped name, ``"file.py"`` or ``"file.py:Class"``, a class that is constructed
            from the event shape, or a program, of which a copy is trained.
        guide: The guide, likewise.
        latent: The dimension of z, for programs that take one; None leaves their default.
        model_settings: Further keyword arguments of the model's class.
        guide_settings: Those of the guide's.
        shape: The event shape that the programs see, such as ``(1, 28, 28)``; by default ``(D,)``.
        objective: As for :func:`pyrovae.fit`, as are the next six.
        epochs: Passes over the training data.
        batch_size: The size of a minibatch; fewer data are one.
        lr: The learning rate.
        particles: Samples of each datum for the objective.
        patience: Stop when the bound of the validation data has not risen for so many epochs.
        compile: Compile the step: True, False or ``"auto"``.
        validation_fraction: The share of X that ``patience`` is judged on, held out at random.
        num_samples: The samples K of each datum for log p(x).
        device: Where to train; None is the CPU.
        random_state: Seeds training, and everything that is drawn later.
        progress: Show bars on a terminal.

    Attributes:
        model_: The trained model program, as all functions of :mod:`pyrovae` take it.
        guide_: The trained guide program.
        history_: One row an epoch, as :attr:`pyrovae.Fit.history` has them.
        n_features_in_: D.
        seed_: What the draws derive from.
        threshold_: The log p(x) below which a datum is an anomaly, in nats.
        false_alarm_: The expected share of normal data below it.
        false_alarm_interval_: The interval of that share.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> X = load_digits().data / 16
        >>> vae = pyrovae.VAE(model="gaussian", latent=2, epochs=2, random_state=0).fit(X)
        >>> vae.transform(X).shape, list(vae.get_feature_names_out())
        ((1797, 2), ['z_0', 'z_1'])
    """

    def __init__(
        self,
        model: str | type | Callable = "bernoulli",
        guide: str | type | Callable = "mean_field",
        *,
        latent: int | None = None,
        model_settings: Mapping[str, Any] | None = None,
        guide_settings: Mapping[str, Any] | None = None,
        shape: Sequence[int] | None = None,
        objective: Any = "trace_mean_field_elbo",
        epochs: int = 50,
        batch_size: int = 128,
        lr: float = 1e-3,
        particles: int | None = None,
        patience: int | None = None,
        compile: bool | str = "auto",
        validation_fraction: float = 0.1,
        num_samples: int = 100,
        device: str | torch.device | None = None,
        random_state: Any = None,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.guide = guide
        self.latent = latent
        self.model_settings = model_settings
        self.guide_settings = guide_settings
        self.shape = shape
        self.objective = objective
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.particles = particles
        self.patience = patience
        self.compile = compile
        self.validation_fraction = validation_fraction
        self.num_samples = num_samples
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train a new pair on X ``[N, D]``; y is not used.

        Raises:
            ValueError: As for :func:`pyrovae.fit`.
        """
        x = self._rows(X, reset=True)
        for name in [n for n in vars(self) if n.startswith(("threshold", "false_alarm"))]:
            delattr(self, name)
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        data = self._split(x)
        self.model_, self.guide_ = self._build(data)
        result = fit(
            self.model_,
            self.guide_,
            data,
            objective=self.objective,
            epochs=self.epochs,
            batch_size=min(self.batch_size, len(data.train)),
            lr=self.lr,
            particles=self.particles,
            patience=self.patience,
            compile=self.compile,
            device=self.device,
            seed=self.seed_,
            progress=self.progress,
        )
        self.history_ = result.history
        # Models that read the x that they observe are run on a batch of the right shape.
        self._like = x[:1].clone()
        codes = encode(self.guide_, self._like, seed=self.seed_)
        self._codes = {name: tuple(z.shape[1:]) for name, z in codes.items()}
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The posterior means ``[N, L]``, the latent sites side by side."""
        check_is_fitted(self)
        codes = encode(self.guide_, self._rows(X), seed=self.seed_)
        found = torch.cat([z.reshape(len(z), -1).float() for z in codes.values()], 1).cpu().numpy()
        kind = np.float64 if getattr(X, "dtype", None) == np.float64 else np.float32
        return found.astype(kind, copy=False)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Decode codes ``[N, L]`` to E[x | z] ``[N, D]``."""
        check_is_fitted(self)
        codes = torch.tensor(np.asarray(X, dtype=np.float32))
        sizes = [math.prod(shape) for shape in self._codes.values()]
        if codes.dim() != 2 or codes.shape[1] != sum(sizes):
            raise InputError(
                f"Expected codes [N, {sum(sizes)}] as transform() gives them, got "
                f"{list(codes.shape)}."
            )
        parts = zip(self._codes.items(), codes.split(sizes, 1), strict=True)
        latents = {name: part.reshape(-1, *shape) for (name, shape), part in parts}
        return _columns(decode(self.model_, latents, like=self._like, seed=self.seed_))

    def log_likelihood(self, X: Any) -> LogLikelihood:
        """The estimate of log p(x) with its errors, ESS and k-hat, for each row of X."""
        check_is_fitted(self)
        return self._estimate(self._rows(X), self.seed_)

    def score_samples(
        self, X: Any, return_error: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """log p(x) ``[N]`` in nats, and its Monte Carlo standard errors ``[N]`` if asked for."""
        found = self.log_likelihood(X)
        values, errors = (t.cpu().numpy() for t in (found.log_prob, found.standard_error))
        return (values, errors) if return_error else values

    def score(self, X: Any, y: Any = None) -> float:
        """The mean log p(x), nats per datum; y is not used."""
        return self.log_likelihood(X).mean

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draw new data ``[n, D]``; without a random state, the same ones each time."""
        check_is_fitted(self)
        seed = self.seed_
        if random_state is not None:
            seed = int(check_random_state(random_state).randint(2**31 - 1))
        return _columns(sample(self.model_, like=self._like, n=n_samples, seed=seed))

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """The names of the codes, ``z_0``, ``z_1``, ...: the latent site and its element."""
        check_is_fitted(self)
        names = [f"{n}_{i}" for n, shape in self._codes.items() for i in range(math.prod(shape))]
        return np.asarray(names, dtype=object)

    def fit_threshold(self, X: Any, false_alarm: float = 0.05, confidence: float = 0.95) -> Self:
        r"""Choose the score below which a datum is an anomaly, on normal data not trained on.

        The threshold is the k-th smallest of N scores, :math:`k = \lfloor \alpha (N+1) \rfloor`.
        Whatever the distribution of the scores, the share of normal data below it is

        .. math:: F \sim \mathrm{Beta}(k, N + 1 - k), \qquad E[F] = \frac{k}{N + 1} \le \alpha,

        over the draw of the validation data, the noise of the scores included.

        Args:
            X: Normal data ``[N, D]`` that ``fit`` has not seen.
            false_alarm: The share α of normal data to be called anomalies at most.
            confidence: Of the interval of that share.

        Raises:
            ValueError: If α or the confidence is no share, or N is below 1/α − 1.

        References:
            Wilks, Determination of Sample Sizes for Setting Tolerance Limits (1941).
        """
        from scipy.stats import beta

        for name, value in (("false_alarm", false_alarm), ("confidence", confidence)):
            if not 0 < value < 1:
                raise InputError(f"Expected 0 < {name} < 1, got {value}.")
        check_is_fitted(self)
        # Draws of their own: rows to be judged later share no noise with these.
        found = self._estimate(self._rows(X), subseed(self.seed_, THRESHOLD_STREAM))
        scores = found.log_prob.sort().values
        n = len(scores)
        # The least number above a product such as 0.05 * 20 may lie below the whole number.
        rank = math.floor(false_alarm * (n + 1) + 1e-9)
        if rank < 1:
            raise InputError(
                f"Expected at least {math.ceil(1 / false_alarm - 1 - 1e-9)} data for a false-alarm "
                f"rate of {false_alarm:g}, got {n}: give more, or raise the rate."
            )
        tail = (1 - confidence) / 2
        share = beta.ppf([tail, 1 - tail], rank, n + 1 - rank)
        self.threshold_ = float(scores[rank - 1])
        self.false_alarm_ = rank / (n + 1)
        self.false_alarm_interval_ = tuple(share.tolist())
        return self

    @available_if(lambda self: hasattr(self, "threshold_"))
    def decision_function(self, X: Any) -> np.ndarray:
        """log p(x) above the threshold ``[N]``, in nats; negative for anomalies."""
        return np.asarray(self.score_samples(X)) - self.threshold_

    @available_if(lambda self: hasattr(self, "threshold_"))
    def predict(self, X: Any) -> np.ndarray:
        """1 for data that the model takes for normal, and −1 for anomalies, ``[N]``."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _estimate(self, x: Tensor, seed: int) -> LogLikelihood:
        how: dict[str, Any] = {"num_samples": self.num_samples, "progress": self.progress}
        return log_likelihood(self.model_, self.guide_, x, seed=seed, **how)

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks of an estimator: transform() keeps both floating dtypes."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _rows(self, X: Any, reset: bool = False) -> Tensor:
        """X as the programs see it, ``[N, *shape]``, in memory of its own."""
        x = validate_data(self, self._coded(X, reset), reset=reset, dtype=np.float32)
        shape = (x.shape[1],) if self.shape is None else tuple(self.shape)
        if math.prod(shape) != x.shape[1]:
            raise InputError(
                f"Expected shape to hold the {x.shape[1]} features of X, got {list(shape)}."
            )
        # A copy in rows: torch takes neither negative strides nor memory that is read-only.
        return torch.from_numpy(np.array(x, order="C")).reshape(-1, *shape)

    def _coded(self, X: Any, reset: bool) -> Any:
        """X, of a frame the numbers, and of categories the codes that they had in ``fit``."""
        if reset:
            self._schema: tuple[Column, ...] = ()
            self._categories: dict[Any, Any] = {}
        if package_of(X) not in ("pandas", "polars") or not hasattr(X, "columns") or not len(X):
            return X
        X = X.infer_objects() if hasattr(X, "infer_objects") else X
        frame = wordless(X).copy(deep=False)
        for name in self._categories.keys() & {*frame.columns}:
            known, given = frame[name].astype(self._categories[name]), frame[name]
            if (new := known.isna() & given.notna()).any():
                raise InputError(
                    f"Expected categories that fit() has seen in column {name!r} of X, got "
                    f"{given[new].iloc[0]!r}."
                )
            frame[name] = known
        read = [read_column(column, None, "X") for _, column in frame.items()]
        if reset:
            self._schema = tuple(column for column, _ in read)
            self._categories = {n: t for n, t in frame.dtypes.items() if t == "category"}
        return type(frame)(np.stack([numbers for _, numbers in read], 1), columns=frame.columns)

    def _split(self, x: Tensor) -> Dataset:
        if self.patience is None:
            return self._described(Dataset.of(x))
        count = round(self.validation_fraction * len(x))
        if not 0 < count < len(x):
            raise InputError(
                f"Expected a validation_fraction that leaves data on both sides of {len(x)}, got "
                f"{self.validation_fraction}."
            )
        with seeded(subseed(self.seed_, VALID_STREAM)):
            order = torch.randperm(len(x))
        return self._described(Dataset("array", x.shape[1:], x[order[count:]], x[order[:count]]))

    def _described(self, data: Dataset) -> Dataset:
        """The data with the columns of the frame that they were."""
        if len(data.shape) != 1 or not self._schema:
            return data
        return replace(data, columns=measured(self._schema, data.train, None))

    def _build(self, data: Dataset) -> tuple[Callable, Callable]:
        with seeded(subseed(self.seed_, PROGRAM_STREAM, 0)):
            programs = {kind: _program(getattr(self, kind), kind) for kind in KINDS}
        settings = {kind: self._settings(kind, program) for kind, program in programs.items()}
        return build_pair(programs, settings, data, self.seed_)

    def _settings(self, kind: str, program: Program) -> dict[str, Any]:
        known = {} if self.latent is None else {"latent": self.latent}
        known = {name: value for name, value in known.items() if name in program.arguments()}
        return known | dict(getattr(self, f"{kind}_settings") or {})


def _program(given: str | type | Callable, kind: str) -> Program:
    if isinstance(given, str):
        return find_program(given, kind)
    if inspect.isclass(given):
        return Program(kind, given.__name__, None, given)
    made = _copied(given) if isinstance(given, nn.Module) else given
    return Program(kind, type(given).__name__, None, made)


def _copied(module: nn.Module) -> nn.Module:
    """A copy, also of modules that remember a value of theirs, as Pyro's flows do."""
    leaves = tree_leaves([list(vars(child).values()) for child in module.modules()])
    made = {id(leaf): leaf.detach() for leaf in leaves if torch.is_tensor(leaf) and leaf.grad_fn}
    return copy.deepcopy(module, made)


def _columns(x: Tensor | dict[str, Tensor]) -> np.ndarray:
    """Values of the observed sites side by side, ``[N, D]``."""
    sites = [x] if isinstance(x, Tensor) else list(x.values())
    return torch.cat([each.reshape(len(each), -1) for each in sites], 1).cpu().numpy()
