"""Tensors that no input has as they are: routers, zeros, and experts with noise."""

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


class Maker(Hashable, Protocol):
    """Computes all values of a small tensor."""

    def __call__(self) -> Array:
        """The values, float32, in the tensor's shape."""


@dataclass(frozen=True, slots=True)
class MadeTensor(StoredTensor):
    """A small tensor whose values are computed all at once.

    Attributes:
        make: Computes them.
        what: What they are, for the report.
        needed: Bytes that computing them keeps resident.
        error: How far another machine's may be apart, relative to the largest; None: not by one bit.
        recent: Keeps them.
    """

    make: Maker
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
        """What computing takes, and the values."""
        return self.needed + 2 * self.nbytes

    @property
    def facts(self) -> Mapping[str, object]:
        """What they are."""
        return {"made": self.what}

    @property
    def tolerance(self) -> float | None:
        """How far another machine's values may be apart."""
        return self.error

    def expect(self, start: int, count: int) -> bool:
        """Nothing of it lies in a file."""
        return True

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Compute the values, if they are not at hand."""
        values = np.ascontiguousarray(self.recent.get(self.make, self.make), np.float32).reshape(-1)
        raw = values.view(np.uint8)

        def read(start: int, buffer: Buffer) -> None:
            first = self.dtype.nbytes(start)
            np.frombuffer(buffer, np.uint8)[:] = raw[first : first + len(buffer)]

        yield read


@dataclass(frozen=True, slots=True)
class NoisyTensor(MovedTensor):
    """A tensor with noise added to each element.

    Attributes:
        own: The tensor.
        scale: The noise's standard deviation.
        key: Of its draws.
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
        """The tensor without it."""
        return (self.own,)

    @property
    def reader_bytes(self) -> int:
        """What reading the tensor takes, and a piece of it as numbers, with draws."""
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
    """Makes zeros."""

    shape: tuple[int, ...]

    def __call__(self) -> Array:
        """As a :class:`Maker`."""
        return np.zeros(self.shape, np.float32)


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Makes random rows: standard normal, or uniform as a new Linear layer's weights.

    Attributes:
        seed: Of the draws.
        name: The tensor's, so that no two are alike.
        shape: Its shape.
        uniform: Whether they are uniform.
    """

    seed: int
    name: str
    shape: tuple[int, int]
    uniform: bool

    def __call__(self) -> Array:
        """As a :class:`Maker`."""
        key, count = stream_key(self.seed, 0, self.name), self.shape[0] * self.shape[1]
        if not self.uniform:
            return normals(key, 0, count).reshape(self.shape).astype(np.float32)
        bound = 1 / math.sqrt(self.shape[1])
        uniform: Array = ((draws(key, 0, count).astype(np.float64) * 2 - 1) * bound).astype(np.float32)
        return uniform.reshape(self.shape)


#: The numbers of a text's tokens; and for each expert, those of its prompts and of its negative ones.
Tokens = tuple[int, ...]
Prompts = tuple[tuple[tuple[Tokens, ...], tuple[Tokens, ...]], ...]


@dataclass(frozen=True, slots=True)
class EmbeddedPrompts:
    """Makes rows of prompts: the sum of their tokens' embeddings, of length 1.

    Attributes:
        embedding: The base's.
        prompts: For each expert, the tokens of its prompts and of its negative ones.
    """

    embedding: StoredTensor
    prompts: Prompts

    def __call__(self) -> Array:
        """As a :class:`Maker`."""
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
    """A vector of length 1; zeros as they are."""
    length = float(np.sqrt((vector * vector).sum()))
    scaled: Array = vector / (length or 1.0)
    return scaled


def whole(tensor: StoredTensor) -> Array:
    """All of a tensor as numbers."""
    return load(tensor, strict=True)
