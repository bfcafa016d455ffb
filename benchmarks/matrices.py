"""How methods of whole matrices spend their time: decompositions, products of matrices, and all else.

    python benchmarks/matrices.py --width 1024 --layers 8 --repeat 3

First the products that these methods take, beside BLAS's own rate on the same shapes. Then merges of three models and
their base, Llama-shaped, in this process: the processor's time of each merge, how much of it is spent in decompositions
and linear systems and how much in products, and what the plan expected. All are processor times of one run, so that
other programs on the same cores change little but what they take of the caches. Beside them, the singular value
decompositions that the papers' own code takes for iso_c and tsv_m, of the matrices in float64, without anything else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import matmul
from pathlib import Path
from statistics import median
from threading import local
from typing import Any

import numpy as np
from reference import Shape
from rich.console import Console
from rich.table import Table
from sizes import write_models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modelfuse
from modelfuse.checkpoints.input_grams import frame_of
from modelfuse.kernels.algebra import FIXED_ORDER, LAPACK, FixedOrder, Lapack
from modelfuse.kernels.blas_threads import one_thread

METHODS = ("ridge", "regmean", "iso_c", "tsv_m", "swudi")
NAMES = ("base", "model_1", "model_2", "model_3")
#: Tokens that the inputs of regmean are of.
TOKENS = 512
DECOMPOSITIONS = ("eigh", "solve", "inverse")
HEADINGS = (
    "method", "solved", "expected", "whole", "solving", "products", "whole / solving", "whole / both", "SVDs alone"
)  # fmt: skip
#: Singular value decompositions of each matrix in published code: of the sum; of three models, and for two whitenings.
PUBLISHED = {"iso_c": 1, "tsv_m": 3 + 2}


def main(words: Sequence[str] | None = None) -> None:
    """Time products and merges, and print two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(words)
    console = Console()
    shape = Shape(options.width, options.width * 11 // 4, options.layers, options.width // 64, 2048)
    console.print(products([shape.hidden, shape.intermediate], options.repeat))
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), NAMES, shape, dense=True)
        requests = {name: request_of(Path(folder), name, shape, options.workers) for name in options.methods}
        console.print(merges(requests, shape, options.repeat))


def products(sizes: Sequence[int], repeat: int) -> Table:
    """Billions of operations a second of one thread, the best of the rounds."""
    table = Table(title="products, one thread: Gflop/s, and share of BLAS's in float64", title_justify="left")
    for heading in ("size", "BLAS float32", "BLAS float64", "Gram, BLAS", "fixed order", "Gram, fixed order"):
        table.add_column(heading, justify="right")
    for size in sizes:
        matrix = np.random.default_rng(0).standard_normal((size, size))
        other, narrow = matrix.T.copy(), matrix.astype(np.float32)
        calls: list[Callable[[], Any]] = [
            partial(matmul, narrow, narrow),
            partial(matmul, matrix, other),
            partial(LAPACK.product, matrix.T, matrix),
            partial(FIXED_ORDER.product, matrix, other),
            partial(FIXED_ORDER.product, matrix.T, matrix),
        ]
        with one_thread():
            rates = [2e-9 * size**3 / min(seconds_of(call) for _ in range(repeat + 1)) for call in calls]
        # Of a Gram matrix half is computed.
        counted = [rate / 2 if number in (2, 4) else rate for number, rate in enumerate(rates)]
        shares = [f" ({rate / counted[1]:.0%})" if number > 1 else "" for number, rate in enumerate(counted)]
        table.add_row(f"{size:,}²", *(f"{rate:.0f}{share}" for rate, share in zip(counted, shares, strict=True)))
    return table


def seconds_of(call: Callable[[], Any]) -> float:
    """The processor's time of this thread."""
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def request_of(folder: Path, method: str, shape: Shape, workers: int) -> dict[str, Any]:
    """The settings of one merge."""
    request: dict[str, Any] = {
        "merge_method": method, "base_model_path": folder / NAMES[0], "n_process": workers, "overwrite": True,
        "model_path_list": [folder / name for name in NAMES[1:]], "output_path": folder / "output",
    }  # fmt: skip
    if method == "regmean":
        request["gram_list"] = [write_grams(folder, name, shape) for name in NAMES[1:]]
    return request


