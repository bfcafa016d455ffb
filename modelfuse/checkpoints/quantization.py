"""Quantized checkpoints: fp8 is dequantized, all other schemes are refused by name.

The schemes are those documented by transformers, vLLM and the tools that write such checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Literal, NamedTuple

from msgspec import Struct

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.checkpoints.views.fp8 import FORMATS, SCALE_DTYPES, Fp8Tensor, expected_scales, fits
from modelfuse.dtypes import DType
from modelfuse.errors import CheckpointError

#: Keys of quantization settings in config.json and in the configurations of a model's parts.
DECLARATIONS = ("quantization_config", "compression_config")
#: Supported schemes: fp8 with one scale per tensor or block (DeepSeek, transformers, AutoFP8), or per row.
SUPPORTED = ("fp8", "fbgemm_fp8")
#: transformers' default block size.
USUAL_BLOCK = (128, 128)

#: Suffixes of scales after the weight's name; weights are multiplied by either.
SCALES = ("_scale_inv", "_scale")
#: Ends of the names of scales of what flows through a model while it runs; the second ones are of one element.
INPUT_SCALES = tuple(f"{mark}{name}" for mark in "._" for name in ("input_scale", "activation_scale", "act_scale"))
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale", ".output_scale")

#: Names for signs that several schemes share.
SCALED, GPTQ_OR_AWQ = "a scheme with scales", "GPTQ or AWQ"
#: Last parts of names that only quantized checkpoints have, and their schemes.
TELLTALES = {
    "qweight": GPTQ_OR_AWQ, "qzeros": GPTQ_OR_AWQ, "g_idx": "GPTQ",
    "weight_packed": "compressed-tensors", "weight_zero_point": "compressed-tensors",
    "weight_global_scale": "compressed-tensors",
    "absmax": "bitsandbytes", "quant_map": "bitsandbytes", "nested_absmax": "bitsandbytes",
    "nested_quant_map": "bitsandbytes", "bitsandbytes__nf4": "bitsandbytes", "bitsandbytes__fp4": "bitsandbytes",
    "SCB": "bitsandbytes",
    "quant_weight": "Paddle's weight-only quantization", "quant_scale": "Paddle's weight-only quantization",
    "weight_scale": SCALED, "weight_scale_inv": SCALED,
    "weight_scales": SCALED, "weight_scale_2": SCALED,
}  # fmt: skip
#: The same for integer tensors; other tensors may have these names without being quantized.
INTEGER_TELLTALES = {"codes": "AQLM", "W_q": "HQQ", "q_weight": "EXL2", "trellis": "EXL3", "_data": "Quanto"}
#: Suffixes of gpt-oss's packed experts, which are integers too.
MXFP4_ENDINGS = ("_blocks", "_scales")

UNQUANTIZED = "Merge the unquantized models, then quantize the result."
UNDECLARED = (
    "Restore quantization_config in its config.json if it is fp8 with scales. Otherwise merge the unquantized models."
)
#: How to dequantize checkpoints, by scheme.
WAYS_OUT = {
    "bitsandbytes": "Save it as bfloat16 first: load it with transformers, call model.dequantize(), then "
    "save_pretrained. Better, merge the unquantized models and quantize the result.",
    "mxfp4": "Save it as bfloat16 first: load it with transformers' Mxfp4Config(dequantize=True), then "
    "save_pretrained.",
    "compressed-tensors": "Save it as bfloat16 first: load it with transformers' "
    "CompressedTensorsConfig(run_compressed=False), then save_pretrained. Better, merge the unquantized models and "
    "quantize the result.",
}  # fmt: skip


#: Rows and columns of a block; None for one scale per tensor.
Block = tuple[int, int] | None


class Scheme(NamedTuple):
    """A quantization scheme that a config.json declares.

    Attributes:
        method: Its name.
        blocks: Candidates for rows and columns of a block, in order; None for one scale per tensor, ``row`` for one per
            row, ``matrix`` for one per matrix.
    """

    method: str
    blocks: tuple[Block | Literal["row", "matrix"], ...]


def dequantized(model: Checkpoint) -> Checkpoint:
    """The dequantized checkpoint; one that is not quantized is returned as it is.

    Raises:
        CheckpointError: If it has an unsupported quantization, or scales are missing or do not fit.
    """
    schemes = list(dict.fromkeys(_scheme(model, declared) for declared in _declarations(model.config)))
    if len(schemes) > 1:
        listed = " and ".join(scheme.method for scheme in schemes)
        raise CheckpointError(
            f"config.json of {model.path} declares {listed}, each with settings of its own", UNQUANTIZED
        )
    if schemes:
        model = _Fp8(model, schemes[0]).values()
    _refuse_undeclared(model)
    return model


def _declarations(config: Mapping[str, object]) -> Iterator[object]:
    """The quantization settings in config.json, of the model and of its parts."""
    pending = [config]
    while pending:
        for key, value in pending.pop().items():
            if key in DECLARATIONS:
                if value and not _says_nothing(value):
                    yield value
            elif isinstance(value, Mapping):
                pending.append(value)


def _says_nothing(declared: object) -> bool:
    """Whether these are the settings that Paddle's tools write for models that are not quantized."""
    if not isinstance(declared, Mapping) or "weight_quantize_algo" not in declared or declared.get("quant_method"):
        return False
    return not declared["weight_quantize_algo"] and not declared.get("quant_type")


