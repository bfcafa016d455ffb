"""A base that is quantized and dequantized, as its adapter saw it in training.

The quantization is declared by ``quantization_config`` in the config.json of the adapter's folder, as PaddleFormers
writes it. Weight-only, symmetric, for each output over all of its inputs or in groups of them:
scale = max|w|/127 (int8) or /7 (int4), rounded to the weight's 16-bit type; code = w/scale rounded half away from zero
and clipped; the weight becomes code·scale, rounded to its type. As Paddle's ``weight_quantize`` and
``weight_dequantize`` have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint, StoredTensor, read_config
from modelfuse.checkpoints.adapters.arrays import Array, Recent, narrow, read_values, widen
from modelfuse.checkpoints.adapters.base_names import Names
from modelfuse.checkpoints.name_patterns import Patterns, UnsupportedPattern
from modelfuse.checkpoints.tensors import Reader
from modelfuse.dtypes import BF16, F16
from modelfuse.errors import CheckpointError, MismatchError
from modelfuse.storage import PathOrUrl
from modelfuse.storage.files import Buffer

#: The largest code, by algorithm.
GREATEST = {"weight_only_int8": 127, "llm.int8": 127, "weight_only_int4": 7}
#: Inputs per group; −1 is all of them.
GROUPS = (-1, 64, 128)
#: Elements that are quantized at a time: whole rows, at least one.
PIECE = 1 << 18


class GroupQuantization(NamedTuple):
    """How a weight is quantized.

    Attributes:
        greatest: The largest code.
        group: Inputs that share a scale, −1 for all.
    """

    greatest: int
    group: int


@dataclass(frozen=True, slots=True)
class QuantizedTensor(StoredTensor):
    """A 16-bit weight that is quantized and dequantized on read.

    Attributes:
        source: The weight.
        scheme: The quantization.
        out_first: Whether it is stored as [out, in].
        recent: A cache of scales.
    """

    source: StoredTensor
    scheme: GroupQuantization
    out_first: bool
    recent: Recent = field(compare=False, repr=False)

    @property
    def made_of(self) -> tuple[StoredTensor, ...]:
        """The weight."""
        return (self.source,)

    @property
    def held(self) -> int:
        """The scales, and several copies of a piece of the weight."""
        columns = self.shape[1]
        return 4 * (self._groups * self.shape[not self.out_first] + 6 * max(PIECE, columns)) + self.source.held

    @property
    def _inputs(self) -> int:
        return self.shape[1 if self.out_first else 0]

    @property
    def _groups(self) -> int:
        return 1 if self.scheme.group < 0 else self._inputs // self.scheme.group

    def _scales(self) -> Array:
        """float32, shape (groups, out)."""
        found: Array = self.recent.get(self, self._measure)
        return found

    def _measure(self) -> Array:
        largest = np.zeros((self._groups, self.shape[0 if self.out_first else 1]), np.float32)
        rows, columns = self.shape
        group = self._inputs // self._groups
        step = max(PIECE // columns, 1)
        with self.source.open() as read:
            for row in range(0, rows, step):
                count = min(step, rows - row)
                sizes = np.abs(read_values(read, self.dtype, row * columns, count * columns)).reshape(count, columns)
                if self.out_first:
                    largest[:, row : row + count] = sizes.reshape(count, self._groups, group).max(2).T
                else:
                    np.maximum.at(largest, np.arange(row, row + count) // group, sizes)
        stored = narrow(self.dtype, largest / np.float32(self.scheme.greatest))
        return widen(self.dtype, stored.view(np.uint8))

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open for reading."""
        scales, group = self._scales(), self._inputs // self._groups
        columns = self.shape[1]
        with self.source.open() as source:

            def read(start: int, buffer: Buffer) -> None:
                out = np.frombuffer(buffer, np.uint16)
                for begin in range(0, out.size, PIECE):
                    part = out[begin : begin + PIECE]
                    rows, across = np.divmod(np.arange(start + begin, start + begin + part.size), columns)
                    outputs, inputs = (rows, across) if self.out_first else (across, rows)
                    weights = read_values(source, self.dtype, start + begin, part.size)
                    weights = _there_and_back(weights, scales[inputs // group, outputs], self.scheme)
                    part[:] = narrow(self.dtype, weights)

            yield read


def _there_and_back(weights: Array, scales: Array, scheme: GroupQuantization) -> Array:
    with np.errstate(all="ignore"):  # A group of zeros has the scale zero, and stays zero.
        codes = weights / scales
    sizes = np.minimum(np.floor(np.abs(codes) + np.float32(0.5)), np.float32(scheme.greatest))
    rounded: Array = np.where(scales > 0, np.copysign(sizes, codes) * scales, weights)
    return rounded


def quantize_base(base: Checkpoint, adapters: Sequence[PathOrUrl], paddle: bool | None) -> Checkpoint:
    """The base, quantized and dequantized as the adapters' folders declare; unchanged if they declare nothing.

    Raises:
        CheckpointError: If a quantization is malformed or of an unsupported kind.
        MismatchError: If the adapters' differ, or name layers that the base does not have.
    """
    configs = [read_config(folder).get("quantization_config") for folder in adapters]
    if any(config != configs[0] for config in configs):
        raise MismatchError(
            f"{' and '.join(map(str, adapters))} were trained on bases that were quantized differently",
            "Merge them one after the other.",
        )
    if not configs or not configs[0]:
        return base
    return _Quantizing(base, adapters[0], configs[0], paddle).done()


class _Quantizing:
    def __init__(self, base: Checkpoint, folder: PathOrUrl, config: object, paddle: bool | None) -> None:
        self._base, self._paddle = base, paddle
        self._file = folder / CONFIG_FILE
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{self._file}: quantization_config is not an object")
        self._config = config
        algorithm = config.get("weight_quantize_algo")
        with _told(self._file):
            self._algorithms = {
                key: Patterns(_texts(value)) for key, value in algorithm.items()
            } if isinstance(algorithm, Mapping) else {}  # fmt: skip
            self._ignored = Patterns(_texts(config.get("ignore_modules") or ()))

    def done(self) -> Checkpoint:
        layers = self._config.get("quantization_linear_list") or []
        if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
            raise CheckpointError(f"{self._file}: quantization_linear_list is no list of names")
        schemes = {f"{layer}.weight": scheme for layer in layers if (scheme := self._scheme(layer)) is not None}
        found = Names(self._base).find(self._file, list(schemes))
        chosen = {target.name: scheme for name, scheme in schemes.items() for target in found[name]}
        recent, out_first = Recent(), self._out_first()
        quantized = {name: self._wrap(name, scheme, out_first, recent) for name, scheme in chosen.items()}
        return replace(self._base, tensors={**self._base.tensors, **quantized})

    def _scheme(self, layer: str) -> GroupQuantization | None:
        algorithm = self._config.get("weight_quantize_algo")
        with _told(self._file):
            if isinstance(algorithm, Mapping):
                fits = [key for key, patterns in self._algorithms.items() if patterns.fitting(layer)]
                algorithm = fits[-1] if fits else None
            if algorithm is None or self._ignored.fitting(layer):
                return None
        group = self._config.get("group_size", -1)
        if algorithm not in GREATEST or group not in GROUPS:
            raise CheckpointError(
                f"{self._file}: weights quantized by {algorithm} in groups of {group} are not supported",
                f"Supported are {', '.join(GREATEST)}, for each output or in groups of 64 or 128.",
            )
        return GroupQuantization(GREATEST[str(algorithm)], int(str(group)))

    def _out_first(self) -> bool:
        return not (self._base.config.get("source") == "paddle" if self._paddle is None else self._paddle)

    def _wrap(self, name: str, scheme: GroupQuantization, out_first: bool, recent: Recent) -> StoredTensor:
        source = self._base[name]
        if source.dtype not in (BF16, F16) or len(source.shape) != 2 or not source.size:
            raise CheckpointError(
                f"{self._base.path}: {name} is {source.dtype} {list(source.shape)}; only 16-bit matrices are quantized"
            )
        inputs = source.shape[1 if out_first else 0]
        if scheme.group > 0 and inputs % scheme.group:
            raise CheckpointError(f"{self._base.path}: {name} has {inputs} inputs, no multiple of {scheme.group}")
        return QuantizedTensor(
            name, source.dtype, source.shape, source.file, source.offset, source, scheme, out_first, recent
        )


def _texts(patterns: object) -> list[str]:
    listed = patterns if isinstance(patterns, list | tuple) else [patterns]
    return [each for each in listed if isinstance(each, str)]


@contextmanager
def _told(file: PathOrUrl) -> Iterator[None]:
    """Convert errors of patterns to errors that name the file."""
    try:
        yield
    except UnsupportedPattern as error:
        raise CheckpointError(f"{file}: a pattern of quantization_config is {error}") from None
