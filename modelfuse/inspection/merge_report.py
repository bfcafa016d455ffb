"""Report how much of each model is in the output of a merge.

The output is compared with the inputs as a further model of ``diff``; the report follows from their dot products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from msgspec import Struct

from modelfuse.checkpoints import read_json
from modelfuse.checkpoints.adapters import Adapter
from modelfuse.checkpoints.made_files import REPORT_NAME
from modelfuse.inspection.diff import Progress, carry_out, result_of
from modelfuse.inspection.diff_advice import advice_after
from modelfuse.inspection.diff_measures import Suggestion
from modelfuse.inspection.diff_names import short_names
from modelfuse.inspection.diff_result import Diff
from modelfuse.inspection.merge_outcome import MergeOutcome, outcome_of, outcomes_of
from modelfuse.inspection.outcome_sentences import sentences_of
from modelfuse.inspection.sampled_sums import Sample, measure_sample
from modelfuse.planning.diff_plan import DiffPlan, make_diff_plan
from modelfuse.planning.tables import html
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl

#: Starts the display of progress of a plan.
ShownBy = Callable[[DiffPlan], AbstractContextManager[Progress]]
#: Settings that do not change what is merged.
MACHINE = frozenset((
    "output_path", "overwrite", "device", "tensor_type", "gpu_memory", "allow_cpu_fallback", "n_process", "memory",
    "max_shard_size", "engine", "ray_address", "ray_timeout", "hub_endpoint", "hub_anonymous", "intermediate_dir",
))  # fmt: skip


class SuspiciousModel(Struct, frozen=True):
    """The suspicious tensors of a model, as the merge reported them.

    Attributes:
        model: The model.
        equal: Tensors that equal the base's.
        far: Tensors that are far from the base's.
    """

    model: str
    equal: tuple[str, ...]
    far: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport:
    """How much of its inputs is in the output of a merge.

    Attributes:
        output: The output, as it was given.
        base: The model that differences are taken to: the base or, without one, the first model.
        base_given: Whether the merge had a base.
        models: The models in order; without a base, all but the first.
        settings: The settings of the merge, by name.
        whole: All tensors together.
        layers: Each layer.
        modules: Each kind of module, over all layers.
        cells: Each kind of module in each layer.
        tensors: Each tensor.
        suspicious: Models with suspicious tensors.
        findings: A summary in sentences.
        advice: Settings that are worth trying on the same inputs, without those of this merge.
        sample: The sample that was measured, and its error; None: all elements were.
        diff: The comparison of the models and, as the last one, the output with the base.
        seconds: Wall time.
    """

    output: str
    base: str
    base_given: bool
    models: tuple[str, ...]
    settings: Mapping[str, object]
    whole: MergeOutcome
    layers: tuple[MergeOutcome, ...]
    modules: tuple[MergeOutcome, ...]
    cells: tuple[MergeOutcome, ...]
    tensors: tuple[MergeOutcome, ...]
    suspicious: tuple[SuspiciousModel, ...]
    findings: tuple[str, ...]
    advice: tuple[Suggestion, ...]
    sample: Sample | None
    diff: Diff
    seconds: float

    def _repr_html_(self) -> str:
        """The measures of each model, for a notebook."""
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
    """Compare an output with the inputs of its recipe.

    Args:
        recipe: The recipe; its inputs are local or in stores, not names on a hub.
        folder: The output.
        exact: Whether interference is computed without sketches.
        sample: Whether to measure a sample only, which takes a small part of the time.
        shown: Starts the display of progress.
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
        outcomes["cells"], outcomes["tensors"], suspicious, (*_moved(recipe), *findings), advice, sampled, diff,
        time.perf_counter() - started,
    )  # fmt: skip


def _moved(recipe: Recipe) -> Iterator[str]:
    """A warning for configurations that move layers."""
    if recipe.mergekit is not None and (recipe.configurations.mixture is not None or _moves_layers(recipe)):
        yield (
            "Tensors are compared by their names in the output: layers that the configuration moves are compared with "
            "layers that they were not made of."
        )


def _moves_layers(recipe: Recipe) -> bool:
    for module in recipe.configuration.modules.values():
        position = 0
        for each in module.slices:
            ranges = [source.layers for source in each.sources if source.layers is not None]
            if any(first != position for first, _ in ranges):
                return True
            position += max((end - first for first, end in ranges), default=0)
    return False


def _names_base(recipe: Recipe) -> bool:
    """Whether a mergekit configuration has a base, which is then the first input."""
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
