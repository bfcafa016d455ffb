"""All settings of a merge, with their defaults and help texts."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from modelfuse.dtypes import OUTPUT_DTYPES
from modelfuse.recipe.method_settings import MethodSettings
from modelfuse.recipe.missing import MissingSetting
from modelfuse.recipe.schema import AbsolutePath, Bytes, Endpoint, Input, TokenizerChoice, setting
from modelfuse.recipe.tensor_rules import RuleSetting


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The given settings; a :class:`~modelfuse.recipe.recipe.Recipe` checks them.

    Attributes:
        parameters: The settings of methods.
    """

    model_path_list: tuple[Input, ...] = setting(
        MISSING, "The models to merge: folders, weight files, URLs or hub names, adapters among them."
    )
    base_model_path: Input | None = setting(
        None, "The model they were fine-tuned from: methods then act on the differences to it.", "none"
    )
    output_path: AbsolutePath | None = setting(None, "The folder to create, or its URL.", "none; merge needs it")
    mergekit: str | None = setting(None, "The text of a mergekit configuration.", "none")
    mergekit_document: str | None = setting(
        None, "The document of that text to merge, by its name.", "the one that no other document uses"
    )
    intermediate_dir: AbsolutePath | None = setting(
        None, "A folder in which results of other documents are kept.", "none: they are merged while they are read"
    )
    parameters: MethodSettings
    rules: tuple[RuleSetting, ...] = setting(
        (), "Settings of methods, or take, for tensors whose names match a glob; in a recipe file.", "none"
    )
    gram_list: tuple[AbsolutePath, ...] = setting(
        (), "regmean: Gram matrices of every model's inputs, files of `modelfuse collect` in the models' order.", "none"
    )
    seed: int = setting(0, "dare, magprune: the seed of random draws.", ge=0, le=2**63 - 1)
    device: Literal["cpu", "gpu", "low_gpu_mem"] = setting("cpu", "Where to compute.")
    tensor_type: Literal["np", "pd", "pt"] = setting("np", "The library that computes: numpy, Paddle or torch.")
    gpu_memory: Bytes = setting(256 * 10**6, "device low_gpu_mem: the most memory of the GPU to use.", ge=64 * 10**6)
    allow_cpu_fallback: bool = setting(False, "Compute on the CPU if there is no usable GPU.")
    n_process: int | None = setting(
        None, "The number of parallel workers; the output does not depend on it.", "one per processor", ge=1, le=1024
    )
    memory: Bytes = setting(10**9, "The most resident memory to use.", ge=1)
    merge_prefix: Literal["model", "master_weights"] = setting("model", "Which weights of a folder to read.")
    max_shard_size: Bytes = setting(5 * 10**9, "The largest weight file to write.", ge=1)
    output_dtype: Literal[*OUTPUT_DTYPES] | None = setting(  # type: ignore[valid-type]
        None, "The type to store.", "that of the base, else of the first model, tensor by tensor"
    )
    input_layout: tuple[Literal["hf", "paddle"], ...] | None = setting(
        None, "Linear weights of the inputs are [out, in] (hf) or [in, out] (paddle); one for all, or one "
        "per model with the base last.", "detected from shapes and config.json",
    )  # fmt: skip
    output_format: Literal["hf", "paddle", "pdparams", "lora"] | None = setting(
        None, "The output's layout: hf, paddle, or paddle in .pdparams files; lora: the difference to the base "
        "as one PEFT adapter.", "the layout of the base, else of the first model, in safetensors",
    )  # fmt: skip
    safe_serialization: bool = setting(True, "Write safetensors files; else torch's own, .bin, which are pickles.")
    convert_from_hf: bool | None = setting(
        None, "Paddle's flag: true is --input_layout hf but for .pdparams files, false is paddle.", "as input_layout"
    )
    save_to_hf: bool | None = setting(
        None, "Paddle's flag: true is --output_format hf, false is paddle, whatever the inputs are.", "as output_format"
    )
    lora_rank: int | None = setting(
        None, "output_format lora: the rank of differences that are not low-rank products.", "none", ge=1, le=2**31
    )
    lora_include: str | None = setting(
        None, "output_format lora: only modules whose names match this regular expression, and embeddings.", "all"
    )
    lora_exclude: str | None = setting(
        None, "output_format lora: no modules whose names match this regular expression.", "none"
    )
    lora_epsilon: float = setting(
        0.0, "output_format lora: drop singular values up to this; planning then reads the models.", ge=0, le=1e30
    )
    lora_embeddings: Literal["factors", "whole"] = setting(
        "factors", "output_format lora: embeddings and heads as factors, or as they are."
    )
    lora_whole: tuple[str, ...] = setting(
        (), "output_format lora: modules, by the end of their names, to save as they are.", "none"
    )
    lora_distribute_scale: bool = setting(
        True, "output_format lora: singular values half in A and half in B; else all in A."
    )
    lora_skip_whole: bool = setting(
        False, "output_format lora: leave out changed tensors that are not matrices (norms, biases)."
    )
    merge_with_qdq_base_model: bool = setting(
        False, "Quantize and dequantize the base first, as config.json in the adapter's folder says."
    )
    engine: Literal["local", "ray"] = setting("local", "Merge on this machine, or on all of a Ray cluster.")
    ray_address: str | None = setting(None, "engine ray: HOST:PORT, or local.", "as ray.init finds it")
    ray_timeout: float = setting(30.0, "engine ray: seconds to wait for the cluster.", gt=0, le=1e6)
    overwrite: bool = setting(False, "Replace an existing output.")
    on_nonfinite: Literal["error", "propagate"] = setting("error", "How NaN and infinite values are treated.")
    unmerged_from: Input | None = setting(
        None, "The model to take integer tensors from where they differ.", "none, which is an error"
    )
    hub_endpoint: Endpoint | None = setting(
        None, "The hub that names are looked up on, such as a mirror.", "HF_ENDPOINT, else huggingface.co"
    )
    hub_anonymous: bool = setting(
        False, "Send no token to the hub. A hub that only a recipe file names gets none anyway."
    )
    missing: tuple[MissingSetting, ...] = setting(
        (), "Tensors that only some models have: error, copy (the base's, else merged of those there are) or drop; "
        "or a list of PATTERN=POLICY, the first match applies.", "error",
    )  # fmt: skip
    allow_mismatch: bool = setting(
        False,
        "Merge models whose config.json files or tokenizers contradict each other in what changes the result.",
    )
    tokenizer_from: Input | None = setting(
        None, "The model to take tokenizer, chat template, special tokens and generation settings from.",
        "the base, else the first model",
    )  # fmt: skip
    model_card: bool = setting(True, "Write a model card, README.md, that says what was merged and how.")
    tokenizer: TokenizerChoice | None = setting(
        None, "The vocabulary of the output: union (of all models), base, or one of the models; rows of embeddings "
        "and heads are rearranged token by token.", "none: all models have one",
    )  # fmt: skip
    copy_tokenizer: bool = setting(True, "Copy the tokenizer's files beside the weights.")
    truncate_embeddings: bool = setting(
        False, "With a mergekit configuration: cut embeddings and heads to the smallest number of rows."
    )
    copy_file_list: tuple[str, ...] = setting(
        (), "More files to copy beside configuration, tokenizer and templates.", "none"
    )
    split_pieces: int = setting(8, "Accepted; slices are always small.", ge=1, le=2**63 - 1)
    max_tensor_mem: float = setting(0.5, "Accepted; slices are always small.", gt=0, le=1e9)