def _scheme(model: Checkpoint, declared: object) -> Scheme:
    settings = declared if isinstance(declared, Mapping) else {}
    method = _method(settings)
    if method not in SUPPORTED:
        raise CheckpointError(
            f"{model.path} is quantized (quant_method {method}): its stored bits cannot be merged",
            WAYS_OUT.get(method, UNQUANTIZED),
        )
    scales: tuple[Block | Literal["row", "matrix"], ...] = (None, "row", "matrix")
    if "weight_block_size" not in settings:
        return Scheme(method, (*scales, USUAL_BLOCK) if method == "fp8" else scales)
    block = settings["weight_block_size"]
    if block is None:
        return Scheme(method, scales)
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and 0 < size < 2**31 for size in block):
        return Scheme(method, ((block[0], block[1]),))
    raise CheckpointError(
        f"config.json of {model.path} declares the weight_block_size {block!r}", "It should be two whole numbers."
    )


def _method(settings: Mapping[str, object]) -> str:
    method = settings.get("quant_method")
    if isinstance(method, str) and method:
        return method.lower()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    algorithm = settings.get("weight_quantize_algo") or settings.get("quant_algo")
    return algorithm if isinstance(algorithm, str) else "unknown"


class _Fp8(Struct, frozen=True):
    """Dequantizes an fp8 checkpoint."""

    model: Checkpoint
    scheme: Scheme

    def values(self) -> Checkpoint:
        """The dequantized checkpoint, without scales."""
        everything = {**self.model.tensors, **{a: self.model.tensors[to] for a, to in self.model.aliases.items()}}
        scales = self._scales(everything)
        left_out = dict.fromkeys(scales.values(), "a scale, multiplied into its tensor")
        for name, stored in everything.items():
            if name.endswith(INPUT_SCALES) or (name.endswith(CACHE_SCALES) and stored.size == 1):
                left_out[name] = "a scale of activations, which the merged model does not quantize"
        self._refuse_strays(everything, scales, left_out)
        # An alias that shares the codes but not the scales is a tensor of its own.
        aliases = {alias: to for alias, to in self.model.aliases.items()
                   if not {alias, to} & left_out.keys() and alias not in scales}  # fmt: skip
        tensors = {
            name: self._value(name, stored, everything.get(scales.get(name, "")))
            for name, stored in everything.items()
            if name not in left_out and name not in aliases
        }
        return replace(self.model, tensors=tensors, aliases=aliases, left_out=left_out, dequantized=True)

    def _scales(self, everything: Mapping[str, StoredTensor]) -> dict[str, str]:
        """The names of the scales, by those of their tensors."""
        scales: dict[str, str] = {}
        for name in everything:
            weight = next((name.removesuffix(ending) for ending in SCALES if name.endswith(ending)), None)
            if weight is None or weight not in everything:
                continue
            if weight in scales:
                raise CheckpointError(
                    f"{self.model.path}: {weight!r} has two scales, {scales[weight]!r} and {name!r}",
                    "Its files were put together from different checkpoints; fetch it again.",
                )
            scales[weight] = name
        return scales

    def _refuse_strays(
        self, everything: Mapping[str, StoredTensor], scales: Mapping[str, str], left_out: Mapping[str, str]
    ) -> None:
        for weight, scale in scales.items():
            dtype = everything[weight].dtype
            if dtype.name not in FORMATS:
                raise CheckpointError(
                    f"{self.model.path}: {weight!r} has the scale {scale!r}, but it is {dtype}, not fp8",
                    "Its bits are packed in a way that is not known here. " + UNQUANTIZED
                    if dtype.compute is None
                    else "If its values are scaled already, remove the scales and quantization_config.",
                )
        if strays := [name for name in everything if name.endswith(("weight_scale_inv", "weight_scale"))
                      and name not in left_out]:  # fmt: skip
            raise CheckpointError(
                f"{self.model.path} has scales without their tensors: {', '.join(group_names(strays))}",
                "Fetch the missing shards.",
            )

    def _value(self, name: str, stored: StoredTensor, scale: StoredTensor | None) -> StoredTensor:
        if stored.dtype.name not in FORMATS:
            return stored
        if scale is None:
            raise CheckpointError(
                f"{self.model.path}: tensor {name!r} is {stored.dtype} without a scale: there is no "
                f"{name + SCALES[0]!r} and no {name + SCALES[1]!r}",
                "Without it, the bits mean nothing. Fetch the whole checkpoint, or merge the unquantized model.",
            )
        if scale.dtype.name not in SCALE_DTYPES:
            raise CheckpointError(
                f"{self.model.path}: the scale of {name!r} is {scale.dtype}, which is not known here", UNQUANTIZED
            )
        blocks = _possible_blocks(stored.shape, self.scheme)
        block = _block(stored.shape, scale.shape, blocks)
        if block is not False:
            return Fp8Tensor.of(stored, scale, block)
        wanted = " or ".join(str(list(expected_scales(stored.shape, each)[0])) for each in blocks)
        raise CheckpointError(
            f"{self.model.path}: tensor {name!r} {list(stored.shape)} has scales of shape {list(scale.shape)}; by the "
            f"scheme that config.json declares it should be {wanted}",
            "The weight_block_size of quantization_config does not belong to these tensors.",
        )


