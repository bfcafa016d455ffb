"""What a merge kept: ``modelfuse report``, and the page of ``modelfuse merge --html``.

The output is one more model of a ``diff`` of the inputs; how its difference meets theirs tells what became of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from modelfuse.checkpoints import read_json
from modelfuse.checkpoints.adapters import Adapter
from modelfuse.checkpoints.made_files import REPORT_NAME
from modelfuse.inspection.diff import Progress, carry_out, result_of
from modelfuse.inspection.diff_advice import advice_after
from modelfuse.inspection.diff_measures import Advice
from modelfuse.inspection.diff_names import short_names
from modelfuse.inspection.diff_result import Diff
from modelfuse.inspection.merge_outcome import Outcome, outcome_of, outcomes_of
from modelfuse.inspection.outcome_sentences import sentences_of
from modelfuse.inspection.sampled_sums import Sample, measure_sample
from modelfuse.planning.diff_plan import DiffPlan, make_diff_plan
from modelfuse.planning.tables import html
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl

#: Gives what shows how far it is with what was planned.
ShownBy = Callable[[DiffPlan], AbstractContextManager[Progress]]
#: Settings of a recipe that are not about what is merged.
MACHINE = frozenset((
    "output_path", "overwrite", "device", "tensor_type", "gpu_memory", "allow_cpu_fallback", "n_process", "memory",
    "max_shard_size", "engine", "ray_address", "ray_timeout", "hub_endpoint", "hub_anonymous", "intermediate_dir",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class SuspiciousModel:
    """What stood out in a model when it was merged.

    Attributes:
        model: The model.
        equal: Tensors that are the base's.
        far: Tensors that are far from the base's.
    """

    model: str
    equal: tuple[str, ...]
    far: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport:
    """What a merge kept of its inputs.

    Attributes:
        output: The output, as it was named.
        base: What differences are taken to: the base or, where there is none, the first model.
        base_given: Whether the merge had a base.
        models: The models in order; without a base, those behind the first.
        settings: What was asked for, by name.
        whole: All tensors together.
        layers: Layer by layer.
        modules: By kind of module.
        cells: By layer and kind of module.
        tensors: Tensor by tensor.
        suspicious: Models with tensors that stood out.
        findings: What matters, in sentences.
        advice: Settings that are worth trying on the same inputs, without those of this merge.
        sample: Which part of the elements was read, and the error that this causes; None: all were.
        diff: How the models and, as the last one, the output differ from the base.
        seconds: Wall time.
    """

    output: str
    base: str
    base_given: bool
    models: tuple[str, ...]
    settings: Mapping[str, object]
    whole: Outcome
    layers: tuple[Outcome, ...]
    modules: tuple[Outcome, ...]
    cells: tuple[Outcome, ...]
    tensors: tuple[Outcome, ...]
    suspicious: tuple[SuspiciousModel, ...]
    findings: tuple[str, ...]
    advice: tuple[Advice, ...]
    sample: Sample | None
    diff: Diff
    seconds: float

    def _repr_html_(self) -> str:
        """The numbers of each model, for a notebook."""
        rows = [(name, *map(_told, (each.projection, each.coefficient, each.dropped, each.reversed)))
                for name, each in zip(short_names(self.models), self.whole.models, strict=True)]  # fmt: skip
        titles = ("model", "in output", "own part", "dropped", "reversed")
        return html(self.output, (titles, rows), notes=self.findings)

    def __repr__(self) -> str:
        parts = [
            f"{'–' if each.projection is None else format(each.projection, '.2f')} of {name}"
            for name, each in zip(short_names(self.models), self.whole.models, strict=True)
        ]
        return f"<MergeReport: {', '.join(parts)}; {self.output}>"


def compare_output(
    recipe: Recipe,
    folder: PathOrUrl,
    *,
    exact: bool = False,
    sample: bool = False,
    shown: ShownBy = lambda _: nullcontext(lambda *_: None),
) -> MergeReport:
    """Compare an output with the inputs of its recipe, which are at hand.

    Args:
        recipe: What was merged.
        folder: The output.
        exact: Whether interference is to be computed exactly.
        sample: Whether to read a sample only, which takes a small part of the time.
        shown: Gives what shows how far it is, once it is planned.
    """
    started = time.perf_counter()
    inputs, has_base = recipe.inputs, recipe.has_base or _names_base(recipe)
    base, models = (inputs[-1], inputs[:-1]) if recipe.has_base else (inputs[0], inputs[1:])
    layout = recipe.input_layout if recipe.output_format is None and len(recipe.input_layout or ()) == 1 else None
    compared = Recipe.parse({
        "model_path_list": [*models, folder], "base_model_path": base, "input_layout": layout,
        "n_process": recipe.n_process, "memory": recipe.memory, "merge_prefix": recipe.merge_prefix,
        "on_nonfinite": "propagate",
    })  # fmt: skip
    plan = make_diff_plan(compared, exact)
    sampled = None
    if sample:
        sums, sampled = measure_sample(plan)
        diff = result_of(plan, sums, has_base, sampled.bytes_read, started)
    else:
        with shown(plan) as advance:
            diff = carry_out(plan, has_base, advance)
    outcomes = {name: outcomes_of(getattr(diff, name)) for name in ("layers", "modules", "cells", "tensors")}
    whole = outcome_of(diff.whole)
    names = tuple(map(str, models))
    suspicious = tuple(_suspicious(folder))
    findings = sentences_of(short_names((*names, str(folder))), whole, outcomes["modules"], outcomes["layers"], diff)
    settings = {name: value for name, value in recipe.effective().items()
                if name not in MACHINE and value not in (None, [], False)}  # fmt: skip
    adapters = any(isinstance(model, Adapter) for model in plan.models)
    advice = advice_after(diff, settings, adapters)
    return MergeReport(
        str(folder), str(base), has_base, names, settings, whole, outcomes["layers"], outcomes["modules"],
        outcomes["cells"], outcomes["tensors"], suspicious, tuple(findings), advice, sampled, diff,
        time.perf_counter() - started,
    )  # fmt: skip


def _names_base(recipe: Recipe) -> bool:
    """Whether a configuration of mergekit's has a base, which is the first input then."""
    if recipe.mergekit is None or recipe.configurations.mixture is not None:
        return False
    return recipe.configuration.base_model is not None


def _told(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _suspicious(folder: PathOrUrl) -> Iterator[SuspiciousModel]:
    listed = read_json(folder / REPORT_NAME).get("suspicious")
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, Mapping):
            yield SuspiciousModel(str(each.get("model")), _names(each, "equal_to_base"), _names(each, "far_from_base"))


def _names(entry: Mapping[str, object], key: str) -> tuple[str, ...]:
    found = entry.get(key)
    return tuple(map(str, found)) if isinstance(found, Sequence | Mapping) and not isinstance(found, str) else ()
