"""Computed tensors of mixtures: routers, zeros, and experts with noise."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.adapters.arrays import Array, Recent, load, read_values
from modelfuse.checkpoints.tensors import MovedTensor, Reader
from modelfuse.kernels.normal_draws import normals
from modelfuse.methods.random import draws, stream_key
from modelfuse.storage.files import Buffer

#: Elements to which noise is added at a time.
PIECE = 1 << 18


class ValueFunction(Hashable, Protocol):
    """Computes all values of a small tensor."""

    def __call__(self) -> Array:
        """The values: float32, in the tensor's shape."""


@dataclass(frozen=True, slots=True)
class MadeTensor(StoredTensor):
    """A small tensor whose values are computed together when it is first read.

    Attributes:
        make: Computes the values.
        what: A description for the report.
        needed: Bytes that the computation keeps in memory.
        error: The tolerance of values from another machine, relative to the largest; None if they are the same.
        recent: Cache of the values.
    """

    make: ValueFunction
    what: str
    needed: int
    error: float | None
    recent: Recent = field(compare=False, repr=False)

    @property
    def is_made(self) -> bool:
        """Always."""
        return True

    @property
    def held(self) -> int:
        """Bytes of the computation and of the values."""
        return self.needed + 2 * self.nbytes

    @property
    def facts(self) -> Mapping[str, object]:
        """The description for the report."""
        return {"made": self.what}

    @property
    def tolerance(self) -> float | None:
        """As ``error``."""
        return self.error

    def expect(self, start: int, count: int) -> bool:
        """Nothing to read ahead."""
        return True

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Compute the values if they are not cached, and open them for reading."""
        values = np.ascontiguousarray(self.recent.get(self.make, self.make), np.float32).reshape(-1)
        raw = values.view(np.uint8)

        def read(start: int, buffer: Buffer) -> None:
            first = self.dtype.nbytes(start)
            np.frombuffer(buffer, np.uint8)[:] = raw[first : first + len(buffer)]

        yield read


@dataclass(frozen=True, slots=True)
class NoisyTensor(MovedTensor):
    """A tensor with normal noise added to each element.

    Attributes:
        own: The tensor without noise.
        scale: The standard deviation of the noise.
        key: The key of its random draws.
    """

    own: StoredTensor
    scale: float
    key: int

    @property
    def is_made(self) -> bool:
        """Always."""
        return True

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The tensor without noise."""
        return (self.own,)

    @property
    def reader_bytes(self) -> int:
        """Bytes of the tensor's reader, and of a piece of values and random draws."""
        return self.own.reader_bytes + PIECE * 100

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        with self.own.open() as own:

            def read(start: int, buffer: Buffer) -> None:
                out = np.frombuffer(buffer, self.dtype.compute)
                for first in range(0, out.size, PIECE):
                    count = min(PIECE, out.size - first)
                    values = read_values(own, self.own.dtype, start + first, count)
                    noise = normals(self.key, start + first, count)
                    out[first : first + count] = values + (noise * self.scale).astype(values.dtype)

            yield read


@dataclass(frozen=True, slots=True)
class Zeros:
    """Computes zeros."""

    shape: tuple[int, ...]

    def __call__(self) -> Array:
        """As :class:`ValueFunction`."""
        return np.zeros(self.shape, np.float32)


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Computes random rows: standard normal, or uniform as torch initializes a linear layer.

    Attributes:
        seed: The seed of the random draws.
        name: The tensor's name, which the draws depend on.
        shape: The tensor's shape.
        uniform: Whether the distribution is uniform.
    """

    seed: int
    name: str
    shape: tuple[int, int]
    uniform: bool

    def __call__(self) -> Array:
        """As :class:`ValueFunction`."""
        key, count = stream_key(self.seed, 0, self.name), self.shape[0] * self.shape[1]
        if not self.uniform:
            return normals(key, 0, count).reshape(self.shape).astype(np.float32)
        bound = 1 / math.sqrt(self.shape[1])
        uniform: Array = ((draws(key, 0, count).astype(np.float64) * 2 - 1) * bound).astype(np.float32)
        return uniform.reshape(self.shape)


#: The token ids of a text; and for each expert, those of its prompts and of its negative prompts.
Tokens = tuple[int, ...]
Prompts = tuple[tuple[tuple[Tokens, ...], tuple[Tokens, ...]], ...]


@dataclass(frozen=True, slots=True)
class EmbeddedPrompts:
    """Computes rows from prompts: the sum of their tokens' embeddings, scaled to length 1.

    Attributes:
        embedding: The base's token embedding.
        prompts: For each expert, the tokens of its prompts and of its negative prompts.
    """

    embedding: StoredTensor
    prompts: Prompts

    def __call__(self) -> Array:
        """As :class:`ValueFunction`."""
        width, rows = self.embedding.shape[1], dict[int, Array]()
        with self.embedding.open() as read:
            tokens = {token for pair in self.prompts for side in pair for prompt in side for token in prompt}
            for token in sorted(tokens):
                rows[token] = read_values(read, self.embedding.dtype, token * width, width).astype(np.float64)
        made = np.zeros((len(self.prompts), width))
        for number, (wanted, unwanted) in enumerate(self.prompts):
            made[number] = direction(_sum(wanted, rows, width))
            if unwanted:
                made[number] = direction(made[number] - direction(_sum(unwanted, rows, width)))
        return made.astype(np.float32)


def _sum(prompts: tuple[Tokens, ...], rows: Mapping[int, Array], width: int) -> Array:
    total = np.zeros(width)
    for prompt in prompts:
        for token in prompt:
            total += rows[token]
    return total


def direction(vector: Array) -> Array:
    """A vector scaled to length 1; a vector of zeros is returned as it is."""
    length = float(np.sqrt((vector * vector).sum()))
    scaled: Array = vector / (length or 1.0)
    return scaled


def whole(tensor: StoredTensor) -> Array:
    """The values of a whole tensor; non-finite values are an error."""
    return load(tensor, strict=True)
