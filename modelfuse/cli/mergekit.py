"""Translate the command lines of arcee's mergekit to that of ``modelfuse merge``."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from modelfuse.cli.arguments import OPTIONS, Parser
from modelfuse.errors import RecipeError
from modelfuse.recipe.checks import shown

#: Options without effect, and the reason.
_WITHOUT_EFFECT = {
    "allow_crimes": "tensors are matched by their names, whatever the architectures",
    "lora_merge_cache": "adapters are applied while they are read",
    "lora_merge_dtype": "adapters are applied in float32",
    "low_cpu_memory": "--memory limits the memory",
    "read_to_gpu": "tensors are read slice by slice",
    "multi_gpu": "one GPU is used",
    "clone_tensors": "no tensors are kept in memory",
    "async_write": "workers write in parallel",
    "write_threads": "workers write in parallel",
    "lazy_unpickle": "pickles are always read tensor by tensor",
    "trust_remote_code": "no code from a model is run",
    "lazy": "intermediate results are always computed again",
    "load_in_4bit": "the base is run in bfloat16",
    "load_in_8bit": "the base is run in bfloat16",
}
#: Switches, which have a ``--no-`` form each.
_SWITCHES = ("allow_crimes", "unsafe_truncate_embeddings", "copy_tokenizer", "write_model_card", "safe_serialization",
             "cuda", "gpu_rich", "low_cpu_memory", "read_to_gpu", "multi_gpu", "clone_tensors", "async_write",
             "lazy_unpickle", "trust_remote_code", "lazy")  # fmt: skip
_VALUES = ("lora_merge_cache", "lora_merge_dtype", "write_threads")
_SHARD = re.compile(r"(-?\d+(?:\.\d+)?)\s*([KMB]?)", re.IGNORECASE)
#: Units of sizes in mergekit.
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
#: A size that no file exceeds.
NO_LIMIT = 2**63 - 1


class Translation(NamedTuple):
    """A command line of ``modelfuse merge``.

    Attributes:
        argv: The arguments after the command.
        notes: Notes on options without effect.
    """

    argv: list[str]
    notes: list[str]


def translated(command: str, argv: Sequence[str]) -> Translation:
    """Translate the arguments of ``mergekit-yaml`` and similar commands.

    >>> translated("mergekit-yaml", ["c.yml", "out", "--out-shard-size", "2B", "--random-seed", "3"]).argv
    ['c.yml', '--output_path', 'out', '--seed', '3', '--max_shard_size', '2000000000']

    Args:
        command: ``mergekit-yaml``, ``mergekit-multi``, ``mergekit-pytorch`` or ``mergekit-moe``.
        argv: Its arguments, which may include flags of ``merge``.

    Raises:
        RecipeError: If an argument is invalid or missing.
    """
    given, others = _parser(command).parse_known_args(list(argv))
    found = vars(given)
    out = found.get("out_path") or found.get("out")
    if found.get("config") is None or out is None:
        raise RecipeError(f"{command} needs a configuration and a folder to create", f"`modelfuse help {command}`")
    named = [str(found["config"]), "--output_path", str(out)]
    notes = [f"--{name.replace('_', '-')} has no effect here: {why}." for name, why in _WITHOUT_EFFECT.items()
             if name in found]  # fmt: skip
    return Translation([*named, *_settings(found), *_options(found), *others], notes)


#: Options of mergekit-extract-lora, and the equivalent settings.
_EXTRACTED = {"sv_epsilon": "lora_epsilon", "skip_undecomposable": "lora_skip_whole",
              "distribute_scale": "lora_distribute_scale"}  # fmt: skip


def extracted(command: str, argv: Sequence[str]) -> Translation:
    """Translate the arguments of ``mergekit-extract-lora``: the difference of two models as an adapter.

    >>> extracted("extract-lora", ["--model", "m", "--base-model", "b", "--out-path", "o"]).argv[-5:]
    ['--output_format', 'lora', '--lora_rank', '128', '--lora_embeddings=whole']

    Args:
        command: ``mergekit-extract-lora`` or ``extract-lora``.
        argv: Its arguments, which may include flags of ``merge``.

    Raises:
        RecipeError: If an argument is invalid or missing.
    """
    given, others = _extract_parser(command).parse_known_args(list(argv))
    found = vars(given)
    if missing := [name for name in ("model", "base_model", "out_path") if not found.get(name)]:
        flag = f"--{missing[0].replace('_', '-')}"
        raise RecipeError(f"{command} needs {flag}", "Give two models and a folder to create.")
    notes = [f"--{name.replace('_', '-')} has no effect here: {why}." for name, why in _WITHOUT_EFFECT.items()
             if name in found]  # fmt: skip
    plain = ["--model_path_list", str(found["model"]), "--base_model_path", str(found["base_model"]), "--output_path",
             str(found["out_path"]), "--output_format", "lora", "--lora_rank", str(found["max_rank"])]  # fmt: skip
    plain.append(f"--lora_embeddings={'factors' if found.get('embed_lora') else 'whole'}")
    for name, setting in (("include_regex", "lora_include"), ("exclude_regex", "lora_exclude")):
        if name in found:
            plain.append(f"--{setting}={'|'.join(f'({each})' for each in found[name])}")
    plain += [f"--{setting}={found[name]}" for name, setting in _EXTRACTED.items() if name in found]
    if "save_module" in found:
        plain += ["--lora_whole", *found["save_module"]]
    return Translation([*plain, *_settings(found), *_options(found), *others], notes)


def _extract_parser(command: str) -> Parser:
    parser = Parser(command)
    for name in ("model", "base_model"):
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name)
    parser.add_argument("--out-path", "--out_path", "--output_path", "--output-path", dest="out_path")
    parser.add_argument("--max-rank", "--max_rank", type=int, default=128)
    parser.add_argument("--sv-epsilon", "--sv_epsilon", type=float)
    for name, *short in (("include_regex", "-i"), ("exclude_regex", "-e"), ("save_module",)):
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", *short, dest=name, action="append")
    parser.add_argument("--skip-undecomposable", "--skip_undecomposable", action="store_true")
    for name in ("embed_lora", "distribute_scale", *_SWITCHES):
        parser.add_argument(
            f"--{name.replace('_', '-')}", f"--{name}", dest=name, action=argparse.BooleanOptionalAction
        )
    for name in _VALUES:
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name)
    _add_common(parser)
    return parser


def _parser(command: str) -> Parser:
    parser = Parser(command)
    parser.add_argument("config", nargs="?")
    if command == "mergekit-multi":
        parser.add_argument("--out-path", "-o")
        parser.add_argument("--intermediate-dir", "-I")
    else:
        parser.add_argument("out", nargs="?")
    if command == "mergekit-moe":
        parser.add_argument("--i-understand-this-is-not-useful-without-training", dest="allow_mismatch",
                            action="store_true")  # fmt: skip
        for name in ("load_in_4bit", "load_in_8bit"):
            parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name, action="store_true")
    if command == "mergekit-pytorch":
        parser.add_argument("--intersection", "-i", action="store_true")
        parser.add_argument("--union", "-u", action="store_true")
    for name in _SWITCHES:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, f"--{name}", dest=name, action=argparse.BooleanOptionalAction)
    for name in _VALUES:
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name)
    _add_common(parser)
    return parser


def _add_common(parser: Parser) -> None:
    parser.add_argument("--transformers-cache", "--transformers_cache")
    parser.add_argument("--device")
    parser.add_argument("--out-shard-size", "--out_shard_size")
    parser.add_argument("--random-seed", "--random_seed", type=int)
    parser.add_argument("--num-threads", "--num_threads", "-j", type=int)


def _settings(found: dict[str, Any]) -> list[str]:
    """Options with an effect, as flags of ``merge``."""
    argv = list[str]()
    if found.get("random_seed") is not None:
        argv += ["--seed", str(found["random_seed"])]
    if found.get("out_shard_size") is not None:
        argv += ["--max_shard_size", str(_shard_size(str(found["out_shard_size"])))]
    if found.get("num_threads") is not None:
        argv += ["--n_process", str(found["num_threads"])]
    for name, setting in (("write_model_card", "model_card"), ("copy_tokenizer", "copy_tokenizer"),
                          ("safe_serialization", "safe_serialization"),
                          ("unsafe_truncate_embeddings", "truncate_embeddings")):  # fmt: skip
        if name in found:
            argv.append(f"--{setting}={found[name]}")
    device = str(found.get("device") or ("cuda" if found.get("cuda") or found.get("gpu_rich") else "cpu"))
    if device.startswith("cuda"):
        argv += ["--tensor_type", "pt", "--device", "gpu"]
    elif device not in ("cpu", "auto"):
        raise RecipeError(f"--device is {shown(device)}", "Give cpu or cuda.")
    if found.get("allow_mismatch"):
        argv.append("--allow_mismatch")
    for name, policy in (("intersection", "drop"), ("union", "copy")):
        if found.get(name):
            argv += ["--missing", policy]
    if found.get("intermediate_dir") is not None:
        argv += ["--intermediate_dir", str(found["intermediate_dir"])]
    if found.get("transformers_cache") is not None:
        os.environ["HF_HUB_CACHE"] = str(found["transformers_cache"])  # Read by huggingface_hub.
    return argv


def _options(found: dict[str, Any]) -> list[str]:
    """The given options of every command."""
    given = [name for name in OPTIONS if found.get(name)]
    return [word for name in given for word in (f"--{name}", *([str(found[name])] if name == "log_file" else []))]


def _shard_size(text: str) -> int:
    match = _SHARD.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"--out-shard-size is {shown(text)}", "Give bytes, such as 5B for 5 GB.")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    return size if size > 0 else NO_LIMIT
