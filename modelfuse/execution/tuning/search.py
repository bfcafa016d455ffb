"""The search loop: propose settings, merge and evaluate until the budget is spent, then merge with the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from modelfuse.errors import EvaluationError, RecipeError
from modelfuse.execution.intermediate import keep_intermediate
from modelfuse.execution.resume import facts_of
from modelfuse.execution.run import cluster_of, run_into, run_plan
from modelfuse.execution.tuning.gradient import NAME as DESCENT
from modelfuse.execution.tuning.gradient import GradientDescent
from modelfuse.execution.tuning.history import write_history
from modelfuse.execution.tuning.merged_folders import MergedFolder, merged_folders
from modelfuse.execution.tuning.request import Tuned, TuningRequest
from modelfuse.execution.tuning.search_space import Dimension, Space
from modelfuse.execution.tuning.study import Study
from modelfuse.execution.tuning.trials import Trial
from modelfuse.kernels.jit.compile import announcing
from modelfuse.planning.plan import Plan, make_plan

Tell = Callable[[str], None]


class MergedTrial(NamedTuple):
    """A trial with the folder and the plan of its merge; None if its settings are invalid."""

    trial: Trial
    path: Path | None = None
    plan: Plan | None = None


@dataclass
class Search:
    """One run of a request.

    Args:
        request: What to search.
        space: The recipe with its dimensions.
        study: The trials.
        tell: Called with a sentence on each trial.
    """

    request: TuningRequest
    space: Space
    study: Study
    tell: Tell

    def run(self, plan: Plan) -> None:
        """Merge and evaluate until the study has as many trials as the budget allows.

        Args:
            plan: The plan of the first trial.

        Raises:
            ModelfuseError: If a merge or an evaluation fails, or the study is one of another request.
        """
        request, facts = self.request, self._facts(plan)
        self.study.open(facts)
        if self.study.is_begun:
            self._search_without(self.study.left_out)
            if (known := len(self.study.done())) >= request.budget:
                self.tell(f"The study already has {known} evaluated merges.")
                return
            self.tell(f"Resuming the interrupted run: {known} of {request.budget} merges are evaluated.")
        self._descent = GradientDescent(self.space, plan, request) if request.sampler == DESCENT else None
        with ExitStack() as stack:
            folders = stack.enter_context(
                merged_folders(self.study.path.parent, request.scratch, plan.disk_space, request.jobs)
            )
            self._cluster = stack.enter_context(cluster_of(plan.recipe))
            stack.enter_context(announcing(self.tell))
            stack.callback(request.evaluation.stop)
            if not self.study.is_begun:
                self._begin(plan, facts, folders[0])
            self._pending = self.study.pending()
            if request.jobs == 1:
                while (trial := self._next(0)) is not None:
                    self._take(self._evaluated(self._merged(trial, folders[0])))
            else:
                self._run_several(folders)

    def finish(self, output: Path, started: float) -> Tuned:
        """Write the history of the study, and merge with the best settings.

        Args:
            output: The output's folder.
            started: The time of the start, by ``time.perf_counter``.
        """
        front, done = self.study.best(), self.study.done()
        best = front[0]
        settings = {**self.space.settings(best.parameters), "output_path": output}
        recipes = {each.number: self.space.settings(each.parameters) for each in front}
        write_history(self.study.path.parent, self.space.dimensions, self.study.directions, done, front, recipes)
        recipe = self.space.recipe(best.parameters)
        keep_intermediate(recipe)
        run_plan(make_plan(recipe), tell=self.tell)
        return Tuned(
            output, self.study.path.parent, best, tuple(front), tuple(done), settings, self.study.directions,
            time.perf_counter() - started,
        )  # fmt: skip

    def _facts(self, plan: Plan) -> dict[str, object]:
        """Everything that results depend on, under names that messages can use."""
        request = self.request
        space = [[each.name, each.low, each.high, each.start, each.log, each.whole] for each in self.space.dimensions]
        return {
            **facts_of(plan),
            "what is searched": space,
            "evaluate": request.evaluation.description,
            "direction": [*request.direction],
            "sampler": request.sampler,
        }

    def _begin(self, plan: Plan, facts: Mapping[str, object], folder: MergedFolder) -> None:
        """Evaluate the first trial: it shows the evaluation's numbers, and which weights have no effect."""
        first = self._evaluated(self._merged(Trial(0, self.space.start, {}), folder))
        directions = {name: self.request.is_upward(name) for name in first.numbers}
        for word in self.request.direction:
            if "=" in word and (name := word.rpartition("=")[0]) not in directions:
                raise RecipeError(f"direction names {name!r}, but the evaluation gives {', '.join(directions)}")
        searched = self.space.dimensions
        left_out = _without_effect(self.space, plan, folder.unchanged())
        if left_out:
            self.tell(f"Not searched, as the models have the base's values there: {', '.join(sorted(left_out))}.")
        searched = tuple(each for each in searched if each.name not in left_out)
        if not searched:
            raise RecipeError("There is nothing to search: the models have the base's values")
        self.study.begin(facts, directions, first, searched, sorted(left_out), self.request.budget)
        self._search_without(frozenset(left_out))
        self._tell_of(first)

    def _search_without(self, left_out: frozenset[str]) -> None:
        self.space = replace(self.space, left_out=left_out)
        self.study.use(self.space.dimensions)

    def _next(self, running: int) -> Trial | None:
        """The next trial to merge and evaluate; those that an earlier run has begun come first.

        Args:
            running: The number of evaluations in progress.

        Returns:
            The trial; None if the budget is spent, or results of trials in progress are needed first.
        """
        if self._pending:
            return self._pending.pop(0)
        if len(self.study.done()) + running >= self.request.budget:
            return None
        if self._descent is None:
            return self.study.propose(running > 0)
        return self.study.propose(False, self._descent.propose(self.study.done(), self.space.dimensions))

    def _run_several(self, folders: Sequence[MergedFolder]) -> None:
        """Evaluate in several threads; merges run one at a time in this one."""
        free, running = [*folders], dict[Future[Trial], MergedFolder]()
        with ThreadPoolExecutor(len(folders)) as pool:
            try:
                while True:
                    if free and (trial := self._next(len(running))) is not None:
                        folder = free.pop()
                        running[pool.submit(self._evaluated, self._merged(trial, folder))] = folder
                        continue
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        free.append(running.pop(future))
                        self._take(future.result())
            except BaseException:
                self.request.evaluation.stop()
                raise

    def _merged(self, trial: Trial, folder: MergedFolder) -> MergedTrial:
        """Merge with a trial's settings, unless their combination is invalid."""
        started = time.perf_counter()
        name = f"trial-{trial.number}"
        try:
            recipe = self.space.recipe(trial.parameters, output_path=folder.path.with_name(name), overwrite=True)
            plan = make_plan(recipe)
        except RecipeError as error:
            if trial.number == 0:
                raise
            self.tell(f"Trial {trial.number} cannot be merged: {error.message}")
            return MergedTrial(trial)
        path = folder.prepare(plan, name)
        run_into(plan, folder, self._cluster)
        return MergedTrial(replace(trial, seconds=(time.perf_counter() - started, 0.0)), path, plan)

    def _evaluated(self, merged: MergedTrial) -> Trial:
        """The trial with its numbers; NaN if it could not be merged."""
        trial, path, plan = merged
        if path is None or plan is None:
            return replace(trial, numbers=dict.fromkeys(self.study.directions, math.nan))
        started = time.perf_counter()
        if self._descent is not None:
            numbers, gradient = self._descent.evaluate(path, plan)
            trial = replace(trial, gradient=gradient)
        else:
            numbers = self.request.evaluation(path)
        return replace(trial, numbers=numbers, seconds=(trial.seconds[0], time.perf_counter() - started))

    def _take(self, trial: Trial) -> None:
        directions = self.study.directions
        if missing := directions.keys() ^ trial.numbers.keys():
            raise EvaluationError(
                f"The evaluation has given {', '.join(trial.numbers)}, but the first one {', '.join(directions)}",
                f"All evaluations should give the same numbers; check {', '.join(sorted(missing))}.",
            )
        self.study.tell(trial)
        self._tell_of(trial)

    def _tell_of(self, trial: Trial) -> None:
        numbers = ", ".join(f"{name} {number:.6g}" for name, number in trial.numbers.items())
        best = self.study.best()
        if len(self.study.directions) == 1:
            what = "the best so far" if best[0].number == trial.number else f"best {_only(best[0]):.6g}"
        else:
            what = f"{len(best)} on the front"
        merging, evaluating = trial.seconds
        self.tell(
            f"{len(self.study.done())}/{self.request.budget}, trial {trial.number}: {numbers} ({what}); "
            f"merged in {merging:.1f} s, evaluated in {evaluating:.1f} s"
        )


def _only(trial: Trial) -> float:
    return next(iter(trial.numbers.values()))


def _without_effect(space: Space, plan: Plan, unchanged: Mapping[str, Sequence[bool]]) -> set[str]:
    """The names of weights without effect: their model has the base's values in all tensors that they apply to.

    Args:
        space: The search space.
        plan: The plan of the first trial.
        unchanged: For each tensor that was merged with a base, whether each model has the base's values.
    """
    if not plan.has_base:
        return set()
    rules, found = space.tree.get("rules"), dict[str, bool]()
    for tensor in plan.tensors:
        own = rules[tensor.rule] if isinstance(rules, list) and tensor.rule is not None else space.tree
        weights = own.get("weight_list", space.tree.get("weight_list")) if isinstance(own, Mapping) else None
        same, several = unchanged.get(tensor.name, ()), weights if isinstance(weights, list) else []
        for model, weight in enumerate(several):
            if isinstance(weight, Dimension):
                has_none = tensor.method is None or (len(same) == len(several) and same[model])
                found[weight.name] = found.get(weight.name, True) and has_none
    return {name for name, has_none in found.items() if has_none}
