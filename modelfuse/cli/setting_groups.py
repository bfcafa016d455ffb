"""Groups of settings for help, and settings from environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from modelfuse.errors import RecipeError
from modelfuse.recipe.checks import shown
from modelfuse.recipe.names import SETTINGS
from modelfuse.recipe.schema import InvalidValue

#: The settings by topic; "How" has all others.
GROUPS: Mapping[str, Sequence[str]] = {
    "What to merge": (
        "model_path_list", "base_model_path", "gram_list", "mergekit", "mergekit_document",
        "merge_prefix", "input_layout", "convert_from_hf",
        "merge_with_qdq_base_model", "unmerged_from", "missing", "allow_mismatch", "on_nonfinite", "hub_endpoint",
        "hub_anonymous",
    ),
    "How": (),
    "Where to": (
        "output_path", "overwrite", "output_dtype", "output_format", "save_to_hf", "safe_serialization",
        "lora_rank", "lora_epsilon", "lora_include", "lora_exclude", "lora_embeddings",
        "lora_whole", "lora_distribute_scale", "lora_skip_whole",
        "max_shard_size", "copy_file_list", "tokenizer", "tokenizer_from", "copy_tokenizer", "truncate_embeddings",
        "model_card", "intermediate_dir",
    ),
    "Machine": (
        "n_process", "memory", "device", "tensor_type", "gpu_memory", "allow_cpu_fallback", "engine", "ray_address",
        "ray_timeout",
    ),
    "Accepted for Paddle's tool; slices are always small": ("split_pieces", "max_tensor_mem"),
}  # fmt: skip
#: Settings that environment variables can give: the name in capitals after ``MODELFUSE_``.
FROM_ENVIRONMENT = (*GROUPS["Machine"], "hub_endpoint")
PREFIX = "MODELFUSE_"
#: Settings of a merge that also apply to ``diff``.
SHARED = ("n_process", "memory", "merge_prefix", "input_layout", "merge_with_qdq_base_model", "hub_endpoint",
          "hub_anonymous", "engine", "ray_address", "ray_timeout")  # fmt: skip


def groups() -> dict[str, list[str]]:
    """The names of all settings by group."""
    grouped = {name for names in GROUPS.values() for name in names}
    return {title: [*names] or [name for name in SETTINGS if name not in grouped] for title, names in GROUPS.items()}


def from_environment(names: Sequence[str] = FROM_ENVIRONMENT) -> dict[str, object]:
    """The settings that environment variables give; empty variables are ignored.

    Raises:
        RecipeError: If a value is invalid; names the variable.
    """
    given = {name: os.environ.get(f"{PREFIX}{name.upper()}", "") for name in names}
    return {name: _read(name, text) for name, text in given.items() if text}


def _read(name: str, text: str) -> object:
    try:
        return SETTINGS[name].read(text)
    except InvalidValue as error:
        raise RecipeError(
            f"The environment variable {PREFIX}{name.upper()} is {shown(text)}: {error}", "Change or unset it."
        ) from None
