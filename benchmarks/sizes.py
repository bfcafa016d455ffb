"""Write sharded Llama-shaped models of any size, with repeated random blocks, or sparse with headers only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from reference import BASE_DEVIATION, DELTA_DEVIATION, Shape, to_bfloat16

#: Models that are merged.
GROWING = {
    "0.1B": Shape(hidden=768, intermediate=2048, layers=8, heads=12),
    "0.4B": Shape(),
    "1B": Shape(hidden=2048, intermediate=5632, layers=20, heads=16),
    "2B": Shape(hidden=2560, intermediate=6912, layers=25, heads=20),
    "4B": Shape(hidden=3072, intermediate=8192, layers=33, heads=24),
    "7B": Shape(hidden=4096, intermediate=11008, layers=32, heads=32),
    "13B": Shape(hidden=5120, intermediate=13824, layers=40, heads=40),
    "33B": Shape(hidden=6656, intermediate=17920, layers=60, heads=52),
    "70B": Shape(hidden=8192, intermediate=28672, layers=80, heads=64, narrow=1024),
}
#: Models that are planned.
PLANNED = {
    "1B": GROWING["1B"],
    "7B": GROWING["7B"],
    "70B": replace(GROWING["70B"], vocabulary=128256),
    "405B": Shape(hidden=16384, intermediate=53248, layers=126, heads=128, vocabulary=128256, narrow=1024),
    "1T": Shape(hidden=25600, intermediate=65536, layers=160, heads=200, vocabulary=128256, narrow=1024),
    "1T of experts": Shape(7168, 512, 61, 64, 128256, narrow=1024, experts=1536),
}
SHARD_BYTES = 5_000_000_000
#: Parameters of the block of random values that is repeated in a model.
BLOCK = 1 << 24

Tensors = dict[str, tuple[int, ...]]


def blocks(models: int) -> Iterator[bytes]:
    """A block for each model: the base's first, then those of fine-tunes."""
    draw = np.random.default_rng(0)
    base = draw.standard_normal(BLOCK, dtype=np.float32) * np.float32(BASE_DEVIATION)
    yield to_bfloat16(base).tobytes()
    for _ in range(models):
        delta = draw.standard_normal(BLOCK, dtype=np.float32) * np.float32(DELTA_DEVIATION)
        yield to_bfloat16(base + delta).tobytes()


def write_models(folder: Path, names: Sequence[str], shape: Shape, dense: bool) -> None:
    """Write models of one shape in bfloat16.

    Args:
        folder: The parent folder.
        names: The names of the models' folders, the base first.
        shape: The shape of each model.
        dense: Whether to write values; otherwise the files are sparse.
    """
    contents: list[bytes | None] = list(blocks(len(names) - 1)) if dense else [None] * len(names)
    shards = _shards(shape.tensors())
    for name, content in zip(names, contents, strict=True):
        path = folder / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(shape.config()))
        _write_model(path, shards, content)


def _shards(tensors: Tensors) -> list[Tensors]:
    shards: list[Tensors] = [{}]
    size = 0
    for name, shape in tensors.items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def _write_model(path: Path, shards: Sequence[Tensors], content: bytes | None) -> None:
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(path / name, shard, content)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _write_shard(path: Path, tensors: Tensors, content: bytes | None) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(content)) if content else ():
            file.write(memoryview(content or b"")[: end - start])
        file.truncate(8 + len(text) + end)