def write_grams(folder: Path, model: str, shape: Shape) -> Path:
    """Gram matrices of inputs that are normal."""
    path, draw = folder / f"{model}.grams", np.random.default_rng(len(model))
    widths = {name.removesuffix(".weight"): own[1] for name, own in shape.tensors().items() if "proj" in name}
    frame = frame_of([(name, (width, width)) for name, width in widths.items()], model, TOKENS)
    grams = {}
    for width in {*widths.values()}:
        inputs = draw.standard_normal((TOKENS, width), dtype=np.float32)
        grams[width] = (inputs.T @ inputs).tobytes()
    with open(path, "wb") as file:
        for offset, piece in frame.pieces:
            file.seek(offset)
            file.write(piece)
        for offset, width in zip(frame.offsets, widths.values(), strict=True):
            file.seek(offset)
            file.write(grams[width])
    return path


def seconds_of_svds(shape: Shape) -> float:
    """Of one singular value decomposition of each matrix of the layers."""
    draw, found = np.random.default_rng(0), 0.0
    sizes = [each for name, each in shape.tensors().items() if "proj" in name]
    with one_thread():
        for size in {*sizes}:
            matrix = draw.standard_normal(size)
            found += sizes.count(size) * seconds_of(partial(np.linalg.svd, matrix, full_matrices=False))
    return found


def merges(requests: dict[str, dict[str, Any]], shape: Shape, repeat: int) -> Table:
    """Every method, round by round; medians."""
    table = Table(title="merges: seconds of the processor, of which solving and products", title_justify="left")
    headings = (
        "method",
        "solved",
        "expected",
        "whole",
        "solving",
        "products",
        "whole / solving",
        "whole / both",
        "SVDs alone",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    found: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in requests}
    expected, singular = {}, list[float]()
    for _ in range(repeat):
        singular.append(seconds_of_svds(shape))
        for name, request in requests.items():
            expected[name] = modelfuse.check(**request).expected
            with counting() as seconds:
                begun = time.process_time()
                modelfuse.merge(**request)
                found[name].append((time.process_time() - begun, seconds))
    for name, rounds in found.items():
        plan = expected[name]
        assert plan is not None
        whole = median(each for each, _ in rounds)
        solving, multiplying = (
            median(sum(seconds[kind] for kind in kinds) for _, seconds in rounds)
            for kinds in (DECOMPOSITIONS, ("product",))
        )
        table.add_row(
            name, f"{plan.solved} to {plan.largest:,}²", f"{plan.seconds * requests[name]['n_process']:.1f}",
            f"{whole:.1f}", f"{solving:.1f}", f"{multiplying:.1f}",
            f"{median(each / sum(seconds[kind] for kind in DECOMPOSITIONS) for each, seconds in rounds):.2f}",
            f"{median(each / sum(seconds.values()) for each, seconds in rounds):.2f}",
            f"{PUBLISHED[name] * median(singular):.1f}" if name in PUBLISHED else "–",
        )  # fmt: skip
    return table


@contextmanager
def counting() -> Iterator[dict[str, float]]:
    """Add up the processor's time of what the algebras do, by the name of the outermost call."""
    seconds, inside = defaultdict[str, float](float), local()
    before = {(kind, name): vars(kind)[name] for kind in (Lapack, FixedOrder) for name in ("product", *DECOMPOSITIONS)
              if name in vars(kind)}  # fmt: skip

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if getattr(inside, "busy", False):
                return function(*arguments)
            inside.busy, begun = True, time.thread_time()
            try:
                return function(*arguments)
            finally:
                inside.busy = False
                seconds[name] += time.thread_time() - begun

        return call

    for (kind, name), function in before.items():
        setattr(kind, name, timed(name, function))
    try:
        yield seconds
    finally:
        for (kind, name), function in before.items():
            setattr(kind, name, function)


if __name__ == "__main__":
    main()
