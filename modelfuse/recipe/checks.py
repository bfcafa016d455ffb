"""Checks of settings against each other, and the wording of errors about settings."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from modelfuse.errors import RecipeError
from modelfuse.methods.registry import MERGE_METHODS
from modelfuse.methods.spec import Combination, Step
from modelfuse.printable import PrintableText

#: Limits of an error: characters of a value that are shown, and settings that are listed.
MOST_CHARACTERS = 500
MOST_LINES = 20
#: Numbers in words.
WORDS = {1: "one", 2: "two", 3: "three"}
HELP = "`modelfuse merge --help` lists every setting."
#: Hints for names of settings in other tools.
ELSEWHERE = {
    **dict.fromkeys(("p", "keep"), "The share of elements to keep is reserve_p."),
    **dict.fromkeys(("weight", "weights", "scale"), "Weights are a list, one per model: weight_list."),
    **dict.fromkeys(("models", "model", "model_paths"), "The models are model_path_list."),
    **dict.fromkeys(("base", "base_model"), "The base is base_model_path."),
    **dict.fromkeys(("out", "output", "out_path", "output_dir"), "The folder to create is output_path."),
    **dict.fromkeys(("method", "type"), "The method is merge_method."),
    **dict.fromkeys(("dtype", "out_dtype", "torch_dtype"), "The type to store is output_dtype."),
    **dict.fromkeys(("alpha", "ratio"), "slerp goes from the first model to the second by slerp_alpha."),
    **dict.fromkeys(("dry_run", "plan", "no_write"), "`modelfuse check` shows the plan and writes nothing."),
    **dict.fromkeys(("cuda", "gpu"), "Give --device gpu with --tensor_type pt or pd."),
    **dict.fromkeys(("workers", "num_workers", "threads", "jobs"), "Parallel workers are n_process."),
    **dict.fromkeys(("force", "exist_ok"), "An output is replaced with overwrite."),
    **dict.fromkeys(("shard_size", "out_shard_size"), "The largest weight file is max_shard_size."),
}


#: The most models of a merge.
MOST_MODELS = 1000


def listed(problems: Sequence[str]) -> str:
    """Problems of single settings, one per line."""
    if len(problems) > MOST_LINES:
        problems = [*problems[:MOST_LINES], f"and {len(problems) - MOST_LINES} more"]
    return PrintableText.of(problems)


def shown(value: object) -> str:
    """A value as it was given, shortened to fit a line."""
    try:
        text = repr(value)
    except Exception:  # A class may raise anything in its repr.
        return "a number of too many digits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def closest(word: str, known: Iterable[str]) -> str:
    """A "Did you mean" question for a misspelled word; empty if no known word is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f"Did you mean {close[0]!r}? " if close else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint for an unknown setting."""
    if word in ELSEWHERE:
        return ELSEWHERE[word]
    return closest(word, known).strip() or HELP


def is_path(text: str) -> bool:
    """Whether this is a valid file name for the system; lone surrogates, which JSON allows, are not."""
    try:
        return bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def is_inside(name: str) -> bool:
    """Whether a relative name stays within its folder."""
    return is_path(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def check_configured(others: Sequence[str], output_format: str | None) -> None:
    """Refuse settings that a mergekit configuration contains itself."""
    if others:
        raise RecipeError(
            f"{' and '.join(others)} cannot stand beside a configuration of mergekit's", "Say it in the configuration."
        )
    if output_format == "lora":
        raise RecipeError(
            "output_format lora cannot stand beside a configuration of mergekit's",
            "Merge first, then extract the adapter with model_path_list and base_model_path.",
        )


def check_models(models: int, has_base: bool) -> None:
    """Check the number of models; it is limited, as their files stay open."""
    if models > MOST_MODELS:
        raise RecipeError(f"model_path_list names {models:,} models; a merge takes at most {MOST_MODELS:,}")
    if models < 2 - has_base:
        raise RecipeError(
            f"model_path_list names {models} model; a merge needs at least two, or one and a base",
            "Give two or more paths after --model_path_list, or a --base_model_path.",
        )


def check_device(tensor_type: str, device: str) -> None:
    """Check tensor_type against the device."""
    if tensor_type == "np" and device != "cpu":
        raise RecipeError(
            f"tensor_type np computes on the CPU, so device {device} cannot be used",
            "Use --device cpu, or --tensor_type pt or pd for a GPU.",
        )


def check_engine(engine: str, ray_address: str | None, tensor_type: str) -> None:
    """Check the settings of a Ray cluster."""
    if engine != "ray":
        if ray_address is not None:
            raise RecipeError(f"ray_address is {ray_address}, but engine is {engine}", "Add --engine ray.")
        return
    if tensor_type != "np":
        raise RecipeError(
            f"engine ray runs numpy kernels on the CPUs of its nodes; tensor_type {tensor_type} cannot be used",
            "Use --tensor_type np: the same bytes, as fast as the disks.",
        )
    if ray_address is not None and ray_address != "local" and not re.fullmatch(r"[^\s/]+:\d{1,5}", ray_address):
        raise RecipeError(
            f"ray_address is {ray_address!r}, which is not HOST:PORT",
            "Give the address that `ray start --head` has shown, on a machine of the cluster. ray:// cannot be used.",
        )


def check_method(merge_method: str | None, merge_type: str | None, sparsify_type: str | None) -> None:
    """Check merge_method against merge_type and sparsify_type."""
    if merge_method is None:
        return
    steps = MERGE_METHODS[merge_method]
    for name, given, implied in zip(("sparsify_type", "merge_type"), (sparsify_type, merge_type), steps, strict=True):
        if given is not None and given != implied:
            raise RecipeError(
                f"merge_method {merge_method} means {name} {implied or 'none'}, but {given} is given",
                "Leave merge_method out to combine merge_type and sparsify_type freely.",
            )


def check_models_of(name: str, combination: Combination, needs_base: bool, models: int, has_base: bool) -> None:
    """Check the number of models and the base against the method."""
    least, most = combination.models
    if models < least or (most is not None and models > most):
        number = f"exactly {WORDS.get(least, least)}" if least == most else f"at least {WORDS.get(least, least)}"
        given = f"{models} {'is' if models == 1 else 'are'} given"
        raise RecipeError(f"{name} merges {number} models, {given}", "Use linear or ties for any number.")
    if needs_base and not has_base:
        raise RecipeError(
            f"{name} acts on differences to a base, but base_model_path is not given",
            "Name the model that they were fine-tuned from.",
        )
    if combination.base == "none" and has_base:
        raise RecipeError(f"{name} takes no base, but base_model_path is given", "Leave it out, or name it as a model.")


def check_weights(
    combination: Combination, models: int, weights: Sequence[float] | None, normalize: bool | None
) -> None:
    """Check the weights against the models and the method."""
    if weights is None:
        return
    if combination.weights == "none":
        ways = [f"Use --{each.name}: {each.description.partition(': ')[2]}" for each in combination.parameters[:1]]
        raise RecipeError(f"{combination.name} takes no weight_list", *(ways or ["It finds its weights itself."]))
    if len(weights) != models:
        raise RecipeError(f"weight_list has {len(weights)} weights for {models} models", "Give one weight a model.")
    total = math.fsum(weights)
    if normalize and abs(total) < 1e-8:
        raise RecipeError("weight_list sums to zero, so it cannot be normalized", "Use --no_normalize.")
    if normalize and total < 0:
        # Division by a negative sum flips the sign of each weight, and so of votes for signs.
        raise RecipeError(
            f"weight_list sums to {total:g}: normalized, each weight would change its sign",
            "Use --no_normalize, or the opposite weights.",
        )


def check_step(step: Step, settings: object) -> None:
    """Run the checks of a method's declaration."""
    try:
        step.check(settings)
    except ValueError as error:
        raise RecipeError(*map(str, error.args)) from None


