"""8-bit float tensors with scales, dequantized to float32 on read.

A code consists of sign, exponent and mantissa bits as in IEEE 754, except for the codes of infinities and NaN
(Micikevicius et al. 2022, arXiv:2209.05433). An element is its code's value times the scale of its block, rounded to
float32 once, as in the conversions of DeepSeek-V3 and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.tensors import Reader
from modelfuse.dtypes import BF16, F32, DType
from modelfuse.kernels.bfloat16 import from_bfloat16
from modelfuse.storage.files import Buffer

if TYPE_CHECKING:
    from modelfuse.kernels.compiled.fp8 import Grid

Array = np.ndarray[Any, np.dtype[np.float32]]

#: Exponent bits, mantissa bits and exponent bias of each type. In "FNUZ" types the code of −0 is the one NaN; without
#: that, E4M3 keeps NaN for the last code of each sign, and E5M2 has infinities and NaN as IEEE 754 does.
FORMATS = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15), "F8_E4M3FNUZ": (4, 3, 8), "F8_E5M2FNUZ": (5, 2, 16)}
#: Types of scales.
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


def values_of(dtype: DType) -> Array:
    """The values of the 256 codes of a type.

    >>> from modelfuse.dtypes import BY_NAME
    >>> values_of(BY_NAME["F8_E4M3"])[[0x00, 0x01, 0x38, 0x7E, 0xC0]].tolist()
    [0.0, 0.001953125, 1.0, 448.0, -2.0]

    Args:
        dtype: One of ``FORMATS``.

    Returns:
        float32, shape (256,).
    """
    exponent_bits, mantissa_bits, bias = FORMATS[dtype.name]
    codes = np.arange(256)
    exponent, mantissa = codes >> mantissa_bits & (1 << exponent_bits) - 1, codes & (1 << mantissa_bits) - 1
    # A subnormal has the exponent of the first normal ones, and no leading one.
    significand = mantissa + (exponent > 0) * (1 << mantissa_bits)
    values = np.ldexp(significand.astype(np.float32), np.maximum(exponent, 1) - bias - mantissa_bits)
    values = np.where(codes >> 7 == 1, -values, values)
    if dtype.name.endswith("FNUZ"):
        values[0x80] = np.nan
    elif dtype.name == "F8_E4M3":
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[exponent == 31] = np.nan
        values[[0x7C, 0xFC]] = np.inf, -np.inf
    singles: Array = values.astype(np.float32)
    return singles


def scales_of(dtype: DType, content: bytes) -> Array:
    """The values of stored scales.

    Args:
        dtype: One of ``SCALE_DTYPES``. F8_E8M0 is an exponent alone: 2^(code − 127), NaN for 255.
        content: Their bytes.

    Returns:
        float32, one per scale.
    """
    if dtype.name == "F8_E8M0":
        codes = np.frombuffer(content, np.uint8)
        powers = np.ldexp(np.float32(1), np.minimum(codes, 254).astype(np.int32) - 127)
        return np.where(codes == 255, np.float32(np.nan), powers)
    if dtype is BF16:
        return from_bfloat16(np.frombuffer(content, "<u2"))
    return np.frombuffer(content, "<f2" if dtype.name == "F16" else "<f4").astype(np.float32)


@dataclass(frozen=True, slots=True)
class Fp8Tensor(StoredTensor):
    """A tensor of one-byte floats, read as float32.

    Attributes:
        codes: The stored codes.
        scale: The stored scales, row-major over all matrices' blocks.
        block: Rows and columns of a block; the last two dimensions are a matrix's. None: one scale for all.
    """

    codes: StoredTensor
    scale: StoredTensor
    block: tuple[int, int] | None

    @classmethod
    def of(cls, codes: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None) -> Fp8Tensor:
        """The values of ``codes``; see the attributes."""
        return cls(codes.name, F32, codes.shape, codes.file, codes.offset, codes, scale, block)

    @property
    def natural(self) -> DType:
        """bfloat16, the type in which such models are served without scales."""
        return BF16

    @property
    def stored(self) -> DType:
        """The type of the codes."""
        return self.codes.dtype

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The codes and the scales."""
        return self.codes, self.scale

    @property
    def grid(self) -> Grid:
        """The grid of its blocks."""
        from modelfuse.kernels.compiled.fp8 import Grid

        if self.block is None:
            return Grid(1, self.size, 1, self.size)
        return Grid(self.shape[-2], self.shape[-1], *self.block)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open the codes and the scales for reading; elements come out as float32."""
        from modelfuse.kernels.compiled.fp8 import expand

        values, grid = values_of(self.codes.dtype), self.grid
        across, size = grid.shape[1], self.scale.dtype.bytes
        with self.codes.open() as read_codes, self.scale.open() as read_scales:

            def read(start: int, buffer: Buffer) -> None:
                out = np.frombuffer(buffer, np.float32)
                codes = np.frombuffer(buffer, np.uint8)[3 * out.size :]
                read_codes(start, codes.data)
                top, bottom = grid.row_of(start), grid.row_of(start + out.size - 1)
                content = bytearray((bottom - top + 1) * across * size)
                read_scales(top * across, memoryview(content))
                scales = scales_of(self.scale.dtype, bytes(content)).reshape(-1, across)
                expand(codes, values, grid, scales, start, out)

            yield read


def expected_scales(shape: tuple[int, ...], block: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """The shapes that the scales of a tensor may have; for one scale, any shape of one element will do.

    >>> expected_scales((576, 7168), (128, 128))
    [(5, 56)]
    """
    if block is None or len(shape) < 2:
        return [()]
    down, across = (-(-length // size) for length, size in zip(shape[-2:], block, strict=True))
    *matrices, _, _ = shape
    shapes = [(*matrices, down, across)]
    # A scale a matrix or a row is also stored without the dimensions of length one.
    shapes += [(*matrices, down)] if across == 1 else []
    shapes += [(*matrices,)] if across == down == 1 and matrices else []
    return shapes


def fits(scale: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    """Whether scales of one shape belong to a tensor of another."""
    expected = expected_scales(shape, block)
    return scale in expected or (math.prod(scale) == math.prod(expected[0]) == 1)
