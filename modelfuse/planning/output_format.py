"""The output's format: names and frames of the weight files, and the changes in config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.formats.safetensors import frame_safetensors
from modelfuse.checkpoints.layouts.tables import WORDS
from modelfuse.checkpoints.quantization import DECLARATIONS
from modelfuse.checkpoints.single_files import loader_of
from modelfuse.checkpoints.tensors import Frame
from modelfuse.checkpoints.weight_files import index_of
from modelfuse.dtypes import DType
from modelfuse.errors import RecipeError
from modelfuse.recipe.recipe import Recipe

DTYPE_KEYS = ("dtype", "torch_dtype")
#: The file name that PEFT expects; it reads no shards.
ADAPTER_STEM = "adapter_model"
#: Names of a weight file in Paddle's own format, by ``merge_prefix``.
PADDLE_STEMS = {"model": "model_state", "master_weights": "master_weights"}
#: Names of a weight file in torch's format.
TORCH_STEMS = {"model": "pytorch_model", "master_weights": "master_weights"}


class OutputFormat(Struct, frozen=True):
    """How the output is stored.

    Attributes:
        layout: ``hf`` or ``paddle``; None if it cannot be detected, and tensors are not converted.
        stem: The prefix of the weight files' names.
        suffix: ``.safetensors``, ``.bin`` or ``.pdparams``.
        metadata: The ``__metadata__`` of safetensors files.
        changes: Whether the layout differs from the reference's.
        whole: Whether there is one weight file, whatever its size.
    """

    layout: str | None
    stem: str
    suffix: str
    metadata: Mapping[str, str]
    changes: bool
    whole: bool = False

    @classmethod
    def of(cls, recipe: Recipe, reference: Checkpoint) -> OutputFormat:
        """The format from the recipe, with the reference's for settings that are not given.

        Raises:
            RecipeError: If .bin files are asked for a model in Paddle's layout.
        """
        layout = recipe.output_layout or reference.layout
        changes = layout != reference.layout
        if recipe.output_format == "lora":
            suffix, metadata = (".safetensors", {"format": "pt"}) if recipe.safe_serialization else (".bin", {})
            return cls(layout, ADAPTER_STEM, suffix, metadata, changes, whole=True)
        if recipe.output_format == "pdparams":
            return cls(layout, PADDLE_STEMS[recipe.merge_prefix], ".pdparams", {}, changes)
        # Loaders of single-file models, which have no config.json, read no shards.
        single = not reference.config and loader_of(reference) is not None
        if not recipe.safe_serialization:
            if layout == "paddle":
                raise RecipeError(
                    f"{reference.path} is in Paddle's layout, which cannot be stored in torch's .bin files",
                    "Add --output_format hf.",
                )
            return cls(layout, reference.stem or TORCH_STEMS[recipe.merge_prefix], ".bin", {}, changes, single)
        # transformers checks for "pt", Paddle for "np".
        known = {"format": {"hf": "pt", "paddle": "np"}[layout]} if layout is not None else {}
        stem = reference.stem or recipe.merge_prefix
        return cls(layout, stem, ".safetensors", {"format": "pt", **reference.metadata, **known}, changes, single)

    @property
    def index(self) -> str:
        """The name of the index file for several weight files."""
        return index_of(f"{self.stem}{self.suffix}")

    def notes(self, models: Sequence[Checkpoint]) -> tuple[str, ...]:
        """Notes on inputs whose layout is converted."""
        return tuple(
            f"{model.path} is in {WORDS[model.layout]}: its weights are transposed."
            for model in models
            if model.layout is not None and model.layout != self.layout
        )

    def frame(self, tensors: Sequence[tuple[str, DType, Sequence[int]]]) -> Frame:
        """Lay out one weight file of these tensors."""
        if self.suffix == ".safetensors":
            return frame_safetensors(tensors, self.metadata)
        if self.suffix == ".bin":
            from modelfuse.checkpoints.formats.torch_writer import frame_torch

            return frame_torch(tensors)
        from modelfuse.checkpoints.formats.paddle_writer import frame_paddle

        return frame_paddle(tensors)

    def config(self, content: bytes, dtype: str | None, dequantized: bool, changes: Mapping[str, object]) -> bytes:
        """The reference's config.json with the output's layout and dtype.

        Args:
            content: The reference's config.json.
            dtype: The output's dtype; None to keep what the file says.
            dequantized: Whether to remove the declaration of quantization.
            changes: Settings to set at the top level, and in ``text_config`` if it has them.
        """
        config: dict[str, Any] = json.loads(content)
        before = json.dumps(config)
        if self.layout == "paddle":
            config["source"] = "paddle"
        elif self.layout == "hf" and config.get("source") == "paddle":
            del config["source"]
        for key, value in changes.items():
            text = config.get("text_config")
            for part in (config, *([text] if isinstance(text, dict) and key in text else [])):
                part[key] = value
        for part in _parts(config):
            said = [key for key in DTYPE_KEYS if isinstance(part.get(key), str)]
            # Loaders convert the weights to this dtype. PaddleFormers and transformers read different keys.
            keys = DTYPE_KEYS if self.changes else said
            part.update((key, dtype or part[said[0]]) for key in keys if said)
            for key in DECLARATIONS if dequantized else ():
                part.pop(key, None)
        if json.dumps(config) == before:
            return content
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and all nested configurations."""
    pending = [config]
    while pending:
        part = pending.pop()
        yield part
        pending.extend(value for value in part.values() if isinstance(value, dict))