def check_input_layout(inputs: int, layouts: Sequence[str] | None, convert_from_hf: bool | None) -> None:
    """Check the number of input layouts, and Paddle's flag against them."""
    if layouts is None:
        return
    if len(layouts) not in (1, inputs):
        raise RecipeError(
            f"input_layout has {len(layouts)} values for {inputs} inputs",
            "Give one for all, or one per model with the base last.",
        )
    if convert_from_hf is not None and ("paddle" if convert_from_hf else "hf") in layouts:
        raise RecipeError(
            f"convert_from_hf is {str(convert_from_hf).lower()}, but input_layout is {' '.join(layouts)}",
            "Leave convert_from_hf out.",
        )


def check_output_format(
    output_format: str | None, layout: str | None, save_to_hf: bool | None, safe_serialization: bool
) -> None:
    """Refuse a format whose layout is not the one that Paddle's flag means, and Paddle's layout in torch's files."""
    if not safe_serialization and (layout == "paddle" or save_to_hf is False):
        raise RecipeError(
            "safe_serialization is false, which writes torch's .bin files, but the layout is Paddle's",
            "Leave output_format and save_to_hf out, or safe_serialization.",
        )
    if layout is not None and save_to_hf is not None and save_to_hf != (layout == "hf"):
        raise RecipeError(
            f"save_to_hf is {str(save_to_hf).lower()}, but output_format is {output_format}", "Leave save_to_hf out."
        )


def check_grams(files: int, models: int, takers: Sequence[str]) -> None:
    """Refuse Gram matrices that are not one file a model, missing, or for nothing.

    Args:
        files: How many there are.
        models: How many models there are.
        takers: The methods that take some.
    """
    if takers and not files:
        raise RecipeError(
            f"{takers[0]} takes Gram matrices of the models' inputs, but gram_list is not given",
            "Have `modelfuse collect MODEL --data texts.jsonl --output grams.safetensors` make a file of each model.",
        )
    if files and not takers:
        raise RecipeError("gram_list is given, but no method takes Gram matrices", "Use --merge_method regmean.")
    if takers and files != models:
        raise RecipeError(f"gram_list names {files} files for {models} models", "Give one per model, in their order.")


def check_adapter_output(output_format: str | None, has_base: bool, given: Sequence[str]) -> None:
    """Check the settings of adapter outputs."""
    if output_format == "lora" and not has_base:
        raise RecipeError(
            "output_format lora saves differences to a base, but base_model_path is not given",
            "Name the model that the adapter is to be used with.",
        )
    if given and output_format != "lora":
        raise RecipeError(f"{given[0]} is given, but output_format is not lora", "Add --output_format lora.")


def check_tokenizer(
    tokenizer: object, tokenizer_from: object, inputs: Sequence[object], output_format: str | None
) -> None:
    """Check the tokenizer setting against the models and other settings."""
    if tokenizer is None:
        return
    if output_format == "lora":
        raise RecipeError("tokenizer rearranges rows, but an adapter has none of its own", "Leave tokenizer out.")
    if not isinstance(tokenizer, str) and tokenizer not in inputs:
        raise RecipeError(f"tokenizer is {tokenizer}, which is none of the models", "Give union, base or one of them.")
    if tokenizer_from not in (None, tokenizer):
        raise RecipeError(
            f"tokenizer is {tokenizer}, but tokenizer_from is {tokenizer_from}", "Leave tokenizer_from out."
        )


def check_copied(names: Iterable[str]) -> None:
    """Check that the files to copy are inside the model's folder."""
    for name in names:
        if not is_inside(name):
            raise RecipeError(f"copy_file_list names {name!r}, which is not inside the model's folder")
