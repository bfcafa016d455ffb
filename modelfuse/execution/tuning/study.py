"""The study: all trials in an Optuna study in a SQLite file, and the samplers that propose the next one.

TPE is Optuna's, multivariate: Falkner et al. 2018, arXiv:1807.01774.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from modelfuse.errors import OutputError
from modelfuse.execution.tuning.cma_es import CmaEs
from modelfuse.execution.tuning.search_space import Dimension
from modelfuse.execution.tuning.trials import (
    Trial,
    attributes_of,
    distribution_of,
    load_optuna,
    optuna_parameter,
    optuna_value,
    suggest,
    trial_of,
)
from modelfuse.planning.optional_packages import require

FILE = "study.db"
STUDY = "modelfuse"
#: User attributes of the study: what results depend on, directions of the numbers, dimensions, population of CMA-ES.
FACTS, NUMBERS, DIMENSIONS, POPULATION = "facts", "numbers", "dimensions", "population"
SAMPLERS = ("auto", "cmaes", "tpe", "gradient")
#: Random trials of TPE before it uses results.
TPE_RANDOM = 10
#: Samplers take seeds below this.
MOST_SEED = 2**32


class Study:
    """The trials of a search, and the sampler that proposes the next one.

    Args:
        folder: The folder of its file.
        sampler: One of ``SAMPLERS``.
        seed: The seed of the sampler.

    Raises:
        MissingExtraError: If optuna or cmaes is not installed.
    """

    def __init__(self, folder: Path, sampler: str, seed: int) -> None:
        for module in ("optuna", "cmaes"):
            require(module, "tune", "search by hand with merge", extra="tune")
        self.path = folder / FILE
        self._sampler, self._seed = sampler, seed
        self._study: Any = None
        self._directions: dict[str, bool] = {}
        self._dimensions: tuple[Dimension, ...] = ()
        self._cma: CmaEs | None = None

    @property
    def is_begun(self) -> bool:
        """Whether the study has been created, by this run or by an earlier one."""
        return self._study is not None

    @property
    def left_out(self) -> frozenset[str]:
        """The names of dimensions that are not searched, as they have no effect."""
        return frozenset(self._study.user_attrs[DIMENSIONS]["left_out"])

    def open(self, facts: Mapping[str, object]) -> None:
        """Load the study if there is one.

        Args:
            facts: Everything that its results depend on, under names that messages can use.

        Raises:
            OutputError: If it is the study of another request, or cannot be read.
        """
        if not self.path.exists():
            return
        with self._file_errors():
            optuna = load_optuna()
            storage = self._storage()
            if STUDY not in optuna.get_all_study_names(storage):
                return
            study = optuna.load_study(study_name=STUDY, storage=storage)
            known = study.user_attrs.get(FACTS)
        if not isinstance(known, dict) or NUMBERS not in study.user_attrs or not study.get_trials(deepcopy=False):
            self._discard()  # The process was killed while it created the study.
            return
        changed = [name for name in {**known, **facts} if known.get(name) != facts.get(name)]
        if changed:
            raise OutputError(
                f"{self.path} is the study of another request: {changed[0]} has changed"
                + " (and more)" * (len(changed) > 1),
                f"Remove {self.path.parent} to start a new search, or choose another output_path.",
            )
        self._study = study

    def begin(
        self,
        facts: Mapping[str, object],
        directions: Mapping[str, bool],
        first: Trial,
        dimensions: Sequence[Dimension],
        left_out: Sequence[str],
        budget: int,
    ) -> None:
        """Create the study with the first trial, which was evaluated before.

        Args:
            facts: Everything that results depend on, under names that messages can use.
            directions: For each number of the evaluation, whether larger is better.
            first: The first trial.
            dimensions: The dimensions that are searched.
            left_out: The names of those that are not.
            budget: The expected number of trials, which determines the population of CMA-ES.

        Raises:
            OutputError: If the file cannot be written.
        """
        with self._file_errors():
            optuna = load_optuna()
            self._study = study = optuna.create_study(
                study_name=STUDY,
                storage=self._storage(),
                directions=["maximize" if upward else "minimize" for upward in directions.values()],
            )
            study.set_user_attr(FACTS, dict(facts))
            study.set_user_attr(POPULATION, CmaEs.population(len(dimensions), budget))
            study.set_user_attr(DIMENSIONS, {"searched": [each.name for each in dimensions], "left_out": [*left_out]})
            trial = optuna.trial.create_trial(
                params={each.name: optuna_parameter(each, first.parameters[each.name]) for each in dimensions},
                distributions={each.name: distribution_of(each) for each in dimensions},
                values=[optuna_value(first.numbers[name], upward) for name, upward in directions.items()],
                user_attrs=attributes_of(first),
            )
            study.add_trial(trial)
            study.set_user_attr(NUMBERS, dict(directions))

    def use(self, dimensions: Sequence[Dimension]) -> None:
        """Set the dimensions that are searched; call it before ``propose``."""
        self._dimensions = tuple(dimensions)
        self._directions = dict(self._study.user_attrs[NUMBERS])
        sampler = self._sampler
        if sampler == "auto":
            sampler = "cmaes" if len(self._directions) == 1 and len(dimensions) > 1 else "tpe"
        if sampler == "cmaes":
            self._cma = CmaEs(dimensions, self._study.user_attrs[POPULATION], self._seed % MOST_SEED)

    @property
    def directions(self) -> Mapping[str, bool]:
        """For each number, whether larger is better."""
        return self._directions

    def pending(self) -> list[Trial]:
        """Trials that earlier runs have begun and not finished."""
        state = load_optuna().trial.TrialState.RUNNING
        found = list[Trial]()
        with self._file_errors():
            for each in self._study.get_trials(deepcopy=False, states=(state,)):
                trial = each
                if len(each.params) < len(self._dimensions):  # The process was killed while it created the trial.
                    trial = load_optuna().trial.Trial(self._study, each._trial_id)
                    for dimension in self._dimensions:
                        suggest(trial, dimension)
                found.append(Trial(each.number, self._parameters(trial), {}))
        return found

    def propose(self, others: bool, point: Mapping[str, float] | None = None) -> Trial | None:
        """Begin a new trial.

        Args:
            others: Whether other trials are in progress.
            point: Its parameters; None: the sampler proposes them.

        Returns:
            The trial; None if results of trials in progress are needed first.
        """
        optuna = load_optuna()
        with self._file_errors():
            waiting = optuna.trial.TrialState.WAITING  # Enqueued by a run that was killed: Optuna's ask takes it first.
            number = sum(each.state != waiting for each in self._study.get_trials(deepcopy=False))
            if self._cma is not None:
                point = self._cma.propose(number - 1, {each.number - 1: self._loss(each) for each in self.done()})
                if point is None:
                    return None
            if point is not None:
                self._study.enqueue_trial(
                    {each.name: optuna_parameter(each, point[each.name]) for each in self._dimensions},
                    skip_if_exists=True,
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                # A new sampler for each trial: its draws depend on earlier trials only, not on the process.
                self._study.sampler = optuna.samplers.TPESampler(
                    n_startup_trials=TPE_RANDOM,
                    multivariate=True,
                    constant_liar=others,
                    seed=(self._seed * 100_003 + number) % MOST_SEED,
                )
            trial = self._study.ask({each.name: distribution_of(each) for each in self._dimensions})
        return Trial(trial.number, self._parameters(trial), {})

    def tell(self, trial: Trial) -> None:
        """Store the result of a trial."""
        with self._file_errors():
            state = load_optuna().trial.TrialState.COMPLETE
            storage, known = self._study._storage, self._study.get_trials(deepcopy=False)[trial.number]
            for name, value in attributes_of(trial).items():
                storage.set_trial_user_attr(known._trial_id, name, value)
            values = [optuna_value(trial.numbers[name], upward) for name, upward in self._directions.items()]
            self._study.tell(trial.number, values, state=state)

    def done(self) -> list[Trial]:
        """All finished trials, in order."""
        with self._file_errors():
            complete = load_optuna().trial.TrialState.COMPLETE
            found = self._study.get_trials(deepcopy=False, states=(complete,))
        return [trial_of(each, self._parameters(each)) for each in found]

    def best(self) -> list[Trial]:
        """The best trial or, with several numbers, the Pareto front, ordered by the first number."""
        done = [each for each in self.done() if all(map(math.isfinite, self._losses(each)))] or self.done()[:1]
        front = [each for each in done if not any(self._beats(other, each) for other in done)]
        ranked = sorted(front, key=lambda each: (self._losses(each), each.number))
        return ranked[:1] if len(self._directions) == 1 else ranked

    def _beats(self, one: Trial, other: Trial) -> bool:
        ones, others = self._losses(one), self._losses(other)
        return ones != others and all(mine <= its for mine, its in zip(ones, others, strict=True))

    def _loss(self, trial: Trial) -> float:
        return self._losses(trial)[0]

    def _losses(self, trial: Trial) -> list[float]:
        """A trial's numbers, negated if larger is better."""
        values = {name: optuna_value(trial.numbers[name], upward) for name, upward in self._directions.items()}
        return [-value if self._directions[name] else value for name, value in values.items()]

    def _parameters(self, trial: Any) -> dict[str, float]:
        return {each.name: float(trial.params[each.name]) for each in self._dimensions if each.name in trial.params}

    def _storage(self) -> Any:
        url = import_module("sqlalchemy").URL.create("sqlite", database=str(self.path)).render_as_string()
        return load_optuna().storages.RDBStorage(url)

    def _discard(self) -> None:
        self.path.unlink(missing_ok=True)

    @contextmanager
    def _file_errors(self) -> Iterator[None]:
        """Raise errors of the database as OutputError."""
        try:
            yield
        except Exception as error:
            kinds = (import_module("sqlalchemy.exc").SQLAlchemyError, load_optuna().exceptions.StorageInternalError)
            if not isinstance(error, kinds):
                raise
            why = str(error.__cause__ or error).splitlines()[0]
            raise OutputError(
                f"{self.path} cannot be used as a study: {why}", f"Remove {self.path.parent} to start a new search."
            ) from error
