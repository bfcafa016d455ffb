"""Commands and code to print after a merge: how to load the output, and how to verify it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping

from modelfuse.checkpoints.single_files import loader_of
from modelfuse.planning.plan import Plan

#: Suffixes of the classes of models that generate text.
WRITES_TEXT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
#: Model types with such a class that are not language models, or that vLLM does not serve.
OTHERS = ("whisper", "speecht5", "speech_to_text", "bark", "musicgen", "pix2struct", "trocr", "vision-encoder-decoder",
          "t5", "mt5", "bart", "mbart", "pegasus", "marian", "blip", "blip-2")  # fmt: skip


def next_steps(plan: Plan) -> Iterator[str]:
    """Code or a command that loads the output, if its kind is known, and the command that verifies it."""
    folder, config = str(plan.recipe.output_path), plan.reference.config
    names = {file.name for file in plan.side_files}
    if plan.recipe.output_format == "lora":
        base = shlex.quote(str(plan.reference.path))
        yield f"vllm serve {base} --enable-lora --lora-modules merged={shlex.quote(folder)}"
    elif "config.json" in names:
        yield _loads(folder, config, names, plan.format.layout)
    elif plan.format.whole and (loader := loader_of(plan.reference)) is not None:
        yield f"{loader}.from_single_file({f'{folder}/{plan.files[0].name}'!r})  # of diffusers"
    yield f"modelfuse verify {shlex.quote(folder)}"


def _loads(folder: str, config: Mapping[str, object], names: Collection[str], layout: str | None) -> str:
    if layout == "paddle":
        return f'from_pretrained({folder!r}, load_checkpoint_format="", convert_from_hf=False)  # of PaddleFormers'
    if "modules.json" in names:
        return f"SentenceTransformer({folder!r})"
    part = config.get("_class_name")
    if isinstance(part, str) and part.isidentifier():
        return f"{part}.from_pretrained({folder!r})  # of diffusers"
    architecture = _architecture(config)
    if architecture is None or (architecture.endswith(WRITES_TEXT) and config.get("model_type") not in OTHERS):
        return f"vllm serve {shlex.quote(folder)}"
    return f"{architecture}.from_pretrained({folder!r})  # of transformers"


def _architecture(config: Mapping[str, object]) -> str | None:
    """The first class in config.json's ``architectures``."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and first.isidentifier() else None
