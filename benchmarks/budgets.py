"""Measure the resident memory of merges of unusual models, and compare it with the memory budget.

python benchmarks/budgets.py [--workdir DIR] [--small] [--markdown FILE] [name …]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import Sample, measure

MB = 10**6
BUDGET = 300 * MB
#: The largest ratio of resident memory to the budget that is accepted.
TOLERANCE = 1.15
PACKAGE = Path(__file__).resolve().parent.parent
#: Bytes of random content that are generated and written at a time.
PIECE = 1 << 24
ITEMSIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}

#: Name, dtype and shape.
Tensor = tuple[str, str, tuple[int, ...]]
#: Generates a number of bytes of a tensor's content.
Fill = Callable[[np.random.Generator, int], bytes]


@dataclass(frozen=True, slots=True)
class Case:
    """A merge.

    Attributes:
        models: The number of models, including the base if there is one.
        tensors: Gives the tensors of every model for a size.
        small: The size in tests; None: not tested.
        large: The size in benchmarks.
        words: Further arguments of the command line.
        base: The dtype of the base, if there is one.
        fill: Generates the content; None: sparse files of zeros.
        transposed: Whether to write torch's format with all matrices transposed.
        cold: Whether the code cache is empty.
    """

    models: int
    tensors: Callable[[int], list[Tensor]]
    small: int | None
    large: int
    words: tuple[str, ...] = ()
    base: str | None = None
    fill: Fill | None = None
    transposed: bool = False
    cold: bool = False


def any_singles(random: np.random.Generator, count: int) -> bytes:
    """float32 with all exponents; finite, and small enough that sums of a few do not overflow."""
    bits = random.integers(0, 1 << 32, count // 4, np.uint32)
    bits[bits & 0x7F800000 >= 0x7E000000] &= np.uint32(0xBFFFFFFF)
    return bits.tobytes()


def any_doubles(random: np.random.Generator, count: int) -> bytes:
    """float64 with all exponents; finite, and small enough that sums of a few do not overflow."""
    bits = random.integers(0, 1 << 64, count // 8, np.uint64)
    bits[bits & np.uint64(0x7FF << 52) >= np.uint64(0x7F8 << 52)] &= np.uint64((1 << 64) - 1 - (1 << 62))
    return bits.tobytes()


def normals(random: np.random.Generator, count: int) -> bytes:
    """float32 with the distribution of weights."""
    return (random.standard_normal(count // 4, np.float32) * np.float32(0.02)).tobytes()


def one(dtype: str) -> Callable[[int], list[Tensor]]:
    """A model of one tensor; the size is in MiB."""
    return lambda size: [("x.weight", dtype, (size << 10, (1 << 10) // ITEMSIZES[dtype]))]


def both(size: int) -> list[Tensor]:
    """Two tensors of ``size`` MiB with different compute types, which need two sets of kernels."""
    return [("x.weight", "BF16", (size, 1 << 19)), ("y.weight", "F64", (size, 1 << 17))]


def experts(size: int) -> list[Tensor]:
    """``size`` tiny tensors."""
    return [(f"model.layers.{number // 512}.experts.{number % 512}.up_proj.weight", "BF16", (8, 8))
            for number in range(size)]  # fmt: skip


def layers(size: int) -> list[Tensor]:
    """``size`` tensors of 1 MiB."""
    return [(f"model.layers.{number}.mlp.up_proj.weight", "BF16", (512, 1024)) for number in range(size)]


CASES: dict[str, Case] = {
    "one tensor": Case(2, one("BF16"), 256, 8192, ("--n_process", "2")),
    "one tensor, measured": Case(4, one("F32"), None, 2048, ("--merge_method", "ties"), "F32"),
    "fifty models": Case(51, one("F32"), 4, 64, ("--n_process", "4"), "F32"),
    "fifty models, ties": Case(51, one("BF16"), 2, 32, ("--n_process", "2", "--merge_method", "ties"), "BF16"),
    "a wide base": Case(9, one("BF16"), 4, 256, ("--n_process", "8"), "F64"),
    "many workers": Case(4, one("BF16"), 128, 1024, ("--n_process", "64"), "BF16"),
    "slerp": Case(2, one("F32"), None, 1024, ("--n_process", "2", "--merge_method", "slerp")),
    "normal, ties": Case(3, one("F32"), None, 512, ("--n_process", "2", "--merge_method", "ties"), fill=normals),
    "any float32, ties": Case(3, one("F32"), None, 512, ("--merge_method", "ties"), fill=any_singles),
    "any float32, della": Case(3, one("F32"), 32, 512, ("--n_process", "2", "--merge_method", "della"),
                               fill=any_singles),
    "any float64, della": Case(3, one("F64"), 64, 512, ("--n_process", "2", "--merge_method", "della"),
                               fill=any_doubles),
    "transposed": Case(2, one("F32"), 64, 1024, ("--n_process", "2"), transposed=True),
    "many tensors": Case(3, experts, 10_000, 100_000, ("--n_process", "2", "--merge_method", "dare_ties"), "BF16"),
    "many files": Case(2, layers, 100, 2000, ("--max_shard_size", "1MB")),
    "fifty models of any float32, della": Case(50, one("F32"), None, 64, ("--merge_method", "della"), fill=any_singles),
    "nothing compiled": Case(3, both, 8, 8, ("--merge_method", "della"), cold=True),
}  # fmt: skip


def build(case: Case, size: int, folder: Path) -> list[str]:
    """Write the models of a case.

    Returns:
        The arguments of its command line.
    """
    paths = []
    for number in range(case.models):
        path = folder / f"{number}"
        path.mkdir(parents=True)
        tensors = case.tensors(size)
        if case.base is not None and number == case.models - 1:
            tensors = [(name, case.base, shape) for name, _, shape in tensors]
        if case.transposed:
            _save_transposed(path / "pytorch_model.bin", tensors)
        else:
            _save(path / "model.safetensors", tensors, case.fill, number)
        paths.append(str(path))
    base = ["--base_model_path", paths.pop()] if case.base is not None else []
    return ["--model_path_list", *paths, *base, *case.words]


def _save(path: Path, tensors: Sequence[Tensor], fill: Fill | None, seed: int) -> None:
    header: dict[str, object] = {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * ITEMSIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, PIECE) if fill else ():
            file.write(fill(random, min(PIECE, end - start)) if fill else b"")
        file.truncate(8 + len(text) + end)


def _save_transposed(path: Path, tensors: Sequence[Tensor]) -> None:
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    torch.save({name: torch.zeros(shape[::-1], dtype=dtypes[dtype]).T for name, dtype, shape in tensors}, path)


def run(case: Case, size: int, folder: Path, budget: int = BUDGET) -> tuple[int, Sample]:
    """Build, plan and merge.

    Returns:
        The memory that the plan expects, in bytes, and the measured run.
    """
    words = [*build(case, size, folder / "models"), "--memory", str(budget)]
    environment = {"PYTHONPATH": str(PACKAGE), "HOME": str(folder)}
    if case.cold:
        environment["NUMBA_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "modelfuse", "merge", *words, "--output_path", str(folder / "merged"), "--quiet"]
    planned = expected(words)  # Before kernels are compiled, as in the merge's own plan.
    return planned, measure(command, log=folder / "log", env=environment)


def expected(words: Sequence[str]) -> int:
    """The memory that a plan of these arguments expects, in bytes."""
    from modelfuse.cli.arguments import parse
    from modelfuse.planning.plan import make_plan
    from modelfuse.recipe.recipe import Recipe

    return make_plan(Recipe.parse(parse(words)[0])).memory


def main() -> int:
    """Run the cases and print a table; returns 1 if one exceeds the budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, help="Folder for the models, which are removed again.")
    parser.add_argument("--small", action="store_true", help="Use the sizes of the tests.")
    parser.add_argument("--budget", type=int, default=BUDGET // MB, help="In MB (default: 300).")
    parser.add_argument("--markdown", type=Path, help="Write the table to this file.")
    parser.add_argument("names", nargs="*", help=f"Of: {', '.join(CASES)}.")
    given = parser.parse_args()
    rows = ["| case | size | planned | measured | of the budget | seconds |", "|---|---|---|---|---|---|"]
    print("\n".join(rows))
    holds = True
    for name in given.names or [name for name, case in CASES.items() if case.small or not given.small]:
        row, within = _measure(name, given)
        rows.append(row)
        holds = holds and within
        print(row, flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return 0 if holds else 1


def _measure(name: str, given: Any) -> tuple[str, bool]:
    case = CASES[name]
    size = case.small if given.small and case.small else case.large
    folder = Path(tempfile.mkdtemp(dir=given.workdir))
    try:
        planned, sample = run(case, size, folder, given.budget * MB)
    finally:
        shutil.rmtree(folder)
    share = sample.peak_bytes / (given.budget * MB)
    sizes = f"{planned / MB:.0f} MB | {sample.peak_bytes / MB:.0f} MB"
    row = f"| {name} | {size:,} | {sizes} | {share:.0%} | {sample.seconds:.1f} |"
    return row, share <= TOLERANCE


if __name__ == "__main__":
    os.chdir(PACKAGE)
    sys.path.insert(0, str(PACKAGE))
    sys.exit(main())
