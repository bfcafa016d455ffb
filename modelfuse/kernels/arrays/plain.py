"""numpy versions of some compiled kernels, bit-identical, for when nothing is compiled.

Each function has the parameters of its kernel, and sums in the kernel's order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modelfuse.kernels.bfloat16 import from_bfloat16

Array = np.ndarray[Any, Any]

#: Storage codes of the compiled kernels, and the numpy types that hold the bytes.
STORED = {0: np.float32, 1: np.float64, 2: np.uint16, 3: np.float16}
#: Elements per block, and running sums, of distances.
BLOCK, LANES = 1024, 16
#: Elements of a low-rank product that are computed at a time.
PIECE = 1 << 16


def _elements(code: int, raw: Array, count: int) -> Array:
    return raw[: count * np.dtype(STORED[code]).itemsize].view(STORED[code])


def _values(code: int, raw: Array, count: int) -> Array:
    """Stored elements as float64."""
    stored = _elements(code, raw, count)
    if code == 2:
        stored = from_bfloat16(stored)
    return stored.astype(np.float64)


def measure(data: Any, stride: int, first: int, count: int, seen: Any) -> None:
    """Compare every model with the base, and sum the squares of their differences over the sampled blocks."""
    inputs, raws, models = data.inputs, data.raws, data.inputs.models
    with np.errstate(all="ignore"):
        base = _values(inputs.codes[models], raws[models], count)
        chosen = _chosen(first, count, stride)
        seen.squares[models] = _add_squares(seen.squares[models], base, chosen)
        for model in range(models):
            values = _values(inputs.codes[model], raws[model], count)
            if not seen.differs[model]:
                seen.differs[model] = _differs(inputs, raws, model, count, values, base)
            difference = values if inputs.deltas[model] else values - base
            seen.squares[model] = _add_squares(seen.squares[model], difference, chosen)


def _differs(inputs: Any, raws: Array, model: int, count: int, values: Array, base: Array) -> bool:
    """Whether a model's elements differ from the base's; compares bits if both have the same type."""
    if inputs.deltas[model]:
        return bool(values.any())
    code, other = inputs.codes[model], inputs.codes[inputs.models]
    if code != other:
        return bool((values != base).any())
    ones, others = (_elements(code, raws[row], count).view(np.uint16) for row in (model, inputs.models))
    return bool((ones != others).any())


def _chosen(first: int, count: int, stride: int) -> Array:
    """Positions of the elements of the sampled blocks, shape (blocks, BLOCK); ``count`` beyond the end."""
    starts = np.arange((-(first // BLOCK)) % stride * BLOCK, count, stride * BLOCK)
    positions: Array = np.minimum(starts[:, None] + np.arange(BLOCK), count)
    return positions


def _add_squares(total: float, values: Array, chosen: Array) -> float:
    """Sum squares block by block, in lanes that are folded in a fixed order."""
    squares = np.append(values * values, 0.0)[chosen]
    lanes = np.add.reduce(squares.reshape(len(squares), BLOCK // LANES, LANES), axis=1)
    blocks = np.cumsum(lanes, axis=1)[:, -1]
    return float(np.cumsum(np.append(total, blocks))[-1])


def expand(codes: Array, values: Array, grid: Any, scales: Array, first: int, out: Array) -> None:
    """Write code × scale for a run of elements of an 8-bit float tensor."""
    block_rows = -(-grid.rows // grid.block_rows)
    row, column = np.divmod(np.arange(first, first + codes.size), grid.columns)
    down = row // grid.rows * block_rows + row % grid.rows // grid.block_rows
    out[:] = values[codes] * scales[down - down[0], column // grid.block_columns] if codes.size else 0


def add_low_rank(left: Array, right: Array, scale: Any, first: int, sums: Array, out: Array) -> None:
    """Add elements of a low-rank product, summed over the rank in order; ``sums`` is unused."""
    del sums
    columns = right.shape[1]
    for start in range(0, out.size, PIECE):
        part = out[start : start + PIECE]
        row, column = np.divmod(np.arange(first + start, first + start + part.size), columns)
        total = np.zeros(part.size, out.dtype)
        for k in range(left.shape[1]):
            total += left[row, k] * right[k, column]
        part += total * out.dtype.type(scale)


def project(matrix: Array, right: Array, left: Array) -> None:
    """left[c] = matrix · right[c] for every vector, each sum in the order of the columns."""
    left[:] = 0
    for j in range(matrix.shape[1]):
        left += right[:, j : j + 1] * matrix[:, j].astype(np.float64)


def project_back(matrix: Array, left: Array, right: Array) -> None:
    """right[c] = left[c] · matrix for every vector, each sum in the order of the rows."""
    right[:] = 0
    for i in range(matrix.shape[0]):
        right += left[:, i : i + 1] * matrix[i].astype(np.float64)


def _dot(one: Array, other: Array) -> float:
    return float(np.cumsum(np.append(0.0, one * other))[-1])


def orthonormalize(vectors: Array) -> None:
    """Gram-Schmidt, each vector twice; linearly dependent vectors become zero."""
    for c in range(len(vectors)):
        before = np.sqrt(_dot(vectors[c], vectors[c]))
        for _ in range(2):
            for b in range(c):
                vectors[c] -= _dot(vectors[b], vectors[c]) * vectors[b]
        after = np.sqrt(_dot(vectors[c], vectors[c]))
        vectors[c] *= 1 / after if after > 1e-13 * before else 0.0


def rotate(vectors: Array, beside: Array) -> None:
    """One-sided Jacobi rotations until the vectors are orthogonal; the same rotations are applied to ``beside``."""
    for _ in range(30):
        largest = 0.0
        for a in range(len(vectors) - 1):
            for b in range(a + 1, len(vectors)):
                largest = max(largest, _rotate_pair(vectors, beside, a, b))
        if largest == 0:
            break


def _rotate_pair(vectors: Array, beside: Array, a: int, b: int) -> float:
    """Make two vectors orthogonal; returns the absolute cosine before, 0 if they already were."""
    one, other, both = _dot(vectors[a], vectors[a]), _dot(vectors[b], vectors[b]), _dot(vectors[a], vectors[b])
    if both == 0 or abs(both) <= 1e-12 * np.sqrt(one * other):
        return 0.0
    tilt = (other - one) / (2 * both)
    tangent = (1.0 if tilt >= 0 else -1.0) / (abs(tilt) + np.sqrt(1 + tilt * tilt))
    cosine = 1 / np.sqrt(1 + tangent * tangent)
    sine = cosine * tangent
    for each in (vectors, beside):
        first, second = each[a].copy(), each[b].copy()
        each[a] = cosine * first - sine * second
        each[b] = sine * first + cosine * second
    return float(abs(both) / np.sqrt(one * other))


def count_bins(bits: Array, shift: int, counts: Array) -> None:
    """Count the bits of magnitudes without their last ones."""
    for own, row in zip(counts, bits, strict=True):
        own += np.bincount(row >> shift, minlength=own.size)
