"""Search the weights of a linear merge along gradients of the loss.

With W = b + λ·Σ wᵢτᵢ, ∂L/∂wᵢ is the sum of λ·⟨∂L/∂W, τᵢ⟩ over the tensors that wᵢ applies to, so one forward and one
backward pass through a merge give the derivatives with respect to all weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from modelfuse.checkpoints.adapters.arrays import load
from modelfuse.errors import EvaluationError, RecipeError
from modelfuse.execution.tuning.evaluation import Numbers
from modelfuse.execution.tuning.perplexity import Perplexity
from modelfuse.execution.tuning.request import TuningRequest
from modelfuse.execution.tuning.search_space import Dimension, Space
from modelfuse.execution.tuning.trials import Trial
from modelfuse.planning.operations import Operation
from modelfuse.planning.plan import Plan
from modelfuse.recipe.method_settings import FACTOR

NAME = "gradient"
#: Adam (arXiv:1412.6980): step as a share of the ranges, decay rates of the first and second moments, and epsilon.
STEP, MOMENTUM, SQUARES, SMALL = 0.08, 0.8, 0.95, 1e-12

Gradient = Mapping[str, float]


class GradientDescent:
    """Evaluates merges with their gradients, and proposes the points of a descent with Adam.

    Args:
        space: The search space.
        plan: The plan of the first trial.
        request: The request.

    Raises:
        RecipeError: If the gradient with respect to a dimension is not available, or the evaluation is not perplexity.
    """

    def __init__(self, space: Space, plan: Plan, request: TuningRequest) -> None:
        evaluation = request.evaluation
        if request.jobs > 1 or any(map(request.is_upward, ("", NAME))):
            raise RecipeError(f"sampler {NAME} minimizes, one trial at a time", "Leave out --jobs and --direction.")
        if not isinstance(evaluation, Perplexity) or len(evaluation.names) > 1:
            raise RecipeError(
                f"sampler {NAME} needs gradients of the loss, which a command or a function does not give",
                "Use --evaluate perplexity with one file of --data, or another sampler.",
            )
        self._space, self._evaluation = space, evaluation
        weights = {each.name for tensor in plan.tensors for each in _weights_of(space, tensor) if each is not None}
        for each in space.dimensions:
            is_factor = each is space.tree.get(FACTOR)
            if (each.name not in weights and not is_factor) or each.log or each.share:
                raise RecipeError(
                    f"sampler {NAME} searches weights and {FACTOR}; {each.name} is neither", "Use another sampler."
                )
        for tensor in plan.tensors:
            if tensor.action == "merge" and (not plan.has_base or tensor.method is None or not _is_linear(tensor)):
                raise RecipeError(
                    f"sampler {NAME} is for linear merges with a base and without normalize, but {tensor.name} is "
                    "merged differently",
                    "Use another sampler.",
                )

    def evaluate(self, folder: Path, plan: Plan) -> tuple[Numbers, Gradient]:
        """Evaluate a merge.

        Args:
            folder: The merged model.
            plan: Its plan.

        Returns:
            The perplexity, and the gradient of its logarithm, the mean loss, by the names of the dimensions.

        Raises:
            EvaluationError: If transformers cannot load the model, or has no parameter of a merged tensor's name.
        """
        numbers, gradients = self._evaluation.with_gradients(folder)
        found = dict.fromkeys((each.name for each in self._space.dimensions), 0.0)
        factor = self._space.tree.get(FACTOR)
        for tensor in plan.tensors:
            if tensor.action != "merge" or tensor.method is None:
                continue
            if tensor.name not in gradients:
                raise EvaluationError(
                    f"transformers has no parameter {tensor.name} of its own in this model", "Use another sampler."
                )
            slope, base = gradients[tensor.name].astype(np.float64).ravel(), None
            weighed = zip(tensor.models, tensor.method.weights, _weights_of(self._space, tensor), strict=True)
            for source, weight, dimension in weighed:
                if base is None and not source.is_delta:
                    base = load(tensor.sources[-1], False).ravel()
                difference = load(source, False).ravel() - (0 if source.is_delta else base)
                product = float(slope @ difference)
                if dimension is not None and dimension.name in found:
                    found[dimension.name] += tensor.method.factor * product
                if isinstance(factor, Dimension) and factor.name in found:
                    found[factor.name] += weight * product
        return numbers, found

    def propose(self, trials: Sequence[Trial], dimensions: Sequence[Dimension]) -> dict[str, float]:
        """The next point: Adam's steps along the gradients of all trials, from the start.

        Args:
            trials: All evaluated trials, in order.
            dimensions: The dimensions.

        Returns:
            A number for each dimension, by name.
        """
        point = {each.name: each.to_unit(each.start) for each in dimensions}
        means, squares = dict.fromkeys(point, 0.0), dict.fromkeys(point, 0.0)
        for number, trial in enumerate(trials, 1):
            for each in dimensions:
                slope = trial.gradient.get(each.name, 0.0) * (each.high - each.low)
                slope = slope if math.isfinite(slope) else 0.0
                means[each.name] += (1 - MOMENTUM) * (slope - means[each.name])
                squares[each.name] += (1 - SQUARES) * (slope**2 - squares[each.name])
                mean, square = means[each.name] / (1 - MOMENTUM**number), squares[each.name] / (1 - SQUARES**number)
                moved = point[each.name] - STEP / math.sqrt(number) * mean / (math.sqrt(square) + SMALL)
                point[each.name] = min(max(moved, 0.0), 1.0)
        return {each.name: each.from_unit(point[each.name]) for each in dimensions}


def _weights_of(space: Space, tensor: Operation) -> Sequence[Dimension | None]:
    """For each model of a tensor the dimension that is its weight; None if its weight is not searched."""
    rules = space.tree.get("rules")
    own = rules[tensor.rule] if isinstance(rules, list) and tensor.rule is not None else space.tree
    weights = own.get("weight_list", space.tree.get("weight_list")) if isinstance(own, Mapping) else None
    models = len(tensor.models)
    if not isinstance(weights, list | tuple) or len(weights) != models:
        return [None] * models
    return [each if isinstance(each, Dimension) else None for each in weights]


def _is_linear(tensor: Operation) -> bool:
    method = tensor.method
    if method is None or method.coefficients is None:
        return False
    return not dict(method.settings).get("normalize")
