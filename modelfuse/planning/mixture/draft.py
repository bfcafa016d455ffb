"""The draft of a mergekit-moe configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint, StoredTensor
from modelfuse.checkpoints.side_files import encoded_json, files_to_serve
from modelfuse.errors import CheckpointError, MismatchError, RecipeError
from modelfuse.planning.adapter_inputs import copied_base_tensors
from modelfuse.planning.arcee.models import Inputs, OpenModel
from modelfuse.planning.drafts import Draft
from modelfuse.planning.matching import find_equal_pairs
from modelfuse.planning.mixture.config_json import Sizes, config_of_mixture
from modelfuse.planning.mixture.gates import Gates
from modelfuse.planning.mixture.kinds import KINDS, mixture_kind
from modelfuse.planning.mixture.operations import MixtureBuilder
from modelfuse.planning.operations import Operation
from modelfuse.planning.output_format import OutputFormat
from modelfuse.recipe.arcee.mixture import HIDDEN, RANDOM, Mixture
from modelfuse.recipe.arcee.references import Reference
from modelfuse.recipe.recipe import Recipe

#: The file in the output with the configuration as given.
CONFIGURATION_FILE = "mergekit_moe_config.yml"
#: The reason for tensors that are not used.
NOT_TAKEN = "the mixture uses the attention of its base and the MLPs of its experts"


def draft_of_mixture(recipe: Recipe, mixture: Mixture) -> Draft:
    """Open the models, headers only, and plan every tensor.

    Raises:
        CheckpointError: If an input is missing or malformed.
        MismatchError: If the models do not fit together; all differences are listed.
        RecipeError: If the configuration is invalid for the base.
    """
    if recipe.output_layout == "paddle":
        raise RecipeError("moe writes models in Hugging Face's layout, not in Paddle's", "Leave output_format out.")
    recipe = recipe.changed(output_format="hf", mergekit=recipe.mergekit)
    inputs = Inputs(recipe)
    models = inputs.models_of(mixture)
    base = models[mixture.base_model]
    config = _config_of(base)
    kind = mixture_kind(mixture, config.get("model_type"))
    _check_activations(models, config)
    builder = MixtureBuilder(recipe, mixture, kind, models, Gates(recipe, mixture, base, _embedding(base)))
    operations = builder.build()
    form = OutputFormat.of(recipe, base.checkpoint)
    sizes = Sizes(len(mixture.experts), mixture.per_token, builder.expert_size, builder.shared_size)
    if sizes.shared is not None and not kind.shared_gate and sizes.shared % sizes.inner:
        raise MismatchError(
            f"The shared expert has the intermediate size {sizes.shared:,}, which is not a multiple of the experts' "
            f"{sizes.inner:,}",
            "Give a shared expert of the experts' size.",
        )
    content, notes = config_of_mixture(config, kind, sizes)
    encoded = json.dumps(content).encode()
    content = json.loads(form.config(encoded, _dtype_of(operations), base.checkpoint.dequantized, {}))
    copied = [each for each in files_to_serve(recipe, base.checkpoint) if each.name != CONFIG_FILE]
    made = {CONFIG_FILE: encoded_json(content), CONFIGURATION_FILE: (recipe.mergekit or "").encode()}
    reported = tuple(_with_left_out(inputs.checkpoints, models, operations))
    pairs = (*find_equal_pairs([base.checkpoint], tuple(builder.tied)), *copied_base_tensors(reported))
    return Draft(
        reported, operations, tuple(builder.tied), pairs, form, tuple(copied), made,
        (*mixture.notes, *notes, *_notes(mixture, kind.name)),
    )  # fmt: skip


def _config_of(base: OpenModel) -> Mapping[str, object]:
    config, known = base.checkpoint.config, dict.fromkeys(each for kind in KINDS for each in kind.bases)
    if not config:
        raise CheckpointError(
            f"{base.checkpoint.path} has no {CONFIG_FILE}, which is needed to find its layers",
            "Put the config.json of the model beside its weights.",
        )
    if config.get("model_type") not in known:
        raise MismatchError(
            f"{base.reference} has the model_type {config.get('model_type')}, which a mixture cannot be made of",
            f"Give a base with the model_type {', '.join(known)}.",
        )
    return config


def _check_activations(models: Mapping[Reference, OpenModel], config: Mapping[str, object]) -> None:
    wanted = config.get("hidden_act", "silu")
    for model in models.values():
        own = model.checkpoint.config.get("hidden_act", "silu")
        if own != wanted:
            raise MismatchError(
                f"{model.reference} has the activation {own}, but the base has {wanted}",
                "Give models with the same hidden_act.",
            )


def _embedding(base: OpenModel) -> StoredTensor:
    name = base.embedding
    found = None if name is None else base.checkpoint[name]
    if found is None or len(found.shape) != 2:
        raise MismatchError(f"{base.reference} has no token embedding", "Give a language model as the base.")
    return found


def _dtype_of(operations: list[Operation]) -> str | None:
    """The dtype for config.json: that of all tensors; None if they differ."""
    found = {operation.dtype for operation in operations}
    return str(next(iter(found))) if len(found) == 1 else None


def _with_left_out(
    inputs: tuple[Checkpoint, ...], models: Mapping[Reference, OpenModel], operations: list[Operation]
) -> Iterator[Checkpoint]:
    """The inputs with unused tensors marked as left out."""
    used = dict[int, set[str]]()
    for operation in operations:
        for number, source in zip(operation.inputs, operation.sources, strict=True):
            used.setdefault(number, set()).add(source.name)
    changed = {model.number for model in models.values() if model.adapter is not None}
    for number, checkpoint in enumerate(inputs):
        left = set() if number in changed else set(checkpoint) - used.get(number, set())
        kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in left}
        reasons = {name: NOT_TAKEN for name in checkpoint if name in left}
        yield replace(checkpoint, tensors=kept, left_out={**checkpoint.left_out, **reasons}) if left else checkpoint


def _notes(mixture: Mixture, kind: str) -> Iterator[str]:
    yield f"The output is a {kind} model with {len(mixture.experts)} experts, {mixture.per_token} per token."
    if mixture.gate_mode in RANDOM:
        yield f"gate_mode {mixture.gate_mode}: the router is random, so the output must be trained before use."
    if mixture.gate_mode in HIDDEN:
        yield f"gate_mode {mixture.gate_mode} loads the whole base into memory, in bfloat16, and runs it once."