@cache
def _possible_blocks(shape: tuple[int, ...], scheme: Scheme) -> tuple[Block, ...]:
    """Candidates for rows and columns of a block in a tensor of this shape, in order."""
    if len(shape) < 2 or 0 in shape:
        return (None,)
    known: dict[str | None, Block] = {None: None, "row": (1, shape[-1]), "matrix": (shape[-2], shape[-1])}
    return tuple(dict.fromkeys(each if isinstance(each, tuple) else known[each] for each in scheme.blocks))


@cache
def _block(shape: tuple[int, ...], scale: tuple[int, ...], blocks: tuple[Block, ...]) -> Block | Literal[False]:
    """The first block size that fits the scale's shape; any, for a tensor without elements."""
    return next((block for block in blocks if 0 in shape or fits(scale, shape, block)), False)


def _refuse_undeclared(model: Checkpoint) -> None:
    """Refuse tensors that must be quantized although config.json does not declare it."""
    betrayals: dict[str, str] = {}
    for name, tensor in model.items():
        method = _betrays(name, tensor.dtype)
        if method is not None:
            betrayals.setdefault(method, name)
    if betrayals:
        # Several schemes have scales; other signs are more specific.
        method = min(betrayals, key=lambda each: (each == SCALED, each == GPTQ_OR_AWQ))
        raise CheckpointError(
            f"{model.path} is quantized ({method}): it has {betrayals[method]!r}, though its config.json declares "
            + ("another scheme" if model.dequantized else "no quantization_config"),
            UNDECLARED if method == SCALED else WAYS_OUT.get(method.lower(), UNQUANTIZED),
        )
    bits = next((tensor for tensor in model.values() if tensor.dtype.numpy is None), None)
    if bits is not None:
        raise CheckpointError(
            f"{model.path}: tensor {bits.name!r} has the quantized dtype {bits.dtype}, and its config.json does not "
            "say how it is scaled: its bits cannot be merged",
            UNDECLARED,
        )


def _betrays(name: str, dtype: DType) -> str | None:
    """The scheme of a tensor whose name and type only occur in quantized checkpoints; else None."""
    last = name.rpartition(".")[2]
    if last in TELLTALES:
        return TELLTALES[last]
    if dtype.compute is None:
        if name.endswith(MXFP4_ENDINGS) and dtype.name == "U8":
            return "MXFP4"
        return INTEGER_TELLTALES.get(last)
    return None
