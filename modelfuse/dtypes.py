"""One table of the element types that checkpoints hold.

Names follow the safetensors format. ``compute`` says in which type a tensor is merged: the
16-bit types and float32 compute in float32, float64 in float64. Types without it are never merged,
only copied: integers, booleans, and the quantised floats, whose bits mean nothing without a scale.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct


class DType(Struct, frozen=True):
    """An element type.

    Attributes:
        name: The name in a safetensors header.
        bits: The size of one element in bits.
        numpy: The numpy type that holds the bytes; bfloat16 travels as uint16. None if there is none.
        torch: The name in torch, without ``torch.``.
        paddle: The name in Paddle, without ``paddle.``.
        compute: The type that arithmetic on it runs in, or None if it is never merged.
    """

    name: str
    bits: int
    numpy: str | None
    torch: str | None
    paddle: str | None
    compute: str | None = None

    @property
    def bytes(self) -> int:
        """The size of one element in bytes; only for types of whole bytes."""
        return self.bits // 8

    def nbytes(self, elements: int) -> int:
        """The size of so many elements in bytes."""
        return elements * self.bits // 8

    def __str__(self) -> str:
        return self.torch or self.name

    def __reduce__(self) -> tuple[Callable[[str], DType], tuple[str]]:
        # Element types are compared by identity: another process is to have its own.
        return named, (self.name,)


F64 = DType("F64", 64, "float64", "float64", "float64", "float64")
F32 = DType("F32", 32, "float32", "float32", "float32", "float32")
F16 = DType("F16", 16, "float16", "float16", "float16", "float32")
BF16 = DType("BF16", 16, "uint16", "bfloat16", "bfloat16", "float32")

_TABLE = (
    F64,
    F32,
    F16,
    BF16,
    DType("I64", 64, "int64", "int64", "int64"),
    DType("I32", 32, "int32", "int32", "int32"),
    DType("I16", 16, "int16", "int16", "int16"),
    DType("I8", 8, "int8", "int8", "int8"),
    DType("U64", 64, "uint64", "uint64", None),
    DType("U32", 32, "uint32", "uint32", None),
    DType("U16", 16, "uint16", "uint16", None),
    DType("U8", 8, "uint8", "uint8", "uint8"),
    DType("BOOL", 8, "bool", "bool", "bool"),
    DType("C64", 64, "complex64", "complex64", "complex64"),
    DType("F8_E4M3", 8, None, "float8_e4m3fn", "float8_e4m3fn"),
    DType("F8_E5M2", 8, None, "float8_e5m2", "float8_e5m2"),
    DType("F8_E4M3FNUZ", 8, None, "float8_e4m3fnuz", None),
    DType("F8_E5M2FNUZ", 8, None, "float8_e5m2fnuz", None),
    DType("F8_E8M0", 8, None, "float8_e8m0fnu", None),
    DType("F6_E2M3", 6, None, None, None),
    DType("F6_E3M2", 6, None, None, None),
    DType("F4", 4, None, None, None),
)

#: Every element type by its safetensors name.
BY_NAME = {dtype.name: dtype for dtype in _TABLE}


def named(name: str) -> DType:
    """An element type by its safetensors name."""
    return BY_NAME[name]


def computed_in(*dtypes: DType) -> DType:
    """The type that tensors of these types are merged in: float64 if any of them computes in it, else float32."""
    return F64 if any(dtype.compute == "float64" for dtype in dtypes) else F32


#: The types a merge can write, by the names that ``output_dtype`` accepts.
OUTPUT_DTYPES = {
    "float64": F64,
    "float32": F32,
    "float16": F16,
    "bfloat16": BF16,
    "fp32": F32,
    "fp16": F16,
    "bf16": BF16,
}

#: torch's names, for pickled torch checkpoints and ``torch_dtype`` in config.json.
BY_TORCH_NAME = {dtype.torch: dtype for dtype in _TABLE if dtype.torch is not None}
