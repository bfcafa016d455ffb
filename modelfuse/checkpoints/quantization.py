"""Checkpoints whose stored bits are not the weights: fp8 becomes values, all else is refused by name.

What is known of the schemes is what transformers, vLLM and the tools that write such checkpoints document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.tensor_names import group_names
from modelfuse.checkpoints.views.fp8 import FORMATS, SCALE_DTYPES, Fp8Tensor, expected_scales, fits
from modelfuse.dtypes import DType
from modelfuse.errors import CheckpointError

#: Where config.json, and the configurations of a model's parts in it, declare how weights are stored.
DECLARATIONS = ("quantization_config", "compression_config")
#: Schemes that are understood: fp8 with one scale a tensor or a block (DeepSeek, transformers, AutoFP8), or a row.
SUPPORTED = ("fp8", "fbgemm_fp8")
#: Blocks that transformers assumes where config.json does not give them.
USUAL_BLOCK = (128, 128)

#: Behind a weight's name, what its scale is called; both are multiplied by.
SCALES = ("_scale_inv", "_scale")
#: Ends of the names of scales of what flows through a model while it runs; the second ones are of one element.
INPUT_SCALES = tuple(f"{mark}{name}" for mark in "._" for name in ("input_scale", "activation_scale", "act_scale"))
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale", ".output_scale")

#: What may be any of several schemes.
SCALED, GPTQ_OR_AWQ = "a scheme with scales", "GPTQ or AWQ"
#: Last parts of names that only quantized checkpoints have, and whose they are.
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
#: The same, where the tensor holds integers: others may have such a name without being quantized.
INTEGER_TELLTALES = {"codes": "AQLM", "W_q": "HQQ", "q_weight": "EXL2", "trellis": "EXL3", "_data": "Quanto"}
#: Ends of names of gpt-oss's packed experts, integers too.
MXFP4_ENDINGS = ("_blocks", "_scales")

UNQUANTIZED = "Merge the unquantized models, then quantize the result."
UNDECLARED = (
    "Restore quantization_config in its config.json if it is fp8 with scales. Otherwise merge the unquantized models."
)
#: How to get weights out of a checkpoint of some scheme.
WAYS_OUT = {
    "bitsandbytes": "Save it as bfloat16 first: load it with transformers, call model.dequantize(), then "
    "save_pretrained. Better, merge the unquantized models and quantize the result.",
    "mxfp4": "Save it as bfloat16 first: load it with transformers' Mxfp4Config(dequantize=True), then "
    "save_pretrained.",
    "compressed-tensors": "Save it as bfloat16 first: load it with transformers' "
    "CompressedTensorsConfig(run_compressed=False), then save_pretrained. Better, merge the unquantized models and "
    "quantize the result.",
}  # fmt: skip


#: Rows and columns of a block; None for one scale a tensor.
Block = tuple[int, int] | None


class Scheme(NamedTuple):
    """A scheme of scales that a config.json declares.

    Attributes:
        method: Its name.
        blocks: Rows and columns of a block, in the order of trying; None for one scale a tensor, ``row`` for one a
            row, ``matrix`` for one a matrix of several.
    """

    method: str
    blocks: tuple[Block | Literal["row", "matrix"], ...]


def dequantized(model: Checkpoint) -> Checkpoint:
    """A checkpoint of values: one whose bits are values as it is, one of fp8 with its scales multiplied in.

    Raises:
        CheckpointError: If it is quantized in any other way, or its scales are missing or do not fit.
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
    """What config.json declares for the model or for one of its parts."""
    pending = [config]
    while pending:
        for key, value in pending.pop().items():
            if key in DECLARATIONS:
                if value and not _says_nothing(value):
                    yield value
            elif isinstance(value, Mapping):
                pending.append(value)


def _says_nothing(declared: object) -> bool:
    """Whether it is the record that Paddle's tools write for models that are not quantized."""
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


@dataclass(frozen=True)
class _Fp8:
    """The values of a checkpoint that declares a scheme of fp8."""

    model: Checkpoint
    scheme: Scheme

    def values(self) -> Checkpoint:
        """The same checkpoint with its codes as values, and without scales."""
        everything = {**self.model.tensors, **{a: self.model.tensors[to] for a, to in self.model.aliases.items()}}
        scales = self._scales(everything)
        left_out = dict.fromkeys(scales.values(), "a scale, multiplied into its tensor")
        for name, stored in everything.items():
            if name.endswith(INPUT_SCALES) or (name.endswith(CACHE_SCALES) and stored.size == 1):
                left_out[name] = "a scale of activations, which the merged model does not quantize"
        self._refuse_strays(everything, scales, left_out)
        # A name that shares codes, but not their scales, is a tensor of its own.
        aliases = {alias: to for alias, to in self.model.aliases.items()
                   if not {alias, to} & left_out.keys() and alias not in scales}  # fmt: skip
        tensors = {
            name: self._value(name, stored, everything.get(scales.get(name, "")))
            for name, stored in everything.items()
            if name not in left_out and name not in aliases
        }
        return replace(self.model, tensors=tensors, aliases=aliases, left_out=left_out, dequantized=True)

    def _scales(self, everything: Mapping[str, StoredTensor]) -> dict[str, str]:
        """The names of the scales, by the tensors that they belong to."""
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
    """Rows and columns of a block in a tensor of this shape, in the order of trying."""
    if len(shape) < 2 or 0 in shape:
        return (None,)
    known: dict[str | None, Block] = {None: None, "row": (1, shape[-1]), "matrix": (shape[-2], shape[-1])}
    return tuple(dict.fromkeys(each if isinstance(each, tuple) else known[each] for each in scheme.blocks))


@cache
def _block(shape: tuple[int, ...], scale: tuple[int, ...], blocks: tuple[Block, ...]) -> Block | Literal[False]:
    """The first of the blocks that the scale's shape fits; without elements, nothing can be wrong."""
    return next((block for block in blocks if 0 in shape or fits(scale, shape, block)), False)


def _refuse_undeclared(model: Checkpoint) -> None:
    """Refuse bits that mean nothing by themselves, whatever config.json does not say of them."""
    betrayals: dict[str, str] = {}
    for name, tensor in model.items():
        method = _betrays(name, tensor.dtype)
        if method is not None:
            betrayals.setdefault(method, name)
    if betrayals:
        # Several schemes have scales; what else there is says more.
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
    """The scheme that a tensor of this name and type belongs to, if it can only be quantized."""
    last = name.rpartition(".")[2]
    if last in TELLTALES:
        return TELLTALES[last]
    if dtype.compute is None:
        if name.endswith(MXFP4_ENDINGS) and dtype.name == "U8":
            return "MXFP4"
        return INTEGER_TELLTALES.get(last)
    return None
